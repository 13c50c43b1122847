"""Drop all privileges that a program does not need, then run it: the child of ``sandbox.py``.

Started by its path in a bare interpreter (``python -I -S``), so it imports the standard library alone. The order
comes on standard input; the order's token goes to standard output after the program has ended.

Knows:  limits, audit events.  Never: items, the rest of fimserver.
"""

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
_REFUSED = (  # prefixes of audit events
    *("os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "os.startfile"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime"),
    *("os.chmod", "os.chown", "os.chflags", "os.setxattr", "os.removexattr", "shutil.", "tempfile."),
    *("subprocess.", "pty.", "signal.pthread_kill", "socket.", "ctypes.", "resource.", "webbrowser.", "sqlite3."),
)


def _leave_network() -> None:
    """Enter an empty network namespace, if the system permits it."""
    with suppress(OSError, AttributeError, TypeError):  # libc not found, or not Linux
        ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)  # returns -1 if not permitted; the audit hook remains


def _set_limits(limits: dict[str, Any]) -> None:
    import resource  # noqa: PLC0415  missing on Windows, where this is not used

    wanted = [
        (resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ]
    for which, soft, hard in wanted:
        with suppress(ValueError, OSError):  # macOS has no address space limit; a lower one may already be set
            resource.setrlimit(which, (soft, hard))
    signal.alarm(int(limits["wall_s"]) + 1)  # in case the parent has died


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse audit events; an audit hook cannot be removed."""
    if event == "open":
        _path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & _WRITES)
    else:
        writes = event.startswith(_REFUSED)
    if writes:
        msg = f"{event} is refused to generated code"
        raise PermissionError(msg)


def main() -> None:
    """Run the program of the order, and print the token when it has ended."""
    order = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    module = sys.modules["program"] = ModuleType("program")
    _leave_network()
    _set_limits(order["limits"])
    sys.addaudithook(_refuse)
    exec(compile(order["program"], "program.py", "exec"), module.__dict__)  # noqa: S102  the purpose of this process
    os.write(answer, order["token"].encode())


if __name__ == "__main__":
    main()
