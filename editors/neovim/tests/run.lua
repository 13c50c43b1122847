--- Runs the tests that need no screen: nvim -l tests/run.lua [NAME]. Exit code 1 if a test fails.
local here = vim.fs.dirname(vim.fs.normalize(vim.uv.fs_realpath(arg[0])))
vim.opt.runtimepath:prepend(vim.fs.dirname(here))

local num_good, failed = 0, {} ---@type integer, string[]

--- Run a test; its name describes the behaviour.
---@param name string
---@param run fun()
function _G.test(name, run)
  if arg[1] and not name:find(arg[1], 1, true) then
    return
  end
  local ok, err = xpcall(run, debug.traceback)
  if ok then
    num_good = num_good + 1
  else
    table.insert(failed, ('%s\n%s'):format(name, err))
  end
end

--- Assert that two values are equal.
---@param got any
---@param wanted any
function _G.same(got, wanted)
  if not vim.deep_equal(got, wanted) then
    error(('got %s\nwanted %s'):format(vim.inspect(got), vim.inspect(wanted)), 2)
  end
end

for name, kind in vim.fs.dir(here) do
  if kind == 'file' and name:match('^test_.*%.lua$') then
    dofile(vim.fs.joinpath(here, name))
  end
end
for _, text in ipairs(failed) do
  io.stderr:write('FAILED ', text, '\n')
end
io.stderr:write(('%d good, %d failed\n'):format(num_good, #failed))
os.exit(#failed == 0 and 0 or 1)
