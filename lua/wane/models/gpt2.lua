--- GPT-2: learned positions, fused query-key-value in three blocks, weights that files hold [in, out].
-- Source of names and formulas: transformers 4 modeling_gpt2.py. Radford et al. 2019.
local nn = require "wane.nn"

local function Attention(i, c)
  local H, D = c.num_attention_heads, c.head_dim
  local scale = (c.scale_attn_weights and D ^ -0.5 or 1) / (c.scale_attn_by_inverse_layer_idx and i + 1 or 1)
  return nn.module {
    c_attn = nn.Linear(c.hidden_size, 3 * c.hidden_size),
    c_proj = nn.Linear(c.hidden_size, c.hidden_size),
    forward = function(self, x, pass)
      local q, k, v = pass:split(self.c_attn(x), D, 1, H, H, H)
      return self.c_proj(pass:attend(q, k, v, { scale = scale }))
    end,
  }
end

local function MLP(c)
  local act = nn.activation(c.hidden_act)
  return nn.module {
    c_fc = nn.Linear(c.hidden_size, c.intermediate_size),
    c_proj = nn.Linear(c.intermediate_size, c.hidden_size),
    forward = function(self, x) return self.c_proj(act(self.c_fc(x))) end,
  }
end

local function Layer(i, c)
  local add = nn.functional.add
  return nn.module {
    ln_1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    attn = Attention(i, c),
    ln_2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    mlp = MLP(c),
    forward = function(self, x, pass)
      x = add(x, self.attn(self.ln_1(x), pass))
      return add(x, self.mlp(self.ln_2(x)))
    end,
  }
end

return {
  name = "gpt2",
  architectures = { "GPT2LMHeadModel" },
  prefix = "transformer",
  embedding = "transformer.wte",
  head = "lm_head",
  buffers = { "%.attn%.bias$" },         -- the causal mask, in older files
  transposed = { "%.c_attn%.weight$", "%.c_proj%.weight$", "%.c_fc%.weight$" },        -- Conv1D
  aliases = { n_embd = "hidden_size", n_layer = "num_hidden_layers", n_head = "num_attention_heads", n_positions = "max_position_embeddings",
              n_inner = "intermediate_size", activation_function = "hidden_act", layer_norm_epsilon = "layer_norm_eps" },

  --- Fills in what a config may leave unsaid (configuration_gpt2.py).
  defaults = function(c)
    c.head_dim = c.hidden_size / c.num_attention_heads
    c.intermediate_size = c.intermediate_size or 4 * c.hidden_size
    c.hidden_act = c.hidden_act or "gelu_new"
    c.layer_norm_eps = c.layer_norm_eps or 1e-5
    c.max_position_embeddings = c.max_position_embeddings or c.n_ctx or 1024
    if c.scale_attn_weights == nil then c.scale_attn_weights = true end
  end,

  build = function(c)
    return nn.module {
      transformer = nn.module {
        wte = nn.Embedding(c.vocab_size, c.hidden_size),
        wpe = nn.PositionEmbedding(c.max_position_embeddings, c.hidden_size),
        h = nn.list(c.num_hidden_layers, Layer, c),
        ln_f = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
      },
      lm_head = nn.Linear(c.hidden_size, c.vocab_size, false),
      backbone = function(self, ids, pass)
        local t = self.transformer
        local x = pass:through(t.h, nn.functional.add(t.wte(ids, pass), t.wpe(pass)))
        return t.ln_f(pass:tail(x))
      end,
    }
  end,
}
