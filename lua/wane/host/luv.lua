--- Waiting inside a libuv loop: luv, luvit, Neovim. A coroutine started with run() yields to the loop wherever wane waits.
--
--     local host = require "wane.host.luv"
--     host.run(function()
--       local model, tok = assert(wane.load(path))
--       for piece in model:stream(tok, "Once") do io.write(piece) end
--     end, function(err) if err then print(err) end end)
--
-- In Neovim the coroutine runs in a uv callback: wrap what touches vim.api in vim.schedule.
-- @module wane.host.luv
local core = require "wane.core"

local M = {}

-- luacheck: globals vim
local uv = rawget(_G, "vim") and (vim.uv or vim.loop) or require "luv"

-- One entry a descriptor: its poll handle and who waits on it, smallest ticket first.
local watched = {}

local function resume(co, ...)
  local ok, message = coroutine.resume(co, ...)
  if not ok then error(debug.traceback(co, message), 0) end
end

-- The descriptor became readable: resume everybody whose time has come, and arm the next.
local function wake(entry)
  while entry[1] and entry[1].over(true) do
    local waiter = table.remove(entry, 1)
    resume(waiter.co)
  end
  if not entry[1] and not entry.closed then
    entry.poll:stop()
    entry.active = false
  end
end

--- The wait function for core.set_waiter.
function M.wait(fd, over, ticket)
  local entry = watched[fd]
  if not entry then
    entry = { poll = assert(uv.new_poll(fd)) }
    watched[fd] = entry
  end
  local waiter = { co = coroutine.running(), over = over, ticket = ticket or 0 }
  local at = 1
  while entry[at] and entry[at].ticket <= waiter.ticket do at = at + 1 end
  if at == 1 and over(true) then
    if entry[1] then entry[1].over(true) end          -- it had been armed: arm it again
  else
    table.insert(entry, at, waiter)
    if not entry.active then
      entry.active = true
      entry.poll:start("r", function() wake(entry) end)
    end
    coroutine.yield()
  end
  if not ticket and not entry[1] then                 -- a job's descriptor closes with the job
    watched[fd] = nil
    entry.closed = true
    if not entry.poll:is_closing() then entry.poll:close() end
  end
end

--- Runs fn in a coroutine that never blocks the loop.
-- @param fn function
-- @param done function|nil called at the end: done(err) or done(nil, results of fn …)
-- @return thread
function M.run(fn, done)
  done = done or function(err) if err then error(err, 0) end end
  local co
  local function finish(ok, ...)
    if ok then done(nil, ...) else done((...)) end
  end
  co = coroutine.create(function()
    core.set_waiter(M.wait)
    finish(xpcall(fn, function(message) return debug.traceback(tostring(message), 2) end))
  end)
  resume(co)
  return co
end

return M
