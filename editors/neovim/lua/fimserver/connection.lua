--- Starts the server's process for a language client, and changes what Neovim's own connection lacks:
---
---   an end      is reported with its cause, the last line on stderr, and not by Neovim, whose message waits for Enter
---   no name     a buffer without a name gets a URI, one buffer at a time, because Neovim gives all the same one
---
--- Knows:  vim.lsp.rpc.  Never: buffers' text, the state of the server.
local M = {}

---@class fimserver.End
---@field code integer
---@field signal integer
---@field cause string Last line that the process wrote to stderr, or the reason why it was not started; may be "".

local MOST_BYTES = 4000 -- of stderr
local NO_NAME = vim.uri_from_fname('')

--- The buffer without a name that is open at the server.
---@type integer?
M.unnamed = nil

---@param params any
local function with_uri(params)
  if type(params) ~= 'table' or not M.unnamed then
    return params
  end
  local uri = ('untitled:Untitled-%d'):format(M.unnamed)
  if params.textDocument and params.textDocument.uri == NO_NAME then
    params =
      vim.tbl_extend('force', params, { textDocument = vim.tbl_extend('force', params.textDocument, { uri = uri }) })
  elseif params.arguments and params.arguments[1] == NO_NAME then
    params = vim.tbl_extend('force', params, { arguments = { uri } })
  end
  return params
end

--- Return the last line of an output, without the name of an exception.
---@param output string
---@return string
local function last_line(output)
  local lines = vim.split(vim.trim(output), '\n', { plain = true })
  return (vim.trim(lines[#lines]):gsub('^[%w_.]+Error: ', ''))
end

--- Return what `vim.lsp.start()` takes as `cmd`, and a table that describes the end of the process after it has ended.
---@param command string[]
---@param cwd string
---@param env table<string, string>
---@return fun(dispatchers: vim.lsp.rpc.Dispatchers): vim.lsp.rpc.PublicClient
---@return fimserver.End
function M.new(command, cwd, env)
  local ended = { code = 0, signal = 0, cause = '' } ---@type fimserver.End
  local output = ''

  local function start(dispatchers)
    local on_exit, system = dispatchers.on_exit, vim.system
    dispatchers = vim.tbl_extend('force', dispatchers, {
      on_exit = function(code, signal)
        ended.code, ended.signal, ended.cause = code, signal, last_line(output)
        on_exit(0, 0)
      end,
    })
    ---@diagnostic disable-next-line: duplicate-set-field  vim.lsp.rpc has no other way to read stderr
    vim.system = function(argv, options, on_end) -- luacheck: ignore 122
      local to_log = options.stderr
      options.stderr = function(err, chunk)
        output = (output .. (chunk or '')):sub(-MOST_BYTES)
        if type(to_log) == 'function' then
          to_log(err, chunk)
        end
      end
      return system(argv, options, on_end)
    end
    local started, rpc = pcall(vim.lsp.rpc.start, command, dispatchers, { cwd = cwd, env = env })
    vim.system = system -- luacheck: ignore 122
    if not started then
      ended.cause = tostring(rpc):match('E%u+: [^\n]*') or 'the file or its interpreter does not exist'
      error(rpc, 0)
    end
    local request, notify = rpc.request, rpc.notify
    rpc.request = function(method, params, ...)
      return request(method, with_uri(params), ...)
    end
    rpc.notify = function(method, params)
      return notify(method, with_uri(params))
    end
    return rpc
  end

  return start, ended
end

return M
