--- Finds libwane, declares its C API from the very header, checks the ABI, turns statuses into Lua errors, and waits.
-- Everything else in lua/wane reaches C through this module: `local C = core.C`.
--
-- Waiting. Ops are enqueued and run on the library's workers; Lua waits only where it reads a value. How it waits belongs to the
-- host and is chosen per coroutine: `core.set_waiter(fn)` inside a coroutine (or `wane.host.luv` and its siblings, which do it for
-- you) makes that coroutine yield; without a waiter the calling thread blocks.
-- @module wane.core
local ffi = require "ffi"

local M = {}

-- ---------------------------------------------------------------- the library

--- Folder of the Lua sources ("…/lua/"), from this file's own path.
local here = debug.getinfo(1, "S").source:match "^@(.*)wane/core%.lua$" or "lua/"
M.source_dir = here .. "wane/"

local function read_file(path)
  local f = io.open(path, "rb")
  if not f then return nil end
  local text = f:read "*a"
  f:close()
  return text
end

--- The header as ffi.cdef takes it: preprocessor lines, the C++ braces and the export macro removed.
local function declarations(header)
  local lines = {}
  for line in header:gmatch "[^\n]*" do
    if not line:find "^%s*#" and not line:find "/%* c%+%+ %*/" then lines[#lines + 1] = line end
  end
  return (table.concat(lines, "\n"):gsub("WANE_API%s", ""))
end

local function first_existing(candidates)
  for _, path in ipairs(candidates) do
    local f = io.open(path, "rb")
    if f then f:close() return path end
  end
end

local function load_library()
  local header_path = first_existing { here .. "../core/include/wane.h", here .. "../include/wane.h", here .. "wane/wane.h" }
  if not header_path then error("wane: wane.h was not found near " .. here .. "; keep core/include/wane.h beside lua/", 0) end
  -- A second require in the same state (a test runner that isolates files) must not declare twice: cdefs are permanent.
  if not pcall(ffi.typeof, "struct wane_declared_1") then
    ffi.cdef(declarations(read_file(header_path)))
    ffi.cdef "struct wane_declared_1 { int unused; };"
  end
  local path = os.getenv "WANE_LIB" or first_existing { here .. "../lib/libwane.so", here .. "libwane.so" } or "libwane.so"
  local ok, lib = pcall(ffi.load, path)
  if not ok then error(("wane: libwane could not be loaded (%s): %s; build it with scripts/build, or set WANE_LIB"):format(path, lib), 0) end
  if lib.wane_abi() ~= lib.WANE_ABI then
    error(("wane: %s has ABI %d, the header at %s says %d: rebuild the library"):format(path, lib.wane_abi(), header_path, tonumber(lib.WANE_ABI)), 0)
  end
  M.library_path, M.header_path = path, header_path
  return lib
end

local C = load_library()
M.C = C

-- ---------------------------------------------------------------- errors

--- Level of the first stack frame outside lua/wane, for error(): a mistake is reported at the line of whoever made it.
local function caller_level()
  local level = 3
  while true do
    local info = debug.getinfo(level, "S")
    if not info then return 0 end
    if info.what ~= "C" and info.source:sub(2, #M.source_dir + 1) ~= M.source_dir then return level - 1 end
    level = level + 1
  end
end

--- Raises `message` (a format with its arguments) at the line of the caller outside wane.
-- @param message string
function M.raise(message, ...)
  if select("#", ...) > 0 then message = message:format(...) end
  error(message, caller_level())
end

--- Raises a status below zero as a Lua error at the caller's line; returns the status otherwise.
-- @param status integer
-- @return integer
function M.check(status)
  if status < 0 then error(ffi.string(C.wane_error()), caller_level()) end
  return status
end

--- For failures of the outside world (files, formats, memory): nil, message, code.
-- @param status integer below zero
-- @return nil, string, string
function M.failure(status)
  return nil, ffi.string(C.wane_error()), ffi.string(C.wane_status_name(status))
end

-- ---------------------------------------------------------------- the stream of this Lua state

local stream_box = ffi.new "wane_stream *[1]"
local stream

--- This Lua state's stream, opened at first use and closed with the state.
function M.stream()
  if stream == nil then
    M.check(C.wane_stream_open(stream_box, "cpu"))
    stream = ffi.gc(stream_box[0], C.wane_stream_close)
  end
  return stream
end

-- ---------------------------------------------------------------- waiting

local waiters = setmetatable({}, { __mode = "k" })

--- Makes the running coroutine wait through `fn(fd, over, ticket)` instead of blocking. fn returns once `over()` is true;
-- `over(true)` looks and also arms fd, which then becomes readable when it is time to look again. A stream has one fd and one armed
-- ticket: with several coroutines waiting, arm the smallest (ticket is nil for jobs, whose fds are their own). nil restores blocking.
-- @param fn function|nil
-- @param co thread|nil default: the running coroutine
function M.set_waiter(fn, co)
  co = co or coroutine.running()
  if not co then M.raise "set_waiter: call it inside a coroutine; the main thread of a Lua state cannot yield" end
  waiters[co] = fn
end

--- The waiter of the running coroutine, or nil where waiting blocks.
function M.waiter()
  local co = coroutine.running()
  return co and waiters[co]
end

--- Waits until the op of `ticket` (default: everything enqueued so far) has run.
-- A coroutine that waits must not have been resumed from inside somebody else's scope.
-- @return integer status: 0, or below zero with the error set
function M.wait(ticket)
  local s = M.stream()
  ticket = ticket or C.wane_stream_tail(s)
  local status = C.wane_stream_poll(s, ticket)
  if status ~= C.WANE_PENDING then return status end
  local waiter = M.waiter()
  if not waiter then return C.wane_stream_wait(s, ticket, -1) end
  local scope = C.wane_scope_swap(s, nil)          -- others enqueue while this coroutine sleeps
  waiter(C.wane_stream_fd(s), function(arm)
    if arm then status = C.wane_stream_arm(s, ticket) else status = C.wane_stream_poll(s, ticket) end
    return status ~= C.WANE_PENDING
  end, ticket)
  C.wane_scope_swap(s, scope)
  return status
end

--- Waits for a background job.
-- @param job cdata wane_job *
-- @param progress function|nil called now and then with (done, total)
-- @return integer status
function M.wait_job(job, progress)
  local done, total = ffi.new "uint64_t[1]", ffi.new "uint64_t[1]"
  local function report()
    if not progress then return end
    C.wane_job_progress(job, done, total)
    progress(tonumber(done[0]), tonumber(total[0]))
  end
  local status = C.wane_job_poll(job)
  local waiter = M.waiter()
  if status == C.WANE_PENDING and waiter then
    local s = M.stream()
    local scope = C.wane_scope_swap(s, nil)
    waiter(C.wane_job_fd(job), function()
      report()
      status = C.wane_job_poll(job)
      return status ~= C.WANE_PENDING
    end, nil, job)
    C.wane_scope_swap(s, scope)
  end
  while status == C.WANE_PENDING do
    report()
    C.wane_job_wait(job, progress and 50000000 or -1)
    status = C.wane_job_poll(job)
  end
  if status == 0 then report() end
  return status
end

-- ---------------------------------------------------------------- scopes

local scope_box = ffi.new "wane_scope *[1]"

--- Moves a tensor (or the tensors of a table) that a scope returns into the scope around it; lua/wane/tensor.lua provides it.
M.keep = function() end

--- Runs fn(...) in a scope: every tensor made inside is freed at its end, except those that fn returns (they move to the scope
-- around it). Without a scope the garbage collector would free them some day; it cannot see how large they are.
-- @return what fn returns
function M.scope(fn, ...)
  local s = M.stream()
  local outer = C.wane_scope_swap(s, nil)
  C.wane_scope_swap(s, outer)
  M.check(C.wane_scope_open(s, scope_box))
  local scope = scope_box[0]
  local function finish(ok, ...)
    if ok then
      for i = 1, select("#", ...) do M.keep((select(i, ...)), outer) end
    end
    C.wane_scope_close(s, scope)
    if not ok then error((...), 0) end
    return ...
  end
  return finish(pcall(fn, ...))
end

-- ---------------------------------------------------------------- handles

M.handle_type = ffi.typeof "wane_handle"
M.info_type = ffi.typeof "wane_info"

local numbers = {}
--- Number of a dtype by name ("f32"); raises for unknown names.
-- @param name string
-- @return integer
function M.dtype(name)
  local n = numbers[name]
  if n then return n end
  if type(name) ~= "string" then M.raise("dtype: expected a name such as 'f32', found a %s", type(name)) end
  n = C.wane_dtype_from_name(name)
  if n < 0 then M.raise("there is no dtype '%s': f32 f16 bf16 i8 u8 i32 i64 bool, or a quantized kind", name) end
  numbers[name] = n
  return n
end

local names = {}
--- Name of a dtype number.
-- @param n integer
-- @return string
function M.dtype_name(n)
  local name = names[n]
  if not name then
    name = ffi.string(C.wane_dtype_name(n))
    names[n] = name
  end
  return name
end

local shape_scratch = ffi.new "int64_t[8]"
--- A Lua list of sizes as a C array (reused by the next call) and its length.
-- @param list integer[]
function M.shape(list)
  local n = #list
  if n > 8 then M.raise("%d dimensions: at most 8", n) end
  for i = 1, n do shape_scratch[i - 1] = list[i] end
  return shape_scratch, n
end

return M
