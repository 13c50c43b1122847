"""Helix in a terminal, set up with the lines of docs/editors.md: the menu's item is put in."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import debian
import pytest
from filelock import FileLock
from real_editors import BEGUN, CACHE, FIMSERVER, LINE, SAMPLE, UnavailableError, call_fimserver, wait_until

import fimserver

PAGE = Path(fimserver.__file__).parent / "docs" / "editors.md"
LANGUAGES = re.findall(r"## Helix.*?```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]

pytestmark = pytest.mark.editors


@pytest.fixture
def helix() -> Path:
    if sys.platform != "linux":
        pytest.skip("the test's Helix is a Linux program")
    if shutil.which("tmux") is None and (why := debian.install("tmux")):
        pytest.skip(why)
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(CACHE / "lock"):
            return debian.unpack("hx", "hx", CACHE / "helix") / "usr" / "bin" / "hx"
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def tmux(editors_home: dict[str, str], tmp_path: Path) -> Iterator["Tmux"]:
    config = tmp_path / "config" / "helix"
    config.mkdir(parents=True)
    languages = LANGUAGES.replace("/path/to/.venv/bin/fimserver", str(FIMSERVER))
    (config / "languages.toml").write_text(languages, encoding="utf-8")
    found = Tmux(
        {**editors_home, "XDG_CONFIG_HOME": str(tmp_path / "config"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    )
    yield found
    found.run("kill-server")


class Tmux:
    """One program in a terminal."""

    def __init__(self, env: dict[str, str]) -> None:
        self._socket = Path(env["FIMSERVER_HOME"]) / "tmux"
        self._env = {**os.environ, **env, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}

    def run(self, *arguments: str | Path) -> str:
        """What a command of tmux prints."""
        command = ["tmux", "-S", str(self._socket), "-f", "/dev/null", *map(str, arguments)]
        return subprocess.run(command, env=self._env, capture_output=True, text=True, check=False).stdout

    def start(self, *command: str | Path) -> None:
        """Run a program in it."""
        self.run("new-session", "-d", "-x", "100", "-y", "30", *command)

    def screen(self) -> str:
        """The text on the screen."""
        return self.run("capture-pane", "-p")

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Until a text is on the screen."""
        try:
            wait_until(lambda: text in self.screen(), text, timeout)
        except AssertionError:
            message = f"no {text!r} on the screen:\n{self.screen()}"
            raise AssertionError(message) from None


def is_ready(home: dict[str, str]) -> bool:
    printed = call_fimserver(home, "daemon", "status", "--json").stdout
    return printed.startswith("{") and (json.loads(printed).get("worker") or {}).get("state") == "ready"


def test_an_item_of_the_menu(helix: Path, tmux: Tmux, editors_home: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "inventory.py"
    file.write_text(SAMPLE, encoding="utf-8")
    tmux.start(helix, f"{file}:{LINE}")
    tmux.wait_for("self.items.ap")
    wait_until(lambda: is_ready(editors_home), "the model is loaded", 120)
    tmux.run("send-keys", "A", "p")
    tmux.wait_for("append(item)")
    tmux.run("send-keys", "C-n")
    tmux.wait_for(f"{BEGUN.strip()}end(item)")  # a preview
    tmux.run("send-keys", "Enter")
    tmux.run("send-keys", "Escape")
    tmux.wait_for(" NOR ")
    tmux.run("send-keys", ":w", "Enter")
    wait_until(lambda: file.read_text(encoding="utf-8") != SAMPLE, "it is saved")
    line = file.read_text(encoding="utf-8").splitlines()[LINE - 1]
    assert line.startswith(BEGUN + "end(")
