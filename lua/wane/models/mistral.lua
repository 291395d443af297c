--- Mistral 7B and what calls itself MistralForCausalLM: Llama whose layers all see the last `sliding_window` keys (null: all keys).
-- Source of names and formulas: transformers 4 modeling_mistral.py. Jiang et al. 2023.
local nn = require "wane.nn"
local decoder = nn.decoder

return decoder.family {
  name = "mistral",
  architectures = { "MistralForCausalLM" },

  --- Fills in what a config may leave unsaid (configuration_mistral.py). A config without sliding_window has none: a null, which is how
  -- files say so, cannot be told from a missing key here.
  defaults = function(c) decoder.defaults(c, { num_key_value_heads = 8, intermediate_size = 14336, max_position_embeddings = 131072 }) end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return decoder.model(c, function()
      return decoder.Layer(c, decoder.Attention(c, { window = c.sliding_window }), decoder.MLP(c, c.intermediate_size))
    end)
  end,
}
