--- Helpers of the quantizer specs: tensors from bytes, bytes from tensors, every instruction-set level.
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C

local M = {}

--- A handle on a new tensor holding `bytes` (cdata pointer or string).
function M.upload(dtype, shape, data, nbytes)
  local s, h = core.stream(), core.handle_type()
  local sizes, n = core.shape(shape)
  core.check(C.wane_tensor_new(s, h, core.dtype(dtype), n, sizes))
  if nbytes > 0 then core.check(C.wane_tensor_upload(s, h, data, nbytes)) end
  return ffi.gc(h, C.wane_tensor_free)
end

--- A Lua list of numbers as an f32 vector.
function M.f32(list, shape)
  local data = ffi.new("float[?]", math.max(1, #list), list)
  return M.upload("f32", shape or { #list }, data, #list * 4)
end

--- The bytes of a plain tensor, once computed.
function M.bytes(h)
  local info = core.info_type()
  core.check(C.wane_tensor_info(h, info))
  core.check(core.wait())
  local n = tonumber(info.nbytes)
  local buffer = ffi.new("uint8_t[?]", n + 1)
  core.check(C.wane_tensor_read(core.stream(), h, buffer, n))
  return ffi.string(buffer, n)
end

--- A tensor's values as a C array of the given element type.
function M.values(h, ctype)
  local bytes = M.bytes(h)
  local n = #bytes / ffi.sizeof(ctype)
  local out = ffi.new(ctype .. "[?]", math.max(1, n))
  ffi.copy(out, bytes, #bytes)
  return out, n
end

function M.part(q, number)
  local h = core.handle_type()
  core.check(C.wane_quantized_part(core.stream(), h, q, number))
  return ffi.gc(h, C.wane_tensor_free)
end

function M.quantize(x, kind, block, nested)
  local q = core.handle_type()
  core.check(C.wane_quantize(core.stream(), q, x, core.dtype(kind), block, nested and 1 or 0))
  return ffi.gc(q, C.wane_tensor_free)
end

function M.dequantize(q, dtype)
  local y = core.handle_type()
  core.check(C.wane_dequantize(core.stream(), y, q, core.dtype(dtype or "f32")))
  return ffi.gc(y, C.wane_tensor_free)
end

--- A quantized tensor from parts { [number] = handle }.
function M.assemble(kind, shape, block, parts, offset)
  local list = ffi.new("const wane_handle *[?]", C.WANE_PARTS)
  for number, h in pairs(parts) do list[number] = h end
  local q, sizes, n = core.handle_type(), core.shape(shape)
  local status = C.wane_quantized_new(core.stream(), q, core.dtype(kind), n, sizes, block, offset or 0, list)
  return status == 0 and ffi.gc(q, C.wane_tensor_free) or q, status
end

--- Everything that quantizing gives, as one string: codes, scales, values back in f32.
function M.fingerprint(x, kind, block, nested)
  local q = M.quantize(x, kind, block, nested)
  local out = { M.bytes(M.part(q, C.WANE_PART_CODES)), M.bytes(M.part(q, C.WANE_PART_ABSMAX)), M.bytes(M.dequantize(q)) }
  if nested then
    out[4] = M.bytes(M.part(q, C.WANE_PART_NESTED_ABSMAX))
    out[5] = M.bytes(M.part(q, C.WANE_PART_OFFSET))
  end
  return out
end

--- Runs fn(name of the level) at every instruction-set level that this machine or build has.
function M.each_level(fn)
  local before = C.wane_cpu_level()
  for level = 0, C.wane_cpu_best() do
    core.check(C.wane_set_cpu_level(level))
    local ok, err = pcall(fn, ffi.string(C.wane_cpu_level_name(level)))
    C.wane_set_cpu_level(before)
    if not ok then error(err, 0) end
  end
end

--- Names of the levels, for test names.
function M.levels()
  local names = {}
  for level = 0, C.wane_cpu_best() do names[#names + 1] = ffi.string(C.wane_cpu_level_name(level)) end
  return table.concat(names, ", ")
end

--- Largest |a[i] - b[i]| of n numbers.
function M.distance(a, b, n)
  local worst = 0
  for i = 0, n - 1 do worst = math.max(worst, math.abs(tonumber(a[i]) - tonumber(b[i]))) end
  return worst
end

return M
