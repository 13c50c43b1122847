local config = require('fimserver.config')
local outside = require('fimserver.outside')
local program = require('fimserver.program')
program.own = '/no/such'
local test, same = _G.test, _G.same

local root = vim.uv.fs_realpath(vim.uv.fs_mkdtemp(vim.fs.joinpath(vim.uv.os_tmpdir(), 'fimserver-XXXXXX')))

local function at(path)
  return vim.fs.joinpath(root, path)
end

local function put_program(path)
  vim.fn.mkdir(vim.fs.dirname(at(path)), 'p')
  vim.fn.writefile({ '#!/bin/sh', 'pwd; echo "$PATH|$PYTHONPATH|$@"' }, at(path))
  vim.uv.fs_chmod(at(path), 493)
  return at(path)
end

local function link(target, path)
  vim.fn.mkdir(vim.fs.dirname(at(path)), 'p')
  assert(vim.uv.fs_symlink(target, at(path)))
  return at(path)
end

--- Run in the folder of a hostile repository; the answers to Neovim's question about trust are counted.
---@param search_path string
---@param run fun(buffer: integer, asked: string[])
local function in_repository(search_path, run)
  local read, path, cwd = vim.secure.read, vim.env.PATH, vim.fn.getcwd()
  local asked = {}
  vim.secure.read = function(name) -- luacheck: ignore 122  the real one asks the user
    table.insert(asked, name)
    return nil
  end
  local buffer = vim.api.nvim_create_buf(true, false)
  vim.api.nvim_buf_set_name(buffer, at('repo/src/a.py'))
  program.forget()
  vim.fn.chdir(at('repo/src'))
  vim.env.PATH = search_path
  local ok, err = xpcall(run, debug.traceback, buffer, asked)
  vim.env.PATH, vim.secure.read = path, read -- luacheck: ignore 122
  vim.fn.chdir(cwd)
  vim.api.nvim_buf_delete(buffer, { force = true })
  program.forget()
  config.set({})
  assert(ok, err)
end

local in_repo = put_program('repo/fimserver')
put_program('repo/src/fimserver')
put_program('repo/src/bin/fimserver')
vim.fn.mkdir(at('repo/.git'), 'p')
local safe = put_program('opt/fimserver')

test('relative and empty entries of PATH find nothing, not even a question', function()
  for _, entries in ipairs({ '.', '', ':/usr/bin', '/usr/bin:', '/usr/bin::/bin', 'bin', './bin', '..', '../src' }) do
    in_repository(entries, function(buffer, asked)
      same({ (program.find(buffer)), asked }, { nil, {} })
      config.set({ cmd = 'fimserver' })
      same({ (program.find(buffer)), asked }, { nil, {} })
    end)
  end
end)

test('what PATH finds in the project needs trust, also through links', function()
  link(in_repo, 'links/file/fimserver')
  link(at('repo'), 'links/folder')
  link('/bin/true', 'repo/out/fimserver')
  link(at('repo/out/fimserver'), 'links/there_and_back/fimserver')
  local inside, links = { 'repo', 'repo/src', 'repo/src/bin', 'repo/out' }, { 'file', 'folder', 'there_and_back' }
  for _, name in ipairs(links) do
    table.insert(inside, 'links/' .. name)
  end
  for _, folder in ipairs(inside) do
    in_repository('.:' .. at(folder), function(buffer, asked)
      same((program.find(buffer)), nil)
      same(asked, { at(folder .. '/fimserver') })
    end)
    in_repository(at(folder), function(buffer, asked)
      config.set({ cmd = { 'fimserver', 'lsp' } })
      same((program.find(buffer)), nil)
      same(#asked, 1)
    end)
    in_repository(at(folder) .. ':' .. at('opt'), function(buffer, asked)
      same(program.find(buffer), { safe, 'lsp' })
      same(asked, {})
    end)
  end
end)

test('the project is known by its marker, the file and the current folder', function()
  put_program('plain/bin/fimserver')
  in_repository(at('plain/bin'), function(buffer, asked)
    same(program.find(buffer), { at('plain/bin/fimserver'), 'lsp' })
    vim.fn.chdir(at('plain'))
    same((program.find(buffer)), nil)
    same(#asked, 1)
  end)
end)

test('the option cmd: a full path runs, a relative one in the project needs trust', function()
  in_repository('/usr/bin:/bin', function(buffer, asked)
    config.set({ cmd = in_repo })
    same(program.find(buffer), { in_repo, 'lsp' })
    config.set({ cmd = { './fimserver', 'lsp' } })
    same((program.find(buffer)), nil)
    same(asked, { at('repo/src/fimserver') })
    vim.fn.chdir(at('opt'))
    vim.api.nvim_buf_set_name(buffer, at('repo/b.py'))
    config.set({ cmd = { '../opt/fimserver', 'lsp' } })
    same((program.find(buffer)), nil) -- the current folder counts
  end)
end)

test('programs run outside the project, without its folders in search paths', function()
  in_repository('.:' .. at('repo') .. '::/usr/bin:/bin', function()
    vim.api.nvim_set_current_buf(vim.fn.bufnr(at('repo/src/a.py')))
    vim.env.PYTHONPATH = '.:' .. at('repo/src')
    local code, output = program.run({ safe, 'lsp' }, { 'stats' }, 5000)
    vim.env.PYTHONPATH = nil
    local home = vim.uv.fs_realpath(vim.uv.os_homedir())
    same({ code, output }, { 0, home .. '\n/usr/bin:/bin||stats\n' })
  end)
end)

test('the home folder and those above are no project', function()
  in_repository('/usr/bin', function(buffer)
    vim.fn.chdir(vim.uv.os_homedir())
    vim.api.nvim_buf_set_name(buffer, vim.fs.joinpath(vim.uv.os_homedir(), 'a.py'))
    assert(not outside.is_inside(vim.fs.joinpath(vim.uv.os_homedir(), 'bin/x'), outside.folders(buffer)))
  end)
end)
