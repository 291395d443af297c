--- The log of a run: a line of JSON for every update and evaluation, appended to a file.
-- @module wane.train.log
local cjson = require "cjson"
local core = require "wane.core"
local ffi = require "ffi"
local json = require "wane.checkpoint.json"
local paths = require "wane.checkpoint.paths"
local saves = require "wane.train.saves"
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

-- Whether a file is a log of ours, or empty: its first line, which is renamed into place and so is whole, has what all records have.
local function is_log(path)
  local f, message = io.open(path, "rb")
  if not f then return nil, message end
  local line = f:read "*l"
  f:close()
  if not line then return true end
  local ok, record = pcall(cjson.decode, line)
  return ok and type(record) == "table" and type(record.step) == "number" and (record.loss or record.eval_loss) ~= nil
end

--- Whether a log can be put at `path`: in a folder that can be written, over nothing but another log (no device, no pipe: it is renamed into place),
-- and not over what a run reads. Nothing stays of the trial.
-- @param path string
-- @param data string[]|nil files of training data
-- @return true|nil, string|nil message
function M.can_write(path, data)
  local box = ffi.new "wane_writer *[1]"
  path = paths.real(path) or path
  local kind = core.C.wane_path_kind(path)
  if kind ~= core.C.WANE_PATH_NONE and kind ~= core.C.WANE_PATH_FILE then
    return nil, ("cannot write the log: '%s' is a folder, a device or a pipe"):format(path)
  end
  for _, file in ipairs(data or {}) do
    if paths.real(file) == path then return nil, ("cannot write the log: '%s' is the data"):format(path) end
  end
  local ours, message = true, nil
  if kind == core.C.WANE_PATH_FILE then ours, message = is_log(path) end
  if not ours then
    return nil, ("cannot write the log: %s"):format(message or ("'%s' is there, and no log of wane: choose another file, or remove it"):format(path))
  end
  if core.C.wane_writer_open(box, path) < 0 then return nil, "cannot write the log: " .. ffi.string(core.C.wane_error()) end
  core.C.wane_writer_free(box[0])
  return true
end

-- The lock of a log, which lies beside it: of two runs that share one each would replace what the other wrote.
local function lock(path)
  local folder, name = path:match "^(.*/)([^/]*)$"
  local held, message, status = saves.lock(("%s.%s.lock"):format(folder or "", name or path))
  if held then return held end
  if status ~= core.C.WANE_E_TIMEOUT then return nil, "cannot write the log: " .. message end
  return nil, ("another run writes the log '%s': %s. Wait for its end, or choose another file"):format(path, message), "busy"
end

--- Opens a log, and holds it until it is closed. A new one is written with its first record, so that a run that fails before leaves what was there.
-- @param path string|nil nil: records are kept in memory alone
-- @param resume integer|nil the step that a resumed run goes on from: later records, of steps that will be done again, are dropped; nil: a new log
-- @param data string[]|nil files that it must not be
-- @return wane.TrainLog|nil, string|nil message where it cannot be written, string|nil code: "busy" where another run writes it, "io"
function M.open(path, resume, data)
  path = path and paths.real(path) or path                          -- a link stays one, and its file has one lock
  local self = setmetatable({ path = path, records = {} }, Log)
  if not path then return self end
  local ok, message, code = M.can_write(path, data)
  if ok then self.lock, message, code = lock(path) end
  ok = self.lock
  if ok and resume and paths.is_file(path) then
    self.records = read(path, resume)
    ok, message = begin(self)
  end
  if ok then return self end
  self:close()
  return nil, message, code or "io"
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

--- Closes the file, and lets it go.
function Log:close()
  if self.file then self.file:close() end
  if self.lock then saves.unlock(self.lock) end
  self.file, self.lock = nil, nil
end

return M
