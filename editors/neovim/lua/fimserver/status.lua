--- Keeps fimserver's state for a status line; the User autocmd FimserverStatus reports changes.
---
---   stopped    no server yet             thinking   a completion is being computed
---   loading    the model is loading      snoozed    no automatic completions for a while
---   ready      requests are answered     off        the setting `enabled` is false
---   error      `detail` has the error and its fix
local M = {}

---@alias fimserver.State 'stopped'|'loading'|'ready'|'thinking'|'snoozed'|'off'|'error'

---@class fimserver.Status
---@field state fimserver.State
---@field detail string Last message of the server, or an error and its fix.

local server = { state = 'stopped', detail = 'no file has been opened yet' }
local is_enabled = true
local thoughts, is_thinking = 0, false -- thinking is reported only after LONG_MS, because most answers are faster
local LONG_MS = 150
local snoozed_until = 0 -- in vim.uv.now() milliseconds
local reported = '' -- state reported last
local is_telling = false
local displayed_at = -math.huge -- last call of line(), in vim.uv.now() milliseconds
local DISPLAYED_MS = 10000

---@return number
local function snooze_left_ms()
  return math.max(0, snoozed_until - vim.uv.now())
end

--- Return the current state.
---@return fimserver.Status
function M.get()
  local state = server.state
  if state == 'ready' or state == 'loading' then
    if not is_enabled then
      state = 'off'
    elseif snooze_left_ms() > 0 then
      state = 'snoozed'
    elseif state == 'ready' and is_thinking then
      state = 'thinking'
    end
  end
  return { state = state, detail = server.detail }
end

--- Return the minutes until the snooze ends, rounded up.
---@return integer
function M.snoozed_minutes()
  return math.ceil(snooze_left_ms() / 60000)
end

--- Return a short text for a status line; "" before a server was started.
---@return string
function M.line()
  displayed_at = vim.uv.now()
  local state = M.get().state
  if state == 'stopped' then
    return ''
  end
  local words = { ready = 'fim', thinking = 'fim …', error = 'fim: error (:Fimserver status)' }
  if state == 'snoozed' then
    return ('fim: snoozed %d min'):format(M.snoozed_minutes())
  end
  local host = server.detail:match('^%S+ at https?://([^%s/]+) %(') -- the server that gets the code
  if state == 'ready' and host then
    return 'fim @ ' .. host
  end
  return words[state] or ('fim: ' .. state)
end

--- Return whether a status line shows the state: it has asked for it lately.
---@return boolean
function M.is_displayed()
  return vim.uv.now() - displayed_at < DISPLAYED_MS
end

--- Report a change, once for all changes in this turn of the event loop.
local function tell()
  if is_telling then
    return
  end
  is_telling = true
  vim.schedule(function()
    is_telling = false
    local now = M.get()
    local key = now.state .. now.detail
    if key ~= reported then
      reported = key
      vim.api.nvim_exec_autocmds('User', { pattern = 'FimserverStatus', modeline = false, data = now })
      vim.cmd.redrawstatus({ bang = true })
    end
  end)
end

---@param state 'stopped'|'loading'|'ready'|'error'
---@param detail string
function M.set(state, detail)
  server = { state = state, detail = detail }
  tell()
end

--- Record whether a completion is being computed.
---@param thinking boolean
function M.think(thinking)
  thoughts = thoughts + 1
  if not thinking then
    if is_thinking then
      is_thinking = false
      tell()
    end
    return
  end
  local this = thoughts
  vim.defer_fn(function()
    if this == thoughts and not is_thinking then
      is_thinking = true
      tell()
    end
  end, LONG_MS)
end

---@param enabled boolean
function M.enable(enabled)
  is_enabled = enabled
  tell()
end

---@param minutes number 0 ends the snooze.
function M.snooze(minutes)
  snoozed_until = vim.uv.now() + minutes * 60000
  tell()
  if minutes > 0 then
    vim.defer_fn(tell, minutes * 60000 + 50)
  end
end

return M
