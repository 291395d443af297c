--- A small safetensors reader for specs: independent of the library under test.
-- `read(path)` loads a whole file; each tensor is { dtype, shape, numel, nbytes, data } where data is an aligned cdata pointer of
-- the element's type (uint16_t for F16 and BF16). The tensors keep the file's buffer alive.
local ffi = require "ffi"
local cjson = require "cjson"

local M = {}

local ctype = {
  F32 = "float", F64 = "double", F16 = "uint16_t", BF16 = "uint16_t", I8 = "int8_t", U8 = "uint8_t", BOOL = "uint8_t",
  I16 = "int16_t", I32 = "int32_t", I64 = "int64_t",
}

--- Reads a safetensors file.
-- @param path string
-- @return table name -> tensor
-- @return table the file's __metadata__ (may be empty)
function M.read(path)
  local file = assert(io.open(path, "rb"))
  local bytes = file:read "*a"
  file:close()
  local length = ffi.new "uint64_t[1]"
  ffi.copy(length, bytes, 8)
  local header_end = 8 + tonumber(length[0])
  local header = cjson.decode(bytes:sub(9, header_end))
  -- One copy into memory of its own, so that element pointers are aligned whatever the header's length.
  local buffer = ffi.new("uint8_t[?]", math.max(1, #bytes - header_end))
  ffi.copy(buffer, ffi.cast("const char *", bytes) + header_end, #bytes - header_end)
  local tensors, metadata = {}, header.__metadata__ or {}
  header.__metadata__ = nil
  for name, entry in pairs(header) do
    local first, last = entry.data_offsets[1], entry.data_offsets[2]
    local numel = 1
    for _, size in ipairs(entry.shape) do numel = numel * size end
    tensors[name] = {
      dtype = entry.dtype, shape = entry.shape, numel = numel, nbytes = last - first, buffer = buffer,
      data = ffi.cast("const " .. assert(ctype[entry.dtype], entry.dtype) .. " *", buffer + first),
    }
  end
  return tensors, metadata
end

--- The elements as a flat Lua list of numbers (not for F16, BF16, I64).
-- @param tensor table one of read()'s
-- @return table
function M.list(tensor)
  local list = {}
  for i = 1, tensor.numel do list[i] = tonumber(tensor.data[i - 1]) end
  return list
end

--- The element bytes as a Lua string.
-- @param tensor table one of read()'s
-- @return string
function M.bytes(tensor)
  return ffi.string(tensor.data, tensor.nbytes)
end

return M
