--- y = x · Wᵀ + b. A quantized Linear is still a Linear: its weight is a tensor of a quantized dtype.
-- @module wane.nn.linear
local core = require "wane.core"
local adapter = require "wane.nn.adapter"
local F = require "wane.nn.functional"
local module = require "wane.nn.module"
local C = core.C

---@class wane.Linear : wane.Module
---@field weight wane.Tensor [out_features, in_features], any dtype
---@field bias wane.Tensor|nil [out_features]
---@field compute integer|nil WANE_COMPUTE_…; nil: exact f32 for an f32 weight, bf16 otherwise
---@field origin string|nil dtype of the weight before it was quantized
---@field threshold number|nil outlier threshold of LLM.int8() (int8 weights)
---@field adapters table[]|nil the active ones' parts (wane.nn.adapter)
local Linear = module.class "Linear"

--- A layer without values yet: loading gives them, or reset() does.
-- @param in_features integer
-- @param out_features integer
-- @param bias boolean|nil default true
function Linear.new(in_features, out_features, bias)
  local params = { { name = "weight", shape = { out_features, in_features } } }
  if bias ~= false then params[2] = { name = "bias", shape = { out_features } } end
  return module.instance(Linear, { in_features = in_features, out_features = out_features, params = params })
end

--- Random values as torch.nn.Linear's: uniform in ±1/sqrt(in_features).
-- @param seed integer|nil
function Linear:reset(seed)
  local bound = 1 / math.sqrt(self.in_features)
  for i, p in ipairs(self.params) do
    self[p.name] = F.outside_scopes(function()
      local h = core.handle_type()
      local shape, n = core.shape(p.shape)
      core.check(C.wane_random(core.stream(), h, C.WANE_UNIFORM, -bound, bound, (seed or 0) * 2 + i, 0, C.WANE_F32, n, shape))
      return require("wane.tensor").wrap(h)
    end)
  end
  return self
end

-- y, or onto + y.
local function multiply(self, x, onto)
  local weight = rawget(self, "weight") or self:reset().weight
  local compute = self.compute
  if not compute then compute = weight:dtype() == "f32" and C.WANE_COMPUTE_F32 or C.WANE_COMPUTE_BF16 end
  local adapters = rawget(self, "adapters")
  if adapters then return adapter.linear(self, adapters, x, compute, onto) end
  local y = F.linear(x, weight, rawget(self, "bias"), compute, self.threshold)
  return onto and F.add(onto, y) or y
end

function Linear:forward(x) return multiply(self, x) end

--- onto + self(x); with a plain adapter in training, as one op.
-- @param onto wane.Tensor [.., out_features]
-- @param x wane.Tensor [.., in_features]
function Linear:added_to(onto, x)
  if rawget(self, "hook") then return F.add(onto, self(x)) end
  return multiply(self, x, onto)
end

--- Quantizes the weight in place. scheme: see wane.quant.quantize; threshold and compute are kept with the layer.
-- @param scheme table|string
-- @return wane.Linear self
function Linear:quantize(scheme)
  if type(scheme) == "string" then scheme = { type = scheme } end
  local old = rawget(self, "weight") or self:reset().weight
  self.weight, self.origin = F.outside_scopes(require("wane.quant").quantize, old, scheme), old:dtype()
  if scheme.type == "int8" then self.threshold = scheme.threshold or 6.0 else self.threshold = nil end
  if scheme.compute then self.compute = module.compute_code(scheme.compute) end
  return self
end

function Linear:describe()
  local weight = rawget(self, "weight")
  return ("Linear(%d -> %d%s%s)"):format(self.in_features, self.out_features, self.params[2] and "" or ", no bias",
    weight and weight:dtype() ~= "f32" and ", " .. weight:dtype() or "")
end

--- WANE_COMPUTE_… of a name: "f32", "bf16", "f16", "fast".
function module.compute_code(name)
  local codes = { f32 = C.WANE_COMPUTE_F32, bf16 = C.WANE_COMPUTE_BF16, f16 = C.WANE_COMPUTE_F16, fast = C.WANE_COMPUTE_FAST,
    float32 = C.WANE_COMPUTE_F32, bfloat16 = C.WANE_COMPUTE_BF16, float16 = C.WANE_COMPUTE_F16 }
  local code = codes[name]
  if not code then core.raise("compute: expected f32, bf16, f16 or fast, found '%s'", tostring(name)) end
  return code
end

return Linear
