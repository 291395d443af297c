--- Phi 1, 1.5 and 2: rotary on part of each head, both branches read one norm, biases everywhere, the head's included.
-- Source of names and formulas: transformers 4 modeling_phi.py. Gunasekar et al. 2023.
local nn = require "wane.nn"

local function Attention(c)
  local H, KV, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
  return nn.module {
    q_proj = nn.Linear(c.hidden_size, H * D),
    k_proj = nn.Linear(c.hidden_size, KV * D),
    v_proj = nn.Linear(c.hidden_size, KV * D),
    dense = nn.Linear(H * D, c.hidden_size),
    q_layernorm = c.qk_layernorm and nn.LayerNorm(D, c.layer_norm_eps) or nil,
    k_layernorm = c.qk_layernorm and nn.LayerNorm(D, c.layer_norm_eps) or nil,
    forward = function(self, x, pass)
      local q, k, v = pass:heads(H, self.q_proj(x)), pass:heads(KV, self.k_proj(x)), pass:heads(KV, self.v_proj(x))
      if c.qk_layernorm then q, k = self.q_layernorm(q), self.k_layernorm(k) end
      q, k = pass:rotary(c.rotary, q, k)
      return self.dense(pass:attend(q, k, v))
    end,
  }
end

local function MLP(c)
  local act = nn.activation(c.hidden_act)
  return nn.module {
    fc1 = nn.Linear(c.hidden_size, c.intermediate_size),
    fc2 = nn.Linear(c.intermediate_size, c.hidden_size),
    forward = function(self, x) return self.fc2(act(self.fc1(x))) end,
  }
end

local function Layer(_, c)
  local add = nn.functional.add
  return nn.module {
    self_attn = Attention(c),
    mlp = MLP(c),
    input_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    forward = function(self, x, pass)
      local normed = self.input_layernorm(x)
      return add(add(self.self_attn(normed, pass), self.mlp(normed)), x)
    end,
  }
end

return {
  name = "phi",
  architectures = { "PhiForCausalLM" },
  prefix = "model",
  embedding = "model.embed_tokens",
  head = "lm_head",

  --- Fills in what a config may leave unsaid (configuration_phi.py).
  defaults = function(c)
    c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
    c.head_dim = c.head_dim or c.hidden_size / c.num_attention_heads
    c.intermediate_size = c.intermediate_size or 8192
    c.hidden_act = c.hidden_act or "gelu_new"
    c.layer_norm_eps = c.layer_norm_eps or 1e-5
    c.max_position_embeddings = c.max_position_embeddings or 2048
    c.partial_rotary_factor = c.partial_rotary_factor or 0.5
    if c.tie_word_embeddings == nil then c.tie_word_embeddings = false end
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return nn.module {
      model = nn.module {
        embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size),
        layers = nn.list(c.num_hidden_layers, Layer, c),
        final_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
      },
      lm_head = nn.Linear(c.hidden_size, c.vocab_size),
      backbone = function(self, ids, pass)
        local x = pass:through(self.model.layers, self.model.embed_tokens(ids, pass))
        return self.model.final_layernorm(pass:tail(x))
      end,
    }
  end,
}
