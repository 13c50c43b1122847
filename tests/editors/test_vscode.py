"""The VS Code extension in a real workbench: keys go into a page, the screen and the file on the disk are compared.

With the packaged extension and the shipped model; a stub server if a test needs a certain text.
Pictures are kept in $FIMSERVER_ARTEFACTS, or else in pytest's folder.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import vscode as editor
from support.real_editors import BEGUN, LINE, SAMPLE, Stub, call_fimserver, daemon_status, run, wait_until
from support.vscode import EXTENSION, VSCode, Window, Workbench

LIMIT_BYTES = 500_000
AUTOMATIC = 2  # of LSP's InlineCompletionTriggerKind

editors = pytest.mark.editors


@pytest.fixture(scope="module")
def workbench(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workbench]:
    """One code-server for the tests that do not need one of their own."""
    folder = tmp_path_factory.mktemp("project")
    (folder / ".vscode").mkdir()
    snippets = {"loop": {"prefix": "loop", "body": ["for $1:", "    $2", "$0"]}}
    (folder / ".vscode" / "tests.code-snippets").write_text(json.dumps(snippets), encoding="utf-8")
    found = Workbench(vscode, vsix, folder, env=editors_home)
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
    """A window with the model loaded; after the test no complaint may have been logged."""
    shared_window.wait_for_status("Ready", timeout=120)
    yield shared_window
    shared_window.screenshot(pictures / f"{request.node.name}.png")
    workbench.assert_calm(shared_window)
    shared_window.close_editors()


def take(window: Window, file: Path) -> str:
    """Press Tab; return the line as it is on the disk then."""
    window.take_ghost()
    return line_of(window.save(file))


def shows(window: Window, ghost: str) -> bool:
    return window.ghost() == ghost


def line_of(data: bytes, number: int = LINE) -> str:
    return data.decode().splitlines()[number - 1]


@editors
def test_tab_takes_the_ghost_text(window: Window, workbench: Workbench) -> None:
    file = workbench.write("tab.py")
    ghost = window.begin(file)
    assert take(window, file) == BEGUN + ghost.split("\n")[0]


@editors
def test_the_extension_runs_where_the_code_is(window: Window, workbench: Workbench) -> None:
    """As over SSH, in WSL and in a container: the page is one machine, and the extension runs on the other."""
    logs = "".join(file.read_text(encoding="utf-8") for file in workbench.data.rglob("remoteexthost.log"))
    assert re.search(r"_doActivateExtension fimserver\.fimserver", logs)
    assert relays_of(workbench)


@editors
def test_accepting_a_word(window: Window, workbench: Workbench) -> None:
    file = workbench.write("word.py")
    ghost = window.begin(file)
    window.press("Control+ArrowRight")
    rest = wait_until(lambda: (now := window.ghost()) != ghost and now, "a word was taken")
    assert ghost.endswith(rest)
    assert take(window, file) == BEGUN + ghost


@editors
def test_typing_along_keeps_it(window: Window, workbench: Workbench) -> None:
    file = workbench.write("along.py")
    ghost = window.begin(file)
    for i in range(1, 4):
        window.type(ghost[i - 1])
        rest = ghost[i:]
        wait_until(partial(shows, window, rest), f"the rest after {ghost[:i]!r}")
    assert take(window, file) == BEGUN + ghost


@editors
def test_escape_accepts_nothing(window: Window, workbench: Workbench) -> None:
    file = workbench.write("escape.py")
    window.begin(file)
    window.press("Escape")
    wait_until(lambda: not window.ghost(), "the ghost text is gone")
    assert line_of(window.save(file)) == BEGUN


@editors
def test_with_the_popup_open(window: Window, workbench: Workbench) -> None:
    text = SAMPLE.replace("        self.items.ap\n", "        self.append_all(item)\n        self.items.ap\n")
    file = workbench.write("popup.py", text)
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
def test_with_a_popup_that_opens_automatically(window: Window, workbench: Workbench) -> None:
    text = SAMPLE.replace("        self.items.ap\n", "        self.append_all(item)\n        self.items.ap\n")
    file = workbench.write("opens.py", text)
    row = ".suggest-widget.visible .monaco-list-row.focused"
    chosen = "append_all"

    def continues_choice() -> bool:
        """Return whether there is ghost text that continues the chosen item."""
        return any(chosen in word for word in window.texts(row)) and f"app{window.ghost()}".startswith(chosen)

    workbench.set_any("editor.quickSuggestions", True)
    try:
        window.open(file)
        window.go(LINE + 1)
        for _ in range(3):  # until the extension has read the setting
            window.type("p")
            with suppress(AssertionError):
                wait_until(continues_choice, "a popup, and ghost text for the chosen item", 10)
                break
            window.press("Escape", "Backspace")
        else:
            pytest.fail("no popup with ghost text that continues the chosen item")
        window.press("Tab")
        wait_until(lambda: not window.has(".suggest-widget.visible"), "the popup is closed")
        window.press("Escape")
        assert line_of(window.save(file), LINE + 1).startswith(f"        self.items.{chosen}")
    finally:
        workbench.set_any("editor.quickSuggestions", False)


@editors
def test_the_list_of_names_can_come_first(window: Window, workbench: Workbench) -> None:
    """With VS Code's own default, which opens its list of names only where there is no ghost text."""
    text = SAMPLE.replace("        self.items.ap\n", "        self.append_all(item)\n        self.items.\n")
    file = workbench.write("begins.py", text)
    names = ".suggest-widget.visible .monaco-list-row"
    workbench.set_any("editor.quickSuggestions", {"other": "offWhenInlineCompletions"})
    try:
        window.open(file)
        window.go(LINE + 1)
        workbench.set(wordStart="menu")
        for _ in range(3):  # until the server has the setting
            window.type("a")
            with suppress(AssertionError):
                wait_until(lambda: any("append_all" in text for text in window.texts(names)), "the list of names", 8)
                break
            window.press("Escape", "Backspace")
        else:
            pytest.fail("no list of names")
        assert not window.ghost() or f"a{window.ghost()}".startswith("append_all"), "only what continues the choice"
        window.press("Escape", "Escape")
        window.save(file)
    finally:
        workbench.set(wordStart=None)
        workbench.set_any("editor.quickSuggestions", False)


@editors
def test_a_closed_bracket_is_not_doubled(window: Window, workbench: Workbench) -> None:
    file = workbench.write("bracket.py")
    window.open(file)
    window.go(LINE)
    window.type("pend")
    window.type_until_ghost("(")
    taken = take(window, file)
    assert taken.startswith("        self.items.append(")
    assert taken.count("(") == taken.count(")"), taken


@editors
def test_crlf_stays(window: Window, workbench: Workbench) -> None:
    file = workbench.write("crlf.py", SAMPLE.replace("\n", "\r\n"))
    ghost = window.begin(file)
    window.take_ghost()
    data = window.save(file)
    assert data.count(b"\n") == data.count(b"\r\n")
    assert line_of(data) == BEGUN + ghost


@editors
def test_an_emoji_before_the_cursor(window: Window, workbench: Workbench) -> None:
    begun = '        "\N{GRINNING FACE}\N{FAMILY}"; self.items.ap'
    file = workbench.write("emoji.py", SAMPLE.replace("        self.items.ap", begun))
    ghost = window.begin(file)
    assert take(window, file) == begun + "p" + ghost


@editors
def test_snooze_by_the_menu(window: Window, workbench: Workbench, editors_home: dict[str, str]) -> None:
    file = workbench.write("snooze.py")
    window.open(file)
    assert any("Snooze..." in label for label in window.menu())
    window.choose("Snooze...")
    wait_until(lambda: any("5 minutes" in row for row in window.rows()), "the times")
    window.choose("5 minutes")
    window.wait_for_status("Snoozed for 5 minutes")
    window.go(LINE)
    window.type("p")
    wait_until(lambda: "snoozed" in call_fimserver(editors_home, "explain", "--json").stdout, "the request is answered")
    window.command("fimserver: Why Was There No Completion?")
    shown = wait_until(window.notifications, "why")
    assert shown[0].startswith("Snoozed.")
    assert not window.ghost()
    window.click(".notification-toast .monaco-button >> text=End the Snooze")
    window.wait_for_status("Ready")
    window.dismiss()
    window.go(LINE)
    assert window.type_until_ghost("e")


@editors
def test_settings_change_while_it_runs(window: Window, workbench: Workbench) -> None:
    file = workbench.write("settings.py")
    workbench.set_for_status(window, "Off", enabled=False)
    workbench.set_for_status(window, "Ready", enabled=None)
    window.open(file)
    workbench.set_for_status(window, "Off for python", languages={"python": False})
    workbench.set_for_status(window, "Ready", languages=None)
    window.begin(file)


def turn(window: Window, how: str, where: str | None = None) -> None:
    """Turn completions off or on by the menu."""
    window.menu()
    window.choose(how)
    if where is not None:
        wait_until(lambda: any(where in row for row in window.rows()), "where to turn them off")
        window.choose(where)


@editors
def test_off_and_on_by_the_menu(window: Window, workbench: Workbench) -> None:
    file = workbench.write("menu.py")
    window.open(file)
    turn(window, "Turn off", "For python")
    window.wait_for_status("Off for python")
    assert workbench.settings()["fimserver.languages"] == {"python": False}
    turn(window, "Turn on for python")
    window.wait_for_status("Ready")
    wait_until(lambda: "fimserver.languages" not in workbench.settings(), "the entry is removed")
    turn(window, "Turn off", "In this workspace")
    window.wait_for_status("fimserver, Off")
    turn(window, "Turn on")
    window.wait_for_status("Ready")
    turn(window, "Turn off", "Everywhere")
    window.wait_for_status("fimserver, Off")
    assert workbench.settings()["fimserver.enabled"] is False
    turn(window, "Turn on")
    window.wait_for_status("Ready")
    wait_until(lambda: "fimserver.enabled" not in workbench.settings(), "the setting is removed")
    assert [path.name for path in (workbench.folder / ".vscode").iterdir()] == ["tests.code-snippets"], (
        "nothing written"
    )
    window.begin(file)


@editors
def test_a_language_that_the_model_has_not_learned(window: Window, workbench: Workbench, pictures: Path) -> None:
    go = workbench.write("main.go", "package main\n\nfunc main() {\n\t\n}\n")
    window.open(go)
    window.wait_for_status("Python only")
    (shown,) = wait_until(window.notifications, "the message of the first time")
    assert shown.startswith("The model has learned Python only.")
    window.screenshot(pictures / "python_only.png")
    assert any("Get a model for go" in label for label in window.menu())
    window.press("Escape")
    window.click(".notification-toast .monaco-button >> text=OK")
    window.open(workbench.write("known.py"))
    window.wait_for_status("Ready")
    window.open(go)
    window.wait_for_status("Python only")
    time.sleep(0.5)  # nothing shows that there is no second message
    assert window.notifications() == []


@editors
def test_settings_and_a_sample_by_command(window: Window) -> None:
    window.command("fimserver: Settings")
    wait_until(lambda: window.has(".settings-editor .setting-item-contents"), "the settings are there")
    count = ".settings-editor .settings-count-widget"
    wait_until(lambda: any("Settings Found" in text for text in window.texts(count)), "they are searched")
    wait_until(lambda: window.texts(".settings-editor .setting-item-label")[:1] == ["Enabled"], "only ours")
    window.press("Escape")
    wait_until(lambda: not window.has(".settings-editor"), "they are closed")
    window.command("fimserver: Open a Sample")
    assert window.wait_for_ghost().startswith("pend(")
    window.take_ghost()
    assert any("self.items.append(item)" in line for line in window.written())
    window.command("View: Revert and Close Editor")


@editors
def test_statistics_log_and_doctor(window: Window, workbench: Workbench, pictures: Path) -> None:
    def screenshot(name: str) -> Callable[[str], None]:
        return lambda theme: window.screenshot(pictures / f"{name}_{theme}.png")

    window.menu()
    window.choose("Statistics")
    wait_until(lambda: window.has(".tab.active[aria-label*='Statistics'] , .webview.ready"), "the page is there")
    wait_until(lambda: window.has("iframe.webview.ready"), "the page is read")
    time.sleep(1)  # what is in its frame cannot be seen from here
    workbench.in_themes(window, screenshot("statistics"))
    window.menu()
    window.choose("Doctor")
    terminal = ".xterm-rows"
    wait_until(
        lambda: any("Press any key" in text for text in window.texts(terminal)), "the doctor has printed its report", 60
    )
    workbench.in_themes(window, screenshot("doctor"))
    window.command("fimserver: Open the Log")
    wait_until(lambda: any("starting" in line for line in window.texts(".panel .view-line")), "the log is there")
    window.command("View: Hide Panel")


@editors
def test_killed_processes_come_back(window: Window, workbench: Workbench, editors_home: dict[str, str]) -> None:
    file = workbench.write("killed.py")
    window.begin(file)
    old = daemon_status(editors_home)["pid"]
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: daemon_status(editors_home).get("pid", old) != old, "there is another daemon")
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
def test_two_windows_share_one_model(window: Window, workbench: Workbench, editors_home: dict[str, str]) -> None:
    file = workbench.write("first.py")
    other = workbench.write("second.py")
    second = workbench.window()
    try:
        second.wait_for_status("Ready", timeout=120)
        window.begin(file)
        second.begin(other)
        status = daemon_status(editors_home)
        assert status["connections"] == 2, status
        workers = [pid for pid in children_of(status["pid"]) if "engine.worker" in command_of(pid)]
        assert workers == [status["worker"]["pid"]]
    finally:
        second.close()


@editors
def test_a_notebook(window: Window, workbench: Workbench) -> None:
    cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    cells = [{**cell, "source": ["import json\n", "words = []"]}, {**cell, "source": ["words.ap"]}]
    metadata = {"language_info": {"name": "python"}}
    book = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    workbench.write("book.ipynb", json.dumps(book))
    window.open(workbench.folder / "book.ipynb", focus=False)
    wait_until(lambda: len(window.texts(".notebookOverlay .cell .view-lines")) == 2, "the cells are there")
    window.click(".notebookOverlay .view-lines >> nth=1")
    window.press("Control+End")
    assert window.type_until_ghost("p").startswith("end")


@editors
def test_pictures_in_three_themes(window: Window, workbench: Workbench, pictures: Path) -> None:
    file = workbench.write("inventory.py")
    window.begin(file)
    workbench.in_themes(window, lambda theme: window.screenshot(pictures / f"ghost_{theme}.png"))
    window.press("Tab")

    def picture_menu(theme: str) -> None:
        window.menu()
        window.screenshot(pictures / f"menu_{theme}.png")
        window.press("Escape")

    workbench.in_themes(window, picture_menu)
    window.save(file)


@editors
def test_several_candidates(window: Window, workbench: Workbench, tmp_path: Path) -> None:
    stub = Stub(tmp_path, {"after": "self.items.app", "texts": ["end(one)", "end(two)"]})
    file = workbench.write("candidates.py")
    with workbench.stubbed(window, stub):
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
        executed = wait_until(lambda: stub.received("workspace/executeCommand"), "the server got the command")
        assert executed[-1]["arguments"] == ["self.items.append(one)"]


@editors
def test_accepting_a_line(window: Window, workbench: Workbench, tmp_path: Path) -> None:
    stub = Stub(tmp_path, {"after": "self.items.app", "texts": ["end(one)\n        return self"]})
    file = workbench.write("lines.py")
    with workbench.stubbed(window, stub):
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
    file = workbench.write("cursors.py")
    with workbench.stubbed(window, stub):
        window.open(file)
        window.go(6)
        window.press("Shift+Alt+ArrowDown")
        wait_until(lambda: any("2 selections" in text for text in window.texts(".statusbar-item")), "two cursors")
        asked = len(stub.received("textDocument/inlineCompletion"))
        window.type("x")
        wait_until(lambda: stub.received("textDocument/didChange"), "the edit has come")
        window.press("Alt+\\")
        time.sleep(0.5)  # nothing shows that no request was sent
        window.press("Escape", "Escape")
        wait_until(lambda: not any("2 selections" in text for text in window.texts(".statusbar-item")), "one cursor")
        assert len(stub.received("textDocument/inlineCompletion")) == asked
        window.type("y")
        assert window.wait_for_ghost() == "ghost"
        window.press("Escape")
        window.save(file)


@editors
def test_a_request_is_repeated_once_the_model_is_loaded(window: Window, workbench: Workbench, tmp_path: Path) -> None:
    file = workbench.write("loading.py")
    window.open(file)
    window.go(LINE)
    loaded = tmp_path / "loaded"
    stub = Stub(tmp_path, {"after": "self.items.app", "texts": ["end(one)"], "loading_until": str(loaded)})
    with workbench.stubbed(window, stub):
        window.wait_for_status("loading")
        window.type("p")
        wait_until(lambda: stub.received("textDocument/inlineCompletion"), "the server was asked")
        assert not window.ghost()
        loaded.touch()
        assert window.wait_for_ghost() == "end(one)"
        asked = stub.received("textDocument/inlineCompletion")
        assert [request["context"]["triggerKind"] for request in asked] == [AUTOMATIC, AUTOMATIC]
        window.press("Escape")
        window.save(file)


@editors
@pytest.mark.parametrize("with_ghost", [False, True])
def test_in_a_snippet(with_ghost: bool, window: Window, workbench: Workbench, tmp_path: Path) -> None:
    stub = Stub(tmp_path, {"after": "for wor", "texts": ["d in words"]}, {"after": "prin", "texts": ["t(word)"]})
    file = workbench.write("snippet.py", "words = []\n\n")
    if with_ghost:
        workbench.set_any("editor.inlineSuggest.suppressInSnippetMode", False)  # of VS Code, on by default
    with workbench.stubbed(window, stub):
        window.open(file)
        window.go(2)
        window.command("Snippets: Insert Snippet")
        wait_until(lambda: any("loop" in text for text in window.rows()), "snippets to choose from")
        window.choose("loop")
        wait_until(lambda: any("for" in line for line in window.lines()), "the snippet is there")
        if with_ghost:
            window.type("wor")
            assert window.wait_for_ghost() == "d in words"
            window.take_ghost()
        else:
            window.type("word in words")
        window.press("Tab")  # to the snippet's next place
        window.type("print(word)")
        window.press("Tab")  # to its end
        window.type("prin")
        assert window.wait_for_ghost() == "t(word)"
        window.take_ghost()
        saved = window.save(file).decode().split()
        assert saved == ["words", "=", "[]", "for", "word", "in", "words:", "print(word)", "print(word)"]


@editors
def test_an_untitled_document(window: Window) -> None:
    window.press("Control+Alt+n")
    wait_until(lambda: window.has(".tab.active[data-resource-name^='Untitled']"), "a new document")
    window.command("Change Language Mode")
    window.choose("Python")
    wait_until(lambda: window.has(".editor-container .monaco-editor.focused"), "the editor has the focus")
    wait_until(lambda: "Python" in window.texts(".statusbar-item"), "the language")
    window.type("import json\n\n\nvalue = json.du")  # whether the editor indents is not known yet
    try:
        assert window.type_until_ghost("m").startswith("ps")
    finally:
        window.command("View: Revert and Close Editor")


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
def test_the_package_is_small_and_holds_no_sources(vsix: Path) -> None:
    names = editor.names_in(vsix)
    (wheel,) = [name for name in names if name.endswith(".whl")]
    assert vsix.stat().st_size - editor.size_in(vsix, wheel) < LIMIT_BYTES
    assert {"extension/dist/extension.js", "extension/dist/sample.txt"} <= set(names)
    assert {"extension/media/ghost.png", "extension/media/ghost_dark.png"} <= set(names)
    assert [name for name in names if re.search(r"\.ts$|\.map$|node_modules|\.env|test|package-lock|\.py$", name)] == []


@editors
def test_the_settings_match_the_servers(vsix: Path) -> None:
    command = [sys.executable, str(EXTENSION / "scripts" / "settings.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@editors
def test_the_extensions_own_checks(vsix: Path) -> None:
    for script in ("check", "test"):
        run("npm", "run", script, cwd=EXTENSION)
