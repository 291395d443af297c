--- Writing safetensors files: the header first, from a plan, then tensors in any order; the file appears whole or not at all.
-- Places follow upstream's writer: by dtype (the widest first, so that all are aligned), then by name; the header padded to 8 bytes.
-- Source: safetensors/src/tensor.rs (serialize).
-- @module wane.checkpoint.writer
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C
local json = require "wane.checkpoint.json"
local Tensor = require "wane.tensor"

local M = {}

-- Rank of upstream's dtype enum, spelling in files, bytes a value.
local dtypes = {
  i64 = { 1, "I64", 8 }, f32 = { 2, "F32", 4 }, i32 = { 3, "I32", 4 }, bf16 = { 4, "BF16", 2 }, f16 = { 5, "F16", 2 },
  i8 = { 6, "I8", 1 }, u8 = { 7, "U8", 1 }, bool = { 8, "BOOL", 1 },
}
local PIECE = 4 * 1024 * 1024

---@class wane.SafetensorsWriter
local Writer = {}
Writer.__index = Writer

local function header_of(plan, metadata)
  local order, offset, fields = {}, 0, {}
  for name in pairs(plan) do order[#order + 1] = name end
  table.sort(order, function(a, b)
    local x, y = dtypes[plan[a].dtype][1], dtypes[plan[b].dtype][1]
    if x ~= y then return x < y end
    return a < b
  end)
  if metadata and next(metadata) then
    local keys = {}
    for k in pairs(metadata) do keys[#keys + 1] = k end
    table.sort(keys)
    for i, k in ipairs(keys) do keys[i] = json.string(k) .. ":" .. json.string(metadata[k]) end
    fields[1] = '"__metadata__":{' .. table.concat(keys, ",") .. "}"
  end
  local places = {}
  for _, name in ipairs(order) do
    local p, sizes, bytes = plan[name], {}, dtypes[plan[name].dtype][3]
    for i, size in ipairs(p.shape) do
      sizes[i] = ("%d"):format(size)
      bytes = bytes * size
    end
    fields[#fields + 1] = ('%s:{"dtype":"%s","shape":[%s],"data_offsets":[%d,%d]}'):format(
      json.string(name), dtypes[p.dtype][2], table.concat(sizes, ","), offset, offset + bytes)
    places[name] = { offset = offset, bytes = bytes, dtype = p.dtype, left = true }
    offset = offset + bytes
  end
  local text = "{" .. table.concat(fields, ",") .. "}"
  text = text .. (" "):rep(-#text % 8)
  local length, rest = {}, #text
  for i = 1, 8 do
    length[i] = string.char(rest % 256)
    rest = math.floor(rest / 256)
  end
  return table.concat(length) .. text, places
end

--- Starts a safetensors file.
-- @param path string
-- @param plan table { name = { dtype = "f32", shape = { … } } }: everything that will be written
-- @param metadata table|nil { string = string }
-- @return wane.SafetensorsWriter|nil, string|nil message, string|nil code
function M.open(path, plan, metadata)
  for name, p in pairs(plan) do
    if type(name) ~= "string" or name == "__metadata__" then core.raise("write: '%s' cannot be the name of a tensor", tostring(name)) end
    if not dtypes[p.dtype] then core.raise("write: tensor '%s' is %s; a safetensors file holds plain dtypes", name, tostring(p.dtype)) end
  end
  for k, v in pairs(metadata or {}) do
    if type(k) ~= "string" or type(v) ~= "string" then core.raise("write: metadata maps strings to strings, found %s = %s", tostring(k), tostring(v)) end
  end
  local box = ffi.new "wane_writer *[1]"
  local status = C.wane_writer_open(box, path)
  if status < 0 then return core.failure(status) end
  local header, places = header_of(plan, metadata)
  local self = setmetatable({ path = path, handle = ffi.gc(box[0], C.wane_writer_free), places = places, data = #header }, Writer)
  status = C.wane_writer_write(self.handle, 0, header, #header)
  if status < 0 then
    local _, message, code = core.failure(status)
    self:close()
    return nil, message, code
  end
  return self
end

local function place_of(self, name, bytes)
  if not self.handle then core.raise("write: '%s' was finished or given up", self.path) end
  local p = self.places[name]
  if not p or not p.left then core.raise("write: tensor '%s' was not planned, or was written before", tostring(name)) end
  if p.bytes ~= bytes then core.raise("write: tensor '%s' has %d bytes, %d were planned", name, bytes, p.bytes) end
  return p
end

--- Writes a tensor's bytes from a Lua string.
-- @return true|nil, string|nil message, string|nil code
function Writer:bytes(name, text)
  local p = place_of(self, name, #text)
  local status = C.wane_writer_write(self.handle, self.data + p.offset, text, #text)
  if status < 0 then return core.failure(status) end
  p.left = nil
  return true
end

--- Writes a tensor (any strides; the planned dtype). Waits for the ops that make it.
-- @return true|nil, string|nil message, string|nil code
function Writer:tensor(name, t)
  local s, h, info = core.stream(), t.h, core.info_type()
  core.check(C.wane_tensor_info(h, info))
  local copy
  if info.contiguous == 0 then
    copy = core.handle_type()
    core.check(C.wane_cast(s, copy, h, info.dtype))
    copy = Tensor.wrap(copy)
    h = copy.h
    core.check(C.wane_tensor_info(h, info))
  end
  local bytes, ticket = tonumber(info.nbytes), info.ticket
  local p = place_of(self, name, bytes)
  if p.dtype ~= core.dtype_name(info.dtype) then core.raise("write: tensor '%s' is %s, %s was planned", name, core.dtype_name(info.dtype), p.dtype) end
  local status = core.wait(ticket)
  local data = status >= 0 and bytes > 0 and ffi.cast("const char *", C.wane_tensor_data(s, h)) or nil
  local at = 0
  while status >= 0 and at < bytes do
    local n = math.min(PIECE, bytes - at)
    status = C.wane_writer_write(self.handle, self.data + p.offset + at, data + at, n)
    at = at + n
  end
  local failed, message, code = status < 0, nil, nil
  if failed then message, code = select(2, core.failure(status)) end
  if copy then copy:close() end
  if failed then return nil, message, code end
  p.left = nil
  return true
end

--- Flushes the file to the disk and puts it in its place.
-- @return true|nil, string|nil message, string|nil code
function Writer:finish()
  if not self.handle then core.raise("write: '%s' was finished or given up", self.path) end
  for name, p in pairs(self.places) do
    if p.left then core.raise("write: tensor '%s' was planned but not written", name) end
  end
  local box = ffi.new "wane_job *[1]"
  local status = C.wane_writer_finish(ffi.gc(self.handle, nil), box)
  self.handle = nil
  if status < 0 then return core.failure(status) end
  local job = ffi.gc(box[0], C.wane_job_free)
  status = core.wait_job(job)
  local message, code
  if status < 0 then message, code = select(2, core.failure(status)) end
  C.wane_job_free(ffi.gc(job, nil))
  if status < 0 then return nil, message, code end
  return true
end

--- Gives up: the unfinished file goes, an old one stays.
function Writer:close()
  if self.handle then C.wane_writer_free(ffi.gc(self.handle, nil)) end
  self.handle = nil
end

--- See wane.checkpoint.write_safetensors.
function M.write(path, tensors, metadata)
  local plan = {}
  for name, t in pairs(tensors) do
    if not Tensor.is(t) then core.raise("write_safetensors: '%s' is no tensor", tostring(name)) end
    plan[name] = { dtype = t:dtype(), shape = t:shape() }
  end
  local w, message, code = M.open(path, plan, metadata)
  if not w then return nil, message, code end
  for name, t in pairs(tensors) do
    local ok
    ok, message, code = w:tensor(name, t)
    if not ok then
      w:close()
      return nil, message, code
    end
  end
  return w:finish()
end

--- Writes a small file whole or not at all.
-- @param path string
-- @param text string
-- @return true|nil, string|nil message, string|nil code
function M.write_text(path, text)
  local box = ffi.new "wane_writer *[1]"
  local status = C.wane_writer_open(box, path)
  if status < 0 then return core.failure(status) end
  local self = setmetatable({ path = path, places = {}, handle = ffi.gc(box[0], C.wane_writer_free) }, Writer)
  status = C.wane_writer_write(self.handle, 0, text, #text)
  if status >= 0 then return self:finish() end
  local _, message, code = core.failure(status)
  self:close()
  return nil, message, code
end

return M
