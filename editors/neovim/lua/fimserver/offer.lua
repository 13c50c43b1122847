--- Computes offers of the server and their rest after more was typed. Pure functions of strings.
---
---   new          an item of the server -> an Offer, or nil if it cannot be shown
---   rest_of      the rest of an offer, and the number of bytes after the cursor that it replaces
---   next_word, next_line   the beginning of a rest that one key accepts
---
--- All offsets are bytes. Lines of a text are joined by "\n", regardless of the file's line ending.
---
--- Knows:  strings.  Never: buffers, windows, clients.
local M = {}

---@class fimserver.Offer
---@field text string Whole text from the anchor on.
---@field old string Text after the cursor that it replaces; often "".
---@field tail string Text after `old` in the line, which is kept.
---@field id string The server's id of the item.
---@field item table The item as the server sent it.

--- Brackets and quotes that an editor may add after the cursor automatically.
local CLOSERS = '[%)%]}>"\'`]'

---@param item table lsp.InlineCompletionItem
---@param line string The cursor's line.
---@param range { start: integer, cursor: integer, finish: integer } Bytes in that line, end exclusive.
---@return fimserver.Offer?
function M.new(item, line, range)
  local text = type(item.insertText) == 'table' and item.insertText.value or item.insertText
  if type(text) ~= 'string' or range.start > range.cursor or range.cursor > range.finish then
    return nil
  end
  text = text:gsub('\r\n?', '\n')
  local typed = line:sub(range.start + 1, range.cursor)
  local id = vim.tbl_get(item, 'command', 'arguments', 1)
  ---@type fimserver.Offer
  local offer = {
    text = text,
    old = line:sub(range.cursor + 1, range.finish),
    tail = line:sub(range.finish + 1),
    id = tostring(id or text),
    item = item,
  }
  return M.rest_of(offer, typed, line:sub(range.cursor + 1)) and offer or nil
end

--- Return whether `many` contains the characters of `few` in that order.
---@param many string
---@param few string
local function holds_in_order(many, few)
  local at = 1
  for i = 1, #few do
    local found = many:find(few:sub(i, i), at, true)
    if not found then
      return false
    end
    at = found + 1
  end
  return true
end

--- Return the rest of an offer and the number of bytes after the cursor that it replaces; nil if the text differs.
---@param offer fimserver.Offer
---@param typed string Text between the anchor and the cursor.
---@param after string Text after the cursor in its line.
---@return string? rest
---@return integer? replaced
function M.rest_of(offer, typed, after)
  if not vim.startswith(offer.text, typed) then
    return nil
  end
  local rest, replaced = offer.text:sub(#typed + 1), #offer.old
  local kept = offer.old .. offer.tail
  if after ~= kept then -- the editor may have added closers automatically
    local added = #after - #kept
    if added <= 0 or after:sub(added + 1) ~= kept then
      return nil
    end
    local closers = after:sub(1, added)
    if closers:gsub(CLOSERS, '') ~= '' or not holds_in_order(rest, closers) then
      return nil
    end
    replaced = replaced + added
  end
  if rest == '' or rest == after:sub(1, replaced) then
    return nil
  end
  return rest, replaced
end

--- Return the beginning of a rest to the end of its next word: whitespace, then one word or one run of punctuation.
---@param rest string
---@return string
function M.next_word(rest)
  local blank = rest:match('^%s*')
  local following = rest:sub(#blank + 1)
  local word = following:match('^[%w_\128-\255]+') or following:match('^[^%w_%s\128-\255]+') or ''
  return blank .. word
end

--- Return the beginning of a rest to the end of its line; of the next line if the rest begins with a line end.
---@param rest string
---@return string
function M.next_line(rest)
  local breaks = rest:match('^[ \t]*\n+') or ''
  return breaks .. (rest:sub(#breaks + 1):match('^[^\n]*'))
end

return M
