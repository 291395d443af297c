--- GPT-NeoX and Pythia: fused query-key-value per head, rotary on part of each head, parallel or sequential residual.
-- Source of names and formulas: transformers 4 modeling_gpt_neox.py. Black et al. 2022.
local nn = require "wane.nn"

local function Attention(c)
  local H, D = c.num_attention_heads, c.head_dim
  return nn.module {
    query_key_value = nn.Linear(c.hidden_size, 3 * c.hidden_size, c.attention_bias),
    dense = nn.Linear(c.hidden_size, c.hidden_size, c.attention_bias),
    forward = function(self, x, pass)
      local q, k, v = pass:split(self.query_key_value(x), D, H, 1, 1, 1)
      q, k = pass:rotary(c.rotary, q, k)
      return self.dense(pass:attend(q, k, v))
    end,
  }
end

local function MLP(c)
  local act = nn.activation(c.hidden_act)
  return nn.module {
    dense_h_to_4h = nn.Linear(c.hidden_size, c.intermediate_size, true),
    dense_4h_to_h = nn.Linear(c.intermediate_size, c.hidden_size, true),
    forward = function(self, x) return self.dense_4h_to_h(act(self.dense_h_to_4h(x))) end,
  }
end

local function Layer(_, c)
  local add = nn.functional.add
  return nn.module {
    input_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    post_attention_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    attention = Attention(c),
    mlp = MLP(c),
    forward = function(self, x, pass)
      local attended = add(x, self.attention(self.input_layernorm(x), pass))
      -- Parallel: both branches read x, each through a norm of its own. Sequential: the second reads the first's result.
      return add(attended, self.mlp(self.post_attention_layernorm(c.use_parallel_residual and x or attended)))
    end,
  }
end

return {
  name = "gpt_neox",
  architectures = { "GPTNeoXForCausalLM" },
  prefix = "gpt_neox",
  embedding = "gpt_neox.embed_in",
  head = "embed_out",
  heads = { "lm_head" },                 -- as transformers 5 calls it
  buffers = { "%.attention%.bias$" },    -- the causal mask, in older files

  --- Fills in what a config may leave unsaid (configuration_gpt_neox.py).
  defaults = function(c)
    c.head_dim = c.hidden_size / c.num_attention_heads
    c.hidden_act = c.hidden_act or "gelu"
    c.layer_norm_eps = c.layer_norm_eps or 1e-5
    c.rotary_pct = c.rotary_pct or 0.25
    c.rotary_emb_base = c.rotary_emb_base or 10000
    c.max_position_embeddings = c.max_position_embeddings or 2048
    if c.use_parallel_residual == nil then c.use_parallel_residual = true end
    if c.attention_bias == nil then c.attention_bias = true end
    if c.tie_word_embeddings == nil then c.tie_word_embeddings = false end
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return nn.module {
      gpt_neox = nn.module {
        embed_in = nn.Embedding(c.vocab_size, c.hidden_size),
        layers = nn.list(c.num_hidden_layers, Layer, c),
        final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
      },
      embed_out = nn.Linear(c.hidden_size, c.vocab_size, false),
      backbone = function(self, ids, pass)
        local x = pass:through(self.gpt_neox.layers, self.gpt_neox.embed_in(ids, pass))
        return self.gpt_neox.final_layer_norm(pass:tail(x))
      end,
    }
  end,
}
