local config = require('fimserver.config')
local program = require('fimserver.program')
local test, same = _G.test, _G.same

local root = vim.uv.fs_realpath(vim.uv.fs_mkdtemp(vim.fs.joinpath(vim.uv.os_tmpdir(), 'fimserver-XXXXXX')))

--- Write a program that prints its arguments to a path below the root.
local function put_program(path)
  path = vim.fs.joinpath(root, path)
  vim.fn.mkdir(vim.fs.dirname(path), 'p')
  vim.fn.writefile({ '#!/bin/sh', 'echo "$@"' }, path)
  vim.uv.fs_chmod(path, 493)
  return path
end

local function buffer_of(path)
  local buffer = vim.api.nvim_create_buf(true, false)
  vim.api.nvim_buf_set_name(buffer, vim.fs.joinpath(root, path))
  return buffer
end

test('find() tries PATH, then the nearest trusted virtual environment, and else returns a fix', function()
  vim.env.PATH = vim.fs.joinpath(root, 'bin')
  program.own = vim.fs.joinpath(root, 'checkout/.venv/bin/fimserver')
  local buffer = buffer_of('project/deep/er/a.py')
  local command, why = program.find(buffer)
  same(command, nil)
  assert(why:find('in the .venv of your project', 1, true), why)
  vim.fn.mkdir(vim.fs.joinpath(root, 'project/deep/.venv/bin'), 'p') -- without a server
  local in_venv = put_program('project/.venv/bin/fimserver')
  local trusted = {}
  vim.secure.read = function(path) -- luacheck: ignore 122  the real one asks the user
    table.insert(trusted, path)
    return #trusted > 1 and 'text' or nil
  end
  command, why = program.find(buffer)
  same(command, nil)
  assert(why:find('is not trusted yet', 1, true), why)
  same((program.find(buffer)), nil)
  same(#trusted, 1) -- not asked again automatically
  program.forget()
  same(program.find(buffer), { in_venv, 'lsp' })
  config.set({ venv = false })
  same((program.find(buffer)), nil)
  put_program('checkout/.venv/bin/fimserver')
  same(program.find(buffer), { program.own, 'lsp' })
  config.set({})
  program.own = in_venv -- the project is the plugin's checkout
  program.forget()
  trusted = {}
  same({ program.find(buffer), trusted }, { { in_venv, 'lsp' }, {} })
  local on_path = put_program('bin/fimserver')
  same(program.find(buffer), { on_path, 'lsp' })
  config.set({ cmd = in_venv })
  same(program.find(buffer), { in_venv, 'lsp' })
  config.set({ cmd = { '/no/such', 'lsp' } })
  same(select('#', program.find(buffer)), 2)
  same((program.find(buffer)), nil)
  config.set({})
end)

test('other arguments are passed through a wrapper', function()
  local wrapper = put_program('bin/wrapper')
  local code, output = program.run({ wrapper, 'run', 'fimserver', 'lsp', '--threads', '2' }, { '--version' }, 5000)
  same({ code, output }, { 0, 'run fimserver --version\n' })
  same((program.run({ '/no/such', 'lsp' }, {}, 5000)), 127)
end)
