--- Inserts the ghost text: all of it, a word, or a line. Each is one undo step, and `.` repeats it with what was typed.
---
--- `begin` returns immediately whether there is anything to accept, so any key's function can call it. The text is
--- changed by keys fed before the next typed one, because only keys can begin and end an undo step in insert mode.
local offers = require('fimserver.offer')
local server = require('fimserver.server')
local typing = require('fimserver.typing')

local M = {}

---@alias fimserver.Part 'all'|'word'|'line'

---@type table<fimserver.Part, fun(rest: string): string>
local parts = {
  all = function(rest)
    return rest
  end,
  word = offers.next_word,
  line = offers.next_line,
}

--- Accept the ghost text of the current buffer.
---@param part fimserver.Part
---@return boolean accepted False if there is no ghost text.
function M.begin(part)
  if not typing.shown(vim.api.nvim_get_current_buf()) then
    return false
  end
  local step = ("<C-g>u<Cmd>lua require('fimserver.accept').apply('%s')<CR><C-g>u"):format(part)
  vim.api.nvim_feedkeys(vim.api.nvim_replace_termcodes(step, true, false, true), 'ni', false)
  return true
end

--- Return the length in UTF-16 code units, the unit of LSP.
---@param text string
local function utf16_length(text)
  return vim.str_utfindex(text, 'utf-16', #text, false)
end

--- Change the text; called by the keys that `begin` feeds.
---@param part fimserver.Part
function M.apply(part)
  local buffer = vim.api.nvim_get_current_buf()
  local shown = typing.shown(buffer)
  if not shown then
    return
  end
  local offer, rest, replaced = shown.offer, shown.rest, shown.replaced
  local taken = parts[part](rest)
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local following = vim.api.nvim_get_current_line():sub(column + 1, column + replaced)
  local is_all = taken == rest or rest:sub(#taken + 1) == following
  local text, stop = taken, column
  if is_all then
    text, stop = rest, column + replaced
  end
  if stop > column then
    vim.api.nvim_buf_set_text(buffer, row - 1, column, row - 1, stop, {})
  end
  vim.api.nvim_paste(text, false, -1) -- unlike nvim_buf_set_text(), it lets `.` repeat the text
  if text:find('\n', 1, true) then
    vim.cmd('silent! .foldopen!') -- the accepted lines may be in a new fold
  end

  if not is_all then
    local length = utf16_length(offer.text:sub(1, #offer.text - #rest + #taken))
    server.notify(buffer, 'textDocument/didPartiallyAcceptCompletion', { item = offer.item, acceptedLength = length })
  elseif offer.item.command then
    local client = server.client_of(buffer)
    if client then
      client:exec_cmd(offer.item.command, { bufnr = buffer }, function() end)
    end
  end
end

return M
