--- What the server offered, and what is left of it after more was typed. Pure functions of texts.
---
---   new          an item of the server -> an Offer, or nil where it cannot be shown
---   rest_of      what is left, and how much behind the cursor it replaces
---   next_word, next_line   the beginning of a rest that one key accepts
---
--- All offsets are bytes. Lines of a text are joined by "\n", whatever the file's own line end.
---
--- Knows:  strings.  Never: buffers, windows, clients.
local M = {}

---@class fimserver.Offer
---@field text string All of it, from the anchor on.
---@field old string What it replaces behind the cursor; often "".
---@field tail string What stands behind that in its line, and stays.
---@field id string What the server calls it.
---@field item table The item as the server sent it.

--- Brackets and quotes that an editor may add behind the cursor by itself.
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

--- Whether the characters of `few` come in that order in `many`.
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

--- What is left of an offer, and how many bytes behind the cursor it replaces; nil where the text went on otherwise.
---@param offer fimserver.Offer
---@param typed string What stands between the anchor and the cursor.
---@param after string What stands behind the cursor in its line.
---@return string? rest
---@return integer? replaced
function M.rest_of(offer, typed, after)
  if not vim.startswith(offer.text, typed) then
    return nil
  end
  local rest, replaced = offer.text:sub(#typed + 1), #offer.old
  local kept = offer.old .. offer.tail
  if after ~= kept then -- an editor added closers by itself
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

--- The beginning of a rest up to the end of its next word: blanks and line ends, then one word or one run of signs.
---@param rest string
---@return string
function M.next_word(rest)
  local blank = rest:match('^%s*')
  local behind = rest:sub(#blank + 1)
  local word = behind:match('^[%w_\128-\255]+') or behind:match('^[^%w_%s\128-\255]+') or ''
  return blank .. word
end

--- The beginning of a rest up to the end of its line, or of the next line where the rest begins with a line end.
---@param rest string
---@return string
function M.next_line(rest)
  local breaks = rest:match('^[ \t]*\n+') or ''
  return breaks .. (rest:sub(#breaks + 1):match('^[^\n]*'))
end

return M
