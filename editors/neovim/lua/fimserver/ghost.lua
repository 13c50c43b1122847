--- Draws and clears ghost text with extmarks.
---
--- A mark is changed in place and only if it differs, so that typing along the ghost text does not flicker.
---
--- Knows:  buffers, windows, extmarks.  Never: the server, the source of the ghost text.
local layout = require('fimserver.layout')

local M = {}

M.namespace = vim.api.nvim_create_namespace('fimserver.ghost')

---@class fimserver.Drawn
---@field marks integer Number of extmarks, with the ids 1, 2, ...
---@field key string

---@type table<integer, fimserver.Drawn>
local drawn = {}

--- Define the highlight groups, unless the colour scheme has. Without its colours, ghost text is grey, unlike code.
function M.set_highlights()
  local function grey(name, like)
    local from = vim.api.nvim_get_hl(0, { name = like, link = false })
    if next(from) == nil then
      from = vim.api.nvim_get_hl(0, { name = 'NonText', link = false })
    end
    local style = { default = true, fg = from.fg, italic = from.italic, ctermfg = from.ctermfg or 8 }
    vim.api.nvim_set_hl(0, name, style)
  end
  grey('FimserverGhost', 'ComplHint')
  grey('FimserverHint', 'ComplHintMore')
end

---@param buffer integer
function M.clear(buffer)
  if drawn[buffer] then
    drawn[buffer] = nil
    if vim.api.nvim_buf_is_valid(buffer) then
      vim.api.nvim_buf_clear_namespace(buffer, M.namespace, 0, -1)
    end
  end
end

---@param buffer integer
---@return boolean
function M.is_drawn(buffer)
  return drawn[buffer] ~= nil
end

--- Return the number of screen rows below the cursor's line in its window.
---@param window integer
---@param row integer
local function room_below(window, row)
  local height = vim.api.nvim_win_text_height(window, { start_row = row, end_row = row }).all
  local first = vim.fn.screenpos(window, row + 1, 1).row
  if first == 0 then
    return math.huge -- the line begins above the window
  end
  local top = vim.api.nvim_win_get_position(window)[1] + (vim.wo[window].winbar ~= '' and 1 or 0)
  return vim.api.nvim_win_get_height(window) - (first - top - 1) - height
end

--- Show the rest of an offer at the cursor of the current window.
---@param buffer integer
---@param rest string
---@param replaced integer Bytes after the cursor that it replaces.
---@param hint string? Shown after the last line, such as "(1/2)".
function M.show(buffer, rest, replaced, hint)
  local window = vim.api.nvim_get_current_win()
  local row, column = unpack(vim.api.nvim_win_get_cursor(window))
  row = row - 1
  local line = vim.api.nvim_get_current_line()
  local following = line:sub(column + 1)
  local info = vim.fn.getwininfo(window)[1]
  local width = info.width - info.textoff
  ---@type fimserver.LayoutContext
  local context = {
    column = vim.fn.strdisplaywidth(line:sub(1, column)),
    tabstop = vim.bo[buffer].tabstop,
    width = vim.wo[window].wrap and width or nil,
  }
  local key = table.concat({ row, column, rest, replaced, following, hint or '', width, context.column }, '\0')
  if drawn[buffer] and drawn[buffer].key == key then
    return
  end
  local plan = layout.new(rest, following:sub(1, replaced), following:sub(replaced + 1), context)

  local below = {} ---@type [string, string][][]
  for i, text in ipairs(plan.below) do
    below[i] = { { text, 'FimserverGhost' } }
  end
  if #below > 0 and plan.moved ~= '' then
    table.insert(below[#below], { plan.moved, 'Normal' })
  end
  local pieces = plan.pieces
  if #pieces == 0 then
    pieces = { { offset = 0, text = '', overlay = false } }
  end

  local before = drawn[buffer] and drawn[buffer].marks or 0
  for id, piece in ipairs(pieces) do
    local chunks = { { piece.text, 'FimserverGhost' } }
    if id == #pieces and #below > 0 then
      local hidden = #below - math.max(0, room_below(window, row))
      if hidden > 0 and not piece.overlay then
        table.insert(chunks, { (' … +%d'):format(hidden), 'FimserverHint' })
      end
    end
    if id == #pieces and hint then
      table.insert(below[#below] or chunks, { ' ' .. hint, 'FimserverHint' })
    end
    vim.api.nvim_buf_set_extmark(buffer, M.namespace, row, math.min(column + piece.offset, #line), {
      id = id,
      virt_text = chunks,
      virt_text_pos = piece.overlay and 'overlay' or 'inline',
      virt_lines = id == #pieces and #below > 0 and below or nil,
      hl_mode = 'combine',
      undo_restore = false,
    })
  end
  for id = #pieces + 1, before do
    vim.api.nvim_buf_del_extmark(buffer, M.namespace, id)
  end
  drawn[buffer] = { marks = #pieces, key = key }
end

return M
