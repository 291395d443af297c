--- Arithmetic, comparisons, reductions, products, sorting: methods that make new tensors. Operands are broadcast as numpy does;
-- either may be a number. The dtypes of results: core/include/wane.h, section 8.
-- @module wane.tensor.math
local ffi = require "ffi"
local core = require "wane.core"
local C, check, stream = core.C, core.check, core.stream

return function(Tensor)
  local wrap, new = Tensor.wrap, Tensor.constructors
  local handle, is = core.handle_type, Tensor.is

  -- ---------------------------------------------------------------- one argument

  local function unary(name, code)
    Tensor[name] = function(self)
      local h = handle()
      check(C.wane_unary(stream(), h, self.h, code))
      return wrap(h)
    end
  end
  for name, code in pairs {
    neg = C.WANE_NEG, abs = C.WANE_ABS, sqrt = C.WANE_SQRT, rsqrt = C.WANE_RSQRT, exp = C.WANE_EXP, log = C.WANE_LOG, sin = C.WANE_SIN,
    cos = C.WANE_COS, tanh = C.WANE_TANH, sigmoid = C.WANE_SIGMOID, floor = C.WANE_FLOOR, ceil = C.WANE_CEIL, round = C.WANE_ROUND,
    sign = C.WANE_SIGN, logical_not = C.WANE_NOT, isnan = C.WANE_ISNAN, isfinite = C.WANE_ISFINITE, reciprocal = C.WANE_RECIPROCAL,
    square = C.WANE_SQUARE, relu = C.WANE_RELU, silu = C.WANE_SILU, gelu = C.WANE_GELU, gelu_tanh = C.WANE_GELU_TANH,
    quick_gelu = C.WANE_QUICK_GELU, erf = C.WANE_ERF,
  } do unary(name, code) end

  -- ---------------------------------------------------------------- two arguments

  --- a op b for tensors and numbers.
  local function binary(name, code)
    local function op(a, b)
      local h = handle()
      if type(b) == "boolean" then b = b and 1 or 0 end
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
    Tensor[name] = op
    return op
  end

  Tensor.__add = binary("add", C.WANE_ADD)
  Tensor.__sub = binary("sub", C.WANE_SUB)
  Tensor.__mul = binary("mul", C.WANE_MUL)
  Tensor.__div = binary("div", C.WANE_DIV)
  Tensor.__mod = binary("mod", C.WANE_MOD)
  Tensor.__pow = binary("pow", C.WANE_POW)
  Tensor.__unm = function(t) return t:neg() end
  for name, code in pairs {
    minimum = C.WANE_MIN, maximum = C.WANE_MAX, atan2 = C.WANE_ATAN2, eq = C.WANE_EQ, ne = C.WANE_NE, lt = C.WANE_LT, le = C.WANE_LE,
    gt = C.WANE_GT, ge = C.WANE_GE, logical_and = C.WANE_AND, logical_or = C.WANE_OR, logical_xor = C.WANE_XOR,
  } do binary(name, code) end

  -- In place: self takes the result's values, in its own dtype.
  for _, name in ipairs { "add", "sub", "mul", "div", "pow" } do
    Tensor[name .. "_"] = function(self, other)
      local result = Tensor[name](self, other)
      self:copy(result)
      result:close()
      return self
    end
  end

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
  local function tensor_of(value, other, what)
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
      local ta, tb = tensor_of(a, is(b) and b or nil, "where"), tensor_of(b, is(a) and a or nil, "where")
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
    return core.scope(function() return Tensor.where(mask, tensor_of(value, self, "masked_fill"), self):to(self:dtype()) end)
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

  -- ---------------------------------------------------------------- reductions

  --- One reduction over a dimension number or over everything (nil).
  local function reduce_one(self, code, dim, keepdim, name)
    local h = handle()
    check(C.wane_reduce(stream(), h, self.h, code, dim and self:dim0(dim, name) or -1, keepdim and 1 or 0))
    return wrap(h)
  end

  --- Over several dimensions: they are moved to the back and made one.
  local function reduce_many(self, code, dims, keepdim, name)
    local n, chosen, order, kept, sizes = self:dim(), {}, {}, {}, {}
    local shape = self:shape()
    for _, d in ipairs(dims) do chosen[self:dim0(d, name) + 1] = true end
    for d = 1, n do
      if not chosen[d] then order[#order + 1], sizes[#sizes + 1] = d, shape[d] end
      kept[d] = chosen[d] and 1 or shape[d]
    end
    local merged = 1
    for d = 1, n do if chosen[d] then order[#order + 1], merged = d, merged * shape[d] end end
    sizes[#sizes + 1] = merged
    return core.scope(function()
      local result = reduce_one(self:permute(order):reshape(sizes), code, -1, false, name)
      return keepdim and result:reshape(kept) or result
    end)
  end

  local function reduction(name, code)
    Tensor[name] = function(self, dim, keepdim)
      if type(dim) == "table" then return reduce_many(self, code, dim, keepdim, name) end
      return reduce_one(self, code, dim, keepdim, name)
    end
  end
  -- Each takes (dim, keepdim): a dimension, a list of dimensions, or nothing for all of the tensor (a tensor without dimensions).
  reduction("sum", C.WANE_SUM)
  reduction("mean", C.WANE_MEAN)
  reduction("amax", C.WANE_AMAX)
  reduction("amin", C.WANE_AMIN)
  reduction("prod", C.WANE_PROD)
  reduction("any", C.WANE_ANY)
  reduction("all", C.WANE_ALL)

  -- argmax, argmin: 0-based i64, the lowest index of equals; without a dimension, into the flattened tensor.
  for name, code in pairs { argmax = C.WANE_ARGMAX, argmin = C.WANE_ARGMIN } do
    Tensor[name] = function(self, dim, keepdim) return reduce_one(self, code, dim, keepdim, name) end
  end

  -- max, min: max() of everything; max(dim, keepdim) gives values and 0-based indices; max(other tensor) elementwise.
  for name, parts in pairs { max = { "amax", "argmax", "maximum" }, min = { "amin", "argmin", "minimum" } } do
    Tensor[name] = function(self, dim, keepdim)
      if is(dim) then return Tensor[parts[3]](self, dim) end
      if dim == nil then return Tensor[parts[1]](self) end
      return Tensor[parts[1]](self, dim, keepdim), Tensor[parts[2]](self, dim, keepdim)
    end
  end

  --- Variance in f32 (of 16-bit floats too, so that it is rounded once) over the elements that dim names.
  local function variance(self, dim, keepdim, correction)
    local n = type(dim) == "number" and self:size(dim) or self:numel()
    if type(dim) == "table" then
      n = 1
      for _, d in ipairs(dim) do n = n * self:size(d) end
    end
    correction = correction or 1
    local wide = self:is_float() and self:to "f32" or self
    local biased = (type(dim) == "table" and reduce_many or reduce_one)(wide, C.WANE_VAR, dim, keepdim, "var")
    if correction == 0 then return biased end
    return biased * (n > correction and n / (n - correction) or 0 / 0)
  end

  --- Variance: sum of squared differences from the mean over (n - correction).
  -- @param dim integer|integer[]|nil
  -- @param keepdim boolean|nil
  -- @param correction number|nil default 1, as Torch's; 0 is numpy's
  -- @return wane.Tensor
  function Tensor:var(dim, keepdim, correction)
    return core.scope(function() return variance(self, dim, keepdim, correction):to(self:is_float() and self:dtype() or "f32") end)
  end

  --- Standard deviation; arguments as var's.
  -- @return wane.Tensor
  function Tensor:std(dim, keepdim, correction)
    return core.scope(function() return variance(self, dim, keepdim, correction):sqrt():to(self:is_float() and self:dtype() or "f32") end)
  end

  --- Vector norm: p is 2 (default), 1 or math.huge.
  -- @param p number|nil
  -- @param dim integer|integer[]|nil
  -- @param keepdim boolean|nil
  -- @return wane.Tensor
  function Tensor:norm(p, dim, keepdim)
    p = p or 2
    if p == 2 then
      return (type(dim) == "table" and reduce_many or reduce_one)(self, C.WANE_NORM2, dim, keepdim, "norm")
    elseif p ~= 1 and p ~= math.huge then
      core.raise("norm: p = %s; there are 1, 2 and math.huge", tostring(p))
    end
    return core.scope(function()
      local a = self:abs()
      if p == 1 then return a:sum(dim, keepdim) end
      return a:amax(dim, keepdim)
    end)
  end

  --- Running sums along a dimension.
  -- @param dim integer
  -- @return wane.Tensor
  function Tensor:cumsum(dim)
    local d = self:dim0(dim or (self:dim() == 1 and 1 or nil), "cumsum")
    local h = handle()
    check(C.wane_cumsum(stream(), h, self.h, d))
    return wrap(h)
  end

  local function softmax(name, log)
    Tensor[name] = function(self, dim)
      local d = self:dim0(dim or -1, name)
      local h = handle()
      check(C.wane_softmax(stream(), h, self.h, d, log))
      return wrap(h)
    end
  end
  softmax("softmax", 0)
  softmax("log_softmax", 1)

  -- ---------------------------------------------------------------- products

  --- Product of the last two dimensions, batches in front broadcast; numpy.matmul's rules for vectors.
  -- @param other wane.Tensor
  -- @return wane.Tensor
  function Tensor:matmul(other)
    if not is(other) then core.raise("matmul: expected a tensor, found a %s", type(other)) end
    local h = handle()
    check(C.wane_matmul(stream(), h, self.h, other.h))
    return wrap(h)
  end
  Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot = Tensor.matmul, Tensor.matmul, Tensor.matmul, Tensor.matmul

  --- Outer product of two vectors.
  -- @return wane.Tensor
  function Tensor:outer(other) return core.scope(function() return self:unsqueeze(2) * other:unsqueeze(1) end) end

  --- The triangle at and below (tril) or above (triu) the k-th diagonal of the last two dimensions; zeros elsewhere.
  for name, compare in pairs { tril = "ge", triu = "le" } do
    Tensor[name] = function(self, k)
      if self:dim() < 2 then core.raise("%s: expected a matrix, found %s", name, self:describe()) end
      return core.scope(function()
        local rows, columns = new.arange(self:size(-2), "i32"):unsqueeze(2), new.arange(self:size(-1), "i32")
        return Tensor.where((rows + (k or 0))[compare](rows + (k or 0), columns), self, 0)
      end)
    end
  end

  -- ---------------------------------------------------------------- joining, sorting, picking

  --- Joins tensors along a dimension: wane.cat({ a, b }, 2).
  -- @param tensors wane.Tensor[]
  -- @param dim integer|nil default 1
  -- @return wane.Tensor
  function new.cat(tensors, dim)
    local n = type(tensors) == "table" and not is(tensors) and #tensors or 0
    if n == 0 then core.raise "cat: expected a list of tensors" end
    local list = ffi.new("const wane_handle *[?]", n)
    for i, t in ipairs(tensors) do
      if not is(t) then core.raise("cat: entry %d is a %s, not a tensor", i, type(t)) end
      list[i - 1] = t.h
    end
    local h = handle()
    check(C.wane_cat(stream(), h, list, n, tensors[1]:dim0(dim or 1, "cat")))
    return wrap(h)
  end

  --- Joins tensors of one shape along a new dimension.
  -- @param tensors wane.Tensor[]
  -- @param dim integer|nil default 1
  -- @return wane.Tensor
  function new.stack(tensors, dim)
    return core.scope(function()
      local list = {}
      for i, t in ipairs(tensors) do
        if not is(t) then core.raise("stack: entry %d is a %s, not a tensor", i, type(t)) end
        list[i] = t:unsqueeze(dim or 1)
      end
      return new.cat(list, dim or 1)
    end)
  end

  --- Sorted values and their 0-based indices, stable; NaN last either way.
  -- @param dim integer|nil default -1
  -- @param descending boolean|nil
  -- @return wane.Tensor values, wane.Tensor indices i64
  function Tensor:sort(dim, descending)
    local d = self:dim0(dim or -1, "sort")
    local v, i = handle(), handle()
    check(C.wane_sort(stream(), v, i, self.h, d, descending and 1 or 0))
    return wrap(v), wrap(i)
  end

  --- The 0-based indices that sort self.
  -- @return wane.Tensor i64
  function Tensor:argsort(dim, descending)
    local d = self:dim0(dim or -1, "argsort")
    local i = handle()
    check(C.wane_sort(stream(), nil, i, self.h, d, descending and 1 or 0))
    return wrap(i)
  end

  --- The k largest (or smallest) values in order, and their 0-based indices.
  -- @param k integer
  -- @param dim integer|nil default -1
  -- @param largest boolean|nil default true
  -- @return wane.Tensor values, wane.Tensor indices i64
  function Tensor:topk(k, dim, largest)
    if type(k) ~= "number" or k % 1 ~= 0 then core.raise("topk: expected a whole number k, found %s", tostring(k)) end
    local d = self:dim0(dim or -1, "topk")
    local v, i = handle(), handle()
    check(C.wane_topk(stream(), v, i, self.h, k, d, largest == false and 0 or 1))
    return wrap(v), wrap(i)
  end

  --- Rows (or whatever dimension dim holds) by index: dim is replaced by the index tensor's shape.
  -- @param dim integer
  -- @param index wane.Tensor i32 or i64, 0-based; negative counts from the end
  -- @return wane.Tensor
  function Tensor:index_select(dim, index)
    local d = self:dim0(dim, "index_select")
    if not is(index) then core.raise("index_select: expected a tensor of 0-based indices (i32, i64), found a %s", type(index)) end
    local h = handle()
    check(C.wane_index_select(stream(), h, self.h, d, index.h))
    return wrap(h)
  end

  --- numpy.take_along_axis: out[i][j] = self[i][index[i][j]] for dim 2 of a matrix.
  -- @param dim integer
  -- @param index wane.Tensor i32 or i64, 0-based, as many dimensions as self
  -- @return wane.Tensor
  function Tensor:gather(dim, index)
    local d = self:dim0(dim, "gather")
    if not is(index) then core.raise("gather: expected a tensor of 0-based indices (i32, i64), found a %s", type(index)) end
    local h = handle()
    check(C.wane_gather(stream(), h, self.h, d, index.h))
    return wrap(h)
  end

  -- ---------------------------------------------------------------- comparing whole tensors

  local function same_shape(a, b)
    local sa, sb = a:shape(), b:shape()
    if #sa ~= #sb then return false end
    for i = 1, #sa do if sa[i] ~= sb[i] then return false end end
    return true
  end

  --- Whether shapes and all values are equal. Waits.
  -- @return boolean
  function Tensor:equal(other)
    if not same_shape(self, other) then return false end
    local result = core.scope(function() return self:eq(other):all() end)
    local value = result:item()
    result:close()
    return value
  end

  --- Whether |self - other| <= atol + rtol * |other| everywhere, infinities equal. Waits.
  -- @param other wane.Tensor|number
  -- @param rtol number|nil default 1e-5
  -- @param atol number|nil default 1e-8
  -- @param equal_nan boolean|nil NaN equals NaN
  -- @return boolean
  function Tensor:allclose(other, rtol, atol, equal_nan)
    local result = core.scope(function()
      local a, b = self:to "f32", tensor_of(other, nil, "allclose"):to "f32"
      local close = (a - b):abs():le(b:abs() * (rtol or 1e-5) + (atol or 1e-8)):logical_and(b:isfinite()):logical_or(a:eq(b))
      if equal_nan then close = close:logical_or(a:isnan():logical_and(b:isnan())) end
      return close:all()
    end)
    local value = result:item()
    result:close()
    return value
  end
end
