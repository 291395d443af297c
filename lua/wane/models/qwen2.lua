--- Qwen2 and Qwen2.5: Llama with biases on q, k and v.
-- Source of names and formulas: transformers 4 modeling_qwen2.py. Yang et al. 2024.
local nn = require "wane.nn"
local decoder = nn.decoder

return decoder.family {
  name = "qwen2",
  architectures = { "Qwen2ForCausalLM" },

  --- Fills in what a config may leave unsaid (configuration_qwen2.py). Layers from max_window_layers on slide, if use_sliding_window.
  defaults = function(c)
    decoder.defaults(c, { max_position_embeddings = 32768, use_sliding_window = false, sliding_window = 4096, max_window_layers = 28 })
    if not c.use_sliding_window then c.sliding_window = nil end
    decoder.layer_types(c, function(i) return i >= c.max_window_layers end)
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return decoder.model(c, function(i)
      return decoder.Layer(c, decoder.Attention(c, { bias = true, window = decoder.window(c, i) }), decoder.MLP(c, c.intermediate_size))
    end)
  end,
}
