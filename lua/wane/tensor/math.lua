--- Products, joining, sorting, picking, comparing whole tensors.
-- @module wane.tensor.math
local ffi = require "ffi"
local core = require "wane.core"
local Tensor = require "wane.tensor.object"
local C, check, stream, wrap, handle, is = core.C, core.check, core.stream, Tensor.wrap, core.handle_type, Tensor.is
local new = Tensor.constructors

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
function Tensor:outer(other)
  if not is(other) then core.raise("outer: expected a tensor, found a %s", type(other)) end
  if self:dim() ~= 1 or other:dim() ~= 1 then core.raise("outer: expected two vectors, found %s and %s", self:describe(), other:describe()) end
  return core.scope(function() return self:unsqueeze(2) * other:unsqueeze(1) end)
end

--- self where rows + k compares with columns, else 0.
local function triangle(self, k, compare, name)
  if self:dim() < 2 then core.raise("%s: expected a matrix, found %s", name, self:describe()) end
  return core.scope(function()
    local rows, columns = new.arange(self:size(-2), "i32"):unsqueeze(2) + (k or 0), new.arange(self:size(-1), "i32")
    return Tensor.where(compare(rows, columns), self, 0)
  end)
end

--- The values at and below the k-th diagonal of the last two dimensions, zeros above.
-- @param k integer|nil default 0
function Tensor:tril(k) return triangle(self, k, Tensor.ge, "tril") end
--- The values at and above the k-th diagonal of the last two dimensions, zeros below.
-- @param k integer|nil default 0
function Tensor:triu(k) return triangle(self, k, Tensor.le, "triu") end

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
    local a, b = self:to "f32", Tensor.of(other, nil, "allclose"):to "f32"
    local close = (a - b):abs():le(b:abs() * (rtol or 1e-5) + (atol or 1e-8)):logical_and(b:isfinite()):logical_or(a:eq(b))
    if equal_nan then close = close:logical_or(a:isnan():logical_and(b:isnan())) end
    return close:all()
  end)
  local value = result:item()
  result:close()
  return value
end

return Tensor
