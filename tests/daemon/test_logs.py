"""The log: entries with ids, in words for users, kept small, and never with code or tracebacks."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.lsp_client import LspClient

from fimserver.daemon.logs import rotate, to_line, to_words

WRITES = """
import logging, structlog
from fimserver.daemon.logs import configure_logs
configure_logs(as_json={as_json})
structlog.contextvars.bind_contextvars(editor=3, request="17")
logger = logging.getLogger("fimserver.x")
logger.info("a request was answered", extra={{"source": "model", "total_ms": 12.5}})
try:
    raise ValueError("secret_code")
except ValueError:
    logger.exception("it failed")
"""


def written(*, as_json: bool) -> list[str]:
    code = WRITES.format(as_json=as_json)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "", "stdout is the editor's"
    return run.stderr.splitlines()


def test_entries_have_ids_and_no_traceback() -> None:
    first, second = (json.loads(line) for line in written(as_json=True))
    assert first["event"] == "a request was answered"
    assert (first["editor"], first["request"], first["source"], first["total_ms"]) == (3, "17", "model", 12.5)
    assert first["level"] == "info"
    assert first["timestamp"].startswith("20")
    assert second["event"] == "it failed"
    assert "secret" not in json.dumps(second)


def test_editors_that_show_stderr_get_readable_lines() -> None:
    first, second = written(as_json=False)
    assert "INFO a request was answered editor=3 request=17" in first
    assert second.endswith("ERROR it failed editor=3 request=17")


def test_readable_lines() -> None:
    entry = {"event": "x is y", "level": "warning", "timestamp": "2026-11-27T10:20:30.123456", "editor": 1}
    assert to_line(json.dumps(entry)) == to_words(entry) == "10:20:30.123 WARNING x is y editor=1"
    assert to_line("a library: says something\n") == "a library: says something"
    assert to_line("[1]\n") == "[1]"


def test_a_large_log_is_rotated_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "daemon.log"
    with log.open("a") as one, log.open("a") as other:
        one.write("x" * 100)
        one.flush()
        assert not rotate(log, most=100)
        other.write("y")
        other.flush()
        assert rotate(log, most=100)
        one.write("z")
        one.flush()
    assert log.read_text() == "z"
    old = tmp_path / "daemon.log.1"
    assert old.read_text() == "x" * 100 + "y"
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    log.write_text("w" * 101)
    assert rotate(log, most=100)
    assert old.read_text() == "w" * 101


def test_a_link_in_place_of_the_old_log_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "daemon.log.1").symlink_to(victim)
    log = tmp_path / "daemon.log"
    log.write_text("x" * 10)
    assert rotate(log, most=5)
    assert victim.read_text() == "precious"
    assert (tmp_path / "daemon.log.1").read_text() == "x" * 10


def test_a_log_that_cannot_be_rotated_does_not_end_the_daemon(tmp_path: Path) -> None:
    assert not rotate(tmp_path / "none")
    log = tmp_path / "daemon.log"
    log.write_text("x" * 30)
    (tmp_path / "daemon.log.1").mkdir()
    assert not rotate(log, most=10)
    assert log.read_text() == "x" * 30
    log.write_text("x" * 41)
    assert not rotate(log, most=10)
    assert log.read_text() == "", "it does not grow for ever"


@pytest.mark.slow("starts a daemon")
def test_the_log_of_a_daemon(tmp_path: Path) -> None:
    """A running daemon writes JSON entries with the ids that explain shows, and continues after the log was rotated."""
    env = {**os.environ, "FIMSERVER_HOME": str(tmp_path)}
    log = tmp_path / "state" / "daemon.log"
    command = [sys.executable, "-P", "-m", "fimserver"]
    client = LspClient(command=[*command, "lsp"], env=env)
    try:
        client.initialize(options={"logLevel": "info", "debounceMs": 0})
        client.wait_until_ready()
        client.open("file:///a.py", "def add(a, b):\n    return \n")
        client.complete("file:///a.py", 1, 11)
        answered = wait_for(lambda: [e for e in entries(log) if e["event"] == "a request was answered"])
        explained = subprocess.run([*command, "explain", "--json"], env=env, capture_output=True, check=True).stdout
        assert f"{answered[-1]['editor']}.{answered[-1]['request']}" == json.loads(explained)[-1]["request"]
        assert answered[-1]["total_ms"] > 0
        assert "add" not in log.read_text()
        shown = subprocess.run([*command, "daemon", "logs"], env=env, capture_output=True, text=True, check=True).stdout
        assert "INFO a request was answered editor=1 request=1" in shown
        raw = subprocess.run(
            [*command, "daemon", "logs", "--json", "-n", "1"], env=env, capture_output=True, text=True, check=True
        ).stdout
        assert json.loads(raw)["event"]
    finally:
        client.close()
        subprocess.run([*command, "daemon", "stop", "--force"], env=env, capture_output=True, check=False)


def entries(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{")]


def wait_for(find: Callable[[], list[dict[str, Any]]], timeout_s: float = 20) -> list[dict[str, Any]]:
    deadline = time.monotonic() + timeout_s
    while not (found := find()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found
