--- The Tensor object itself: a handle, its lifetime, and what can be asked without reading values.
-- @module wane.tensor.object
local ffi = require "ffi"
local core = require "wane.core"
local C, check = core.C, core.check

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

-- C arrays that a dtype's values are exchanged through; 16-bit floats go as f32.
Tensor.arrays = {
  f32 = ffi.typeof "float[?]", i8 = ffi.typeof "int8_t[?]", u8 = ffi.typeof "uint8_t[?]", i32 = ffi.typeof "int32_t[?]",
  i64 = ffi.typeof "int64_t[?]", bool = ffi.typeof "uint8_t[?]",
}
-- Bytes of an element.
Tensor.element_bytes = { f32 = 4, f16 = 2, bf16 = 2, i8 = 1, u8 = 1, i32 = 4, i64 = 8, bool = 1 }

return Tensor
