"""Run a partly generated program in a child process, and report whether it ran to its end.

This is a guard against accidents, not against malice. The child (``sandboxed.py``) has limits on time, memory and
files, an empty folder, no environment, no input and no network, and is refused whatever Python's audit hooks see of
writing files, starting processes and using sockets. Malicious code finds ways around that (it can read files, for one,
and C code raises no audit events): run what you do not trust in a virtual machine or a container.

Knows:  processes, limits.  Never: items, models.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from fimserver.errors import FimserverError

_CHILD = Path(__file__).with_name("sandboxed.py")
_ENVIRONMENT = {"LC_ALL": "C.UTF-8"}


class Outcome(StrEnum):
    """The result of a program."""

    PASSED = "passed"
    FAILED = "failed"  # an exception, an early exit, a limit other than time
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one program; ``wall_s`` exceeds ``cpu_s``, for busy machines."""

    cpu_s: int = 3
    wall_s: float = 10.0
    memory_bytes: int = 512 * 2**20


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its end. Raises ``FimserverError`` if the system has no such limits (Windows)."""
    if os.name != "posix":
        msg = "generated code runs only where a process can be limited (Linux, macOS)"
        raise FimserverError(msg)
    limits = limits or Limits()
    token = secrets.token_hex(16)  # the child prints it only after the program has ended
    order = json.dumps({"token": token, "program": program, "limits": asdict(limits)}).encode()
    with tempfile.TemporaryDirectory(prefix="fimserver-") as folder:
        child = subprocess.Popen(  # noqa: S603  our own interpreter, in a sandbox
            [sys.executable, "-I", "-S", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            reported, _ = child.communicate(order, timeout=limits.wall_s)
        except subprocess.TimeoutExpired:
            return Outcome.TIMED_OUT
        finally:
            _end(child)
    if reported == token.encode():
        return Outcome.PASSED
    return Outcome.TIMED_OUT if child.returncode == -signal.SIGXCPU else Outcome.FAILED


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Kill the rest of a child's process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()
