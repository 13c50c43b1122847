--- Writes doc/fimserver.txt from the source: options and their comments, keys, sub-commands, functions.
---
---   nvim -l scripts/vimdoc.lua            write it
---   nvim -l scripts/vimdoc.lua --check    exit with code 1 if the file is outdated
local root = vim.fs.dirname(vim.fs.dirname(vim.fs.normalize(vim.uv.fs_realpath(arg[0]))))
vim.opt.runtimepath:prepend(root)

local WIDTH = 78
local lines = {} ---@type string[]

---@param text? string
local function add(text)
  table.insert(lines, text or '')
end

---@param left string
---@param right string
---@param indent? string
local function add_tagged(left, right, indent)
  left = (indent or '') .. left
  add(left .. (' '):rep(math.max(1, WIDTH - #left - #right)) .. right)
end

---@param title string
---@param tag string
local function add_section(title, tag)
  add()
  add(('='):rep(WIDTH))
  add_tagged(title, '*' .. tag .. '*')
  add()
end

--- Add a text wrapped to WIDTH columns.
---@param text string
---@param indent string
local function add_wrapped(text, indent)
  local line = indent
  for word in text:gmatch('%S+') do
    if #line > #indent and #line + 1 + #word > WIDTH then
      add(line)
      line = indent
    end
    line = line .. (#line > #indent and ' ' or '') .. word
  end
  add(line)
end

---@param name string
local function read(name)
  local file = assert(io.open(vim.fs.joinpath(root, name)))
  local text = file:read('*a')
  file:close()
  return text
end

---@param comment string[]
---@param indent string
local function add_comment(comment, indent)
  add_wrapped(table.concat(comment, ' '), indent)
end

local function add_options()
  add_section('OPTIONS', 'fimserver-options')
  add_wrapped(
    "`require('fimserver').setup({})` takes a table of these. Invalid options are reported and replaced by defaults.",
    ''
  )
  local source = read('lua/fimserver/config.lua'):match('\nlocal defaults = (%b{})\n')
  local comment, prefix = {}, '' ---@type string[], string
  for line in source:gmatch('[^\n]+') do
    local said = line:match('^%s*%-%- (.*)')
    local name, value = line:match('^%s*([%w_]+) = (.-),?$')
    if said then
      table.insert(comment, said)
    elseif name then
      add()
      local full = prefix .. name
      add_tagged(value == '{' and full or ('%s = %s'):format(full, value), ('*fimserver-%s*'):format(full))
      add_comment(comment, '    ')
      comment = {}
      prefix = value == '{' and name .. '.' or prefix
    elseif line:match('^  },') then
      prefix = ''
    end
  end
end

local function add_keys()
  add_section('KEYS', 'fimserver-mappings')
  local dot = '`.` repeats accepted text with what was typed around it; it does not remove text after the cursor that '
    .. 'the ghost text replaced. For your own mappings in insert mode, which do nothing without ghost text:'
  add_wrapped(dot, '')
  add()
  local defaults = require('fimserver.config').defaults().keys
  for _, action in ipairs(require('fimserver.keys').actions) do
    add(('%-29s %-10s %s'):format(action.plug, defaults[action.name], action.says))
  end
end

local function add_commands()
  add_section('COMMANDS', 'fimserver-commands')
  local commands = require('fimserver.commands').commands
  local names = vim.tbl_keys(commands)
  table.sort(names)
  for _, name in ipairs(names) do
    local command = commands[name]
    add_tagged(vim.trim((':Fimserver %s %s'):format(name, command.takes)), ('*:Fimserver-%s*'):format(name))
    add_wrapped(command.says .. '.', '    ')
    add()
  end
  add('`:checkhealth fimserver` checks all parts and shows how to fix what fails.')
end

local function add_functions()
  add_section('FUNCTIONS', 'fimserver-functions')
  local comment = {} ---@type string[]
  for line in read('lua/fimserver/init.lua'):gmatch('[^\n]+') do
    local said = line:match('^%-%-%- ?(.*)')
    local annotation = line:match('^%-%-%-@(.*)')
    local name, parameters = line:match('^function M%.([%w_]+)(%b())')
    if annotation then
      local gives, what = annotation:match('^return (%S+)%s*%S*%s*(.*)')
      if gives then
        table.insert(comment, vim.trim(('Returns: %s. %s'):format(gives, what)))
      end
    elseif said then
      table.insert(comment, said)
    elseif name then
      add_tagged(("require('fimserver').%s%s"):format(name, parameters), ('*fimserver.%s()*'):format(name))
      add_comment(comment, '    ')
      add()
      comment = {}
    else
      comment = {}
    end
  end
end

--- Add a chapter of README.md with its code blocks.
---@param title string
---@param tag string
local function add_chapter(title, tag)
  add_section(title:upper(), tag)
  local is_code = false
  local text = read('README.md'):match('\n## ' .. title .. '\n\n(.-)\n\n## ')
  for line in vim.gsplit(text, '\n') do
    local begins = line:match('^```(%w+)')
    if begins then
      add('>' .. begins)
    elseif line == '```' then
      add('<')
    elseif is_code then
      add('    ' .. line)
    else
      add_wrapped(line, '')
    end
    is_code = begins ~= nil or (is_code and line ~= '```')
  end
end

local function write()
  add_tagged('*fimserver.txt*	Code completion that runs on your machine', '*fimserver*')
  add()
  local what = 'Ghost text from the language server fimserver, which completes code with a model on your machine. For '
    .. 'Neovim 0.11 and newer. scripts/vimdoc.lua writes this page from the source; README.md describes how to '
    .. 'install the plugin.'
  add_wrapped(what, '')
  add()
  add(">lua\n    require('fimserver').setup({})\n<")
  add_options()
  add_keys()
  add_chapter('Tab in a chain', 'fimserver-chain')
  add_commands()
  add_functions()
  add_section('STATUS LINE AND COLORS', 'fimserver-status')
  local status = 'The autocommand User FimserverStatus runs when the state changes; its `data` is the result of '
    .. "`require('fimserver').status()`. In a status line:"
  add_wrapped(status, '')
  add(">vim\n    set statusline+=%{%v:lua.require'fimserver'.statusline()%}\n<")
  add_tagged('FimserverGhost', '*hl-FimserverGhost*')
  add_wrapped('Ghost text: italic, in the color of ComplHint or NonText, raised to a contrast of 4.5:1.', '    ')
  add_tagged('FimserverHint', '*hl-FimserverHint*')
  add('    Text after it, dimmer: (1/2), or the number of lines below the window.')
  add()
  add('Set b:fimserver to false to turn completions off in a buffer.')
  add()
  add('vim:tw=78:ts=8:ft=help:norl:')
  return table.concat(lines, '\n') .. '\n'
end

local path = vim.fs.joinpath(root, 'doc', 'fimserver.txt')
local text = write()
if arg[1] == '--check' then
  local file = io.open(path)
  local is_same = file ~= nil and file:read('*a') == text
  if not is_same then
    print('doc/fimserver.txt is outdated; run: nvim -l scripts/vimdoc.lua')
    os.exit(1)
  end
else
  local file = assert(io.open(path, 'w'))
  file:write(text)
  file:close()
end
