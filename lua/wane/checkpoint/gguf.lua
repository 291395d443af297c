--- GGUF files seen as Hugging Face checkpoints: a config.json's fields from the metadata, and how the converter arranged tensors.
-- Sources: ggml docs/gguf.md; llama.cpp's conversion/ folder (what is written and rearranged) and src/models/ (what a missing key means).
-- @module wane.checkpoint.gguf
local ffi = require "ffi"
local gguf_names = require "wane.checkpoint.gguf_names"

local M = {}

-- Metadata key (behind "<arch>.") of each config field.
local common = {
  hidden_size = "embedding_length", intermediate_size = "feed_forward_length", num_hidden_layers = "block_count",
  num_attention_heads = "attention.head_count", max_position_embeddings = "context_length",
}

--- The first of some values that is not nil.
local function either(...)
  for i = 1, select("#", ...) do
    local v = select(i, ...)
    if v ~= nil then return v end
  end
end

-- ---------------------------------------------------------------- rotary embedding

-- The values of a small f32 vector, or nil.
local function vector(ix, name)
  local e = ix:find(name)
  if not e or e.dtype ~= "f32" or #e.shape ~= 1 then return nil end
  local text = ix:bytes(e, 65536)
  if not text then return nil end
  local values, list = ffi.cast("const float *", text), {}
  for i = 0, #text / 4 - 1 do list[i + 1] = values[i] end
  return list
end

-- "rope.scaling.*" as rope_scaling. llama3's scaling is stored as a tensor of divisors of the frequencies: "longrope" with these for
-- every length, whose cos and sin are not scaled, says the same.
local function rope_scaling(ix, get)
  local factors = vector(ix, "rope_freqs.weight")
  local original = get "rope.scaling.original_context_length"
  if factors then
    return { rope_type = "longrope", short_factor = factors, long_factor = factors, attention_factor = 1,
             original_max_position_embeddings = get "context_length" }
  end
  local short, long = vector(ix, "rope_factors_short.weight"), vector(ix, "rope_factors_long.weight")
  if short and long then
    return { rope_type = "longrope", short_factor = short, long_factor = long, attention_factor = get "rope.scaling.attn_factor",
             original_max_position_embeddings = original }
  end
  local kind = get "rope.scaling.type"
  if not kind or kind == "none" or kind == "longrope" then return nil end
  return {
    rope_type = kind, factor = either(get "rope.scaling.factor", get "rope.scale_linear", 1), original_max_position_embeddings = original,
    attention_factor = either(get "rope.scaling.yarn_attn_factor", get "rope.scaling.attn_factor"),
    beta_fast = get "rope.scaling.yarn_beta_fast", beta_slow = get "rope.scaling.yarn_beta_slow",
  }
end

-- Rows of the first layer's up projection: some converters say four times the width whatever it is.
local function ffn_width(ix)
  local e = ix:find "blk.0.ffn_up.weight"
  return e and e.shape[1]
end

-- Values of a head.
local function head_width(c) return c.hidden_size / c.num_attention_heads end

-- ---------------------------------------------------------------- config.json, an architecture at a time

local build = {}

-- What all of Llama's kind have.
local function llama_like(c, get, ix, model_type, class)
  c.model_type, c.architectures = model_type, { class }
  c.num_key_value_heads = get "attention.head_count_kv" or c.num_attention_heads
  c.head_dim = get "attention.key_length" or head_width(c)
  c.rms_norm_eps = get "attention.layer_norm_rms_epsilon" or 1e-5
  c.rope_theta = get "rope.freq_base" or 10000
  c.rope_scaling = rope_scaling(ix, get)
  c.hidden_act = "silu"
end

-- Experts: how many, how many a token, and their width where the config has a name for it.
local function experts(c, get, count, width)
  c[count], c.num_experts_per_tok = get "expert_count", get "expert_used_count"
  if width then c[width] = get "expert_feed_forward_length" end
end

--- Mixtral where there are experts, Mistral where a window is said (llama.cpp's converter does not say Mistral's), else Llama.
function build.llama(c, get, ix)
  if (get "expert_count" or 0) > 0 then
    llama_like(c, get, ix, "mixtral", "MixtralForCausalLM")
    experts(c, get, "num_local_experts")
  elseif (get "attention.sliding_window" or 0) > 0 then
    llama_like(c, get, ix, "mistral", "MistralForCausalLM")
  else
    llama_like(c, get, ix, "llama", "LlamaForCausalLM")
    c.attention_bias = ix:has "blk.0.attn_q.bias"
    c.mlp_bias = ix:has "blk.0.ffn_up.bias"
  end
  c.sliding_window = get "attention.sliding_window"
end

function build.qwen2(c, get, ix)
  llama_like(c, get, ix, "qwen2", "Qwen2ForCausalLM")
end

function build.qwen3(c, get, ix)
  llama_like(c, get, ix, "qwen3", "Qwen3ForCausalLM")
  c.attention_bias = ix:has "blk.0.attn_q.bias"
end

--- Layers without a router are dense. The weights of the chosen experts are always made to sum to 1 (llama.cpp src/models/qwen3moe.cpp).
function build.qwen3moe(c, get, ix)
  llama_like(c, get, ix, "qwen3_moe", "Qwen3MoeForCausalLM")
  experts(c, get, "num_experts", "moe_intermediate_size")
  c.attention_bias = ix:has "blk.0.attn_q.bias"
  c.norm_topk_prob, c.decoder_sparse_step = true, 1
  local dense = {}
  for i = 0, (c.num_hidden_layers or 0) - 1 do
    if not ix:has(("blk.%d.ffn_gate_inp.weight"):format(i)) then dense[#dense + 1] = i end
  end
  if #dense > 0 then c.mlp_only_layers = dense end
end

-- Gemma's scale of scores: of the head's width, or of hidden_size / heads in its largest model, unless the file says it.
local function gemma(c, get, largest)
  local scale = get "attention.scale"
  c.query_pre_attn_scalar = scale and tonumber(("%.6g"):format(scale ^ -2)) or (c.num_hidden_layers == largest and head_width(c) or c.head_dim)
  c.hidden_act, c.hidden_activation = nil, "gelu_pytorch_tanh"
  c.sliding_window = get "attention.sliding_window"
  c.final_logit_softcapping = get "final_logit_softcapping"
end

function build.gemma2(c, get, ix)
  llama_like(c, get, ix, "gemma2", "Gemma2ForCausalLM")
  gemma(c, get, 46)
  c.attn_logit_softcapping = get "attn_logit_softcapping"
end

function build.gemma3(c, get, ix)
  llama_like(c, get, ix, "gemma3_text", "Gemma3ForCausalLM")
  gemma(c, get, 62)
  c.rope_theta = get "rope.freq_base" or 1e6
  c.rope_local_base_freq = get "rope.freq_base_swa" or 1e4
  c.sliding_window_pattern = get "attention.sliding_window_pattern" or 6
  if not c.sliding_window then c.sliding_window_pattern = 1 end
end

function build.phi2(c, get, ix)
  c.model_type, c.architectures = "phi", { "PhiForCausalLM" }
  c.num_key_value_heads = get "attention.head_count_kv"
  c.intermediate_size = ffn_width(ix)
  c.layer_norm_eps = get "attention.layer_norm_epsilon"
  c.partial_rotary_factor = (get "rope.dimension_count" or head_width(c)) / head_width(c)
  c.rope_theta = get "rope.freq_base" or 10000
  c.rope_scaling = rope_scaling(ix, get)
  c.hidden_act = "gelu_new"
end

function build.phi3(c, get, ix)
  llama_like(c, get, ix, "phi3", "Phi3ForCausalLM")
  c.partial_rotary_factor = (get "rope.dimension_count" or c.head_dim) / c.head_dim
  c.original_max_position_embeddings = get "rope.scaling.original_context_length"
  local window = get "attention.sliding_window"
  if window ~= 0 then c.sliding_window = window end               -- 0 is Phi-4's way to say none
end

function build.gptneox(c, get)
  c.model_type, c.architectures = "gpt_neox", { "GPTNeoXForCausalLM" }
  c.layer_norm_eps = get "attention.layer_norm_epsilon" or 1e-5
  c.rotary_emb_base = get "rope.freq_base" or 10000
  c.rotary_pct = (get "rope.dimension_count" or head_width(c)) / head_width(c)
  c.use_parallel_residual = either(get "use_parallel_residual", true)
  c.hidden_act = "gelu"
  c.attention_bias = true
end

function build.gptj(c, get, ix)
  c.model_type, c.architectures = "gptj", { "GPTJForCausalLM" }
  c.intermediate_size = ffn_width(ix)
  c.layer_norm_epsilon = get "attention.layer_norm_epsilon"
  c.rotary_dim = get "rope.dimension_count"
  c.activation_function = "gelu_new"
end

function build.gpt2(c, get, ix)
  c.model_type, c.architectures = "gpt2", { "GPT2LMHeadModel" }
  c.intermediate_size = ffn_width(ix)
  c.layer_norm_epsilon = get "attention.layer_norm_epsilon"
  c.activation_function = "gelu_new"
end

function build.bloom(c, get)
  c.model_type, c.architectures = "bloom", { "BloomForCausalLM" }
  c.layer_norm_epsilon = get "attention.layer_norm_epsilon"
end

--- Two norms: Falcon 40B and 180B. Several but fewer key-value heads than heads: Falcon 11B, of the same newer kind with one norm.
function build.falcon(c, get, ix)
  c.model_type, c.architectures = "falcon", { "FalconForCausalLM" }
  c.num_kv_heads = get "attention.head_count_kv" or 1
  c.layer_norm_epsilon = get "attention.layer_norm_epsilon"
  c.rope_theta = get "rope.freq_base" or 10000
  c.ffn_hidden_size, c.activation = ffn_width(ix), "gelu"
  c.parallel_attn, c.alibi, c.bias = true, false, ix:has "blk.0.attn_qkv.bias"
  local two = ix:has "blk.0.attn_norm_2.weight"
  c.new_decoder_architecture = two or (c.num_kv_heads > 1 and c.num_kv_heads < c.num_attention_heads)
  c.num_ln_in_parallel_attn = c.new_decoder_architecture and (two and 2 or 1) or nil
  c.multi_query = c.num_kv_heads == 1
  if two then c.gguf_names = "falcon_two_norms" end
end

--- A gate means gelu_new, none relu: llama.cpp knows no other. The largest relative distance is not in the file: all T5 have 128.
function build.t5(c, get, ix)
  local gated = ix:has "enc.blk.0.ffn_gate.weight"
  c.model_type, c.architectures, c.is_encoder_decoder = "t5", { "T5ForConditionalGeneration" }, true
  c.d_model, c.d_ff, c.num_layers, c.num_heads = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads
  c.d_kv = get "attention.key_length" or head_width(c)
  c.num_decoder_layers = get "decoder_block_count" or c.num_layers
  c.relative_attention_num_buckets = get "attention.relative_buckets_count" or 32
  c.relative_attention_max_distance = 128
  c.layer_norm_epsilon = either(get "attention.layer_norm_epsilon", get "attention.layer_norm_rms_epsilon", 1e-6)
  c.feed_forward_proj = gated and "gated-gelu" or "relu"
  c.decoder_start_token_id = get "decoder_start_token_id" or 0
  if gated then c.gguf_names = "t5_gated" end
end

-- ---------------------------------------------------------------- config

-- The metadata stores single-precision numbers: 1e-5 comes back as 9.9999997e-06. The shortest decimal of that f32 is what was meant.
local function as_written(x)
  if type(x) ~= "number" or x == math.floor(x) then return x end
  local f = ffi.new("float[1]", x)
  for digits = 1, 9 do
    local short = tonumber(("%." .. digits .. "g"):format(x))
    local g = ffi.new("float[1]", short)
    if g[0] == f[0] then return short end
  end
  return x
end

-- A key's value. A number a layer that is the same in all layers counts as that number.
local function value_of(ix, key)
  local value = ix:meta(key)
  if value ~= nil then return as_written(value) end
  local n, item = ix:array(key)
  if not n or n == 0 or type(item(1)) ~= "number" then return nil end
  for i = 2, n do if item(i) ~= item(1) then return nil end end
  return as_written(item(1))
end

--- config.json's table for a GGUF index.
-- @param ix wane.Index
-- @return table|nil config, table|string generation_config or message, string|nil code
function M.config(ix)
  local arch = ix:meta "general.architecture"
  local c = { gguf_architecture = arch, gguf_names = arch }
  if not arch then return c, {} end
  local function get(key) return value_of(ix, arch .. "." .. key) end
  for field, key in pairs(common) do c[field] = get(key) end
  if type(c.num_hidden_layers) == "number" and c.num_hidden_layers > ix:count() and ix:count() > 0 then
    return nil, ("'%s': metadata key '%s.block_count' promises %.0f layers, the file has %d tensors: damaged"):format(
      ix.path, arch, c.num_hidden_layers, ix:count()), "WANE_E_FORMAT"
  end
  c.vocab_size = get "vocab_size" or ix:array "tokenizer.ggml.tokens"
  local embedding = ix:find "token_embd.weight"
  if embedding and embedding.shape[1] then c.vocab_size = embedding.shape[1] end
  c.tie_word_embeddings = not ix:has "output.weight"
  for field, key in pairs { bos_token_id = "bos", eos_token_id = "eos", pad_token_id = "padding" } do
    c[field] = ix:meta("tokenizer.ggml." .. key .. "_token_id")
  end
  c.model_type = arch
  if build[arch] and type(c.hidden_size) == "number" and type(c.num_attention_heads) == "number" then
    build[arch](c, get, ix)
  end
  local generation = { bos_token_id = c.bos_token_id, eos_token_id = c.eos_token_id, pad_token_id = c.pad_token_id,
                       decoder_start_token_id = c.decoder_start_token_id }
  return c, generation
end

-- ---------------------------------------------------------------- tensors

-- How the converter rearranged rows: part of a name -> kind, by architecture. Heads: all of them, or the key-value ones.
local arranged = {
  llama = { attn_q = { "rope", "num_attention_heads" }, attn_k = { "rope", "num_key_value_heads" } },
  gptneox = { attn_qkv = { "qkv", "num_attention_heads", "num_attention_heads" } },
  bloom = { attn_qkv = { "qkv", "num_attention_heads", "num_attention_heads" } },
  falcon = { attn_qkv = { "qkv", "num_attention_heads", "num_kv_heads" } },
}

-- Norm weights that are stored as 1 + weight.
local shifted = { gemma2 = true, gemma3 = true }

-- Cuts one of `pieces` equal pieces of rows out of an entry. Blocks of values never cross rows, so a piece has whole ones.
local function cut(e, place)
  local shape, pieces, piece = e.shape, place.parts, place.part
  if place.expert then
    if #shape ~= 3 or place.expert >= shape[1] then
      return ("tensor '%s' was expected to hold expert %d of several, found [%s]"):format(e.file_name, place.expert, table.concat(shape, ", "))
    end
    shape = { shape[2], shape[3] }
    pieces, piece = pieces * e.shape[1], piece + place.parts * place.expert
  end
  if not shape[1] or shape[1] % place.parts ~= 0 then
    return ("tensor '%s' cannot be cut in %d equal parts"):format(e.file_name, place.parts)
  end
  e.shape = { shape[1] / place.parts, shape[2] }
  e.bytes, e.piece, e.pieces = e.bytes / pieces, piece, pieces
end

--- The entry of a canonical name, as Checkpoint:find gives it: also `arrange`, `heads`, `kv_heads` (how the rows were moved),
-- `piece` and `pieces` (which of the equal pieces of the stored tensor), `shift` (to be added to the values). nil if the file has none.
-- @param config table of M.config
-- @param ix wane.Index
-- @param name string canonical
-- @return table|nil
function M.find(config, ix, name)
  for _, place in ipairs(gguf_names.places(config.gguf_names, name)) do
    local e = ix:find(place.name)
    if e then
      e.file_name, e.name = e.name, name
      local part = place.name:match "^blk%.%d+%.(attn_%w+)%."
      local rule = part and (arranged[config.gguf_architecture] or {})[part]
      if rule then e.arrange, e.heads, e.kv_heads = rule[1], config[rule[2]], config[rule[3]] end
      if shifted[config.gguf_architecture] and place.name:find "norm%.weight$" then e.shift = -1 end
      if place.expert or place.parts > 1 then e.invalid = cut(e, place) end
      local scale, weights = place.name:gsub("%.weight$", ".scale")
      if weights == 1 and ix:has(scale) then e.invalid = ("'%s' multiplies '%s' once more, which wane does not do"):format(scale, place.name) end
      return e
    end
  end
end

--- Canonical names of all weights, in the order of the file; an expert each where a tensor holds several.
-- @param config table of M.config
-- @param ix wane.Index
-- @return string[]
function M.names(config, ix)
  local list = {}
  for i = 0, ix:count() - 1 do
    local e = ix:entry(i)
    if not gguf_names.is_other(e.name) then
      for _, name in ipairs(gguf_names.canonical(config.gguf_names, e.name, e.shape)) do list[#list + 1] = name end
    end
  end
  return list
end

return M
