--- Defines `:Fimserver`, and loads nothing else before it is used.
local M = {}

--- Define the command, unless it is defined.
function M.define()
  if vim.g.loaded_fimserver then
    return
  end
  vim.g.loaded_fimserver = true

  vim.api.nvim_create_user_command('Fimserver', function(input)
    require('fimserver.commands').run(input.fargs)
  end, {
    nargs = '*',
    desc = 'fimserver: status, snooze, on, off, explain, mode, restart, log, stats, trigger',
    complete = function(beginning, line)
      return require('fimserver.commands').complete(beginning, line)
    end,
  })
end

return M
