--- GGUF files seen as Hugging Face checkpoints: a config.json's fields from the metadata, and how the converter arranged rows.
-- Sources: ggml docs/gguf.md, llama.cpp convert_hf_to_gguf.py, transformers modeling_gguf_pytorch_utils.py.
-- @module wane.checkpoint.gguf
local names = require "wane.checkpoint.names"

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

-- "rope.scaling.*" as rope_scaling. llama3's scaling is stored as a tensor of divisors of the frequencies: "longrope" with these for
-- every length, whose cos and sin are not scaled, says the same.
local function rope_scaling(ix, get)
  local kind = get "rope.scaling.type"
  local factors = ix:find "rope_freqs.weight"
  if factors and factors.dtype == "f32" and #factors.shape == 1 then
    local text = ix:bytes(factors, 65536)
    local list = {}
    if text then
      local values = require("ffi").cast("const float *", text)
      for i = 0, #text / 4 - 1 do list[i + 1] = values[i] end
      return { rope_type = "longrope", short_factor = list, long_factor = list, attention_factor = 1,
               original_max_position_embeddings = get "context_length" }
    end
  end
  if not kind or kind == "none" then return nil end
  return {
    rope_type = kind, factor = either(get "rope.scaling.factor", get "rope.scale_linear", 1),
    original_max_position_embeddings = get "rope.scaling.original_context_length", attention_factor = get "rope.scaling.attn_factor",
  }
end

local build = {}

function build.llama(c, get, ix)
  c.model_type, c.architectures = "llama", { "LlamaForCausalLM" }
  c.num_key_value_heads = get "attention.head_count_kv" or c.num_attention_heads
  c.head_dim = get "attention.key_length" or c.hidden_size / c.num_attention_heads
  c.rms_norm_eps = get "attention.layer_norm_rms_epsilon" or 1e-5
  c.rope_theta = get "rope.freq_base" or 10000
  c.rope_scaling = rope_scaling(ix, get)
  c.hidden_act = "silu"
  c.attention_bias = ix:has "blk.0.attn_q.bias"
  c.mlp_bias = ix:has "blk.0.ffn_up.bias"
end

function build.gptneox(c, get)
  c.model_type, c.architectures = "gpt_neox", { "GPTNeoXForCausalLM" }
  c.layer_norm_eps = get "attention.layer_norm_epsilon" or 1e-5
  c.rotary_emb_base = get "rope.freq_base" or 10000
  c.rotary_pct = (get "rope.dimension_count" or c.hidden_size / c.num_attention_heads) / (c.hidden_size / c.num_attention_heads)
  c.use_parallel_residual = either(get "use_parallel_residual", true)
  c.hidden_act = "gelu"
  c.attention_bias = true
end

-- The metadata stores single-precision numbers: 1e-5 comes back as 9.9999997e-06. The shortest decimal of that f32 is what was meant.
local function as_written(x)
  if type(x) ~= "number" or x == math.floor(x) then return x end
  local f = require("ffi").new("float[1]", x)
  for digits = 1, 9 do
    local short = tonumber(("%." .. digits .. "g"):format(x))
    local g = require("ffi").new("float[1]", short)
    if g[0] == f[0] then return short end
  end
  return x
end

--- config.json's table for a GGUF index.
-- @param ix wane.Index
-- @return table config, table generation_config
function M.config(ix)
  local arch = ix:meta "general.architecture"
  local function get(key) return as_written(ix:meta(arch .. "." .. key)) end
  local c = { gguf_architecture = arch }
  if not arch then return c, {} end
  for field, key in pairs(common) do c[field] = get(key) end
  c.vocab_size = get "vocab_size" or ix:array "tokenizer.ggml.tokens"
  local embedding = ix:find "token_embd.weight"
  if embedding and embedding.shape[1] then c.vocab_size = embedding.shape[1] end
  c.tie_word_embeddings = not ix:has "output.weight"
  for field, key in pairs { bos_token_id = "bos", eos_token_id = "eos", pad_token_id = "padding" } do
    c[field] = ix:meta("tokenizer.ggml." .. key .. "_token_id")
  end
  c.model_type = arch
  if build[arch] and c.hidden_size and c.num_attention_heads then build[arch](c, get, ix) end
  local generation = { bos_token_id = c.bos_token_id, eos_token_id = c.eos_token_id, pad_token_id = c.pad_token_id }
  return c, generation
end

--- How the rows of a tensor have to be put back: "rope" and a number of heads, "qkv" and a number of heads, or nil.
-- @param config table from M.config
-- @param name string GGUF's name
function M.arrangement(config, name)
  local part = name:match "^blk%.%d+%.(attn_%w+)%."
  if config.gguf_architecture == "llama" then
    if part == "attn_q" then return "rope", config.num_attention_heads end
    if part == "attn_k" then return "rope", config.num_key_value_heads end
  elseif config.gguf_architecture == "gptneox" and part == "attn_qkv" then
    return "qkv", config.num_attention_heads
  end
end

--- Canonical name of a GGUF tensor.
function M.canonical(config, name) return names.from_gguf(config.gguf_architecture, name) end

return M
