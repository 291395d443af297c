-- Inside headless Neovim: load, generate, and keep the editor's loop going. Prints one line of JSON and leaves with 0, or a message and 1.
--     nvim --headless -u NONE -c 'luafile spec/hosts/nvim.lua'
-- luacheck: globals vim
package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
local uv = vim.uv or vim.loop
local gaps, last = {}, uv.hrtime()
local timer = uv.new_timer()
timer:start(1, 1, function()
  local now = uv.hrtime()
  gaps[#gaps + 1] = (now - last) / 1e6
  last = now
end)

local done, failure, result
local ok, message = pcall(function()
  local wane = require "wane"
  local path = os.getenv "WANE_HOST_MODEL"
  require("wane.host.luv").run(function()
    local model, tok = assert(wane.load(path, { quant = "nf4" }))
    if tok then
      local pieces = {}
      for piece in model:stream(tok, "The quick brown fox", { max_new_tokens = 20, ignore_eos = true }) do pieces[#pieces + 1] = piece end
      result = table.concat(pieces)
    else
      result = table.concat(model:generate({ { 1, 2, 3 } }, { max_new_tokens = 20, ignore_eos = true })[1], ",")
    end
    model:close()
  end, function(err)
    failure, done = err, true
  end)
end)
if not ok then failure, done = message, true end
vim.wait(60000, function() return done end, 5)
timer:stop()
table.sort(gaps)
if failure or not done then
  io.stderr:write(tostring(failure or "it did not end within a minute"), "\n")
  vim.cmd "cquit 1"
end
io.stdout:write(vim.fn.json_encode { ticks = #gaps, longest_ms = gaps[#gaps], p99_ms = gaps[math.ceil(#gaps * 0.99)], result = result }, "\n")
vim.cmd "qall!"
