--- Lines of a text file by number, without holding the file.
-- @module wane.train.lines
local ffi = require "ffi"
local core = require "wane.core"
local paths = require "wane.checkpoint.paths"
local C = core.C

---@class wane.Lines
---@field path string
---@field count integer
---@field hash string XXH64 of the file without a byte order mark
---@field blanks integer how many lines are empty, or nothing but white space
local Lines = {}
Lines.__index = Lines

local M = {}

local LONGEST = 64 * 2 ^ 20              -- bytes; a longer line is a file of another kind

--- Indexes a file: one pass, 8 bytes of memory a line and as many a blank one.
-- @param path string
-- @return wane.Lines|nil, string|nil message
function M.open(path)
  local job, box = ffi.new "wane_job *[1]", ffi.new "wane_lines *[1]"
  core.check(C.wane_lines_open(job, path))
  local handle = ffi.gc(job[0], C.wane_job_free)
  local status = core.wait_job(handle)
  if status == 0 then status = C.wane_lines_take(handle, box) end
  if status ~= 0 then return nil, ffi.string(C.wane_error()) end
  local lines, numbers = ffi.gc(box[0], C.wane_lines_free), ffi.new "const uint64_t *[1]"
  local blanks = tonumber(C.wane_lines_blank(lines, numbers))
  return setmetatable({ path = path, handle = lines, count = tonumber(C.wane_lines_count(lines)), blanks = blanks, blank = numbers[0],
    hash = paths.hex(C.wane_lines_hash(lines)), room = 4096,
    buffer = ffi.new("char[?]", 4096) }, Lines)
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

--- The number of a line, counted among those that are not blank.
-- @param i integer from 1 to count - blanks
-- @return integer its number among all lines
function Lines:full(i)
  local low, high = 0, self.blanks                       -- how many blank ones stand before it: bisected
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if tonumber(self.blank[middle - 1]) + 1 - middle < i then low = middle else high = middle - 1 end
  end
  return i + low
end

return M
