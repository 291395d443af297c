--- Elementwise arithmetic, comparisons, choosing: methods that make new tensors. Operands are broadcast as numpy does; either may
-- be a number. The dtypes of results: core/include/wane.h, section 8.
-- @module wane.tensor.elementwise
local core = require "wane.core"
local Tensor = require "wane.tensor.object"
local C, check, stream, wrap, handle, is = core.C, core.check, core.stream, Tensor.wrap, core.handle_type, Tensor.is
local new = Tensor.constructors

-- ---------------------------------------------------------------- one argument

local function unary(t, code)
  local h = handle()
  check(C.wane_unary(stream(), h, t.h, code))
  return wrap(h)
end

--- -x.
function Tensor:neg() return unary(self, C.WANE_NEG) end
--- |x|.
function Tensor:abs() return unary(self, C.WANE_ABS) end
--- Square root.
function Tensor:sqrt() return unary(self, C.WANE_SQRT) end
--- 1 / sqrt(x).
function Tensor:rsqrt() return unary(self, C.WANE_RSQRT) end
--- e^x.
function Tensor:exp() return unary(self, C.WANE_EXP) end
--- Natural logarithm.
function Tensor:log() return unary(self, C.WANE_LOG) end
--- Sine.
function Tensor:sin() return unary(self, C.WANE_SIN) end
--- Cosine.
function Tensor:cos() return unary(self, C.WANE_COS) end
--- Hyperbolic tangent.
function Tensor:tanh() return unary(self, C.WANE_TANH) end
--- 1 / (1 + e^-x).
function Tensor:sigmoid() return unary(self, C.WANE_SIGMOID) end
--- Largest whole number not above x.
function Tensor:floor() return unary(self, C.WANE_FLOOR) end
--- Smallest whole number not below x.
function Tensor:ceil() return unary(self, C.WANE_CEIL) end
--- Nearest whole number, halves to the even one.
function Tensor:round() return unary(self, C.WANE_ROUND) end
--- -1, 0 or 1.
function Tensor:sign() return unary(self, C.WANE_SIGN) end
--- Whether x is 0.
function Tensor:logical_not() return unary(self, C.WANE_NOT) end
--- Whether x is NaN.
function Tensor:isnan() return unary(self, C.WANE_ISNAN) end
--- Whether x is neither NaN nor infinite.
function Tensor:isfinite() return unary(self, C.WANE_ISFINITE) end
--- 1 / x.
function Tensor:reciprocal() return unary(self, C.WANE_RECIPROCAL) end
--- x * x.
function Tensor:square() return unary(self, C.WANE_SQUARE) end
--- max(x, 0).
function Tensor:relu() return unary(self, C.WANE_RELU) end
--- x * sigmoid(x).
function Tensor:silu() return unary(self, C.WANE_SILU) end
--- x * Phi(x), by erf.
function Tensor:gelu() return unary(self, C.WANE_GELU) end
--- gelu by its tanh approximation.
function Tensor:gelu_tanh() return unary(self, C.WANE_GELU_TANH) end
--- x * sigmoid(1.702 x).
function Tensor:quick_gelu() return unary(self, C.WANE_QUICK_GELU) end
--- Error function.
function Tensor:erf() return unary(self, C.WANE_ERF) end

-- ---------------------------------------------------------------- two arguments

--- a op b for tensors and numbers.
local function binary(name, code, a, b)
  if type(b) == "boolean" then b = b and 1 or 0 end
  local h = handle()
  if is(a) and is(b) then
    check(C.wane_binary(stream(), h, a.h, b.h, code))
  elseif is(a) and type(b) == "number" then
    check(C.wane_binary_scalar(stream(), h, a.h, b, code, 0))
  elseif type(a) == "number" and is(b) then
    check(C.wane_binary_scalar(stream(), h, b.h, a, code, 1))
  else
    local function text(x) return is(x) and x:describe() or "a " .. type(x) end
    core.raise("%s: expected tensors or numbers, found %s and %s", name, text(a), text(b))
  end
  return wrap(h)
end

--- a + b.
function Tensor.add(a, b) return binary("add", C.WANE_ADD, a, b) end
--- a - b.
function Tensor.sub(a, b) return binary("sub", C.WANE_SUB, a, b) end
--- a * b.
function Tensor.mul(a, b) return binary("mul", C.WANE_MUL, a, b) end
--- a / b; integers give f32.
function Tensor.div(a, b) return binary("div", C.WANE_DIV, a, b) end
--- a % b, with the divisor's sign.
function Tensor.mod(a, b) return binary("mod", C.WANE_MOD, a, b) end
--- a ^ b.
function Tensor.pow(a, b) return binary("pow", C.WANE_POW, a, b) end
--- The smaller of a and b; NaN if either is.
function Tensor.minimum(a, b) return binary("minimum", C.WANE_MIN, a, b) end
--- The larger of a and b; NaN if either is.
function Tensor.maximum(a, b) return binary("maximum", C.WANE_MAX, a, b) end
--- Angle of the point (b, a).
function Tensor.atan2(a, b) return binary("atan2", C.WANE_ATAN2, a, b) end
--- a == b, as bool.
function Tensor.eq(a, b) return binary("eq", C.WANE_EQ, a, b) end
--- a ~= b, as bool.
function Tensor.ne(a, b) return binary("ne", C.WANE_NE, a, b) end
--- a < b, as bool.
function Tensor.lt(a, b) return binary("lt", C.WANE_LT, a, b) end
--- a <= b, as bool.
function Tensor.le(a, b) return binary("le", C.WANE_LE, a, b) end
--- a > b, as bool.
function Tensor.gt(a, b) return binary("gt", C.WANE_GT, a, b) end
--- a >= b, as bool.
function Tensor.ge(a, b) return binary("ge", C.WANE_GE, a, b) end
--- Whether both are not 0.
function Tensor.logical_and(a, b) return binary("logical_and", C.WANE_AND, a, b) end
--- Whether either is not 0.
function Tensor.logical_or(a, b) return binary("logical_or", C.WANE_OR, a, b) end
--- Whether one of both is not 0.
function Tensor.logical_xor(a, b) return binary("logical_xor", C.WANE_XOR, a, b) end

Tensor.__add, Tensor.__sub, Tensor.__mul, Tensor.__div = Tensor.add, Tensor.sub, Tensor.mul, Tensor.div
Tensor.__mod, Tensor.__pow, Tensor.__unm = Tensor.mod, Tensor.pow, function(t) return t:neg() end

--- self takes the values of a result, in its own dtype.
local function in_place(self, result)
  self:copy(result)
  result:close()
  return self
end

--- self = self + other.
-- @return wane.Tensor self
function Tensor:add_(other) return in_place(self, self:add(other)) end
--- self = self - other.
-- @return wane.Tensor self
function Tensor:sub_(other) return in_place(self, self:sub(other)) end
--- self = self * other.
-- @return wane.Tensor self
function Tensor:mul_(other) return in_place(self, self:mul(other)) end
--- self = self / other.
-- @return wane.Tensor self
function Tensor:div_(other) return in_place(self, self:div(other)) end
--- self = self ^ other.
-- @return wane.Tensor self
function Tensor:pow_(other) return in_place(self, self:pow(other)) end

--- Values limited to [low, high]; either may be nil.
-- @return wane.Tensor
function Tensor:clamp(low, high)
  return core.scope(function()
    local t = low and self:maximum(low) or self
    t = high and t:minimum(high) or t
    return t ~= self and t or self:clone()
  end)
end

--- A tensor for an argument that may be a number; of other's dtype where that holds the number.
function Tensor.of(value, other, what)
  if is(value) then return value end
  if type(value) == "boolean" then value = value and 1 or 0 end
  if type(value) ~= "number" then core.raise("%s: expected a tensor or a number, found a %s", what, type(value)) end
  local exact = other and (other:is_float() or value % 1 == 0)
  return new.full({}, value, exact and other:dtype() or "f32")
end

--- cond ? a : b, broadcast; a and b may be numbers. wane.where(cond, a, b) and cond:where(a, b).
-- @return wane.Tensor
function Tensor.where(cond, a, b)
  if not is(cond) then core.raise("where: expected a bool tensor, found a %s", type(cond)) end
  return core.scope(function()
    local ta, tb = Tensor.of(a, is(b) and b or nil, "where"), Tensor.of(b, is(a) and a or nil, "where")
    local h = handle()
    check(C.wane_where(stream(), h, cond.h, ta.h, tb.h))
    return wrap(h)
  end)
end
new.where = Tensor.where

--- self with `value` where mask is true; self's dtype.
-- @param mask wane.Tensor bool, broadcastable to self
-- @param value number|wane.Tensor
-- @return wane.Tensor
function Tensor:masked_fill(mask, value)
  if not is(mask) then core.raise("masked_fill: expected a mask tensor, found a %s", type(mask)) end
  return core.scope(function() return Tensor.where(mask, Tensor.of(value, self, "masked_fill"), self):to(self:dtype()) end)
end

--- The values where mask (of self's shape) is true, in order, as [n]. Waits for the mask.
-- @param mask wane.Tensor bool
-- @return wane.Tensor
function Tensor:masked_select(mask)
  return core.scope(function()
    return self:flatten():index_select(1, mask:expand(self:shape()):flatten():nonzero():flatten())
  end)
end

--- 0-based coordinates of the values that are not 0, i64 [n, dim()]. Waits.
-- @return wane.Tensor
function Tensor:nonzero()
  local shape, list = self:shape(), {}
  local truth = self:ne(0)
  local data, n = truth:cdata()
  truth:close()
  for i = 0, n - 1 do
    if data[i] ~= 0 then
      local row, rest = {}, i
      for d = #shape, 1, -1 do row[d], rest = rest % shape[d], math.floor(rest / shape[d]) end
      list[#list + 1] = row
    end
  end
  if #list == 0 then return new.empty({ 0, #shape }, "i64") end
  return new.tensor(list, "i64")
end

return Tensor
