--- Implements `:Fimserver` and its sub-commands.
local config = require('fimserver.config')
local keys = require('fimserver.keys')
local message = require('fimserver.message')
local owner = require('fimserver.owner')
local place = require('fimserver.place')
local program = require('fimserver.program')
local server = require('fimserver.server')
local status = require('fimserver.status')

local M = {}

local MODES = { 'auto', 'diffusion', 'speculative', 'autoregressive' }
local SNOOZE_MINUTES = 5
local ERROR = vim.log.levels.ERROR
local FILETYPE = 'fimserver' -- file type of the plugin's own windows

---@class fimserver.Command
---@field takes string Argument, in the notation of help pages.
---@field says string
---@field run fun(argument: string?)
---@field values? fun(): string[] Command-line completions of the argument.

--- Return the window that an earlier command has opened in this tab.
---@return integer?
local function own_window()
  for _, window in ipairs(vim.api.nvim_tabpage_list_wins(0)) do
    if vim.bo[vim.api.nvim_win_get_buf(window)].filetype == FILETYPE then
      return window
    end
  end
  return nil
end

--- Return the buffer that a command is about: the current one, or the previous one if this is the plugin's window.
---@return integer
local function meant_buffer()
  local buffer = vim.api.nvim_get_current_buf()
  if vim.bo[buffer].filetype ~= FILETYPE then
    return buffer
  end
  local before = vim.fn.win_getid(vim.fn.winnr('#'))
  return before ~= 0 and vim.api.nvim_win_get_buf(before) or buffer
end

--- Show text in a window of its own; `q` closes it.
---@param name string
---@param text string
local function show_window(name, text)
  local lines = vim.split(vim.trim((text:gsub('\r', ''))), '\n', { plain = true })
  local buffer = vim.api.nvim_create_buf(false, true)
  vim.api.nvim_buf_set_lines(buffer, 0, -1, false, lines)
  vim.bo[buffer].modifiable = false
  vim.bo[buffer].bufhidden = 'wipe'
  vim.bo[buffer].filetype = FILETYPE
  local window = own_window()
  if window then
    vim.api.nvim_set_current_win(window)
  else
    vim.cmd('botright split')
  end
  vim.api.nvim_win_set_buf(0, buffer)
  vim.wo.number, vim.wo.relativenumber, vim.wo.signcolumn = false, false, 'no'
  vim.wo.wrap, vim.wo.linebreak = true, true
  local height = vim.api.nvim_win_text_height(0, {}).all
  vim.api.nvim_win_set_height(0, math.max(1, math.min(height, math.floor(vim.o.lines * 2 / 3))))
  vim.wo.statusline = (' fimserver %s — q closes'):format(name)
  vim.keymap.set('n', 'q', '<Cmd>close<CR>', { buffer = buffer, nowait = true })
end

--- Return the command that starts the server here; reports why and returns nil if there is none.
---@return string[]?
local function command_here()
  local command, why = server.command or program.find(0), ''
  if not command then
    command, why = program.find(0)
  end
  if not command then
    message.say(why, ERROR)
  end
  return command
end

---@param name string
---@param arguments string[]
local function show_output(name, arguments)
  local command = command_here()
  if command then
    local _, output = program.run(command, arguments, 10000)
    show_window(name, output == '' and 'The command printed nothing.' or output)
  end
end

local function show_status()
  local now = status.get()
  local buffer = meant_buffer()
  local refused = place.refuse_buffer(buffer)
  local runs = server.command and ('%s, from %s'):format(table.concat(server.command, ' '), server.where)
  local lines = {
    ('state     %s%s'):format(now.state, now.detail ~= '' and (' (' .. now.detail .. ')') or ''),
    'server    ' .. (runs or 'not started'),
    ('buffer    %s'):format(
      refused and ('not completed: ' .. refused) or (server.client_of(buffer) and 'attached' or 'not attached yet')
    ),
  }
  if now.state == 'snoozed' then
    table.insert(lines, ('snoozed   %d more minutes; `:Fimserver snooze 0` ends it'):format(status.snoozed_minutes()))
  end
  local mapped = {}
  for _, entry in ipairs(keys.report(buffer)) do
    if entry.key and (not entry.other or config.chosen_keys[entry.action.name] or owner.leads_here(entry.other)) then
      table.insert(mapped, ('%s %s'):format(entry.action.name, entry.key))
    end
  end
  table.insert(lines, 'keys      ' .. table.concat(mapped, ', '))
  local taken, key = keys.find_owner_of_accept(buffer)
  if taken then
    local whose = owner.name(taken)
    table.insert(
      lines,
      ('accept    %s belongs to %s; one of these lines in init.lua makes a key accept:'):format(key, whose)
    )
    for _, remedy in ipairs(keys.remedies(key, whose)) do
      table.insert(lines, '          ' .. remedy)
    end
  end
  if #message.recent > 0 then
    vim.list_extend(lines, { '', 'messages, newest last:' })
    vim.list_extend(lines, message.recent)
  end
  show_window('status', table.concat(lines, '\n'))
end

---@param argument string?
local function snooze(argument)
  local minutes = argument == nil and SNOOZE_MINUTES or tonumber(argument)
  if not minutes or minutes < 0 or minutes > 1440 then
    message.say((':Fimserver snooze takes minutes from 0 to 1440, not %s; 0 ends the snooze'):format(argument), ERROR)
    return
  end
  server.request('fimserver/snooze', { minutes = minutes }, function(answer)
    status.snooze(answer.minutes)
    local text = 'no automatic completions for %d minutes; `:Fimserver snooze 0` ends the snooze'
    message.say(minutes > 0 and text:format(answer.minutes) or 'the snooze has ended')
    server.on_ready()
  end)
end

---@param is_on boolean
---@param language string?
local function switch(is_on, language)
  if language then
    server.configure({ languages = { [language] = is_on } })
  else
    server.configure({ enabled = is_on })
  end
  message.say(('completions %sare %s'):format(language and ('in ' .. language .. ' ') or '', is_on and 'on' or 'off'))
end

local function languages()
  local list = { '*' }
  for _, buffer in ipairs(vim.api.nvim_list_bufs()) do
    local filetype = vim.bo[buffer].filetype
    if filetype ~= '' and vim.bo[buffer].buftype == '' and not vim.tbl_contains(list, filetype) then
      table.insert(list, filetype)
    end
  end
  return list
end

--- Sub-commands by name.
---@type table<string, fimserver.Command>
M.commands = {
  status = { takes = '', says = 'Show the state, the server, the mapped keys, and recent messages', run = show_status },
  snooze = {
    takes = '[minutes]',
    says = 'Stop automatic completions for a number of minutes (5); 0 ends the snooze',
    run = snooze,
    values = function()
      return { '0', '5', '30', '60' }
    end,
  },
  on = {
    takes = '[language]',
    says = 'Turn completions on, everywhere or in a language',
    run = function(language)
      switch(true, language)
    end,
    values = languages,
  },
  off = {
    takes = '[language]',
    says = 'Turn completions off, everywhere or in a language, until Neovim ends',
    run = function(language)
      switch(false, language)
    end,
    values = languages,
  },
  explain = {
    takes = '',
    says = 'Explain why there was or was no ghost text',
    run = function()
      local buffer = meant_buffer()
      local refused = place.refuse_buffer(buffer)
      if refused then
        message.say('nothing is completed in this buffer: ' .. refused)
      else
        server.execute('fimserver.explain', { vim.uri_from_bufnr(buffer) })
      end
    end,
  },
  mode = {
    takes = '[mode]',
    says = 'Set the decoding mode until Neovim ends; without an argument, show the mode',
    run = function(mode)
      if not mode then
        message.say(('mode is %s'):format(config.options.settings.mode or 'that of config.toml, or auto'))
      elseif not vim.tbl_contains(MODES, mode) then
        message.say((':Fimserver mode takes %s, not %s'):format(table.concat(MODES, ', '), mode), ERROR)
      else
        server.configure({ mode = mode })
        message.say('mode is ' .. mode)
      end
    end,
    values = function()
      return MODES
    end,
  },
  restart = { takes = '', says = 'Load the model again; start the server if it has ended', run = server.restart },
  log = {
    takes = '',
    says = "Show the end of the daemon's log",
    run = function()
      show_output('log', { 'daemon', 'logs' })
    end,
  },
  stats = {
    takes = '',
    says = 'Show how many completions were shown and accepted',
    run = function()
      local command = command_here()
      if command then
        local code, output = program.run(command, { 'stats' }, 10000)
        show_window('stats', code == 2 and 'This version of fimserver has no `stats`; install a newer one.' or output)
      end
    end,
  },
  trigger = {
    takes = '',
    says = 'Request ghost text at the cursor, and enter insert mode',
    run = function()
      if not vim.startswith(vim.api.nvim_get_mode().mode, 'i') then
        local column = vim.api.nvim_win_get_cursor(0)[2]
        local is_last = column >= #vim.api.nvim_get_current_line() - 1
        vim.cmd(is_last and 'startinsert!' or 'startinsert')
      end
      vim.schedule(function()
        if not require('fimserver').trigger() then
          message.say('no completion is possible here; :Fimserver status shows why')
        end
      end)
    end,
  },
}

---@return string[]
local function names()
  local list = vim.tbl_keys(M.commands)
  table.sort(list)
  return list
end

--- Run a sub-command; without one, `status`.
---@param arguments string[]
function M.run(arguments)
  local name = arguments[1] or 'status'
  local command = M.commands[name]
  if not command then
    message.say((':Fimserver has no sub-command %s; it has %s'):format(name, table.concat(names(), ', ')), ERROR)
  elseif not require('fimserver').is_set_up() then
    message.say("the plugin is not set up; add require('fimserver').setup() to init.lua", ERROR)
  else
    command.run(arguments[2])
  end
end

--- Complete the command line.
---@param beginning string
---@param line string
---@return string[]
function M.complete(beginning, line)
  local words = vim.split(vim.trim(line), '%s+')
  local is_first = #words < 2 or (#words == 2 and beginning ~= '')
  local command = M.commands[words[2]]
  local list = is_first and names() or (command and command.values and command.values()) or {}
  return vim.tbl_filter(function(entry)
    return vim.startswith(entry, beginning)
  end, list)
end

return M
