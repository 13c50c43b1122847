--- Draws and clears ghost text with extmarks.
---
--- A mark is changed in place and only if it differs, so that typing along the ghost text does not flicker.
---
--- Knows:  buffers, windows, extmarks.  Never: the server, the source of the ghost text.
local contrast = require('fimserver.contrast')
local layout = require('fimserver.layout')

local M = {}

local LEAST_CONTRAST = 4.5 -- of ghost text with the background, as WCAG asks of text
local HINT_CONTRAST = 3

--- Colors of the highlight groups that the plugin has defined; other colors are the user's or the color scheme's.
---@type table<string, { fg: integer, ctermfg: integer }>
local defined = {}

M.namespace = vim.api.nvim_create_namespace('fimserver.ghost')

---@class fimserver.Drawn
---@field marks integer Number of extmarks, with the ids 1, 2, ...
---@field key string

---@type table<integer, fimserver.Drawn>
local drawn = {}

--- Define the highlight groups, unless the color scheme has. Ghost text keeps the scheme's own color for it if that can
--- be read; the text after it is dimmer.
function M.set_highlights()
  local function colors_of(name)
    return vim.api.nvim_get_hl(0, { name = name, link = false })
  end
  local is_dark = vim.o.background == 'dark'
  local normal, scheme = colors_of('Normal'), colors_of('ComplHint')
  if next(scheme) == nil then
    scheme = colors_of('NonText')
  end
  local back = normal.bg or (is_dark and 0x000000 or 0xffffff)
  local text = normal.fg or (is_dark and 0xffffff or 0x000000)
  local ghost = contrast.toward(scheme.fg or text, text, function(color)
    return contrast.ratio(color, back) >= LEAST_CONTRAST
  end)
  local hint = contrast.toward(ghost, back, function(color)
    return contrast.ratio(color, back) <= HINT_CONTRAST
  end)
  local cterm = is_dark and { ghost = 246, hint = 242 } or { ghost = 242, hint = 246 }
  local function set(name, fg, ctermfg)
    local now, own = vim.api.nvim_get_hl(0, { name = name }), defined[name]
    local is_own = own ~= nil and now.fg == own.fg and now.ctermfg == own.ctermfg
    defined[name] = (is_own or next(now) == nil) and { fg = fg, ctermfg = ctermfg } or nil
    vim.api.nvim_set_hl(0, name, { default = not is_own, fg = fg, ctermfg = ctermfg, italic = true })
  end
  set('FimserverGhost', ghost, cterm.ghost)
  set('FimserverHint', hint, cterm.hint)
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
