--- How one weight lies in a folder: which keys it gives under a scheme, and writing them.
--
-- An item is { name (in the file), shape, dtype (plain: of the file; quantized: of the values before), scheme = nil | { type, block_size,
-- double_quant }, load = function() -> Tensor | nil, message, code, pieces = nil | function() -> next (see wane.checkpoint.writer) }.
-- @module wane.checkpoint.layout
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C
local quantized = require "wane.checkpoint.quantized"

local M = {}

--- Bytes of a value of each dtype that a folder holds.
M.widths = { f32 = 4, f16 = 2, bf16 = 2, i8 = 1, u8 = 1, i32 = 4, i64 = 8, bool = 1 }

local LONGEST_NUMBER = ("x"):rep(24)               -- as -2.2250738585072014e-308 is

local function numel(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

-- ---------------------------------------------------------------- keys

local function int8_keys(item)
  local stem = item.name:match "^(.*)%.weight$" or item.name
  return { [item.name] = { dtype = "i8", shape = item.shape, part = "codes" },
           [stem .. ".SCB"] = { dtype = "f32", shape = { item.shape[1] }, part = "absmax" },
           [stem .. ".weight_format"] = { dtype = "u8", shape = {}, text = "\0" } }
end

local function blockwise_keys(item)
  local stem = item.name:match "^(.*)%.weight$" or item.name
  return { [item.name] = { dtype = "u8", shape = item.shape, part = "codes" },
           [stem .. ".absmax"] = { dtype = "f32", shape = { math.ceil(numel(item.shape) / item.scheme.block_size) }, part = "absmax" },
           [stem .. ".code"] = { dtype = "f32", shape = { 256 }, part = "code" } }
end

local function state(item, offset)
  local s = item.scheme
  return quantized.state_text({ type = s.type, block_size = s.block_size, dtype = item.dtype, shape = item.shape, double_quant = s.double_quant }, offset)
end

-- The text of a double-quantized state ends in the scales' mean, which is known once the weight is quantized.
local function four_bit_keys(item)
  local name, scheme, n = item.name, item.scheme, numel(item.shape)
  local blocks = math.ceil(n / scheme.block_size)
  local keys = { [name] = { dtype = "u8", shape = { math.ceil(n / 2), 1 }, part = "codes" },
                 [name .. ".absmax"] = { dtype = scheme.double_quant and "u8" or "f32", shape = { blocks }, part = "absmax" },
                 [name .. ".quant_map"] = { dtype = "f32", shape = { 16 }, levels = true } }
  local state_key = name .. ".quant_state.bitsandbytes__" .. scheme.type
  if scheme.double_quant then
    keys[name .. ".nested_absmax"] = { dtype = "f32", shape = { math.ceil(blocks / 256) }, part = "nested_absmax" }
    keys[name .. ".nested_quant_map"] = { dtype = "f32", shape = { 256 }, part = "nested_code" }
    keys[state_key] = { dtype = "u8", longest = #state(item, 0) + #LONGEST_NUMBER, state = true }
  else
    local text = state(item)
    keys[state_key] = { dtype = "u8", shape = { #text }, text = text }
  end
  return keys
end

--- Keys of an item as { key = { dtype, shape | longest, and what fills it } }, a plan for wane.checkpoint.writer.
-- @param item table
-- @return table
function M.keys(item)
  if not item.scheme then return { [item.name] = { dtype = item.dtype, shape = item.shape } } end
  if item.scheme.type == "int8" then return int8_keys(item) end
  if item.scheme.type == "int8-blockwise" then return blockwise_keys(item) end
  return four_bit_keys(item)
end

--- Bytes of an item in the file, near enough to cut shards.
-- @param item table
-- @return integer
function M.bytes(item)
  local n, scheme = numel(item.shape), item.scheme
  if not scheme then return n * M.widths[item.dtype] end
  if scheme.type == "int8" then return n + item.shape[1] * 4 end
  local blocks = math.ceil(n / scheme.block_size)
  if scheme.type == "int8-blockwise" then return n + blocks * 4 + 1024 end
  return math.ceil(n / 2) + blocks * (scheme.double_quant and 1 or 4) + 2048
end

--- Sorts items into the order in which they can be written: that of their keys in the file, of which those of bool lie last.
-- @param items table[]
function M.sort(items)
  local function last(item) return not item.scheme and item.dtype == "bool" end
  table.sort(items, function(a, b)
    if last(a) ~= last(b) then return last(b) end
    return a.name .. "." < b.name .. "."
  end)
end

-- ---------------------------------------------------------------- writing

-- The 16 values of a 4-bit kind as f32 bytes: a tensor of all codes, dequantized.
local levels_cache = {}
local function levels(kind)
  if levels_cache[kind] then return levels_cache[kind] end
  local s, codes = core.stream(), ffi.new("uint8_t[8]", 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef)
  local out = ffi.new "float[16]"
  core.scope(function()
    local h = { core.handle_type(), core.handle_type(), core.handle_type(), core.handle_type() }
    local given = ffi.new("const wane_handle *[?]", C.WANE_PARTS)
    core.check(C.wane_tensor_new(s, h[1], C.WANE_U8, 1, ffi.new("int64_t[1]", 8)))
    core.check(C.wane_tensor_upload(s, h[1], codes, 8))
    core.check(C.wane_tensor_new(s, h[2], C.WANE_F32, 1, ffi.new("int64_t[1]", 1)))
    core.check(C.wane_fill(s, h[2], 1))
    given[C.WANE_PART_CODES], given[C.WANE_PART_ABSMAX] = h[1], h[2]
    core.check(C.wane_quantized_new(s, h[3], core.dtype(kind), 1, ffi.new("int64_t[1]", 16), 64, 0, given))
    core.check(C.wane_dequantize(s, h[4], h[3], C.WANE_F32))
    core.check(core.wait())
    core.check(C.wane_tensor_read(s, h[4], out, 64))
  end)
  for i = 0, 15 do if out[i] == 0 then out[i] = 0 end end            -- FP4's code 8 is -0; upstream's map has 0 there
  levels_cache[kind] = ffi.string(out, 64)
  return levels_cache[kind]
end

local function offset_of(q)
  core.check(core.wait())
  local offset = ffi.new "float[1]"
  core.check(C.wane_quantized_offset(q.h, offset))
  return offset[0]
end

-- The tensor of a key: a part, for int8-blockwise codes and the like in the shape of the file.
local function write_part(w, key, k, t)
  local part = t[k.part]
  if not part then core.raise("write: '%s': a tensor of dtype %s has no part '%s'", key, t:dtype(), k.part) end
  local ok, message, code = w:tensor(key, part)
  part:close()
  return ok, message, code
end

local function write_quantized(w, item, keys, t)
  for key, k in pairs(keys) do
    local ok, message, code
    if k.text then ok, message, code = w:bytes(key, k.text)
    elseif k.state then ok, message, code = w:bytes(key, state(item, offset_of(t)))
    elseif k.levels then ok, message, code = w:bytes(key, levels(item.scheme.type))
    else ok, message, code = write_part(w, key, k, t) end
    if not ok then return nil, message, code end
  end
  return true
end

--- Loads an item, writes all its keys and lets it go.
-- @param w wane.SafetensorsWriter opened with the keys of all items of the file
-- @param item table; item.written(tensor), where there is such a function, sees a quantized item's tensor
-- @param keys table of M.keys
-- @return true|nil, string|nil message, string|nil code
function M.write(w, item, keys)
  if item.pieces then return w:pieces(item.name, item.pieces()) end
  local t, message, code = item.load()
  if not t then return nil, message, code end
  local ok
  if item.scheme then ok, message, code = write_quantized(w, item, keys, t) else ok, message, code = w:tensor(item.name, t) end
  if ok and item.written then item.written(t) end
  if not item.borrowed then t:close() end
  return ok, message, code
end

return M
