--- BLOOM: no positions but ALiBi's linear biases, fused query-key-value per head, a norm behind the embedding.
-- Source of names and formulas: transformers 4 modeling_bloom.py. Le Scao et al. 2022.
local nn = require "wane.nn"

local function Attention(c)
  local H, D = c.num_attention_heads, c.head_dim
  return nn.module {
    query_key_value = nn.Linear(c.hidden_size, 3 * c.hidden_size),
    dense = nn.Linear(c.hidden_size, c.hidden_size),
    forward = function(self, x, pass, bias)
      local q, k, v = pass:split(self.query_key_value(x), D, H, 1, 1, 1)
      return self.dense(pass:attend(q, k, v, { bias = bias }))
    end,
  }
end

local function MLP(c)
  local act = nn.activation "gelu_new"                   -- whatever the config says: upstream's is fixed
  return nn.module {
    dense_h_to_4h = nn.Linear(c.hidden_size, 4 * c.hidden_size),
    dense_4h_to_h = nn.Linear(4 * c.hidden_size, c.hidden_size),
    forward = function(self, x) return self.dense_4h_to_h(act(self.dense_h_to_4h(x))) end,
  }
end

local function Layer(_, c)
  local add, after_norm = nn.functional.add, c.apply_residual_connection_post_layernorm
  return nn.module {
    input_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    self_attention = Attention(c),
    post_attention_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    mlp = MLP(c),
    forward = function(self, x, pass, bias)
      local normed = self.input_layernorm(x)
      x = add(after_norm and normed or x, self.self_attention(normed, pass, bias))
      normed = self.post_attention_layernorm(x)
      return add(after_norm and normed or x, self.mlp(normed))
    end,
  }
end

return {
  name = "bloom",
  architectures = { "BloomForCausalLM" },
  prefix = "transformer",
  embedding = "transformer.word_embeddings",
  head = "lm_head",
  buffers = { "%.scale_mask_softmax%.causal_mask$" },  -- in older files
  aliases = { n_embed = "hidden_size", n_layer = "num_hidden_layers", n_head = "num_attention_heads", layer_norm_epsilon = "layer_norm_eps" },

  --- Fills in what a config may leave unsaid (configuration_bloom.py).
  defaults = function(c)
    c.head_dim = c.hidden_size / c.num_attention_heads
    c.layer_norm_eps = c.layer_norm_eps or 1e-5
  end,

  build = function(c)
    local alibi = nn.alibi(c.num_attention_heads)
    return nn.module {
      transformer = nn.module {
        word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size),
        word_embeddings_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
        h = nn.list(c.num_hidden_layers, Layer, c),
        ln_f = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
      },
      lm_head = nn.Linear(c.hidden_size, c.vocab_size, false),
      backbone = function(self, ids, pass)
        local t = self.transformer
        local x = pass:through(t.h, t.word_embeddings_layernorm(t.word_embeddings(ids, pass)), alibi:bias(pass))
        return t.ln_f(pass:tail(x))
      end,
    }
  end,
}
