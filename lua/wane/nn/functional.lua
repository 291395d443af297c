--- The ops that layers are made of, as functions on Tensors: one FFI call each, which checks shapes, allocates the result and
-- enqueues. What each does, with its formula and source, is in core/include/wane.h.
-- @module wane.nn.functional
local ffi = require "ffi"
local core = require "wane.core"
local Tensor = require "wane.tensor"
local C, check, stream, wrap = core.C, core.check, core.stream, Tensor.wrap
local handle = core.handle_type
local info = core.info_type()

local F = {}

--- The tape that records now (lua/wane/autograd.lua), or nil.
F.tape = nil

local function h(t) return t and t.h or nil end

-- Sum over all dimensions but the last `keep`: gradients of what was broadcast over rows.
local function sum_rows(t, keep)
  local shape = t:shape()
  while #shape > keep do
    local y = handle()
    check(C.wane_reduce(stream(), y, t.h, C.WANE_SUM, 0, 0))
    t = wrap(y)
    table.remove(shape, 1)
  end
  return t
end

--- [.., n] as [rows, n].
local function rows_of(t) return F.view(t, -1, t:shape()[#t:shape()]) end

--- x · Wᵀ + bias; see wane_linear. threshold: outlier threshold of LLM.int8(), below 0 for weight-only.
function F.linear(x, weight, bias, compute, threshold)
  local y = handle()
  check(C.wane_linear(stream(), y, x.h, weight.h, h(bias), compute, threshold or -1))
  local out = wrap(y)
  local tape = F.tape
  if not tape then return out end
  return tape:push(out, { x, weight, bias, n = 3 }, function(dy)
    local dx, dw, db
    if tape:needs(x) then
      local g = handle()
      check(C.wane_linear_backward(stream(), g, dy.h, weight.h, compute))
      dx = wrap(g)
    end
    if tape:needs(weight) then dw = F.matmul(F.transpose(rows_of(dy)), rows_of(x)) end   -- [N, M] · [M, K]
    if tape:needs(bias) then db = sum_rows(rows_of(dy), 1) end
    return dx, dw, db
  end)
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
  local y = handle()
  check(C.wane_linear_experts(stream(), y, x.h, bounds.h, handles, n, compute, threshold or -1))
  return wrap(y)
end

--- Rows of x [M, C] by index [..] (i32, i64) -> [.., C].
function F.rows(x, index)
  local y = handle()
  check(C.wane_index_select(stream(), y, x.h, 0, index.h))
  return wrap(y)
end

--- Softmax over dimension `dim` (from 0).
function F.softmax(x, dim)
  local y = handle()
  check(C.wane_softmax(stream(), y, x.h, dim, 0))
  return wrap(y)
end

--- The k largest of each row of x [M, N], in order, and their indices (i64): [M, k] each.
function F.topk(x, k)
  local values, indices = handle(), handle()
  check(C.wane_topk(stream(), values, indices, x.h, k, 1, 1))
  return wrap(values), wrap(indices)
end

--- Product of two matrices, or of two stacks of them.
function F.matmul(a, b)
  local y = handle()
  check(C.wane_matmul(stream(), y, a.h, b.h))
  return wrap(y)
end

local swapped = ffi.new("int32_t[2]", 1, 0)
--- A view of a matrix with its dimensions swapped.
function F.transpose(x)
  local y = handle()
  check(C.wane_view_permute(stream(), y, x.h, swapped))
  return wrap(y)
end

--- Rows of a table for ids, as dtype number `dtype`.
function F.embedding(table_, ids, dtype)
  local y = handle()
  check(C.wane_embedding(stream(), y, table_.h, ids.h, dtype))
  return wrap(y)
end

--- x / rms(x) * (weight + offset) over the last dimension; weight may be nil.
function F.rms_norm(x, weight, eps, offset)
  local y = handle()
  check(C.wane_rms_norm(stream(), y, x.h, h(weight), eps, offset or 0))
  local out = wrap(y)
  if not F.tape then return out end
  return F.tape:push(out, { x, weight, n = 2 }, function(dy)
    local dx, dw = handle(), handle()
    check(C.wane_rms_norm_backward(stream(), dx, dw, dy.h, x.h, h(weight), eps, offset or 0))
    return wrap(dx), weight and wrap(dw)
  end)
end

--- (x - mean) / deviation * weight + bias over the last dimension; weight and bias may be nil.
function F.layer_norm(x, weight, bias, eps)
  local y = handle()
  check(C.wane_layer_norm(stream(), y, x.h, h(weight), h(bias), eps))
  local out = wrap(y)
  if not F.tape then return out end
  return F.tape:push(out, { x, weight, bias, n = 3 }, function(dy)
    local dx, dw, db = handle(), handle(), handle()
    check(C.wane_layer_norm_backward(stream(), dx, dw, db, dy.h, x.h, h(weight), eps))
    return wrap(dx), weight and wrap(dw), bias and wrap(db)
  end)
end

--- Rotary embedding of x [B, T, H, D].
function F.rope(x, inv_freq, positions, start, scale, interleaved)
  local y = handle()
  check(C.wane_rope(stream(), y, x.h, inv_freq.h, h(positions), start, scale, interleaved and 1 or 0))
  return wrap(y)
end

--- Writes x [B, T, H, D] into cache [B, H, capacity, D] from time `start` on.
function F.kv_append(cache, x, start) check(C.wane_kv_append(stream(), cache.h, x.h, start)) end

local options = ffi.new "wane_attention_options"
--- Attention of q [B, T, H, D] over a cache; o: scale, softcap, q_start, kv_length, window, causal, key_mask, bias.
function F.attention(q, k, v, o)
  options.scale, options.softcap = o.scale or 0, o.softcap or 0
  options.q_start, options.kv_length = o.q_start, o.kv_length
  options.window, options.causal = o.window or 0, o.causal == false and 0 or 1
  local y = handle()
  check(C.wane_attention(stream(), y, q.h, k.h, v.h, h(o.key_mask), h(o.bias), options))
  return wrap(y)
end

--- act(gate) * up; act is one of F.acts.
function F.glu(gate, up, act)
  local y = handle()
  check(C.wane_glu(stream(), y, gate.h, up.h, act))
  return wrap(y)
end

--- A unary op by its code: C.WANE_NEG …
function F.unary(x, op)
  local y = handle()
  check(C.wane_unary(stream(), y, x.h, op))
  return wrap(y)
end

--- a op b, broadcast, by the op's code: C.WANE_ADD …
function F.binary(a, b, op)
  local y = handle()
  check(C.wane_binary(stream(), y, a.h, b.h, op))
  return wrap(y)
end

--- a op value, or value op a when `reversed`.
function F.binary_scalar(a, value, op, reversed)
  local y = handle()
  check(C.wane_binary_scalar(stream(), y, a.h, value, op, reversed and 1 or 0))
  return wrap(y)
end

--- a + b. Equal shapes, or b repeats along a; then b must need no gradient.
function F.add(a, b)
  local out = F.binary(a, b, C.WANE_ADD)
  return F.tape and F.tape:push(out, { a, b }, function(dy) return dy, dy end) or out
end

--- x * factor, a number.
function F.scale(x, factor)
  local out = F.binary_scalar(x, factor, C.WANE_MUL)
  return F.tape and F.tape:push(out, { x }, function(dy) return F.scale(dy, factor) end) or out
end

--- cap * tanh(x / cap): Gemma 2's soft cap of logits.
function F.softcap(x, cap) return F.scale(F.unary(F.scale(x, 1 / cap), C.WANE_TANH), cap) end

--- Sum over dimension `dim` (from 0), which stays with size 1.
function F.sum(x, dim)
  local y = handle()
  check(C.wane_reduce(stream(), y, x.h, C.WANE_SUM, dim, 1))
  return wrap(y)
end

--- Mean of all elements, a single value.
function F.mean(x)
  local y = handle()
  check(C.wane_reduce(stream(), y, x.h, C.WANE_MEAN, -1, 0))
  local out = wrap(y)
  if not F.tape then return out end
  return F.tape:push(out, { x }, function(dy)
    core.check(C.wane_tensor_info(x.h, info))
    local zeros = F.binary_scalar(x, 0, C.WANE_MUL)
    return F.add(zeros, F.binary_scalar(dy, 1 / tonumber(info.numel), C.WANE_MUL))
  end)
end

--- cond ? a : b, broadcast.
function F.where(cond, a, b)
  local y = handle()
  check(C.wane_where(stream(), y, cond.h, a.h, b.h))
  return wrap(y)
end

--- A contiguous copy as dtype number `dtype`.
function F.cast(x, dtype)
  local y = handle()
  check(C.wane_cast(stream(), y, x.h, dtype))
  return wrap(y)
end

--- dst[...] = src.
function F.copy(dst, src) check(C.wane_copy(stream(), dst.h, src.h)) end

--- Index (i64, from 0) of the largest element along `dim` (from 0), the lowest on ties.
function F.argmax(x, dim)
  local y = handle()
  check(C.wane_reduce(stream(), y, x.h, C.WANE_ARGMAX, dim, 0))
  return wrap(y)
end

--- -log softmax(logits)[label] of each row.
function F.nll(logits, labels, ignore_index)
  local y = handle()
  check(C.wane_nll(stream(), y, logits.h, labels.h, ignore_index or -100))
  local out = wrap(y)
  if not F.tape then return out end
  return F.tape:push(out, { logits }, function(dy)
    local d = handle()
    check(C.wane_nll_backward(stream(), d, logits.h, labels.h, dy.h, ignore_index or -100))
    return wrap(d)
  end)
end

--- [1, count]: start, start + 1 … as dtype number `dtype`.
function F.arange(start, count, dtype)
  local y = handle()
  check(C.wane_arange(stream(), y, start, start + count, 1, dtype))
  return F.view(wrap(y), 1, count)
end

--- Running sums along `dim` (from 0).
function F.cumsum(x, dim)
  local y = handle()
  check(C.wane_cumsum(stream(), y, x.h, dim))
  return wrap(y)
end

local sizes = ffi.new "int64_t[8]"
--- A view of x with the given sizes (one may be -1).
function F.view(x, a, b, c, d)
  local n = d and 4 or c and 3 or b and 2 or 1
  sizes[0], sizes[1], sizes[2], sizes[3] = a, b or 0, c or 0, d or 0
  local y = handle()
  check(C.wane_view_reshape(stream(), y, x.h, n, sizes))
  return wrap(y)
end

--- A view of `length` elements of dimension `dim` from `start` on; both count from 0 here.
function F.narrow(x, dim, start, length)
  local y = handle()
  check(C.wane_view_narrow(stream(), y, x.h, dim, start, length, 1))
  return wrap(y)
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
