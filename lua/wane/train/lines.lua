--- Lines of a text file by number, without holding the file.
-- @module wane.train.lines
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C

---@class wane.Lines
---@field path string
---@field count integer
local Lines = {}
Lines.__index = Lines

local M = {}

local LONGEST = 64 * 2 ^ 20              -- bytes; a longer line is a file of another kind

--- Indexes a file: one pass, 8 bytes of memory a line.
-- @param path string
-- @return wane.Lines|nil, string|nil message
function M.open(path)
  local job, box = ffi.new "wane_job *[1]", ffi.new "wane_lines *[1]"
  core.check(C.wane_lines_open(job, path))
  local handle = ffi.gc(job[0], C.wane_job_free)
  local status = core.wait_job(handle)
  if status == 0 then status = C.wane_lines_take(handle, box) end
  if status ~= 0 then return nil, ffi.string(C.wane_error()) end
  local lines = ffi.gc(box[0], C.wane_lines_free)
  return setmetatable({ path = path, handle = lines, count = tonumber(C.wane_lines_count(lines)), room = 4096, buffer = ffi.new("char[?]", 4096) }, Lines)
end

--- Line i, without its end.
-- @param i integer from 1
-- @return string|nil, string|nil message
function Lines:get(i)
  local n = tonumber(C.wane_lines_read(self.handle, i - 1, self.buffer, self.room))
  if n > self.room then
    if n > LONGEST then return nil, ("%d bytes long, which is no line of text"):format(n) end
    self.room, self.buffer = n, ffi.new("char[?]", n)
    n = tonumber(C.wane_lines_read(self.handle, i - 1, self.buffer, self.room))
  end
  if n < 0 then return nil, ffi.string(C.wane_error()) end
  return ffi.string(self.buffer, n)
end

return M
