--- Helpers of the op specs: tensors from plain Lua numbers and back, straight over the C API, and double-precision references.
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C

local M = { C = C, core = core }

local ctypes = { [C.WANE_F32] = "float", [C.WANE_I32] = "int32_t", [C.WANE_I64] = "int64_t", [C.WANE_U8] = "uint8_t", [C.WANE_BOOL] = "uint8_t",
                 [C.WANE_F16] = "uint16_t", [C.WANE_BF16] = "uint16_t" }

local bits = ffi.new "union { float f; uint32_t u; }"

--- f32 bits of x rounded to bf16 (nearest, ties to even).
function M.to_bf16(x)
  bits.f = x
  if x ~= x then return 0x7fc0 end
  local u = tonumber(bits.u)
  local low = u % 65536
  local high = (u - low) / 65536
  if low > 32768 or (low == 32768 and high % 2 == 1) then high = high + 1 end
  return high
end

function M.from_bf16(h)
  bits.u = h * 65536
  return bits.f
end

--- x rounded to f16 (nearest, ties to even): sign, exponent and mantissa put together by hand. Finite values below 65520 only.
function M.to_f16(x)
  local sign = (x < 0 or 1 / x < 0) and 32768 or 0
  x = math.abs(x)
  if x == 0 then return sign end
  local _, e = math.frexp(x)
  local step = 2 ^ math.max(e - 11, -24)
  local n = x / step
  local r = math.floor(n)
  if n - r > 0.5 or (n - r == 0.5 and r % 2 == 1) then r = r + 1 end
  if e < -13 then return sign + r end
  return sign + (e + 13) * 1024 + r
end

function M.from_f16(h)
  local sign = h >= 32768 and -1 or 1
  h = h % 32768
  local e, m = math.floor(h / 1024), h % 1024
  if e == 0 then return sign * m * 2 ^ -24 end
  return sign * (1024 + m) * 2 ^ (e - 25)
end

--- x as the dtype holds it, as a number again.
function M.round(x, dtype)
  if dtype == C.WANE_BF16 then return M.from_bf16(M.to_bf16(x)) end
  if dtype == C.WANE_F16 then return M.from_f16(M.to_f16(x)) end
  bits.f = x
  return bits.f
end

local function numel(shape)
  local n = 1
  for _, d in ipairs(shape) do n = n * d end
  return n
end
M.numel = numel

--- An empty handle.
function M.handle() return ffi.gc(ffi.new "wane_handle", C.wane_tensor_free) end

--- A tensor of a flat list (row-major).
function M.tensor(list, shape, dtype)
  dtype = dtype or C.WANE_F32
  local n = numel(shape)
  local data = ffi.new(ctypes[dtype] .. "[?]", math.max(n, 1))
  local encode = dtype == C.WANE_BF16 and M.to_bf16 or dtype == C.WANE_F16 and M.to_f16
  for i = 1, n do data[i - 1] = encode and encode(list[i]) or list[i] end
  return M.from_memory(data, shape, dtype)
end

--- A tensor of host memory.
function M.from_memory(data, shape, dtype)
  local h = M.handle()
  core.check(C.wane_tensor_new(core.stream(), h, dtype, #shape, ffi.new("int64_t[8]", shape)))
  core.check(C.wane_tensor_upload(core.stream(), h, data, numel(shape) * ffi.sizeof(ctypes[dtype])))
  return h
end

--- Shape and dtype number of a tensor.
function M.shape(h)
  local info = ffi.new "wane_info"
  core.check(C.wane_tensor_info(h, info))
  local shape = {}
  for i = 1, info.ndim do shape[i] = tonumber(info.shape[i - 1]) end
  return shape, info.dtype
end

--- The elements of a contiguous tensor as a flat list of numbers; nil and the message if its op failed.
function M.list(h)
  local shape, dtype = M.shape(h)
  local n = numel(shape)
  local data = ffi.new(ctypes[dtype] .. "[?]", math.max(n, 1))
  local status = core.wait()
  if status == 0 then status = C.wane_tensor_read(core.stream(), h, data, n * ffi.sizeof(ctypes[dtype])) end
  if status < 0 then return nil, ffi.string(C.wane_error()) end
  local decode = dtype == C.WANE_BF16 and M.from_bf16 or dtype == C.WANE_F16 and M.from_f16 or tonumber
  local list = {}
  for i = 1, n do list[i] = decode(data[i - 1]) end
  return list
end

--- After an op that was meant to fail: lets the stream report it, once, so that the next test starts clean.
function M.take_report()
  C.wane_tensor_new(core.stream(), M.handle(), C.WANE_F32, 1, ffi.new("int64_t[8]", 1))
end

--- Permuted view; order counts from 0.
function M.permute(h, order)
  local out = M.handle()
  core.check(C.wane_view_permute(core.stream(), out, h, ffi.new("int32_t[8]", order)))
  return out
end

--- Deterministic numbers, roughly normal.
function M.random(n, seed, scale)
  local x, list = (seed or 1) * 7919 + 12345, {}
  local function uniform()
    x = (x * 1103515245 + 12345) % 2147483648
    return math.floor(x / 128) / 16777216
  end
  for i = 1, n do list[i] = (uniform() + uniform() + uniform() + uniform() - 2) * 1.7 * (scale or 1) end
  return list
end

--- Largest absolute difference; NaN and shape mismatch count as infinite, equal infinities as none.
function M.difference(a, b)
  if #a ~= #b then return math.huge end
  local worst = 0
  for i = 1, #a do
    local d = a[i] == b[i] and 0 or math.abs(a[i] - b[i])
    if d ~= d then d = (a[i] ~= a[i] and b[i] ~= b[i]) and 0 or math.huge end
    if d > worst then worst = d end
  end
  return worst
end

--- Level in force when the specs were loaded: the highest that they try, and the one that they leave.
M.level = C.wane_cpu_level()

--- Calls fn(level, name) for every instruction-set level up to the one in force, with that level set.
function M.each_level(fn)
  for level = 0, M.level do
    core.check(C.wane_set_cpu_level(level))
    fn(level, ffi.string(C.wane_cpu_level_name(level)))
  end
  core.check(C.wane_set_cpu_level(M.level))
end

--- Message of a call that must fail, or nil.
function M.message(status)
  if status >= 0 then return nil end
  return ffi.string(C.wane_error())
end

return M
