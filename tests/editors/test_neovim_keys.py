"""Neovim's keys next to other plugins that map them: stand-ins that map as these do, and the real ones.

nvim-cmp and blink.cmp are not downloaded: ``FIMSERVER_TEST_CMP`` and ``FIMSERVER_TEST_BLINK`` name their folders.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.neovim import VERSIONS, Neovim, Terminal, find_neovim, stub_options
from support.real_editors import Stub, skipped_where_unavailable, wait_until

Open = Callable[..., Terminal]

pytestmark = pytest.mark.editors


@pytest.fixture(params=VERSIONS)
def neovim(request: pytest.FixtureRequest) -> Neovim:
    with skipped_where_unavailable():
        return find_neovim(str(request.param))


@pytest.fixture
def open_editor(neovim: Neovim, tmp_path: Path) -> Iterator[Open]:
    """Opens a file with ``x =``, which a stub continues with ``one`` after a space."""
    stub = Stub(tmp_path, {"after": "= ", "texts": ["one"]})
    terminals: list[Terminal] = []
    file = tmp_path / "a.py"
    file.write_text("x =\n", encoding="utf-8")

    def open_one(more: str = "", **arguments: str) -> Terminal:
        terminal = Terminal(neovim, file, options=stub_options(stub, more), **arguments)  # type: ignore[arg-type]
        terminals.append(terminal)
        wait_until(lambda: terminal.lua("require('fimserver').status().state") == "ready", "the stub is ready")
        terminal.go(1)
        terminal.type(" ")
        terminal.wait_for("x = one")
        return terminal

    yield open_one
    for terminal in terminals:
        terminal.close()


def wait_for_line(terminal: Terminal, text: str) -> None:
    wait_until(lambda: terminal.lua("vim.fn.getline(1)") == text, f"the line is {text!r}")


def folder_of(variable: str, name: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a folder with {name}")
    return f"vim.opt.rtp:append('{os.environ[variable]}') "


OTHER = "vim.keymap.set('i', '<Tab>', function() vim.api.nvim_feedkeys('<other>', 'n', false) end)"

STAND_INS = {
    "the mapping is made before ours": {"before": OTHER},
    "the mapping is made after ours": {"after": OTHER},
    "a mapping in Vim script": {"before": "vim.cmd([[inoremap <expr> <Tab> pumvisible() ? '<C-n>' : '<lt>other>']])"},
}


@pytest.mark.parametrize("code", STAND_INS.values(), ids=STAND_INS.keys())
def test_the_owner_of_tab_is_named_with_two_lines_that_work(open_editor: Open, code: dict[str, str]) -> None:
    terminal = open_editor(**code)
    wanted = "fimserver: <Tab> does not accept: it belongs to your init.lua; :Fimserver shows the fix"
    wait_until(lambda: wanted in terminal.messages(), "reported at the first ghost text")
    assert not terminal.lua("vim.api.nvim_get_mode().blocking")
    terminal.send("Tab")
    wait_for_line(terminal, "x = <other>")
    terminal.command("undo")
    terminal.command("checkhealth fimserver")
    terminal.wait_for("WARNING accept: <Tab> belongs to your init.lua, so it does not accept the ghost text")
    terminal.command("bwipeout")
    terminal.command("Fimserver")
    screen = terminal.wait_for("<Tab> belongs to your init.lua; ")
    remedies = [line.strip() for line in screen.splitlines() if line.strip().startswith("require(")]
    assert len(remedies) == 2
    terminal.send("q")
    for remedy, key in zip(remedies, ("Tab", "C-l"), strict=True):
        options = remedy.split("setup(")[1].split(") --")[0]
        kept = "require('fimserver.config').options"
        terminal.lua(f"require('fimserver').setup(vim.tbl_extend('force', {kept}, {options}))")
        terminal.command("call setline(1, 'x =')")
        terminal.go(1)
        terminal.type(" ")
        terminal.wait_for("x = one")
        terminal.send(key)
        wait_for_line(terminal, "x = one")
        terminal.send("Tab")
        wait_for_line(terminal, "x = one<other>")
    assert terminal.messages().count("does not accept") == 1


def test_a_key_that_is_turned_off_belongs_to_nobody(open_editor: Open) -> None:
    terminal = open_editor("keys = { accept = false }", before=OTHER)
    terminal.send("Tab")
    wait_for_line(terminal, "x = <other>")
    assert not terminal.messages().strip()


CMP = """
local cmp = require('cmp')
local source = setmetatable({}, { __index = { complete = function(_, _, done) done({ { label = 'xenon' } }) end } })
cmp.register_source('test', source)
cmp.setup({ sources = { { name = 'test', keyword_length = 9 } }, mapping = MAPPING })
"""
CMP_MAPPINGS = {
    "of its README": "cmp.mapping.preset.insert({ ['<CR>'] = cmp.mapping.confirm({ select = true }) })",
    "of its wiki": """{ ['<Tab>'] = cmp.mapping(function(fallback)
        if cmp.visible() then cmp.select_next_item() else fallback() end
      end, { 'i', 's' }) }""",
    "of our README": """{ ['<Tab>'] = cmp.mapping(function(fallback)
        if require('fimserver').accept() then return
        elseif cmp.visible() then cmp.select_next_item() else fallback() end
      end, { 'i' }) }""",
}
BLINK = (
    "require('blink.cmp').setup({ fuzzy = { implementation = 'lua' }, sources = { default = {} }, keymap = KEYMAP })"
)
BLINK_KEYMAPS = {
    "default": "{ preset = 'default' }",
    "super-tab": "{ preset = 'super-tab' }",
    "of our README": """{ preset = 'none', ['<Tab>'] = {
        function() return require('fimserver').accept() end, 'select_next', 'snippet_forward', 'fallback' } }""",
}


def accept_by_tab(terminal: Terminal, times: int) -> None:
    """Accept with Tab, and leave and enter insert mode before each next time."""
    for _ in range(times):
        terminal.send("Tab")
        wait_for_line(terminal, "x = one")
        terminal.command("call setline(1, 'x =')")
        terminal.go(1)
        terminal.type(" ")
        terminal.wait_for("x = one")


def check_tab(terminal: Terminal) -> None:
    """Accept with Tab, twice, because these plugins map their keys each time insert mode begins; then indent."""
    accept_by_tab(terminal, 2)
    terminal.send("Tab")
    wait_for_line(terminal, "x = one")
    terminal.send("Tab")
    wait_until(lambda: terminal.lua("vim.fn.getline(1)").removeprefix("x = one").isspace(), "Tab indents")
    assert not terminal.messages().strip()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("mapping", CMP_MAPPINGS.values(), ids=CMP_MAPPINGS.keys())
def test_nvim_cmp(open_editor: Open, mapping: str, order: str) -> None:
    code = folder_of("FIMSERVER_TEST_CMP", "nvim-cmp") + CMP.replace("MAPPING", mapping)
    check_tab(open_editor(**{order: code}))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("keymap", BLINK_KEYMAPS.values(), ids=BLINK_KEYMAPS.keys())
def test_blink(open_editor: Open, keymap: str, order: str) -> None:
    code = folder_of("FIMSERVER_TEST_BLINK", "blink.cmp") + BLINK.replace("KEYMAP", keymap)
    check_tab(open_editor(**{order: code}))


def test_a_chosen_tab_comes_before_a_chain_without_an_end(open_editor: Open) -> None:
    keymap = "{ preset = 'none', ['<Tab>'] = { 'select_next' } }"
    code = folder_of("FIMSERVER_TEST_BLINK", "blink.cmp") + BLINK.replace("KEYMAP", keymap)
    terminal = open_editor("keys = { accept = '<Tab>' }", before=code)
    accept_by_tab(terminal, 3)
