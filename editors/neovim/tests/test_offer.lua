local offers = require('fimserver.offer')
local test, same = _G.test, _G.same

--- Return an offer at the mark `|` of a line that replaces the text between `|` and `^`.
local function offer_at(marked, text)
  local cursor = marked:find('|', 1, true) - 1
  local line = marked:gsub('|', '')
  local finish = (line:find('^', 1, true) or cursor + 1) - 1
  line = line:gsub('%^', '')
  local item = { insertText = text, command = { arguments = { 'id' } } }
  return offers.new(item, line, { start = cursor, cursor = cursor, finish = finish })
end

test('typed text is removed from the beginning', function()
  local offer = assert(offer_at('self.app|', 'end(item)'))
  same({ offers.rest_of(offer, '', '') }, { 'end(item)', 0 })
  same({ offers.rest_of(offer, 'end', '') }, { '(item)', 0 })
  same(offers.rest_of(offer, 'ex', ''), nil)
  same(offers.rest_of(offer, 'end(item)', ''), nil)
  same(offers.rest_of(offer, '', ' more'), nil)
end)

test('text in the range after the cursor is replaced, text after the range is kept', function()
  local offer = assert(offer_at('foo(|)^ + 1', 'a, b)'))
  same({ offer.old, offer.tail }, { ')', ' + 1' })
  same({ offers.rest_of(offer, 'a,', ') + 1') }, { ' b)', 1 })
  same(offers.rest_of(offer, 'a, b', ') + 1'), nil) -- only the bracket is left, and the line has it
  same(offers.rest_of(offer, '', ') + 2'), nil)
end)

test('closers that an editor added automatically are replaced too', function()
  local offer = assert(offer_at('foo|', '(a, [b])'))
  same({ offers.rest_of(offer, '(', ')') }, { 'a, [b])', 1 })
  same({ offers.rest_of(offer, '(a, [', '])') }, { 'b])', 2 })
  same(offers.rest_of(offer, '(', ']]'), nil)
  same(offers.rest_of(offer, '(', 'x'), nil)
end)

test('an item that does not continue the line is dropped', function()
  same(offer_at('foo|bar^', 'bar'), nil) -- nothing would change
  same(offers.new({ insertText = 'x' }, 'abc', { start = 2, cursor = 1, finish = 2 }), nil)
  same(offers.new({ insertText = 'zoo' }, 'fo', { start = 0, cursor = 2, finish = 2 }), nil)
  local typed = assert(offers.new({ insertText = 'foo' }, 'fo', { start = 0, cursor = 2, finish = 2 }))
  same(offers.rest_of(typed, 'fo', ''), 'o')
end)

test('CRLF is a line ending', function()
  same(assert(offer_at('|', 'a\r\nb\rc\n')).text, 'a\nb\nc\n')
end)

test('next_word takes one word', function()
  local cases = {
    { 'end(item)', 'end' },
    { '(item)', '(' },
    { '  == name', '  ==' },
    { '\n    return it', '\n    return' },
    { 'naïve = 1', 'naïve' },
    { '日本 x', '日本' },
    { '   ', '   ' },
    { '_private.x', '_private' },
    { '):', '):' },
  }
  for _, case in ipairs(cases) do
    same(offers.next_word(case[1]), case[2])
  end
end)

test('joined words and joined lines are the whole text', function()
  local text = 'for x in (1, 2):\n\n    print(x)\n  \n\treturn "é"'
  for _, cut in ipairs({ offers.next_word, offers.next_line }) do
    local rest, all = text, ''
    while rest ~= '' do
      local part = cut(rest)
      assert(part ~= '', rest)
      all, rest = all .. part, rest:sub(#part + 1)
    end
    same(all, text)
  end
end)

test('next_line takes one line', function()
  same(offers.next_line('one\n  two'), 'one')
  same(offers.next_line('\n  two\nthree'), '\n  two')
  same(offers.next_line('\n\n  two'), '\n\n  two')
  same(offers.next_line('one'), 'one')
end)
