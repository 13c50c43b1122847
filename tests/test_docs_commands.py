"""The documents' commands: each one exists with its options, and is run as its page shows it, or listed with a reason.

In a page, a block ``text`` after a block ``sh`` is the output of the last command there; ``...`` matches anything. A
block ``python`` between the two is appended to the file that the command watches. A block ``toml`` is the config file
of the commands after it.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import click
import pytest
from support.lsp_client import RELAY, LspClient

from fimserver.cli.main import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "fimserver" / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *ROOT.glob("editors/*/README.md")]
# Commands that are not run here: the page (a pattern), the command (a pattern), why.
NOT_RUN = [
    ("*", "python3 -m venv *", "set-up; the gate runs README's test command"),
    ("*", "pip install *", "downloads packages; the gate runs README's test command"),
    ("editors/neovim/README.md", "mkdir -p ~/*", "writes to the user's home; tests/editors/test_neovim_install.py"),
    ("editors/neovim/README.md", "cat > ~/*", "as the line above"),
    ("editors/vscode/README.md", "np[mx] *", "needs Node and downloads packages; tests/editors/test_vscode_setup.py"),
    ("*", "python -m tests*", "the checks themselves; the gate runs them"),
    ("CONTRIBUTING.md", "python -m pytest *", "tests that the gate runs"),
    ("CONTRIBUTING.md", "python -m fimserver.settings", "writes a page; tests/test_settings.py compares it"),
    ("CONTRIBUTING.md", "python editors/vscode/scripts/settings.py", "as the line above"),
    ("README.md", "fimserver setup", "downloads a model; tests/cli/test_setup.py"),
    ("*/models.md", "fimserver model add nvidia/*", "downloads 19 GB; tests/checkpoints has a hub of its own"),
    ("*/models.md", "fimserver model add ~/*", "needs a GGUF file; tests/checkpoints"),
    ("*/quantize.md", "fimserver quantize nvidia/*", "needs 19 GB of weights; tests/engine/quantize"),
    ("*/quantize.md", "fimserver model add nvidia/*", "downloads 19 GB; tests/checkpoints has a hub of its own"),
    ("*", "hf download *", "needs the hub"),
    ("*", "fimserver corpus", "downloads 190 MB from PyPI"),
    ("*/quality.md", "fimserver eval holes *", "needs the corpus, and matplotlib"),
    ("*/quality.md", "fimserver eval automatic *", "takes minutes, and needs matplotlib"),
    ("*/training.md", "fimserver train *", "needs the corpus, and hours"),
    ("*/training.md", "fimserver eval holes *", "needs a model of some hours"),
    ("*/training.md", "fimserver complete app.py:12:5 *", "needs a model of some hours"),
    ("*/training.md", "fimserver model add FILE.gguf *", "needs a GGUF file"),
    ("*/training.md", "python -m fimserver.training.masked.adapter *", "needs a Qwen2 model, and an hour"),
    ("*/training.md", "fimserver eval masked *", "needs a model of an hour"),
    ("*/gpu.md", "fimserver bench gpu *", "needs a GPU; tests/bench/test_gpu_bench.py simulates one"),
    ("*/gpu.md", "fimserver eval layouts *", "needs a GPU, and the model; tests/bench measures a small one"),
    ("*/gpu.md", "fimserver doctor --gpu auto *", "needs a GPU; tests/cli/test_plans.py simulates one"),
    ("*/gpu.md", "fimserver doctor", "needs a GPU; tests/cli/test_gpu_checks.py simulates one"),
    ("*/gpu.md", "fimserver model add nvidia/*", "downloads 19 GB"),
    ("*/gpu.md", "fimserver complete *", "needs a GPU, and the model"),
    ("*/gpu.md", "sudo *", "installs packages of the system"),
    ("*/gpu.md", "pytest -m gpu tests", "needs a GPU"),
    ("*/gpu.md", "fimserver train RUN *", "needs a GPU, and the corpus"),
    ("*/team.md", "cd *", "of the commands after it"),
    ("*/team.md", "umask 077", "of the command after it"),
    ("*/team.md", "echo *", "writes into the checkout; tests/test_team.py has keys of its own"),
    ("*/team.md", "printf *", "as the line above"),
    ("*/team.md", "docker compose *", "needs Docker and a GPU; tests/test_team.py checks the file"),
    ("*/team.md", "kubectl *", "needs a cluster; tests/test_team.py checks the files"),
    ("*/team.md", "helm *", "needs a cluster"),
    ("*/team.md", "fimserver doctor", "needs the team's server; run in the tutorial without one"),
]
PROGRAMS = {"fimserver", "cp"}  # all others are in the list
# Commands that are run with less to do.
SMALLER = {"fimserver bench capacity*": ["--users", "10"]}
SLOW = {
    "fimserver/docs/tutorial/first-completion.md": "loads a model in seven commands",
    "fimserver/docs/how-to/quantize.md": "quantizes a model",
    "fimserver/docs/explanation/capacity.md": "simulates users",
}


@dataclass(frozen=True)
class Command:
    """A command of a page, without the environment's folder."""

    page: str
    words: tuple[str, ...]
    output: str | None = None
    appended: str | None = None
    config: str | None = None

    def __str__(self) -> str:
        return " ".join(self.words)

    def not_run(self) -> list[tuple[str, str, str]]:
        return [row for row in NOT_RUN if fnmatch(self.page, row[0]) and fnmatch(str(self), row[1])]


def split_commands(block: str) -> list[tuple[str, ...]]:
    """Return the words of each command of a block, without comments and redirections."""
    commands: list[tuple[str, ...]] = []
    end = None
    for line in block.replace("\\\n", " ").split("\n"):
        if end is not None:  # in a here-document
            end = None if line == end else end
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word in {"&&", "||", ";", "|"}:
                if words:
                    commands.append((words[0].removeprefix(".venv/bin/"), *words[1:]))
                words = []
            elif words[-1:] == ["<<"]:
                end = word
            else:
                words.append(word)
    return commands


def commands_of(page: Path) -> list[Command]:
    parts = re.split(r"^```(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    # Text, a block's language, the block, an empty string, and again
    blocks = [(parts[i], parts[i + 1].removeprefix("\n"), parts[i + 3]) for i in range(1, len(parts) - 3, 4)]
    name = page.relative_to(ROOT).as_posix()
    commands: list[Command] = []
    config = None
    for index, (language, block, after) in enumerate(blocks):
        if language == "toml":
            config = block
        if language != "sh":
            continue
        rest = blocks[index + 1 : index + 3]
        appended = rest.pop(0)[1] if rest and rest[0][0] == "python" else None
        output = rest[0][1] if rest and rest[0][0] == "text" else None
        if output is None and (printed := re.search(r"prints `([^`]+)`", after.split("\n\n")[1])):
            output = printed[1]
        *before, last = split_commands(block)
        commands += [Command(name, words, config=config) for words in before]
        commands.append(Command(name, last, output, appended, config))
    return commands


COMMANDS = {page.relative_to(ROOT).as_posix(): commands_of(page) for page in PAGES}
ALL = [command for commands in COMMANDS.values() for command in commands]


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command of the words after ``fimserver``, and its arguments."""
    found: click.Command = main
    while isinstance(found, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in found.commands, f"fimserver has no command {words[0]}"
        found, words = found.commands[words[0]], words[1:]
    return found, words


def check_module(words: list[str]) -> None:
    """Check a module's file, and its options by its source."""
    path = ROOT / words[0].replace(".", "/")
    files = [file for file in (path.with_suffix(".py"), path / "__main__.py") if file.exists()]
    assert files, f"{words[0]} is not a module of the checkout"
    source = files[0].read_text(encoding="utf-8")
    for option in (word for word in words[1:] if word.startswith("-")):
        assert f'"{option}"' in source, f"{words[0]} has no option {option}"


def parse(words: list[str]) -> None:
    """Parse the words after ``fimserver`` without running them."""
    found, arguments = find_command(words)
    found.make_context(found.name, arguments)


@pytest.mark.parametrize("command", ALL, ids=lambda c: f"{c.page}: {c}")
def test_a_command_exists_with_its_options(command: Command) -> None:
    program, *words = command.words
    if program == "fimserver":
        parse(words)
    elif program == "pytest" or words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif program == "python":
        if words[0] == "-m":
            check_module(words[1:])
        else:
            assert (ROOT / words[0]).exists()
    else:
        assert program in PROGRAMS or command.not_run(), "neither run nor listed in NOT_RUN"


@pytest.mark.parametrize("row", NOT_RUN, ids=lambda r: f"{r[0]}: {r[1]}")
def test_the_list_of_commands_that_are_not_run_is_short(row: tuple[str, str, str]) -> None:
    assert any(row in command.not_run() for command in ALL), "no page has this command"


PROSE = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "fimserver").rglob("*.md")), *sorted(ROOT.glob("editors/*/*.md"))]


@pytest.mark.parametrize("page", PROSE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_in_sentences_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`fimserver\s([^`]+)`", text):
        found, arguments = find_command(re.sub(r"[\[\],]", " ", span).split())
        known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in arguments:
            option = word.split("=")[0]
            assert not re.match(r"--?[a-z]", option) or option in {*known, "-h", "--help", "--version"}, span


def matches(shown: str, printed: str) -> bool:
    """Return whether a page's output is the printed one, where ``...`` is anything."""
    lines = [line.rstrip() for line in printed.strip("\n").split("\n")]
    pattern = re.escape(shown.strip("\n")).replace(re.escape("..."), r"[\s\S]*?")
    return bool(re.fullmatch(pattern, "\n".join(lines).strip("\n")))


class Folder:
    """A folder like the checkout, with the sample, settings and a daemon of its own."""

    def __init__(self, folder: Path) -> None:
        self.path, self.home = folder / "checkout", folder / "home"
        shutil.copytree(ROOT / "fimserver" / "samples", self.path / "fimserver" / "samples")
        self.env = {**os.environ, "FIMSERVER_HOME": str(self.home), "COLUMNS": "120"}
        self.editors = ExitStack()

    def close(self) -> None:
        self.editors.close()
        self.start(["fimserver", "daemon", "stop"])

    def start(self, words: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.arguments(words),
            cwd=self.path,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @staticmethod
    def arguments(words: list[str]) -> list[str]:
        return [sys.executable, "-P", "-m", *words] if words[0] == "fimserver" else words

    def connect_editor(self) -> None:
        """Request a completion in the sample's line 16, and one in its docstring."""
        client = self.editors.enter_context(closing(LspClient(command=RELAY, env=self.env)))
        client.initialize()
        sample = self.path / "fimserver" / "samples" / "inventory.py"
        client.open(sample.as_uri(), sample.read_text(encoding="utf-8"))
        client.complete(sample.as_uri(), 15, 22)
        client.complete(sample.as_uri(), 0, 42, invoked=False)

    def run(self, command: Command) -> None:
        words = list(command.words)
        assert words[0] in PROGRAMS, f"{command}: neither run nor listed in NOT_RUN"
        words += next((more for pattern, more in SMALLER.items() if fnmatch(str(command), pattern)), [])
        if command.config is not None:
            (self.home / "config").mkdir(parents=True, exist_ok=True)
            (self.home / "config" / "config.toml").write_text(command.config, encoding="utf-8")
        if words == ["fimserver", "explain"]:
            self.connect_editor()
        if "--watch" in words:
            self.watch(command)
            return
        done = self.start(words)
        text = done.stdout + done.stderr
        assert done.returncode == (1 if (command.output or "").startswith("fimserver: ") else 0), text
        if command.output is not None:
            assert matches(command.output, done.stdout or done.stderr), text

    def watch(self, command: Command) -> None:
        """Run a command until it shows what the page does after a save, then interrupt it."""
        file = self.path / next(word for word in command.words if (self.path / word).is_file())
        printed, errors = self.path / "printed", self.path / "errors"
        with printed.open("w") as stdout, errors.open("w") as stderr:
            process = subprocess.Popen(
                self.arguments(list(command.words)),
                cwd=self.path,
                env=self.env,
                stdout=stdout,
                stderr=stderr,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  a runner may ignore it
            )
            try:
                for shown in ("...", command.output or ""):
                    deadline = time.monotonic() + 60
                    while not (text := printed.read_text(encoding="utf-8")) or not matches(shown, text):
                        assert time.monotonic() < deadline, text + errors.read_text(encoding="utf-8")
                        time.sleep(0.1)
                    if shown == "...":
                        with file.open("a", encoding="utf-8") as stream:
                            stream.write((command.appended or "").removesuffix("\n"))
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 0
            finally:
                process.kill()
                process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with closing(Folder(tmp_path)) as folder:
        yield folder


RUN = {page: [command for command in commands if not command.not_run()] for page, commands in COMMANDS.items()}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow(SLOW[page])] if page in SLOW else []) for page in RUN if RUN[page]],
)
def test_commands_do_what_the_page_shows(page: str, folder: Folder) -> None:
    for command in RUN[page]:
        folder.run(command)


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("pend(item)\n", "pend(item)\n", True),
        ("pend(item)\n", "pend(it)\n", False),
        ("a\n...\nz ...\n", "\na\nb\nc\nz 1  \n", True),
        ("a\n...\nz\n", "a\nb\n", False),
    ],
)
def test_the_comparison_can_fail(shown: str, printed: str, is_same: bool) -> None:
    assert matches(shown, printed) is is_same


def test_outputs_are_found() -> None:
    assert "pend(item)" in [command.output for command in COMMANDS["README.md"]]
    tutorial = COMMANDS["fimserver/docs/tutorial/first-completion.md"]
    assert [str(command) for command in tutorial if command.output is None] == [
        "cp fimserver/samples/inventory.py shop.py",
    ]
    assert sum(command.appended is not None for command in tutorial) == 1


def test_options_and_commands_that_do_not_exist_are_found() -> None:
    for words in (["complete", "a.py:1:1", "--trce"], ["compl", "a.py:1:1"], ["bench", "gpux"]):
        with pytest.raises((click.UsageError, AssertionError)):
            parse(words)
    assert split_commands("a 'b c' && .venv/bin/d -e # f\n# g\nh > i | j\nk << E\nl\nE\nm") == [
        ("a", "b c"),
        ("d", "-e"),
        ("h", ">", "i"),
        ("j",),
        ("k", "<<"),
        ("m",),
    ]
