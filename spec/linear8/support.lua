--- What the specs of 8-bit and GGUF products share: tensors straight through the C API, a seeded generator, and a dequantizing
-- reference in double precision.
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C

local M = { C = C, core = core }
local element = { f32 = "float", f16 = "uint16_t", bf16 = "uint16_t", u8 = "uint8_t", i8 = "int8_t", i32 = "int32_t" }

local function shape_of(list)
  local s = ffi.new "int64_t[8]"
  for i, n in ipairs(list) do s[i - 1] = n end
  return s
end

--- A tensor from a C array (or pointer) of the dtype's elements.
function M.tensor(dtype, shape, data)
  local h, n = ffi.new "wane_handle", 1
  for _, size in ipairs(shape) do n = n * size end
  core.check(C.wane_tensor_new(core.stream(), h, core.dtype(dtype), #shape, shape_of(shape)))
  if n > 0 then core.check(C.wane_tensor_upload(core.stream(), h, data, n * ffi.sizeof(element[dtype]))) end
  return h
end

--- The bytes of a contiguous tensor as a C array.
function M.read(h)
  local info = ffi.new "wane_info"
  core.check(C.wane_tensor_info(h, info))
  local name = core.dtype_name(info.dtype)
  local n = tonumber(info.numel)
  local out = ffi.new(element[name] .. "[?]", math.max(n, 1))
  assert(core.wait(info.ticket) == 0, ffi.string(C.wane_error()))
  core.check(C.wane_tensor_read(core.stream(), h, out, n * ffi.sizeof(element[name])))
  return out, n
end

--- A quantized tensor from its parts { [part number] = handle }.
function M.quantized(kind, shape, block_size, parts)
  local h, list = ffi.new "wane_handle", ffi.new("const wane_handle *[?]", C.WANE_PARTS)
  for part, t in pairs(parts) do list[part] = t end
  core.check(C.wane_quantized_new(core.stream(), h, core.dtype(kind), #shape, shape_of(shape), block_size, 0, list))
  return h
end

--- Quantizes a float tensor.
function M.quantize(kind, x, block_size)
  local h = ffi.new "wane_handle"
  core.check(C.wane_quantize(core.stream(), h, x, core.dtype(kind), block_size or 0, 0))
  return h
end

--- Exact f32 values of a quantized tensor as a C array.
function M.dequantized(w)
  local h = ffi.new "wane_handle"
  core.check(C.wane_dequantize(core.stream(), h, w, C.WANE_F32))
  local values, n = M.read(h)
  C.wane_tensor_free(h)
  return values, n
end

--- y = wane_linear(...) as a C array, and its dtype's raw elements.
function M.linear(x, w, bias, compute, threshold)
  local y = ffi.new "wane_handle"
  core.check(C.wane_linear(core.stream(), y, x, w, bias, compute or C.WANE_COMPUTE_F32, threshold or 0))
  local values, n = M.read(y)
  C.wane_tensor_free(y)
  return values, n
end

function M.linear_backward(dy, w, compute)
  local dx = ffi.new "wane_handle"
  core.check(C.wane_linear_backward(core.stream(), dx, dy, w, compute or C.WANE_COMPUTE_F32))
  local values, n = M.read(dx)
  C.wane_tensor_free(dx)
  return values, n
end

--- Runs fn(name) at every level the processor offers, then restores the one before.
function M.at_levels(fn)
  local before = C.wane_cpu_level()
  for level = 0, C.wane_cpu_best() do
    core.check(C.wane_set_cpu_level(level))
    local ok, problem = pcall(fn, ffi.string(C.wane_cpu_level_name(level)), level)
    C.wane_set_cpu_level(before)
    if not ok then error(problem, 0) end
  end
end

function M.at_level(level, fn)
  local before = C.wane_cpu_level()
  core.check(C.wane_set_cpu_level(level))
  local ok, a, b = pcall(fn)
  C.wane_set_cpu_level(before)
  if not ok then error(a, 0) end
  return a, b
end

--- Park and Miller's generator; normal() is a sum of twelve.
function M.random(seed)
  local state = seed
  local r = {}
  function r.uniform()
    state = state * 16807 % 2147483647
    return state / 2147483647
  end
  function r.integer(n) return math.floor(r.uniform() * n) end
  function r.normal()
    local sum = -6
    for _ = 1, 12 do sum = sum + r.uniform() end
    return sum
  end
  return r
end

--- Normal floats; `columns` of them (numbers from 0) have magnitudes of 20 to 60.
function M.activations(r, rows, cols, columns)
  local x = ffi.new("float[?]", math.max(rows * cols, 1))
  for i = 0, rows * cols - 1 do x[i] = r.normal() end
  for _, c in ipairs(columns or {}) do
    if c < cols then
      for m = 0, rows - 1 do x[m * cols + c] = (20 + 40 * r.uniform()) * (r.uniform() < 0.5 and -1 or 1) end
    end
  end
  return x
end

--- Largest difference of two arrays of n numbers, and the largest magnitude in the second.
function M.difference(a, b, n)
  local worst, top = 0, 0
  for i = 0, n - 1 do
    local d = math.abs(tonumber(a[i]) - tonumber(b[i]))
    if not (d <= worst) then worst = d end
    if math.abs(tonumber(b[i])) > top then top = math.abs(tonumber(b[i])) end
  end
  return worst, top
end

--- x [M, K] times W [N, K], in double precision.
function M.product(x, w, rows, N, K, bias)
  local y = ffi.new("double[?]", math.max(rows * N, 1))
  for m = 0, rows - 1 do
    for n = 0, N - 1 do
      local sum = bias and bias[n] or 0
      for k = 0, K - 1 do sum = sum + tonumber(x[m * K + k]) * tonumber(w[n * K + k]) end
      y[m * N + n] = sum
    end
  end
  return y
end

--- Whether two results of read() (n elements each) have the same bytes.
function M.same_bits(a, b, n)
  if n == 0 then return true end
  return ffi.string(a, ffi.sizeof(a)) == ffi.string(b, ffi.sizeof(b))
end

local box = ffi.new "union { uint32_t u; float f; }"                         -- one: each such text would declare a type of its own

--- A 16-bit float of either kind as a number.
function M.half(dtype, u)
  if dtype == "bf16" then
    box.u = u * 65536
    return box.f
  end
  local sign, e, f = u >= 32768 and -1 or 1, math.floor(u / 1024) % 32, u % 1024
  if e == 0 then return sign * f * 2 ^ -24 end
  if e == 31 then return f == 0 and sign * math.huge or 0 / 0 end
  return sign * (1 + f / 1024) * 2 ^ (e - 15)
end

return M
