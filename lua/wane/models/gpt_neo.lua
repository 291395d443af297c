--- GPT-Neo: learned positions, every other layer sees a window only, scores that are not scaled.
-- Source of names and formulas: transformers 4 modeling_gpt_neo.py. Black et al. 2021.
local nn = require "wane.nn"

local function Attention(i, c)
  local H, E = c.num_attention_heads, c.hidden_size
  local options = { scale = 1, window = c.attention_layers[i + 1] == "local" and c.window_size or nil }
  return nn.module {
    k_proj = nn.Linear(E, E, false),
    v_proj = nn.Linear(E, E, false),
    q_proj = nn.Linear(E, E, false),
    out_proj = nn.Linear(E, E),
    forward = function(self, x, pass)
      local q, k, v = pass:heads(H, self.q_proj(x)), pass:heads(H, self.k_proj(x)), pass:heads(H, self.v_proj(x))
      return self.out_proj(pass:attend(q, k, v, options))
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
    attn = nn.module { attention = Attention(i, c), forward = function(self, x, pass) return self.attention(x, pass) end },
    ln_2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps),
    mlp = MLP(c),
    forward = function(self, x, pass)
      x = add(x, self.attn(self.ln_1(x), pass))
      return add(x, self.mlp(self.ln_2(x)))
    end,
  }
end

-- {{{"global", "local"}, 12}} written out: a kind for each layer.
local function kinds_of(types)
  local kinds = {}
  for _, run in ipairs(types) do
    for _ = 1, run[2] do
      for _, kind in ipairs(run[1]) do kinds[#kinds + 1] = kind end
    end
  end
  return kinds
end

return {
  name = "gpt_neo",
  architectures = { "GPTNeoForCausalLM" },
  prefix = "transformer",
  embedding = "transformer.wte",
  head = "lm_head",
  buffers = { "%.attn%.attention%.bias$" },            -- the causal mask, in older files
  aliases = { num_layers = "num_hidden_layers", num_heads = "num_attention_heads", activation_function = "hidden_act",
              layer_norm_epsilon = "layer_norm_eps" },

  --- Fills in what a config may leave unsaid (configuration_gpt_neo.py).
  defaults = function(c)
    c.intermediate_size = c.intermediate_size or 4 * c.hidden_size
    c.hidden_act = c.hidden_act or "gelu_new"
    c.layer_norm_eps = c.layer_norm_eps or 1e-5
    c.max_position_embeddings = c.max_position_embeddings or 2048
    c.window_size = c.window_size or 256
    c.attention_layers = c.attention_types and kinds_of(c.attention_types) or c.attention_layers or kinds_of { { { "global", "local" }, 12 } }
    if #c.attention_layers ~= c.num_hidden_layers then
      error(("attention_types names %d layers, num_layers is %d"):format(#c.attention_layers, c.num_hidden_layers), 0)
    end
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
