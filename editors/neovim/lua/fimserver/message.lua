--- Shows messages to the user: one line each, warnings only once.
local M = {}

---@type table<string, boolean>
local said = {}

--- The last messages, newest last; `:Fimserver status` shows them in full.
---@type string[]
M.recent = {}
local MOST_RECENT = 20

--- Return whether messages go to Neovim's own message line, where a long one waits for Enter.
local function is_plain()
  local source = debug.getinfo(vim.notify, 'S').source
  return source:find('vim/_', 1, true) ~= nil or source == '?' or source == '=?' -- a compiled-in function has no name
end

---@param line string
---@param level integer
local function show(line, level)
  local more = '… (:Fimserver status)'
  if is_plain() and vim.fn.strdisplaywidth(line) > vim.v.echospace then
    line = vim.fn.strcharpart(line, 0, math.max(20, vim.v.echospace - vim.fn.strdisplaywidth(more))) .. more
  end
  vim.notify(line, level)
end

--- Show a message cut to one line, so that the user need not press Enter. `:Fimserver status` shows all of it.
---@param text string
---@param level? integer vim.log.levels
function M.say(text, level)
  text = vim.startswith(text, 'fimserver') and text or 'fimserver: ' .. text
  table.insert(M.recent, text)
  if #M.recent > MOST_RECENT then
    table.remove(M.recent, 1)
  end
  local line = text:gsub('%s*\n%s*', ' ')
  if vim.v.vim_did_enter == 1 then
    show(line, level or vim.log.levels.INFO)
  else -- after Neovim's own message about the file
    vim.api.nvim_create_autocmd('VimEnter', {
      once = true,
      callback = function()
        show(line, level or vim.log.levels.INFO)
      end,
    })
  end
end

--- Show a warning or an error once per Neovim session.
---@param text string
---@param level? integer vim.log.levels, default WARN
function M.say_once(text, level)
  if not said[text] then
    said[text] = true
    M.say(text, level or vim.log.levels.WARN)
  end
end

--- Allow warnings to be shown again, because the user has acted.
function M.forget()
  said = {}
end

return M
