--- Views and indexing: methods that share memory with their tensor. Positions count from 1, negative ones from the end.
-- @module wane.tensor.views
local ffi = require "ffi"
local core = require "wane.core"
local Tensor = require "wane.tensor.object"
local C, check, stream = core.C, core.check, core.stream
local wrap = Tensor.wrap
local handle = core.handle_type
local order_scratch = ffi.new "int32_t[8]"

-- ---------------------------------------------------------------- parts of a tensor

--- The 0-based place of position `i` among `size` (negative from the end).
local function place(t, i, size, what, dim)
  if type(i) ~= "number" or i % 1 ~= 0 then core.raise("%s: expected a position, found %s", what, tostring(i)) end
  local at = i < 0 and size + i or i - 1
  if i == 0 or at < 0 or at >= size then
    core.raise("%s: position %d is outside dimension %d of %s (1 to %d, or -1 for the last)", what, i, dim + 1, t:describe(), size)
  end
  return at
end

--- `length` elements of a dimension from `start` on, every `step`-th.
-- @param dim integer
-- @param start integer
-- @param length integer
-- @param step integer|nil default 1
-- @return wane.Tensor view
function Tensor:narrow(dim, start, length, step)
  local d = self:dim0(dim, "narrow")
  local size = tonumber(self:info().shape[d])
  if type(start) ~= "number" or type(length) ~= "number" then core.raise "narrow: expected numbers (dim, start, length)" end
  local at = start < 0 and size + start or start - 1
  if start == 0 or at < 0 or length < 0 or length % 1 ~= 0 then
    core.raise("narrow: %d elements from %d do not lie in dimension %d of %s", length, start, d + 1, self:describe())
  end
  local h = handle()
  check(C.wane_view_narrow(stream(), h, self.h, d, at, length, step or 1))
  return wrap(h)
end

--- The part at one position of a dimension, without that dimension.
-- @param dim integer
-- @param index integer
-- @return wane.Tensor view
function Tensor:select(dim, index)
  local d = self:dim0(dim, "select")
  local h = handle()
  check(C.wane_view_select(stream(), h, self.h, d, place(self, index, tonumber(self:info().shape[d]), "select", d)))
  return wrap(h)
end

--- Dimensions in another order: x:permute(2, 1, 3).
-- @param ... integer
-- @return wane.Tensor view
function Tensor:permute(...)
  local order = Tensor.sizes("permute", ...)
  local n, seen = self:dim(), {}
  for i = 1, #order do
    local d = self:dim0(order[i], "permute")
    if seen[d] then core.raise("permute: dimension %d is named twice", d + 1) end
    seen[d], order_scratch[i - 1] = true, d
  end
  if #order ~= n then core.raise("permute: %s has %d dimensions, %d are named", self:describe(), n, #order) end
  local h = handle()
  check(C.wane_view_permute(stream(), h, self.h, order_scratch))
  return wrap(h)
end

--- Two dimensions exchanged.
-- @param a integer
-- @param b integer
-- @return wane.Tensor view
function Tensor:transpose(a, b)
  local order = {}
  for i = 1, self:dim() do order[i] = i end
  local da, db = self:dim0(a, "transpose") + 1, self:dim0(b, "transpose") + 1
  order[da], order[db] = db, da
  return self:permute(order)
end

--- The transpose of a matrix (a vector stays).
-- @return wane.Tensor view
function Tensor:t()
  local n = self:dim()
  if n > 2 then core.raise("t: expected at most 2 dimensions, found %s; use transpose(a, b)", self:describe()) end
  return n == 2 and self:transpose(1, 2) or self:view(self:shape())
end

-- ---------------------------------------------------------------- other shapes

--- The same values under other sizes, sharing memory; one size may be -1. Raises where a copy would be needed.
-- @param ... integer sizes, or a list
-- @return wane.Tensor view
function Tensor:view(...)
  local shape, n = core.shape((Tensor.sizes("view", ...)))
  local h = handle()
  check(C.wane_view_reshape(stream(), h, self.h, n, shape))
  return wrap(h)
end

--- The same values under other sizes: a view where possible, else a copy.
-- @param ... integer sizes, or a list; one may be -1
-- @return wane.Tensor
function Tensor:reshape(...)
  local sizes = Tensor.sizes("reshape", ...)
  local shape, n = core.shape(sizes)
  local h = handle()
  local status = C.wane_view_reshape(stream(), h, self.h, n, shape)
  if status == 0 then return wrap(h) end
  if status ~= C.WANE_E_SHAPE or self:is_contiguous() then check(status) end
  local copy = self:clone()
  shape, n = core.shape(sizes)
  status = C.wane_view_reshape(stream(), h, copy.h, n, shape)
  copy:close()
  check(status)
  return wrap(h)
end

--- Dimensions first to last as one (all of them by default).
-- @return wane.Tensor
function Tensor:flatten(first, last)
  if self:dim() == 0 then return self:reshape(1) end
  local a, b = self:dim0(first or 1, "flatten"), self:dim0(last or -1, "flatten")
  local sizes, merged = {}, 1
  for i, size in ipairs(self:shape()) do
    if i - 1 < a or i - 1 > b then
      sizes[#sizes + 1] = size
    else
      merged = merged * size
      if i - 1 == b then sizes[#sizes + 1] = merged end
    end
  end
  return self:reshape(sizes)
end

--- Repeats dimensions of size 1 and adds dimensions in front, without copying; -1 keeps a size.
-- @param ... integer sizes, or a list
-- @return wane.Tensor view
function Tensor:expand(...)
  local sizes = Tensor.sizes("expand", ...)
  local have, wanted = self:shape(), {}
  for i, size in ipairs(sizes) do wanted[i] = size == -1 and have[i - #sizes + #have] or size end
  local shape, n = core.shape(wanted)
  local h = handle()
  check(C.wane_view_expand(stream(), h, self.h, n, shape))
  return wrap(h)
end

--- Expanded to other's sizes.
-- @return wane.Tensor view
function Tensor:expand_as(other) return self:expand(other:shape()) end

--- A dimension of size 1 inserted at position dim.
-- @param dim integer 1 to dim() + 1, or -1 for behind the last
-- @return wane.Tensor view
function Tensor:unsqueeze(dim)
  local sizes = self:shape()
  local n = #sizes
  if type(dim) ~= "number" or dim == 0 or dim > n + 1 or dim < -n - 1 then
    core.raise("unsqueeze: position %s is none of 1 to %d", tostring(dim), n + 1)
  end
  table.insert(sizes, dim < 0 and n + 2 + dim or dim, 1)
  return self:view(sizes)
end

--- Without dimension dim if its size is 1; without all such dimensions when none is named.
-- @param dim integer|nil
-- @return wane.Tensor view
function Tensor:squeeze(dim)
  local sizes, kept = self:shape(), {}
  local only = dim and self:dim0(dim, "squeeze") + 1
  for i, size in ipairs(sizes) do
    if size ~= 1 or (only and i ~= only) then kept[#kept + 1] = size end
  end
  return self:view(kept)
end

--- Cut along a dimension into parts of `size` (the last may be smaller), or of the sizes in a list.
-- @param size integer|integer[]
-- @param dim integer|nil default 1
-- @return wane.Tensor[] views
function Tensor:split(size, dim)
  local d = self:dim0(dim or 1, "split")
  local total, parts, at = tonumber(self:info().shape[d]), {}, 0
  if type(size) == "number" and size < 1 then core.raise("split: size %g; expected at least 1", size) end
  repeat
    local length = size
    if type(size) == "table" then length = size[#parts + 1] end
    if length == nil then core.raise("split: the sizes sum to %d, dimension %d of %s is larger", at, d + 1, self:describe()) end
    if type(size) == "number" then length = math.min(length, total - at) end
    parts[#parts + 1] = self:narrow(d + 1, at + 1, length)
    at = at + length
  until at >= total and (type(size) == "number" or #parts >= #size)
  return parts
end

--- Cut along a dimension into `count` parts of (nearly) equal size.
-- @param count integer
-- @param dim integer|nil default 1
-- @return wane.Tensor[] views
function Tensor:chunk(count, dim)
  local d = self:dim0(dim or 1, "chunk")
  if type(count) ~= "number" or count < 1 then core.raise("chunk: expected a number of parts, found %s", tostring(count)) end
  return self:split(math.max(math.ceil(tonumber(self:info().shape[d]) / count), 1), d + 1)
end

--- All sizes, or the size of one dimension.
-- @param dim integer|nil
-- @return integer|integer[]
function Tensor:size(dim)
  if dim == nil then return self:shape() end
  local d = self:dim0(dim, "size")
  return tonumber(self:info().shape[d])
end

-- ---------------------------------------------------------------- t[…]

--- The view that a key of square brackets names: a position selects, a list has one entry a dimension: a position selects,
-- { a, b } keeps positions a to b, { a, b, step } every step-th of them, { a } that one (as a dimension of size 1), {} all.
local function at(t, key)
  if type(key) == "number" then
    if t:dim() == 0 then core.raise "[]: a tensor without dimensions has no positions; item() reads it" end
    return t:select(1, place(t, key, tonumber(t:info().shape[0]), "[]", 0) + 1)
  end
  if #key > t:dim() then core.raise("[]: %d entries for %s", #key, t:describe()) end
  local view, d = t, 0
  for i = 1, #key do
    local part, size = key[i], tonumber(view:info().shape[d])
    if type(part) == "table" and not Tensor.is(part) then
      if #part > 0 then
        local first = place(view, part[1], size, "[]", d)
        local last = part[2] and place(view, part[2], size, "[]", d) or first
        local step = part[3] or 1
        if last < first or step < 1 then core.raise("[]: { %s } is empty or runs backwards", table.concat(part, ", ")) end
        view = view:narrow(d + 1, first + 1, math.floor((last - first) / step) + 1, step)
      end
      d = d + 1
    else
      view = view:select(d + 1, place(view, part, size, "[]", d) + 1)
    end
  end
  return view
end

--- t[i] selects (a number or boolean where that is one value, which waits for it); t[{ … }] slices, see `at`; t[mask] gives the
-- values where a bool tensor of the same shape is true; t[indices] (i32, i64; 0-based) picks rows. Other keys are methods.
function Tensor.__index(t, key)
  local method = Tensor[key]
  if method ~= nil then return method end
  if type(key) == "number" or (type(key) == "table" and not Tensor.is(key)) then
    local view = at(t, key)
    if view:dim() > 0 then return view end
    if rawget(view, "node") then
      core.raise "[]: one value is read as a number, which no gradient passes: select(dim, position) keeps a tensor, item() of that reads the number"
    end
    local value = view:item()
    if view ~= t then view:close() end
    return value
  elseif Tensor.is(key) then
    if key:dtype() == "bool" then return t:masked_select(key) end
    return t:index_select(1, key)
  end
  local field = Tensor.fields[key]
  return field and field(t)
end

--- t[i] = v, t[{ … }] = v, t[mask] = v: v is a number, a tensor or lists, broadcast and converted. Other keys are plain fields.
function Tensor.__newindex(t, key, value)
  if type(key) == "number" or (type(key) == "table" and not Tensor.is(key)) then
    local view = at(t, key)
    view:copy(value)
    if view ~= t then view:close() end                        -- { {} } names the whole of t
  elseif Tensor.is(key) then
    if key:dtype() ~= "bool" then core.raise("[]: assignment through indices %s; only masks (bool) can be assigned to", key:describe()) end
    core.scope(function() t:copy(t:masked_fill(key, value)) end)
  else
    rawset(t, key, value)
  end
end

return Tensor
