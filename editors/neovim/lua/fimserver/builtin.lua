--- Adapts Neovim 0.12's own `vim.lsp.inline_completion`: cancels the running request when the user continues typing,
--- drops answers for outdated text, and does not insert the typed part of an item twice.
---
--- It is not the default. It waits 200 ms before each request, which is longer than most answers take; it shows an
--- expired item until the next answer; and accepting a word of an item hides the rest until then.
local notices = require('fimserver.notices')
local offers = require('fimserver.offer')

local M = {}

local METHOD = 'textDocument/inlineCompletion'
local parts = { word = offers.next_word, line = offers.next_line }

---@class fimserver.Builtin Last answer in a buffer.
---@field items table[]
---@field show fun(items: table[]) Neovim's handler.
---@field tick integer

---@type table<integer, fimserver.Builtin>
local answered = {}

--- Return whether an item still continues the text at the cursor.
---@param item table
---@param client vim.lsp.Client
local function fits(item, client)
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local line = vim.api.nvim_get_current_line()
  local start = item.range.start
  if start.line ~= row - 1 then
    return false
  end
  local first = vim.str_byteindex(line, client.offset_encoding, start.character, false)
  return column >= first and vim.startswith(item.insertText, line:sub(first + 1, column))
end

---@param buffer integer
---@param client vim.lsp.Client
local function drop_what_is_stale(buffer, client)
  for id, request in pairs(client.requests) do
    if request.bufnr == buffer and request.method == METHOD and request.type == 'pending' then
      client:cancel_request(id)
    end
  end
  local last = answered[buffer]
  if last and last.items[1] and not fits(last.items[1], client) then
    last.items = {}
    last.show({})
  end
end

--- Let Neovim draw the items of a client, or prevent that if this plugin draws them.
---@param client vim.lsp.Client
---@param wanted boolean
function M.take(client, wanted)
  if not vim.lsp.inline_completion then
    return
  end
  vim.lsp.inline_completion.enable(wanted, { client_id = client.id })
  local group = vim.api.nvim_create_augroup('fimserver.builtin', { clear = true })
  if not wanted then
    return
  end
  vim.api.nvim_create_autocmd('LspAttach', {
    group = group,
    callback = function(event)
      if event.data.client_id == client.id then
        vim.lsp.inline_completion.enable(true, { bufnr = event.buf })
      end
    end,
  })
  local request = client.request
  ---@diagnostic disable-next-line: duplicate-set-field  only this client is changed
  client.request = function(self, method, params, handler, buffer)
    if method ~= METHOD or not handler then
      return request(self, method, params, handler, buffer)
    end
    buffer = vim._resolve_bufnr and vim._resolve_bufnr(buffer) or buffer
    drop_what_is_stale(buffer, self)
    local tick = vim.api.nvim_buf_get_changedtick(buffer)
    return request(self, method, params, function(err, result, context)
      if err or not vim.api.nvim_buf_is_valid(buffer) or vim.api.nvim_buf_get_changedtick(buffer) ~= tick then
        return
      end
      local function show(items)
        handler(nil, { items = items }, context)
      end
      local items = result and (result.items or result) or {}
      answered[buffer] = { items = items, show = show, tick = tick }
      show(items)
      if #items > 0 then
        notices.on_shown(buffer)
      else
        notices.on_nothing()
      end
    end, buffer)
  end
  vim.api.nvim_create_autocmd({ 'TextChangedI', 'TextChangedP', 'CursorMovedI' }, {
    group = group,
    callback = function(event)
      if client.attached_buffers[event.buf] then
        drop_what_is_stale(event.buf, client)
      end
    end,
  })
end

---@param buffer integer
function M.clear(buffer)
  local last = answered[buffer]
  if last then
    last.items = {}
    last.show({})
  end
end

---@return boolean
function M.is_visible()
  local namespace = vim.api.nvim_get_namespaces()['nvim.lsp.inline_completion']
  local marks = namespace and vim.api.nvim_buf_get_extmarks(0, namespace, 0, -1, { limit = 1 }) or {}
  return #marks > 0
end

--- Send a request now. Neovim's module has no function for that, so the answer is passed to its handler.
---@param buffer integer
function M.trigger(buffer)
  local server = require('fimserver.server')
  local client, last = server.client_of(buffer), answered[buffer]
  if not client or not last then
    return
  end
  local params = vim.lsp.util.make_position_params(0, client.offset_encoding) ---@type table
  params.context = { triggerKind = 1 }
  client:request(METHOD, params, function(_, result)
    last.show(result and (result.items or result) or {})
  end, buffer)
end

---@param part fimserver.Part
---@return boolean
function M.accept(part)
  return vim.lsp.inline_completion.get({
    on_accept = function(item)
      local row, column = unpack(vim.api.nvim_win_get_cursor(0))
      local start_row, first = item.range.start_row, item.range.start_col
      local typed = vim.api.nvim_get_current_line():sub(first + 1, column)
      if start_row ~= row - 1 or column < first or not vim.startswith(item.insert_text, typed) then
        return nil
      end
      if parts[part] then
        local taken = parts[part](item.insert_text:sub(#typed + 1))
        local lines = vim.split(taken, '\n', { plain = true })
        vim.api.nvim_buf_set_text(0, row - 1, column, row - 1, column, lines)
        local last = lines[#lines]
        vim.api.nvim_win_set_cursor(0, { row + #lines - 1, #lines == 1 and column + #last or #last })
        return nil
      end
      vim.api.nvim_buf_set_text(0, row - 1, first, row - 1, column, {})
      return item
    end,
  })
end

return M
