--- Phi-3, Phi-3.5 and Phi-4: Llama with q, k, v in one matrix and gate, up in another; the long-context ones rotate by LongRoPE.
-- Source of names and formulas: transformers 4 modeling_phi3.py. Abdin et al. 2024; Ding et al. 2024, "LongRoPE".
local nn = require "wane.nn"
local decoder = nn.decoder

local function Attention(c)
  local H, KV, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
  return nn.module {
    qkv_proj = nn.Linear(c.hidden_size, (H + 2 * KV) * D, false),
    o_proj = nn.Linear(H * D, c.hidden_size, false),
    ending = "o_proj",
    inner = function(self, x, pass)
      local q, k, v = pass:split(self.qkv_proj(x), D, 1, H, KV, KV)
      q, k = pass:rotary(c.rotary, q, k)
      return pass:attend(q, k, v, { window = c.sliding_window })
    end,
  }
end

local function MLP(c)
  local gated, width, narrow = nn.gate(c.hidden_act), c.intermediate_size, nn.functional.narrow
  return nn.module {
    gate_up_proj = nn.Linear(c.hidden_size, 2 * width, false),
    down_proj = nn.Linear(width, c.hidden_size, false),
    ending = "down_proj",
    inner = function(self, x)
      local both = self.gate_up_proj(x)
      return gated(narrow(both, 2, 0, width), narrow(both, 2, width, width))
    end,
  }
end

return decoder.family {
  name = "phi3",
  architectures = { "Phi3ForCausalLM" },

  --- Fills in what a config may leave unsaid (configuration_phi3.py).
  defaults = function(c)
    decoder.defaults(c, { intermediate_size = 8192, rms_norm_eps = 1e-5, max_position_embeddings = 4096, original_max_position_embeddings = 4096 })
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return decoder.model(c, function() return decoder.Layer(c, Attention(c), MLP(c)) end)
  end,
}
