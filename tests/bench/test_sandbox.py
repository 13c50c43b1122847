"""Generated code in its child process: what passes, and what it is kept from."""

import os
import socket
import time
from pathlib import Path

import pytest

from fimserver.bench.sandbox import Limits, Outcome, run_program

SHORT = Limits(cpu_s=1, wall_s=2.0)


@pytest.mark.parametrize(
    "program",
    [
        "def f(a):\n    return a + 1\nassert f(1) == 2",
        "import math, collections, re, heapq, itertools, functools, string, hashlib, typing\nassert math.pi > 3",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)",
        "print('x' * 100_000)",
        "import sys\nassert sys.stdin.read() == ''",
        "import os\nassert os.listdir() == []",
        "import os\nassert not os.environ.keys() - {'LC_ALL', '__CF_USER_TEXT_ENCODING'}",
    ],
)
def test_good_code_passes(program: str) -> None:
    assert run_program(program) is Outcome.PASSED


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "x = (",
        "undefined",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import os\nos.abort()",
        "x = bytearray(2 ** 30)",
        "x = [0]\nwhile True:\n    x = x * 2",
        "def f(): f()\nf()",
        "'\\0' + \0",
    ],
)
def test_bad_code_fails(program: str) -> None:
    assert run_program(program) is Outcome.FAILED


@pytest.mark.slow("waits for limits of time")
@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)", "list(iter(int, 1))"])
def test_endless_code_is_ended(program: str) -> None:
    begin = time.monotonic()
    assert run_program(program, SHORT) is not Outcome.PASSED
    assert time.monotonic() - begin < SHORT.wall_s + 5


@pytest.mark.parametrize(
    "attempt",
    [
        "open('x', 'w')",
        "open('x', 'ab')",
        "open({file!r}, 'r+')",
        "os.open({file!r}, os.O_RDWR)",
        "os.remove({file!r})",
        "os.rename({file!r}, {file!r} + '2')",
        "os.truncate({file!r}, 0)",
        "os.mkdir('x')",
        "shutil.rmtree({folder!r})",
        "tempfile.TemporaryFile()",
        "os.fork()",
        "os.system('true')",
        "os.execv('/bin/true', ['true'])",
        "os.kill({pid}, 9)",
        "subprocess.run(['true'])",
        "multiprocessing.Process(target=print).start()",
        "socket.socket()",
        "socket.create_connection(('127.0.0.1', {port}))",
        "socket.getaddrinfo('localhost', 80)",
        "urllib.request.urlopen('http://127.0.0.1:{port}')",
        "ctypes.CDLL(None)",
    ],
)
def test_refused_operations(attempt: str, tmp_path: Path) -> None:
    """It fails for its own reason: each name is imported, and the error is the one of a refusal."""
    file = tmp_path / "file"
    file.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {"file": str(file), "folder": str(tmp_path), "pid": os.getpid(), "port": server.getsockname()[1]}
        line = attempt.format(**values)
        imports = "import ctypes, multiprocessing, os, shutil, socket, subprocess, tempfile, urllib.request"
        caught = f"{imports}\ntry:\n    {line}\nexcept OSError:\n    pass\nelse:\n    raise AssertionError"
        assert run_program(f"{imports}\n{line}") is Outcome.FAILED
        assert run_program(caught) is Outcome.PASSED
    assert file.read_text() == "kept"


def test_the_folder_is_deleted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_program("while True: pass", SHORT)
    assert list(tmp_path.iterdir()) == []
