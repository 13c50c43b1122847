--- Finds the program `fimserver`; runs it for what it prints.
local config = require('fimserver.config')

local M = {}

M.remedy = 'put it on PATH, or into the .venv of your project, '
  .. "or name it: require('fimserver').setup({ cmd = { '/path/to/fimserver', 'lsp' } })"

--- Where programs are in a virtual environment, on this system.
local IN_VENV = vim.fn.has('win32') == 1 and 'Scripts/fimserver.exe' or 'bin/fimserver'

---@param path string
local function is_program(path)
  return vim.fn.executable(path) == 1
end

--- The program in the virtual environment of a file's folder, or of the nearest one above it.
---@param folder string
---@return string?
local function find_in_venv(folder)
  local venv = config.options.venv
  if not venv then
    return nil
  end
  for _, found in ipairs(vim.fs.find(venv, { path = folder, upward = true, limit = math.huge })) do
    local path = vim.fs.joinpath(found, IN_VENV)
    if is_program(path) then
      return path
    end
  end
  return nil
end

--- Whether the person trusts a program that lies in a project, as Neovim asks and remembers (|vim.secure.read()|).
--- Not asked again in this session.
---@type table<string, boolean>
local answers = {}

--- What Neovim has noted of a program: its file has a hash and a path in each line, or a `!` for what was denied.
---@param path string
---@return 'allowed'|'denied'|nil
local function trust_of(path)
  local file = io.open(vim.fs.joinpath(vim.fn.stdpath('state'), 'trust'))
  if not file then
    return nil
  end
  local found = nil
  for line in file:lines() do
    local hash, name = line:match('^(%S+) (.+)$')
    if name == path then
      found = hash == '!' and 'denied' or 'allowed'
    end
  end
  file:close()
  return found
end

--- Called when a program that was looked at is trusted.
---@type fun()
M.on_trusted = function() end

---@param path string
---@return boolean trusted
---@return boolean asked Now, so the person knows.
local function is_trusted(path)
  if answers[path] ~= nil then
    return answers[path], false
  end
  local real = vim.uv.fs_realpath(path) or path
  local asked = trust_of(real) ~= 'denied' -- which is not asked about again
  local trusted = vim.secure.read(path) ~= nil
  answers[path] = trusted
  local viewed = not trusted and vim.fn.bufnr(vim.fn.fnameescape(real)) or -1
  if viewed > 0 then -- they look at it, and may say :trust
    vim.api.nvim_create_autocmd('BufWinLeave', {
      buffer = viewed,
      once = true,
      callback = function()
        if trust_of(real) == 'allowed' then -- else it would be asked again in the middle of typing
          answers[path] = nil
          vim.schedule(M.on_trusted)
        end
      end,
    })
  end
  return trusted, asked and not trusted
end

--- Ask about programs in projects anew.
function M.forget()
  answers = {}
end

--- The command that starts the server for a buffer, and where it was found; or nil and why there is none.
---@param buffer integer
---@return string[]? command
---@return string where_or_why
---@return boolean? is_known Whether the person knows why, having just been asked.
function M.find(buffer)
  local cmd = config.options.cmd
  if cmd then
    local command = type(cmd) == 'table' and vim.deepcopy(cmd) or { cmd, 'lsp' }
    command[1] = vim.fn.expand(command[1])
    if is_program(command[1]) then
      return command, 'the option cmd'
    end
    return nil, ('the option cmd names %s, which is no program here; mend or remove it'):format(command[1])
  end
  local name = vim.api.nvim_buf_get_name(buffer)
  local folder = name ~= '' and vim.fs.dirname(name) or vim.fn.getcwd()
  local on_path = vim.fn.exepath('fimserver')
  if on_path ~= '' then
    return { on_path, 'lsp' }, 'PATH'
  end
  local in_venv = find_in_venv(folder)
  if in_venv then
    local trusted, asked = is_trusted(in_venv)
    if trusted then
      return { in_venv, 'lsp' }, 'the virtual environment of the project'
    end
    local text = "the project's own program is not trusted yet; open it, say :trust, then :Fimserver restart; "
      .. 'or name it: setup({ cmd = { %q, "lsp" } })'
    return nil, text:format(in_venv), asked
  end
  return nil, 'there is no program `fimserver` here; ' .. M.remedy
end

--- Run the program with other arguments than those that start the server. For health checks and windows.
---@param command string[] What starts the server.
---@param arguments string[]
---@param timeout_ms integer
---@return integer code
---@return string output What it printed, errors behind the rest.
function M.run(command, arguments, timeout_ms)
  local whole = {}
  for _, part in ipairs(command) do -- the program may be behind a wrapper: { 'uv', 'run', 'fimserver', 'lsp' }
    if part == 'lsp' then
      break
    end
    table.insert(whole, part)
  end
  vim.list_extend(whole, arguments)
  local started, process = pcall(vim.system, whole, { text = true })
  if not started then
    return 127, tostring(process)
  end
  local result = process:wait(timeout_ms)
  return result.code, (result.stdout or '') .. (result.stderr or '')
end

return M
