--- Rotary position embedding: the inverse frequencies of a config, with every kind of rope scaling.
-- Source: transformers modeling_rope_utils.py. Both spellings of configs are read: rope_theta + rope_scaling, and rope_parameters.
-- @module wane.nn.rotary
local ffi = require "ffi"
local core = require "wane.core"
local F = require "wane.nn.functional"

local M = {}
local pi = math.pi

-- Each kind: (inv, n, p) where inv[0..n-1] holds theta^(-2j/dim); changes inv in place, returns the factor of cos and sin.
local kinds = {}

function kinds.default() return 1 end

function kinds.linear(inv, n, p)
  for j = 0, n - 1 do inv[j] = inv[j] / p.factor end
  return 1
end

-- Llama 3.1: long waves are stretched, short ones kept, those between blended.
function kinds.llama3(inv, n, p)
  local original = p.original_max_position_embeddings
  local low, high = original / p.low_freq_factor, original / p.high_freq_factor
  for j = 0, n - 1 do
    local wave = 2 * pi / inv[j]
    if wave > low then
      inv[j] = inv[j] / p.factor
    elseif wave >= high then
      local s = (original / wave - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)
      inv[j] = inv[j] * ((1 - s) / p.factor + s)
    end
  end
  return 1
end

-- Peng et al. 2023, "YaRN".
function kinds.yarn(inv, n, p, dim)
  local original = p.original_max_position_embeddings or p.max_position_embeddings
  local function correction(turns) return dim * math.log(original / (turns * 2 * pi)) / (2 * math.log(p.theta)) end
  local low, high = correction(p.beta_fast or 32), correction(p.beta_slow or 1)
  if p.truncate ~= false then low, high = math.floor(low), math.ceil(high) end
  low, high = math.max(low, 0), math.min(high, dim - 1)
  if low == high then high = high + 0.001 end
  for j = 0, n - 1 do
    local ramp = math.min(math.max((j - low) / (high - low), 0), 1)
    inv[j] = inv[j] / p.factor * ramp + inv[j] * (1 - ramp)
  end
  if p.attention_factor then return p.attention_factor end
  local function mscale(scale, m) return scale <= 1 and 1 or 0.1 * m * math.log(scale) + 1 end
  if p.mscale and p.mscale_all_dim then return mscale(p.factor, p.mscale) / mscale(p.factor, p.mscale_all_dim) end
  return mscale(p.factor, 1)
end

function kinds.longrope(inv, n, p, _, length)
  local original = p.original_max_position_embeddings or p.max_position_embeddings
  local factor = p.factor or p.max_position_embeddings / original
  local ext = length > original and p.long_factor or p.short_factor
  for j = 0, n - 1 do inv[j] = inv[j] / ext[j + 1] end
  if p.attention_factor then return p.attention_factor end
  return factor <= 1 and 1 or math.sqrt(1 + math.log(factor) / math.log(original))
end

-- NTK-aware base, recomputed when the sequence outgrows the trained length.
function kinds.dynamic(inv, n, p, dim, length)
  local max = p.max_position_embeddings
  local l = math.max(length, max)
  local theta = p.theta * ((p.factor * l / max) - (p.factor - 1)) ^ (dim / (dim - 2))
  for j = 0, n - 1 do inv[j] = theta ^ (-2 * j / dim) end
  return 1
end

-- Where a config says how layers of this type rotate: nested by layer type (transformers 5), or Gemma 3's older spelling, whose
-- sliding layers have a base of their own and no scaling; else one place for all layers.
local function sources(c, layer_type)
  local nested = layer_type and c.rope_parameters and c.rope_parameters[layer_type]
  if nested then return { nested } end
  if layer_type == "sliding_attention" and c.rope_local_base_freq then return { { rope_theta = c.rope_local_base_freq } } end
  return { c.rope_scaling or {}, c.rope_parameters or {} }
end

--- Rope parameters of a config, whichever spelling it has.
-- @param c table
-- @param layer_type string|nil where they differ by layer: "full_attention", "sliding_attention"
-- @return table { rope_type, theta, partial, factor, … }
function M.parameters(c, layer_type)
  local p = {}
  for _, source in ipairs(sources(c, layer_type)) do
    if type(source) == "table" then for k, v in pairs(source) do p[k] = v end end
  end
  p.rope_type = p.rope_type or p.type or "default"
  if p.long_factor then p.rope_type = "longrope" end              -- the first long Phi-3 called it "su" or "yarn"
  p.original_max_position_embeddings = c.original_max_position_embeddings or p.original_max_position_embeddings
  p.theta = p.rope_theta or c.rope_theta or c.rotary_emb_base or 10000
  p.partial = p.partial_rotary_factor or c.partial_rotary_factor or c.rotary_pct or 1
  p.max_position_embeddings = c.max_position_embeddings or 2048
  return p
end

--- Inverse frequencies as a Lua list (index 0 first) and the factor of cos and sin.
-- @param p table from parameters()
-- @param dim integer rotated dimensions
-- @param length integer longest sequence in sight (dynamic, longrope)
function M.frequencies(p, dim, length)
  local kind = kinds[p.rope_type]
  if not kind then core.raise("rope_type '%s' is not known: default, linear, dynamic, llama3, yarn, longrope", tostring(p.rope_type)) end
  local n = math.floor(dim / 2)
  local inv = {}
  for j = 0, n - 1 do inv[j] = p.theta ^ (-2 * j / dim) end
  local scale = kind(inv, n, p, dim, length)
  return inv, scale, n
end

---@class wane.Rotary
local Rotary = {}
Rotary.__index = Rotary

--- The rotary embedding of a config.
-- @param c table config with head_dim
-- @param options table|nil { interleaved = boolean, dim = rotated dimensions (default head_dim * partial factor), layer_type = see parameters }
function M.new(c, options)
  options = options or {}
  local p = M.parameters(c, options.layer_type)
  local dim = options.dim or math.floor(c.head_dim * p.partial)
  if dim % 2 ~= 0 then core.raise("rotary embedding turns pairs, and %d of the %d dimensions of a head are no whole number of them", dim, c.head_dim) end
  return setmetatable({ p = p, dim = dim, interleaved = options.interleaved or false }, Rotary)
end

-- inv_freq for sequences up to `length`; only two kinds depend on it.
local function table_for(self, length)
  local kind = self.p.rope_type
  local key = 0
  if kind == "dynamic" then key = math.max(length, self.p.max_position_embeddings)
  elseif kind == "longrope" then key = length > (self.p.original_max_position_embeddings or self.p.max_position_embeddings) and 1 or 0 end
  if self.key ~= key then
    local inv, scale, n = M.frequencies(self.p, self.dim, length)
    local data = ffi.new("float[?]", n)
    local function upload(sign)
      for j = 0, n - 1 do data[j] = sign * inv[j] end
      return F.outside_scopes(F.upload, data, core.C.WANE_F32, n * 4, n)
    end
    self.inv_freq, self.negative = upload(1), upload(-1)
    self.scale, self.key = scale, key
  end
  return self.inv_freq, self.scale, self.negative
end

--- Does a sequence that reaches this length turn by other frequencies than before, so that the keys in a cache are worth nothing? Upstream
-- computes the cache anew there for longrope (modeling_phi3.py prepare_inputs_for_generation), and does not for dynamic.
-- @param length integer
function Rotary:turns_over(length)
  return self.p.rope_type == "longrope" and length == (self.p.original_max_position_embeddings or self.p.max_position_embeddings) + 1
end

--- Rotates x [B, T, H, D] at the pass's positions.
function Rotary:rotate(x, pass)
  local inv_freq, scale, negative = table_for(self, pass.reach)
  return F.rope(x, inv_freq, pass.positions, pass.start, scale, self.interleaved, negative)
end

return M
