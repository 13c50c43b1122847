--- Finds the program `fimserver`, and runs it to read its output.
local config = require('fimserver.config')
local outside = require('fimserver.outside')

local M = {}

M.remedy = 'install it on PATH or in the .venv of your project, '
  .. "or set its path: require('fimserver').setup({ cmd = { '/path/to/fimserver', 'lsp' } })"

--- Path of the program in a virtual environment, on this system.
local IN_VENV = vim.fn.has('win32') == 1 and 'Scripts/fimserver.exe' or 'bin/fimserver'

--- Path of the program in the checkout that has this plugin. A user who runs the plugin trusts the checkout.
M.own = vim.fs.normalize(vim.uv.fs_realpath(debug.getinfo(1, 'S').source:sub(2)) .. '/../../../../../.venv/' .. IN_VENV)

---@param path string
local function is_program(path)
  return vim.fn.executable(path) == 1
end

--- Return the program in the virtual environment of a file's folder, or of the nearest folder above.
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

--- Whether the user trusts a project's program, as Neovim asks and remembers (|vim.secure.read()|). Kept for the
--- session, so that Neovim asks only once.
---@type table<string, boolean>
local answers = {}

--- Return Neovim's trust record of a program. Its file has a hash, or `!` if denied, and a path in each line.
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

--- Called when the user trusts a program after viewing it.
---@type fun()
M.on_trusted = function() end

---@param path string
---@return boolean trusted
---@return boolean asked The user was asked just now.
local function is_trusted(path)
  local own = vim.uv.fs_realpath(M.own)
  if own and vim.uv.fs_realpath(path) == own then
    return true, false -- like the plugin, which is from the same checkout
  end
  if answers[path] ~= nil then
    return answers[path], false
  end
  local real = vim.uv.fs_realpath(path) or path
  local asked = trust_of(real) ~= 'denied' -- Neovim does not ask again about a denied file
  local trusted = vim.secure.read(path) ~= nil
  answers[path] = trusted
  local viewed = not trusted and vim.fn.bufnr(vim.fn.fnameescape(real)) or -1
  if viewed > 0 then -- the user views the program, and may run :trust
    vim.api.nvim_create_autocmd('BufWinLeave', {
      buffer = viewed,
      once = true,
      callback = function()
        if trust_of(real) == 'allowed' then -- otherwise Neovim would ask again during typing
          answers[path] = nil
          vim.schedule(M.on_trusted)
        end
      end,
    })
  end
  return trusted, asked and not trusted
end

--- Forget the answers, so that Neovim asks about programs in projects again.
function M.forget()
  answers = {}
end

---@param path string
---@param where string
---@return string[]? command
---@return string where_or_why
---@return boolean? is_known
local function with_trust(path, where)
  local trusted, asked = is_trusted(path)
  if trusted then
    return { path, 'lsp' }, where
  end
  local text = "the project's own program is not trusted yet; open it, run :trust, then :Fimserver restart; "
    .. 'or set its path: setup({ cmd = { %q, "lsp" } })'
  return nil, text:format(path), asked
end

--- Return the first program on PATH that is outside the project, and the first one inside.
---@param name string
---@param folders string[]
---@return string? path
---@return string? inside
local function search_path(name, folders)
  local inside = nil
  for _, path in ipairs(outside.on_path(name)) do
    if not outside.is_inside(path, folders) then
      return path, inside
    end
    inside = inside or path
  end
  return nil, inside
end

--- Return the command of the option cmd. A full path is the user's own word; what a name or a relative path finds in
--- the project needs trust.
---@param command string[]
---@param folders string[]
---@return string[]? command
---@return string where_or_why
---@return boolean? is_known
local function find_chosen(command, folders)
  local where, named = 'the option cmd', command[1]
  local path, inside = named, nil ---@type string?, string?
  if not named:find('[/\\]') then
    path, inside = search_path(named, folders)
  elseif not outside.is_full(named) then
    path = vim.fs.normalize(vim.fs.joinpath(vim.fn.getcwd(), named), { expand_env = false })
    if outside.is_inside(path, folders) then
      path, inside = nil, path
    end
  end
  if path and is_program(path) then
    command[1] = path
    return command, where
  end
  if inside and is_program(inside) then
    local trusted, why, asked = with_trust(inside, where)
    if not trusted then
      return nil, why, asked
    end
    command[1] = inside
    return command, where
  end
  return nil, ('the option cmd names %s, which is not a program here; correct or remove it'):format(named)
end

--- Return the command that starts the server for a buffer and where it was found, or nil and the reason.
---@param buffer integer
---@return string[]? command
---@return string where_or_why
---@return boolean? is_known Whether the user knows the reason, having just been asked.
function M.find(buffer)
  local cmd, folders = config.options.cmd, outside.folders(buffer)
  if cmd then
    local command = type(cmd) == 'table' and vim.deepcopy(cmd) or { cmd, 'lsp' }
    command[1] = vim.fn.expand(command[1])
    return find_chosen(command, folders)
  end
  local name = vim.api.nvim_buf_get_name(buffer)
  local folder = name ~= '' and vim.fs.dirname(name) or vim.fn.getcwd()
  local on_path, inside = search_path('fimserver', folders)
  if on_path then
    return { on_path, 'lsp' }, 'PATH'
  end
  if inside then
    return with_trust(inside, 'PATH')
  end
  local in_venv = find_in_venv(folder)
  if in_venv then
    return with_trust(in_venv, 'the virtual environment of the project')
  end
  if is_program(M.own) then
    return { M.own, 'lsp' }, 'the checkout that has this plugin'
  end
  return nil, 'the program `fimserver` was not found; ' .. M.remedy
end

--- Run the program with other arguments, for health checks and windows.
---@param command string[] Command that starts the server.
---@param arguments string[]
---@param timeout_ms integer
---@return integer code
---@return string output Standard output, then standard error.
function M.run(command, arguments, timeout_ms)
  local whole = {}
  for _, part in ipairs(command) do -- a wrapper may come first: { 'uv', 'run', 'fimserver', 'lsp' }
    if part == 'lsp' then
      break
    end
    table.insert(whole, part)
  end
  vim.list_extend(whole, arguments)
  local cwd, env = outside.surroundings(0)
  local started, process = pcall(vim.system, whole, { text = true, cwd = cwd, env = env })
  if not started then
    return 127, tostring(process)
  end
  local result = process:wait(timeout_ms)
  return result.code, (result.stdout or '') .. (result.stderr or '')
end

return M
