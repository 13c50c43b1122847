"""Shared by the tests in real editors: places, a separate home, waiting, a server that completes by rules.

Downloads are kept in ~/.cache/fimserver/editors (or $FIMSERVER_EDITORS). If something is not available,
``UnavailableError`` names it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIMSERVER = Path(sys.executable).parent / "fimserver"
SAMPLE_FILE = ROOT / "fimserver" / "samples" / "inventory.py"
SAMPLE = SAMPLE_FILE.read_text(encoding="utf-8")
LINE = 16  # of the sample: ``self.items.ap``
BEGUN = "        self.items.app"
CACHE = Path(os.environ.get("FIMSERVER_EDITORS", Path.home() / ".cache" / "fimserver" / "editors"))
_PARTS = {"total": "in all", "debounce": "pause after a key", "place": "finding the place", "model_total": "model"}
SLOW_S = 30.0  # s, for steps that take a second on an idle machine
_LOOK_S = 0.02
_STUB_SERVER = Path(__file__).with_name("stub_server.py")
_NOUNS = ["order", "client", "parcel", "ticket", "sensor"]
_STEMS = [
    "self.{0}s.app",
    "for {0} in self.{0}",
    "return self.{0}_na",
    "if {0}.price > sel",
    "total += {0}.pri",
    "def find_{0}(self, na",
    "{0} = Item(",
    "print({0}.na",
]
LINES = [stem.format(noun) for noun in _NOUNS for stem in _STEMS]  # none twice: what was seen once comes at once


class UnavailableError(Exception):
    """An editor or a tool is not available here; the message gives the reason."""


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 900) -> str:
    """Return a command's output; raise ``UnavailableError`` with its last line if it fails or does not exist."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        message = f"{name} cannot be run: {error}"
        raise UnavailableError(message) from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        message = f"{name} {command[1] if command[1:] else ''} failed: {last[0]}"
        raise UnavailableError(message)
    return done.stdout


def wait_until(is_so: Callable[[], Any], what: str, timeout: float = SLOW_S) -> Any:
    """Poll ``is_so`` and return its first true value; fail with ``what``."""
    end = time.monotonic() + timeout
    while not (value := is_so()):
        if time.monotonic() > end:
            message = f"not within {timeout:.0f} s: {what}"
            raise AssertionError(message)
        time.sleep(_LOOK_S)
    return value


def call_fimserver(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the server's own program in an environment."""
    command = [str(FIMSERVER), *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False)


def daemon_status(env: dict[str, str]) -> dict[str, Any]:
    """Return the status that an environment's daemon reports; nothing without one."""
    printed = call_fimserver(env, "daemon", "status", "--json").stdout
    found: dict[str, Any] = json.loads(printed) if printed.startswith("{") else {}
    return found


def write_script(file: Path, *lines: str) -> Path:
    """Write a shell script of these lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    file.chmod(0o755)
    return file


def install_from_pypi(folder: Path, requirement: str) -> Path:
    """Return the programs of a package in a separate virtual environment, made if it does not exist."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin" / "pip", "install", "-q", requirement)
        (folder / "done").touch()
    return folder / "bin"


@contextmanager
def skipped_where_unavailable() -> Iterator[None]:
    """Skip the test, with the reason, if an editor or a tool is not available."""
    import pytest

    try:
        yield
    except UnavailableError as error:
        pytest.skip(str(error))


@contextmanager
def fimserver_home() -> Iterator[dict[str, str]]:
    """Yield an environment with its own daemon, which ends with it."""
    home = tempfile.mkdtemp(prefix="fim-")  # short: a socket's path may have some 100 characters only
    env = {"FIMSERVER_HOME": home}
    try:
        yield env
    finally:
        for _ in range(3):  # a relay whose editor has just gone may have started it again
            call_fimserver(env, "daemon", "stop", "--force")
            time.sleep(0.3)
        shutil.rmtree(home, ignore_errors=True)


class Stub:
    """A language server that completes by rules, for tests that need a certain text, several lines or a late one."""

    def __init__(self, folder: Path, *rules: dict[str, Any]) -> None:
        """``rules`` as in ``stub_server.py``; "after", "texts" and what else they have."""
        self.rules = folder / "rules.json"
        self.journal = folder / "journal"
        self.pid = folder / "journal.pid"
        self.command = [str(part) for part in (sys.executable, _STUB_SERVER, self.rules, self.journal)]
        self.journal.touch()
        self.say(*rules)

    def say(self, *rules: dict[str, Any]) -> None:
        """Complete by these rules from now on."""
        self.rules.write_text(json.dumps(rules), encoding="utf-8")

    def received(self, method: str) -> list[Any]:
        """The parameters of each message of a kind."""
        messages = map(json.loads, self.journal.read_text(encoding="utf-8").split("\n")[:-1])
        return [message["params"] for message in messages if message["method"] == method]


def print_latency(what: str, taken: Sequence[float], num_pauses: int, env: dict[str, str] | None = None) -> None:
    """One line of what was measured, in ms, of so many pauses; ``taken`` is sorted.

    With the environment of a running daemon, a line of its own share: medians over the last answers that it offered.
    """
    p50, p95 = taken[len(taken) // 2], taken[int(len(taken) * 0.95)]
    print(f"{what}: {len(taken)} of {num_pauses} shown, p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    if env is not None:
        records = json.loads(call_fimserver(env, "explain", "--json", "--last", "1000").stdout)
        offered = [record["timings_ms"] for record in records if record["outcome"] == "offered"]
        parts = {name: sorted(each[name] for each in offered if name in each) for name in _PARTS}
        medians = [f"{_PARTS[name]} {values[len(values) // 2]:.0f} ms" for name, values in parts.items() if values]
        print(f"  the server, {len(offered)} answers: {', '.join(medians)}")
