--- The log of a run: a line of JSON for every update and evaluation, appended to a file.
-- @module wane.train.log
local cjson = require "cjson"
local core = require "wane.core"
local ffi = require "ffi"
local json = require "wane.checkpoint.json"
local paths = require "wane.checkpoint.paths"
local writer = require "wane.checkpoint.writer"

local M = {}

---@class wane.TrainLog
---@field records table[] of this run and of what it resumed
local Log = {}
Log.__index = Log

-- The records of a log up to `step`; a last line that a kill cut short is left out.
local function read(path, step)
  local records = {}
  for line in io.lines(path) do
    local ok, record = pcall(cjson.decode, line)
    if ok and type(record) == "table" and type(record.step) == "number" and record.step <= step then records[#records + 1] = record end
  end
  return records
end

-- A line of a record. JSON knows no NaN: a loss that is not finite is null there.
local function text_of(record)
  local line = {}
  for key, value in pairs(record) do
    local finite = type(value) ~= "number" or value - value == 0
    line[key] = finite and value or cjson.null
  end
  return (json.encode(line):gsub("\n%s*", " ")) .. "\n"
end

-- Writes the records so far, in the place of what stood there, and stays at the end of the file: true, or nil and why not.
local function begin(self)
  local lines = {}
  for i, record in ipairs(self.records) do lines[i] = text_of(record) end
  local ok, message = writer.write_text(self.path, table.concat(lines))   -- renamed into place: a kill leaves the old log
  if not ok then return nil, "cannot write the log: " .. message end
  self.file, message = io.open(self.path, "a")
  return self.file and true, message
end

--- Whether a log can be put at `path`. Nothing stays of the trial.
-- @param path string
-- @return true|nil, string|nil message
function M.can_write(path)
  local box = ffi.new "wane_writer *[1]"
  if paths.is_folder(path) then return nil, ("cannot write the log: '%s' is a folder"):format(path) end
  if core.C.wane_writer_open(box, path) < 0 then return nil, "cannot write the log: " .. ffi.string(core.C.wane_error()) end
  core.C.wane_writer_free(box[0])
  return true
end

--- Opens a log. A new one is written with its first record, so that a run that fails before leaves what was there.
-- @param path string|nil nil: records are kept in memory alone
-- @param resume integer|nil the step that a resumed run goes on from: later records, of steps that will be done again, are dropped; nil: a new log
-- @return wane.TrainLog|nil, string|nil message where it cannot be written
function M.open(path, resume)
  local self = setmetatable({ path = path, records = {} }, Log)
  if not path then return self end
  local ok, message = M.can_write(path)
  if ok and resume and paths.is_file(path) then
    self.records = read(path, resume)
    ok, message = begin(self)
  end
  if not ok then return nil, message end
  return self
end

--- Adds a record; on the disk at once.
-- @param record table of numbers and strings, with `step`
function Log:add(record)
  self.records[#self.records + 1] = record
  if not self.path then return end
  local ok, message
  if self.file then
    ok, message = self.file:write(text_of(record))
    if ok then ok, message = self.file:flush() end
  else
    ok, message = begin(self)
  end
  if not ok then core.raise("log: the line of step %s was not written: %s", tostring(record.step), tostring(message)) end
end

--- Points of a field: { { step, value } … }.
-- @param field string "loss", "eval_loss"
-- @return table[]
function Log:points(field)
  local points = {}
  for _, record in ipairs(self.records) do
    local v = record[field]
    if type(v) == "number" and v == v and math.abs(v) < math.huge then points[#points + 1] = { record.step, v } end
  end
  return points
end

--- Closes the file.
function Log:close()
  if self.file then self.file:close() end
  self.file = nil
end

return M
