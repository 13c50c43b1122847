"""The ways to install the Neovim plugin, copied from its README and run in a new user's home.

lazy.nvim and packer.nvim are not downloaded: ``FIMSERVER_TEST_LAZY`` and ``FIMSERVER_TEST_PACKER`` name their folders.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.neovim import PLUGIN, VERSIONS, Neovim, Terminal, find_neovim, home_folders
from support.real_editors import FIMSERVER, LINE, ROOT, SAMPLE, skipped_where_unavailable, wait_until

Open = Callable[..., Terminal]

pytestmark = pytest.mark.editors
README = (PLUGIN / "README.md").read_text(encoding="utf-8")
PLACEHOLDER = "/path/to/fimserver"


@pytest.fixture(params=VERSIONS)
def neovim(request: pytest.FixtureRequest) -> Neovim:
    with skipped_where_unavailable():
        return find_neovim(str(request.param))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home without any configuration."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def open_editor(home: Path, tmp_path: Path, editors_home: dict[str, str]) -> Iterator[Open]:
    """Opens the sample in a Neovim of that user."""
    terminals: list[Terminal] = []
    file = tmp_path / "inventory.py"
    file.write_text(SAMPLE, encoding="utf-8")
    path = [part for part in os.environ["PATH"].split(":") if not (Path(part) / "fimserver").exists()]

    def open_one(neovim: Neovim, cwd: Path = home, *, on_path: bool = False) -> Terminal:
        """``on_path``: the user has put fimserver there; else the plugin's own checkout has it."""
        env = {**editors_home, "PATH": ":".join([*([str(FIMSERVER.parent)] if on_path else []), *path])}
        terminals.append(Terminal(neovim, file, home=home, env=env, cwd=cwd))
        return terminals[-1]

    yield open_one
    for terminal in terminals:
        terminal.close()


def block_after(text: str) -> str:
    """Return the first code block of the README after ``text``."""
    found = re.search(r"```\w+\n(.*?)```", README[README.index(text) :], re.DOTALL)
    assert found
    return found[1]


def write_init(home: Path, text: str) -> None:
    file = home / ".config" / "nvim" / "init.lua"
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")


def make_repository(folder: Path) -> Path:
    """Return a repository with the plugin where fimserver's has it."""
    shutil.copytree(PLUGIN, folder / "editors" / "neovim")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Add the plugin"]):
        subprocess.run([*git, *command], check=True, timeout=60)
    return folder


def folder_of(variable: str, name: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a folder with {name}")
    return Path(os.environ[variable])


def accept_first_ghost_text(terminal: Terminal) -> None:
    """Type as a new user does, and accept with Tab; the command and the help page's tag are there."""
    wait_until(lambda: terminal.lua("vim.fn.exists(':Fimserver')") == 2, f"it is installed\n{terminal.screen()}")
    terminal.type(f"{LINE}GAp")
    try:
        ghost = wait_until(terminal.ghost, "ghost text", 60)
    except AssertionError:
        pytest.fail(f"no ghost text:\n{terminal.screen()}\n{terminal.messages()}")
    terminal.send("Tab")
    wait_until(lambda: terminal.lua(f"vim.fn.getline({LINE})") == f"        self.items.app{ghost}", "accepted")
    assert "fimserver" in terminal.lua("vim.fn.getcompletion('fimserver', 'help')")
    assert "Error" not in terminal.messages()


def test_one_paste_in_a_new_profile(neovim: Neovim, home: Path, open_editor: Open) -> None:
    begin = time.perf_counter()
    paste = block_after("## Install")
    subprocess.run(["sh", "-c", paste], cwd=ROOT, env={**os.environ, "HOME": str(home)}, check=True, timeout=60)
    terminal = open_editor(neovim, ROOT)  # where the paste was
    accept_first_ghost_text(terminal)
    print(f"one paste; {time.perf_counter() - begin:.1f} s to the first accepted ghost text")


def test_lazy(neovim: Neovim, home: Path, open_editor: Open) -> None:
    lazy = folder_of("FIMSERVER_TEST_LAZY", "lazy.nvim")
    line = block_after("[lazy.nvim]").replace(PLACEHOLDER, str(ROOT))
    write_init(home, f"vim.opt.rtp:prepend('{lazy}')\nrequire('lazy').setup({{ {line} }})")
    accept_first_ghost_text(open_editor(neovim))


def test_vim_pack(home: Path, open_editor: Open, tmp_path: Path) -> None:
    with skipped_where_unavailable():
        neovim = find_neovim("0.12")
    line = block_after("`vim.pack` of Neovim 0.12").replace(PLACEHOLDER, str(make_repository(tmp_path / "fimserver")))
    write_init(home, line.replace("{ load =", "{ confirm = false, load ="))  # a question that blocks the start
    accept_first_ghost_text(open_editor(neovim, on_path=True))  # the copy has no .venv


def test_packer(neovim: Neovim, home: Path, open_editor: Open, tmp_path: Path) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(folder_of("FIMSERVER_TEST_PACKER", "packer.nvim"), packs / "pack" / "any" / "opt" / "packer.nvim")
    line = block_after("[packer.nvim]").replace(PLACEHOLDER, str(make_repository(tmp_path / "fimserver")))
    begin = f"vim.opt.packpath:prepend('{packs}')\nvim.cmd.packadd('packer.nvim')"
    write_init(home, f"{begin}\nrequire('packer').startup(function(use)\n{line}end)")
    env = {**os.environ, **neovim.env, "HOME": str(home), **home_folders(home)}
    command = [str(neovim.program), "--headless", "-c", "autocmd User PackerComplete quitall!", "-c", "PackerSync"]
    subprocess.run(command, env=env, check=True, timeout=120, capture_output=True)
    accept_first_ghost_text(open_editor(neovim, on_path=True))  # the copy has no .venv
