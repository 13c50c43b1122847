"""Helix in a terminal, set up with the lines of docs/how-to/editors.md: the menu's item is put in."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from support import debian
from support.real_editors import (
    BEGUN,
    CACHE,
    FIMSERVER,
    LINE,
    SAMPLE,
    daemon_status,
    skipped_where_unavailable,
    wait_until,
)
from support.tmux import Tmux, find_tmux

import fimserver

PAGE = Path(fimserver.__file__).parent / "docs" / "how-to" / "editors.md"
LANGUAGES = re.findall(r"## Helix.*?```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]

pytestmark = pytest.mark.editors


@pytest.fixture
def helix() -> Path:
    if sys.platform != "linux":
        pytest.skip("the test's Helix is a Linux program")
    CACHE.mkdir(parents=True, exist_ok=True)
    with skipped_where_unavailable(), FileLock(CACHE / "lock"):
        find_tmux()
        return debian.unpack("hx", "hx", CACHE / "helix") / "usr" / "bin" / "hx"


@pytest.fixture
def terminal(helix: Path, editors_home: dict[str, str], tmp_path: Path) -> Iterator[Tmux]:
    """A Helix in the sample's line."""
    config = tmp_path / "config" / "helix"
    config.mkdir(parents=True)
    languages = LANGUAGES.replace("/path/to/.venv/bin/fimserver", str(FIMSERVER))
    (config / "languages.toml").write_text(languages, encoding="utf-8")
    file = tmp_path / "inventory.py"
    file.write_text(SAMPLE, encoding="utf-8")
    env = {**editors_home, "XDG_CONFIG_HOME": str(config.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = Tmux(tmp_path / "tmux", helix, f"{file}:{LINE}", env=env)
    yield found
    found.close()


def is_ready(home: dict[str, str]) -> bool:
    return (daemon_status(home).get("worker") or {}).get("state") == "ready"


def read_if_there(file: Path) -> str:
    """Return a file's text; Helix renames the old file before it writes the new one."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def test_an_item_of_the_menu(terminal: Tmux, editors_home: dict[str, str], tmp_path: Path) -> None:
    terminal.wait_for("self.items.ap")
    wait_until(lambda: is_ready(editors_home), "the model is loaded", 120)
    terminal.type("Ap")
    terminal.wait_for("append(item)")
    terminal.send("C-n")
    terminal.wait_for(f"{BEGUN.strip()}end(item)")  # a preview
    terminal.send("Enter")
    terminal.send("Escape")
    terminal.wait_for(" NOR ")
    terminal.type(":w")
    terminal.send("Enter")
    lines = SAMPLE.splitlines()
    lines[LINE - 1] = BEGUN + "end(item)"
    wait_until(lambda: read_if_there(tmp_path / "inventory.py").splitlines() == lines, "it is saved")
