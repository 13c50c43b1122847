--- Where there is anything to complete: which buffers are the server's business, and when the person is typing.
local config = require('fimserver.config')

local M = {}

--- Why a buffer is nobody's business; nil where it is the server's.
---@param buffer integer
---@return string?
function M.refuse_buffer(buffer)
  if not vim.api.nvim_buf_is_loaded(buffer) then
    return 'the buffer is not loaded'
  end
  local options = vim.bo[buffer]
  if options.buftype ~= '' then
    return ("it is no file (buftype is '%s')"):format(options.buftype)
  end
  if options.readonly or not options.modifiable then
    return 'it cannot be changed (readonly, or not modifiable)'
  end
  local name = vim.api.nvim_buf_get_name(buffer)
  if name == '' then
    return 'it has no name yet; save it once'
  end
  if name:match('^%a[%w+.-]+://') then
    return 'it is no file of this machine'
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

--- Whether a plugin for several cursors is at work: what one key does there happens in many places.
---@param buffer integer
local function has_many_cursors(buffer)
  if vim.b[buffer].visual_multi then
    return true
  end
  local multicursor = package.loaded['multicursor-nvim']
  return multicursor ~= nil and multicursor.hasCursors ~= nil and multicursor.hasCursors()
end

--- Whether ghost text may be shown now: insert mode (not replace, select, command line), no macro, one cursor.
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
