--- A sparse mixture of experts: a router gives every row of x to a few of many feed-forward layers and adds up what they make of it.
-- Shazeer et al. 2017; Fedus et al. 2021. Source of the router's arithmetic: transformers modeling_mixtral.py, modeling_qwen3_moe.py.
--
-- Rows are sorted by expert on the device and each expert multiplies its own: the work is that of the chosen experts, for one row and for
-- many, and nothing waits for the router's choice. The experts' Linears hold weights and adapters only: their own forward (and a hook on
-- it) is not called.
-- @module wane.nn.mixture
local core = require "wane.core"
local adapter = require "wane.nn.adapter"
local F = require "wane.nn.functional"
local layers = require "wane.nn.layers"
local Linear = require("wane.nn.linear").new
local module = require "wane.nn.module"
local C = core.C

local M = {}

-- Row p times the weight of its expert's Linear `name`.
local function multiply(experts, name, x, bounds)
  local weights, linears = {}, {}
  for e = 1, #experts do
    linears[e] = experts[e][name]
    weights[e] = linears[e].weight
  end
  local first = experts[1][name]
  local compute = first.compute or (weights[1]:dtype() == "f32" and C.WANE_COMPUTE_F32 or C.WANE_COMPUTE_BF16)
  return adapter.experts(linears, x, bounds, F.linear_experts(x, bounds, weights, compute, first.threshold))
end

--- Makes the layer: a router `gate` and a list `experts`.
-- @param width integer of x
-- @param o table { experts = how many, chosen = of them a row, inner = their inner width, act = activation's name,
--   normalise = the chosen ones' weights sum to 1, names = { gate, up, down } of an expert's matrices }
-- @return wane.Module x [.., width] -> the same shape
function M.new(width, o)
  local gate, up, down = unpack(o.names)
  local gated = layers.gate(o.act)
  local function matrix(inputs, outputs)
    local linear = Linear(inputs, outputs, false)
    linear.is_expert = true                                -- wane.lora: its adapters run together with the others'
    return linear
  end
  local function expert()
    return module.module { [gate] = matrix(width, o.inner), [up] = matrix(width, o.inner), [down] = matrix(o.inner, width) }
  end
  return module.module {
    gate = Linear(width, o.experts, false),
    experts = module.list(o.experts, expert),
    forward = function(self, x)
      local shape, rows, experts = x:shape(), F.view(x, -1, width), self.experts
      local weights, chosen = F.topk(F.softmax(self.gate(rows), 1), o.chosen)          -- [M, k]
      if o.normalise then weights = F.binary(weights, F.sum(weights, 1), C.WANE_DIV) end
      local source, place, bounds = F.route(chosen, o.experts)
      local y = F.rows(rows, source)                                                                       -- [M*k, width], by expert
      y = multiply(experts, down, gated(multiply(experts, gate, y, bounds), multiply(experts, up, y, bounds)), bounds)
      y = F.matmul(F.view(weights, -1, 1, o.chosen), F.rows(y, place))             -- [M, 1, k] · [M, k, width]
      return F.view(y, unpack(shape))
    end,
  }
end

return M
