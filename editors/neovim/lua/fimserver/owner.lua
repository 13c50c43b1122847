--- Describes a mapping of a key that is not the plugin's: whose it is, and whether it leads to fimserver.
---
--- Knows:  Lua functions and their upvalues.  Never: buffers, options.
local M = {}

local MOST_VALUES = 3000 -- because a plugin's functions may lead to all of its state

--- Return the file that defines a mapping; nil if it is unknown.
---@param mapping vim.api.keyset.get_keymap
---@return string?
local function file_of(mapping)
  if mapping.callback then
    return debug.getinfo(mapping.callback, 'S').source:match('^@(.*)')
  end
  local script = (mapping.sid or 0) > 0 and vim.fn.getscriptinfo({ sid = mapping.sid })[1]
  return script and script.name or nil
end

--- Return the plugin that a mapping belongs to, or the user's file, in words.
---@param mapping vim.api.keyset.get_keymap
---@return string
function M.name(mapping)
  local file = file_of(mapping)
  if not file then
    return 'another mapping'
  end
  file = vim.fs.normalize(file)
  local config = vim.fs.normalize(vim.fn.stdpath('config') --[[@as string]]) .. '/'
  local plugin = file:match('.*/([^/]+)/lua/') or file:match('.*/([^/]+)/plugin/') or file:match('.*/([^/]+)/autoload/')
  if plugin and not vim.startswith(file, config) then
    return plugin
  end
  return 'your ' .. vim.fs.basename(file)
end

--- Return whether a function is the plugin's, or names it.
---@param value function
local function names_fimserver(value)
  local info = debug.getinfo(value, 'S')
  if info.what ~= 'Lua' then
    return false
  elseif info.source:find('lua/fimserver/', 1, true) then
    return true
  end
  local dumped, code = pcall(string.dump, value, true) -- the constants of a function are plain text in its bytecode
  return dumped and code:find('fimserver', 1, true) ~= nil
end

--- Return whether a mapping calls fimserver: directly, or from a table or function that it was made with.
---@param mapping vim.api.keyset.get_keymap
---@return boolean
function M.leads_here(mapping)
  if (mapping.rhs or ''):find('fimserver', 1, true) then
    return true
  end
  local found = { mapping.callback } ---@type (table|function)[]
  local seen = { [_G] = true, [package.loaded] = true, [vim] = true } ---@type table<table|function, true>
  local function add(value)
    if (type(value) == 'table' or type(value) == 'function') and not seen[value] and #found < MOST_VALUES then
      seen[value] = true
      table.insert(found, value)
    end
  end
  local at = 1
  while found[at] do -- breadth first, because the list of a key's actions is near
    local value = found[at]
    at = at + 1
    if type(value) == 'table' then
      for _, entry in next, value do
        add(entry)
      end
    else
      if names_fimserver(value) then
        return true
      end
      local i, name, upvalue = 1, debug.getupvalue(value, 1)
      while name do
        add(upvalue)
        i = i + 1
        name, upvalue = debug.getupvalue(value, i)
      end
    end
  end
  return false
end

return M
