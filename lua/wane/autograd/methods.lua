--- What wane.Tensor's methods do while wane.autograd records and an operand leads to a leaf. Every method is one of these:
--
--   - it asks, reads or compares, or is made of other methods: it stays as it is (`left`);
--   - it changes a tensor in place: it is refused (`in_place`);
--   - it has an op in wane.nn.functional, or a derivative here: the result is noted (`recorded`);
--   - no gradient passes it: it is refused. A method that no list names is one of these.
--
-- So a gradient is right, or the call that would lose it is an error. Where nothing is recorded, a method costs one look at a switch more.
-- @module wane.autograd.methods
local autograd = require "wane.autograd"
local core = require "wane.core"
local Tensor = require "wane.tensor.object"
local C, is, needs = core.C, Tensor.is, autograd.needs
local new = Tensor.constructors

local M = {}

--- The functions as they were written, by those that stand in their place: for whoever looks up where they are.
M.written = {}

local function set(text)
  local list = {}
  for name in text:gmatch "%S+" do list[name] = true end
  return list
end

local left = set [[
  wrap close is info shape stride dtype device dim numel nbytes is_contiguous is_float dim0 describe sizes of size
  wait cdata bytes item totable stats equal allclose detach keep backward
  eq ne lt le gt ge logical_and logical_or logical_xor logical_not isnan isfinite any all argmax argmin argsort nonzero
  float half bfloat16 char byte int long bool type_as contiguous t transpose expand_as unsqueeze squeeze flatten split chunk max min
  empty_like zeros_like ones_like empty full zeros ones arange eye manual_seed randn rand randint tensor from_buffer save load_tensors ]]

local in_place = set "fill zero copy add_ sub_ mul_ div_ pow_"

-- wane.nn.functional, which is made of this.
local function ops() return require "wane.nn.functional" end

-- ---------------------------------------------------------------- derivatives

-- Gradients as their operands are: summed over what was broadcast; in the dtype of what goes on backward (a leaf's are f32).
local function fitted(inputs, ...)
  local out = {}
  for i = 1, inputs.n do
    local g, x = (select(i, ...)), inputs[i]
    if g and needs(x) then
      g = ops().sum_to(g, x:shape())
      out[i] = rawget(x, "node") and g:to(x:dtype()) or g
    end
  end
  return unpack(out, 1, inputs.n)
end

-- A method with its derivative(dy, y, the method's own arguments) -> a gradient for each argument (or entry of the first, a list) that has one.
local function by(derivative)
  return function(name, plain, ...)
    local y = autograd.no_grad(plain, ...)
    if not y:is_float() then return y end
    local args, count = { ... }, select("#", ...)
    local list = is(args[1]) and args or args[1]
    local inputs = { n = list == args and count or #list }
    for i = 1, inputs.n do
      if rawequal(list[i], y) then return y end                    -- to("f32") of an f32 tensor
      inputs[i] = is(list[i]) and list[i] or nil
    end
    return autograd.push(name, y, inputs, function(dy) return fitted(inputs, derivative(dy, y, unpack(args, 1, count))) end)
  end
end

-- A view of some values: the others have a gradient of 0.
local function part(name)
  return by(function(dy, _, x, ...)
    local dx = x:zeros_like(dy:dtype())
    dx[name](dx, ...):copy(dy)
    return dx
  end)
end

-- A copy of some values, found by what the method does to their positions.
local function picked(name)
  return by(function(dy, _, x, ...)
    local n = x:numel()
    local from = new.arange(n, "i64"):reshape(x:shape())
    return ops().scatter_add(dy:reshape(-1, 1), from[name](from, ...):flatten(), n):reshape(x:shape())
  end)
end

local function spread(dy, x, dim) return ops().spread(dy, x, dim) end

local function mean_of(x, dim) return dim and x:mean(dim, true) or x:mean() end

-- Of the largest or smallest: equals share the gradient, as torch's amax has it.
local function of_extreme(dy, y, x, dim, keepdim)
  local those = x:eq(spread(y, x, dim))
  return those:where(spread(dy / those:sum(dim, keepdim), x, dim), 0)
end

-- Gradient of the deviations x - mean, before it is scaled: d(sum of squares) / 2 / (n - correction).
local function of_deviations(dy, x, dim, count, correction)
  x = x:to "f32"
  return spread(dy:to "f32" / (x:numel() / count - (correction or 1)), x, dim) * (x - mean_of(x, dim))
end

local same = by(function(dy) return dy end)
local reshaped = by(function(dy, _, x) return dy:reshape(x:shape()) end)

local recorded = {
  to = same, clone = same, dequantize = same, expand = same,
  view = reshaped, reshape = reshaped,
  narrow = part "narrow", select = part "select", permute = part "permute",
  gather = picked "gather", masked_select = picked "masked_select",
  tril = by(function(dy, _, _, k) return dy:tril(k) end),
  triu = by(function(dy, _, _, k) return dy:triu(k) end),

  where = by(function(dy, _, cond) return nil, cond:where(dy, 0), cond:where(0, dy) end),
  masked_fill = by(function(dy, _, _, mask) return dy:masked_fill(mask, 0), nil, mask:where(dy, 0) end),
  clamp = by(function(dy, _, x, low, high)                           -- at a bound itself x has none; of a bound that is a tensor it has it
    local dlow, dhigh
    if high then
      local above = (low and x:maximum(low) or x):ge(high)
      dy, dhigh = above:where(0, dy), above:where(dy, 0)
    end
    if low then
      local below = x:le(low)
      dy, dlow = below:where(0, dy), below:where(dy, 0)
    end
    return dy, dlow, dhigh
  end),
  outer = by(function(dy, _, a, b) return dy:matmul(b), dy:t():matmul(a) end),

  sum = by(function(dy, _, x, dim) return spread(dy, x, dim) end),
  mean = by(function(dy, y, x, dim) return spread(dy / (x:numel() / y:numel()), x, dim) end),
  amax = by(of_extreme), amin = by(of_extreme),
  var = by(function(dy, y, x, dim, _, correction) return of_deviations(dy * 2, x, dim, y:numel(), correction) end),
  std = by(function(dy, y, x, dim, _, correction) return of_deviations(y:eq(0):where(0, dy / y), x, dim, y:numel(), correction) end),
  norm = by(function(dy, y, x, p, dim, keepdim)
    if p == 1 then return spread(dy, x, dim) * x:sign() end
    if p == math.huge then return of_extreme(dy, y, x:abs(), dim, keepdim) * x:sign() end
    return spread(y:eq(0):where(0, dy / y), x, dim) * x
  end),
  cumsum = by(function(dy, _, x, dim)
    dim = dim or 1
    local back = new.arange(x:size(dim) - 1, -1, -1, "i64")
    return dy:index_select(dim, back):cumsum(dim):index_select(dim, back)
  end),
  log_softmax = by(function(dy, y, _, dim) return dy - y:exp() * dy:sum(dim or -1, true) end),

  cat = by(function(dy, _, list, dim)
    local out, from = {}, 1
    for i, t in ipairs(list) do
      local size = t:size(dim or 1)
      out[i] = dy:narrow(dim or 1, from, size)
      from = from + size
    end
    return unpack(out)
  end),
  stack = by(function(dy, _, list, dim)
    local out = {}
    for i = 1, #list do out[i] = dy:select(dim or 1, i) end
    return unpack(out)
  end),
  index_select = by(function(dy, _, x, dim, index)
    local shape, d = x:shape(), x:dim0(dim, "index_select") + 1
    local before, n, behind = 1, shape[d], 1
    for i, size in ipairs(shape) do
      if i < d then before = before * size elseif i > d then behind = behind * size end
    end
    local rows = dy:reshape(before, index:numel(), behind):transpose(1, 2):reshape(index:numel(), before * behind)
    return ops().scatter_add(rows, index:flatten() % n, n):reshape(n, before, behind):transpose(1, 2):reshape(shape)
  end),
  -- The values are those at the indices, and gather has a derivative.
  sort = function(_, plain, x, dim, ...)
    local _, indices = autograd.no_grad(plain, x, dim, ...)
    return x:gather(dim or -1, indices), indices
  end,
  topk = function(_, plain, x, k, dim, ...)
    local _, indices = autograd.no_grad(plain, x, k, dim, ...)
    return x:gather(dim or -1, indices), indices
  end,
}

-- ---------------------------------------------------------------- what wane.nn.functional has

for name in pairs(set [[ neg abs sqrt rsqrt exp log sin cos tanh sigmoid floor ceil round sign reciprocal square relu silu gelu gelu_tanh quick_gelu erf ]]) do
  recorded[name] = function(_, _, x) return ops().unary(x, C["WANE_" .. name:upper()]) end
end

for name, code in pairs { add = "ADD", sub = "SUB", mul = "MUL", div = "DIV", pow = "POW", minimum = "MIN", maximum = "MAX" } do
  code = C["WANE_" .. code]
  recorded[name] = function(_, plain, a, b)
    if type(b) == "boolean" then b = b and 1 or 0 end
    if is(a) and is(b) then return ops().binary(a, b, code) end
    if type(is(a) and b or a) ~= "number" then return plain(a, b) end        -- which says what is wrong
    return ops().binary_scalar(is(a) and a or b, is(a) and b or a, code, not is(a))
  end
end

recorded.softmax = function(_, _, x, dim) return ops().softmax(x, x:dim0(dim or -1, "softmax")) end
for name in pairs(set "matmul mm bmm mv dot") do
  recorded[name] = function(_, plain, a, b) return is(b) and ops().matmul(a, b) or plain(a, b) end
end

-- ---------------------------------------------------------------- in the methods' place

local function refused(name)
  core.raise("%s: no gradient passes this method, and an operand leads to a leaf: detach() that operand, or call it in autograd.no_grad", name)
end

local function refused_in_place(name)
  core.raise("%s: changes a tensor in place while recording, and an operand leads to a leaf: make a new tensor (x = x * 2, not x:mul_(2)), detach() and "
    .. "clone() it, or call it in autograd.no_grad", name)
end

local function leads(...)
  for i = 1, select("#", ...) do
    local v = (select(i, ...))
    if is(v) then
      if needs(v) then return true end
    elseif type(v) == "table" then
      for _, entry in ipairs(v) do if is(entry) and needs(entry) then return true end end
    end
  end
  return false
end

local function guarded(name, plain)
  local instead = recorded[name] or (in_place[name] and refused_in_place) or refused
  return function(...)
    if autograd.recording and leads(...) then return instead(name, plain, ...) end
    return plain(...)
  end
end

local guard_of = {}
for _, class in ipairs { Tensor, new } do
  for name, fn in pairs(class) do
    if type(fn) == "function" and not left[name] and not name:find "^_" then
      class[name] = guarded(name, fn)
      M.written[class[name]], guard_of[fn] = fn, class[name]
    end
  end
end
for name, fn in pairs(Tensor) do
  if name:find "^__" and guard_of[fn] then Tensor[name] = guard_of[fn] end   -- __add is add
end

return M
