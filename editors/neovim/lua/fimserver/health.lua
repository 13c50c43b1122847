--- Implements `:checkhealth fimserver`.
local config = require('fimserver.config')
local keys = require('fimserver.keys')
local owner = require('fimserver.owner')
local program = require('fimserver.program')
local server = require('fimserver.server')
local status = require('fimserver.status')

local M = {}
local health = vim.health

local function check_neovim()
  local now = vim.version()
  local version = ('%d.%d.%d'):format(now.major, now.minor, now.patch)
  if vim.fn.has('nvim-0.11') == 1 then
    health.ok('Neovim ' .. version)
  else
    health.error('Neovim ' .. version .. ' is too old', { 'Install Neovim 0.11 or newer.' })
  end
  if not require('fimserver').is_set_up() then
    health.error('The plugin is not set up', { "Add require('fimserver').setup() to init.lua." })
  end
  if not vim.o.termguicolors then
    health.info("'termguicolors' is off; ghost text is grey and italic unless you set the group FimserverGhost")
  end
end

---@return string[]? command
local function check_server()
  local command, where = program.find(vim.fn.bufnr('#') > 0 and vim.fn.bufnr('#') or 0)
  if server.command then
    command, where = server.command, server.where
  end
  if not command then
    health.error('No server: ' .. where) -- the reason includes the fix
    return nil
  end
  local code, output = program.run(command, { '--version' }, 10000)
  if code ~= 0 then
    health.error(('`%s --version` failed: %s'):format(command[1], vim.trim(output)), { program.remedy })
    return nil
  end
  health.ok(('%s (%s, from %s)'):format(vim.trim(output), command[1], where))
  return command
end

---@param command string[]
local function check_daemon(command)
  local _, output = program.run(command, { 'daemon', 'status', '--json' }, 10000)
  local decoded, daemon = pcall(vim.json.decode, output)
  if not decoded or type(daemon) ~= 'table' then
    health.warn('`fimserver daemon status` failed: ' .. vim.trim(output), { 'Run `fimserver doctor`.' })
  elseif daemon.pid == nil or daemon.pid == vim.NIL then
    health.info('The daemon is not running; it starts with the first file.')
  else
    health.ok(('Daemon runs (process %s)'):format(daemon.pid))
  end
end

local function check_client()
  local client, now = server.client(), status.get()
  if client then
    local count = vim.tbl_count(client.attached_buffers)
    health.ok(
      ('Connected, %d %s; state: %s %s'):format(count, count == 1 and 'buffer' or 'buffers', now.state, now.detail)
    )
  elseif now.state == 'error' then
    health.error(now.detail)
  else
    health.info('Not connected: ' .. now.detail)
  end
  for _, other in ipairs(vim.lsp.get_clients({ method = 'textDocument/inlineCompletion' })) do
    if client and other.id ~= client.id then
      health.warn(
        ('%s provides inline completion too; you may see two ghost texts'):format(other.name),
        { 'Turn one of them off.' }
      )
    end
  end
end

local function check_keys()
  local buffer = vim.fn.bufnr('#') > 0 and vim.fn.bufnr('#') or 0
  for _, entry in ipairs(keys.report(buffer)) do
    local name = entry.action.name
    if not entry.key then
      health.info(('%s: no key'):format(name))
    elseif entry.other and not config.chosen_keys[name] then
      local whose = owner.name(entry.other)
      if owner.leads_here(entry.other) then
        health.ok(('%s: %s, where %s has nothing to do'):format(name, entry.key, whose))
      elseif name == 'accept' then
        health.warn(
          ('accept: %s belongs to %s, so it does not accept the ghost text'):format(entry.key, whose),
          keys.remedies(entry.key, whose)
        )
      else
        health.info(('%s: %s belongs to %s'):format(name, entry.key, whose))
      end
    else
      health.ok(('%s: %s'):format(name, entry.key))
    end
  end
end

--- Called by `:checkhealth`.
function M.check()
  health.start('fimserver: Neovim')
  check_neovim()
  health.start('fimserver: server')
  local command = check_server()
  if command then
    check_daemon(command)
  end
  if command or server.command then
    check_client()
  end
  health.start('fimserver: keys')
  check_keys()
end

return M
