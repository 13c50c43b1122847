--- Where the pieces of a ghost text go. Pure functions of texts; widths are screen cells.
---
---   new   a rest and what it replaces -> pieces within the cursor's line, and the lines below it
---
--- Knows:  strings and how wide they are.  Never: buffers, extmarks.
local M = {}

---@class fimserver.Piece
---@field offset integer Bytes behind the cursor.
---@field text string
---@field overlay boolean Whether it hides what stands there.

---@class fimserver.Layout
---@field pieces fimserver.Piece[]
---@field below string[] Lines under the cursor's.
---@field moved string What stands behind the cursor and is shown at the end of the last line below.

---@class fimserver.LayoutContext
---@field column integer Screen column of the cursor in its line, from 0.
---@field tabstop integer
---@field width integer? Cells of a line where lines wrap.

--- A text with its tabs as blanks, as it looks from a column on.
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

--- Cut a line into parts of at most `width` cells: virtual lines do not wrap by themselves.
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

--- What has to be put where into `old` to make `new` of it, seen from the right; nil where that cannot be.
---@param new string
---@param old string
---@return { offset: integer, text: string }[]?
function M.align(new, old)
  if old:find('[\128-\255]') then -- bytes of one character could be torn apart
    return nil
  end
  local found = {} ---@type { offset: integer, text: string }[]
  local stop = #new -- the end of what is not placed yet
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

--- Lay out a rest that replaces `old` behind the cursor and is followed by `tail` in its line.
---@param rest string
---@param old string
---@param tail string
---@param context fimserver.LayoutContext
---@return fimserver.Layout
function M.new(rest, old, tail, context)
  local lines = vim.split(rest, '\n', { plain = true })
  local first = lines[1]
  local behind = old .. tail
  local is_free = behind:match('^%s*$') ~= nil
  local pieces, moved = {}, '' ---@type fimserver.Piece[], string

  local function add(offset, text, overlay)
    if text ~= '' then
      local column = context.column + vim.fn.strdisplaywidth(behind:sub(1, offset), context.column)
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
  elseif #lines == 1 then -- another text in the place of the old
    local cells = vim.fn.strdisplaywidth(old, context.column)
    local shown = M.wrap(M.expand_tabs(first, context.column, context.tabstop), math.max(cells, 2))
    add(0, padded(shown[1], cells), true)
    add(#old, table.concat(shown, '', 2), false)
  else -- what stands behind the cursor moves down, to the end of the last line
    moved = tail
    local shown = M.expand_tabs(first, context.column, context.tabstop)
    add(0, padded(shown, vim.fn.strdisplaywidth(behind, context.column)), true)
  end

  local below = {} ---@type string[]
  for i = 2, #lines do
    local line = M.expand_tabs(lines[i], 0, context.tabstop)
    vim.list_extend(below, context.width and M.wrap(line, context.width) or { line })
  end
  return { pieces = pieces, below = below, moved = moved }
end

return M
