--- GGUF's names of tensors and the canonical ones (transformers 4's), one table an architecture.
-- Sources: llama.cpp gguf-py/gguf/constants.py and tensor_mapping.py; the classes of its conversion/ folder, which rearrange.
--
-- A table maps GGUF's stem (the name without ".weight" or ".bias") to the canonical one. `blk` lists those behind "blk.<layer>.", its
-- first item being the canonical path of the layer. "%e" stands for an expert: the tensor holds those of all experts, one after another.
-- A list of names: the tensor's rows are cut in as many equal parts.
-- @module wane.checkpoint.gguf_names
local M = {}

-- A copy of a table with some entries more.
local function with(base, more)
  local copy = {}
  for k, v in pairs(base) do copy[k] = v end
  for k, v in pairs(more) do copy[k] = type(v) == "table" and type(copy[k]) == "table" and with(copy[k], v) or v end
  return copy
end

local architectures = {}

-- Llama, Mistral and Mixtral are one architecture.
architectures.llama = {
  token_embd = "model.embed_tokens", output_norm = "model.norm", output = "lm_head",
  blk = { "model.layers.%d.",
    attn_norm = "input_layernorm", attn_q = "self_attn.q_proj", attn_k = "self_attn.k_proj", attn_v = "self_attn.v_proj", attn_output = "self_attn.o_proj",
    ffn_norm = "post_attention_layernorm", ffn_gate = "mlp.gate_proj", ffn_up = "mlp.up_proj", ffn_down = "mlp.down_proj",
    ffn_gate_inp = "block_sparse_moe.gate", ffn_gate_exps = "block_sparse_moe.experts.%e.w1", ffn_down_exps = "block_sparse_moe.experts.%e.w2",
    ffn_up_exps = "block_sparse_moe.experts.%e.w3", ffn_gate_up_exps = { "block_sparse_moe.experts.%e.w1", "block_sparse_moe.experts.%e.w3" },
  },
}

architectures.qwen2 = architectures.llama

architectures.qwen3 = with(architectures.llama, { blk = { attn_q_norm = "self_attn.q_norm", attn_k_norm = "self_attn.k_norm" } })

architectures.qwen3moe = with(architectures.qwen3, { blk = {
  ffn_gate_inp = "mlp.gate", ffn_gate_exps = "mlp.experts.%e.gate_proj", ffn_up_exps = "mlp.experts.%e.up_proj", ffn_down_exps = "mlp.experts.%e.down_proj",
  ffn_gate_up_exps = { "mlp.experts.%e.gate_proj", "mlp.experts.%e.up_proj" },
} })

architectures.gemma2 = with(architectures.llama, { blk = {
  post_attention_norm = "post_attention_layernorm", ffn_norm = "pre_feedforward_layernorm", post_ffw_norm = "post_feedforward_layernorm",
} })

architectures.gemma3 = with(architectures.gemma2, { blk = { attn_q_norm = "self_attn.q_norm", attn_k_norm = "self_attn.k_norm" } })

architectures.phi2 = {
  token_embd = "model.embed_tokens", output_norm = "model.final_layernorm", output = "lm_head",
  blk = { "model.layers.%d.",
    attn_norm = "input_layernorm", attn_q = "self_attn.q_proj", attn_k = "self_attn.k_proj", attn_v = "self_attn.v_proj", attn_output = "self_attn.dense",
    attn_qkv = { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj" }, ffn_up = "mlp.fc1", ffn_down = "mlp.fc2",
  },
}

architectures.phi3 = with(architectures.llama, { blk = { attn_qkv = "self_attn.qkv_proj", ffn_up = "mlp.gate_up_proj" } })

architectures.gptneox = {
  token_embd = "gpt_neox.embed_in", output_norm = "gpt_neox.final_layer_norm", output = "embed_out",
  blk = { "gpt_neox.layers.%d.",
    attn_norm = "input_layernorm", attn_qkv = "attention.query_key_value", attn_output = "attention.dense",
    ffn_norm = "post_attention_layernorm", ffn_up = "mlp.dense_h_to_4h", ffn_down = "mlp.dense_4h_to_h",
  },
}

architectures.gptj = {
  token_embd = "transformer.wte", output_norm = "transformer.ln_f", output = "lm_head",
  blk = { "transformer.h.%d.",
    attn_norm = "ln_1", attn_q = "attn.q_proj", attn_k = "attn.k_proj", attn_v = "attn.v_proj", attn_output = "attn.out_proj",
    ffn_up = "mlp.fc_in", ffn_down = "mlp.fc_out",
  },
}

-- The converter has turned GPT-2's [in, out] matrices, so they lie as a Linear wants them.
architectures.gpt2 = {
  token_embd = "transformer.wte", position_embd = "transformer.wpe", output_norm = "transformer.ln_f", output = "lm_head",
  blk = { "transformer.h.%d.",
    attn_norm = "ln_1", attn_qkv = "attn.c_attn", attn_output = "attn.c_proj", ffn_norm = "ln_2", ffn_up = "mlp.c_fc", ffn_down = "mlp.c_proj",
  },
}

architectures.bloom = {
  token_embd = "transformer.word_embeddings", token_embd_norm = "transformer.word_embeddings_layernorm", output_norm = "transformer.ln_f", output = "lm_head",
  blk = { "transformer.h.%d.",
    attn_norm = "input_layernorm", attn_qkv = "self_attention.query_key_value", attn_output = "self_attention.dense",
    ffn_norm = "post_attention_layernorm", ffn_up = "mlp.dense_h_to_4h", ffn_down = "mlp.dense_4h_to_h",
  },
}

architectures.falcon = {
  token_embd = "transformer.word_embeddings", output_norm = "transformer.ln_f", output = "lm_head",
  blk = { "transformer.h.%d.",
    attn_norm = "input_layernorm", attn_qkv = "self_attention.query_key_value", attn_output = "self_attention.dense",
    ffn_up = "mlp.dense_h_to_4h", ffn_down = "mlp.dense_4h_to_h",
  },
}

-- Falcon 40B and 180B: a norm each for attention and feed-forward.
architectures.falcon_two_norms = with(architectures.falcon, { blk = { attn_norm = "ln_mlp", attn_norm_2 = "ln_attn" } })

-- Both stacks of T5; `blk` of the others is "enc.blk." and "dec.blk." here.
architectures.t5 = {
  token_embd = "shared", ["enc.output_norm"] = "encoder.final_layer_norm", ["dec.output_norm"] = "decoder.final_layer_norm", output = "lm_head",
  ["enc.blk"] = { "encoder.block.%d.layer.",
    attn_norm = "0.layer_norm", attn_q = "0.SelfAttention.q", attn_k = "0.SelfAttention.k", attn_v = "0.SelfAttention.v", attn_o = "0.SelfAttention.o",
    attn_rel_b = "0.SelfAttention.relative_attention_bias", ffn_norm = "1.layer_norm", ffn_up = "1.DenseReluDense.wi", ffn_down = "1.DenseReluDense.wo",
  },
  ["dec.blk"] = { "decoder.block.%d.layer.",
    attn_norm = "0.layer_norm", attn_q = "0.SelfAttention.q", attn_k = "0.SelfAttention.k", attn_v = "0.SelfAttention.v", attn_o = "0.SelfAttention.o",
    attn_rel_b = "0.SelfAttention.relative_attention_bias", cross_attn_norm = "1.layer_norm", cross_attn_q = "1.EncDecAttention.q",
    cross_attn_k = "1.EncDecAttention.k", cross_attn_v = "1.EncDecAttention.v", cross_attn_o = "1.EncDecAttention.o",
    ffn_norm = "2.layer_norm", ffn_up = "2.DenseReluDense.wi", ffn_down = "2.DenseReluDense.wo",
  },
}

architectures.t5_gated = with(architectures.t5, {
  ["enc.blk"] = { ffn_gate = "1.DenseReluDense.wi_0", ffn_up = "1.DenseReluDense.wi_1" },
  ["dec.blk"] = { ffn_gate = "2.DenseReluDense.wi_0", ffn_up = "2.DenseReluDense.wi_1" },
})

-- What files carry besides weights: the config is made from some of it.
local other = { ["rope_freqs.weight"] = true, ["rope_factors_long.weight"] = true, ["rope_factors_short.weight"] = true }

-- ---------------------------------------------------------------- both ways

-- canonical stem ("%d" the layer, "%e" the expert) -> places { stem with "%d", part (from 0), parts, experts }
local function inverse(map)
  local places = {}
  local function add(canonical, place)
    places[canonical] = places[canonical] or {}
    table.insert(places[canonical], place)
  end
  local function enter(stem, long, prefix)
    local list = type(long) == "table" and long or { long }
    for i, name in ipairs(list) do
      add(prefix .. name, { stem = stem, part = i - 1, parts = #list, experts = name:find("%e", 1, true) ~= nil })
    end
  end
  for stem, long in pairs(map) do
    if type(long) == "table" then
      for short, inner in pairs(long) do
        if short ~= 1 then enter(stem .. ".%d." .. short, inner, long[1]) end
      end
    else
      enter(stem, long, "")
    end
  end
  return places
end

local inverses = {}
for name, map in pairs(architectures) do inverses[name] = inverse(map) end

--- Is this no weight (a buffer, or what the config is made from)?
function M.is_other(name) return other[name] or name:find "%.attn_rot_embd%." ~= nil or name:find "%.attn_rot_embd$" ~= nil end

--- Where a canonical tensor may lie in the file.
-- @param names string a table of this file
-- @param name string canonical
-- @return table[] places { name (GGUF's), part (from 0) of parts equal ones; expert (from 0) of those that lie there together, or nil };
--   one place of that very name where it is not known
function M.places(names, name)
  local stem, suffix = name:match "^(.*)%.(%a+)$"
  local map = inverses[names]
  if not stem or not map then return { { name = name, part = 0, parts = 1 } } end
  local layer, expert
  local generic = stem:gsub("^(.-%.)(%d+)(%.)", function(before, number, after) layer = number return before .. "%d" .. after end, 1)
  local found = map[stem] or map[generic]
  if not found then
    generic = generic:gsub("(%.experts%.)(%d+)(%.)", function(before, number, after) expert = tonumber(number) return before .. "%e" .. after end, 1)
    found = map[generic] or {}
  end
  local list = {}
  for i, place in ipairs(found) do
    list[i] = { name = place.stem:gsub("%%d", layer or "") .. "." .. suffix, part = place.part, parts = place.parts, expert = expert }
  end
  return #list > 0 and list or { { name = name, part = 0, parts = 1 } }
end

--- The canonical names of what a tensor of the file holds; its own name where it is not known.
-- @param names string a table of this file
-- @param name string GGUF's
-- @param shape table its sizes: the first is the number of experts where it holds those of all
-- @return string[]
function M.canonical(names, name, shape)
  local map = architectures[names]
  local stem, suffix = name:match "^(.*)%.(%a+)$"
  if not map or not stem then return { name } end
  local block, layer, short = stem:match "^(.*blk)%.(%d+)%.([%w_]+)$"
  local inner = block and map[block]
  local long = type(inner) == "table" and inner[short] or not block and map[stem]
  if not long then return { name } end
  local list = {}
  for _, part in ipairs(type(long) == "table" and long or { long }) do
    local full = (block and inner[1]:format(layer) or "") .. part .. "." .. suffix
    if full:find("%e", 1, true) then
      for e = 0, (shape[1] or 0) - 1 do list[#list + 1] = full:gsub("%%e", e) end
    else
      list[#list + 1] = full
    end
  end
  return list
end

return M
