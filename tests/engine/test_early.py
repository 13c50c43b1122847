"""Tests of ``fimserver.engine.early``: a worker that is started before its options are known."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.lsp_client import RELAY, LspClient

from fimserver.daemon import launch
from fimserver.engine import early
from fimserver.engine.client import EngineClient, EngineOptions, EngineState
from fimserver.settings import Remote

WORKER = """
    import json, os, sys
    from fimserver.framing import read_message, write_message
    def read(): return read_message(sys.stdin.buffer)
    def send(**message): write_message(sys.stdout.buffer, message)
    if len(sys.argv) > 1:
        options, how = json.loads(sys.argv[1]), "new"
    elif (message := read()) is not None:
        options, how = message["options"], message["type"]
    else:
        sys.exit(0)
    send(type="ready", info=dict(name=f"{how} {options['threads']}", device="cpu", dtype="float32", num_parameters=1,
        max_prompt_tokens=10, canvas_length=4, preferred_mode="diffusion", load_ms=1.0, num_threads=1))
    read()
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Start fake workers in place of real ones."""
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(WORKER))
    found = (sys.executable, "-P", str(path))
    monkeypatch.setattr(early, "COMMAND", found)
    yield found
    early.discard_early_worker()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the process ids of all workers, as they are started."""
    pids: list[int] = []
    spawn = early.spawn_worker

    def spawn_and_note(command: tuple[str, ...]) -> "subprocess.Popen[bytes]":
        process = spawn(command)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(early, "spawn_worker", spawn_and_note)
    return pids


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_first_engine_takes_the_worker_and_the_next_starts_its_own(
    command: tuple[str, ...], started: list[int]
) -> None:
    early.start_early_worker()
    client = EngineClient(EngineOptions(threads=3, command=command))
    client.start()
    assert client.wait_until_ready(10).name == "load 3"
    assert client.pid == started[0]
    client.restart(EngineOptions(threads=4, command=command))
    assert client.wait_until_ready(10).name == "new 4"
    assert len(started) == 2
    client.close()
    assert client.state is EngineState.STOPPED
    until(lambda: all(map(is_gone, started)))


@pytest.mark.parametrize(
    "options",
    [{"engine": "vllm", "remote": Remote(url="http://127.0.0.1:1")}, {"command": (sys.executable, "-c", "input()")}],
)
def test_another_engine_ends_the_worker(command: tuple[str, ...], started: list[int], options: dict[str, Any]) -> None:
    early.start_early_worker()
    client = EngineClient(EngineOptions(**{"command": command, **options}))
    client.start()
    assert client.pid == started[1]
    until(lambda: is_gone(started[0]))
    client.close()


def test_closing_an_engine_that_was_not_started_ends_the_worker(command: tuple[str, ...], started: list[int]) -> None:
    early.start_early_worker()
    EngineClient(EngineOptions(command=command)).close()
    until(lambda: is_gone(started[0]))


def test_a_worker_that_ended_is_replaced(command: tuple[str, ...], started: list[int]) -> None:
    early.start_early_worker()
    os.kill(started[0], signal.SIGKILL)
    until(lambda: is_gone(started[0]))
    client = EngineClient(EngineOptions(threads=3, command=command))
    client.start()
    assert client.wait_until_ready(10).name == "new 3"
    client.close()


def test_a_worker_that_no_engine_takes_ends(
    command: tuple[str, ...], started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    del command
    monkeypatch.setattr(early, "LIFETIME_S", 0.1)
    early.start_early_worker()
    until(lambda: is_gone(started[0]))
    assert early.take_early_worker() is None


def test_a_worker_that_cannot_be_started_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "COMMAND", ("/no/such/python",))
    early.start_early_worker()
    assert early.take_early_worker() is None


def test_the_real_worker_loads_the_options_that_it_is_sent(started: list[int]) -> None:
    early.start_early_worker()
    client = EngineClient(EngineOptions(threads=1))
    client.start()
    assert client.wait_until_ready(60).num_threads == 1
    assert started == [client.pid]
    client.close()


def test_the_worker_ends_with_a_server_that_was_killed() -> None:
    code = (
        "from fimserver.engine import early; early.start_early_worker(); print(early._waiting.pid, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        worker = int(server.stdout.readline())
        assert not is_gone(worker)
        server.kill()
    until(lambda: is_gone(worker))


def test_a_daemon_for_an_editor_fails_as_the_command_does(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    environment = {**os.environ, "FIMSERVER_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-P", "-m", "fimserver", "daemon", "run"]
    ended = [
        subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
        for options in ([], ["--early-worker"])
    ]
    assert [e.returncode for e in ended] == [1, 1]
    assert ended[0].stderr == ended[1].stderr
    assert ended[0].stderr.startswith("fimserver: ")


def test_a_daemon_for_an_editor_does_not_import_the_command_line() -> None:
    code = (
        "import sys; sys.argv[1:] = ['daemon', 'run', '--early-worker']\n"
        "import fimserver.engine.early as early, fimserver.daemon.server as server, fimserver.__main__ as main\n"
        "early.start_early_worker = lambda: print('early')\n"
        "server.run_daemon = lambda: print('click' in sys.modules)\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "early\nFalse\n"


def test_only_a_daemon_that_an_editor_waits_for_starts_a_worker_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "started"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nimport fimserver.engine.early as early\n"
        f"early.start_early_worker = lambda: open({str(journal)!r}, 'a').write(' '.join(sys.argv[1:]))\n"
    )
    environment = {"FIMSERVER_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch.start()
    launch.end_daemon("stop")
    assert not journal.exists()
    client = LspClient(command=RELAY, env=environment)
    client.initialize()
    client.close()
    launch.end_daemon("stop")
    assert journal.read_text() == "daemon run --early-worker"
