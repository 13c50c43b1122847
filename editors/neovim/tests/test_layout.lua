local layout = require('fimserver.layout')
local test, same = _G.test, _G.same

local CONTEXT = { column = 4, tabstop = 4, width = nil }

--- Return the pieces in the line: `{ { offset, text } }`, with a third entry if a piece hides the text there.
local function pieces_of(rest, old, tail, context)
  local plan = layout.new(rest, old, tail, context or CONTEXT)
  local list = {}
  for _, piece in ipairs(plan.pieces) do
    table.insert(list, { piece.offset, piece.text, piece.overlay or nil })
  end
  return list, plan.below, plan.moved
end

test('a single line is placed at the end of a line and in the middle', function()
  same({ pieces_of('end(item)', '', '') }, { { { 0, 'end(item)' } }, {}, '' })
  same({ pieces_of('a, ', '', 'b)') }, { { { 0, 'a, ' } }, {}, '' })
end)

test('replaced characters that the new text contains stay visible', function()
  same(pieces_of('a, b)', ')', ''), { { 0, 'a, b' } })
  same(pieces_of('a) + f(b)', ')', ' # x'), { { 0, 'a) + f(b' } })
  same(pieces_of('x]:', ']', ''), { { 0, 'x' }, { 1, ':' } })
end)

test('a different text covers the old text', function()
  same(pieces_of('one', '123', ' # x'), { { 0, 'one', true } })
  same(pieces_of('one + two', '123', ' # x'), { { 0, 'one', true }, { 3, ' + two' } })
  same(pieces_of('a', '123', ''), { { 0, 'a  ', true } })
end)

test('further lines are shown below', function()
  same({ pieces_of('a:\n  b\nc', '', '') }, { { { 0, 'a:' } }, { '  b', 'c' }, '' })
  same({ pieces_of('\n  b', '', '  ') }, { {}, { '  b' }, '' })
  same({ pieces_of('x):\n  b', '):', '') }, { { { 0, 'x' } }, { '  b' }, '' })
end)

test('text after several lines moves to their end', function()
  same({ pieces_of('a,\n  b', '', ') + 1') }, { { { 0, 'a,   ', true } }, { '  b' }, ') + 1' })
  same({ pieces_of('\n  1\n]', ']', '') }, { { { 0, ' ', true } }, { '  1', ']' }, '' })
end)

test('tabs have their width on the screen', function()
  same(layout.expand_tabs('a\tb', 0, 4), 'a   b')
  same(layout.expand_tabs('a\tb', 2, 4), 'a b')
  same(layout.expand_tabs('日\tb', 0, 4), '日  b')
  same({ pieces_of('x\n\ty', '', '') }, { { { 0, 'x' } }, { '    y' }, '' })
end)

test('long lines wrap, never within a character', function()
  same(layout.wrap('abcdef', 4), { 'abcd', 'ef' })
  same(layout.wrap('日本語', 4), { '日本', '語' })
  same(layout.wrap('a日本', 4), { 'a日', '本' })
  same(layout.wrap('abc', 4), { 'abc' })
  same(layout.wrap('abc', 0), { 'abc' })
  same(select(2, pieces_of('x\nabcdef', '', '', { column = 0, tabstop = 8, width = 4 })), { 'abcd', 'ef' })
end)

test('the bytes of a character are not split', function()
  same(layout.align('é)', 'é)'), nil)
  same(pieces_of('ö)', 'é)', ''), { { 0, 'ö)', true } })
end)
