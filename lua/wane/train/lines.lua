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

--- Which lines are blank: empty, or nothing but white space. Reads the file once more.
-- @return integer[]|nil their numbers, rising, string|nil message
function Lines:blank()
  local f, message = io.open(self.path, "rb")
  if not f then return nil, message end
  local found, number, white = {}, 1, true               -- white: line `number`, as far as it was read
  local at = f:read(3) == "\239\187\191" and 4 or 1       -- behind a byte order mark, as the index begins
  f:seek("set", at - 1)
  for chunk in function() return f:read(2 ^ 20) end do
    local from, mark = 1, 0                              -- mark: the first byte from `from` on that is no white space
    while from <= #chunk do
      if mark < from then mark = chunk:find("%S", from) or #chunk + 1 end
      local stop = chunk:find("\n", from, true)
      white = white and mark > (stop or #chunk)
      if not stop then break end
      if white then found[#found + 1] = number end
      from, number, white = stop + 1, number + 1, true
    end
  end
  f:close()
  if white and number <= self.count then found[#found + 1] = number end        -- the last one, without its end
  return found
end

return M
