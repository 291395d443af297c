--- The ops that layers are made of, as functions on Tensors: one FFI call each, which checks shapes, allocates the result and
-- enqueues. What each does, with its formula and source, is in core/include/wane.h. Those with a gradient note it while wane.autograd records.
-- @module wane.nn.functional
local ffi = require "ffi"
local autograd = require "wane.autograd"
local core = require "wane.core"
local Tensor = require "wane.tensor"
local needs, push = autograd.needs, autograd.push
local C, check, stream, wrap = core.C, core.check, core.stream, Tensor.wrap
local handle = core.handle_type
local info = core.info_type()

local F = {}

local function h(t) return t and t.h or nil end

-- The result of a C function that fills one handle.
local function one(fn, ...)
  local y = handle()
  check(fn(stream(), y, ...))
  return wrap(y)
end

-- Does the op have to be noted?
local function recording(a, b, c) return autograd.recording and (needs(a) or needs(b) or needs(c)) end

-- A gradient that an op would lose is an error.
local function refuse(name, a, b, c)
  if recording(a, b, c) then core.raise("%s: no gradient passes this op, and an operand leads to a leaf: detach() it, or use autograd.no_grad", name) end
end

--- dy summed down to a shape that was broadcast to its own: the gradient of what was broadcast.
-- @param dy wane.Tensor
-- @param shape integer[]
function F.sum_to(dy, shape)
  local from = dy:shape()
  while #from > #shape do
    dy = one(C.wane_reduce, dy.h, C.WANE_SUM, 0, 0)
    table.remove(from, 1)
  end
  for d = 1, #shape do
    if shape[d] ~= from[d] then dy = one(C.wane_reduce, dy.h, C.WANE_SUM, d - 1, 1) end
  end
  return dy
end
local sum_to = F.sum_to

--- dy, the gradient of what a reduction of x gave, repeated over x's shape.
-- @param dim integer|integer[]|nil what was reduced, as wane.Tensor's methods take it
function F.spread(dy, x, dim)
  local shape, kept = x:shape(), {}
  for d = 1, #shape do kept[d] = dim and shape[d] or 1 end
  for _, d in ipairs(type(dim) == "table" and dim or { dim }) do kept[x:dim0(d, "reduce") + 1] = 1 end
  return dy:reshape(kept):expand(shape):clone()
end

--- The other way of picking rows: see wane_scatter_add.
-- @param src wane.Tensor [.., C]
-- @param index wane.Tensor i32 or i64 [..]
-- @param n integer rows of the result
-- @return wane.Tensor f32 [n, C]
function F.scatter_add(src, index, n)
  refuse("scatter_add", src)
  return one(C.wane_scatter_add, src.h, index.h, n)
end

--- [.., n] as [rows, n].
local function rows_of(t) return F.view(t, -1, t:shape()[#t:shape()]) end

-- dW [N, K] = dyᵀ x: a product with x's transpose for a weight, so that the fast kernels do it.
local function weight_gradient(dy, x, compute)
  local function columns(t) return F.cast(F.transpose(rows_of(t)), C.WANE_F32) end
  return one(C.wane_linear, columns(dy).h, columns(x).h, nil, compute, -1)
end

--- x · Wᵀ + bias; see wane_linear. threshold: outlier threshold of LLM.int8(), below 0 for weight-only.
function F.linear(x, weight, bias, compute, threshold)
  local y = one(C.wane_linear, x.h, weight.h, h(bias), compute, threshold or -1)
  if not recording(x, weight, bias) then return y end
  return push("linear", y, { x, weight, bias, n = 3 }, function(dy)
    return needs(x) and one(C.wane_linear_backward, dy.h, weight.h, compute) or nil,
      needs(weight) and weight_gradient(dy, x, compute) or nil,
      needs(bias) and sum_to(F.cast(dy, C.WANE_F32), bias:shape()) or nil
  end)
end

local lora_options, was_added = ffi.new "wane_lora_options", ffi.new "int[1]"
local function options_of(part, seed)
  lora_options.scale, lora_options.p, lora_options.seed, lora_options.offset = part.scale, seed and part.dropout or 0, seed or 0, 0
  return lora_options
end

--- A frozen product with low-rank adapters beside it, as one op: y = x · Wᵀ + bias + onto + sum over the parts of s·B (A drop(x)); see
-- wane_linear_lora, which takes the first part; the others are added. What is kept for backward are the narrow results of A alone.
-- @param parts table[] { A [r, K], B [N, r], scale, dropout }
-- @param onto wane.Tensor|nil of y's shape and dtype
function F.linear_lora(x, weight, bias, parts, compute, threshold, onto)
  local last = 2 + 2 * #parts
  local inputs, narrow, seeds, y = { x, n = last + 1 }, {}, {}
  inputs[last], inputs[last + 1] = onto, weight
  for i, part in ipairs(parts) do
    inputs[2 * i], inputs[2 * i + 1] = part.A, part.B
    seeds[i] = autograd.dropping and (part.dropout or 0) > 0 and autograd.next_seed() or nil
    local u, o = handle(), options_of(part, seeds[i])
    if i == 1 then
      y = handle()
      check(C.wane_linear_lora(stream(), y, u, x.h, weight.h, h(bias), part.A.h, part.B.h, o, compute, threshold or -1, h(onto)))
      y, narrow[1] = wrap(y), wrap(u)
    else
      check(C.wane_lora_down(stream(), u, x.h, part.A.h, o.scale, o.p, o.seed, o.offset))
      narrow[i] = wrap(u)
      check(C.wane_lora_up(stream(), y.h, u, part.B.h))
    end
  end
  if not autograd.recording then return y end
  return push("linear_lora", y, inputs, function(dy)
    local grads = {}
    for i, part in ipairs(parts) do
      local dx, dA, dB, o = needs(x) and handle() or nil, handle(), handle(), options_of(part, seeds[i])
      if i == 1 then
        local place = dx and #parts == 1 and autograd.target(x)
        check(C.wane_linear_lora_backward(stream(), dx, dA, dB, dy.h, x.h, narrow[1].h, weight.h, part.A.h, part.B.h, o, compute, h(place), was_added))
        if dx then grads[1] = place and was_added[0] == 1 and autograd.IN_PLACE or wrap(dx) end
      else
        local du = handle()
        check(C.wane_lora_up_backward(stream(), du, dB, dy.h, narrow[i].h, part.B.h, o.scale))
        check(C.wane_lora_down_backward(stream(), h(grads[1]), dA, du, x.h, part.A.h, o.p, o.seed, o.offset))
        wrap(du)
      end
      grads[2 * i], grads[2 * i + 1] = wrap(dA), wrap(dB)
    end
    grads[last] = onto and dy
    return unpack(grads, 1, last)
  end, narrow)
end

--- Choices ids [M, k] sorted by expert; see wane_route. Returns source [M*k], place [M, k], bounds [experts + 1].
function F.route(ids, experts)
  local source, place, bounds = handle(), handle(), handle()
  check(C.wane_route(stream(), source, place, bounds, ids.h, experts))
  return wrap(source), wrap(place), wrap(bounds)
end

local weights_type, handles, room = ffi.typeof "const wane_handle *[?]", nil, 0
--- Row p of x [P, K] times the weight of its expert; see wane_linear_experts.
-- @param weights wane.Tensor[] one [N, K] an expert
function F.linear_experts(x, bounds, weights, compute, threshold)
  local n = #weights
  if n > room then handles, room = weights_type(n), n end
  for e = 1, n do handles[e - 1] = weights[e].h end
  local y = one(C.wane_linear_experts, x.h, bounds.h, handles, n, compute, threshold or -1)
  if not autograd.recording then return y end
  local inputs = { n = n + 2, x, unpack(weights, 1, n) }
  inputs[n + 2] = bounds
  return push("linear_experts", y, inputs, function(dy)
    for e = 1, n do handles[e - 1] = weights[e].h end
    local grads = { needs(x) and one(C.wane_linear_experts_backward, dy.h, bounds.h, handles, n, compute) or nil }
    local any = false
    for e = 1, n do any = any or needs(weights[e]) end
    if any then
      local dw = one(C.wane_experts_weight_backward, dy.h, x.h, bounds.h, n)               -- [experts, N, K]
      for e = 1, n do grads[e + 1] = needs(weights[e]) and F.select(dw, 0, e - 1) or nil end
    end
    return unpack(grads, 1, n + 1)
  end)
end

--- Rows of x [M, C] by index [..] (i32, i64) -> [.., C].
function F.rows(x, index)
  local y = one(C.wane_index_select, x.h, 0, index.h)
  if not recording(x) then return y end
  return push("rows", y, { x, index, n = 2 }, function(dy)
    return F.cast(one(C.wane_scatter_add, dy.h, index.h, x:shape()[1]), x:info().dtype)
  end)
end

--- Softmax over dimension `dim` (from 0).
function F.softmax(x, dim)
  local y = one(C.wane_softmax, x.h, dim, 0)
  if not recording(x) then return y end
  return push("softmax", y, { x, n = 1 }, function(dy) return one(C.wane_softmax_backward, dy.h, y.h, dim) end)
end

--- The k largest of each row of x [M, N], in order, and their indices (i64): [M, k] each.
function F.topk(x, k)
  local values, indices = handle(), handle()
  check(C.wane_topk(stream(), values, indices, x.h, k, 1, 1))
  values, indices = wrap(values), wrap(indices)
  if not recording(x) then return values, indices end
  return push("topk", values, { x, indices, n = 2 }, function(dy) return one(C.wane_topk_backward, dy.h, indices.h, x:shape()[2]) end), indices
end

--- Product of two matrices, or of two stacks of them; numpy.matmul's rules for vectors.
function F.matmul(a, b)
  local y = one(C.wane_matmul, a.h, b.h)
  if not recording(a, b) then return y end
  return push("matmul", y, { a, b, n = 2 }, function(dy)
    local row, column = a:dim() == 1, b:dim() == 1                -- vectors are matrices of one row, or one column
    local ma, mb = row and a:unsqueeze(1) or a, column and b:unsqueeze(2) or b
    if column then dy = dy:unsqueeze(-1) end
    if row then dy = dy:unsqueeze(-2) end
    return needs(a) and sum_to(F.matmul(dy, mb:transpose(-1, -2)), ma:shape()):view(a:shape()) or nil,
      needs(b) and sum_to(F.matmul(ma:transpose(-1, -2), dy), mb:shape()):view(b:shape()) or nil
  end)
end

local order_array = ffi.new "int32_t[8]"
--- A view with its dimensions (from 0) in another order: F.permute(x, 0, 2, 1, 3).
function F.permute(x, ...)
  local n, back = select("#", ...), {}
  for i = 1, n do
    local d = (select(i, ...))
    order_array[i - 1], back[d + 1] = d, i - 1
  end
  local y = one(C.wane_view_permute, x.h, order_array)
  if not recording(x) then return y end
  return push("permute", y, { x, n = 1 }, function(dy) return F.permute(dy, unpack(back, 1, n)) end)
end

--- A view of a matrix with its dimensions swapped.
function F.transpose(x) return F.permute(x, 1, 0) end

--- Rows of a table for ids, as dtype number `dtype`.
function F.embedding(table_, ids, dtype)
  local y = one(C.wane_embedding, table_.h, ids.h, dtype)
  if not recording(table_) then return y end
  return push("embedding", y, { table_, ids, n = 2 }, function(dy) return one(C.wane_scatter_add, dy.h, ids.h, table_:shape()[1]) end)
end

-- A gradient that was made, or the mark of one that was added to what had come another way.
local function made_or_added(dx) return dx.t ~= nil and wrap(dx) or autograd.IN_PLACE end

--- x / rms(x) * (weight + offset) over the last dimension; weight may be nil.
function F.rms_norm(x, weight, eps, offset)
  offset = offset or 0
  local y = one(C.wane_rms_norm, x.h, h(weight), eps, offset)
  if not recording(x, weight) then return y end
  return push("rms_norm", y, { x, weight, n = 2 }, function(dy)
    local dx, dw, onto = handle(), needs(weight) and handle() or nil, autograd.target(x)
    check(C.wane_rms_norm_backward(stream(), dx, dw, dy.h, x.h, h(weight), eps, offset, h(onto)))
    return made_or_added(dx), dw and wrap(dw)
  end)
end

--- (x - mean) / deviation * weight + bias over the last dimension; weight and bias may be nil.
function F.layer_norm(x, weight, bias, eps)
  local y = one(C.wane_layer_norm, x.h, h(weight), h(bias), eps)
  if not recording(x, weight, bias) then return y end
  return push("layer_norm", y, { x, weight, bias, n = 3 }, function(dy)
    local dx, dw, db, onto = handle(), (needs(weight) or needs(bias)) and handle() or nil, needs(bias) and handle() or nil, autograd.target(x)
    check(C.wane_layer_norm_backward(stream(), dx, dw, db, dy.h, x.h, h(weight), eps, h(onto)))
    return made_or_added(dx), dw and wrap(dw), db and wrap(db)
  end)
end

--- Rotary embedding of x [B, T, H, D]. `negative` holds -inv_freq: turning back is the gradient of turning.
function F.rope(x, inv_freq, positions, start, scale, interleaved, negative)
  local y = one(C.wane_rope, x.h, inv_freq.h, h(positions), start, scale, interleaved and 1 or 0)
  if not recording(x) then return y end
  return push("rope", y, { x, positions, n = 2 }, function(dy)
    return one(C.wane_rope, dy.h, negative.h, h(positions), start, scale, interleaved and 1 or 0)
  end)
end

--- Writes x [B, T, H, D] into cache [B, H, capacity, D] from time `start` on.
function F.kv_append(cache, x, start)
  refuse("kv_append", x)
  check(C.wane_kv_append(stream(), cache.h, x.h, start))
end

local options = ffi.new "wane_attention_options"
local function attention_options(o)
  options.scale, options.softcap = o.scale or 0, o.softcap or 0
  options.q_start, options.kv_length = o.q_start, o.kv_length
  options.window, options.causal = o.window or 0, o.causal == false and 0 or 1
  return options
end

--- Attention of q [B, T, H, D] over k, v [B, KV, keys, D]; o: scale, softcap, q_start, kv_length, window, causal, key_mask, bias. No gradient.
function F.attention(q, k, v, o)
  refuse("attention over a cache", q, k, v)
  return one(C.wane_attention, q.h, k.h, v.h, h(o.key_mask), h(o.bias), attention_options(o))
end

--- The same for whole sequences, with a gradient: q [B, T, H, D], k and v [B, S, KV, D].
-- @param o table as attention's, and first = i32 [B, T]: the first key that each row may see (packed samples)
function F.attend(q, k, v, o)
  local function keys_first(t) return one(C.wane_view_permute, t.h, ffi.new("int32_t[4]", 0, 2, 1, 3)) end
  local kh, vh = keys_first(k), keys_first(v)
  if not (o.first or autograd.dropping or recording(q, k, v) or recording(o.bias)) then return F.attention(q, kh, vh, o) end
  local y, lse = handle(), handle()
  check(C.wane_attention_train(stream(), y, lse, q.h, kh.h, vh.h, h(o.key_mask), h(o.bias), h(o.first), attention_options(o)))
  y, lse = wrap(y), wrap(lse)
  if not recording(q, k, v) and not recording(o.bias) then return y end
  return push("attention", y, { q, k, v, o.bias, o.key_mask, o.first, n = 6 }, function(dy)
    local dq, dk, dv, dbias = handle(), handle(), handle(), needs(o.bias) and handle() or nil
    check(C.wane_attention_backward(stream(), dq, dk, dv, dbias, dy.h, y.h, lse.h, q.h, kh.h, vh.h, h(o.key_mask), h(o.bias), h(o.first),
      attention_options(o)))
    return wrap(dq), wrap(dk), wrap(dv), dbias and wrap(dbias)
  end, { lse, kh, vh })
end

--- act(gate) * up; act is one of F.acts.
function F.glu(gate, up, act)
  local y = one(C.wane_glu, gate.h, up.h, act)
  if not recording(gate, up) then return y end
  return push("glu", y, { gate, up, n = 2 }, function(dy)
    local dgate, dup = handle(), handle()
    check(C.wane_glu_backward(stream(), dgate, dup, dy.h, gate.h, up.h, act))
    return wrap(dgate), wrap(dup)
  end)
end

local without_derivative = { [C.WANE_NOT] = true, [C.WANE_ISNAN] = true, [C.WANE_ISFINITE] = true }      -- they give truths, not numbers

--- A unary op by its code: C.WANE_NEG …
function F.unary(x, op)
  local y = one(C.wane_unary, x.h, op)
  if not recording(x) or without_derivative[op] then return y end
  return push("unary", y, { x, n = 1 }, function(dy) return one(C.wane_unary_backward, dy.h, x.h, op) end)
end

--- Keeps each value with probability 1 - p, times 1 / (1 - p), while autograd records; else x itself.
function F.dropout(x, p)
  if p == 0 or not autograd.dropping then return x end
  local seed = autograd.next_seed()
  local y = one(C.wane_dropout, x.h, p, seed, 0)
  if not recording(x) then return y end
  return push("dropout", y, { x, n = 1 }, function(dy) return one(C.wane_dropout, dy.h, p, seed, 0) end)
end

local function pass_on(dy) return dy end
-- dy where `mask`, half of it where a and b are equal (as torch shares it), else 0.
local function of_chosen(dy, mask, a, b) return mask:where(dy, Tensor.eq(a, b):where(dy / 2, 0)) end

-- Gradients of a and of b in a op b: functions of (dy, a, b, y); the other one may be a number.
local binary_gradients = {
  [C.WANE_ADD] = { pass_on, pass_on },
  [C.WANE_SUB] = { pass_on, function(dy) return dy * -1 end },
  [C.WANE_MUL] = { function(dy, _, b) return dy * b end, function(dy, a) return dy * a end },
  [C.WANE_DIV] = { function(dy, _, b) return dy / b end, function(dy, a, b) return dy / b * a / b * -1 end },
  [C.WANE_POW] = {
    function(dy, a, b) return Tensor.of(b, a, "pow"):eq(0):where(0, dy * (b * a ^ (b - 1))) end,          -- a ^ 0 is 1 at a = 0 too
    function(dy, a, b, y)
      a = Tensor.of(a, b, "pow")
      return a:eq(0):logical_and(b:ge(0)):where(0, dy * (y * a:log()))
    end,
  },
  [C.WANE_MIN] = { function(dy, a, b) return of_chosen(dy, Tensor.lt(a, b), a, b) end, function(dy, a, b) return of_chosen(dy, Tensor.gt(a, b), a, b) end },
  [C.WANE_MAX] = { function(dy, a, b) return of_chosen(dy, Tensor.gt(a, b), a, b) end, function(dy, a, b) return of_chosen(dy, Tensor.lt(a, b), a, b) end },
}

local function gradients_of(op, what) return binary_gradients[op] or core.raise("%s: op %d has no gradient", what, op) end

--- a op b, broadcast, by the op's code: C.WANE_ADD … Sums, differences, products, quotients, powers, minimum and maximum have gradients.
function F.binary(a, b, op)
  local y = one(C.wane_binary, a.h, b.h, op)
  if not recording(a, b) then return y end
  local gradients = gradients_of(op, "binary")
  return push("binary", y, { a, b, n = 2 }, function(dy)
    return needs(a) and sum_to(gradients[1](dy, a, b, y), a:shape()) or nil, needs(b) and sum_to(gradients[2](dy, a, b, y), b:shape()) or nil
  end)
end

--- a op value, or value op a when `reversed`.
function F.binary_scalar(a, value, op, reversed)
  local y = one(C.wane_binary_scalar, a.h, value, op, reversed and 1 or 0)
  if not recording(a) then return y end
  local gradients = gradients_of(op, "binary_scalar")
  return push("binary_scalar", y, { a, n = 1 }, function(dy)
    if reversed then return gradients[2](dy, value, a, y) end
    return gradients[1](dy, a, value, y)
  end)
end

--- a + b. Equal shapes, or one repeats along the other.
function F.add(a, b) return F.binary(a, b, C.WANE_ADD) end

--- x * factor, a number.
function F.scale(x, factor) return F.binary_scalar(x, factor, C.WANE_MUL) end

--- cap * tanh(x / cap): Gemma 2's soft cap of logits.
function F.softcap(x, cap) return F.scale(F.unary(F.scale(x, 1 / cap), C.WANE_TANH), cap) end

--- Sum or mean (C.WANE_SUM, C.WANE_MEAN) over dimension `dim` (from 0; -1: over everything), which stays with size 1 where `keep`.
function F.reduce(x, op, dim, keep)
  local y = one(C.wane_reduce, x.h, op, dim, keep and 1 or 0)
  if not recording(x) then return y end
  if op ~= C.WANE_SUM and op ~= C.WANE_MEAN then refuse("reduce", x) end
  return push(op == C.WANE_SUM and "sum" or "mean", y, { x, n = 1 }, function(dy)
    if op == C.WANE_MEAN then dy = F.scale(dy, y:numel() / x:numel()) end
    return F.spread(dy, x, dim >= 0 and dim + 1 or nil)
  end)
end

--- Sum over dimension `dim` (from 0), which stays with size 1.
function F.sum(x, dim) return F.reduce(x, C.WANE_SUM, dim, true) end

--- Mean of all elements, a single value.
function F.mean(x) return F.reduce(x, C.WANE_MEAN, -1, false) end

--- cond ? a : b, broadcast. No gradient (wane.where has one).
function F.where(cond, a, b)
  refuse("where", a, b)
  return one(C.wane_where, cond.h, a.h, b.h)
end

--- A contiguous copy as dtype number `dtype`.
function F.cast(x, dtype)
  local y = one(C.wane_cast, x.h, dtype)
  if not recording(x) then return y end
  return push("cast", y, { x, n = 1 }, function(dy) return F.cast(dy, x:info().dtype) end)
end

--- dst[...] = src.
function F.copy(dst, src)
  refuse("copy", dst, src)
  check(C.wane_copy(stream(), dst.h, src.h))
end

--- Index (i64, from 0) of the largest element along `dim` (from 0), the lowest on ties.
function F.argmax(x, dim)
  local y = handle()
  check(C.wane_reduce(stream(), y, x.h, C.WANE_ARGMAX, dim, 0))
  return wrap(y)
end

--- -log softmax(logits)[label] of each row.
function F.nll(logits, labels, ignore_index)
  ignore_index = ignore_index or -100
  local y = one(C.wane_nll, logits.h, labels.h, ignore_index)
  if not recording(logits) then return y end
  return push("nll", y, { logits, labels, n = 2 }, function(dy) return one(C.wane_nll_backward, logits.h, labels.h, dy.h, ignore_index) end)
end

--- The same values, and the gradient of `factor` times their sum in dtype number `dtype`, in one pass; outside the graph.
-- @return wane.Tensor nll, wane.Tensor dlogits
function F.nll_with_gradient(logits, labels, factor, ignore_index, dtype)
  local y, dlogits = handle(), handle()
  check(C.wane_nll_with_gradient(stream(), y, dlogits, logits.h, labels.h, factor, ignore_index or -100, dtype))
  return wrap(y), wrap(dlogits)
end

--- Can linear_nll take this weight with the kernels in force?
-- @return boolean
function F.linear_nll_fits(weight, compute) return C.wane_linear_nll_fits(weight.h, compute) == 1 end

--- The loss of a head x · weightᵀ whose scores are never in memory, and the gradient of `factor` times its sum; outside the graph.
-- @return wane.Tensor nll f32 [M], wane.Tensor dx
function F.linear_nll(x, weight, labels, factor, ignore_index, compute)
  local y, dx = handle(), handle()
  check(C.wane_linear_nll(stream(), y, dx, x.h, weight.h, labels.h, factor, ignore_index or -100, compute))
  return wrap(y), wrap(dx)
end

--- [1, count]: start, start + 1 … as dtype number `dtype`.
function F.arange(start, count, dtype)
  local y = handle()
  check(C.wane_arange(stream(), y, start, start + count, 1, dtype))
  return F.view(wrap(y), 1, count)
end

--- Running sums along `dim` (from 0). No gradient (wane.Tensor's method has one).
function F.cumsum(x, dim)
  refuse("cumsum", x)
  local y = handle()
  check(C.wane_cumsum(stream(), y, x.h, dim))
  return wrap(y)
end

local sizes = ffi.new "int64_t[8]"
local function reshape(x, n, a, b, c, d)
  sizes[0], sizes[1], sizes[2], sizes[3] = a, b or 0, c or 0, d or 0
  return one(C.wane_view_reshape, x.h, n, sizes)
end

--- A view of x with the given sizes (one may be -1).
function F.view(x, a, b, c, d)
  local n = d and 4 or c and 3 or b and 2 or 1
  local y = reshape(x, n, a, b, c, d)
  if not recording(x) then return y end
  return push("view", y, { x, n = 1 }, function(dy) return dy:reshape(x:shape()) end)
end

local function narrow(x, dim, start, length) return one(C.wane_view_narrow, x.h, dim, start, length, 1) end

--- A view of `length` elements of dimension `dim` from `start` on; both count from 0 here.
function F.narrow(x, dim, start, length)
  local y = narrow(x, dim, start, length)
  if not recording(x) then return y end
  return push("narrow", y, { x, n = 1 }, function(dy)
    local shape = x:shape()
    if shape[dim + 1] == length then return dy end
    local dx = F.zeros(dy:info().dtype, unpack(shape))
    F.copy(narrow(dx, dim, start, length), dy)
    return dx
  end)
end

--- Views of several stretches of dimension `dim`, one behind the other; their gradients become one tensor, not one each.
-- @param x wane.Tensor
-- @param dim integer from 0
-- @param lengths integer[] together at most x's size
-- @return wane.Tensor …
function F.split(x, dim, lengths)
  local out, from = {}, 0
  for i, length in ipairs(lengths) do
    out[i] = narrow(x, dim, from, length)
    from = from + length
  end
  if not recording(x) then return unpack(out) end
  -- The first part that is taken backward makes the whole gradient, and the others write theirs into it while it waits for x.
  local whole
  for i = 1, #lengths do
    local start = 0
    for k = 1, i - 1 do start = start + lengths[k] end
    push("split", out[i], { x, n = 1 }, function(dy)
      if not whole or not rawget(x, "node") or x.node.grad ~= whole then
        whole = F.zeros(dy:info().dtype, unpack(x:shape()))
        F.copy(narrow(whole, dim, start, lengths[i]), dy)
        return whole
      end
      F.copy(narrow(whole, dim, start, lengths[i]), dy)
    end)
  end
  return unpack(out)
end

--- One index (from 0) of dimension `dim` (from 0): a view with a dimension less. No gradient (wane.Tensor's method has one).
function F.select(x, dim, index)
  refuse("select", x)
  return one(C.wane_view_select, x.h, dim, index)
end

--- Zeros in the current scope.
function F.zeros(dtype, ...)
  local n = select("#", ...)
  for i = 1, n do sizes[i - 1] = (select(i, ...)) end
  local y = one(C.wane_tensor_new, dtype, n, sizes)
  check(C.wane_fill(stream(), y.h, 0))
  return y
end

--- An uninitialised tensor outside the pool and outside any scope (weights, caches): the collector or close() frees it.
function F.persistent(dtype, ...)
  local n = select("#", ...)
  for i = 1, n do sizes[i - 1] = (select(i, ...)) end
  local s = stream()
  local scope = C.wane_scope_swap(s, nil)
  local y = handle()
  local status = C.wane_tensor_new_paged(s, y, dtype, n, sizes)
  C.wane_scope_swap(s, scope)
  check(status)
  return wrap(y)
end

--- A tensor holding the first `count` values of a C array, in the current scope.
function F.upload(data, dtype, bytes, ...)
  local n = select("#", ...)
  for i = 1, n do sizes[i - 1] = (select(i, ...)) end
  local y = handle()
  check(C.wane_tensor_new(stream(), y, dtype, n, sizes))
  local t = wrap(y)
  check(C.wane_tensor_upload(stream(), y, data, bytes))
  return t
end

--- Runs fn outside any scope: tensors made by it live until closed or collected.
function F.outside_scopes(fn, ...)
  local s = stream()
  local scope = C.wane_scope_swap(s, nil)
  local function finish(ok, ...)
    C.wane_scope_swap(s, scope)
    if not ok then error((...), 0) end
    return ...
  end
  return finish(pcall(fn, ...))
end

--- Waits for a contiguous tensor's values and copies them into a new C array of its element type.
-- @return cdata array, integer count
function F.read(t, ctype)
  check(C.wane_tensor_info(t.h, info))
  local count, bytes, ticket = tonumber(info.numel), info.nbytes, info.ticket
  local out = ffi.new(ctype .. "[?]", count)
  check(core.wait(ticket))
  check(C.wane_tensor_read(stream(), t.h, out, bytes))
  return out, count
end

--- Activation names of config files -> unary op codes (transformers activations.py).
F.acts = {
  gelu = C.WANE_GELU, gelu_python = C.WANE_GELU, gelu_new = C.WANE_GELU_TANH, gelu_fast = C.WANE_GELU_TANH, gelu_pytorch_tanh = C.WANE_GELU_TANH,
  gelu_accurate = C.WANE_GELU_TANH, quick_gelu = C.WANE_QUICK_GELU, relu = C.WANE_RELU, silu = C.WANE_SILU, swish = C.WANE_SILU,
  tanh = C.WANE_TANH, sigmoid = C.WANE_SIGMOID,
}

return F
