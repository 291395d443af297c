--- Whether a config's values can be a model's: a config.json comes from anywhere, and a layer count of a billion, a size that is a string
-- or heads that do not divide would else show up as a hang or deep inside a forward.
-- @module wane.models.check
local M = {}

local MOST = 2 ^ 31 - 1
local LAYERS, EXPERTS, BLOCKS = 4096, 65536, 2 ^ 18       -- the largest published: 126 layers, 512 experts, 61 x 384 of both

-- What each key must be: { kind, most }. Keys are those of configs with the families' aliases resolved. A key that is not there is not judged.
local sizes = { "size", MOST }
local rules = {
  hidden_size = sizes, vocab_size = sizes, intermediate_size = sizes, moe_intermediate_size = sizes, ffn_hidden_size = sizes, head_dim = sizes,
  max_position_embeddings = sizes, word_embed_proj_dim = sizes, d_kv = sizes, rotary_dim = sizes, num_attention_heads = sizes,
  num_key_value_heads = sizes, num_kv_heads = sizes, sliding_window = sizes, window_size = sizes, num_experts_per_tok = sizes,
  original_max_position_embeddings = sizes, relative_attention_num_buckets = sizes, relative_attention_max_distance = sizes,
  decoder_sparse_step = sizes, num_hidden_layers = { "size", LAYERS }, num_decoder_layers = { "size", LAYERS },
  num_experts = { "size", EXPERTS }, num_local_experts = { "size", EXPERTS },
  rms_norm_eps = { "number" }, layer_norm_eps = { "number" }, layer_norm_epsilon = { "number" }, rope_theta = { "number" }, rope_local_base_freq = { "number" },
  rotary_emb_base = { "number" }, rotary_pct = { "number" }, partial_rotary_factor = { "number" }, query_pre_attn_scalar = { "number" },
  attn_logit_softcapping = { "number" }, final_logit_softcapping = { "number" },
}
local rope = { factor = { "number" }, rope_theta = { "number" }, original_max_position_embeddings = sizes, low_freq_factor = { "number" },
               high_freq_factor = { "number" }, attention_factor = { "number" }, beta_fast = { "number" }, beta_slow = { "number" },
               partial_rotary_factor = { "number" } }

local function shown(v) return type(v) == "number" and ("%.17g"):format(v) or type(v) == "string" and ("'%s'"):format(v:sub(1, 40)) or "a " .. type(v) end

local function judge(where, t, table_)
  for key, rule in pairs(table_) do
    local v = t[key]
    if v ~= nil then
      local fits = type(v) == "number" and v == v and v > 0 and v < math.huge
      if fits and rule[1] == "size" then fits = v == math.floor(v) and v <= rule[2] end
      if not fits then
        return ("config: %s%s must be a %s, found %s"):format(where, key,
          rule[1] == "size" and ("whole number from 1 to %d"):format(rule[2]) or "number above 0", shown(v))
      end
    end
  end
end

--- What is wrong with a config's values, or nil.
-- @param c table config with the family's aliases resolved
-- @return string|nil message
function M.values(c)
  local message = judge("", c, rules)
  for _, key in ipairs { "rope_scaling", "rope_parameters" } do
    local t = c[key]
    if not message and type(t) == "table" then
      message = judge(key .. ".", t, rope)
      for name, inner in pairs(t) do
        if not message and type(inner) == "table" and type(name) == "string" then message = judge(key .. "." .. name .. ".", inner, rope) end
      end
    end
  end
  local experts = c.num_experts or c.num_local_experts
  if not message and experts and (c.num_hidden_layers or 1) * experts > BLOCKS then
    message = ("config: %d layers of %d experts are more than any model has"):format(c.num_hidden_layers or 1, experts)
  end
  return message
end

--- What is wrong with a config whose defaults are filled in, or nil: what must go into what.
-- @param c table
-- @return string|nil message
function M.relations(c)
  local heads, kv = c.num_attention_heads, c.num_key_value_heads or c.num_kv_heads
  if type(c.head_dim) == "number" and c.head_dim ~= math.floor(c.head_dim) then
    return ("config: hidden_size %d is no multiple of %d attention heads"):format(c.hidden_size, heads)
  end
  if heads and kv and heads % kv ~= 0 then return ("config: %d attention heads cannot share %d key-value heads evenly"):format(heads, kv) end
  local experts = c.num_experts or c.num_local_experts
  if experts and c.num_experts_per_tok and c.num_experts_per_tok > experts then
    return ("config: num_experts_per_tok is %d, but there are %d experts"):format(c.num_experts_per_tok, experts)
  end
end

return M
