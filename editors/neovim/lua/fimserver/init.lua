--- The plugin's functions. `setup()` starts it; the others are for key mappings, status lines and scripts.
---
---   events.lua    which events lead where        typing.lua   from a key to ghost text
---   server.lua    the language client            accept.lua   from ghost text to text
---   offer.lua     what is left of an offer       ghost.lua    extmarks, laid out by layout.lua
local M = {}

local is_set_up = false

--- Who draws the ghost text: the plugin, or Neovim's own module.
---@return boolean
local function is_builtin()
  return require('fimserver.config').options.ghost_text == 'builtin' and vim.lsp.inline_completion ~= nil
end

--- Start with options; what is wrong in them is said, and the default used. See |fimserver-options|.
---@param options? table
function M.setup(options)
  local message = require('fimserver.message')
  if vim.fn.has('nvim-0.11') == 0 then
    message.say_once('the plugin needs Neovim 0.11 or newer; this is ' .. tostring(vim.version()))
    return
  end
  local config = require('fimserver.config')
  local keys = require('fimserver.keys')
  if is_set_up then
    keys.unmap()
  end
  for _, problem in ipairs(config.set(options)) do
    message.say_once(problem)
  end
  if config.options.ghost_text == 'builtin' and not is_builtin() then
    message.say_once("setup(): ghost_text is 'builtin', which Neovim has from 0.12 on; the plugin draws it itself")
  end
  local server, status = require('fimserver.server'), require('fimserver.status')
  local typing, builtin = require('fimserver.typing'), require('fimserver.builtin')
  status.enable(config.options.settings.enabled ~= false)
  require('fimserver.ghost').set_highlights()
  keys.map_plugs()
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

--- Whether `setup()` was called.
---@return boolean
function M.is_set_up()
  return is_set_up
end

--- Whether ghost text is on the screen in the current buffer.
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

--- Accept all of the ghost text. False where none is shown, so that a mapping can go on.
---@return boolean accepted
function M.accept()
  return accept('all')
end

--- Accept its next word; the rest stays on the screen.
---@return boolean accepted
function M.accept_word()
  return accept('word')
end

--- Accept its next line; the rest stays on the screen.
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

--- Show the next candidate; where there is one only, ask the server for others.
---@return boolean done False where no ghost text is shown.
function M.next()
  return select(1)
end

--- Show the candidate before it.
---@return boolean done False where no ghost text is shown.
function M.previous()
  return select(-1)
end

--- Clear the ghost text; it comes again when you type on.
---@return boolean done False where none is shown.
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

--- Ask for ghost text now, in insert mode; several candidates may come.
---@return boolean done False where the buffer is not the server's business.
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

--- A few words for a status line: "fim", "fim …" (thinking), "fim: loading", "fim: snoozed 5 min", "fim: off",
--- "fim: error"; "" before a server was started. The autocommand User FimserverStatus tells when it changes.
---@return string
function M.statusline()
  return require('fimserver.status').line()
end

--- The state and what the server said of it; for an error, how to mend it.
---@return fimserver.Status
function M.status()
  return require('fimserver.status').get()
end

--- Change settings of the server while it runs: `configure({ maxLines = 3 })`. vim.NIL takes a setting back.
---@param settings table<string, any>
function M.configure(settings)
  require('fimserver.server').configure(settings)
end

return M
