"""Start a worker before its options are known, so that its imports run while the server starts.

    start_early_worker     start a worker without options; it imports torch and the engine, and waits
    take_early_worker      return that worker's process, for the first engine that can use it
    discard_early_worker   end it, because no engine needs it

A worker is started early only where an editor waits for the server. It ends with the server, whose end closes its pipe,
and after ``LIFETIME_S`` if no engine has taken it. Standard library only: it is the first that a server imports.

Knows:  processes.  Never: options, messages.
"""

import subprocess
import sys
import threading

from fimserver.paths import OUTSIDE

COMMAND = (sys.executable, "-P", "-m", "fimserver.engine.worker")
LIFETIME_S = 30.0  # an editor that starts a server initializes it within a second
_lock = threading.Lock()
_waiting: "subprocess.Popen[bytes] | None" = None


def spawn_worker(command: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    """Start a worker's process with pipes for frames. Raises ``OSError``."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=OUTSIDE)  # noqa: S603  our own interpreter


def start_early_worker() -> None:
    """Start a worker without options; do nothing if it cannot be started, which the engine will report."""
    global _waiting  # noqa: PLW0603  one for each server
    try:
        process = spawn_worker(COMMAND)
    except OSError:
        return
    with _lock:
        _waiting = process
    timer = threading.Timer(LIFETIME_S, discard_early_worker)
    timer.daemon = True
    timer.start()


def take_early_worker() -> "subprocess.Popen[bytes] | None":
    """Return the worker that was started early, once; ``None`` if there is none or it has ended."""
    global _waiting
    with _lock:
        process, _waiting = _waiting, None
    if process is None or process.poll() is None:
        return process
    _release(process)
    return None


def discard_early_worker() -> None:
    """End the worker that was started early, unless an engine has taken it."""
    process = take_early_worker()
    if process is not None:
        process.kill()  # it has nothing to save
        threading.Thread(target=_release, args=(process,), daemon=True).start()  # its end takes some milliseconds


def _release(process: "subprocess.Popen[bytes]") -> None:
    """Wait for an ended process and close its pipes."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.wait()
