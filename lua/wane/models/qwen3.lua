--- Qwen3: Llama with an RMS norm of each query and key head, whose width is not tied to the model's.
-- Source of names and formulas: transformers 4 modeling_qwen3.py. Yang et al. 2025.
local nn = require "wane.nn"
local decoder = nn.decoder

return decoder.family {
  name = "qwen3",
  architectures = { "Qwen3ForCausalLM" },

  --- Fills in what a config may leave unsaid (configuration_qwen3.py). Layers from max_window_layers on slide, if use_sliding_window.
  defaults = function(c)
    decoder.defaults(c, { head_dim = 128, num_key_value_heads = 32, attention_bias = false, max_position_embeddings = 32768,
      use_sliding_window = false, sliding_window = 4096, max_window_layers = 28 })
    if not c.use_sliding_window then c.sliding_window = nil end
    decoder.layer_types(c, function(i) return i >= c.max_window_layers end)
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return decoder.model(c, function(i)
      local attention = decoder.Attention(c, { bias = c.attention_bias, output_bias = c.attention_bias, head_norms = true, window = decoder.window(c, i) })
      return decoder.Layer(c, attention, decoder.MLP(c, c.intermediate_size))
    end)
  end,
}
