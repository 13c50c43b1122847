--- Turns keys into ghost text and requests.
---
---   on_key    text or cursor changed: show the rest of an offer, cancel the running request, send a new one
---   receive   take an answer, unless it is not the last request's or text or cursor have changed
---   clear     remove the ghost text: the user left insert mode or dismissed it
---
--- A typed key that matches the ghost text shortens it before the screen is drawn. A request is sent anyway, because
--- the server may have more than the first line by now. A different answer does not replace ghost text that still fits.
--- After deleting typed text, the earlier offer is shown again.
---
--- Knows:  buffers, offers, the client.  Never: keys, how ghost text is drawn.
local config = require('fimserver.config')
local ghost = require('fimserver.ghost')
local message = require('fimserver.message')
local notices = require('fimserver.notices')
local offers = require('fimserver.offer')
local place = require('fimserver.place')
local server = require('fimserver.server')
local status = require('fimserver.status')

local M = {}

local METHOD = 'textDocument/inlineCompletion'
local INVOKED, AUTOMATIC = 1, 2
local MOST_KEPT = 4 -- answers, for when the user deletes typed text
local FIRST_LINE_MS = 30 -- a faster answer is complete
local QUIET = { [-32800] = true, [-32801] = true, [-32802] = true } -- cancelled, content modified: not errors

local anchors = vim.api.nvim_create_namespace('fimserver.anchor')

---@class fimserver.Answer
---@field anchor integer Extmark at the start of its offers.
---@field offers fimserver.Offer[]
---@field index integer Index of the shown offer.

---@class fimserver.Shown Ghost text on the screen.
---@field answer fimserver.Answer
---@field offer fimserver.Offer
---@field rest string
---@field replaced integer

---@class fimserver.Typing State of one buffer.
---@field answers fimserver.Answer[] Newest first.
---@field shown fimserver.Shown?
---@field seen string Key of the text and cursor that were handled last.
---@field request integer? The running request's id.
---@field turn integer Counts requests; answers to earlier ones are dropped.
---@field reported table<string, boolean> Ids of offers that were reported to the server as shown.

---@type table<integer, fimserver.Typing>
local buffers = {}

---@param buffer integer
---@return fimserver.Typing
local function state_of(buffer)
  if not buffers[buffer] then
    buffers[buffer] = { answers = {}, seen = '', turn = 0, reported = {} }
  end
  return buffers[buffer]
end

--- Return a key for the text and cursor of the current window.
---@param buffer integer
local function now(buffer)
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  return ('%d:%d:%d'):format(vim.api.nvim_buf_get_changedtick(buffer), row, column)
end

---@param buffer integer
---@param state fimserver.Typing
local function cancel(buffer, state)
  state.turn = state.turn + 1
  local client = state.request and server.client_of(buffer)
  if client and client.requests[state.request] then
    client:cancel_request(state.request)
  end
  state.request = nil
  status.think(false)
end

--- Return the text between an answer's anchor and the cursor (nil if the cursor is before it), and the text after.
---@param buffer integer
---@param answer fimserver.Answer
---@return string? typed
---@return string after
local function text_around(buffer, answer)
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  row = row - 1
  local after = vim.api.nvim_get_current_line():sub(column + 1)
  local mark = vim.api.nvim_buf_get_extmark_by_id(buffer, anchors, answer.anchor, {})
  if not mark[1] or mark[1] > row or (mark[1] == row and mark[2] > column) then
    return nil, after
  end
  local lines = vim.api.nvim_buf_get_text(buffer, mark[1], mark[2], row, column, {})
  return table.concat(lines, '\n'), after
end

--- Show the rest of the newest offer that fits the current text; clear the ghost text if none fits.
---@param buffer integer
---@param state fimserver.Typing
local function show_what_fits(buffer, state)
  for _, answer in ipairs(state.answers) do
    local typed, after = text_around(buffer, answer)
    for step = 0, typed and #answer.offers - 1 or -1 do
      local index = (answer.index - 1 + step) % #answer.offers + 1
      local offer = answer.offers[index]
      local rest, replaced = offers.rest_of(offer, typed or '', after)
      if rest and replaced then
        answer.index = index
        state.shown = { answer = answer, offer = offer, rest = rest, replaced = replaced }
        local hint = #answer.offers > 1 and ('(%d/%d)'):format(index, #answer.offers) or nil
        ghost.show(buffer, rest, replaced, hint)
        notices.on_shown(buffer)
        if not state.reported[offer.id] then
          state.reported[offer.id] = true
          server.notify(buffer, 'textDocument/didShowCompletion', { item = offer.item })
        end
        return
      end
    end
  end
  state.shown = nil
  ghost.clear(buffer)
end

---@param buffer integer
---@param state fimserver.Typing
local function forget_answers(buffer, state)
  state.answers, state.shown, state.reported = {}, nil, {}
  if vim.api.nvim_buf_is_valid(buffer) then
    vim.api.nvim_buf_clear_namespace(buffer, anchors, 0, -1)
  end
  ghost.clear(buffer)
end

--- Return an answer with the offers that fit the current text; nil if none fits.
---@param buffer integer
---@param client vim.lsp.Client
---@param items table[]
---@return fimserver.Answer?
local function to_answer(buffer, client, items)
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local line = vim.api.nvim_get_current_line()
  local found, start = {}, nil ---@type fimserver.Offer[], integer?
  for _, item in ipairs(items) do
    local range, bytes = item.range, { start = column, cursor = column, finish = column }
    if range and (range.start.line ~= row - 1 or range['end'].line ~= row - 1) then
      bytes = nil
    elseif range then
      bytes.start = vim.str_byteindex(line, client.offset_encoding, range.start.character, false)
      bytes.finish = vim.str_byteindex(line, client.offset_encoding, range['end'].character, false)
    end
    local offer = bytes and offers.new(item, line, bytes)
    if offer and (start == nil or start == bytes.start) then
      start = bytes.start
      table.insert(found, offer)
    end
  end
  if not start then
    return nil
  end
  local anchor = vim.api.nvim_buf_set_extmark(buffer, anchors, row - 1, start, { right_gravity = false })
  return { anchor = anchor, offers = found, index = 1 }
end

---@class fimserver.Ask
---@field invoked? boolean The user invoked it.
---@field again? boolean Requests the rest of a first line.
---@field then_select? integer Candidate to select, counted from the shown one.

--- Return whether an answer replaces the ghost text: only if there is none, or the answer extends it.
---@param shown fimserver.Shown?
---@param answer fimserver.Answer
local function is_news(shown, answer)
  if not shown then
    return true
  end
  local text = answer.offers[1].text
  return #text > #shown.rest and vim.startswith(text, shown.rest)
end

---@param buffer integer
---@param state fimserver.Typing
---@param ask fimserver.Ask
---@param items table[]
---@param took_ms number
local function receive(buffer, state, ask, items, took_ms)
  local client, shown = server.client_of(buffer), state.shown
  local answer = client and to_answer(buffer, client, items)
  if not answer then
    notices.on_nothing()
    if ask.invoked and not shown then
      message.say('no completion here; :Fimserver explain shows why')
    end
    return
  end
  if not ask.invoked and not is_news(shown, answer) then
    vim.api.nvim_buf_del_extmark(buffer, anchors, answer.anchor)
    return
  end
  table.insert(state.answers, 1, answer)
  local oldest = table.remove(state.answers, MOST_KEPT + 1)
  if oldest then
    vim.api.nvim_buf_del_extmark(buffer, anchors, oldest.anchor)
  end
  if ask.then_select and shown and answer.offers[1].text == shown.rest then
    answer.index = ask.then_select % #answer.offers + 1
  end
  show_what_fits(buffer, state)
  local is_line = state.shown and not state.shown.rest:find('\n', 1, true)
  if is_line and not ask.invoked and not ask.again and took_ms >= FIRST_LINE_MS then
    M.ask(buffer, { again = true })
  end
end

--- Send a request for the current text and cancel the running one.
---@param buffer integer
---@param ask fimserver.Ask
function M.ask(buffer, ask)
  local state = state_of(buffer)
  cancel(buffer, state)
  local client = server.client_of(buffer)
  if not client then
    return
  end
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local character = vim.str_utfindex(vim.api.nvim_get_current_line(), client.offset_encoding, column, false)
  local turn, asked_for, begin = state.turn, now(buffer), vim.uv.hrtime()
  local ok, id = client:request(METHOD, { ---@diagnostic disable-line: param-type-mismatch  new in Neovim 0.12
    textDocument = { uri = vim.uri_from_bufnr(buffer), version = vim.lsp.util.buf_versions[buffer] },
    position = { line = row - 1, character = character },
    context = { triggerKind = ask.invoked and INVOKED or AUTOMATIC },
  }, function(err, result)
    if turn ~= state.turn then
      return
    end
    state.request = nil
    status.think(false)
    if err then
      if not QUIET[err.code] then
        message.say_once(('a completion failed: %s'):format(err.message))
      end
    elseif place.is_typing(buffer) and asked_for == now(buffer) then
      local items = result and (result.items or result) or {}
      receive(buffer, state, ask, items, (vim.uv.hrtime() - begin) / 1e6)
    end
  end, buffer)
  if ok then
    state.request = id
    status.think(true)
  end
end

--- Handle a change of text or cursor in insert mode.
---@param buffer integer
function M.on_key(buffer)
  local state = state_of(buffer)
  if not place.is_typing(buffer) or place.refuse_buffer(buffer) then
    M.clear(buffer)
    return
  end
  local key = now(buffer)
  if key == state.seen then
    return -- second event of the same key
  end
  state.seen = key
  show_what_fits(buffer, state)
  if config.options.automatic and server.attach(buffer) then
    M.ask(buffer, {})
  else
    cancel(buffer, state)
  end
end

--- Repeat the request for unchanged text, because the server can answer now.
---@param buffer integer
function M.refresh(buffer)
  if buffers[buffer] and place.is_typing(buffer) then
    buffers[buffer].seen = ''
    forget_answers(buffer, buffers[buffer])
    M.on_key(buffer)
  end
end

--- Clear the ghost text: the user left insert mode or dismissed it.
---@param buffer integer
function M.clear(buffer)
  local state = buffers[buffer]
  if state then
    cancel(buffer, state)
    forget_answers(buffer, state)
    if not place.is_typing(buffer) then
      state.seen = ''
    end
  end
end

--- Forget a deleted buffer.
---@param buffer integer
function M.forget(buffer)
  M.clear(buffer)
  buffers[buffer] = nil
end

--- Return the ghost text of a buffer for the current text.
---@param buffer integer
---@return fimserver.Shown?
function M.shown(buffer)
  local state = buffers[buffer]
  if not state or not state.shown or not place.is_typing(buffer) then
    return nil
  end
  if state.seen ~= now(buffer) then -- keys without an event so far
    show_what_fits(buffer, state)
  end
  return state.shown
end

--- Select another candidate; if there is only one, request others.
---@param buffer integer
---@param steps integer
function M.select(buffer, steps)
  local shown = M.shown(buffer)
  if not shown or #shown.answer.offers < 2 then
    M.ask(buffer, { invoked = true, then_select = shown and steps or nil })
    return
  end
  shown.answer.index = (shown.answer.index - 1 + steps) % #shown.answer.offers + 1
  show_what_fits(buffer, state_of(buffer))
end

return M
