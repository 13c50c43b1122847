local config = require('fimserver.config')
local keys = require('fimserver.keys')
local owner = require('fimserver.owner')
local test, same = _G.test, _G.same

local ACCEPT = 'fimserver: Accept all of the ghost text'

local function mapped(buffer, key)
  local mapping = vim.api.nvim_buf_call(buffer, function()
    return vim.fn.maparg(key, 'i', false, true)
  end)
  return mapping.desc
end

local function fresh(options)
  keys.unmap()
  config.set(options or {})
  return vim.api.nvim_create_buf(true, false)
end

test('default keys are mapped for all buffers, and Neovim has its own again after unmap()', function()
  local buffer = fresh()
  local before = mapped(buffer, '<Tab>')
  keys.map_defaults()
  same({ mapped(buffer, '<Tab>'), mapped(buffer, '<M-]>') }, { ACCEPT, 'fimserver: Show the next candidate' })
  keys.unmap()
  same({ mapped(buffer, '<Tab>'), mapped(buffer, '<M-]>') }, { before, nil })
end)

test('a default key yields to another mapping, and to one that comes later', function()
  local buffer = fresh()
  vim.keymap.set('i', '<Tab>', 'x', { desc = 'theirs' })
  keys.map_defaults()
  same(mapped(buffer, '<Tab>'), 'theirs')
  vim.keymap.del('i', '<Tab>')
  keys.map_defaults()
  same(mapped(buffer, '<Tab>'), ACCEPT)
  vim.keymap.set('i', '<Tab>', 'x', { desc = 'theirs' })
  keys.unmap()
  same(mapped(buffer, '<Tab>'), 'theirs')
  vim.keymap.del('i', '<Tab>')
end)

test('a key that the user sets covers other mappings, and another setup() removes it', function()
  local buffer = fresh({ keys = { accept = '<C-y>' } })
  vim.keymap.set('i', '<C-y>', 'x', { desc = 'theirs' })
  keys.map_defaults()
  keys.map_chosen(buffer)
  same(mapped(buffer, '<C-y>'), ACCEPT)
  same(vim.startswith(mapped(buffer, '<Tab>') or '', 'fimserver'), false)
  keys.unmap()
  same(mapped(buffer, '<C-y>'), 'theirs')
  vim.keymap.del('i', '<C-y>')
end)

test('a plugin that maps a chosen key again and again is covered, and still called once', function()
  local buffer = fresh({ keys = { accept = '<C-y>' } })
  vim.api.nvim_set_current_buf(buffer)
  local calls = 0
  local function press()
    vim.api.nvim_buf_get_keymap(buffer, 'i')[1].callback()
  end
  for _ = 1, 5 do
    keys.map_chosen(buffer)
    local ours = vim.api.nvim_buf_get_keymap(buffer, 'i')[1].callback
    vim.keymap.set('i', '<C-y>', function()
      calls = calls + 1
      return ours()
    end, { buffer = buffer, desc = 'theirs' })
  end
  keys.map_chosen(buffer)
  same(mapped(buffer, '<C-y>'), ACCEPT)
  press()
  same(calls, 1)
end)

test('the owner of the key of accept is found, unless its mapping leads to fimserver', function()
  local buffer = fresh()
  same((keys.find_owner_of_accept(buffer)), nil)
  local list = {
    function()
      return require('fimserver').accept()
    end,
  }
  local function chain()
    return list[1]()
  end
  local function other()
    return vim.fn.pumvisible()
  end
  for _, case in ipairs({
    { 'x', true },
    { other, true },
    { chain, false },
    { "<Cmd>lua require('fimserver').accept()<CR>", false },
  }) do
    vim.keymap.set('i', '<Tab>', case[1])
    local found, key = keys.find_owner_of_accept(buffer)
    same({ found ~= nil, key }, { case[2], '<Tab>' })
  end
  vim.keymap.set('i', '<Tab>', 'x')
  for _, options in ipairs({ { accept = false }, { accept = '<Tab>' } }) do
    fresh({ keys = options })
    same((keys.find_owner_of_accept(buffer)), nil)
  end
  vim.keymap.del('i', '<Tab>')
end)

test('an owner is named by its plugin, or by the file of the user', function()
  local function callback_of(path)
    return { callback = assert(loadstring('return 1', '@' .. path)) }
  end
  same(owner.name(callback_of('/x/pack/nvim-cmp/lua/cmp/utils/keymap.lua')), 'nvim-cmp')
  same(owner.name(callback_of('/x/a.vim/autoload/a.vim')), 'a.vim')
  same(owner.name(callback_of(vim.fn.stdpath('config') .. '/lua/keys.lua')), 'your keys.lua')
  same(owner.name({ rhs = 'x' }), 'another mapping')
end)
