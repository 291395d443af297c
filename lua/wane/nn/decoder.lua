--- What the decoders in Llama's line share: grouped heads with rotary positions, a gated feed-forward, RMS norms, and the tree around
-- them. A family says which switches it sets; what is its own (Gemma's four norms, Phi-3's fused matrices) stays in its file.
-- Source of names and formulas: transformers 4 modeling_llama.py and its siblings.
-- @module wane.nn.decoder
local Linear = require("wane.nn.linear").new
local layers = require "wane.nn.layers"
local module = require "wane.nn.module"

local M = {}

--- Fills in what a config leaves unsaid.
-- @param c table the config, changed
-- @param values table { key = default }
function M.assume(c, values)
  for key, value in pairs(values) do
    if c[key] == nil then c[key] = value end
  end
end

--- The defaults that all of them share, over the family's own.
-- @param c table the config, changed
-- @param values table the family's own defaults, { key = default }
function M.defaults(c, values)
  M.assume(c, values)
  c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
  c.head_dim = c.head_dim or c.hidden_size / c.num_attention_heads
  M.assume(c, { hidden_act = "silu", rms_norm_eps = 1e-6, max_position_embeddings = 2048, tie_word_embeddings = false })
end

--- Self-attention.
-- @param c table num_attention_heads, num_key_value_heads, head_dim, hidden_size, rms_norm_eps
-- @param o table { rotary = c.rotary, bias = of q, k and v, output_bias = of o, head_norms = an RMS norm of each query and key head,
--   norm_offset = added to these norms' weights, window = keys seen, scale = of q·k, softcap = of the scores }
function M.Attention(c, o)
  local H, KV, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
  local how = { window = o.window, scale = o.scale, softcap = o.softcap }
  local function norm() return o.head_norms and layers.RMSNorm.new(D, c.rms_norm_eps, o.norm_offset) or nil end
  return module.module {
    q_proj = Linear(c.hidden_size, H * D, o.bias or false),
    k_proj = Linear(c.hidden_size, KV * D, o.bias or false),
    v_proj = Linear(c.hidden_size, KV * D, o.bias or false),
    o_proj = Linear(H * D, c.hidden_size, o.output_bias or false),
    q_norm = norm(),
    k_norm = norm(),
    ending = "o_proj",
    inner = function(self, x, pass)
      local q, k, v = pass:heads(H, self.q_proj(x)), pass:heads(KV, self.k_proj(x)), pass:heads(KV, self.v_proj(x))
      if o.head_norms then q, k = self.q_norm(q), self.k_norm(k) end
      q, k = pass:rotary(o.rotary or c.rotary, q, k)
      return pass:attend(q, k, v, how)
    end,
  }
end

--- down(act(gate(x)) * up(x)).
-- @param c table hidden_size, hidden_act
-- @param width integer intermediate size
-- @param bias boolean|nil
function M.MLP(c, width, bias)
  local gated = layers.gate(c.hidden_act)
  return module.module {
    gate_proj = Linear(c.hidden_size, width, bias or false),
    up_proj = Linear(c.hidden_size, width, bias or false),
    down_proj = Linear(width, c.hidden_size, bias or false),
    ending = "down_proj",
    inner = function(self, x) return gated(self.gate_proj(x), self.up_proj(x)) end,
  }
end

--- One layer: x + attention(norm x), then + feed-forward(norm of that).
-- @param c table hidden_size, rms_norm_eps
-- @param attention wane.Module
-- @param mlp wane.Module
-- @param mlp_name string|nil the name under which files know it; default "mlp"
function M.Layer(c, attention, mlp, mlp_name)
  mlp_name = mlp_name or "mlp"
  return module.module {
    self_attn = attention,
    [mlp_name] = mlp,
    input_layernorm = layers.RMSNorm.new(c.hidden_size, c.rms_norm_eps),
    post_attention_layernorm = layers.RMSNorm.new(c.hidden_size, c.rms_norm_eps),
    forward = function(self, x, pass)
      x = self.self_attn:added_to(x, self.input_layernorm(x), pass)
      return self[mlp_name]:added_to(x, self.post_attention_layernorm(x), pass)
    end,
  }
end

--- The whole tree: embedding, layers, norm, head.
-- @param c table
-- @param layer function(i) -> wane.Module, i from 0
-- @param o table|nil { embedding_scale = number, norm_offset = number }
function M.model(c, layer, o)
  o = o or {}
  return module.module {
    model = module.module {
      embed_tokens = layers.Embedding.new(c.vocab_size, c.hidden_size, o.embedding_scale),
      layers = module.list(c.num_hidden_layers, layer),
      norm = layers.RMSNorm.new(c.hidden_size, c.rms_norm_eps, o.norm_offset),
    },
    lm_head = Linear(c.hidden_size, c.vocab_size, false),
    backbone = function(self, ids, pass)
      local x = pass:through(self.model.layers, self.model.embed_tokens(ids, pass))
      return self.model.norm(pass:tail(x))
    end,
  }
end

--- The window of layer i (from 0): sliding_window where `layer_types` says so, none elsewhere.
function M.window(c, i)
  return c.layer_types[i + 1] == "sliding_attention" and c.sliding_window or nil
end

--- Fills in layer_types.
-- @param slides function(i) -> boolean, i from 0
function M.layer_types(c, slides)
  if c.layer_types then return end
  c.layer_types = {}
  for i = 0, c.num_hidden_layers - 1 do c.layer_types[i + 1] = slides(i) and "sliding_attention" or "full_attention" end
end

--- What every family of this line says about its names; `name` and `architectures` are the family's own.
-- @param family table
-- @return table the family
function M.family(family)
  family.prefix, family.embedding, family.head = "model", "model.embed_tokens", "lm_head"
  return family
end

return M
