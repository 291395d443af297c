--- Mixtral 8x7B and 8x22B: Mistral whose feed-forward layers are mixtures of experts, two of which take each token.
-- Source of names and formulas: transformers 4 modeling_mixtral.py. Jiang et al. 2024.
local nn = require "wane.nn"
local decoder = nn.decoder

return decoder.family {
  name = "mixtral",
  architectures = { "MixtralForCausalLM" },

  --- Fills in what a config may leave unsaid (configuration_mixtral.py).
  defaults = function(c)
    decoder.defaults(c, { num_key_value_heads = 8, intermediate_size = 14336, rms_norm_eps = 1e-5, max_position_embeddings = 131072, rope_theta = 1e6,
      num_local_experts = c.num_experts or 8, num_experts_per_tok = 2 })
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return decoder.model(c, function()
      local mixture = nn.mixture(c.hidden_size, { experts = c.num_local_experts, chosen = c.num_experts_per_tok, inner = c.intermediate_size,
        act = c.hidden_act, normalise = true, names = { "w1", "w3", "w2" } })
      return decoder.Layer(c, decoder.Attention(c, { window = c.sliding_window }), mixture, "block_sparse_moe")
    end)
  end,
}
