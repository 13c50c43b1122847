local contrast = require('fimserver.contrast')
local ghost = require('fimserver.ghost')
local test, same = _G.test, _G.same

--- The 24 greys of a terminal's 256 colors.
local function grey(index)
  return (8 + (index - 232) * 10) * 0x010101
end

local function define(commands)
  vim.cmd('highlight clear')
  for _, name in ipairs({ 'FimserverGhost', 'FimserverHint' }) do
    vim.api.nvim_set_hl(0, name, {})
  end
  for _, command in ipairs(commands or {}) do
    vim.cmd(command)
  end
  ghost.set_highlights()
  local function of(name)
    return vim.api.nvim_get_hl(0, { name = name, link = false })
  end
  return of('FimserverGhost'), of('FimserverHint'), of('Normal')
end

test('the contrast of two colors is that of WCAG', function()
  same(contrast.ratio(0x000000, 0xffffff), 21)
  same(math.floor(contrast.ratio(0x777777, 0xffffff) * 100), 447)
  same(contrast.ratio(0x123456, 0x123456), 1)
end)

test('in the default themes ghost text has 4:1 or more and is italic; the text after it is dimmer', function()
  for _, background in ipairs({ 'dark', 'light' }) do
    vim.o.background = background
    local text, hint, normal = define()
    local ratio, dim = contrast.ratio(text.fg, normal.bg), contrast.ratio(hint.fg, normal.bg)
    assert(ratio >= 4.5 and ratio < contrast.ratio(normal.fg, normal.bg) - 4, background .. ratio)
    assert(dim > 2.5 and dim < ratio - 1, background .. dim)
    same({ text.italic, hint.italic }, { true, true })
    local paper = background == 'dark' and 0x000000 or 0xffffff
    assert(contrast.ratio(grey(text.ctermfg), paper) >= 4, background)
    assert(contrast.ratio(grey(hint.ctermfg), paper) < contrast.ratio(grey(text.ctermfg), paper) - 1, background)
  end
  vim.o.background = 'dark'
end)

test("a scheme's own color stays if it can be read, and is raised if not", function()
  local text = define({ 'highlight Normal guibg=#000000', 'highlight! ComplHint guifg=#88aacc' })
  same(text.fg, 0x88aacc)
  text = define({ 'highlight Normal guifg=#ffffff guibg=#202020', 'highlight! ComplHint guifg=#303050' })
  assert(contrast.ratio(text.fg, 0x202020) >= 4.5)
  text = define({ 'highlight FimserverGhost guifg=#123456' })
  same({ text.fg, text.italic }, { 0x123456, nil })
  define()
end)
