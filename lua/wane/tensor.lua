--- Tensors: a table around a C handle, `{ h = wane_handle }`, with Torch's names.
--
--     local x = wane.tensor({ { 1, 2 }, { 3, 4 } })        -- f32 [2, 2]
--     x[1] = x[2] + 2 * x:t()[1]                           -- rows; numbers and smaller tensors are broadcast
--     print(x[{ {}, { 1, 1 } }]:sum(), x[2][1])            -- a slice's sum (a tensor), one value (a number)
--
-- COUNTING. Positions in calls (dimensions, rows, starts, `x[i]`) count from 1, and negative ones from the end, as in Torch.
-- Tensors that HOLD indices (argmax, sort, topk give them; gather, index_select take them) count from 0: token ids do.
--
-- WAITING. Every operation is enqueued and returns at once; Lua waits where it reads a value: item, totable, tostring, equal,
-- `x[i]` when that is one value.
--
-- MEMORY. A tensor made in wane.scope is freed at the scope's end unless the scope's function returns it; outside of scopes
-- close() frees it, or at the latest the garbage collector, which cannot see its size.
--
-- This file: the object, making tensors, reading them. wane/tensor/views.lua: views and indexing; wane/tensor/math.lua:
-- arithmetic; wane/tensor/print.lua: how a tensor prints.
-- @module wane.tensor
local ffi = require "ffi"
local core = require "wane.core"
local C, check, stream = core.C, core.check, core.stream

---@class wane.Tensor
---@field h ffi.cdata* wane_handle
local Tensor = {}

--- Computed fields by name: functions of a tensor that give nil where it has no such field (`q.codes`: see wane.quant).
Tensor.fields = {}

-- ---------------------------------------------------------------- objects

--- A Tensor around a handle that a C function has filled. A tensor that no scope owns is freed by the collector at the latest.
-- @param h cdata wane_handle
-- @return wane.Tensor
function Tensor.wrap(h)
  if h.flags == 0 then ffi.gc(h, C.wane_tensor_free) end
  return setmetatable({ h = h }, Tensor)
end
local wrap = Tensor.wrap

--- Frees the tensor's memory now; using it afterwards is an error. Closing twice is not.
function Tensor:close()
  ffi.gc(self.h, nil)
  C.wane_tensor_free(self.h)
end

--- True for tensors.
-- @param x any
-- @return boolean
function Tensor.is(x) return getmetatable(x) == Tensor end

-- A scope ends: what it returns moves into the scope around it, or to the collector. A tensor that no scope owns stays as it is.
local function keep(value, outer, seen)
  if getmetatable(value) == Tensor then
    if value.h.flags == 0 then return end
    core.check(C.wane_tensor_move(core.stream(), value.h, outer))
    value.h.flags = outer ~= nil and 1 or 0
    if outer == nil then ffi.gc(value.h, C.wane_tensor_free) end
  elseif type(value) == "table" and not seen[value] then
    seen[value] = true
    for _, v in pairs(value) do keep(v, outer, seen) end
  end
end
core.keep = function(value, outer) keep(value, outer, {}) end

local info = core.info_type()
--- What C knows of a tensor; the struct is reused by the next call.
-- @return cdata wane_info
function Tensor:info()
  check(C.wane_tensor_info(self.h, info))
  return info
end

--- Sizes as a Lua list.
-- @return integer[]
function Tensor:shape()
  check(C.wane_tensor_info(self.h, info))
  local shape = {}
  for i = 1, info.ndim do shape[i] = tonumber(info.shape[i - 1]) end
  return shape
end

--- Strides as a Lua list, in elements.
-- @return integer[]
function Tensor:stride()
  check(C.wane_tensor_info(self.h, info))
  local stride = {}
  for i = 1, info.ndim do stride[i] = tonumber(info.stride[i - 1]) end
  return stride
end

--- Name of the dtype: "f32", "i32", "nf4" …
-- @return string
function Tensor:dtype()
  check(C.wane_tensor_info(self.h, info))
  return core.dtype_name(info.dtype)
end

--- Where the tensor lives: "cpu".
-- @return string
function Tensor.device() return "cpu" end

--- Number of dimensions.
-- @return integer
function Tensor:dim() return self:info().ndim end

--- Number of elements.
-- @return integer
function Tensor:numel() return tonumber(self:info().numel) end

--- Bytes of the values (all parts of a quantized kind).
-- @return integer
function Tensor:nbytes() return tonumber(self:info().nbytes) end

--- Whether the values lie in memory in order, without gaps.
-- @return boolean
function Tensor:is_contiguous() return self:info().contiguous ~= 0 end

--- Whether the dtype is f32, f16 or bf16.
-- @return boolean
function Tensor:is_float() return self:info().dtype <= C.WANE_BF16 end

--- The 0-based number of dimension `dim` (1-based, negative from the end) of self; raises for one that does not exist.
-- @param dim integer
-- @param what string name of the method, for the message
-- @return integer
function Tensor:dim0(dim, what)
  local n = self:info().ndim
  if type(dim) ~= "number" or dim % 1 ~= 0 then core.raise("%s: expected the number of a dimension, found %s", what, tostring(dim)) end
  local d = dim < 0 and n + dim or dim - 1
  if dim == 0 or d < 0 or d >= n then
    core.raise("%s: %s has no dimension %d (1 to %d, or -1 for the last)", what, self:describe(), dim, n)
  end
  return d
end

--- "[2, 3] f32", for messages.
-- @return string
function Tensor:describe() return ("[%s] %s"):format(table.concat(self:shape(), ", "), self:dtype()) end

--- Sizes from a call's arguments: a list, or numbers; and the argument after them.
-- @return integer[] sizes, any rest
function Tensor.sizes(what, first, ...)
  local sizes, rest = {}, nil
  if type(first) == "table" and not Tensor.is(first) then
    sizes, rest = first, (...)
  else
    local n = select("#", ...) + 1
    for i = 1, n do
      local v = i == 1 and first or (select(i - 1, ...))
      if type(v) ~= "number" then
        rest = v
        break
      end
      sizes[i] = v
    end
  end
  for i, v in ipairs(sizes) do
    if type(v) ~= "number" or v % 1 ~= 0 then core.raise("%s: size %d is %s; expected a whole number", what, i, tostring(v)) end
  end
  return sizes, rest
end

-- ---------------------------------------------------------------- making

local new = {}                 -- constructors, found in wane itself: wane.zeros, …
Tensor.constructors = new

--- An uninitialised tensor.
local function make(dtype, sizes)
  local h = core.handle_type()
  local shape, n = core.shape(sizes)
  check(C.wane_tensor_new(stream(), h, dtype, n, shape))
  return wrap(h)
end

--- C arrays that a dtype's values are exchanged through; 16-bit floats go as f32.
local arrays = {
  f32 = ffi.typeof "float[?]", i8 = ffi.typeof "int8_t[?]", u8 = ffi.typeof "uint8_t[?]", i32 = ffi.typeof "int32_t[?]",
  i64 = ffi.typeof "int64_t[?]", bool = ffi.typeof "uint8_t[?]",
}
local element_bytes = { f32 = 4, f16 = 2, bf16 = 2, i8 = 1, u8 = 1, i32 = 4, i64 = 8, bool = 1 }
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
function new.tensor(value, dtype)
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
function new.from_buffer(data, dtype, sizes)
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
function new.empty(...)
  local sizes, dtype = Tensor.sizes("empty", ...)
  return make(core.dtype(dtype or "f32"), sizes)
end

--- A tensor of one value: wane.full({ 2, 3 }, 0.5, "f16").
-- @param sizes integer[]
-- @param value number
-- @param dtype string|nil default "f32"
-- @return wane.Tensor
function new.full(sizes, value, dtype) return new.empty(sizes, dtype):fill(value) end

--- Zeros; arguments as empty's.
-- @return wane.Tensor
function new.zeros(...) return new.empty(...):fill(0) end

--- Ones; arguments as empty's.
-- @return wane.Tensor
function new.ones(...) return new.empty(...):fill(1) end

--- start, start + step, … below stop (as numpy's and Torch's arange). wane.arange(n) is 0 to n - 1.
-- @param start number
-- @param stop number|nil
-- @param step number|nil default 1
-- @param dtype string|nil default "f32"
-- @return wane.Tensor
function new.arange(start, stop, step, dtype)
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
function new.eye(n, m, dtype)
  if type(m) == "string" then m, dtype = nil, m end
  return core.scope(function()
    return new.arange(n, "i32"):unsqueeze(2):eq(new.arange(m or n, "i32")):to(dtype or "f32")
  end)
end

-- Random numbers: element i of a call depends on (seed, how many were drawn before it) alone.
local generator = { seed = 0, drawn = 0 }

--- Starts the random sequence of this Lua state anew. Without a call the seed is 0: programs repeat themselves.
-- @param seed integer
function new.manual_seed(seed) generator.seed, generator.drawn = seed, 0 end

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
function new.randn(...)
  return random("randn", C.WANE_NORMAL, function(o) return o.mean or 0 end, function(o) return o.std or 1 end, ...)
end

--- Uniform random numbers from [low, high): wane.rand(2, 3), wane.rand { 2, 3, seed = 42, low = 0, high = 1 }.
-- @return wane.Tensor
function new.rand(...)
  return random("rand", C.WANE_UNIFORM, function(o) return o.low or 0 end, function(o) return o.high or 1 end, ...)
end

--- Random integers from low to high - 1: wane.randint(0, 10, { 2, 3, seed = 42 }).
-- @param low integer
-- @param high integer
-- @param sizes integer[]
-- @param dtype string|nil default "i64"
-- @return wane.Tensor
function new.randint(low, high, sizes, dtype)
  if type(low) ~= "number" or type(high) ~= "number" or high <= low then
    core.raise("randint: from %s to %s - 1 there is no integer", tostring(low), tostring(high))
  end
  return random("randint", C.WANE_UNIFORM, function() return low end, function() return high end, sizes, dtype or "i64")
end

--- Uninitialised, zeros, ones, random of this tensor's shape (and dtype unless given).
function Tensor:empty_like(dtype) return new.empty(self:shape(), dtype or self:dtype()) end
--- Zeros of this tensor's shape.
function Tensor:zeros_like(dtype) return new.zeros(self:shape(), dtype or self:dtype()) end
--- Ones of this tensor's shape.
function Tensor:ones_like(dtype) return new.ones(self:shape(), dtype or self:dtype()) end

-- ---------------------------------------------------------------- converting, copying

--- The same values as another dtype; self when it has it already. Quantized kinds are dequantized.
-- @param dtype string "f32" …, or a device ("cpu")
-- @return wane.Tensor
function Tensor:to(dtype)
  if dtype == "cpu" then return self end
  local number, have = core.dtype(dtype), self:info().dtype
  if number == have then return self end
  if number >= C.WANE_DTYPE_PLAIN then core.raise("to: %s is a quantized kind; use wane.quant.quantize(tensor, { type = '%s' })", dtype, dtype) end
  local h = core.handle_type()
  if have >= C.WANE_DTYPE_PLAIN then
    -- wane_dequantize gives floats; anything else is a cast of those.
    check(C.wane_dequantize(stream(), h, self.h, number <= C.WANE_BF16 and number or C.WANE_F32))
    local values = wrap(h)
    return number <= C.WANE_BF16 and values or values:to(dtype)
  end
  check(C.wane_cast(stream(), h, self.h, number))
  return wrap(h)
end

for method, dtype in pairs { float = "f32", half = "f16", bfloat16 = "bf16", char = "i8", byte = "u8", int = "i32", long = "i64", bool = "bool" } do
  Tensor[method] = function(self) return self:to(dtype) end
end

--- The same values as other's dtype.
function Tensor:type_as(other) return self:to(other:dtype()) end

--- A contiguous copy with memory of its own.
-- @param dtype string|nil
-- @return wane.Tensor
function Tensor:clone(dtype)
  local h = core.handle_type()
  local have = self:info().dtype
  if have >= C.WANE_DTYPE_PLAIN then return self:to(dtype or "f32") end
  check(C.wane_cast(stream(), h, self.h, dtype and core.dtype(dtype) or have))
  return wrap(h)
end

--- Self when it is contiguous, else a contiguous copy.
-- @return wane.Tensor
function Tensor:contiguous() return self:is_contiguous() and self or self:clone() end

--- Overwrites self with one value.
-- @param value number|boolean
-- @return wane.Tensor self
function Tensor:fill(value)
  if type(value) == "boolean" then value = value and 1 or 0 end
  if type(value) ~= "number" then core.raise("fill: expected a number, found a %s", type(value)) end
  check(C.wane_fill(stream(), self.h, value))
  return self
end

--- Overwrites self with zeros.
-- @return wane.Tensor self
function Tensor:zero() return self:fill(0) end

--- Overwrites self with source, broadcast and converted; self may be a view.
-- @param source wane.Tensor|number|table
-- @return wane.Tensor self
function Tensor:copy(source)
  if type(source) == "number" or type(source) == "boolean" then return self:fill(source) end
  if Tensor.is(source) then
    check(C.wane_copy(stream(), self.h, source.h))
    return self
  end
  if type(source) ~= "table" then core.raise("copy: expected a tensor, a number or lists, found a %s", type(source)) end
  local values = new.tensor(source, self:is_float() and "f32" or self:dtype())
  check(C.wane_copy(stream(), self.h, values.h))
  values:close()
  return self
end

-- ---------------------------------------------------------------- reading

--- Waits until everything that writes self has run.
-- @return wane.Tensor self
function Tensor:wait()
  check(core.wait(self:info().ticket))
  return self
end

--- Gives every NaN of an f32 array the usual bits: LuaJIT would take others (0xffffffff …) for values of other types, and a
-- file may hold them.
local function plain_nans(data, n)
  local bits = ffi.cast("uint32_t *", data)
  for i = 0, n - 1 do
    if bits[i] % 0x80000000 > 0x7f800000 then bits[i] = 0x7fc00000 end
  end
end

--- The values as a C array in row-major order (f16, bf16 and quantized kinds as f32), their number and the array's dtype. Waits.
-- @return cdata, integer, string
function Tensor:cdata()
  local dtype = self:dtype()
  local through = arrays[dtype] and dtype or "f32"
  local source = through ~= dtype and self:to(through) or self:contiguous()
  local n = source:numel()
  local data = arrays[through](math.max(n, 1))
  source:wait()
  check(C.wane_tensor_read(stream(), source.h, data, n * element_bytes[through]))
  if through == "f32" then plain_nans(data, n) end
  if source ~= self then source:close() end
  return data, n, through
end

--- The values' raw little-endian bytes in row-major order. Waits.
-- @return string
function Tensor:bytes()
  local source = self:contiguous()
  local n = source:nbytes()
  local data = ffi.new("uint8_t[?]", math.max(n, 1))
  source:wait()
  check(C.wane_tensor_read(stream(), source.h, data, n))
  if source ~= self then source:close() end
  return ffi.string(data, n)
end

--- A Lua value of an array's element: booleans for bool, else numbers.
local function lua_value(data, i, dtype)
  if dtype == "bool" then return data[i] ~= 0 end
  return tonumber(data[i])
end

--- The only value of a tensor of one element. Waits.
-- @return number|boolean
function Tensor:item()
  local n = self:numel()
  if n ~= 1 then core.raise("item: %s has %d elements, not one; totable() gives them all", self:describe(), n) end
  local data, _, dtype = self:cdata()
  return lua_value(data, 0, dtype)
end

--- The values as nested Lua lists (a number or boolean for a tensor without dimensions). Waits.
-- @return table|number|boolean
function Tensor:totable()
  local shape = self:shape()
  local data, _, dtype = self:cdata()
  local at = 0
  local function level(d)
    if d > #shape then
      at = at + 1
      return lua_value(data, at - 1, dtype)
    end
    local list = {}
    for i = 1, shape[d] do list[i] = level(d + 1) end
    return list
  end
  return level(1)
end

require "wane.tensor.views" (Tensor)
require "wane.tensor.math" (Tensor)
require "wane.tensor.print" (Tensor)

--- wane.save, wane.load_tensors: see wane.serialize.
function new.save(...) return require("wane.serialize").save(...) end
function new.load_tensors(...) return require("wane.serialize").load(...) end

require("wane.quant.parts").register(Tensor)

return Tensor
