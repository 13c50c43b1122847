--- Options of `setup()`. The table below is their documentation; doc/fimserver.txt is generated from it.
---
--- Knows:  names, types and defaults of options.  Never: clients, buffers, windows.
local M = {}

---@class fimserver.Keys
---@field accept string|false
---@field accept_word string|false
---@field accept_line string|false
---@field next string|false
---@field previous string|false
---@field dismiss string|false
---@field trigger string|false

---@class fimserver.Config
---@field cmd string[]|string|false
---@field venv string|false
---@field filetypes string[]|'*'
---@field ghost_text 'auto'|'own'|'builtin'
---@field automatic boolean
---@field with_menu boolean
---@field keys fimserver.Keys
---@field settings table<string, any>
local defaults = {
  -- The command that starts the server, for instance { '/opt/fimserver/bin/fimserver', 'lsp' }; a string is the
  -- program alone. `false` searches for the program on PATH, in `venv`, then in the `.venv` of the checkout that has
  -- this plugin. Nothing is ever downloaded. The command runs in your home folder. What a name or a relative path finds
  -- in the project needs your trust (|:trust|), and relative entries of PATH do not count.
  cmd = false,

  -- Name of a virtual environment's folder. It is searched for in the file's folder and those above. Because the
  -- project may not be yours, the `fimserver` in it is started only after you trust it (|:trust|). `false` turns
  -- the search off.
  venv = '.venv',

  -- File types in which to complete: '*' or a list, for instance { 'python', 'lua' }. The server always refuses
  -- secrets, ignored, generated and very large files.
  filetypes = '*',

  -- What draws the ghost text. 'own' is this plugin, on every Neovim. 'builtin' is `vim.lsp.inline_completion` of
  -- Neovim 0.12, which waits 200 ms before each request and hides the rest after you accept a word. 'auto' is 'own'.
  ghost_text = 'auto',

  -- Request completions while you type. `false` requests them only when you press the key `trigger`.
  automatic = true,

  -- Show ghost text while the completion menu is open.
  with_menu = true,

  -- Keys in insert mode; `false` turns one off. A default key is mapped only if nothing else has mapped it. A key that
  -- you set is always mapped in buffers that fimserver completes in. Without ghost text, a key does what it did before.
  -- A terminal that sends `<M-[>` as <Esc>[ needs a pause of 'ttimeoutlen' after it.
  keys = {
    -- Accept all of the ghost text. `false` also if a mapping of yours calls `accept()`.
    accept = '<Tab>',
    -- Accept the next word.
    accept_word = '<M-Right>',
    -- Accept the next line.
    accept_line = '<M-End>',
    -- Show the next candidate; requests more if there is only one.
    next = '<M-]>',
    -- Show the previous candidate.
    previous = '<M-[>',
    -- Hide the ghost text until you continue typing.
    dismiss = '<C-]>',
    -- Request a completion now, also where there are no automatic ones.
    trigger = '<M-\\>',
  },

  -- Settings of the server by name: { maxLines = 4, languages = { markdown = false } }. Other settings come from
  -- the server's config.toml, or are its defaults.
  settings = {},
}

---@class fimserver.Check
---@field allowed string Allowed values, in words.
---@field fits fun(value: any): boolean

---@param kinds string[]
local function is_any(kinds)
  return function(value)
    return vim.tbl_contains(kinds, type(value))
  end
end

local function is_strings(value)
  if type(value) ~= 'table' or not vim.islist(value) or #value == 0 then
    return false
  end
  for _, entry in ipairs(value) do
    if type(entry) ~= 'string' then
      return false
    end
  end
  return true
end

local function is_text_or_false(value)
  return value == false or (type(value) == 'string' and value ~= '')
end

local a_boolean = { allowed = 'true or false', fits = is_any({ 'boolean' }) }

---@type table<string, fimserver.Check>
local checks = {
  cmd = {
    allowed = 'a list of strings, a string, or false',
    fits = function(value)
      return is_text_or_false(value) or is_strings(value)
    end,
  },
  venv = { allowed = 'the name of a folder, or false', fits = is_text_or_false },
  filetypes = {
    allowed = "'*' or a list of file types",
    fits = function(value)
      return value == '*' or is_strings(value)
    end,
  },
  ghost_text = {
    allowed = "'auto', 'own' or 'builtin'",
    fits = function(value)
      return value == 'auto' or value == 'own' or value == 'builtin'
    end,
  },
  automatic = a_boolean,
  with_menu = a_boolean,
  keys = { allowed = 'a table of keys', fits = is_any({ 'table' }) },
  settings = {
    allowed = 'a table of settings by name',
    fits = function(value)
      return type(value) == 'table' and (next(value) == nil or not vim.islist(value))
    end,
  },
}
local a_key = { allowed = 'a key like <Tab>, or false', fits = is_text_or_false }

--- The options in force.
---@type fimserver.Config
M.options = vim.deepcopy(defaults)

--- Keys that the user set in setup(); they are mapped even if something else has mapped them.
---@type table<string, boolean>
M.chosen_keys = {}

--- Return a copy of the defaults.
---@return fimserver.Config
function M.defaults()
  return vim.deepcopy(defaults)
end

---@param known table<string, any>
local function names(known)
  local list = vim.tbl_keys(known)
  table.sort(list)
  return table.concat(list, ', ')
end

--- Return the options of a table given to setup(), with defaults for invalid ones, and a sentence for each problem.
---@param given any
---@return fimserver.Config options
---@return string[] problems
---@return table<string, boolean> chosen_keys
function M.parse(given)
  local options, problems, chosen = M.defaults(), {}, {}
  if given ~= nil and type(given) ~= 'table' then
    return options, { ('setup() takes a table of options, not %s'):format(vim.inspect(given)) }, chosen
  end

  local function wrong(name, value, allowed, default)
    local said = vim.inspect(value, { newline = ' ', indent = '' })
    local text = ('setup(): %s is %s; it must be %s. The default is used: %s'):format(
      name,
      said,
      allowed,
      vim.inspect(default, { newline = ' ', indent = '' })
    )
    table.insert(problems, text)
  end

  for name, value in pairs(given or {}) do
    local check = checks[name]
    if not check then
      table.insert(problems, ('setup(): there is no option %s; the options are %s'):format(name, names(defaults)))
    elseif not check.fits(value) then
      wrong(name, value, check.allowed, defaults[name])
    elseif name == 'keys' then
      for action, key in pairs(value) do
        if defaults.keys[action] == nil then
          local text = 'setup(): there is no key keys.%s; the keys are %s'
          table.insert(problems, text:format(action, names(defaults.keys)))
        elseif not a_key.fits(key) then
          wrong('keys.' .. action, key, a_key.allowed, defaults.keys[action])
        else
          options.keys[action] = key
          chosen[action] = key ~= false
        end
      end
    else
      options[name] = vim.deepcopy(value)
    end
  end
  table.sort(problems)
  return options, problems, chosen
end

--- Apply options.
---@param given any Argument of setup().
---@return string[] problems
function M.set(given)
  local problems
  M.options, problems, M.chosen_keys = M.parse(given)
  return problems
end

return M
