--- Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3 whose feed-forward layers are mixtures of many small experts, but for those that the config
-- names as plain.
-- Source of names and formulas: transformers 4 modeling_qwen3_moe.py. Yang et al. 2025.
local nn = require "wane.nn"
local decoder = nn.decoder

-- Layer i (from 0) is a mixture unless mlp_only_layers lists it or it is off the step.
local function is_mixture(c, i)
  for _, plain in ipairs(c.mlp_only_layers) do if plain == i then return false end end
  return c.num_experts > 0 and (i + 1) % c.decoder_sparse_step == 0
end

return decoder.family {
  name = "qwen3_moe",
  architectures = { "Qwen3MoeForCausalLM" },

  --- Fills in what a config may leave unsaid (configuration_qwen3_moe.py).
  defaults = function(c)
    decoder.defaults(c, { num_key_value_heads = 4, attention_bias = false, max_position_embeddings = 32768, use_sliding_window = false, sliding_window = 4096,
      intermediate_size = 6144, moe_intermediate_size = 768, num_experts = c.num_local_experts or 128, num_experts_per_tok = 8, norm_topk_prob = false,
      decoder_sparse_step = 1, mlp_only_layers = {} })
    if not c.use_sliding_window then c.sliding_window = nil end
  end,

  build = function(c)
    c.rotary = nn.rotary(c)
    return decoder.model(c, function(i)
      local mlp = is_mixture(c, i) and nn.mixture(c.hidden_size, { experts = c.num_experts, chosen = c.num_experts_per_tok, inner = c.moe_intermediate_size,
        act = c.hidden_act, normalise = c.norm_topk_prob, names = { "gate_proj", "up_proj", "down_proj" } }) or decoder.MLP(c, c.intermediate_size)
      local attention = decoder.Attention(c, { bias = c.attention_bias, output_bias = c.attention_bias, head_norms = true, window = c.sliding_window })
      return decoder.Layer(c, attention, mlp)
    end)
  end,
}
