--- Falcon: 7B (one key-value head for all), 40B, 180B and 11B (key-value heads in groups), RW (ALiBi, norms in sequence).
-- Source of names and formulas: transformers 4 modeling_falcon.py. Almazrouei et al. 2023.
local nn = require "wane.nn"

local function Attention(c)
  local H, KV, D = c.num_attention_heads, c.num_kv_heads, c.head_dim
  return nn.module {
    query_key_value = nn.Linear(c.hidden_size, (H + 2 * KV) * D, c.bias),
    dense = nn.Linear(c.hidden_size, c.hidden_size, c.bias),
    forward = function(self, x, pass, bias)
      -- A group is the query heads that share a key-value head, then that key, then that value.
      local q, k, v = pass:split(self.query_key_value(x), D, KV, H / KV, 1, 1)
      if c.rotary then q, k = pass:rotary(c.rotary, q, k) end
      return self.dense(pass:attend(q, k, v, { bias = bias }))
    end,
  }
end

local function MLP(c)
  local act = nn.activation(c.activation)
  return nn.module {
    dense_h_to_4h = nn.Linear(c.hidden_size, c.ffn_hidden_size, c.bias),
    dense_4h_to_h = nn.Linear(c.ffn_hidden_size, c.hidden_size, c.bias),
    forward = function(self, x) return self.dense_4h_to_h(act(self.dense_h_to_4h(x))) end,
  }
end

local function Layer(_, c)
  local add = nn.functional.add
  local function norm() return nn.LayerNorm(c.hidden_size, c.layer_norm_eps) end
  local two = c.parallel_attn and c.num_ln_in_parallel_attn == 2
  return nn.module {
    self_attention = Attention(c),
    mlp = MLP(c),
    ln_attn = two and norm() or nil,
    ln_mlp = two and norm() or nil,
    input_layernorm = not two and norm() or nil,
    post_attention_layernorm = not c.parallel_attn and norm() or nil,
    forward = function(self, x, pass, bias)
      local normed = (self.ln_attn or self.input_layernorm)(x)
      local attended = self.self_attention(normed, pass, bias)
      if not c.parallel_attn then
        x = add(x, attended)
        return add(x, self.mlp(self.post_attention_layernorm(x)))
      end
      return add(add(self.mlp(two and self.ln_mlp(x) or normed), attended), x)
    end,
  }
end

return {
  name = "falcon",
  architectures = { "FalconForCausalLM" },
  prefix = "transformer",
  embedding = "transformer.word_embeddings",
  head = "lm_head",
  aliases = { n_embed = "hidden_size", layer_norm_epsilon = "layer_norm_eps" },

  --- Fills in what a config may leave unsaid (configuration_falcon.py), and what the newer architecture says instead.
  defaults = function(c)
    c.head_dim = c.hidden_size / c.num_attention_heads
    c.num_kv_heads = c.num_kv_heads or c.num_attention_heads
    c.ffn_hidden_size = c.ffn_hidden_size or 4 * c.hidden_size
    c.activation = c.activation or "gelu"
    c.layer_norm_eps = c.layer_norm_eps or 1e-5
    c.max_position_embeddings = c.max_position_embeddings or 2048
    c.bias = c.bias or false
    if c.new_decoder_architecture then
      c.parallel_attn = true
      c.num_ln_in_parallel_attn = c.num_ln_in_parallel_attn or 2
    else
      if c.parallel_attn == nil then c.parallel_attn = true end
      c.num_ln_in_parallel_attn = 1
      c.num_kv_heads = c.multi_query == false and c.num_attention_heads or 1
    end
  end,

  build = function(c)
    -- Upstream rounds these biases to bf16 whatever the model's dtype, and scales them with the scores.
    local alibi = c.alibi and nn.alibi(c.num_attention_heads, { scale = c.head_dim ^ -0.5, dtype = "bf16" })
    c.rotary = not alibi and nn.rotary(c) or nil
    return nn.module {
      transformer = nn.module {
        word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size),
        h = nn.list(c.num_hidden_layers, Layer, c),
        ln_f = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
      },
      lm_head = nn.Linear(c.hidden_size, c.vocab_size, false),
      backbone = function(self, ids, pass)
        local t = self.transformer
        local x = pass:through(t.h, t.word_embeddings(ids, pass), alibi and alibi:bias(pass) or nil)
        return t.ln_f(pass:tail(x))
      end,
    }
  end,
}
