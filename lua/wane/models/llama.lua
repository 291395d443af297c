--- Llama 1 to 3, SmolLM2, TinyLlama and everything else that calls itself LlamaForCausalLM.
-- Source of names and formulas: transformers 4 modeling_llama.py. Touvron et al. 2023.
local nn = require "wane.nn"

local function Attention(c)
  local H, KV, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
  return nn.module {
    q_proj = nn.Linear(c.hidden_size, H * D, c.attention_bias),
    k_proj = nn.Linear(c.hidden_size, KV * D, c.attention_bias),
    v_proj = nn.Linear(c.hidden_size, KV * D, c.attention_bias),
    o_proj = nn.Linear(H * D, c.hidden_size, c.attention_bias),
    forward = function(self, x, pass)
      local q, k, v = pass:heads(H, self.q_proj(x)), pass:heads(KV, self.k_proj(x)), pass:heads(KV, self.v_proj(x))
      q, k = pass:rotary(c.rotary, q, k)
      return self.o_proj(pass:attend(q, k, v))
    end,
  }
end

local function MLP(c)
  local gated = nn.gate(c.hidden_act)
  return nn.module {
    gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, c.mlp_bias),
    up_proj = nn.Linear(c.hidden_size, c.intermediate_size, c.mlp_bias),
    down_proj = nn.Linear(c.intermediate_size, c.hidden_size, c.mlp_bias),
    forward = function(self, x) return self.down_proj(gated(self.gate_proj(x), self.up_proj(x))) end,
  }
end

local function Layer(_, c)
  local add = nn.functional.add
  return nn.module {
    self_attn = Attention(c),
    mlp = MLP(c),
    input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps),
    post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps),
    forward = function(self, x, pass)
      x = add(x, self.self_attn(self.input_layernorm(x), pass))
      return add(x, self.mlp(self.post_attention_layernorm(x)))
    end,
  }
end

return {
  name = "llama",
  architectures = { "LlamaForCausalLM" },
  prefix = "model",                      -- what a file without a head may leave out
  embedding = "model.embed_tokens",
  head = "lm_head",

  --- Fills in what a config may leave unsaid (configuration_llama.py).
  defaults = function(c)
    c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
    c.head_dim = c.head_dim or c.hidden_size / c.num_attention_heads
    c.hidden_act = c.hidden_act or "silu"
    c.rms_norm_eps = c.rms_norm_eps or 1e-6
    c.attention_bias = c.attention_bias or false
    c.mlp_bias = c.mlp_bias or false
    c.max_position_embeddings = c.max_position_embeddings or 2048
    if c.tie_word_embeddings == nil then c.tie_word_embeddings = false end
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return nn.module {
      model = nn.module {
        embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size),
        layers = nn.list(c.num_hidden_layers, Layer, c),
        norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps),
      },
      lm_head = nn.Linear(c.hidden_size, c.vocab_size, false),
      backbone = function(self, ids, pass)
        local x = pass:through(self.model.layers, self.model.embed_tokens(ids, pass))
        return self.model.norm(pass:tail(x))
      end,
    }
  end,
}
