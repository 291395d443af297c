--- A tensor's values: converted, overwritten, read into Lua.
-- @module wane.tensor.values
local ffi = require "ffi"
local core = require "wane.core"
local Tensor = require "wane.tensor.object"
local C, check, stream, wrap = core.C, core.check, core.stream, Tensor.wrap
local arrays, element_bytes = Tensor.arrays, Tensor.element_bytes

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

--- As f32.
function Tensor:float() return self:to "f32" end
--- As f16.
function Tensor:half() return self:to "f16" end
--- As bf16.
function Tensor:bfloat16() return self:to "bf16" end
--- As i8.
function Tensor:char() return self:to "i8" end
--- As u8.
function Tensor:byte() return self:to "u8" end
--- As i32.
function Tensor:int() return self:to "i32" end
--- As i64.
function Tensor:long() return self:to "i64" end
--- As bool.
function Tensor:bool() return self:to "bool" end

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
  local values = Tensor.constructors.tensor(source, self:is_float() and "f32" or self:dtype())
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

return Tensor
