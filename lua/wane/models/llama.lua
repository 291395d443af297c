--- Llama 1 to 3, SmolLM2, TinyLlama and everything else that calls itself LlamaForCausalLM.
-- Source of names and formulas: transformers 4 modeling_llama.py. Touvron et al. 2023.
local nn = require "wane.nn"
local decoder = nn.decoder

return decoder.family {
  name = "llama",
  architectures = { "LlamaForCausalLM" },

  --- Fills in what a config may leave unsaid (configuration_llama.py).
  defaults = function(c) decoder.defaults(c, { attention_bias = false, mlp_bias = false }) end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return decoder.model(c, function()
      local attention = decoder.Attention(c, { bias = c.attention_bias, output_bias = c.attention_bias })
      return decoder.Layer(c, attention, decoder.MLP(c, c.intermediate_size, c.mlp_bias))
    end)
  end,
}
