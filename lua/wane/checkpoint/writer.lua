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

-- Names in the order in which their bytes lie.
local function order_of(plan)
  local order = {}
  for name in pairs(plan) do order[#order + 1] = name end
  table.sort(order, function(a, b)
    local x, y = dtypes[plan[a].dtype][1], dtypes[plan[b].dtype][1]
    if x ~= y then return x < y end
    return a < b
  end)
  return order
end

local function metadata_field(metadata)
  if not metadata or not next(metadata) then return nil end
  local keys = {}
  for k in pairs(metadata) do keys[#keys + 1] = k end
  table.sort(keys)
  for i, k in ipairs(keys) do keys[i] = json.string(k) .. ":" .. json.string(metadata[k]) end
  return '"__metadata__":{' .. table.concat(keys, ",") .. "}"
end

local function bytes_of(dtype, shape)
  local bytes = dtypes[dtype][3]
  for _, size in ipairs(shape) do bytes = bytes * size end
  return bytes
end

-- The header's JSON for a plan whose shapes are all known (those that are not: at their longest).
local function header_of(plan, order, metadata)
  local fields, offset = { metadata_field(metadata) }, 0
  for _, name in ipairs(order) do
    local p = plan[name]
    local shape, sizes = p.shape or { p.longest }, {}
    for i, size in ipairs(shape) do sizes[i] = ("%d"):format(size) end
    local bytes = bytes_of(p.dtype, shape)
    fields[#fields + 1] = ('%s:{"dtype":"%s","shape":[%s],"data_offsets":[%d,%d]}'):format(
      json.string(name), dtypes[p.dtype][2], table.concat(sizes, ","), offset, offset + bytes)
    offset = offset + bytes
  end
  return "{" .. table.concat(fields, ",") .. "}"
end

-- Gives places to as many tensors as can have one: everything before the first whose length is not known yet.
local function settle(self)
  while self.settled < #self.order do
    local p = self.plan[self.order[self.settled + 1]]
    if not p.shape then return end
    self.settled = self.settled + 1
    local place = self.places[self.order[self.settled]]
    place.offset, place.bytes = self.at, bytes_of(p.dtype, p.shape)
    self.at = self.at + place.bytes
  end
end

-- The header with its length in front, filled with spaces to `room` bytes of JSON (a multiple of 8).
local function write_header(self, room)
  local text = header_of(self.plan, self.order, self.metadata)
  text = text .. (" "):rep(room - #text)
  local length, rest = {}, room
  for i = 1, 8 do
    length[i] = string.char(rest % 256)
    rest = math.floor(rest / 256)
  end
  text = table.concat(length) .. text
  return C.wane_writer_write(self.handle, 0, text, #text)
end

--- Starts a safetensors file.
-- @param path string
-- @param plan table { name = { dtype = "f32", shape = { … } } }: everything that will be written. A text whose length is not known yet is
--   { dtype = "u8", longest = bytes }; what lies behind it (see the order above) can only be written once it was.
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
  local self = setmetatable({ path = path, handle = ffi.gc(box[0], C.wane_writer_free), plan = {}, places = {}, order = order_of(plan), settled = 0,
                              at = 0, metadata = metadata }, Writer)
  for name, p in pairs(plan) do
    self.plan[name] = { dtype = p.dtype, shape = p.shape, longest = p.longest }
    self.places[name] = { dtype = p.dtype, left = true }
  end
  local bound = #header_of(self.plan, self.order, metadata)
  self.data = 8 + bound + -bound % 8
  settle(self)
  return self
end

local function place_of(self, name, bytes)
  if not self.handle then core.raise("write: '%s' was finished or given up", self.path) end
  local p = self.places[name]
  if not p or not p.left then core.raise("write: tensor '%s' was not planned, or was written before", tostring(name)) end
  local planned = self.plan[name]
  if not planned.shape and bytes <= planned.longest then
    planned.shape = { bytes }
    settle(self)
  end
  if not p.offset then core.raise("write: tensor '%s' lies behind one whose length is not known yet", name) end
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

-- Writes the bytes of a contiguous tensor at a place of the file, once the ops that make them have run. Returns a status and the bytes.
local function put(self, place, t)
  local s, info = core.stream(), core.info_type()
  core.check(C.wane_tensor_info(t.h, info))
  local bytes, at = tonumber(info.nbytes), 0
  local status = core.wait(info.ticket)
  local data = status >= 0 and bytes > 0 and ffi.cast("const char *", C.wane_tensor_data(s, t.h)) or nil
  while status >= 0 and at < bytes do
    local n = math.min(PIECE, bytes - at)
    status = C.wane_writer_write(self.handle, self.data + place + at, data + at, n)
    at = at + n
  end
  return status, bytes
end

--- Writes a tensor piece by piece, so that the whole is never in memory.
-- @param name string
-- @param next function(at) -> wane.Tensor|nil, string|nil message, string|nil code: a contiguous tensor (closed here) with the bytes
--   from byte `at` of the planned tensor on
-- @return true|nil, string|nil message, string|nil code
function Writer:pieces(name, next)
  local p = self.places[name]
  place_of(self, name, p and p.bytes or 0)
  local at = 0
  while at < p.bytes do
    local piece, message, code = next(at)
    if not piece then return nil, message, code end
    local status, bytes = put(self, p.offset + at, piece)
    piece:close()
    if status < 0 then return core.failure(status) end
    at = at + bytes
  end
  if at > p.bytes then core.raise("write: tensor '%s' has %d bytes, %d were planned", name, at, p.bytes) end
  p.left = nil
  return true
end

--- Writes a tensor (any strides; the planned dtype). Waits for the ops that make it.
-- @return true|nil, string|nil message, string|nil code
function Writer:tensor(name, t)
  local info, whole = core.info_type(), t
  core.check(C.wane_tensor_info(t.h, info))
  if info.contiguous == 0 then
    local h = core.handle_type()
    core.check(C.wane_cast(core.stream(), h, t.h, info.dtype))
    whole = Tensor.wrap(h)
    core.check(C.wane_tensor_info(whole.h, info))
  end
  local p = place_of(self, name, tonumber(info.nbytes))
  if p.dtype ~= core.dtype_name(info.dtype) then core.raise("write: tensor '%s' is %s, %s was planned", name, core.dtype_name(info.dtype), p.dtype) end
  local status, message, code = put(self, p.offset, whole), nil, nil
  if status < 0 then message, code = select(2, core.failure(status)) end
  if whole ~= t then whole:close() end
  if status < 0 then return nil, message, code end
  p.left = nil
  return true
end

-- Flushes the file to the disk and renames it into its place.
local function commit(self)
  local box = ffi.new "wane_job *[1]"
  local status = C.wane_writer_finish(ffi.gc(self.handle, nil), box)      -- the writer is the job's now
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

--- Writes the header, flushes the file to the disk and puts it in its place.
-- @return true|nil, string|nil message, string|nil code
function Writer:finish()
  if not self.handle then core.raise("write: '%s' was finished or given up", self.path) end
  for name, p in pairs(self.places) do
    if p.left then core.raise("write: tensor '%s' was planned but not written", name) end
  end
  local status = write_header(self, self.data - 8)
  if status >= 0 then return commit(self) end
  local _, message, code = core.failure(status)
  self:close()
  return nil, message, code
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
  local self = setmetatable({ path = path, handle = ffi.gc(box[0], C.wane_writer_free) }, Writer)
  status = C.wane_writer_write(self.handle, 0, text, #text)
  if status >= 0 then return commit(self) end
  local _, message, code = core.failure(status)
  self:close()
  return nil, message, code
end

return M
