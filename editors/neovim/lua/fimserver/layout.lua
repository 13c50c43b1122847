--- Computes the layout of ghost text. Pure functions of strings; widths are screen cells.
---
---   new   a rest and the text it replaces -> pieces within the cursor's line, and the lines below it
---
--- Knows:  strings and their widths.  Never: buffers, extmarks.
local M = {}

---@class fimserver.Piece
---@field offset integer Bytes after the cursor.
---@field text string
---@field overlay boolean Whether it hides the text at that place.

---@class fimserver.Layout
---@field pieces fimserver.Piece[]
---@field below string[] Lines below the cursor's line.
---@field moved string Text after the cursor that is shown at the end of the last line below.

---@class fimserver.LayoutContext
---@field column integer Screen column of the cursor in its line, from 0.
---@field tabstop integer
---@field width integer? Cells of a line if lines wrap.

--- Replace the tabs of a text that starts at a screen column with spaces.
---@param text string
---@param column integer
---@param tabstop integer
---@return string
function M.expand_tabs(text, column, tabstop)
  if not text:find('\t', 1, true) then
    return text
  end
  local parts = vim.split(text, '\t', { plain = true })
  local out = ''
  for i, part in ipairs(parts) do
    out = out .. part
    if i < #parts then
      local at = column + vim.fn.strdisplaywidth(out, column)
      out = out .. (' '):rep(tabstop - at % tabstop)
    end
  end
  return out
end

--- Split a line into parts of at most `width` cells, because virtual lines do not wrap.
---@param line string
---@param width integer
---@return string[]
function M.wrap(line, width)
  if width < 2 or vim.fn.strdisplaywidth(line) <= width then
    return { line }
  end
  local parts, part, cells = {}, '', 0
  for _, character in ipairs(vim.fn.split(line, '\\zs')) do
    local wide = vim.fn.strdisplaywidth(character)
    if cells + wide > width then
      table.insert(parts, part)
      part, cells = '', 0
    end
    part, cells = part .. character, cells + wide
  end
  table.insert(parts, part)
  return parts
end

--- Return the insertions that turn `old` into `new`, aligned from the right; nil if insertions are not enough.
---@param new string
---@param old string
---@return { offset: integer, text: string }[]?
function M.align(new, old)
  if old:find('[\128-\255]') then -- an insertion could split the bytes of one character
    return nil
  end
  local found = {} ---@type { offset: integer, text: string }[]
  local stop = #new -- end of the part that is not placed yet
  for i = #old, 1, -1 do
    local at = nil
    for j = stop, 1, -1 do
      if new:byte(j) == old:byte(i) then
        at = j
        break
      end
    end
    if not at then
      return nil
    end
    if at < stop then
      table.insert(found, 1, { offset = i, text = new:sub(at + 1, stop) })
    end
    stop = at - 1
  end
  if stop > 0 then
    table.insert(found, 1, { offset = 0, text = new:sub(1, stop) })
  end
  return found
end

---@param text string
---@param cells integer
local function padded(text, cells)
  return text .. (' '):rep(math.max(0, cells - vim.fn.strdisplaywidth(text)))
end

--- Lay out a rest that replaces `old` after the cursor and is followed by `tail` in its line.
---@param rest string
---@param old string
---@param tail string
---@param context fimserver.LayoutContext
---@return fimserver.Layout
function M.new(rest, old, tail, context)
  local lines = vim.split(rest, '\n', { plain = true })
  local first = lines[1]
  local following = old .. tail
  local is_free = following:match('^%s*$') ~= nil
  local pieces, moved = {}, '' ---@type fimserver.Piece[], string

  local function add(offset, text, overlay)
    if text ~= '' then
      local column = context.column + vim.fn.strdisplaywidth(following:sub(1, offset), context.column)
      for _, piece in ipairs(pieces) do
        column = column + (piece.overlay and 0 or vim.fn.strdisplaywidth(piece.text))
      end
      text = M.expand_tabs(text, column, context.tabstop)
      table.insert(pieces, { offset = offset, text = text, overlay = overlay })
    end
  end

  local aligned = (#lines == 1 or tail:match('^%s*$')) and M.align(first, old)
  if is_free and #lines > 1 then
    add(0, first, false)
  elseif aligned then
    for _, piece in ipairs(aligned) do
      add(piece.offset, piece.text, false)
    end
  elseif #lines == 1 then -- the new text covers the old
    local cells = vim.fn.strdisplaywidth(old, context.column)
    local shown = M.wrap(M.expand_tabs(first, context.column, context.tabstop), math.max(cells, 2))
    add(0, padded(shown[1], cells), true)
    add(#old, table.concat(shown, '', 2), false)
  else -- the text after the cursor moves down to the end of the last line
    moved = tail
    local shown = M.expand_tabs(first, context.column, context.tabstop)
    add(0, padded(shown, vim.fn.strdisplaywidth(following, context.column)), true)
  end

  local below = {} ---@type string[]
  for i = 2, #lines do
    local line = M.expand_tabs(lines[i], 0, context.tabstop)
    vim.list_extend(below, context.width and M.wrap(line, context.width) or { line })
  end
  return { pieces = pieces, below = below, moved = moved }
end

return M
