"""Find the daemon, or start one: ten editors that start at once get the same. Standard library only.

    open_editor   a stream for an editor's messages, from a daemon of this build or a newer one
    ask           one command, one answer; read_status: what it says of itself
    end_daemon    stop it, or make room for another
    start         a daemon, in a session of its own, its log in the state folder

An older daemon is asked to hand over: it lets go of its socket and lock, and its editors go on with the next one.

Knows:  processes, the endpoint.  Never: LSP.
"""

import errno
import os
import signal
import stat
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fimserver.daemon.build import read_build
from fimserver.daemon.transport import KEY, Lock, Stream, connect, say_hello
from fimserver.errors import DaemonError
from fimserver.paths import log_folder, make_private, read_plain

if TYPE_CHECKING:
    import subprocess

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 15.0
_POLL_S = 0.02
_PROBE_S = 0.3  # for which nobody holds the lock who only looks
_MOST_HAND_OVERS = 3  # older relays may have started an older one once more
MAX_LOG_BYTES = 2_000_000
_started: "subprocess.Popen[bytes] | None" = None


def log_file() -> Path:
    """Where the daemon and its worker write what went wrong; never code."""
    return log_folder() / "daemon.log"


def open_editor(overrides: Mapping[str, Any]) -> Stream:
    """A stream for an editor; a daemon is started where none is. Raises ``DaemonError``."""
    build = read_build()
    deadline = time.monotonic() + START_TIMEOUT_S
    hand_overs = 0
    while time.monotonic() < deadline:
        try:
            stream = connect()
            answer = say_hello(stream, "editor", build, {"overrides": dict(overrides)})
        except (FileNotFoundError, ConnectionError):
            start()  # of a socket that nobody holds; where a daemon is just ending, it waits for that
            continue
        if answer[KEY] == "welcome":
            return stream
        stream.close()
        if answer[KEY] == "ending":
            time.sleep(_POLL_S)
            continue
        if answer[KEY] != "older":
            msg = f"the daemon refuses this editor: {answer.get('reason', 'it does not say why')}"
            raise DaemonError(msg)
        if hand_overs == _MOST_HAND_OVERS:
            msg = "the system starts an older fimserver than this; run with this one: fimserver daemon install"
            raise DaemonError(msg)
        hand_overs += 1
        end_daemon("hand_over")
    msg = f"no daemon could be reached in {START_TIMEOUT_S:.0f} s; see {log_file()}, or run: fimserver daemon restart"
    raise DaemonError(msg)


def ask(command: str, **values: str) -> dict[str, Any] | None:
    """What the daemon answers to a command; ``None`` where none runs. Raises ``DaemonError`` for no answer."""
    try:
        stream = connect()
        try:
            return say_hello(stream, "control", read_build(), {"command": command, **values})
        finally:
            stream.close()
    except (FileNotFoundError, ConnectionError):
        return None  # none, or one that is just ending


def read_status() -> dict[str, Any] | None:
    """What the daemon says of itself; ``None`` where none runs. Raises ``DaemonError`` where it does not answer."""
    answer = ask("status")
    status = answer.get("status") if answer is not None else None
    return status if isinstance(status, dict) else None


def end_daemon(command: str, *, force: bool = False) -> bool:
    """End the daemon by a ``command``: stop, restart, hand_over. ``False`` where none runs.

    With ``force`` one that does not answer is killed. Raises ``DaemonError`` where it goes on.
    """
    lock, ended = Lock("daemon.lock"), None
    try:
        stream = connect()
        try:
            ended = say_hello(stream, "control", read_build(), {"command": command}).get("pid")
            stream.set_timeout(END_TIMEOUT_S)
            stream.read()  # nothing more comes: this is its end
        finally:
            stream.close()
    except (FileNotFoundError, ConnectionError):
        if not _is_held():
            return False
        if force:
            _kill()
    except DaemonError:
        if not force:
            raise
        _kill()
    deadline = time.monotonic() + END_TIMEOUT_S
    while _is_held() and (ended is None or lock.read_holder() == ended):  # another may have begun already
        if time.monotonic() > deadline:
            msg = f"the daemon has not ended within {END_TIMEOUT_S:.0f} s; kill it with: fimserver daemon stop --force"
            raise DaemonError(msg)
        time.sleep(_POLL_S)
    return True


def _is_held(timeout_s: float = 0.0) -> bool:
    """Whether a daemon's process is there, listening or not."""
    lock = Lock("daemon.lock")
    if not lock.acquire(timeout_s, is_probe=True):
        return True
    lock.release()
    return False


def _kill() -> None:
    """End the process that holds the daemon's lock; its number is in the file, written by the holder."""
    holder = Lock("daemon.lock").read_holder()
    if holder is not None and _is_held(_PROBE_S):
        with suppress(OSError):
            os.kill(holder, getattr(signal, "SIGKILL", signal.SIGTERM))


def start() -> None:
    """Start a daemon unless one is there, and wait until it listens. Raises ``DaemonError``."""
    starting = Lock("start.lock")
    if not starting.acquire(START_TIMEOUT_S):
        msg = f"another process has been starting the daemon for {START_TIMEOUT_S:.0f} s; see {log_file()}"
        raise DaemonError(msg)
    try:
        if _is_listening():
            return
        running = Lock("daemon.lock")
        if not running.acquire(START_TIMEOUT_S, is_probe=True):  # one that no longer listens is ending
            msg = f"a daemon that does not answer holds {running.path}; end it with: fimserver daemon stop --force"
            raise DaemonError(msg)
        running.release()
        process = _spawn()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_listening():
            if process.poll() is not None or time.monotonic() > deadline:
                state = "ended" if process.poll() is not None else "does not listen"
                msg = f"the daemon was started and {state}: {_last_line()}; see {log_file()}, or run: fimserver doctor"
                raise DaemonError(msg)
            time.sleep(_POLL_S)
    finally:
        starting.release()


def _spawn() -> "subprocess.Popen[bytes]":
    global _started  # noqa: PLW0603  waited for when it ends, or it would stay in the system's table
    import subprocess  # noqa: PLC0415  most relays find a daemon and never need it

    path = log_file()
    make_private(path.parent)
    _rotate(path)
    try:
        log = _open_log(path)
    except OSError as error:
        msg = f"the log {path} cannot be written ({error.strerror}); remove it, or mend its folder"
        raise DaemonError(msg) from error
    if _started is not None:
        _started.poll()
    detached: dict[str, Any] = (
        {"creationflags": 0x00000008 | 0x00000200}  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
        if sys.platform == "win32"
        else {"start_new_session": True}
    )
    try:
        _started = subprocess.Popen(
            [sys.executable, "-P", "-m", "fimserver", "daemon", "run"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path(sys.executable).anchor,  # no folder of the person's is held
            **detached,
        )
    except OSError as error:
        msg = f"the daemon cannot be started: {error}"
        raise DaemonError(msg) from error
    finally:
        os.close(log)
    return _started


def _open_log(path: Path) -> int:
    """The log, to be written to at its end. Raises ``OSError``, also of a pipe, which might wait for a reader."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    log = os.open(path, flags, 0o600)
    if not stat.S_ISREG(os.fstat(log).st_mode):
        os.close(log)
        raise OSError(errno.EINVAL, "it is no file")
    if hasattr(os, "set_blocking"):
        os.set_blocking(log, True)
    return log


def _rotate(path: Path) -> None:
    """One earlier log is kept."""
    try:
        if path.lstat().st_size > MAX_LOG_BYTES:  # a daemon that runs sees to it itself: logs.py
            path.replace(path.with_name(f"{path.name}.1"))
    except OSError:
        return


def _last_line() -> str:
    try:
        lines = read_plain(log_file()).strip().splitlines()
    except OSError:
        lines = []
    last = lines[-1] if lines else "it wrote nothing"
    if last.startswith("{"):
        import json  # noqa: PLC0415

        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(last)["event"])
    return last


def _is_listening() -> bool:
    try:
        connect().close()
    except (FileNotFoundError, ConnectionError):
        return False
    return True
