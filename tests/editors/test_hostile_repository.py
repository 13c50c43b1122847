"""A hostile repository is opened in a real Neovim without a screen: none of its programs runs."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.neovim import PLUGIN, VERSIONS, Neovim, find_neovim
from support.real_editors import skipped_where_unavailable, write_script

editors = pytest.mark.editors

SETUP = "lua require('fimserver').setup({options})"
WAIT = "lua vim.wait({wait_ms}, function() return vim.uv.fs_stat({marker}) ~= nil end)"


@pytest.fixture(params=VERSIONS)
def neovim(request: pytest.FixtureRequest) -> Neovim:
    with skipped_where_unavailable():
        return find_neovim(str(request.param))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Its programs leave ``ran`` next to it."""
    folder = tmp_path / "repository"
    (folder / ".git").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n", encoding="utf-8")
    for place in (folder, folder / "bin"):
        for name in ("fimserver", "fimserver.exe", "python3", "uv"):
            write_script(place / name, f"echo {place.name}/{name} >> {tmp_path}/ran")
    for name in ("venv", "ensurepip", "fimserver", "torch"):
        (folder / f"{name}.py").write_text(f"open('{tmp_path}/ran', 'a').write('{name}')\n", encoding="utf-8")
    return folder


def open_file(neovim: Neovim, repository: Path, path: str, options: str = "{}", wait_ms: int = 700) -> None:
    """Open its file in its folder, type, and ask for the plugin's health and state."""
    root = repository.parent
    home = root / "home"
    home.mkdir(exist_ok=True)
    wait = WAIT.format(wait_ms=wait_ms, marker=json.dumps(str(root / "ran")))
    commands = [SETUP.replace("{options}", options), "edit a.py", "normal! ox", wait, "checkhealth fimserver", "qall!"]
    arguments = [word for command in commands for word in ("-c", command)]
    env = {**os.environ, **neovim.env, "HOME": str(home), "PATH": path, "PYTHONPATH": str(repository)}
    env |= {f"XDG_{name}_HOME": str(home / name) for name in ("STATE", "DATA", "CONFIG", "CACHE")}
    before = f"set runtimepath^={PLUGIN} noswapfile | let g:loaded_python3_provider = 0"
    command = [str(neovim.program), "--headless", "--clean", "--cmd", before, *arguments]
    subprocess.run(
        command, cwd=repository, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )


@editors
@pytest.mark.parametrize("options", ["{}", "{ cmd = 'fimserver' }", "{ cmd = { './fimserver', 'lsp' } }"])
@pytest.mark.parametrize("entry", [".", "", "bin", "{repository}", "{repository}/bin", "{link}"])
def test_nothing_of_a_repository_runs(neovim: Neovim, repository: Path, entry: str, options: str) -> None:
    link = repository.parent / "link"
    link.mkdir()
    (link / "fimserver").symlink_to(repository / "fimserver")
    place = entry.format(repository=repository, link=link)
    open_file(neovim, repository, f"{place}:/usr/bin:/bin", options)
    ran = repository.parent / "ran"
    assert not ran.exists(), ran.read_text(encoding="utf-8")


@editors
def test_the_server_runs_outside_the_repository(neovim: Neovim, repository: Path) -> None:
    root = repository.parent
    write_script(
        root / "tools" / "fimserver", f'echo "$PWD $PATH $PYTHONPATH" > {root}/seen', f"mv {root}/seen {root}/ran"
    )
    open_file(neovim, repository, f".::{repository}/bin:{root}/tools:/usr/bin:/bin", wait_ms=20_000)
    seen = (root / "ran").read_text(encoding="utf-8")
    assert seen == f"{root}/home {root}/tools:/usr/bin:/bin \n"
