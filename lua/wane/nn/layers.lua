--- The small layers: embedding, norms, activations.
-- @module wane.nn.layers
local core = require "wane.core"
local adapter = require "wane.nn.adapter"
local F = require "wane.nn.functional"
local module = require "wane.nn.module"

local M = {}

---@class wane.Embedding : wane.Module
---@field weight wane.Tensor [count, width], any dtype: quantized tables are decoded row by row
---@field adapters table[]|nil the active ones' parts (wane.nn.adapter)
local Embedding = module.class "Embedding"
M.Embedding = Embedding

--- @param count integer rows
-- @param width integer
-- @param scale number|nil multiplies the result (Gemma: the square root of the width)
function Embedding.new(count, width, scale)
  return module.instance(Embedding, { count = count, width = width, scale = scale, params = { { name = "weight", shape = { count, width } } } })
end

-- Bits of a significand behind its first one.
local fraction_bits = { bf16 = 7, f16 = 10 }

-- Upstream casts the scale to the weight's dtype: where products are computed in 16 bits, so is this one.
local function scale_of(self)
  local bits = fraction_bits[self.weight:dtype()]
  if not bits or (self.compute or core.C.WANE_COMPUTE_F32) == core.C.WANE_COMPUTE_F32 then return self.scale end
  local _, exponent = math.frexp(self.scale)
  local step = 2 ^ (exponent - 1 - bits)
  return math.floor(self.scale / step + 0.5) * step
end

function Embedding:forward(ids, pass)
  local dtype, adapters = pass and pass.dtype or core.C.WANE_F32, rawget(self, "adapters")
  local x = F.embedding(self.weight, ids, dtype)
  if adapters then x = adapter.embedding(self, adapters, ids, x, dtype) end
  return self.scale and F.scale(x, scale_of(self)) or x
end
function Embedding:describe()
  local w = rawget(self, "weight")
  return ("Embedding(%d, %d%s)"):format(self.count, self.width, w and w:dtype() ~= "f32" and ", " .. w:dtype() or "")
end

---@class wane.PositionEmbedding : wane.Module
---@field weight wane.Tensor [count + offset, width]
local PositionEmbedding = module.class "PositionEmbedding"
M.PositionEmbedding = PositionEmbedding

--- A table of learned positions. Left-padded rows count from their first real token; what stands at a pad is never seen.
-- @param count integer longest sequence
-- @param width integer
-- @param offset integer|nil rows in front of position 0 (OPT: 2)
function PositionEmbedding.new(count, width, offset)
  offset = offset or 0
  return module.instance(PositionEmbedding, { count = count, width = width, offset = offset,
    params = { { name = "weight", shape = { count + offset, width } } } })
end
--- Rows for the positions of a pass: [B, T, width], or [1, T, width] where all rows agree.
function PositionEmbedding:forward(pass)
  if not pass.positions and pass.start + pass.time > self.count then
    core.raise("the sequence reaches %d tokens; the model has learned positions for %d (max_position_embeddings)", pass.start + pass.time, self.count)
  end
  return F.embedding(self.weight, pass:position_ids(self.offset), pass.dtype)
end
function PositionEmbedding:describe() return ("PositionEmbedding(%d, %d)"):format(self.count, self.width) end

---@class wane.RMSNorm : wane.Module
local RMSNorm = module.class "RMSNorm"
M.RMSNorm = RMSNorm
--- @param width integer
-- @param eps number
-- @param offset number|nil added to the stored weight (Gemma: 1)
function RMSNorm.new(width, eps, offset)
  return module.instance(RMSNorm, { width = width, eps = eps, offset = offset or 0, params = { { name = "weight", shape = { width } } } })
end
function RMSNorm:forward(x) return F.rms_norm(x, self.weight, self.eps, self.offset) end
function RMSNorm:describe() return ("RMSNorm(%d, eps %g)"):format(self.width, self.eps) end

---@class wane.LayerNorm : wane.Module
local LayerNorm = module.class "LayerNorm"
M.LayerNorm = LayerNorm
--- @param width integer
-- @param eps number
-- @param affine boolean|nil false: neither weight nor bias
function LayerNorm.new(width, eps, affine)
  return module.instance(LayerNorm, { width = width, eps = eps,
    params = affine ~= false and { { name = "weight", shape = { width } }, { name = "bias", shape = { width } } } or {} })
end
function LayerNorm:forward(x) return F.layer_norm(x, self.weight, self.bias, self.eps) end
function LayerNorm:describe() return ("LayerNorm(%d, eps %g)"):format(self.width, self.eps) end

local function act_code(name)
  local code = F.acts[name]
  if not code then core.raise("no activation '%s': %s", tostring(name), "gelu, gelu_new, gelu_fast, quick_gelu, relu, silu, tanh, sigmoid") end
  return code
end

--- The function of an activation's name in a config.
-- @param name string
-- @return function(x) -> Tensor
function M.activation(name)
  local code = act_code(name)
  return function(x) return F.unary(x, code) end
end

--- act(gate) * up in one pass, for gated feed-forward layers.
-- @param name string
-- @return function(gate, up) -> Tensor
function M.gate(name)
  local code = act_code(name)
  return function(gate, up) return F.glu(gate, up, code) end
end

return M
