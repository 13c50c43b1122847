std = "luajit"
read_globals = { "vim" }
globals = { "vim.b", "vim.env", "vim.bo", "vim.g", "vim.o", "vim.wo", "vim.opt" }
max_line_length = 120
