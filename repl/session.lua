--- The interactive session: read, evaluate, print, and survive whatever happens in between.
--
-- Typed code runs in an environment of its own (assignments do not reach _G or required modules), in a coroutine whose waiter
-- watches for ctrl-C, and uncompiled: LuaJIT's compiled loops never look at hooks, so a typed endless loop could not be stopped.
-- What it calls in the library is compiled as ever.
local ffi = require "ffi"
local cli = require "wane.cli"
local terminal = require "wane.terminal"
local complete = require "wane.repl.complete"
local editor = require "wane.repl.editor"
local help = require "wane.repl.help"
local history = require "wane.repl.history"
local show = require "wane.repl.show"
local trace = require "wane.repl.trace"

local M = {}

local Session = {}
Session.__index = Session

-- ---------------------------------------------------------------- code

-- Compiles a text as an expression, as statements, or as statements with an expression behind the last ; or newline ("x = f(); x").
-- Returns chunk, whether it has a value; or nil, message, whether more may follow.
local function compile(text)
  local chunk, as_expression = loadstring("return " .. text, "=input")
  if chunk then return chunk, true end
  local as_statement
  chunk, as_statement = loadstring(text, "=input")
  if chunk then return chunk, false end
  local before, last = text:match "^(.*[;\n])([^;\n]+)$"
  chunk = before and loadstring(before .. " return " .. last, "=input")
  if chunk then return chunk, true end
  local eof = "'?<eof>'?$"
  -- "1 +* 2" is no statement from its first symbol on: the expression's message tells where it went wrong.
  local near = as_statement:match "unexpected symbol near '(.-)'$"
  local message = near and text:match "^%s*(.*)":sub(1, #near) == near and as_expression or as_statement
  return nil, message, as_expression:find(eof) ~= nil or as_statement:find(eof) ~= nil
end

--- False while the text is the beginning of something longer.
-- @param text string
-- @return boolean
function M.finished(text)
  if text:find "^%s*%?" then return true end
  local chunk, _, unfinished = compile(text)
  return chunk ~= nil or not unfinished
end

-- ---------------------------------------------------------------- waiting

-- The waiter of typed code: blocks until fd is readable; ctrl-C cancels the job (streams were cancelled by the signal handler).
function Session:waiter()
  local core = self.core
  return function(fd, over, _, job)
    while not over() do
      if job and self.progress then self.progress(job) end
      if not terminal.interrupted() then
        terminal.wait(fd, 100)
      elseif job then
        core.C.wane_job_cancel(job)
        core.C.wane_job_wait(job, 100000000)
      else
        core.C.wane_stream_wait(core.stream(), core.C.wane_stream_tail(core.stream()), 100000000)
      end
    end
  end
end

-- A progress line for long jobs, on stderr where that is a terminal. Returns a function to call with the job now and then.
local function job_progress(core)
  local done, total = ffi.new "uint64_t[1]", ffi.new "uint64_t[1]"
  local started = core.C.wane_clock()
  local line
  return function(job)
    if core.C.wane_clock() - started < 0.3 then return end
    core.C.wane_job_progress(job, done, total)
    line = line or cli.progress "working"
    line:update(tonumber(done[0]), tonumber(total[0]))
  end, function()
    if line then line:finish() end
  end
end

-- ---------------------------------------------------------------- evaluation

-- Packs the results of a call with their count.
local function pack(...) return { n = select("#", ...), ... } end

-- Runs a chunk; returns ok, results (packed) or the message.
function Session:call(chunk)
  setfenv(chunk, self.env)
  jit.off(chunk, true)
  local co = coroutine.create(function() return xpcall(chunk, trace.handler) end)
  local finish_progress
  if self.core then
    self.core.set_waiter(self:waiter(), co)
    self.progress, finish_progress = job_progress(self.core)
  end
  local results = pack(coroutine.resume(co))
  if finish_progress then finish_progress() end
  if coroutine.status(co) == "suspended" then return false, "the code yielded: at the prompt there is nobody to resume it" end
  if not results[1] then return false, tostring(results[2]) end
  if not results[2] then return false, results[3] end
  return true, pack(unpack(results, 3, results.n))
end

function Session:print_error(message)
  io.stdout:flush()
  io.stderr:write(self.colour and "\27[31m" or "", message, self.colour and "\27[0m" or "", "\n")
end

-- `?name`: help. The name is evaluated, so that ?model.layers[1] works.
function Session:help(name)
  name = name:match "^%s*(.-)%s*$"
  local value
  local chunk = name ~= "" and loadstring("return " .. name:gsub(":", "."), "=input")
  if chunk then
    setfenv(chunk, self.env)
    local ok, found = pcall(chunk)
    if ok then value = found end
  end
  print(help.lookup(self.home, name, value))
  return true
end

--- Evaluates one text and prints what comes of it.
-- @param text string
-- @return boolean false after an error
function Session:evaluate(text)
  local asked = text:match "^%s*%?(.*)$"
  if asked then return self:help(asked) end
  if not text:find "%S" then return true end
  local quiet = text:find ";%s*$" ~= nil
  local chunk, has_value = compile((text:gsub(";%s*$", "")))
  if not chunk then
    self:print_error(has_value)                        -- the message, in this case
    return false
  end
  local clock = self.core and self.core.C.wane_clock or os.clock
  local started = clock()
  local ok, results = self:call(chunk)
  local elapsed = clock() - started
  local stopped = terminal.interrupted()
  if stopped then cli.settle() end
  if not ok then
    if stopped and self.interactive then io.stdout:write "\n" end       -- the terminal shows ^C behind what was printed last
    self:print_error(stopped and "interrupted" or results or "error without a message")
  elseif has_value and results.n > 0 then
    self.env._ = results[1]
    if not quiet then
      local ok_show, problem = self:call(function()
        for i = 1, results.n do print(show.show(results[i])) end
      end)
      if terminal.interrupted() then cli.settle() end
      if not ok_show then self:print_error(problem) end
    end
  end
  if self.interactive and elapsed > 0.1 then io.stdout:write(("\27[2m%.2f s\27[0m\n"):format(elapsed)) end
  io.stdout:flush()
  return ok
end

-- ---------------------------------------------------------------- reading

-- Lines from a pipe or a dumb terminal: no editing, prompts only for people.
function Session:plain_loop()
  local prompted = terminal.isatty(0)
  local function ask(prompt)
    if prompted then
      io.stdout:write(prompt)
      io.stdout:flush()
    end
    return io.read "*l"
  end
  local good = true
  while true do
    local text = ask "> "
    while text and not M.finished(text) do
      local more = ask ">> "
      if not more then break end
      text = text .. "\n" .. more
    end
    if not text then
      if terminal.interrupted() then                 -- ctrl-C while reading: forget the line
        terminal.clear_interrupt()
        io.stdout:write "\n"
      else
        return good
      end
    else
      good = self:evaluate(text) and good
    end
  end
end

-- Between keys: libuv's handles of the session's own loop (timers, a load in the background) move on. Returns how long to wait.
local function idle()
  local uv = package.loaded.luv
  if not uv or not uv.loop_alive() then return -1 end
  uv.run "nowait"
  return 20
end

function Session:editing_loop()
  local e = editor.new(terminal, {
    history = self.history, finished = M.finished, idle = idle,
    complete = function(text, cursor) return complete.complete(self.env, text, cursor) end,
  })
  -- What a timer prints while a line is being edited appears above it.
  self.env.print = function(...)
    if not e.reading then return print(...) end
    e:hide()
    print(...)
    io.stdout:flush()
    e:show()
  end
  while true do
    local text, why = e:read()
    if text then
      self.history:add(text)
      self:evaluate(text)
    elseif why == "eof" then
      return
    end
    terminal.clear_interrupt()
  end
end

--- Runs a session on stdin until its end.
-- @param home string folder of the program
-- @return integer exit status: 1 when the input is no terminal and something in it failed
function M.run(home)
  local self = setmetatable({ home = home, interactive = terminal.isatty(0) and terminal.isatty(1) }, Session)
  self.colour = terminal.isatty(2) and not os.getenv "NO_COLOR" and os.getenv "TERM" ~= "dumb"
  self.env = setmetatable({}, { __index = _G })
  self.env._G = self.env
  local found, core = pcall(require, "wane.core")
  if found then
    self.core = core
    cli.watch_interrupts()
    local loaded, wane = pcall(require, "wane")
    if loaded then self.env.wane = wane else self:print_error(tostring(wane)) end
  else
    self:print_error(tostring(core))
  end
  terminal.limit(3)
  local plain = os.getenv "TERM" == "dumb" or (os.getenv "WANE_PLAIN" or "") ~= ""
  if not self.interactive or plain then return self:plain_loop() and 0 or 1 end
  self.history = history.open()
  print(("wane %s, %s. ? is help, ctrl-D leaves."):format(found and ffi.string(core.C.wane_version()) or "without its library", jit.version))
  self:editing_loop()
  return 0
end

return M
