--- Making tensors. These functions are wane's own: `create.zeros` below is called as wane.zeros.
-- @module wane.tensor.create
local ffi = require "ffi"
local core = require "wane.core"
local Tensor = require "wane.tensor.object"
local C, check, stream, wrap = core.C, core.check, core.stream, Tensor.wrap
local arrays, element_bytes = Tensor.arrays, Tensor.element_bytes

local M = {}
Tensor.constructors = M

--- An uninitialised tensor.
local function make(dtype, sizes)
  local h = core.handle_type()
  local shape, n = core.shape(sizes)
  check(C.wane_tensor_new(stream(), h, dtype, n, shape))
  return wrap(h)
end

local ranges = { i8 = { -128, 127 }, u8 = { 0, 255 }, i32 = { -2 ^ 31, 2 ^ 31 - 1 } }

--- Sizes of nested lists, from their first elements; and the first value.
local function sizes_of(value)
  local sizes, depth = {}, 0
  while type(value) == "table" do
    depth = depth + 1
    if depth > 8 then core.raise "tensor: lists nested deeper than 8" end
    sizes[depth] = #value
    if #value == 0 then return sizes, nil end
    value = value[1]
  end
  return sizes, value
end

--- Copies nested lists into `data` in row-major order; raises where they are uneven or hold something else than numbers.
local function flatten(value, sizes, depth, data, at, range, dtype)
  if depth > #sizes then
    if type(value) == "boolean" then value = value and 1 or 0 end
    if type(value) ~= "number" and not ffi.istype("int64_t", value) then
      core.raise("tensor: expected a number%s, found a %s", depth > 1 and " (rows must have equal lengths)" or "", type(value))
    end
    if range and (value < range[1] or value > range[2] or value % 1 ~= 0) then core.raise("tensor: %s is no %s", tostring(value), dtype) end
    data[at] = dtype == "bool" and (value ~= 0 and 1 or 0) or value
    return at + 1
  end
  if type(value) ~= "table" or #value ~= sizes[depth] then
    core.raise("tensor: uneven lists: expected %d entries at depth %d, found %s", sizes[depth], depth,
      type(value) == "table" and #value or "a " .. type(value))
  end
  for i = 1, sizes[depth] do at = flatten(value[i], sizes, depth + 1, data, at, range, dtype) end
  return at
end

--- A tensor from a number, a boolean, nested lists of them, or another tensor (a copy).
-- @param value number|boolean|table|wane.Tensor
-- @param dtype string|nil default "f32"; "bool" for booleans
-- @return wane.Tensor
function M.tensor(value, dtype)
  if Tensor.is(value) then return value:clone(dtype) end
  local sizes, first = sizes_of(value)
  if dtype == nil then dtype = type(first) == "boolean" and "bool" or "f32" end
  local number = core.dtype(dtype)
  if number >= C.WANE_DTYPE_PLAIN then core.raise("tensor: %s is a quantized kind; make f32 and use wane.quant.quantize", dtype) end
  local through = arrays[dtype] and dtype or "f32"
  local n = 1
  for _, size in ipairs(sizes) do n = n * size end
  local data = arrays[through](math.max(n, 1))
  flatten(value, sizes, 1, data, 0, ranges[dtype], dtype)
  local t = make(core.dtype(through), sizes)
  check(C.wane_tensor_upload(stream(), t.h, data, n * element_bytes[through]))
  if through == dtype then return t end
  local narrow = t:to(dtype)
  t:close()
  return narrow
end

--- A tensor from raw little-endian bytes, row-major: a Lua string or a cdata array.
-- @param data string|cdata
-- @param dtype string
-- @param sizes integer[]
-- @return wane.Tensor
function M.from_buffer(data, dtype, sizes)
  if type(data) ~= "string" and type(data) ~= "cdata" then core.raise("from_buffer: expected a string or cdata, found a %s", type(data)) end
  local t = make(core.dtype(dtype), Tensor.sizes("from_buffer", sizes))
  local bytes = t:nbytes()
  local have = type(data) == "string" and #data or ffi.sizeof(data)
  -- A pointer does not know its extent; an array and a string do.
  if have ~= bytes and not (type(data) == "cdata" and tostring(ffi.typeof(data)):find("*", 1, true)) then
    local wanted = t:describe()
    t:close()
    core.raise("from_buffer: %s takes %d bytes, the buffer has %d", wanted, bytes, have)
  end
  check(C.wane_tensor_upload(stream(), t.h, data, bytes))
  return t
end

--- An uninitialised tensor: wane.empty(2, 3), wane.empty({ 2, 3 }, "f16").
-- @param ... integer sizes (or a list), then the dtype (default "f32")
-- @return wane.Tensor
function M.empty(...)
  local sizes, dtype = Tensor.sizes("empty", ...)
  return make(core.dtype(dtype or "f32"), sizes)
end

--- A tensor of one value: wane.full({ 2, 3 }, 0.5, "f16").
-- @param sizes integer[]
-- @param value number
-- @param dtype string|nil default "f32"
-- @return wane.Tensor
function M.full(sizes, value, dtype) return M.empty(sizes, dtype):fill(value) end

--- Zeros; arguments as empty's.
-- @return wane.Tensor
function M.zeros(...) return M.empty(...):fill(0) end

--- Ones; arguments as empty's.
-- @return wane.Tensor
function M.ones(...) return M.empty(...):fill(1) end

--- start, start + step, … below stop (as numpy's and Torch's arange). wane.arange(n) is 0 to n - 1.
-- @param start number
-- @param stop number|nil
-- @param step number|nil default 1
-- @param dtype string|nil default "f32"
-- @return wane.Tensor
function M.arange(start, stop, step, dtype)
  if type(stop) == "string" then stop, step, dtype = nil, nil, stop end
  if type(step) == "string" then step, dtype = nil, step end
  if stop == nil then start, stop = 0, start end
  if type(start) ~= "number" or type(stop) ~= "number" or type(step or 1) ~= "number" then core.raise "arange: expected numbers (start, stop, step)" end
  local h = core.handle_type()
  check(C.wane_arange(stream(), h, start, stop, step or 1, core.dtype(dtype or "f32")))
  return wrap(h)
end

--- The identity matrix [n, m].
-- @param n integer
-- @param m integer|nil default n
-- @param dtype string|nil default "f32"
-- @return wane.Tensor
function M.eye(n, m, dtype)
  if type(m) == "string" then m, dtype = nil, m end
  return core.scope(function()
    return M.arange(n, "i32"):unsqueeze(2):eq(M.arange(m or n, "i32")):to(dtype or "f32")
  end)
end

-- Random numbers: element i of a call depends on (seed, how many were drawn before it) alone.
local generator = { seed = 0, drawn = 0 }

--- Starts the random sequence of this Lua state anew. Without a call the seed is 0: programs repeat themselves.
-- @param seed integer
function M.manual_seed(seed) generator.seed, generator.drawn = seed, 0 end

local sizes_scratch = ffi.new "int64_t[8]"
--- Draws a tensor. `spec` is a list of sizes with named options, or the sizes are given one by one.
local function random(what, kind, a, b, first, ...)
  local options = type(first) == "table" and first or {}
  local sizes, dtype = Tensor.sizes(what, first, ...)
  local n = #sizes
  if n > 8 then core.raise("%s: %d dimensions: at most 8", what, n) end
  local count = 1
  for i = 1, n do sizes_scratch[i - 1], count = sizes[i], count * sizes[i] end
  local seed, offset = options.seed, options.offset or 0
  if not seed then seed, offset = generator.seed, generator.drawn end
  local h = core.handle_type()
  local name = dtype or options.dtype or "f32"
  check(C.wane_random(stream(), h, kind, a(options), b(options), seed, offset, core.dtype(name), n, sizes_scratch))
  if not options.seed then generator.drawn = generator.drawn + math.ceil(count / 4) * 4 end
  return wrap(h)
end

--- Normal random numbers: wane.randn(2, 3), wane.randn({ 2, 3, seed = 42, mean = 0, std = 1 }, "f16").
-- @return wane.Tensor
function M.randn(...)
  return random("randn", C.WANE_NORMAL, function(o) return o.mean or 0 end, function(o) return o.std or 1 end, ...)
end

--- Uniform random numbers from [low, high): wane.rand(2, 3), wane.rand { 2, 3, seed = 42, low = 0, high = 1 }.
-- @return wane.Tensor
function M.rand(...)
  return random("rand", C.WANE_UNIFORM, function(o) return o.low or 0 end, function(o) return o.high or 1 end, ...)
end

--- Random integers from low to high - 1: wane.randint(0, 10, { 2, 3, seed = 42 }).
-- @param low integer
-- @param high integer
-- @param sizes integer[]
-- @param dtype string|nil default "i64"
-- @return wane.Tensor
function M.randint(low, high, sizes, dtype)
  if type(low) ~= "number" or type(high) ~= "number" or high <= low then
    core.raise("randint: from %s to %s - 1 there is no integer", tostring(low), tostring(high))
  end
  return random("randint", C.WANE_UNIFORM, function() return low end, function() return high end, sizes, dtype or "i64")
end

--- Uninitialised memory of this tensor's shape.
-- @param dtype string|nil default this tensor's
function Tensor:empty_like(dtype) return M.empty(self:shape(), dtype or self:dtype()) end
--- Zeros of this tensor's shape.
-- @param dtype string|nil default this tensor's
function Tensor:zeros_like(dtype) return M.zeros(self:shape(), dtype or self:dtype()) end
--- Ones of this tensor's shape.
-- @param dtype string|nil default this tensor's
function Tensor:ones_like(dtype) return M.ones(self:shape(), dtype or self:dtype()) end

return M
