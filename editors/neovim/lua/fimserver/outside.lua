--- Keeps the files of a project from being run by accident: which folders are the project's, where a path leads, and
--- where and with what search paths programs run.
local config = require('fimserver.config')

local M = {}

local IS_WINDOWS = vim.fn.has('win32') == 1
local DELIMITER = IS_WINDOWS and ';' or ':'
local MOST_STEPS = 1000 -- links may form a circle
local MARKERS = { '.git', '.hg', '.jj', '.svn', 'pyproject.toml', 'setup.py', 'package.json', 'Cargo.toml', 'go.mod' }

--- Return whether a path means the same file whatever the current folder and drive are.
---@param path string
---@return boolean
function M.is_full(path)
  if IS_WINDOWS then
    return path:match('^%a:[\\/]') ~= nil or path:match('^[\\/][\\/]') ~= nil
  end
  return vim.startswith(path, '/')
end

---@param path string
local function fold(path)
  path = vim.fs.normalize(path, { expand_env = false })
  return (IS_WINDOWS or vim.fn.has('mac') == 1) and path:lower() or path
end

---@param path string
---@param folder string
local function is_below(path, folder)
  path, folder = fold(path), fold(folder)
  return path == folder or vim.startswith(path, vim.endswith(folder, '/') and folder or folder .. '/')
end

--- Return the path, and every path that is passed on the way to its file: a link on the way decides what runs.
---@param path string
---@return string[]
local function way_to(path)
  local way = { path, vim.uv.fs_realpath(path) }
  local function split(text)
    text = IS_WINDOWS and text:gsub('\\', '/') or text
    local root = IS_WINDOWS and text:match('^%a:/') or text:match('^/') or ''
    return root, vim.split(text:sub(#root + 1), '/', { plain = true, trimempty = true })
  end
  local place, left = split(path)
  for _ = 1, MOST_STEPS do
    local name = table.remove(left, 1)
    if not name then
      break
    elseif name == '..' then
      place = vim.fs.dirname(place)
    elseif name ~= '.' and name ~= '' then
      local next_place = (vim.endswith(place, '/') or place == '') and place .. name or place .. '/' .. name
      table.insert(way, next_place)
      local target = vim.uv.fs_readlink(next_place)
      if target then
        local root, parts = split(target)
        place = root ~= '' and root or place
        left = vim.list_extend(parts, left)
      else
        place = next_place
      end
    end
  end
  return way
end

--- Return the folders of a buffer's project, whose programs need trust: its file's folder, those above with a project's
--- marker, and the current folder. The home folder and those above it are never a project.
---@param buffer integer
---@return string[]
function M.folders(buffer)
  local home = vim.uv.os_homedir() or ''
  local homes = { home, vim.uv.fs_realpath(home) }
  local found = {} ---@type table<string, true>
  ---@param folder string
  local function add(folder)
    for _, path in ipairs({ folder, vim.uv.fs_realpath(folder) }) do
      local is_home = vim.iter(homes):any(function(place)
        return is_below(place, path)
      end)
      if not is_home then
        found[path] = true
      end
    end
  end
  local function add_with_roots(folder)
    add(folder)
    local markers = vim.list_extend({ config.options.venv or nil }, MARKERS)
    for _, marker in ipairs(vim.fs.find(markers, { path = folder, upward = true, limit = math.huge })) do
      add(vim.fs.dirname(marker))
    end
  end
  local name = vim.api.nvim_buf_get_name(buffer)
  for _, path in ipairs(M.is_full(name) and { name, vim.uv.fs_realpath(name) } or {}) do
    add_with_roots(vim.fs.dirname(path))
  end
  add_with_roots(vim.fn.getcwd())
  return vim.tbl_keys(found)
end

--- Return whether a path is in one of the folders, directly or through a link.
---@param path string
---@param folders string[]
---@return boolean
function M.is_inside(path, folders)
  return vim.iter(way_to(path)):any(function(step)
    return vim.iter(folders):any(function(folder)
      return is_below(step, folder)
    end)
  end)
end

--- Return the full paths in a search path; a relative or empty entry could find a program in the project.
---@param search_path string
---@return string[]
local function full_entries(search_path)
  return vim.tbl_filter(M.is_full, vim.split(search_path, DELIMITER, { plain = true }))
end

--- Return the programs on PATH with a name.
---@param name string
---@return string[]
function M.on_path(name)
  local names = { name }
  if IS_WINDOWS and not name:lower():match('%.%a+$') then
    names = { name .. '.exe', name .. '.cmd', name .. '.bat' }
  end
  local found = {}
  for _, folder in ipairs(full_entries(vim.env.PATH or '')) do
    for _, file in ipairs(names) do
      local path = vim.fs.joinpath(folder, file)
      if vim.fn.executable(path) == 1 then
        table.insert(found, path)
      end
    end
  end
  return found
end

--- Return what a program is started with: a working folder outside the project, and search paths without the project's
--- folders.
---@param buffer integer
---@return string cwd
---@return table<string, string> env Added to the environment of Neovim.
function M.surroundings(buffer)
  local folders, env = M.folders(buffer), {}
  for _, name in ipairs({ 'PATH', 'PYTHONPATH', 'PYTHONHOME' }) do
    if vim.env[name] then
      local entries = vim.tbl_filter(function(entry)
        return not M.is_inside(entry, folders)
      end, full_entries(vim.env[name]))
      if #entries == 0 and name == 'PATH' then
        entries = { vim.fs.dirname(vim.v.progpath) } -- an empty PATH means the current folder
      end
      env[name] = table.concat(entries, DELIMITER)
    end
  end
  if IS_WINDOWS then
    env.NoDefaultCurrentDirectoryInExePath = '1'
  end
  local home = vim.uv.os_homedir()
  return home and vim.fn.isdirectory(home) == 1 and home or vim.fs.dirname(vim.v.progpath), env
end

return M
