"""The child of ``sandbox.py``: takes every means away from itself that a program does not need, then runs it.

Started by its path in a bare interpreter (``python -I -S``), so it imports the standard library alone. The order
comes on standard input; the order's token goes to standard output once the program came to its end.

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
_REFUSED = (  # beginnings of the names of audit events
    *("os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "os.startfile"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime"),
    *("os.chmod", "os.chown", "os.chflags", "os.setxattr", "os.removexattr", "shutil.", "tempfile."),
    *("subprocess.", "pty.", "signal.pthread_kill", "socket.", "ctypes.", "resource.", "webbrowser.", "sqlite3."),
)


def _leave_network() -> None:
    """Go into a network of its own, with nobody in it, where the system lets everybody do so."""
    with suppress(OSError, AttributeError, TypeError):  # no libc to be found, not Linux
        ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)  # -1 where it may not: the audit hook is left


def _set_limits(limits: dict[str, Any]) -> None:
    import resource  # noqa: PLC0415  not on Windows, where nobody starts this

    wanted = [
        (resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ]
    for which, soft, hard in wanted:
        with suppress(ValueError, OSError):  # macOS has no limit of address space; a lower one may be set already
            resource.setrlimit(which, (soft, hard))
    signal.alarm(int(limits["wall_s"]) + 1)  # should the parent be gone by then


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be taken off again."""
    if event == "open":
        _path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & _WRITES)
    else:
        writes = event.startswith(_REFUSED)
    if writes:
        msg = f"{event} is refused to generated code"
        raise PermissionError(msg)


def main() -> None:
    """Run the program of the order, and say so when it came to its end."""
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
    exec(compile(order["program"], "program.py", "exec"), module.__dict__)  # noqa: S102  what all this is for
    os.write(answer, order["token"].encode())


if __name__ == "__main__":
    main()
