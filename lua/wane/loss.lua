--- The loss of a language model: cross entropy over the head's scores, which never exist all at once.
--
-- A vocabulary of 50,000 times a thousand rows is 200 MB of float32, and its gradient as much again. So the head runs over some rows at a
-- time: their scores, their loss and (while recording) their gradient, which is all that is kept: as large as what entered the head. Where the kernels
-- can, not even the scores of some rows are written down (wane_linear_nll).
-- Scores and losses are float32 whatever the activations are. Source of the idea: Hsu et al. 2024 (Liger kernel), section 3.2.
-- @module wane.loss
local autograd = require "wane.autograd"
local core = require "wane.core"
local F = require "wane.nn.functional"
local C = core.C

local M = {}

--- A label that is not scored (torch.nn.CrossEntropyLoss).
M.IGNORED = -100

-- Bytes of scores at a time; rows at a time where scores are not written down, each of which takes some eight rows of f32 as wide as what enters the head.
local SCORES, ROWS = 2 ^ 26, 1024

-- Rows at a time: equal parts, of multiples of 32 rows, of at most `most`.
local function even_parts(rows, most) return math.max(32, math.ceil(rows / math.ceil(rows / most) / 32) * 32) end

local function rows_at_a_time(rows, vocabulary) return even_parts(rows, math.max(32, math.floor(SCORES / (4 * vocabulary)))) end

-- Does the head itself have leaves (a trained or tied weight, adapters)?
local function head_trains(head)
  for _, module in head:modules() do
    for _, p in ipairs(module:own_parameters()) do if p.value and p.value.requires_grad then return true end end
    for _, part in ipairs(rawget(module, "adapters") or {}) do if part.A.requires_grad then return true end end
  end
  return false
end

-- Scores of some rows x [rows, C]: f32 [rows, V].
local function scores(model, x)
  if x:dtype() ~= "f32" then x = F.cast(x, C.WANE_F32) end
  return F.view(model:head(F.view(x, 1, x:shape()[1], -1)), x:shape()[1], -1)
end

-- Sum of the losses of some rows, times `scale`: f32 [1].
local function piece(model, x, labels, scale)
  return F.scale(F.sum(F.nll(scores(model, x), labels, M.IGNORED), 0), scale)
end

-- The head's weight and compute mode where it is a product and nothing else and the kernels can do without scores in memory; else nil.
local function bare_product(model)
  local head = model:find(model.family.head)
  local weight, compute = rawget(head, "weight"), head.compute
  if rawget(model, "head") or rawget(head, "bias") or rawget(head, "adapters") or not (weight and head.in_features) then return nil end
  if (head.threshold or -1) >= 0 then return nil end                        -- LLM.int8() is another forward
  if not compute then compute = weight:dtype() == "f32" and C.WANE_COMPUTE_F32 or C.WANE_COMPUTE_BF16 end
  if F.linear_nll_fits(weight, compute) then return weight, compute end
end

-- Loss and gradient of some rows, at once. The gradient of the scores is rounded to bf16 where the activations are; f16 would lose the small ones.
local function piece_with_gradient(model, x, labels, scale, weight, compute)
  if weight then
    local nll, dx = F.linear_nll(x, weight, labels, scale, M.IGNORED, compute)
    return F.scale(F.sum(nll, 0), scale), dx
  end
  local leaf = x:detach()
  leaf.requires_grad = true
  local logits = autograd.record(scores, model, leaf)
  local nll, gradient = F.nll_with_gradient(logits, labels, scale, M.IGNORED, x:dtype() == "bf16" and C.WANE_BF16 or C.WANE_F32)
  logits:backward(gradient)
  return F.scale(F.sum(nll, 0), scale), F.cast(leaf.grad, x:info().dtype), leaf.grad:close()
end

-- fn(x's rows, their labels) -> loss, … of every piece in turn.
local function each_piece(x, labels, rows, fn)
  local n = x:shape()[1]
  for from = 0, n - 1, rows do
    local count = math.min(rows, n - from)
    fn(from, F.narrow(x, 0, from, count), F.narrow(labels, 0, from, count))
  end
end

local function total(losses)
  local sum = losses[1]
  for i = 2, #losses do sum = F.add(sum, losses[i]) end
  return sum
end

-- The head is frozen: the gradient of x is made along with the loss, for a loss whose own gradient is 1, and scaled by what it turns out to be.
local function with_frozen_head(model, x, labels, scale, rows)
  local weight, compute = bare_product(model)
  if weight then rows = even_parts(x:shape()[1], ROWS) end
  local loss, dx = autograd.no_grad(core.scope, function()
    local losses, dx = {}, F.zeros(x:info().dtype, unpack(x:shape()))
    each_piece(x, labels, rows, function(from, some, their)
      losses[#losses + 1] = core.scope(function()
        local value, gradient = autograd.allow(piece_with_gradient, model, some, their, scale, weight, compute)
        F.copy(F.narrow(dx, 0, from, some:shape()[1]), gradient)
        return value
      end)
    end)
    return total(losses), dx
  end)
  return autograd.push("cross_entropy", loss, { x, n = 1 }, function(dy) return F.binary(dx, F.cast(dy, dx:info().dtype), C.WANE_MUL) end, { dx })
end

--- Sum of -log p over the labels that are not ignored, times `scale`.
-- @param model wane.Model
-- @param x wane.Tensor [rows, C]: what enters the head
-- @param labels wane.Tensor i32 [rows]
-- @param scale number
-- @return wane.Tensor f32 [1]
function M.cross_entropy(model, x, labels, scale)
  local head = model:find(model.family.head)
  local rows = rows_at_a_time(x:shape()[1], head.out_features)
  if autograd.recording and autograd.needs(x) and not head_trains(head) then return with_frozen_head(model, x, labels, scale, rows) end
  local losses = {}
  each_piece(x, labels, rows, function(_, some, their)
    if autograd.recording then losses[#losses + 1] = autograd.checkpoint(piece, model, some, their, scale)
    else losses[#losses + 1] = core.scope(piece, model, some, their, scale) end
  end)
  return total(losses)
end

return M
