--- GPT-J: rotary on interleaved pairs of part of each head, both branches read one norm, no biases in attention, one in the head.
-- Source of names and formulas: transformers 4 modeling_gptj.py. Wang and Komatsuzaki 2021.
local nn = require "wane.nn"

local function Attention(c)
  local H, E = c.num_attention_heads, c.hidden_size
  return nn.module {
    k_proj = nn.Linear(E, E, false),
    v_proj = nn.Linear(E, E, false),
    q_proj = nn.Linear(E, E, false),
    out_proj = nn.Linear(E, E, false),
    forward = function(self, x, pass)
      local q, k, v = pass:heads(H, self.q_proj(x)), pass:heads(H, self.k_proj(x)), pass:heads(H, self.v_proj(x))
      q, k = pass:rotary(c.rotary, q, k)
      return self.out_proj(pass:attend(q, k, v))
    end,
  }
end

local function MLP(c)
  local act = nn.activation(c.hidden_act)
  return nn.module {
    fc_in = nn.Linear(c.hidden_size, c.intermediate_size),
    fc_out = nn.Linear(c.intermediate_size, c.hidden_size),
    forward = function(self, x) return self.fc_out(act(self.fc_in(x))) end,
  }
end

local function Layer(_, c)
  local add = nn.functional.add
  return nn.module {
    ln_1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    attn = Attention(c),
    mlp = MLP(c),
    forward = function(self, x, pass)
      local normed = self.ln_1(x)
      return add(add(self.attn(normed, pass), self.mlp(normed)), x)
    end,
  }
end

return {
  name = "gptj",
  architectures = { "GPTJForCausalLM" },
  prefix = "transformer",
  embedding = "transformer.wte",
  head = "lm_head",
  buffers = { "%.attn%.bias$" },         -- the causal mask, in older files
  aliases = { n_embd = "hidden_size", n_layer = "num_hidden_layers", n_head = "num_attention_heads", n_positions = "max_position_embeddings",
              n_inner = "intermediate_size", activation_function = "hidden_act", layer_norm_epsilon = "layer_norm_eps" },

  --- Fills in what a config may leave unsaid (configuration_gptj.py).
  defaults = function(c)
    c.head_dim = c.hidden_size / c.num_attention_heads
    c.intermediate_size = c.intermediate_size or 4 * c.hidden_size
    c.hidden_act = c.hidden_act or "gelu_new"
    c.layer_norm_eps = c.layer_norm_eps or 1e-5
    c.max_position_embeddings = c.max_position_embeddings or 2048
    if c.tie_word_embeddings == nil then c.tie_word_embeddings = false end
  end,

  build = function(c)
    c.rotary = nn.rotary(c, { interleaved = true, dim = c.rotary_dim or c.head_dim })
    return nn.module {
      transformer = nn.module {
        wte = nn.Embedding(c.vocab_size, c.hidden_size),
        h = nn.list(c.num_hidden_layers, Layer, c),
        ln_f = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
      },
      lm_head = nn.Linear(c.hidden_size, c.vocab_size),
      backbone = function(self, ids, pass)
        local x = pass:through(self.transformer.h, self.transformer.wte(ids, pass))
        return self.transformer.ln_f(pass:tail(x))
      end,
    }
  end,
}
