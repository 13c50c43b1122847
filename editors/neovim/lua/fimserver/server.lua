--- Manages the language client, one for all buffers of this Neovim: starts it, attaches buffers, sends settings.
---
---   attach      start the server for a buffer, or attach the buffer to the running one
---   client      return the running client
---   configure   change settings while the server runs
---
--- Knows:  vim.lsp, the names of docs/reference/protocol.md.  Never: ghost text, keys.
local config = require('fimserver.config')
local connection = require('fimserver.connection')
local message = require('fimserver.message')
local outside = require('fimserver.outside')
local place = require('fimserver.place')
local program = require('fimserver.program')
local status = require('fimserver.status')

local M = {}

local NAME = 'fimserver'
local MOST_STARTS = 3 -- in a minute; a server that ends more often is not restarted
local ENGINE_STATES = { Normal = 'ready', Error = 'error' }

--- The command that started the server, and where it was found.
---@type string[]?
M.command = nil
M.where = ''

--- Called when the server can answer: the model is loaded, or settings have changed.
---@type fun()
M.on_ready = function() end

local starts = {} ---@type integer[]
local has_given_up = false
local searched_at = -math.huge -- last search without a result, in vim.uv.now() milliseconds
local SEARCH_EVERY_MS = 5000
local stopping = {} ---@type table<integer, boolean> clients that this plugin stops
local current = nil ---@type vim.lsp.Client?

--- Return the running client; nil before a file was opened, and after the client ended.
---@return vim.lsp.Client?
function M.client()
  if current and current:is_stopped() then
    current = nil
  end
  return current
end

---@param buffer integer
---@return vim.lsp.Client?
function M.client_of(buffer)
  local client = M.client()
  return client and client.attached_buffers[buffer] and client.initialized and client or nil
end

--- Return the settings to send. An empty table must be an empty dict, or it is sent as a list.
---@return table
local function wire_settings()
  local settings = config.options.settings
  local section = next(settings) == nil and vim.empty_dict() or vim.deepcopy(settings)
  if type(section.languages) == 'table' and next(section.languages) == nil then
    section.languages = vim.empty_dict()
  end
  return { fimserver = section }
end

---@type table<string, lsp.Handler>
local handlers = {
  ['window/showMessage'] = function(_, params)
    local levels = { vim.log.levels.ERROR, vim.log.levels.WARN, vim.log.levels.INFO, vim.log.levels.INFO }
    local level = levels[params.type] or vim.log.levels.INFO
    if level == vim.log.levels.INFO then
      message.say(params.message, level)
    else
      message.say_once(params.message, level)
    end
    return vim.NIL
  end,
  ['window/logMessage'] = function() end, -- the daemon keeps its own log
  ['didChangeStatus'] = function(_, params)
    local state = params.busy and 'loading' or ENGINE_STATES[params.kind] or 'ready'
    local was = status.get().state
    status.set(state, tostring(params.message or ''))
    if state == 'ready' and was ~= 'ready' and was ~= 'thinking' then
      M.on_ready()
    end
  end,
}

---@return lsp.ClientCapabilities
local function capabilities()
  local all = vim.lsp.protocol.make_client_capabilities()
  all.textDocument.inlineCompletion = { dynamicRegistration = false } -- missing in Neovim 0.11
  all.general.positionEncodings = { 'utf-16' } -- like most servers, because some plugins warn about mixed encodings
  return all
end

--- Return a message that fits in one line.
---@param what string
---@param cause string
local function to_message(what, cause)
  local text = ('fimserver %s: %%s; :checkhealth fimserver'):format(what)
  local room = math.max(20, vim.v.echospace - #text + #'%s')
  if vim.fn.strdisplaywidth(cause) > room then
    cause = vim.fn.strcharpart(cause, 0, room - 1) .. '…'
  end
  return text:format(cause)
end

---@param ended fimserver.End
---@param id integer
local function on_exit(ended, id)
  vim.schedule(function()
    local was_asked = stopping[id]
    stopping[id] = nil
    if current and current.id == id then
      current = nil
    end
    if was_asked or vim.v.exiting ~= vim.NIL then
      status.set('stopped', 'the server was stopped')
      return
    end
    local how = ended.signal ~= 0 and ('signal %d'):format(ended.signal) or ('exit code %d'):format(ended.code)
    local cause = ended.signal == 0 and ended.cause ~= '' and ended.cause or how
    if #starts >= MOST_STARTS and starts[#starts] - starts[#starts - MOST_STARTS + 1] < 60000 then
      has_given_up = true
      local text = 'the server ended %d times in a minute, last with %s; run `%s doctor` to find the problem; '
      text = text:format(MOST_STARTS, how, M.command and M.command[1] or 'fimserver')
        .. ':Fimserver restart tries again'
      status.set('error', ('%s (%s)'):format(text, cause))
    else
      status.set('stopped', ('the server ended (%s); the next key starts it'):format(cause))
    end
    if ended.code ~= 0 or ended.signal ~= 0 then
      message.say_once(to_message('ended', cause), vim.log.levels.ERROR)
    end
  end)
end

--- Attach a buffer to the server, which is started if it does not run. Buffers that are not completed are refused.
---@param buffer integer
---@return boolean attached
function M.attach(buffer)
  if place.refuse_buffer(buffer) then
    return false
  end
  local running = M.client()
  if running and running.attached_buffers[buffer] then
    return true
  end
  if vim.api.nvim_buf_get_name(buffer) == '' then
    if connection.unnamed then
      M.detach(connection.unnamed)
    end
    connection.unnamed = buffer
  end
  if running then
    return vim.lsp.buf_attach_client(buffer, running.id)
  end
  if has_given_up or vim.uv.now() - searched_at < SEARCH_EVERY_MS then
    return false
  end
  local command, where, is_known = program.find(buffer)
  if not command then
    searched_at = vim.uv.now()
    status.set('error', where)
    if not is_known then
      message.say_once(where)
    end
    return false
  end
  M.command, M.where = command, where
  table.insert(starts, vim.uv.now())
  status.set('loading', 'the server is starting')
  local settings = wire_settings()
  local name = vim.api.nvim_buf_get_name(buffer)
  local folder = name ~= '' and vim.fs.dirname(name) or vim.fn.getcwd()
  local cmd, ended = connection.new(command, outside.surroundings(buffer))
  local id = vim.lsp.start({
    name = NAME,
    cmd = cmd,
    root_dir = vim.fs.root(folder, { '.git', 'pyproject.toml' }) or folder,
    capabilities = capabilities(),
    init_options = settings.fimserver,
    settings = settings,
    handlers = handlers,
    on_exit = function(_, _, client_id)
      on_exit(ended, client_id)
    end,
  }, {
    bufnr = buffer,
    silent = true,
    reuse_client = function()
      return false
    end,
  })
  current = id and vim.lsp.get_client_by_id(id) or nil
  if current then
    M.on_started(current)
  else
    has_given_up = true
    local text = '%s cannot be started: %s; :Fimserver restart tries again'
    status.set('error', text:format(command[1], ended.cause))
    message.say_once(to_message('cannot start', ended.cause), vim.log.levels.ERROR)
  end
  return current ~= nil
end

--- Close a buffer at the server.
---@param buffer integer
function M.detach(buffer)
  local client = M.client()
  if client and client.attached_buffers[buffer] then
    vim.lsp.buf_detach_client(buffer, client.id)
  end
end

local function attach_all()
  for _, buffer in ipairs(vim.api.nvim_list_bufs()) do
    M.attach(buffer)
  end
end

program.on_trusted = function()
  searched_at = -math.huge
  attach_all()
end

--- Called with each client that was started.
---@type fun(client: vim.lsp.Client)
M.on_started = function() end

--- Send a notification to the server of a buffer, if it has one.
---@param buffer integer
---@param method string
---@param params table
function M.notify(buffer, method, params)
  local client = M.client_of(buffer)
  if client then
    client:notify(method, params) ---@diagnostic disable-line: param-type-mismatch  not a method of LSP
  end
end

--- Send a request to the server; without a server, show a message.
---@param method string
---@param params table
---@param on_answer? fun(result: any)
function M.request(method, params, on_answer)
  local client = M.client()
  if not client then
    message.say('the server is not running yet; open a file that fimserver completes')
    return
  end
  client:request(method, params, function(err, result) ---@diagnostic disable-line: param-type-mismatch
    if err then
      message.say(err.message, vim.log.levels.ERROR)
    elseif on_answer then
      on_answer(result)
    end
  end)
end

--- Run a command of the server.
---@param command string
---@param arguments? any[]
function M.execute(command, arguments)
  M.request('workspace/executeCommand', { command = command, arguments = arguments or {} })
end

--- Change settings while the server runs; vim.NIL resets a setting.
---@param settings table<string, any>
function M.configure(settings)
  for name, value in pairs(settings) do
    local known = config.options.settings
    if value == vim.NIL then
      known[name] = nil
    elseif type(value) == 'table' and type(known[name]) == 'table' then
      known[name] = vim.tbl_extend('force', known[name], value)
    else
      known[name] = value
    end
  end
  status.enable(config.options.settings.enabled ~= false)
  local client = M.client()
  if client then
    client.settings = wire_settings()
    client:notify('workspace/didChangeConfiguration', { settings = client.settings })
    M.on_ready()
  end
end

--- Stop the client of this Neovim; other clients and the daemon continue.
function M.stop()
  local client = M.client()
  if client then
    stopping[client.id] = true
    client:stop()
    current = nil
  end
end

--- Restart the model, or start the server if it has ended.
function M.restart()
  starts, has_given_up, searched_at = {}, false, -math.huge
  program.forget()
  message.forget()
  if M.client() then
    M.execute('fimserver.restart')
  else
    attach_all()
  end
end

return M
