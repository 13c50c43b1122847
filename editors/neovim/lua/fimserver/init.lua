--- Public functions. `setup()` starts the plugin; the others are for key mappings, status lines and scripts.
---
---   events.lua    handlers of Neovim's events    typing.lua   from a key to ghost text
---   server.lua    the language client            accept.lua   from ghost text to text
---   keys.lua      mappings, and owner.lua        notices.lua  messages that are shown once
---   offer.lua     the rest of an offer           ghost.lua    extmarks, laid out by layout.lua
local M = {}

local is_set_up = false

--- Return whether Neovim's own module draws the ghost text.
---@return boolean
local function is_builtin()
  return require('fimserver.config').options.ghost_text == 'builtin' and vim.lsp.inline_completion ~= nil
end

--- Start the plugin with options. Invalid options are reported and replaced by defaults. See |fimserver-options|.
---@param options? table
function M.setup(options)
  local message = require('fimserver.message')
  if vim.fn.has('nvim-0.11') == 0 then
    message.say_once('the plugin needs Neovim 0.11 or newer; this is ' .. tostring(vim.version()))
    return
  end
  require('fimserver.entry').define() -- where the runtime path was changed too late for plugin/fimserver.lua
  local config = require('fimserver.config')
  local keys = require('fimserver.keys')
  if is_set_up then
    keys.unmap()
  end
  for _, problem in ipairs(config.set(options)) do
    message.say_once(problem)
  end
  if config.options.ghost_text == 'builtin' and not is_builtin() then
    message.say_once("setup(): ghost_text is 'builtin', which needs Neovim 0.12; the plugin draws ghost text itself")
  end
  local server, status = require('fimserver.server'), require('fimserver.status')
  local typing, builtin = require('fimserver.typing'), require('fimserver.builtin')
  status.enable(config.options.settings.enabled ~= false)
  require('fimserver.ghost').set_highlights()
  keys.map_plugs()
  keys.map_defaults()
  require('fimserver.events').listen(is_builtin())
  server.on_started = function(client)
    builtin.take(client, is_builtin())
  end
  server.on_ready = function()
    typing.refresh(vim.api.nvim_get_current_buf())
  end
  if is_set_up then
    server.configure({})
  end
  is_set_up = true
  for _, buffer in ipairs(vim.api.nvim_list_bufs()) do
    if vim.bo[buffer].filetype ~= '' then
      server.attach(buffer)
    end
  end
end

--- Return whether `setup()` was called.
---@return boolean
function M.is_set_up()
  return is_set_up
end

--- Return whether the current buffer shows ghost text.
---@return boolean
function M.is_visible()
  if is_builtin() then
    return require('fimserver.builtin').is_visible()
  end
  return require('fimserver.typing').shown(vim.api.nvim_get_current_buf()) ~= nil
end

---@param part fimserver.Part
local function accept(part)
  if is_builtin() then
    return require('fimserver.builtin').accept(part)
  end
  return require('fimserver.accept').begin(part)
end

--- Accept all of the ghost text. Returns false if there is none, so that a mapping can continue.
---@return boolean accepted
function M.accept()
  return accept('all')
end

--- Accept the next word of the ghost text; the rest stays visible.
---@return boolean accepted
function M.accept_word()
  return accept('word')
end

--- Accept the next line of the ghost text; the rest stays visible.
---@return boolean accepted
function M.accept_line()
  return accept('line')
end

---@param steps integer
local function select(steps)
  if not M.is_visible() then
    return false
  end
  if is_builtin() then
    vim.lsp.inline_completion.select({ count = steps })
  else
    require('fimserver.typing').select(vim.api.nvim_get_current_buf(), steps)
  end
  return true
end

--- Show the next candidate; if there is only one, request others from the server.
---@return boolean done False if there is no ghost text.
function M.next()
  return select(1)
end

--- Show the previous candidate.
---@return boolean done False if there is no ghost text.
function M.previous()
  return select(-1)
end

--- Hide the ghost text until you continue typing.
---@return boolean done False if there is no ghost text.
function M.dismiss()
  if not M.is_visible() then
    return false
  end
  local buffer = vim.api.nvim_get_current_buf()
  if is_builtin() then
    require('fimserver.builtin').clear(buffer)
  else
    require('fimserver.typing').clear(buffer)
  end
  return true
end

--- Request ghost text now, in insert mode, possibly with several candidates.
---@return boolean done False if the buffer is not completed.
function M.trigger()
  local buffer = vim.api.nvim_get_current_buf()
  local server = require('fimserver.server')
  if not require('fimserver.place').is_typing(buffer) or not server.attach(buffer) then
    return false
  end
  if is_builtin() then
    require('fimserver.builtin').trigger(buffer)
  else
    require('fimserver.typing').ask(buffer, { invoked = true })
  end
  return true
end

--- Return a short text for a status line: "fim", "fim @ host" (an engine on that server gets the code), "fim …"
--- (thinking), "fim: loading", "fim: snoozed 5 min", "fim: off", "fim: error"; "" before a server was started. The
--- autocommand User FimserverStatus reports changes.
---@return string
function M.statusline()
  return require('fimserver.status').line()
end

--- Return the state with a description; for an error, how to fix it.
---@return fimserver.Status
function M.status()
  return require('fimserver.status').get()
end

--- Change settings of the server while it runs: `configure({ maxLines = 3 })`. vim.NIL resets a setting.
---@param settings table<string, any>
function M.configure(settings)
  require('fimserver.server').configure(settings)
end

return M
