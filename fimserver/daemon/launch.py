"""Find the daemon, or start one: editors that start at the same time get the same daemon. Standard library only.

    open_editor   a stream for an editor's messages, from a daemon of this build or a newer one
    ask           one command, one answer; read_status: the daemon's status
    end_daemon    stop the daemon, restart it, or let another take its place
    start         start a daemon in a session of its own, with its log in the state folder

An older daemon is asked to hand over: it releases its socket and lock, and its editors reconnect to the next one.

Knows:  processes, the endpoint.  Never: LSP.
"""

import errno
import os
import signal
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fimserver.daemon.build import read_build
from fimserver.daemon.transport import KEY, Lock, Stream, connect, say_hello
from fimserver.errors import DaemonError
from fimserver.paths import OUTSIDE, log_folder, make_private, read_plain

if TYPE_CHECKING:
    import subprocess

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 15.0
FORCE_TIMEOUT_S = 5.0
_POLL_S = 0.02
_PROBE_S = 0.3  # longer than any probe holds the lock
_MOST_HAND_OVERS = 3  # older relays may have started an older daemon again
EARLY_WORKER = ("--early-worker",)  # an option of ``fimserver daemon run``
MAX_LOG_BYTES = 2_000_000
_started: "subprocess.Popen[bytes] | None" = None


def log_file() -> Path:
    """Return the path of the log of the daemon and its worker; it never contains code."""
    return log_folder() / "daemon.log"


def open_editor(overrides: Mapping[str, Any]) -> Stream:
    """Return a stream for an editor; start a daemon if none is running. Raises ``DaemonError``."""
    build = read_build()
    deadline = time.monotonic() + START_TIMEOUT_S
    hand_overs = 0
    while time.monotonic() < deadline:
        try:
            stream = connect()
            answer = say_hello(stream, "editor", build, {"overrides": dict(overrides)})
        except (FileNotFoundError, ConnectionError):
            start(has_editor=True)  # also removes a stale socket, and waits for a daemon that is ending
            continue
        if answer[KEY] == "welcome":
            return stream
        stream.close()
        if answer[KEY] == "ending":
            time.sleep(_POLL_S)
            continue
        if answer[KEY] != "older":
            msg = f"the daemon refuses this editor: {answer.get('reason', 'no reason given')}"
            raise DaemonError(msg)
        if hand_overs == _MOST_HAND_OVERS:
            msg = "the system starts an older fimserver; run with this version: fimserver daemon install"
            raise DaemonError(msg)
        hand_overs += 1
        end_daemon("hand_over")
    msg = f"no daemon responded in {START_TIMEOUT_S:.0f} s; see {log_file()}, or run: fimserver daemon restart"
    raise DaemonError(msg)


def ask(command: str, **values: str) -> dict[str, Any] | None:
    """Return the daemon's answer to a command; ``None`` if none is running. Raises ``DaemonError`` for no answer."""
    try:
        stream = connect()
        try:
            return say_hello(stream, "control", read_build(), {"command": command, **values})
        finally:
            stream.close()
    except (FileNotFoundError, ConnectionError):
        return None  # no daemon, or one that is ending


def read_status() -> dict[str, Any] | None:
    """Return the daemon's status; ``None`` if no daemon is running. Raises ``DaemonError`` if it does not respond."""
    answer = ask("status")
    status = answer.get("status") if answer is not None else None
    return status if isinstance(status, dict) else None


def end_daemon(command: str, *, force: bool = False) -> bool:
    """End the daemon with a ``command``: stop, restart or hand_over. Return ``False`` if none is running.

    With ``force`` a daemon is killed that does not respond, refuses, or does not end in time. Raises ``DaemonError`` if
    it does not end.
    """
    lock, ended, killed = Lock("daemon.lock"), None, False
    timeout_s = FORCE_TIMEOUT_S if force else END_TIMEOUT_S
    try:
        stream = connect()
        try:
            ended = say_hello(stream, "control", read_build(), {"command": command}).get("pid")
            stream.set_timeout(timeout_s)
            stream.read()  # returns when the daemon closes the connection
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
    deadline = time.monotonic() + timeout_s
    while _is_held() and (ended is None or lock.read_holder() == ended):  # another daemon may have started already
        if time.monotonic() > deadline and force and not killed:
            _kill()
            killed, deadline = True, time.monotonic() + timeout_s
        elif time.monotonic() > deadline:
            msg = f"the daemon has not ended within {timeout_s:.0f} s; kill it with: fimserver daemon stop --force"
            raise DaemonError(msg)
        time.sleep(_POLL_S)
    return True


def _is_held(timeout_s: float = 0.0) -> bool:
    """Return whether a daemon's process is running, listening or not."""
    lock = Lock("daemon.lock")
    if not lock.acquire(timeout_s, is_probe=True):
        return True
    lock.release()
    return False


def _kill() -> None:
    """Kill the process that holds the daemon's lock; the holder writes its process id into the lock file."""
    holder = Lock("daemon.lock").read_holder()
    if holder is not None and _is_held(_PROBE_S):
        with suppress(OSError):
            os.kill(holder, getattr(signal, "SIGKILL", signal.SIGTERM))


def start(*, has_editor: bool = False) -> None:
    """Start a daemon unless one is listening, and wait until it listens. Raises ``DaemonError``.

    With ``has_editor`` the daemon starts a worker at once, because an editor will need it.
    """
    starting = Lock("start.lock")
    if not starting.acquire(START_TIMEOUT_S):
        msg = f"another process has been starting the daemon for {START_TIMEOUT_S:.0f} s; see {log_file()}"
        raise DaemonError(msg)
    try:
        if _is_listening():
            return
        running = Lock("daemon.lock")
        if not running.acquire(START_TIMEOUT_S, is_probe=True):  # a daemon that no longer listens is ending
            msg = f"an unresponsive daemon holds {running.path}; end it with: fimserver daemon stop --force"
            raise DaemonError(msg)
        running.release()
        process = _spawn(EARLY_WORKER if has_editor else ())
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_listening():
            if process.poll() is not None or time.monotonic() > deadline:
                state = "ended" if process.poll() is not None else "does not listen"
                msg = f"the daemon was started and {state}: {_last_line()}; see {log_file()}, or run: fimserver doctor"
                raise DaemonError(msg)
            time.sleep(_POLL_S)
    finally:
        starting.release()


def _spawn(options: Sequence[str]) -> "subprocess.Popen[bytes]":
    global _started  # noqa: PLW0603  kept so that it can be reaped
    import subprocess  # noqa: PLC0415  most relays find a daemon and never need it

    path = log_file()
    make_private(path.parent)
    _rotate(path)
    try:
        log = _open_log(path)
    except OSError as error:
        msg = f"the log {path} cannot be written ({error.strerror}); remove it, or fix its folder"
        raise DaemonError(msg) from error
    if _started is not None:
        _started.poll()
    detached: dict[str, Any] = (
        {"creationflags": 0x00000008 | 0x00000200}  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
        if sys.platform == "win32"
        else {"start_new_session": True}
    )
    try:
        _started = subprocess.Popen(  # noqa: S603  our own interpreter
            [sys.executable, "-P", "-m", "fimserver", "daemon", "run", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=OUTSIDE,
            **detached,
        )
    except OSError as error:
        msg = f"the daemon cannot be started: {error}"
        raise DaemonError(msg) from error
    finally:
        os.close(log)
    return _started


def _open_log(path: Path) -> int:
    """Open the log for appending. Raises ``OSError``, also for a pipe, which could block until somebody reads it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    log = os.open(path, flags, 0o600)
    if not stat.S_ISREG(os.fstat(log).st_mode):
        os.close(log)
        raise OSError(errno.EINVAL, "it is not a file")
    if hasattr(os, "set_blocking"):
        os.set_blocking(log, True)
    return log


def _rotate(path: Path) -> None:
    """Rename a large log; one earlier log is kept."""
    try:
        if path.lstat().st_size > MAX_LOG_BYTES:  # a running daemon rotates its log in logs.py
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
