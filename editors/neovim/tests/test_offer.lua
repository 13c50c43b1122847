local offers = require('fimserver.offer')
local test, same = _G.test, _G.same

--- An offer at the mark `|` of a line, which replaces what is between `|` and `^`.
local function offer_at(marked, text)
  local cursor = marked:find('|', 1, true) - 1
  local line = marked:gsub('|', '')
  local finish = (line:find('^', 1, true) or cursor + 1) - 1
  line = line:gsub('%^', '')
  local item = { insertText = text, command = { arguments = { 'id' } } }
  return offers.new(item, line, { start = cursor, cursor = cursor, finish = finish })
end

test('what was typed is taken from the beginning', function()
  local offer = assert(offer_at('self.app|', 'end(item)'))
  same({ offers.rest_of(offer, '', '') }, { 'end(item)', 0 })
  same({ offers.rest_of(offer, 'end', '') }, { '(item)', 0 })
  same(offers.rest_of(offer, 'ex', ''), nil)
  same(offers.rest_of(offer, 'end(item)', ''), nil)
  same(offers.rest_of(offer, '', ' more'), nil)
end)

test('what stands behind the cursor is replaced, what stands behind that stays', function()
  local offer = assert(offer_at('foo(|)^ + 1', 'a, b)'))
  same({ offer.old, offer.tail }, { ')', ' + 1' })
  same({ offers.rest_of(offer, 'a,', ') + 1') }, { ' b)', 1 })
  same(offers.rest_of(offer, 'a, b', ') + 1'), nil) -- only the bracket is left, which is there
  same(offers.rest_of(offer, '', ') + 2'), nil)
end)

test('closers that an editor added by itself are replaced too', function()
  local offer = assert(offer_at('foo|', '(a, [b])'))
  same({ offers.rest_of(offer, '(', ')') }, { 'a, [b])', 1 })
  same({ offers.rest_of(offer, '(a, [', '])') }, { 'b])', 2 })
  same(offers.rest_of(offer, '(', ']]'), nil)
  same(offers.rest_of(offer, '(', 'x'), nil)
end)

test('an item that does not go on with the line is none', function()
  same(offer_at('foo|bar^', 'bar'), nil) -- nothing would change
  same(offers.new({ insertText = 'x' }, 'abc', { start = 2, cursor = 1, finish = 2 }), nil)
  same(offers.new({ insertText = 'zoo' }, 'fo', { start = 0, cursor = 2, finish = 2 }), nil)
  local typed = assert(offers.new({ insertText = 'foo' }, 'fo', { start = 0, cursor = 2, finish = 2 }))
  same(offers.rest_of(typed, 'fo', ''), 'o')
end)

test('line ends of Windows are line ends', function()
  same(assert(offer_at('|', 'a\r\nb\rc\n')).text, 'a\nb\nc\n')
end)

test('words', function()
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

test('words and lines put together are the whole', function()
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

test('lines', function()
  same(offers.next_line('one\n  two'), 'one')
  same(offers.next_line('\n  two\nthree'), '\n  two')
  same(offers.next_line('\n\n  two'), '\n\n  two')
  same(offers.next_line('one'), 'one')
end)
