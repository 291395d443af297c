--- OPT: learned positions, norms before or (350m) behind each branch, embeddings that may be narrower than the layers.
-- Source of names and formulas: transformers 4 modeling_opt.py. Zhang et al. 2022.
local nn = require "wane.nn"

local EPS = 1e-5                         -- the config does not say it
local FIRST_POSITION = 2                 -- rows of the position table in front of position 0; pads stand at row 1, which no score sees

local function norm(c)
  return nn.LayerNorm(c.hidden_size, EPS, c.layer_norm_elementwise_affine)
end

local function Attention(c)
  local H, E, bias = c.num_attention_heads, c.hidden_size, c.enable_bias
  return nn.module {
    k_proj = nn.Linear(E, E, bias),
    v_proj = nn.Linear(E, E, bias),
    q_proj = nn.Linear(E, E, bias),
    out_proj = nn.Linear(E, E, bias),
    forward = function(self, x, pass)
      local q, k, v = pass:heads(H, self.q_proj(x)), pass:heads(H, self.k_proj(x)), pass:heads(H, self.v_proj(x))
      return self.out_proj(pass:attend(q, k, v))
    end,
  }
end

local function Layer(_, c)
  local add, act, before = nn.functional.add, nn.activation(c.hidden_act), c.do_layer_norm_before
  return nn.module {
    self_attn = Attention(c),
    self_attn_layer_norm = norm(c),
    fc1 = nn.Linear(c.hidden_size, c.intermediate_size, c.enable_bias),
    fc2 = nn.Linear(c.intermediate_size, c.hidden_size, c.enable_bias),
    final_layer_norm = norm(c),
    feed = function(self, x) return self.fc2(act(self.fc1(x))) end,
    forward = function(self, x, pass)
      if before then
        x = add(x, self.self_attn(self.self_attn_layer_norm(x), pass))
        return add(x, self:feed(self.final_layer_norm(x)))
      end
      x = self.self_attn_layer_norm(add(x, self.self_attn(x, pass)))
      return self.final_layer_norm(add(x, self:feed(x)))
    end,
  }
end

return {
  name = "opt",
  architectures = { "OPTForCausalLM" },
  prefix = "model.decoder",
  embedding = "model.decoder.embed_tokens",
  head = "lm_head",
  buffers = { "%.decoder%.version$" },    -- in older files
  aliases = { ffn_dim = "intermediate_size", activation_function = "hidden_act" },

  --- Fills in what a config may leave unsaid (configuration_opt.py).
  defaults = function(c)
    c.word_embed_proj_dim = c.word_embed_proj_dim or c.hidden_size
    c.intermediate_size = c.intermediate_size or 3072
    c.hidden_act = c.hidden_act or "relu"
    c.max_position_embeddings = c.max_position_embeddings or 2048
    for _, key in ipairs { "do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine" } do
      if c[key] == nil then c[key] = true end
    end
  end,

  build = function(c)
    local projected = c.word_embed_proj_dim ~= c.hidden_size
    return nn.module {
      model = nn.module {
        decoder = nn.module {
          embed_tokens = nn.Embedding(c.vocab_size, c.word_embed_proj_dim),
          embed_positions = nn.PositionEmbedding(c.max_position_embeddings, c.hidden_size, FIRST_POSITION),
          project_out = projected and nn.Linear(c.hidden_size, c.word_embed_proj_dim, false) or nil,
          project_in = projected and nn.Linear(c.word_embed_proj_dim, c.hidden_size, false) or nil,
          final_layer_norm = c.do_layer_norm_before and not c._remove_final_layer_norm and norm(c) or nil,
          layers = nn.list(c.num_hidden_layers, Layer, c),
        },
      },
      lm_head = nn.Linear(c.word_embed_proj_dim, c.vocab_size, false),
      backbone = function(self, ids, pass)
        local d = self.model.decoder
        local x = d.embed_tokens(ids, pass)
        if d.project_in then x = d.project_in(x) end
        x = pass:tail(pass:through(d.layers, nn.functional.add(x, d.embed_positions(pass))))
        if d.final_layer_norm then x = d.final_layer_norm(x) end
        return d.project_out and d.project_out(x) or x
      end,
    }
  end,
}
