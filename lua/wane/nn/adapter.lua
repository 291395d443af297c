--- What low-rank adapters (LoRA, Hu et al. 2021) add to a Linear or an Embedding. A layer holds its active ones in `adapters`, a list
-- of parts; a layer without any pays nothing. Which adapters there are is the business of wane.lora.
--
-- A part: { name, r, scale, dropout, A, B, bias, magnitude }, tensors f32. Linear: A [r, in], B [out, r], bias [out] or nil (PEFT's lora_bias),
-- magnitude [out] or nil (DoRA, Liu et al. 2024). Embedding: A [r, count], B [width, r], magnitude [width] or nil.
--
-- Plain: y = W x + bias + sum s·(B (A x) + bias_B). DoRA replaces W by f ∘ (W + s·B A), f = magnitude / |W + s·B A| by output: it adds
-- (f - 1) ∘ W x + f ∘ s·B (A x). Several active ones add up, each against the base weight alone. In training, dropout thins out the x
-- that A sees, and the norm in f counts as a constant.
-- Source: peft tuners/lora/layer.py, dora.py.
-- @module wane.nn.adapter
local autograd = require "wane.autograd"
local core = require "wane.core"
local F = require "wane.nn.functional"
local Tensor = require "wane.tensor"
local C = core.C

local M = {}

local EXACT = C.WANE_COMPUTE_F32
local ONE_OP_RANK = 256                   -- the largest of F.linear_lora: core/linear/lora.h

-- f32 values of a weight of any dtype.
local function values(weight) return weight:dtype() == "f32" and weight or weight:dequantize "f32" end

local function is_embedding(layer) return layer.in_features == nil end

--- The change of the weight that a part without DoRA stands for: f32, shaped as the layer's weight.
-- @param layer wane.Linear|wane.Embedding
-- @param part table
-- @return wane.Tensor s·B A, or its transpose for an Embedding
function M.delta(layer, part)
  if is_embedding(layer) then return F.scale(F.matmul(F.transpose(part.A), F.transpose(part.B)), part.scale) end
  return F.scale(F.matmul(part.B, part.A), part.scale)
end

-- f - 1 of a DoRA part, [out] or [width].
local function excess(layer, part, weight)
  return core.scope(function()
    local norm = (values(weight) + M.delta(layer, part)):norm(2, is_embedding(layer) and 1 or 2)
    return part.magnitude / norm - 1
  end)
end

-- Numbers of the ops that wrote a part's tensors last: other ones after a training step.
local function written(part)
  local text = ""
  for _, name in ipairs { "A", "B", "magnitude" } do
    if part[name] then text = text .. tostring(part[name]:info().ticket) end
  end
  return text
end

-- The same for the layer's own weight, kept until the part or the weight changes: the norm costs a pass over the whole weight.
local function kept_excess(layer, part)
  local weight, state = layer.weight, written(part)
  if part.excess_of ~= weight or part.excess_scale ~= part.scale or part.excess_state ~= state then
    M.forget(part)
    part.excess = F.outside_scopes(excess, layer, part, weight)
    part.excess_of, part.excess_scale, part.excess_state = weight, part.scale, state
  end
  return part.excess
end

--- Drops what was computed from a part's tensors; call it when they change.
-- @param part table
function M.forget(part)
  for _, key in ipairs { "excess", "rows" } do
    if part[key] then part[key]:close() end
    part[key] = nil
  end
  part.excess_of, part.rows_state = nil, nil
end

--- The whole change of a weight by a part, DoRA included: f32, shaped as the weight.
-- @param layer wane.Linear|wane.Embedding
-- @param part table
-- @param weight wane.Tensor the base's, any dtype
-- @return wane.Tensor
function M.change(layer, part, weight)
  return core.scope(function()
    local delta = M.delta(layer, part)
    if not part.magnitude then return delta end
    local e = excess(layer, part, weight)
    if not is_embedding(layer) then e = e:unsqueeze(2) end
    return values(weight) * e + delta * (e + 1)
  end)
end

-- f - 1 with a gradient for the magnitude; the norm is a constant (Liu et al. 2024, section 4.3).
local function trained_excess(layer, part)
  local norm = autograd.no_grad(core.scope, function()
    return (values(layer.weight) + M.delta(layer, part)):norm(2, is_embedding(layer) and 1 or 2)
  end)
  return F.binary_scalar(F.binary(part.magnitude, norm, C.WANE_DIV), -1, C.WANE_ADD)
end

-- y + what a part adds, given the base's result without bias and s·B (A x).
local function joined(layer, part, y, base, u)
  if not part.magnitude then return F.add(y, u) end
  local e = autograd.recording and trained_excess(layer, part) or kept_excess(layer, part)
  return F.add(F.add(y, F.binary(F.add(base, u), e, C.WANE_MUL)), u)
end

local function has_dora(parts)
  for _, part in ipairs(parts) do if part.magnitude then return true end end
  return false
end

-- Parts that one op can add: neither DoRA nor biases nor a rank that its kernels have no room for, beside a weight that is not trained itself.
local function are_plain(layer, parts)
  for _, part in ipairs(parts) do if part.magnitude or part.bias or part.r > ONE_OP_RANK then return false end end
  return not (autograd.needs(layer.weight) or autograd.needs(rawget(layer, "bias")))
end

-- Has t the dtype and shape of x with `width` values at the end?
local function is_like(t, x, width)
  local shape, other = t:shape(), x:shape()
  if t:dtype() ~= x:dtype() or #shape ~= #other or shape[#shape] ~= width then return false end
  for d = 1, #shape - 1 do if shape[d] ~= other[d] then return false end end
  return true
end

--- y of a Linear with active adapters.
-- @param layer wane.Linear
-- @param parts table[]
-- @param x wane.Tensor [.., in]
-- @param compute integer of the base's product; the adapters' own are exact
-- @param onto wane.Tensor|nil [.., out] to be added
-- @return wane.Tensor [.., out]
function M.linear(layer, parts, x, compute, onto)
  local bias = rawget(layer, "bias")
  if autograd.dropping and are_plain(layer, parts) then
    local fits = onto and #parts == 1 and is_like(onto, x, layer.out_features)         -- of several parts each would be rounded at onto's scale
    local y = F.linear_lora(x, layer.weight, bias, parts, compute, layer.threshold, fits and onto or nil)
    return onto and not fits and F.add(onto, y) or y
  end
  local late = bias and has_dora(parts)                    -- DoRA scales the product alone
  local base = F.linear(x, layer.weight, not late and bias or nil, compute, layer.threshold)
  local y = base
  for _, part in ipairs(parts) do
    local u = F.linear(F.dropout(x, part.dropout or 0), part.A, nil, EXACT)
    if part.bias then
      u = F.scale(F.linear(u, part.B, part.bias, EXACT), part.scale)
    else
      u = F.linear(F.scale(u, part.scale), part.B, nil, EXACT)
    end
    y = joined(layer, part, y, base, u)
  end
  y = late and F.add(y, bias) or y
  return onto and F.add(onto, y) or y
end

-- The parts of every adapter that is active on one of the experts: a list of { [expert] = part }, in the order of the adapters.
local function by_adapter(linears)
  local list, of = {}, {}
  for e, linear in ipairs(linears) do
    for _, part in ipairs(rawget(linear, "adapters") or {}) do
      if not of[part.name] then
        of[part.name] = { any = part }
        list[#list + 1] = of[part.name]
      end
      of[part.name][e] = part
    end
  end
  return list
end

--- y of a mixture's experts with active adapters. Those of one adapter have one rank and scale (wane.lora sees to it); experts without a
-- part get zeros.
-- @param linears wane.Linear[] the same matrix of every expert
-- @param x wane.Tensor [P, in] rows sorted by expert
-- @param bounds wane.Tensor see F.linear_experts
-- @param y wane.Tensor [P, out] the base's result
-- @return wane.Tensor [P, out]
function M.experts(linears, x, bounds, y)
  for _, parts in ipairs(by_adapter(linears)) do
    local any, A, B = parts.any, {}, {}
    local zero_A, zero_B
    for e, linear in ipairs(linears) do
      if not parts[e] and not zero_A then
        zero_A, zero_B = Tensor.constructors.zeros(any.r, linear.in_features), Tensor.constructors.zeros(linear.out_features, any.r)
      end
      A[e], B[e] = parts[e] and parts[e].A or zero_A, parts[e] and parts[e].B or zero_B
    end
    local u = F.scale(F.linear_experts(x, bounds, A, EXACT), any.scale)
    y = F.add(y, F.linear_experts(u, bounds, B, EXACT))
  end
  return y
end

-- A's columns as rows, for looking ids up.
local function rows_of(part)
  if autograd.recording then return F.transpose(part.A) end
  local state = written(part)
  if part.rows_state ~= state then
    M.forget(part)
    part.rows, part.rows_state = F.outside_scopes(function() return part.A:t():clone() end), state
  end
  return part.rows
end

--- Rows of an Embedding with active adapters.
-- @param layer wane.Embedding
-- @param parts table[]
-- @param ids wane.Tensor
-- @param base wane.Tensor the table's own rows [.., width]
-- @param dtype integer of the result
-- @return wane.Tensor [.., width]
function M.embedding(layer, parts, ids, base, dtype)
  local y = base
  for _, part in ipairs(parts) do
    local u = F.linear(F.scale(F.rows(rows_of(part), ids), part.scale), part.B, nil, EXACT)
    if dtype ~= C.WANE_F32 then u = F.cast(u, dtype) end
    y = joined(layer, part, y, base, u)
  end
  return y
end

return M
