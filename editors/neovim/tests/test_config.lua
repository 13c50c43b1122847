local config = require('fimserver.config')
local test, same = _G.test, _G.same

test('without options the defaults apply', function()
  local options, problems, chosen = config.parse(nil)
  same({ options, problems, chosen }, { config.defaults(), {}, {} })
end)

test('valid options are applied, keys one by one', function()
  local given = { cmd = { 'x', 'lsp' }, venv = false, keys = { accept = '<C-l>', next = false }, settings = { a = 1 } }
  local options, problems, chosen = config.parse(given)
  same(problems, {})
  same({ options.cmd, options.venv, options.settings }, { { 'x', 'lsp' }, false, { a = 1 } })
  same({ options.keys.accept, options.keys.next, options.keys.accept_word }, { '<C-l>', false, '<M-Right>' })
  same(chosen, { accept = true, next = false })
end)

test('an invalid option is reported with its value and the allowed values; the default applies', function()
  local cases = {
    {
      { cmd = {} },
      'setup(): cmd is {}; it must be a list of strings, a string, or false. The default is used: false',
    },
    { { automatic = 'yes' }, 'setup(): automatic is "yes"; it must be true or false. The default is used: true' },
    {
      { filetypes = 'lua' },
      'setup(): filetypes is "lua"; it must be \'*\' or a list of file types. The default is used: "*"',
    },
    {
      { settings = { 1 } },
      'setup(): settings is { 1 }; it must be a table of settings by name. The default is used: {}',
    },
    {
      { keys = { accept = '' } },
      'setup(): keys.accept is ""; it must be a key like <Tab>, or false. The default is used: "<Tab>"',
    },
    { 3, 'setup() takes a table of options, not 3' },
  }
  for _, case in ipairs(cases) do
    local options, problems = config.parse(case[1])
    same(problems, { case[2] })
    same(options, config.defaults())
  end
  local _, problems = config.parse({ keys = { acept = '<Tab>' }, colour = 1 })
  same(#problems, 2)
  assert(problems[1]:find('there is no key keys.acept; the keys are accept, accept_line', 1, true), problems[1])
end)
