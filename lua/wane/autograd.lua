--- The tape: what a forward recorded, run backward.
--
--     local tape = autograd.record(function()
--       loss = F.mean(F.nll(head(norm(x)), labels))
--     end)
--     tape:backward(loss)            -- gradients are in weight.grad of every tensor with requires_grad
--
-- An entry is { output, inputs, backward }: backward(dy) enqueues C backward ops and returns one gradient an input (nil for none).
-- Only what leads to a tensor with requires_grad is recorded, so frozen quantized weights cost nothing but the product itself.
-- @module wane.autograd
local core = require "wane.core"
local F = require "wane.nn.functional"
local Tensor = require "wane.tensor"
local C = core.C

local M = {}

---@class wane.Tape
local Tape = {}
Tape.__index = Tape

--- Runs fn with recording on.
-- @param fn function
-- @return wane.Tape, then what fn returns
function M.record(fn, ...)
  if F.tape then core.raise "autograd.record: a tape is already recording" end
  local tape = setmetatable({ entries = {}, tracked = {} }, Tape)
  F.tape = tape
  local function finish(ok, ...)
    F.tape = nil
    if not ok then error((...), 0) end
    return tape, ...
  end
  return finish(pcall(fn, ...))
end

--- Does a gradient have to flow to t?
function Tape:needs(t) return t ~= nil and (t.requires_grad or self.tracked[t]) or false end

--- Notes how `output` came from `inputs`; called by the ops of wane.nn.functional.
-- @return wane.Tensor output
function Tape:push(output, inputs, backward)
  for i = 1, inputs.n or #inputs do
    if self:needs(inputs[i]) then
      self.tracked[output] = true
      self.entries[#self.entries + 1] = { output = output, inputs = inputs, backward = backward }
      break
    end
  end
  return output
end

local function accumulate(into, key, g)
  local old = into[key]
  into[key] = old and F.add(old, g) or g
end

--- Runs the tape backward from `loss` (a single value). Gradients add up in `.grad` of the leaves; entries are let go as they are used.
-- @param loss wane.Tensor
function Tape:backward(loss)
  if not self.tracked[loss] then core.raise "backward: nothing with requires_grad led to this tensor while the tape recorded" end
  local grads = { [loss] = F.binary_scalar(F.binary_scalar(loss, 0, C.WANE_MUL), 1, C.WANE_ADD) }
  for i = #self.entries, 1, -1 do
    local e = self.entries[i]
    self.entries[i] = nil
    local dy = grads[e.output]
    grads[e.output] = nil
    if dy then
      local gs = { e.backward(dy) }
      for k = 1, e.inputs.n or #e.inputs do
        local t, g = e.inputs[k], gs[k]
        if g and self:needs(t) then
          if t.requires_grad then accumulate(t, "grad", g) else accumulate(grads, t, g) end
        end
      end
    end
  end
end

--- Marks a tensor as one whose gradient is wanted.
-- @param t wane.Tensor
-- @return wane.Tensor t
function M.leaf(t)
  if not Tensor.is(t) then core.raise("autograd.leaf: expected a Tensor, found a %s", type(t)) end
  t.requires_grad = true
  return t
end

return M
