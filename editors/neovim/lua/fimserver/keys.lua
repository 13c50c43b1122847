--- Maps the keys of insert mode: <Plug> mappings, and default keys that yield to other mappings.
---
--- A default key is mapped once for all buffers, and only if nothing else has mapped it. A key that the user set covers
--- other mappings in buffers that are completed. Without ghost text, a key does what it did before.
local config = require('fimserver.config')
local owner = require('fimserver.owner')

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
      result = vim.api.nvim_eval(to_codes(mapping.rhs)) -- as Neovim keeps it: with bytes instead of <names>
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

--- Neovim's own mappings that default keys have replaced.
---@type table<string, vim.api.keyset.get_keymap>
local replaced = {}

--- Buffer-local mappings of others that are covered by keys that the user set, by buffer and key.
---@type table<string, vim.api.keyset.get_keymap>
local covered = {}

---@param action fimserver.Action
---@param key string
---@param buffer? integer Maps it for this buffer only.
---@param beneath fun(): vim.api.keyset.get_keymap? The mapping that the key has without ghost text.
local function map_key(action, key, buffer, beneath)
  vim.keymap.set('i', key, function()
    if not action.run() then
      fall_back(key, beneath())
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
  return everywhere and not is_default(everywhere) and not is_ours(everywhere) and everywhere or nil
end

--- Return the mapping of another plugin that takes the default key of `accept` and does not lead to fimserver.
---@param buffer integer
---@return vim.api.keyset.get_keymap? mapping
---@return string key
function M.find_owner_of_accept(buffer)
  local key = config.options.keys.accept
  local other = key and not config.chosen_keys.accept and M.find_other(buffer, key) or nil
  return other and not owner.leads_here(other) and other or nil, key or ''
end

--- Return the two lines of Lua that make a key accept, the first where the other mapping is kept.
---@param key string
---@param name string Of the plugin that the key belongs to.
---@return string[]
function M.remedies(key, name)
  local line = "require('fimserver').setup({ keys = { accept = '%s' } }) -- %s"
  return { line:format(key, 'ghost text first, then ' .. name), line:format('<C-l>', 'another key') }
end

--- Map the default keys that are free, for all buffers: other plugins call a global mapping if they have nothing to do.
function M.map_defaults()
  for _, action in ipairs(M.actions) do
    local key = config.options.keys[action.name]
    local there = key and find(vim.api.nvim_get_keymap('i'), key)
    if key and not config.chosen_keys[action.name] and (not there or is_default(there)) then
      replaced[key] = there
      map_key(action, key, nil, function()
        return there
      end)
    end
  end
end

--- Map the keys that the user set, in a buffer. A completion plugin may map them again each time insert mode begins,
--- and call this plugin's mapping then; calling its newest mapping would be a circle, so its first one is called.
---@param buffer integer
function M.map_chosen(buffer)
  for _, action in ipairs(M.actions) do
    local key = config.chosen_keys[action.name] and config.options.keys[action.name]
    local own = key and find(vim.api.nvim_buf_get_keymap(buffer, 'i'), key)
    if key and not is_ours(own) then
      local id = buffer .. key
      local beneath = own and owner.leads_here(own) and covered[id] or own
      covered[id] = beneath
      map_key(action, key, buffer, function()
        return beneath or find(vim.api.nvim_get_keymap('i'), key)
      end)
    end
  end
end

---@param mappings vim.api.keyset.get_keymap[]
---@param buffer? integer
local function remove_ours(mappings, buffer)
  for _, mapping in ipairs(mappings) do
    if is_ours(mapping) and not vim.startswith(mapping.lhs, '<Plug>') then
      vim.keymap.del('i', mapping.lhs, { buffer = buffer })
    end
  end
end

--- Remove the plugin's keys, because setup() was called again.
function M.unmap()
  for _, buffer in ipairs(vim.api.nvim_list_bufs()) do
    remove_ours(vim.api.nvim_buf_get_keymap(buffer, 'i'), buffer)
  end
  remove_ours(vim.api.nvim_get_keymap('i'))
  for key, mapping in pairs(replaced) do
    if not find(vim.api.nvim_get_keymap('i'), key) then
      vim.keymap.set('i', key, mapping.callback, { expr = true, silent = true, desc = mapping.desc })
    end
  end
  replaced, covered = {}, {}
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
