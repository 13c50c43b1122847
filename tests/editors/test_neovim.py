"""The Neovim plugin in real Neovims: keys go into a terminal, the screen and the file on the disk are compared.

Tests that accept any text use the shipped model, those that need a certain one a stub server.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import debian
from support.neovim import PLUGIN, VERSIONS, Neovim, Terminal, find_neovim, find_stylua, stub_options
from support.real_editors import (
    BEGUN,
    FIMSERVER,
    LINE,
    SAMPLE,
    Stub,
    daemon_status,
    skipped_where_unavailable,
    wait_until,
    write_script,
)

Start = Callable[..., Terminal]

editors = pytest.mark.editors


@pytest.fixture(params=VERSIONS)
def neovim(request: pytest.FixtureRequest) -> Neovim:
    return _find(str(request.param))


def _find(version: str) -> Neovim:
    with skipped_where_unavailable():
        return find_neovim(version)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "inventory.py"
    path.write_text(SAMPLE, encoding="utf-8")
    return path


@pytest.fixture
def start(neovim: Neovim, editors_home: dict[str, str]) -> Iterator[Start]:
    """Starts Neovims; after the test none of them may have complained."""
    terminals: list[Terminal] = []

    def start_one(file: Path, **arguments: Any) -> Terminal:
        terminals.append(Terminal(neovim, file, env=editors_home, **arguments))
        return terminals[-1]

    yield start_one
    try:
        for terminal in terminals:
            assert not re.search(r"E\d+:|\b[Ee]rror\b|traceback", terminal.messages()), terminal.messages()
            assert not terminal.log()
    finally:
        for terminal in terminals:
            terminal.close()


@pytest.fixture
def editor(start: Start, file: Path) -> Terminal:
    """A Neovim with the sample file, the shipped model and the plugin's defaults."""
    terminal = start(file)
    terminal.wait_until_ready()
    return terminal


def begin(terminal: Terminal) -> str:
    """Continue to type the sample's line; return the ghost text from the screen."""
    terminal.go(LINE)
    ghost = terminal.type_until_ghost("p")
    terminal.wait_for(f"self.items.app{ghost}")
    return ghost


def wait_for_rest(terminal: Terminal, rest: str) -> None:
    wait_until(lambda: terminal.ghost() == rest, f"{rest!r} is left")


def has_text(terminal: Terminal, text: str) -> bool:
    return bool(terminal.lua("table.concat(vim.fn.getline(1, '$'), '|')") == text)


def line_of(terminal: Terminal, number: int = LINE) -> str:
    return str(terminal.lua(f"vim.fn.getline({number})"))


def wait_for_reason(terminal: Terminal, reason: str) -> None:
    wait_until(lambda: explained(terminal).get("reason") == reason, reason)


def explained(terminal: Terminal) -> dict[str, Any]:
    client = "vim.lsp.get_clients({ name = 'fimserver' })[1]"
    answer = terminal.lua(f"{client}:request_sync('fimserver/explain', vim.empty_dict(), 5000, 0)")
    last: dict[str, Any] = answer["result"]["last"] or {}
    return last


# With the shipped model


@editors
def test_ghost_text_is_typed_accepted_and_saved(editor: Terminal, file: Path) -> None:
    ghost = begin(editor)
    editor.send("Tab")
    wait_until(lambda: line_of(editor) == BEGUN + ghost, "the ghost text is in the text")
    saved = editor.save(file).decode()
    assert saved.splitlines() == [*SAMPLE.splitlines()[: LINE - 1], BEGUN + ghost, *SAMPLE.splitlines()[LINE:]]
    assert "\t" not in saved


@editors
def test_ghost_text_is_grey_and_italic(editor: Terminal) -> None:
    ghost = begin(editor)
    assert f"\x1b[3m\x1b[38;5;246m{ghost}" in editor.screen(colors=True)


@editors
def test_a_word_leaves_the_rest_on_the_screen(editor: Terminal) -> None:
    ghost = begin(editor)
    word = re.match(r"\w+", ghost)
    assert word is not None
    assert len(word[0]) < len(ghost)
    editor.send("M-Right")
    wait_until(lambda: line_of(editor) == BEGUN + word[0], "one word is in the text")
    assert editor.wait_for_ghost() == ghost.removeprefix(word[0])
    editor.wait_for(BEGUN + ghost)


@editors
def test_typing_along_does_not_flicker_and_deleting_shows_it_again(editor: Terminal, tmp_path: Path) -> None:
    ghost = begin(editor)
    raw = tmp_path / "raw"
    editor.watch(raw)

    def count_frames() -> int:
        return raw.read_bytes().count(b"\x1b[?25h")  # the cursor is shown when all is drawn

    def is_drawn(number: int) -> bool:
        return count_frames() >= number

    for i in range(1, 4):
        editor.type(ghost[i - 1])
        wait_for_rest(editor, ghost[i:])
        wait_until(partial(is_drawn, i), "every drawn screen is in the file")
        assert BEGUN + ghost in editor.screen()
    assert count_frames() == 3, "between a key and the ghost text that is left the screen showed something else"
    editor.send("BSpace", "BSpace")
    wait_until(lambda: editor.ghost() == ghost[1:], "what was deleted is offered again")
    editor.wait_for(BEGUN + ghost)


@editors
def test_escape_and_dismiss_clear_it(editor: Terminal) -> None:
    ghost = begin(editor)
    editor.send("C-]")
    editor.wait_without(BEGUN + ghost)
    editor.type(ghost[0])
    editor.wait_for(BEGUN + ghost)
    editor.send("Escape")
    editor.wait_without(BEGUN + ghost)
    assert editor.ghost() is None
    assert line_of(editor) == BEGUN + ghost[0]


@editors
def test_brackets_closed_by_autopairs_are_not_doubled(start: Start, file: Path) -> None:
    terminal = start(file, before="vim.cmd([[inoremap ( ()<Left>]])")
    terminal.wait_until_ready()
    terminal.go(LINE)
    terminal.type("pend")
    terminal.wait_for("self.items.append")
    ghost = terminal.type_until_ghost("(")
    terminal.wait_for(f"self.items.append({ghost}")
    terminal.send("Tab")
    wait_until(lambda: terminal.ghost() != ghost, "accepted")
    line = line_of(terminal)
    assert line.startswith("        self.items.append(" + ghost.rstrip(")"))
    assert line.count("(") == line.count(")"), line


@editors
def test_windows_line_ends_stay(start: Start, file: Path) -> None:
    file.write_bytes(SAMPLE.replace("\n", "\r\n").encode())
    terminal = start(file)
    terminal.wait_until_ready()
    ghost = begin(terminal)
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal) == BEGUN + ghost, "accepted")
    saved = terminal.save(file)
    assert saved.count(b"\r\n") == saved.count(b"\n") == SAMPLE.count("\n")
    assert (BEGUN + ghost + "\r\n").encode() in saved


@editors
def test_emoji_before_the_cursor(start: Start, file: Path) -> None:
    emoji = '        print("😀 日本", end=""); self.items.ap'
    file.write_text(SAMPLE.replace("        self.items.ap", emoji), encoding="utf-8")
    terminal = start(file)
    terminal.wait_until_ready()
    terminal.lua("require('fimserver').configure({ minConfidence = 0 })")  # the model finds such a line unlikely
    terminal.go(LINE)
    ghost = terminal.type_until_ghost("p")
    terminal.wait_for(f'日本", end=""); self.items.app{ghost}')
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal) == emoji + "p" + ghost, "accepted at the right place")


@editors
def test_snooze_and_off(editor: Terminal) -> None:
    for command, undo, reason in (
        ("Fimserver snooze 10", "Fimserver snooze 0", "snoozed"),
        ("Fimserver off python", "Fimserver on python", "language_off"),
        ("Fimserver off", "Fimserver on", "disabled"),
    ):
        editor.command(command)
        editor.go(LINE)
        editor.type("p")
        wait_for_reason(editor, reason)
        assert editor.ghost() is None
        state = {"snoozed": "fim: snoozed 10 min", "disabled": "fim: off"}.get(reason, "fim")
        assert editor.lua("require('fimserver').statusline()") == state
        editor.command(undo)
        editor.command("undo")
        begin(editor)
        editor.command("undo")


@editors
def test_daemon_and_worker_die_while_ghost_text_is_shown(editor: Terminal, editors_home: dict[str, str]) -> None:
    begin(editor)
    for process in ("daemon", "worker"):
        status = daemon_status(editors_home)
        pid = status["pid"] if process == "daemon" else status["worker"]["pid"]
        os.kill(pid, signal.SIGKILL)
        editor.command("undo")
        editor.go(LINE)
        editor.type("p")
        wait_until(editor.ghost, f"ghost text after the death of {process}\n{editor.screen()}", 90)
        editor.command("undo")


@editors
def test_two_neovims_share_one_worker(start: Start, editor: Terminal, file: Path, editors_home: dict[str, str]) -> None:
    other_file = file.with_name("other.py")
    shutil.copy(file, other_file)
    other = start(other_file)
    other.wait_until_ready()
    pids = set()
    for terminal in (editor, other):
        begin(terminal)
        pids.add(daemon_status(editors_home)["worker"]["pid"])
    assert len(pids) == 1


@editors
def test_settings_change_while_it_runs(editor: Terminal) -> None:
    begin(editor)
    editor.lua("require('fimserver').configure({ enabled = false })")
    wait_until(lambda: editor.ghost() is None, "switched off")
    editor.lua("require('fimserver').configure({ enabled = true })")
    editor.wait_for_ghost()


@editors
def test_checkhealth_is_clean(editor: Terminal) -> None:
    begin(editor)
    editor.command("checkhealth fimserver")
    screen = editor.wait_for("trigger")
    assert "ERROR" not in screen
    assert "WARN" not in screen
    for wanted in ("Neovim 0.1", "fimserver, version", "Daemon runs", "Connected, 1 buffer", "accept: <Tab>"):
        assert wanted in screen


# Without a screen


@editors
def test_logic_in_lua(neovim: Neovim) -> None:
    done = neovim.run("-l", PLUGIN / "tests" / "run.lua")
    assert not done.returncode, done.stderr
    assert " 0 failed" in done.stderr


@editors
def test_the_help_page_matches_the_source(neovim: Neovim, tmp_path: Path) -> None:
    done = neovim.run("-l", PLUGIN / "scripts" / "vimdoc.lua", "--check")
    assert not done.returncode, done.stdout + done.stderr
    shutil.copytree(PLUGIN / "doc", tmp_path / "doc")
    done = neovim.run("--headless", "--clean", "-c", f"helptags {tmp_path}/doc", "-c", "qall!")
    assert not done.stderr.strip()
    tags = (PLUGIN / "doc" / "tags").read_text(encoding="utf-8")
    assert (tmp_path / "doc" / "tags").read_text(encoding="utf-8") == tags, "run :helptags editors/neovim/doc"


@editors
def test_luacheck_reports_nothing() -> None:
    if shutil.which("luacheck") is None and (why := debian.install("lua-check")):
        pytest.skip(why)
    done = subprocess.run(["luacheck", "-q", "."], cwd=PLUGIN, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout


@editors
def test_lua_is_formatted() -> None:
    with skipped_where_unavailable():
        folder = find_stylua()
    files = sorted(PLUGIN.rglob("*.lua"))
    command = map(str, ["node", PLUGIN / "tests" / "format.mjs", "--check", folder, *files])
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    assert not done.returncode, f"not as StyLua writes them:\n{done.stdout}{done.stderr}"


# With a stub, which answers what a test needs


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(tmp_path)


def open_stub(start: Start, stub: Stub, path: Path, text: str, *, more: str = "", **arguments: Any) -> Terminal:
    """A Neovim with ``text`` in a file, completed by the stub."""
    path.write_text(text, encoding="utf-8")
    terminal = start(path, options=stub_options(stub, more), **arguments)
    wait_until(lambda: stub.received("textDocument/didOpen"), "the file is open")
    return terminal


LOOP = "for item in items:\n        print(item)\n        return 1"


@editors
def test_several_lines_by_lines(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "# go\n    ", "texts": [LOOP]})
    file = tmp_path / "a.py"
    terminal = open_stub(start, stub, file, "# go\n    \n# end\n")
    terminal.go(2)
    screen = terminal.wait_for("        return 1").splitlines()
    assert screen[:5] == ["# go", *("    " + LOOP).splitlines(), "# end"]
    terminal.send("M-End")
    wait_until(lambda: terminal.ghost() == "\n" + LOOP.split("\n", 1)[1], "the first line is in the text")
    assert terminal.screen().splitlines()[:5] == screen[:5]
    terminal.send("M-End")
    wait_until(lambda: terminal.ghost() == "\n        return 1", "two lines are in the text")
    terminal.send("Tab")
    wait_until(lambda: terminal.ghost() is None, "all is in the text")
    assert terminal.save(file).decode() == f"# go\n    {LOOP}\n# end\n"
    accepted = wait_until(lambda: stub.received("workspace/executeCommand"), "the server got the command")
    assert accepted == [{"command": "stub.didAccept", "arguments": ["# go\n    " + LOOP]}]
    partly = stub.received("textDocument/didPartiallyAcceptCompletion")
    taken = [part["item"]["insertText"][: part["acceptedLength"]] for part in partly]
    assert taken == ["for item in items:", "for item in items:\n        print(item)"]
    assert len(stub.received("textDocument/didShowCompletion")) == 1


@editors
def test_ghost_text_next_to_the_completion_menu(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "self.item", "texts": [".append(x)"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "item items itemize\n\n")
    terminal.go(2)
    terminal.type("self.ite")
    terminal.send("C-x", "C-n")
    screen = terminal.wait_for("self.item.append(x)")
    assert "itemize" in screen.split("self.item.append(x)")[1], "the menu is open below"
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 2) == "self.item.append(x)", "accepted")
    assert terminal.lua("vim.fn.pumvisible()") == 0


@editors
def test_text_after_the_cursor_is_replaced(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "foo(", "texts": ["a, b)"], "replace": 1})
    file = tmp_path / "a.py"
    terminal = open_stub(start, stub, file, "foo() + 1\n")
    terminal.go(1, "f)i")
    terminal.wait_for("foo(a, b) + 1")
    terminal.send("M-Right", "M-Right")
    wait_until(lambda: line_of(terminal, 1) == "foo(a,) + 1", "a word, then a comma")
    terminal.wait_for("foo(a, b) + 1")
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 1) == "foo(a, b) + 1", "accepted")


@editors
def test_new_ghost_text_replaces_the_old(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x = ", "texts": ["one + two"], "replace": 3})
    terminal = open_stub(start, stub, tmp_path / "a.py", "x = 123 # end\n")
    terminal.go(1, "f1i")
    terminal.wait_for("x = one + two # end")
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 1) == "x = one + two # end", "accepted")


@editors
def test_text_after_the_cursor_moves_below_several_lines(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "foo(", "texts": ["a,\n    b"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "foo() + 1\n# end\n")
    terminal.go(1, "f)i")
    assert terminal.wait_for("    b").splitlines()[:3] == ["foo(a,", "    b) + 1", "# end"]


@editors
def test_wrap_fold_and_conceal(start: Start, stub: Stub, tmp_path: Path) -> None:
    long = "word " * 30 + "END"
    stub.say({"after": "# go\n", "texts": [f"{long}\n{long}"]}, {"after": "hid ", "texts": ["den\n\tone"]})
    text = "def folded():\n    one\n    two\n# go\n\nXXXXXXXXXX hid tail\n# end\n"
    look = "vim.o.foldmethod, vim.o.foldminlines, vim.o.conceallevel, vim.o.concealcursor = 'indent', 1, 2, 'nvic'"
    terminal = open_stub(start, stub, tmp_path / "a.py", text, before=look, after="vim.fn.matchadd('Conceal', 'X')")
    terminal.go(5)
    screen = terminal.wait_for("END\n").splitlines()
    assert screen[1].startswith("+--"), "the fold above is closed"
    assert "".join(line.ljust(100) for line in screen[3:5]).rstrip() == long
    assert "".join(line.ljust(100) for line in screen[5:7]).rstrip() == long
    terminal.go(6, "fti")
    screen = terminal.wait_for("onetail").splitlines()
    row = screen.index("    onetail")
    assert screen[row - 1 : row + 2] == [" hid den", "    onetail", "# end"], "the X are concealed"


@editors
def test_tabs_and_wide_characters(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "日本 ", "texts": ["x\ty\n\t\tz"]})
    terminal = open_stub(start, stub, tmp_path / "a.go", "\t日本 | tail\n", after="vim.o.tabstop = 4")
    terminal.go(1, "f|s")
    screen = terminal.wait_for("z tail").splitlines()
    assert screen[:2] == ["    日本 x  y", "        z tail"]


@editors
def test_a_late_answer_is_never_shown_and_its_request_is_cancelled(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "slow ", "texts": ["LATE"], "delay_ms": 3000}, {"after": "slow x", "texts": ["GOOD"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "\n")
    terminal.go(1)
    terminal.type("slow ")
    method = "textDocument/inlineCompletion"
    wait_until(lambda: any(request["position"]["character"] == 5 for request in stub.received(method)), "asked")
    terminal.type("x")
    screen = terminal.wait_for("slow xGOOD")
    assert "LATE" not in screen
    assert stub.received("$/cancelRequest")


@editors
def test_control_c_clears_it_too(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x = ", "texts": ["one"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "x =\n")
    terminal.go(1)
    terminal.type(" ")
    terminal.wait_for("x = one")
    terminal.send("C-c")
    terminal.wait_without("x = one")


@editors
def test_a_server_that_was_killed_is_started_by_the_next_key(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x = ", "texts": ["one"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "x =\n", size=(250, 10))
    terminal.go(1)
    terminal.type(" ")
    terminal.wait_for("x = one")
    os.kill(int(stub.pid.read_text(encoding="utf-8")), signal.SIGKILL)
    wait_until(lambda: terminal.lua("require('fimserver').status().state") == "stopped", "it is gone")
    wait_until(lambda: "fimserver ended: signal 9; :checkhealth fimserver" in terminal.messages(), "it is reported")
    terminal.type("o")
    wait_until(lambda: terminal.lua("require('fimserver').status().state") == "ready", "it is back")
    terminal.type("n")
    terminal.wait_for("x = one")


@editors
def test_lines_that_do_not_fit_below_are_counted(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "go ", "texts": ["one\ntwo\nthree"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "go\n" * 30, size=(60, 10))
    terminal.go(8)
    terminal.type(" ")
    terminal.wait_for("go one … +2")


@editors
def test_candidates(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x = ", "texts": ["one", "two", "three"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "x =\n")
    terminal.go(1)
    terminal.type(" ")
    terminal.wait_for("x = one")
    for key, shown in (("M-]", "two (2/3)"), ("M-]", "three (3/3)"), ("M-]", "one (1/3)"), ("M-[", "three (3/3)")):
        terminal.send(key)
        terminal.wait_for(f"x = {shown}")  # M-[ begins an arrow key if another key follows within 50 ms
    terminal.type("t")
    terminal.wait_for("x = three (3/3)")
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 1) == "x = three", "the chosen one is accepted")
    accepted = wait_until(lambda: stub.received("workspace/executeCommand"), "the server got the command")
    assert accepted[-1]["arguments"] == ["x = three"]


@editors
def test_undo_removes_the_accepted_text_only(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x = ", "texts": ["one\ntwo"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "x\n")
    terminal.go(1)
    terminal.type(" = ")
    terminal.wait_for_ghost()
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 2) == "two", "accepted")
    terminal.type(" more")
    terminal.send("Escape")
    for wanted in ("x = one|two", "x = ", "x"):
        terminal.command("undo")
        wait_until(partial(has_text, terminal, wanted), f"undone to {wanted!r}")


@editors
def test_macros_and_repeating_still_work(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x", "texts": ["GHOST"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "a\nb\nc\nd\n")
    terminal.send("Escape")
    terminal.type("1GqqAx")
    terminal.send("Tab", "Escape")
    terminal.type("jq@q")
    wait_until(lambda: line_of(terminal, 2).startswith("bx "), "the macro types a tab")
    terminal.type("3GAx")
    terminal.wait_for("cxGHOST")
    terminal.send("Tab", "Escape")
    wait_until(lambda: line_of(terminal, 3) == "cxGHOST", "accepted")
    terminal.type("j.")
    wait_until(lambda: line_of(terminal, 4) == "dxGHOST", "typed and accepted text is repeated")


@editors
def test_several_lines_are_repeated_and_undone_in_one_step(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "go ", "texts": ["\n        b()\n        c()"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "    \n    \n")
    terminal.go(1)
    terminal.type("go ")
    terminal.wait_for_ghost()
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 3) == "        c()", "accepted")
    terminal.type("  # end")
    terminal.send("Escape")
    terminal.type("4G.")
    block = "    go |        b()|        c()  # end"
    wait_until(partial(has_text, terminal, f"{block}|{block}"), "repeated with its indentation")
    terminal.command("undo")
    wait_until(partial(has_text, terminal, f"{block}|    "), "undone at once")


TAB_STAND_IN = """
-- A stand-in for the chains of completion plugins: maps Tab as they do, and asks fimserver first.
vim.keymap.set('i', '<Tab>', function()
  if require('fimserver').accept() then return end
  if vim.fn.pumvisible() == 1 then return vim.api.nvim_feedkeys(vim.keycode('<C-n>'), 'n', false) end
  vim.api.nvim_feedkeys('<chain>', 'n', false)
end)
"""


@editors
def test_a_tab_chain_stand_in_keeps_its_tab(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x = ", "texts": ["one"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "x =\n", before=TAB_STAND_IN)
    terminal.go(1)
    terminal.type(" ")
    terminal.wait_for_ghost()
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 1) == "x = one", "accepted")
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 1) == "x = one<chain>", "the chain continues")
    assert not terminal.lua("vim.fn.maparg('<Tab>', 'i', false, true).buffer == 1")
    terminal.command("checkhealth fimserver")
    terminal.wait_for("accept: <Tab>, where your init.lua has nothing to do")


@editors
def test_tab_is_a_tab_without_ghost_text(start: Start, stub: Stub, tmp_path: Path) -> None:
    terminal = open_stub(start, stub, tmp_path / "a.py", "\n", after="vim.o.expandtab = false")
    terminal.go(1)
    terminal.type("a")
    terminal.send("Tab")
    terminal.type("b")
    wait_until(lambda: line_of(terminal, 1).startswith("a") and line_of(terminal, 1).endswith("b"), "typed")
    assert line_of(terminal, 1).strip("ab").isspace()
    terminal.lua("vim.snippet.expand('(${1:one}, ${2:two})')")
    terminal.send("Tab")
    wait_until(lambda: terminal.lua("vim.fn.mode()") == "s", "Tab jumps in a snippet")
    wait_until(lambda: terminal.lua("vim.fn.col('.')") > line_of(terminal, 1).index("two"), "to the second place")


@editors
def test_a_configured_key_overrides_other_mappings(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x = ", "texts": ["one"]})
    before = "vim.keymap.set('i', '<C-l>', function() return 'other' end, { expr = true })"
    more = "keys = { accept = '<C-l>', accept_word = false }"
    terminal = open_stub(start, stub, tmp_path / "a.py", "x =\n", more=more, before=before)
    terminal.go(1)
    terminal.send("C-l")
    wait_until(lambda: line_of(terminal, 1) == "x =other", "as before where nothing is shown")
    terminal.send("C-u")
    terminal.type(" ")
    terminal.wait_for_ghost()
    terminal.send("C-l")
    wait_until(lambda: line_of(terminal, 1) == "x = one", "accepted")


@editors
def test_buffers_without_completions(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x", "texts": ["GHOST"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "\n")
    asked = len(stub.received("textDocument/inlineCompletion"))
    for prepare in ("set readonly", "setlocal buftype=nofile", "let b:visual_multi = 1"):
        terminal.command("enew! | edit! a.py | set noreadonly")
        terminal.command(prepare)
        terminal.go(1)
        terminal.type("x")
        wait_until(lambda: line_of(terminal, 1) == "x", "typed")
        assert terminal.ghost() is None
        terminal.command("undo")
    terminal.command("unlet b:visual_multi")
    terminal.send("Escape")
    terminal.type("1GRx")
    wait_until(lambda: line_of(terminal, 1) == "x", "replaced")
    assert terminal.ghost() is None
    assert len(stub.received("textDocument/inlineCompletion")) == asked


def look_at_own_program(start: Start, folder: Path, *lines: str) -> Terminal:
    """Open a file of a project that has its own program, and choose to look at it."""
    file = folder / "inventory.py"
    file.write_text(SAMPLE, encoding="utf-8")
    write_script(folder / ".venv" / "bin" / "fimserver", "# the program", f"touch {folder}/ran", *lines)
    setup = "require('fimserver').setup({}) if true then return end"  # without a name for the program
    terminal = start(file, before=f"vim.env.PATH = '/usr/bin:/bin' {setup}")
    terminal.wait_for("(v)iew")
    terminal.send("v")
    terminal.wait_for("# the program")
    assert not (folder / "ran").exists()
    return terminal


@editors
def test_a_projects_program_runs_after_its_review(start: Start, tmp_path: Path) -> None:
    terminal = look_at_own_program(start, tmp_path, f'exec {FIMSERVER} "$@"')
    terminal.command("trust")
    terminal.command("close")
    wait_until((tmp_path / "ran").exists, "it runs")
    terminal.go(LINE)
    terminal.type("p")
    terminal.wait_for("self.items.append")


@editors
def test_a_reviewed_program_is_not_asked_about_again(start: Start, tmp_path: Path) -> None:
    terminal = look_at_own_program(start, tmp_path)
    terminal.command("close")
    time.sleep(5.5)  # so often it is looked for
    terminal.go(1, "O")
    terminal.type("aiad")
    terminal.wait_for("aiad")
    assert "(v)iew" not in terminal.screen()
    assert not (tmp_path / "ran").exists()


@editors
def test_the_status_line_names_the_server_that_gets_the_code(start: Start, file: Path) -> None:
    terminal = start(file)
    terminal.wait_until_ready()
    line = "(function() local s = require('fimserver.status'); s.set('ready', {}); return s.line() end)()"
    for detail, shown in (
        ("'qwen at http://10.0.0.1:8000 (vllm)'", "fim @ 10.0.0.1:8000"),
        ("'codestral-latest at https://codestral.mistral.ai (mistral)'", "fim @ codestral.mistral.ai"),
        ("'tiny answers on this machine: the server at http://10.0.0.1 is late'", "fim"),
        ("'qwen.gguf on llama.cpp'", "fim"),
    ):
        assert terminal.lua(line.replace("{}", detail)) == shown


@editors
def test_windows_of_commands(start: Start, file: Path) -> None:
    terminal = start(file)
    terminal.wait_until_ready()
    terminal.command("Fimserver stats")
    terminal.command("Fimserver log")
    terminal.command("Fimserver status")
    wait_until(lambda: re.search(r"buffer +attached", terminal.screen()), "of the file, not of the window")
    assert terminal.lua("#vim.api.nvim_list_wins()") == 2
    terminal.command("Fimserver explain")
    wait_until(lambda: "no request yet" in terminal.messages(), "the server has reported it for the file")
    terminal.send("q")
    wait_until(lambda: terminal.lua("#vim.api.nvim_list_wins()") == 1, "the window is closed")
    terminal.command("enew")
    terminal.command("Fimserver explain")
    wanted = "nothing is completed in this buffer: it has no name and no file type; :set filetype=python"
    recent = "table.concat(require('fimserver.message').recent, ' ')"
    wait_until(lambda: wanted in terminal.lua(recent), wanted)


@editors
def test_wrong_options_and_a_missing_server_are_reported_once(start: Start, file: Path) -> None:
    options = "{ cmd = { '/no/such/fimserver' }, ghost_text = 'red', colour = 1, keys = { accept = 3 } }"
    terminal = start(file, options=options)
    terminal.go(1)
    terminal.type("abc")
    wait_until(lambda: line_of(terminal, 1).endswith("abc"), "typed")
    terminal.send("Escape")
    wait_until(lambda: terminal.lua("vim.fn.mode()") == "n", "no insert mode")
    terminal.send("i")
    wait_until(lambda: terminal.lua("vim.fn.mode()") == "i", "insert mode again")
    wait_until(lambda: terminal.messages().count("… (:Fimserver status)") == 4, "each in a line that fits, once")
    messages = terminal.lua("table.concat(require('fimserver.message').recent, ' ')")
    for wanted in (
        "ghost_text is \"red\"; it must be 'auto', 'own' or 'builtin'. The default is used: \"auto\"",
        "there is no option colour; the options are automatic, cmd,",
        'keys.accept is 3; it must be a key like <Tab>, or false. The default is used: "<Tab>"',
        "the option cmd names /no/such/fimserver, which is not a program here; correct or remove it",
    ):
        assert messages.count(wanted) == 1, messages
    assert "error" in terminal.lua("require('fimserver').statusline()")


@editors
def test_colors_follow_the_background(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "x = ", "texts": ["one", "two"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "x =\n", after="vim.o.termguicolors = true")
    measure = (
        "(function(name) local function of(group) return vim.api.nvim_get_hl(0, { name = group, link = false }) end "
        "return require('fimserver.contrast').ratio(of(name).fg, of('Normal').bg) end)"
    )
    for background in ("light", "dark"):
        terminal.command(f"set background={background}")
        wait_until(lambda wanted=background: terminal.lua("vim.o.background") == wanted, background)  # type: ignore[misc]
        ghost, hint = (terminal.lua(f"{measure}('{name}')") for name in ("FimserverGhost", "FimserverHint"))
        assert ghost >= 4.5
        assert 2.5 < hint < 3.5
    terminal.go(1)
    terminal.type(" ")
    terminal.wait_for("x = one")
    terminal.send("M-]")
    terminal.wait_for("x = two (2/2)")
    color = terminal.lua("string.format('%06x', vim.api.nvim_get_hl(0, { name = 'FimserverGhost' }).fg)")
    red, green, blue = (int(color[i : i + 2], 16) for i in (0, 2, 4))
    assert f"\x1b[3m\x1b[38;2;{red};{green};{blue}mtwo" in terminal.screen(colors=True)
    terminal.command("highlight FimserverGhost guifg=#123456")
    terminal.command("set background=light")
    assert terminal.lua("vim.api.nvim_get_hl(0, { name = 'FimserverGhost' }).fg") == 0x123456


@editors
def test_a_key_without_ghost_text_still_expands_abbreviations(start: Start, stub: Stub, tmp_path: Path) -> None:
    terminal = open_stub(start, stub, tmp_path / "a.py", "\n", after="vim.cmd.iabbrev('teh', 'the')")
    terminal.go(1)
    terminal.type("teh")
    terminal.send("C-]")
    wait_until(lambda: line_of(terminal, 1) == "the", "<C-]> does what it did")


@editors
def test_buffers_without_a_name_are_completed_and_saved(start: Start, stub: Stub, tmp_path: Path) -> None:
    stub.say({"after": "= ", "texts": ["one"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "\n")
    for number in (1, 2):
        terminal.command("vnew | set filetype=python")
        terminal.go(1)
        terminal.type(f"x{number} = ")
        terminal.wait_for(f"x{number} = one")
        terminal.send("Tab")
    terminal.send("Escape")
    terminal.command("wincmd w")  # the first one again
    terminal.command("normal! o")
    terminal.go(2)
    terminal.type("y = ")
    terminal.wait_for("y = one")
    terminal.send("Escape")
    terminal.command(f"write {tmp_path}/new.py")
    terminal.go(2)
    terminal.type("o")
    terminal.wait_for("y = one")
    opened = [each["textDocument"]["uri"] for each in stub.received("textDocument/didOpen")]
    closed = [each["textDocument"]["uri"] for each in stub.received("textDocument/didClose")]
    first, second = dict.fromkeys(uri for uri in opened if uri.startswith("untitled:Untitled-"))
    assert opened[1:] == [first, second, first, (tmp_path / "new.py").as_uri()]
    assert closed == [first, second, first]


@editors
def test_loading_is_reported_once_without_a_status_line(start: Start, stub: Stub, tmp_path: Path) -> None:
    report = "fimserver: the model is loading (some seconds)"
    for name, bar in (("quiet", True), ("shown", False)):
        loaded = tmp_path / name
        stub.say({"after": "x", "texts": ["GHOST"], "loading_until": str(loaded)})
        (tmp_path / "a.py").write_text("\n", encoding="utf-8")
        line = "vim.o.statusline = [[%{%v:lua.require'fimserver'.statusline()%}]]" if bar else ""
        terminal = start(tmp_path / "a.py", options=stub_options(stub), after=line, size=(80, 12))
        wait_until(lambda each=terminal: each.lua("require('fimserver').status().detail") == "the stub", "it loads")  # type: ignore[misc]
        terminal.type("ix")
        wait_until(lambda each=terminal: line_of(each, 1) == "x", "typed")  # type: ignore[misc]
        time.sleep(0.5)
        terminal.type("xx")
        if not bar:
            wait_until(lambda each=terminal: report in each.messages(), "loading is reported")  # type: ignore[misc]
        time.sleep(0.5)  # nothing shows that no other report comes
        assert terminal.messages().count(report) == (not bar)
        assert not terminal.lua("vim.api.nvim_get_mode().blocking")
        loaded.touch()
        terminal.wait_for("xxxGHOST")


@editors
def test_a_server_that_ends_is_reported_in_one_line_with_the_cause(
    neovim: Neovim, editors_home: dict[str, str], tmp_path: Path
) -> None:
    script = "echo \"ModuleNotFoundError: No module named 'torch'\" >&2"
    program = write_script(tmp_path / "bin" / "fimserver", "echo Traceback >&2", script, "exit 1")
    (tmp_path / "a.py").write_text("\n", encoding="utf-8")
    options = f"{{ cmd = {{ '{program}', 'lsp' }} }}"
    terminal = Terminal(neovim, tmp_path / "a.py", options=options, env=editors_home, size=(80, 12))
    try:
        wanted = "fimserver ended: No module named 'torch'; :checkhealth fimserver"
        terminal.wait_for(wanted)
        terminal.type("i")
        for _ in range(3):  # each key starts it again, three times in a minute
            terminal.type("x")
            time.sleep(0.5)
        wait_until(lambda: terminal.lua("require('fimserver').status().state") == "error", "it stays off")
        assert terminal.messages().strip() == wanted, "once, and nothing from Neovim"
        assert not terminal.lua("vim.api.nvim_get_mode().blocking")
        assert "No module named 'torch'" in terminal.lua("require('fimserver').status().detail")
    finally:
        terminal.close()


@editors
def test_neovims_own_ghost_text(start: Start, stub: Stub, tmp_path: Path, neovim: Neovim) -> None:
    stub.say({"after": "x = ", "texts": ["one"]})
    terminal = open_stub(start, stub, tmp_path / "a.py", "x =\n", more="ghost_text = 'builtin'")
    terminal.go(1)
    terminal.type(" o")
    terminal.wait_for("x = one")
    terminal.send("Tab")
    wait_until(lambda: line_of(terminal, 1) == "x = one", "accepted")
    is_reported = "which needs Neovim 0.12" in terminal.lua("require('fimserver.message').recent[1] or ''")
    assert is_reported == (not terminal.lua("vim.lsp.inline_completion ~= nil"))


@editors
def test_the_server_receives_focus_and_settings(start: Start, stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("\n", encoding="utf-8")
    terminal = open_stub(start, stub, tmp_path / "a.py", "\n", more="settings = { maxLines = 3 }")
    terminal.command(f"edit {tmp_path}/b.py")
    terminal.command("buffer a.py")
    wait_until(lambda: stub.received("textDocument/didFocus"), "the server got the focus")
    assert stub.received("initialize")[0]["initializationOptions"] == {"maxLines": 3}
    terminal.command("Fimserver mode diffusion")
    wanted = {"settings": {"fimserver": {"maxLines": 3, "mode": "diffusion"}}}
    wait_until(lambda: wanted in stub.received("workspace/didChangeConfiguration"), "settings are sent")


@editors
def test_sub_commands_are_completed(start: Start, stub: Stub, tmp_path: Path) -> None:
    terminal = open_stub(start, stub, tmp_path / "a.py", "\n")
    complete = "vim.fn.getcompletion('Fimserver {}', 'cmdline')"
    assert terminal.lua(complete.format("s")) == ["snooze", "stats", "status"]
    assert "speculative" in terminal.lua(complete.format("mode "))
    assert terminal.lua(complete.format("off p")) == ["python"]
    terminal.command("Fimserver")
    screen = terminal.wait_for("keys ")
    for wanted in ("state ", "server ", "buffer    attached", "accept <Tab>"):
        assert wanted in screen
