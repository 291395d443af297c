--- T5 and flan-T5: an encoder and a decoder, relative position bias, feed-forward gated or not, output layer tied or not.
-- Source of names and formulas: transformers 4 modeling_t5.py. Raffel et al. 2020; Chung et al. 2022.
local nn = require "wane.nn"
local F = nn.functional

-- q, k, v and o, all without bias; the inner width heads * d_kv need not be d_model. Scores are not scaled.
local function projections(c, fields)
  local inner = c.num_attention_heads * c.d_kv
  for _, name in ipairs { "q", "k", "v" } do fields[name] = nn.Linear(c.hidden_size, inner, false) end
  fields.o = nn.Linear(inner, c.hidden_size, false)
  return nn.module(fields)
end

local function SelfAttention(c, decoder, first)
  local H = c.num_attention_heads
  return projections(c, {
    -- The first block holds the bias that all blocks of its stack use.
    relative_attention_bias = first and nn.RelativeBias(c.relative_attention_num_buckets, H, c.relative_attention_max_distance, not decoder) or nil,
    forward = function(self, x, pass, bias)
      local q, k, v = pass:heads(H, self.q(x)), pass:heads(H, self.k(x)), pass:heads(H, self.v(x))
      return self.o(pass:attend(q, k, v, { scale = 1, bias = bias, causal = decoder }))
    end,
  })
end

local function EncDecAttention(c)
  local H = c.num_attention_heads
  return projections(c, {
    forward = function(self, x, pass)
      local function project(source) return source:heads(H, self.k(source.states)), source:heads(H, self.v(source.states)) end
      return self.o(pass:attend_source(pass:heads(H, self.q(x)), project, { scale = 1 }))
    end,
  })
end

local function DenseReluDense(c)
  if not c.is_gated_act then
    local act = nn.activation(c.dense_act_fn)
    return nn.module {
      wi = nn.Linear(c.hidden_size, c.d_ff, false),
      wo = nn.Linear(c.d_ff, c.hidden_size, false),
      forward = function(self, x) return self.wo(act(self.wi(x))) end,
    }
  end
  local gated = nn.gate(c.dense_act_fn)
  return nn.module {
    wi_0 = nn.Linear(c.hidden_size, c.d_ff, false),
    wi_1 = nn.Linear(c.hidden_size, c.d_ff, false),
    wo = nn.Linear(c.d_ff, c.hidden_size, false),
    forward = function(self, x) return self.wo(gated(self.wi_0(x), self.wi_1(x))) end,
  }
end

-- One sublayer: x + inner(norm(x)), the inner module under its own name.
local function Sublayer(c, name, inner)
  return nn.module {
    [name] = inner,
    layer_norm = nn.RMSNorm(c.hidden_size, c.layer_norm_epsilon),
    forward = function(self, x, pass, bias) return F.add(x, self[name](self.layer_norm(x), pass, bias)) end,
  }
end

local function Block(i, c, decoder)
  local parts = { { "SelfAttention", SelfAttention(c, decoder, i == 0) } }
  if decoder then parts[2] = { "EncDecAttention", EncDecAttention(c) } end
  parts[#parts + 1] = { "DenseReluDense", DenseReluDense(c) }
  return nn.module {
    layer = nn.list(#parts, function(k) return Sublayer(c, unpack(parts[k + 1])) end),
    forward = function(self, x, pass, bias)
      for _, sublayer in ipairs(self.layer) do x = sublayer(x, pass, bias) end
      return x
    end,
  }
end

local function Stack(c, layers, decoder)
  return nn.module {
    block = nn.list(layers, Block, c, decoder),
    final_layer_norm = nn.RMSNorm(c.hidden_size, c.layer_norm_epsilon),
    forward = function(self, x, pass)
      local bias = self.block[1].layer[1].SelfAttention.relative_attention_bias(pass)
      return self.final_layer_norm(pass:tail(pass:through(self.block, x, bias)))
    end,
  }
end

return {
  name = "t5",
  architectures = { "T5ForConditionalGeneration", "T5WithLMHeadModel" },
  aliases = { d_model = "hidden_size", num_layers = "num_hidden_layers", num_heads = "num_attention_heads" },
  embedding = "shared",
  head = "lm_head",
  keep = { "wo" },
  buffers = { "%.EncDecAttention%.relative_attention_bias%.weight$" },     -- in older files; no version reads it
  spellings = { shared = { "encoder.embed_tokens", "decoder.embed_tokens", "lm_head" } },     -- files may hold any one, or several

  --- Fills in what a config may leave unsaid (configuration_t5.py).
  defaults = function(c)
    c.d_kv = c.d_kv or 64
    c.d_ff = c.d_ff or 2048
    c.num_decoder_layers = c.num_decoder_layers or c.num_hidden_layers
    c.relative_attention_num_buckets = c.relative_attention_num_buckets or 32
    c.relative_attention_max_distance = c.relative_attention_max_distance or 128
    c.layer_norm_epsilon = c.layer_norm_epsilon or 1e-6
    local gated, act = (c.feed_forward_proj or "relu"):match "^(gated%-)(.*)$"
    c.is_gated_act, c.dense_act_fn = gated ~= nil, act or c.feed_forward_proj or "relu"
    if gated and act == "gelu" then c.dense_act_fn = "gelu_new" end
    c.pad_token_id = c.pad_token_id or 0
    c.eos_token_id = c.eos_token_id or 1
    -- Version 4 had one flag for tying and for scaling; version 5 writes the second, and may call a separate head tied.
    if c.tie_word_embeddings == nil then c.tie_word_embeddings = true end
    if c.scale_decoder_outputs == nil then c.scale_decoder_outputs = c.tie_word_embeddings end
  end,

  build = function(c)
    return nn.module {
      shared = nn.Embedding(c.vocab_size, c.hidden_size),
      encoder = Stack(c, c.num_hidden_layers, false),
      decoder = Stack(c, c.num_decoder_layers, true),
      lm_head = nn.Linear(c.hidden_size, c.vocab_size, false),
      encode = function(self, ids, pass) return self.encoder(self.shared(ids, pass), pass) end,
      backbone = function(self, ids, pass)
        local x = self.decoder(self.shared(ids, pass), pass)
        return c.scale_decoder_outputs and F.scale(x, c.hidden_size ^ -0.5) or x
      end,
    }
  end,
}
