--- Reductions: over one dimension, several, or the whole tensor; running sums; softmax.
-- @module wane.tensor.reduce
local core = require "wane.core"
local Tensor = require "wane.tensor.object"
local C, check, stream, wrap, handle, is = core.C, core.check, core.stream, Tensor.wrap, core.handle_type, Tensor.is

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

--- Any of them.
local function reduce(self, code, dim, keepdim, name)
  return (type(dim) == "table" and reduce_many or reduce_one)(self, code, dim, keepdim, name)
end

--- Sum (i64 for integers).
-- @param dim integer|integer[]|nil a dimension, a list of them, or nothing for the whole tensor
-- @param keepdim boolean|nil leave the dimension in place with size 1
function Tensor:sum(dim, keepdim) return reduce(self, C.WANE_SUM, dim, keepdim, "sum") end
--- Mean (f32 for integers).
-- @param dim integer|integer[]|nil a dimension, a list of them, or nothing for the whole tensor
-- @param keepdim boolean|nil leave the dimension in place with size 1
function Tensor:mean(dim, keepdim) return reduce(self, C.WANE_MEAN, dim, keepdim, "mean") end
--- Largest value.
-- @param dim integer|integer[]|nil a dimension, a list of them, or nothing for the whole tensor
-- @param keepdim boolean|nil leave the dimension in place with size 1
function Tensor:amax(dim, keepdim) return reduce(self, C.WANE_AMAX, dim, keepdim, "amax") end
--- Smallest value.
-- @param dim integer|integer[]|nil a dimension, a list of them, or nothing for the whole tensor
-- @param keepdim boolean|nil leave the dimension in place with size 1
function Tensor:amin(dim, keepdim) return reduce(self, C.WANE_AMIN, dim, keepdim, "amin") end
--- Product (i64 for integers).
-- @param dim integer|integer[]|nil a dimension, a list of them, or nothing for the whole tensor
-- @param keepdim boolean|nil leave the dimension in place with size 1
function Tensor:prod(dim, keepdim) return reduce(self, C.WANE_PROD, dim, keepdim, "prod") end
--- Whether any value is not 0.
-- @param dim integer|integer[]|nil a dimension, a list of them, or nothing for the whole tensor
-- @param keepdim boolean|nil leave the dimension in place with size 1
function Tensor:any(dim, keepdim) return reduce(self, C.WANE_ANY, dim, keepdim, "any") end
--- Whether no value is 0.
-- @param dim integer|integer[]|nil a dimension, a list of them, or nothing for the whole tensor
-- @param keepdim boolean|nil leave the dimension in place with size 1
function Tensor:all(dim, keepdim) return reduce(self, C.WANE_ALL, dim, keepdim, "all") end
--- 0-based place of the largest value (the lowest of equals; NaN counts as largest), as i64; without dim, in the flattened tensor.
function Tensor:argmax(dim, keepdim) return reduce_one(self, C.WANE_ARGMAX, dim, keepdim, "argmax") end
--- 0-based place of the smallest value (the lowest of equals), as i64; without dim, in the flattened tensor.
function Tensor:argmin(dim, keepdim) return reduce_one(self, C.WANE_ARGMIN, dim, keepdim, "argmin") end

--- max(): the largest value of all. max(dim, keepdim): values and 0-based indices. max(other): elementwise with a tensor.
-- @return wane.Tensor values, wane.Tensor|nil indices
function Tensor:max(dim, keepdim)
  if is(dim) then return self:maximum(dim) end
  if dim == nil then return self:amax() end
  return self:amax(dim, keepdim), self:argmax(dim, keepdim)
end

--- min(): the smallest value of all. min(dim, keepdim): values and 0-based indices. min(other): elementwise with a tensor.
-- @return wane.Tensor values, wane.Tensor|nil indices
function Tensor:min(dim, keepdim)
  if is(dim) then return self:minimum(dim) end
  if dim == nil then return self:amin() end
  return self:amin(dim, keepdim), self:argmin(dim, keepdim)
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
  local biased = reduce(wide, C.WANE_VAR, dim, keepdim, "var")
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
    return reduce(self, C.WANE_NORM2, dim, keepdim, "norm")
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

local function softmax(self, dim, log, name)
  local d = self:dim0(dim or -1, name)
  local h = handle()
  check(C.wane_softmax(stream(), h, self.h, d, log))
  return wrap(h)
end

--- e^x over its sum along a dimension.
-- @param dim integer|nil default -1
function Tensor:softmax(dim) return softmax(self, dim, 0, "softmax") end
--- Logarithm of the softmax.
-- @param dim integer|nil default -1
function Tensor:log_softmax(dim) return softmax(self, dim, 1, "log_softmax") end

return Tensor
