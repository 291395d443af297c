--- The table of contents of a checkpoint file: a Lua face on wane.h's index.
-- @module wane.checkpoint.index
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C

---@class wane.Index
---@field path string
---@field handle ffi.cdata* wane_index *
local Index = {}
Index.__index = Index

local M = {}

--- Opens a .safetensors file, a .gguf file, a file of torch.save (pytorch_model.bin), or a list of shards with its shards. Waits for
-- the headers as core.wait_job does.
-- @param path string
-- @return wane.Index|nil, string|nil message, string|nil code
function M.open(path)
  if type(path) ~= "string" then core.raise("a path was expected, found a %s", type(path)) end
  local box = ffi.new "wane_job *[1]"
  local status = C.wane_index_open(box, path)
  if status < 0 then return core.failure(status) end
  local job = ffi.gc(box[0], C.wane_job_free)
  status = core.wait_job(job)
  local out = ffi.new "wane_index *[1]"
  if status == 0 then status = C.wane_index_take(job, out) end
  local message, code
  if status < 0 then message, code = select(2, core.failure(status)) end
  C.wane_job_free(ffi.gc(job, nil))
  if status < 0 then return nil, message, code end
  local self = setmetatable({ path = path, handle = ffi.gc(out[0], C.wane_index_free) }, Index)
  if self:format() == "torch" then
    local ok
    ok, message, code = require("wane.checkpoint.torch").describe(self)
    if not ok then
      self:close()
      return nil, message, code
    end
  end
  return self
end

--- The C handle; raises once the index is closed.
function Index:live()
  if not self.handle then core.raise("'%s' was closed", self.path) end
  return self.handle
end

--- Lets the files go. Mapped tensors stay valid.
function Index:close()
  if self.handle then C.wane_index_free(ffi.gc(self.handle, nil)) end
  self.handle = nil
end

local formats = { [C.WANE_FORMAT_SAFETENSORS] = "safetensors", [C.WANE_FORMAT_GGUF] = "gguf", [C.WANE_FORMAT_TORCH] = "torch" }

--- "safetensors", "gguf" or "torch".
function Index:format() return formats[C.wane_index_format(self:live())] end

--- Number of tensors.
function Index:count() return tonumber(C.wane_index_count(self:live())) end

local raw = ffi.new "wane_entry"

--- Entry number i (from 0) as a table { i, name, file_dtype, dtype (nil where wane does not read it), shape, stride (nil where the values
-- lie in the shape's order), offset, bytes, file }.
function Index:entry(i)
  core.check(C.wane_index_entry(self:live(), i, raw))
  local shape = {}
  for d = 1, raw.ndim do shape[d] = tonumber(raw.shape[d - 1]) end
  local stride = raw.strided ~= 0 and {} or nil
  for d = 1, stride and raw.ndim or 0 do stride[d] = tonumber(raw.stride[d - 1]) end
  return { i = i, name = ffi.string(raw.name), file_dtype = ffi.string(raw.dtype_name), dtype = raw.dtype >= 0 and core.dtype_name(raw.dtype) or nil,
           shape = shape, stride = stride, offset = tonumber(raw.offset), bytes = tonumber(raw.bytes), file = raw.file, index = self }
end

--- The entry of a name, or nil.
function Index:find(name)
  local i = tonumber(C.wane_index_find(self:live(), name))
  return i >= 0 and self:entry(i) or nil
end

--- Is there an entry of that name?
function Index:has(name) return C.wane_index_find(self:live(), name) >= 0 end

--- Name of entry i (from 0).
function Index:name(i)
  core.check(C.wane_index_entry(self:live(), i, raw))
  return ffi.string(raw.name)
end

--- Names of all entries, in order: `for name in ix:each_name() do`.
function Index:each_name()
  local i, count = -1, self:count()
  return function()
    i = i + 1
    return i < count and self:name(i) or nil
  end
end

--- Paths of the files, in order.
function Index:files()
  local list = {}
  for i = 0, C.wane_index_files(self:live()) - 1 do list[#list + 1] = ffi.string(C.wane_index_path(self:live(), i)) end
  return list
end

--- An entry's bytes (or the first `most`) as a string. For small things: it reads at once.
-- @return string|nil, string|nil message, string|nil code
function Index:bytes(entry, most)
  local n = math.min(entry.bytes, most or entry.bytes)
  local buffer = ffi.new("char[?]", math.max(n, 1))
  local status = C.wane_index_read(self:live(), entry.i, (entry.piece or 0) * entry.bytes, buffer, n)
  if status < 0 then return core.failure(status) end
  return ffi.string(buffer, n)
end

-- ---------------------------------------------------------------- metadata

local function value_of(m)
  if m.kind == C.WANE_META_STRING then return ffi.string(m.text, m.length) end
  if m.kind == C.WANE_META_BOOL then return m.integer ~= 0 end
  return tonumber(m.number)
end

--- The value of a metadata key: string, number or boolean; nil if absent. Arrays: see `array`.
function Index:meta(key)
  local m = ffi.new "wane_meta"
  if C.wane_index_meta(self:live(), key, m) < 0 or m.kind == C.WANE_META_ARRAY then return nil end
  return value_of(m)
end

--- A metadata array: its length and a function that gives item i (from 1); nil if absent or no array.
-- @return integer|nil, function|nil
function Index:array(key)
  local m = ffi.new "wane_meta"
  if C.wane_index_meta(self:live(), key, m) < 0 or m.kind ~= C.WANE_META_ARRAY then return nil end
  local item = ffi.new "wane_meta"
  return tonumber(m.count), function(i)
    core.check(C.wane_index_meta_item(self:live(), key, i - 1, item))
    return value_of(item)
  end
end

--- All metadata keys, in the order of the file.
function Index:keys()
  local list = {}
  for i = 0, tonumber(C.wane_index_meta_count(self:live())) - 1 do list[#list + 1] = ffi.string(C.wane_index_meta_key(self:live(), i)) end
  return list
end

-- ---------------------------------------------------------------- tensors

--- A tensor over the file's own bytes (mapped), read as `dtype` and `shape` (default: the entry's own). An entry with `piece` and
-- `pieces` stands for one of so many equal pieces.
-- @return wane.Tensor|nil, string|nil message, string|nil code
function Index:map(entry, dtype, shape)
  dtype = dtype or entry.dtype
  if not dtype then
    return nil, ("tensor '%s' of '%s' is %s, a dtype that wane does not compute with"):format(entry.name, self.path, entry.file_dtype), "WANE_E_UNSUPPORTED"
  end
  local h = core.handle_type()
  local sizes, n = core.shape(shape or entry.shape)
  local status = C.wane_index_map(core.stream(), h, self:live(), entry.i, entry.piece or 0, entry.pieces or 1, core.dtype(dtype), n, sizes)
  if status < 0 then return core.failure(status) end
  return require("wane.tensor").wrap(h)
end

return M
