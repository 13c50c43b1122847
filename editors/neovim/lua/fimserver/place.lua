--- Decides which buffers are completed, and whether the user is typing.
local config = require('fimserver.config')

local M = {}

--- Return why a buffer is not completed; nil if it is.
---@param buffer integer
---@return string?
function M.refuse_buffer(buffer)
  if not vim.api.nvim_buf_is_loaded(buffer) then
    return 'the buffer is not loaded'
  end
  local options = vim.bo[buffer]
  if options.buftype ~= '' then
    return ("it is not a file (buftype is '%s')"):format(options.buftype)
  end
  if options.readonly or not options.modifiable then
    return 'it cannot be changed (readonly, or not modifiable)'
  end
  local name = vim.api.nvim_buf_get_name(buffer)
  if name == '' and options.filetype == '' then
    return 'it has no name and no file type; :set filetype=python'
  end
  if name:match('^%a[%w+.-]+://') then
    return 'it is not a file on this machine'
  end
  local wanted = config.options.filetypes
  if wanted ~= '*' and not vim.tbl_contains(wanted, options.filetype) then
    return ("its file type '%s' is not in the option filetypes"):format(options.filetype)
  end
  if vim.b[buffer].fimserver == false then
    return 'b:fimserver is false'
  end
  return nil
end

--- Return whether a plugin for several cursors is active, where one key changes many places.
---@param buffer integer
local function has_many_cursors(buffer)
  if vim.b[buffer].visual_multi then
    return true
  end
  local multicursor = package.loaded['multicursor-nvim']
  return multicursor ~= nil and multicursor.hasCursors ~= nil and multicursor.hasCursors()
end

--- Return whether ghost text may be shown now: insert mode (not replace, select, command line), no macro, one cursor.
---@param buffer integer
---@return boolean
function M.is_typing(buffer)
  return vim.startswith(vim.api.nvim_get_mode().mode, 'i')
    and vim.api.nvim_get_current_buf() == buffer
    and vim.fn.reg_recording() == ''
    and vim.fn.reg_executing() == ''
    and vim.fn.getcmdwintype() == ''
    and (config.options.with_menu or vim.fn.pumvisible() == 0)
    and not has_many_cursors(buffer)
end

return M
