--- Shows once what a new user cannot see: that another plugin has the key of `accept`, and that the model is loading.
local keys = require('fimserver.keys')
local message = require('fimserver.message')
local owner = require('fimserver.owner')
local status = require('fimserver.status')

local M = {}

local has_shown, has_waited = false, false

--- Handle ghost text that was drawn: check once that its key works.
---@param buffer integer
function M.on_shown(buffer)
  if has_shown then
    return
  end
  has_shown = true
  local taken, key = keys.find_owner_of_accept(buffer)
  if taken then
    local text = '%s does not accept: it belongs to %s; :Fimserver shows the fix'
    message.say_once(text:format(key, owner.name(taken)))
  end
end

--- Handle a request that got nothing: report once that the model is loading, unless a status line shows it.
function M.on_nothing()
  if has_waited or status.get().state ~= 'loading' then
    return
  end
  has_waited = true
  if not status.is_displayed() then
    message.say('the model is loading (some seconds)')
  end
end

return M
