--- Maps the keys of insert mode: <Plug> mappings, and default keys that yield to other mappings.
---
--- A default key is mapped for one buffer when insert mode begins there, and only if nothing else has mapped it. If
--- something maps it later, ours is removed at the next InsertEnter. Without ghost text, a key does what it did before.
local config = require('fimserver.config')

local M = {}

local PREFIX = 'fimserver: '

---@class fimserver.Action
---@field name string Name in the option `keys`.
---@field plug string
---@field says string For key lists and the help page.
---@field run fun(): boolean Returns false if there was nothing to do; the key then does what it did before.

---@param name string
---@return fun(): boolean
local function call(name)
  return function()
    return require('fimserver')[name]()
  end
end

---@type fimserver.Action[]
M.actions = {
  { name = 'accept', says = 'Accept all of the ghost text', run = call('accept') },
  { name = 'accept_word', says = 'Accept the next word', run = call('accept_word') },
  { name = 'accept_line', says = 'Accept the next line', run = call('accept_line') },
  { name = 'next', says = 'Show the next candidate', run = call('next') },
  { name = 'previous', says = 'Show the previous candidate', run = call('previous') },
  { name = 'dismiss', says = 'Hide the ghost text', run = call('dismiss') },
  { name = 'trigger', says = 'Request ghost text now', run = call('trigger') },
}
for _, action in ipairs(M.actions) do
  action.plug = ('<Plug>(fimserver-%s)'):format(action.name:gsub('_', '-'))
end

---@param keys string
local function to_codes(keys)
  return vim.api.nvim_replace_termcodes(keys, true, true, true)
end

---@param mappings vim.api.keyset.get_keymap[]
---@param key string
---@return vim.api.keyset.get_keymap?
local function find(mappings, key)
  local codes = to_codes(key)
  for _, mapping in ipairs(mappings) do
    if mapping.lhsraw == codes or mapping.lhsrawalt == codes then
      return mapping
    end
  end
  return nil
end

---@param mapping vim.api.keyset.get_keymap?
local function is_ours(mapping)
  return mapping ~= nil and vim.startswith(mapping.desc or '', PREFIX)
end

--- Return whether this is Neovim's own mapping of <Tab> (jump in a snippet, or insert a tab), which may be replaced.
---@param mapping vim.api.keyset.get_keymap?
local function is_default(mapping)
  return mapping ~= nil and vim.startswith(mapping.desc or '', 'vim.snippet.jump')
end

--- Do what a key did before the plugin mapped it.
---@param key string
---@param mapping vim.api.keyset.get_keymap? Mapping below the plugin's.
local function fall_back(key, mapping)
  local keys, flags = to_codes(key), 'n'
  if mapping then
    flags = mapping.noremap == 1 and 'n' or 'm'
    local result ---@type any
    if mapping.callback then
      result = mapping.callback()
    elseif mapping.expr == 1 then
      result = vim.api.nvim_eval(mapping.rhs)
    else
      keys = to_codes(mapping.rhs or '')
    end
    if mapping.expr == 1 and type(result) == 'string' then
      keys = mapping.replace_keycodes == 1 and to_codes(result) or result
    elseif mapping.callback then
      return
    end
  end
  vim.api.nvim_feedkeys(keys, flags .. 'i', false)
end

--- Buffer-local mappings of others that are covered by keys that the user set.
---@type table<integer, table<string, vim.api.keyset.get_keymap>>
local covered = {}

---@param buffer integer
---@param action fimserver.Action
---@param key string
local function map_key(buffer, action, key)
  vim.keymap.set('i', key, function()
    if not action.run() then
      local beneath = covered[buffer] and covered[buffer][key] or find(vim.api.nvim_get_keymap('i'), key)
      fall_back(key, beneath)
    end
  end, { buffer = buffer, desc = PREFIX .. action.says })
end

--- Return the other mapping of a key in a buffer: the buffer-local one, else the global one.
---@param buffer integer
---@param key string
---@return vim.api.keyset.get_keymap?
function M.find_other(buffer, key)
  local own = find(vim.api.nvim_buf_get_keymap(buffer, 'i'), key)
  if own and not is_ours(own) then
    return own
  end
  local everywhere = find(vim.api.nvim_get_keymap('i'), key)
  return everywhere and not is_default(everywhere) and everywhere or nil
end

--- Map those keys in a buffer that are free.
---@param buffer integer
function M.map(buffer)
  for _, action in ipairs(M.actions) do
    local key = config.options.keys[action.name]
    if key then
      local own = find(vim.api.nvim_buf_get_keymap(buffer, 'i'), key)
      local mine = is_ours(own)
      local other = M.find_other(buffer, key)
      if config.chosen_keys[action.name] then
        if not mine then
          covered[buffer] = covered[buffer] or {}
          covered[buffer][key] = own
          map_key(buffer, action, key)
        end
      elseif mine and other then
        vim.keymap.del('i', key, { buffer = buffer })
      elseif not mine and not other then
        map_key(buffer, action, key)
      end
    end
  end
end

--- Remove the plugin's keys from all buffers, because setup() was called again.
function M.unmap()
  for _, buffer in ipairs(vim.api.nvim_list_bufs()) do
    for _, mapping in ipairs(vim.api.nvim_buf_get_keymap(buffer, 'i')) do
      if is_ours(mapping) then
        vim.keymap.del('i', mapping.lhs, { buffer = buffer })
      end
    end
  end
  covered = {}
end

--- Return the key of each action in a buffer and its other mapping, for health checks.
---@param buffer integer
---@return { action: fimserver.Action, key: string|false, other: vim.api.keyset.get_keymap? }[]
function M.report(buffer)
  local list = {}
  for _, action in ipairs(M.actions) do
    local key = config.options.keys[action.name]
    local other = key and M.find_other(buffer, key) or nil
    table.insert(list, { action = action, key = key, other = other })
  end
  return list
end

--- Define the <Plug> mappings, for users who map keys manually. Without ghost text they do nothing.
function M.map_plugs()
  for _, action in ipairs(M.actions) do
    vim.keymap.set('i', action.plug, action.run, { desc = PREFIX .. action.says })
  end
end

return M
