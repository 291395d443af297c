--- What Gemma 2 and Gemma 3 share.
-- @module wane.models.gemma
local nn = require "wane.nn"
local decoder, F = nn.decoder, nn.functional

local M = {}

--- The defaults that both share, over the version's own.
-- @param c table the config, changed
-- @param values table { key = default }
function M.defaults(c, values)
  decoder.assume(c, { hidden_act = c.hidden_activation or "gelu_pytorch_tanh", head_dim = 256, num_key_value_heads = 4, intermediate_size = 9216,
    query_pre_attn_scalar = 256, sliding_window = 4096, attention_bias = false, tie_word_embeddings = true })
  decoder.defaults(c, values)
end

--- Options of layer i's attention (from 0); see decoder.Attention.
function M.attention(c, i)
  return { bias = c.attention_bias, output_bias = c.attention_bias, norm_offset = 1, window = decoder.window(c, i),
    scale = c.query_pre_attn_scalar ^ -0.5, softcap = c.attn_logit_softcapping }
end

local function Layer(c, attention)
  local function norm() return nn.RMSNorm(c.hidden_size, c.rms_norm_eps, 1) end
  return nn.module {
    self_attn = attention,
    mlp = decoder.MLP(c, c.intermediate_size),
    input_layernorm = norm(), post_attention_layernorm = norm(), pre_feedforward_layernorm = norm(), post_feedforward_layernorm = norm(),
    forward = function(self, x, pass)
      x = F.add(x, self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), pass)))
      return F.add(x, self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))
    end,
  }
end

--- The whole tree.
-- @param attention function(i) -> wane.Module, i from 0
function M.model(c, attention)
  local tree = decoder.model(c, function(i) return Layer(c, attention(i)) end, { embedding_scale = math.sqrt(c.hidden_size), norm_offset = 1 })
  local cap = c.final_logit_softcapping
  if cap then function tree:head(x) return F.softcap(self.lm_head(x), cap) end end
  return tree
end

return M
