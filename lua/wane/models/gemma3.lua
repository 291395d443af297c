--- Gemma 3, the language model: Gemma 2 without soft caps, with norms of query and key heads, and with a rotary embedding of their own
-- in the sliding layers. Files with a vision tower are read for their text part.
-- Source of names and formulas: transformers 4 modeling_gemma3.py. Gemma Team 2025.
local nn = require "wane.nn"
local decoder, gemma = nn.decoder, require "wane.models.gemma"

return decoder.family {
  name = "gemma3_text",
  model_types = { "gemma3" },
  architectures = { "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration" },
  -- Where the multimodal files keep the text model: since transformers 4.52, and before.
  nested = { { "model.", "model.language_model." }, { "model.", "language_model.model." }, { "lm_head.", "language_model.lm_head." } },
  text_architecture = "Gemma3ForCausalLM",
  -- Sizes that a text_config leaves out when they are these.
  sizes = { vocab_size = 262208, hidden_size = 2304, num_hidden_layers = 26, num_attention_heads = 8 },

  --- Fills in what a config may leave unsaid (configuration_gemma3.py).
  defaults = function(c)
    gemma.defaults(c, { max_position_embeddings = 131072, rope_theta = 1e6, rope_local_base_freq = 1e4, sliding_window_pattern = 6 })
    decoder.layer_types(c, function(i) return (i + 1) % c.sliding_window_pattern ~= 0 end)
  end,

  build = function(c)
    c.rotary, c.local_rotary = nn.rotary(c, { layer_type = "full_attention" }), nn.rotary(c, { layer_type = "sliding_attention" })
    return gemma.model(c, function(i)
      local o = gemma.attention(c, i)
      o.head_norms, o.rotary = true, o.window and c.local_rotary or c.rotary
      return decoder.Attention(c, o)
    end)
  end,
}
