local config = require('fimserver.config')
local keys = require('fimserver.keys')
local test, same = _G.test, _G.same

local function mapped(buffer, key)
  local mapping = vim.api.nvim_buf_call(buffer, function()
    return vim.fn.maparg(key, 'i', false, true)
  end)
  return mapping.desc
end

local function fresh()
  config.set({})
  keys.unmap()
  return vim.api.nvim_create_buf(true, false)
end

test('default keys are mapped in the buffer only', function()
  local buffer, other = fresh(), vim.api.nvim_create_buf(true, false)
  keys.map(buffer)
  same(mapped(buffer, '<Tab>'), 'fimserver: Accept all of the ghost text')
  assert(not vim.startswith(mapped(other, '<Tab>') or '', 'fimserver'))
end)

test('a default key yields to another mapping, also to a later one', function()
  local buffer = fresh()
  vim.keymap.set('i', '<Tab>', 'x', { desc = 'theirs' })
  keys.map(buffer)
  same(mapped(buffer, '<Tab>'), 'theirs')
  vim.keymap.del('i', '<Tab>')
  keys.map(buffer)
  same(mapped(buffer, '<Tab>'), 'fimserver: Accept all of the ghost text')
  vim.keymap.set('i', '<Tab>', 'x', { desc = 'theirs' })
  keys.map(buffer)
  same(mapped(buffer, '<Tab>'), 'theirs')
  vim.keymap.del('i', '<Tab>')
end)

test('a key that the user sets covers other mappings, and another setup() removes it', function()
  local buffer = fresh()
  config.set({ keys = { accept = '<C-y>' } })
  vim.keymap.set('i', '<C-y>', 'x', { desc = 'theirs' })
  keys.map(buffer)
  same(mapped(buffer, '<C-y>'), 'fimserver: Accept all of the ghost text')
  same(mapped(buffer, '<Tab>') and vim.startswith(mapped(buffer, '<Tab>'), 'fimserver') or false, false)
  keys.unmap()
  same(mapped(buffer, '<C-y>'), 'theirs')
  vim.keymap.del('i', '<C-y>')
end)
