--- Gemma 2: Llama with soft caps, every other layer sliding, norms before and after each branch that multiply by 1 + weight, and an
-- embedding scaled by the square root of its width.
-- Source of names and formulas: transformers 4 modeling_gemma2.py. Gemma Team 2024.
local nn = require "wane.nn"
local decoder, gemma = nn.decoder, require "wane.models.gemma"

return decoder.family {
  name = "gemma2",
  architectures = { "Gemma2ForCausalLM" },

  --- Fills in what a config may leave unsaid (configuration_gemma2.py).
  defaults = function(c)
    gemma.defaults(c, { max_position_embeddings = 8192, attn_logit_softcapping = 50, final_logit_softcapping = 30 })
    decoder.layer_types(c, function(i) return i % 2 == 0 end)
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return gemma.model(c, function(i) return decoder.Attention(c, gemma.attention(c, i)) end)
  end,
}
