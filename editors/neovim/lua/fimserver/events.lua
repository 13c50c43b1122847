--- Connects Neovim's events to the plugin's handlers.
local ghost = require('fimserver.ghost')
local keys = require('fimserver.keys')
local place = require('fimserver.place')
local server = require('fimserver.server')
local typing = require('fimserver.typing')

local M = {}

--- Install the event handlers and remove earlier ones.
---@param is_builtin boolean Neovim draws the ghost text and sends requests.
function M.listen(is_builtin)
  local group = vim.api.nvim_create_augroup('fimserver', { clear = true })

  ---@param events string|string[]
  ---@param run fun(buffer: integer)
  ---@param pattern? string
  local function on(events, run, pattern)
    vim.api.nvim_create_autocmd(events, {
      group = group,
      pattern = pattern,
      callback = function(event)
        run(event.buf)
      end,
    })
  end

  on({ 'FileType', 'BufFilePost', 'BufWritePost' }, function(buffer)
    vim.schedule(function() -- after the file is in its window, because Neovim may ask for trust and open the program
      server.attach(buffer)
    end)
  end)
  on({ 'BufFilePre', 'BufDelete' }, function(buffer) -- :write with a name "deletes" a buffer without one
    if vim.api.nvim_buf_get_name(buffer) == '' then
      server.detach(buffer) -- while it still has the URI that it was opened with
    end
  end)
  on('BufEnter', function(buffer)
    if vim.api.nvim_buf_get_name(buffer) == '' then
      server.attach(buffer) -- before its first change, which Neovim does not send after attaching it a second time
    end
    server.notify(buffer, 'textDocument/didFocus', { textDocument = { uri = vim.uri_from_bufnr(buffer) } })
  end)
  on('InsertEnter', function(buffer)
    if not place.refuse_buffer(buffer) then
      server.attach(buffer)
      vim.schedule(function() -- after completion plugins have mapped theirs
        if vim.api.nvim_buf_is_valid(buffer) then
          keys.map_chosen(buffer)
        end
      end)
    end
  end)
  on('ColorScheme', ghost.set_highlights)
  on('OptionSet', ghost.set_highlights, 'background') -- Neovim sets it when the terminal has answered
  if is_builtin then
    return
  end
  on({ 'TextChangedI', 'TextChangedP', 'CursorMovedI' }, typing.on_key)
  on({ 'InsertEnter', 'CompleteDone' }, function(buffer)
    vim.schedule(function() -- during the event, insert mode has not begun and the menu is still open
      if place.is_typing(buffer) then
        typing.on_key(buffer)
      end
    end)
  end)
  on({ 'InsertLeave', 'BufLeave', 'WinLeave' }, typing.clear)
  on({ 'ModeChanged', 'CursorMoved', 'SafeState' }, function(buffer) -- <C-c> leaves insert mode without InsertLeave
    if ghost.is_drawn(buffer) and not place.is_typing(buffer) then
      typing.clear(buffer)
    end
  end)
  on({ 'BufWipeout', 'BufUnload' }, typing.forget)
end

return M
