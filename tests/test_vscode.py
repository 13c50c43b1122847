"""The VS Code extension in a real workbench: keys go into a page, the screen and the file on the disk are compared.

With the packaged extension and the shipped model behind it; a stub server where a test needs a certain text.
Pictures are kept in $FIMSERVER_ARTEFACTS, or else in pytest's folder.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import vscode as editor
from real_editors import FIMSERVER, Stub, UnavailableError, call_fimserver, run, wait_until
from real_editors import SAMPLE as SAMPLE_FILE
from real_editors import fimserver_home as own_home
from vscode import CONTRAST, DARK, EXTENSION, LIGHT, VSCode, Window, Workbench, stub_program

SAMPLE = SAMPLE_FILE.read_text(encoding="utf-8")
LINE = 16  # of the sample: ``self.items.ap``
BEGUN = "        self.items.app"
LIMIT_BYTES = 500_000

editors = pytest.mark.editors


@pytest.fixture(scope="session")
def vscode() -> VSCode:
    try:
        return editor.find_vscode()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def vsix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return editor.package(tmp_path_factory.mktemp("vsix"))
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept."""
    chosen = os.environ.get("FIMSERVER_ARTEFACTS")
    return Path(chosen) / "vscode" if chosen else tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def home() -> Iterator[dict[str, str]]:
    """A daemon of the tests' own, which ends with them."""
    with own_home() as env:
        yield env


@pytest.fixture(scope="module")
def workbench(
    vscode: VSCode, vsix: Path, home: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workbench]:
    """One code-server for the tests that do not need one of their own."""
    folder = tmp_path_factory.mktemp("project")
    found = Workbench(vscode, vsix, folder, env=home)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def shared_window(workbench: Workbench) -> Window:
    return workbench.window()


@pytest.fixture
def window(
    shared_window: Window, workbench: Workbench, pictures: Path, request: pytest.FixtureRequest
) -> Iterator[Window]:
    """A window with the model loaded; behind the test nothing may have complained."""
    shared_window.wait_for_status("Ready", timeout=120)
    yield shared_window
    shared_window.screenshot(pictures / f"{request.node.name}.png")
    assert_calm(shared_window, workbench)
    shared_window.close_editors()


def assert_calm(window: Window, workbench: Workbench) -> None:
    """Nothing was complained about."""
    assert window.notifications() == []
    assert workbench.host_errors() == []
    errors = [line for line in workbench.logs().splitlines() if "[error]" in line]
    assert [line for line in errors if not re.search("SIGKILL|connection was closed", line)] == []


def write(workbench: Workbench, name: str, text: str = SAMPLE) -> Path:
    file = workbench.folder / name
    file.write_bytes(text.encode())
    return file


def take(window: Window, file: Path) -> str:
    """Tab, and the line as it is on the disk then."""
    window.press("Tab")
    wait_until(lambda: not window.ghost(), "the ghost text is text")
    return line_of(window.save(file))


def begin(window: Window, file: Path) -> str:
    """Open a copy of the sample and type its line on; the ghost text that comes."""
    window.open(file)
    window.go(LINE)
    return window.type_until_ghost("p")


def shows(window: Window, ghost: str) -> bool:
    return window.ghost() == ghost


def has_other_background(window: Window, color: str) -> bool:
    return window.background() != color


def line_of(data: bytes, number: int = LINE) -> str:
    return data.decode().splitlines()[number - 1]


@editors
def test_tab_takes_the_ghost_text(window: Window, workbench: Workbench) -> None:
    file = write(workbench, "tab.py")
    ghost = begin(window, file)
    assert take(window, file) == BEGUN + ghost.split("\n")[0]


@editors
def test_a_word_of_it(window: Window, workbench: Workbench) -> None:
    file = write(workbench, "word.py")
    ghost = begin(window, file)
    window.press("Control+ArrowRight")
    wait_until(lambda: window.ghost() != ghost, "a word was taken")
    rest = window.ghost()
    assert ghost.endswith(rest)
    assert take(window, file) == BEGUN + ghost


@editors
def test_typing_along_keeps_it(window: Window, workbench: Workbench) -> None:
    file = write(workbench, "along.py")
    ghost = begin(window, file)
    for i in range(1, 4):
        window.type(ghost[i - 1])
        rest = ghost[i:]
        wait_until(partial(shows, window, rest), f"the rest after {ghost[:i]!r}")
    assert take(window, file) == BEGUN + ghost


@editors
def test_escape_takes_nothing(window: Window, workbench: Workbench) -> None:
    file = write(workbench, "escape.py")
    begin(window, file)
    window.press("Escape")
    wait_until(lambda: not window.ghost(), "the ghost text is gone")
    assert line_of(window.save(file)) == BEGUN


@editors
def test_with_the_popup_open(window: Window, workbench: Workbench) -> None:
    text = SAMPLE.replace("        self.items.ap\n", "        self.append_all(item)\n        self.items.ap\n")
    file = write(workbench, "popup.py", text)
    window.open(file)
    window.go(LINE + 1)
    window.type("p")
    window.press("Control+ ")
    row = ".suggest-widget.visible .monaco-list-row.focused"
    wait_until(lambda: any("append_all" in word for word in window.texts(row)), "the popup is open")
    window.press("Tab")
    wait_until(lambda: not window.has(".suggest-widget.visible"), "the popup is closed")
    window.press("Escape")
    taken = line_of(window.save(file), LINE + 1)
    assert taken.startswith("        self.items.append_all")
    assert taken.count("append") == 1


@editors
def test_a_closed_bracket_is_not_doubled(window: Window, workbench: Workbench) -> None:
    file = write(workbench, "bracket.py")
    window.open(file)
    window.go(LINE)
    window.type("pend(")
    window.wait_for_ghost()
    taken = take(window, file)
    assert taken.startswith("        self.items.append(")
    assert taken.count("(") == taken.count(")"), taken


@editors
def test_crlf_stays(window: Window, workbench: Workbench) -> None:
    file = write(workbench, "crlf.py", SAMPLE.replace("\n", "\r\n"))
    ghost = begin(window, file)
    window.press("Tab")
    wait_until(lambda: not window.ghost(), "the ghost text is text")
    data = window.save(file)
    assert data.count(b"\n") == data.count(b"\r\n")
    assert line_of(data) == BEGUN + ghost


@editors
def test_an_emoji_before_the_cursor(window: Window, workbench: Workbench) -> None:
    begun = '        "\N{GRINNING FACE}\N{FAMILY}"; self.items.ap'
    file = write(workbench, "emoji.py", SAMPLE.replace("        self.items.ap", begun))
    ghost = begin(window, file)
    assert take(window, file) == begun + "p" + ghost


@editors
def test_snooze_by_the_menu(window: Window, workbench: Workbench, home: dict[str, str]) -> None:
    file = write(workbench, "snooze.py")
    window.open(file)
    assert any("Snooze 5 minutes" in label for label in window.menu())
    window.choose("Snooze 5 minutes")
    window.wait_for_status("Snoozed for 5 minutes")
    window.go(LINE)
    window.type("p")
    wait_until(lambda: "snoozed" in call_fimserver(home, "explain", "--json").stdout, "the request is answered")
    window.command("fimserver: Why Was There No Completion?")
    said = wait_until(window.notifications, "why")
    assert "snoozed" in said[0]
    assert not window.ghost()
    window.click(".notification-toast .monaco-button >> text=End the Snooze")
    window.wait_for_status("Ready")
    window.dismiss()
    window.go(LINE)
    window.type("e")
    assert window.wait_for_ghost()


@editors
def test_settings_change_while_it_runs(window: Window, workbench: Workbench) -> None:
    file = write(workbench, "settings.py")
    workbench.set(enabled=False)
    window.wait_for_status("Off")
    workbench.set(enabled=None)
    window.wait_for_status("Ready")
    window.open(file)
    workbench.set(languages={"python": False})
    window.wait_for_status("Off for python")
    workbench.set(languages=None)
    window.wait_for_status("Ready")
    begin(window, file)


@editors
def test_off_and_on_by_the_menu(window: Window, workbench: Workbench) -> None:
    file = write(workbench, "menu.py")
    window.open(file)
    window.menu()
    window.choose("Turn off for python")
    window.wait_for_status("Off for python")
    assert workbench.settings()["fimserver.languages"] == {"python": False}
    window.menu()
    window.choose("Turn on for python")
    window.wait_for_status("Ready")
    window.menu()
    window.choose("Turn off in this workspace")
    window.wait_for_status("Off")
    assert json.loads((workbench.folder / ".vscode" / "settings.json").read_text()) == {"fimserver.enabled": False}
    window.menu()
    window.choose("Turn on in this workspace")
    window.wait_for_status("Ready")
    window.menu()
    window.choose("Quality")
    wait_until(lambda: workbench.settings().get("fimserver.mode") == "quality", "the mode is chosen")
    workbench.set(mode=None, languages=None)
    begin(window, file)


@editors
def test_statistics_log_and_doctor(window: Window, workbench: Workbench, pictures: Path) -> None:
    window.menu()
    window.choose("Statistics")
    wait_until(lambda: window.has(".tab.active[aria-label*='Statistics'] , .webview.ready"), "the page is there")
    wait_until(lambda: window.has("iframe.webview.ready"), "the page is read")
    window.screenshot(pictures / "statistics.png")
    window.menu()
    window.choose("Doctor")
    terminal = ".xterm-rows"
    wait_until(lambda: any("Press any key" in text for text in window.texts(terminal)), "the doctor has spoken", 60)
    window.screenshot(pictures / "doctor.png")
    window.command("fimserver: Open the Log")
    wait_until(lambda: any("starting" in line for line in window.texts(".panel .view-line")), "the log is there")
    window.command("View: Hide Panel")


@editors
def test_killed_and_there_again(window: Window, workbench: Workbench, home: dict[str, str]) -> None:
    file = write(workbench, "killed.py")
    begin(window, file)
    old = daemon_status(home)["pid"]
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: daemon_status(home).get("pid", old) != old, "there is another daemon")
    window.wait_for_status("Ready", timeout=90)
    window.press("Escape")
    window.type_until_ghost("e")
    relays = relays_of(workbench)
    for pid in relays:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: (now := relays_of(workbench)) and not set(now) & set(relays), "there is another relay")
    window.wait_for_status("Ready", timeout=90)
    window.press("Escape")
    window.type_until_ghost("n")
    assert take(window, file).startswith(BEGUN + "en")


@editors
def test_two_windows_share_one_model(window: Window, workbench: Workbench, home: dict[str, str]) -> None:
    file = write(workbench, "first.py")
    other = write(workbench, "second.py")
    second = workbench.window()
    try:
        second.wait_for_status("Ready", timeout=120)
        begin(window, file)
        begin(second, other)
        status = daemon_status(home)
        assert status["connections"] == 2, status
        workers = [pid for pid in children_of(status["pid"]) if "worker" in command_of(pid)]
        assert workers == [status["worker"]["pid"]]
    finally:
        second.close()


@editors
def test_a_notebook(window: Window, workbench: Workbench) -> None:
    cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    cells = [{**cell, "source": ["import json\n", "words = []"]}, {**cell, "source": ["words.ap"]}]
    metadata = {"language_info": {"name": "python"}}
    write(
        workbench, "book.ipynb", json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})
    )
    window.open(workbench.folder / "book.ipynb", focus=False)
    wait_until(lambda: len(window.texts(".notebookOverlay .cell .view-lines")) == 2, "the cells are there")
    window.click(".notebookOverlay .view-lines >> nth=1")
    window.press("Control+End")
    window.type("p")
    assert window.wait_for_ghost().startswith("end")


@editors
def test_pictures_in_three_themes(window: Window, workbench: Workbench, pictures: Path) -> None:
    file = write(workbench, "inventory.py")
    begin(window, file)
    for name, theme in (("light", LIGHT), ("dark", DARK), ("contrast", CONTRAST)):
        before = window.background()
        workbench.set_any("workbench.colorTheme", theme)
        if name != "light":
            wait_until(partial(has_other_background, window, before), f"the theme is {theme}")
        window.screenshot(pictures / f"ghost_{name}.png")
    window.press("Tab")
    for name, theme in (("contrast", CONTRAST), ("dark", DARK), ("light", LIGHT)):
        before = window.background()
        workbench.set_any("workbench.colorTheme", theme)
        if name != "contrast":
            wait_until(partial(has_other_background, window, before), f"the theme is {theme}")
        window.menu()
        window.screenshot(pictures / f"menu_{name}.png")
        window.press("Escape")
    window.save(file)


@editors
def test_several_candidates(window: Window, workbench: Workbench, tmp_path: Path) -> None:
    stub = Stub(tmp_path, {"after": "self.items.app", "texts": ["end(one)", "end(two)"]})
    file = write(workbench, "candidates.py")
    with stubbed(window, workbench, stub):
        window.open(file)
        window.go(LINE)
        window.type("p")
        window.wait_for_ghost()
        window.press("Escape")
        wait_until(lambda: not window.ghost(), "the ghost text is gone")
        window.press("Alt+\\")
        assert window.wait_for_ghost() == "end(one)"
        window.press("Alt+]")
        wait_until(lambda: window.ghost() == "end(two)", "the next one")
        window.press("Alt+[")
        wait_until(lambda: window.ghost() == "end(one)", "the one before")
        assert take(window, file) == BEGUN + "end(one)"
        executed = wait_until(lambda: stub.received("workspace/executeCommand"), "the server was told")
        assert executed[-1]["arguments"] == ["self.items.append(one)"]


@editors
def test_a_line_of_several(window: Window, workbench: Workbench, tmp_path: Path) -> None:
    stub = Stub(tmp_path, {"after": "self.items.app", "texts": ["end(one)\n        return self"]})
    file = write(workbench, "lines.py")
    with stubbed(window, workbench, stub):
        window.open(file)
        window.go(LINE)
        window.type("p")
        window.wait_for_ghost()
        window.press("Alt+End")
        wait_until(lambda: "end(one)" not in window.ghost(), "a line was taken")
        window.press("Escape")
        assert line_of(window.save(file)).rstrip() == BEGUN + "end(one)"


@editors
def test_several_cursors_are_left_alone(window: Window, workbench: Workbench, tmp_path: Path) -> None:
    stub = Stub(tmp_path, {"after": "", "texts": ["ghost"]})
    file = write(workbench, "cursors.py")
    with stubbed(window, workbench, stub):
        window.open(file)
        window.go(6)
        window.press("Shift+Alt+ArrowDown")
        wait_until(lambda: any("2 selections" in text for text in window.texts(".statusbar-item")), "two cursors")
        asked = len(stub.received("textDocument/inlineCompletion"))
        window.type("x")
        wait_until(lambda: stub.received("textDocument/didChange"), "the edit has come")
        window.press("Alt+\\")
        window.press("Escape", "Escape")
        wait_until(lambda: not any("2 selections" in text for text in window.texts(".statusbar-item")), "one cursor")
        assert len(stub.received("textDocument/inlineCompletion")) == asked
        window.type("y")
        assert window.wait_for_ghost() == "ghost"
        window.press("Escape")
        window.save(file)


@editors
def test_an_untitled_document(window: Window) -> None:
    window.press("Control+Alt+n")
    wait_until(lambda: window.has(".tab.active[data-resource-name^='Untitled']"), "a new document")
    window.command("Change Language Mode")
    wait_until(lambda: window.has(".quick-input-widget:not([style*='display: none']) input"), "languages")
    window.choose("Python")
    window.type("import json\n\n\ndef read(path):\nwith open(path) as file:\nreturn json.l")  # the editor indents
    try:
        assert window.type_until_ghost("o").startswith("ad")
    finally:
        window.command("View: Revert and Close Editor")


class stubbed:  # noqa: N801  used as a function is
    """The stub server in the place of the model, for a while."""

    def __init__(self, window: Window, workbench: Workbench, stub: Stub) -> None:
        self.window, self.workbench, self.stub = window, workbench, stub

    def __enter__(self) -> None:
        self.workbench.set(serverPath=str(stub_program(self.stub)))
        wait_until(lambda: self.stub.received("initialized"), "the stub has started")
        self.window.wait_for_status("Ready")

    def __exit__(self, *_: object) -> None:
        self.workbench.set(serverPath=str(FIMSERVER))
        self.window.wait_for_status("tiny")


def daemon_status(home: dict[str, str]) -> dict[str, Any]:
    printed = call_fimserver(home, "daemon", "status", "--json").stdout
    found: dict[str, Any] = json.loads(printed) if printed.startswith("{") else {}
    return found


def relays_of(workbench: Workbench) -> list[int]:
    """The processes that editors have started."""
    return [pid for pid in children_of(workbench.pid) if command_of(pid).rstrip().endswith("fimserver lsp")]


def children_of(pid: int) -> list[int]:
    """All processes below one."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found: list[int] = []
    todo = [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, its in pairs if its == parent]
        found += children
        todo += children
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@editors
def test_a_workspace_that_is_not_trusted(
    vscode: VSCode, vsix: Path, home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    folder = tmp_path / "theirs"
    (folder / ".vscode").mkdir(parents=True)
    evil, traces = tmp_path / "evil.sh", tmp_path / "traces"
    evil.write_text(f"#!/bin/sh\ntouch {traces}\n", encoding="utf-8")
    evil.chmod(0o755)
    for name in (".venv", "venv"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "fimserver").symlink_to(evil)
    settings = {"fimserver.serverPath": str(evil), "fimserver.model": "/theirs", "fimserver.device": "cuda:7"}
    (folder / ".vscode" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "inventory.py").write_text(SAMPLE, encoding="utf-8")
    workbench = Workbench(vscode, vsix, folder, env=home, trusted=False)
    try:
        window = workbench.window()
        status = window.wait_for_status("Ready", timeout=120)
        assert "tiny, on cpu" in status
        assert "not trusted" in status
        assert begin(window, folder / "inventory.py")
        window.screenshot(pictures / "untrusted.png")
        assert not traces.exists()
        assert_calm(window, workbench)
    finally:
        workbench.close()


FAKE_UV = """#!/bin/sh
echo "$@" >> {journal}
case "$1" in
  venv) mkdir -p "$4/bin" ;;
  pip)
    case "$*" in
      *torch) echo "Downloading torch"; exec sleep {pause} ;;
      *) cp {server} "$(dirname "$4")/fimserver" ;;
    esac ;;
esac
"""


@editors
def test_the_server_is_installed_when_asked(
    vscode: VSCode, vsix: Path, home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    folder, tools, journal = tmp_path / "project", tmp_path / "tools", tmp_path / "journal"
    folder.mkdir()
    tools.mkdir()
    (folder / "inventory.py").write_text(SAMPLE, encoding="utf-8")
    uv, server = tools / "uv", tmp_path / "server"
    server.write_text(f'#!/bin/sh\nexec {FIMSERVER} "$@"\n', encoding="utf-8")
    server.chmod(0o755)

    def write_uv(pause: int) -> None:
        uv.write_text(FAKE_UV.format(journal=journal, pause=pause, server=server), encoding="utf-8")
        uv.chmod(0o755)

    write_uv(600)
    path = f"{tools}:/usr/bin:/bin"
    workbench = Workbench(vscode, vsix, folder, env={**home, "PATH": path}, settings={"fimserver.serverPath": ""})
    try:
        window = workbench.window()
        window.wait_for_status("not installed", timeout=120)
        said = wait_until(window.notifications, "the offer")
        assert len(said) == 1
        window.screenshot(pictures / "missing.png")
        assert not journal.exists()

        def install() -> None:
            wait_until(lambda: any("0.3 GB" in text for text in window.rows()), "the builds")
            window.screenshot(pictures / "install.png")
            window.press("Enter")
            wait_until(lambda: any("uv" in text for text in window.rows()), "the tools")
            window.press("Enter")
            wait_until(lambda: any("Download and install" in text for text in window.rows()), "the last step")
            window.press("Enter")

        window.click(".notification-toast .monaco-button >> text=Install...")
        install()
        wait_until(lambda: any("torch" in text for text in window.notifications()), "how far it is")
        window.screenshot(pictures / "installing.png")
        window.click(".notification-toast .monaco-button >> text=Cancel")
        wait_until(lambda: not window.notifications(), "it was stopped")
        assert "not installed" in window.status()
        place = "globalStorage/fimserver.fimserver/server"
        wait_until(lambda: not list(workbench.data.rglob(place)), "what was begun is gone")

        write_uv(0)
        window.menu()
        window.choose("Install the server")
        install()
        window.wait_for_status("Ready", timeout=60)
        begin(window, folder / "inventory.py")
        assert "fimserver==0.1.0" in journal.read_text(encoding="utf-8")
        assert workbench.host_errors() == []
    finally:
        workbench.close()


@editors
def test_the_package_is_small_and_holds_no_sources(vsix: Path) -> None:
    names = editor.names_in(vsix)
    assert vsix.stat().st_size < LIMIT_BYTES
    assert "extension/dist/extension.js" in names
    assert "extension/media/ghost.png" in names
    assert [name for name in names if re.search(r"\.ts$|\.map$|node_modules|\.env|test|package-lock|\.py$", name)] == []


@editors
def test_the_settings_are_the_servers(vsix: Path) -> None:
    command = [sys.executable, str(EXTENSION / "scripts" / "settings.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@editors
def test_the_extensions_own_checks(vsix: Path) -> None:
    for script in ("check", "test"):
        run("npm", "run", script, cwd=EXTENSION)
