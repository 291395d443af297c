--- The tokenizer that a GGUF file's metadata describes. Byte-level BPE files (tokenizer.ggml.model "gpt2") name their pre-tokenizer in
-- tokenizer.ggml.pre, SentencePiece's BPE ("llama") carries scores. Where llama.cpp and Hugging Face differ (Qwen's NFC), the
-- model's own tokenizer.json is followed.
-- Sources: llama.cpp llama-vocab.cpp (names and patterns), transformers integrations/ggml.py.
-- @module wane.tokenizer.gguf
local pipeline = require "wane.tokenizer.pipeline"
local M = {}

local GPT2 = pipeline.GPT2_PATTERN
local LLAMA3 = [[(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+]]
local QWEN2 = LLAMA3:gsub("{1,3}", "", 1)
local TEKKEN = [=[[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|]=] ..
  [=[[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+]=]
local BLOOM = [=[ ?[^(\s|.,!?…。，、।۔،)]+]=]
local DIGIT = [[\p{N}]]
local DEEPSEEK3 = [=[[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+]=]

-- Patterns that cut one after the other; the pieces between matches stay (Isolated).
local gpt2, starcoder = { GPT2 }, { DIGIT, GPT2 }
local llama3, qwen2, bloom = { LLAMA3, ignore_merges = true }, { QWEN2, nfc = true }, { BLOOM }
local families = {
  ["gpt-2"] = gpt2, ["phi-2"] = gpt2, mpt = gpt2, jais = gpt2, gigachat = gpt2, ["roberta-bpe"] = gpt2, ["jina-es"] = gpt2, ["jina-de"] = gpt2,
  ["jina-v1-en"] = gpt2, ["jina-v2-es"] = gpt2, ["jina-v2-de"] = gpt2, ["jina-v2-code"] = gpt2,
  olmo = { GPT2, nfc = true },
  -- llama.cpp (and SmolLM's own tokenizer.json) cut digits out first; transformers' GGUF loader, which the golden data of SmolLM2
  -- come from, does not. They differ where blanks stand before a digit ("   1").
  smollm = gpt2,
  starcoder = starcoder, refact = starcoder, ["command-r"] = starcoder, codeshell = starcoder, exaone = starcoder, ["minerva-7b"] = starcoder,
  ["llama-bpe"] = llama3, llama3 = llama3, ["llama-v3"] = llama3, falcon3 = llama3,
  dbrx = { LLAMA3 }, ["smaug-bpe"] = { LLAMA3 }, ["chatglm-bpe"] = { LLAMA3 },
  qwen2 = qwen2, ["deepseek-r1-qwen"] = qwen2, megrez = qwen2, stablelm2 = qwen2,
  bloom = bloom, ["poro-chat"] = bloom, ["gpt3-finnish"] = bloom, viking = { BLOOM, DIGIT },
  tekken = { TEKKEN, ignore_merges = true },
  falcon = { [=[[\p{P}\$\+<=>\^~\|`]+]=], GPT2, "[0-9][0-9][0-9]" },
  ["deepseek-v3"] = { [[\p{N}{1,3}]], "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3 },
  default = { [=[[\p{P}\$\+<=>\^~\|]+]=], GPT2, [[\p{N}+]], "[0-9][0-9][0-9]" },
}

local function known()
  local names = {}
  for name in pairs(families) do names[#names + 1] = name end
  table.sort(names)
  return table.concat(names, ", ")
end

local function byte_level(family)
  local members = {}
  for i, pattern in ipairs(family) do members[i] = { type = "Split", pattern = { Regex = pattern }, behavior = "Isolated" } end
  members[#members + 1] = { type = "ByteLevel", add_prefix_space = false, use_regex = false }
  return {
    normalizer = family.nfc and { type = "NFC" } or nil,
    pre_tokenizer = { type = "Sequence", pretokenizers = members },
    decoder = { type = "ByteLevel" },
  }, { ignore_merges = family.ignore_merges }
end

local function sentencepiece(add_space)
  local decode = { { type = "Replace", pattern = { String = "▁" }, content = " " }, { type = "ByteFallback" }, { type = "Fuse" } }
  local normalize = { { type = "Replace", pattern = { String = " " }, content = "▁" } }
  if add_space then
    decode[4] = { type = "Strip", content = " ", start = 1, stop = 0 }
    table.insert(normalize, 1, { type = "Prepend", prepend = "▁" })
  end
  return {
    normalizer = { type = "Sequence", normalizers = normalize },
    decoder = { type = "Sequence", decoders = decode },
  }, { byte_fallback = true, fuse_unk = true, use_scores = true }
end

--- An id from the metadata, if it names a token.
local function id_of(meta, key, size)
  local id = meta["tokenizer.ggml." .. key]
  if type(id) == "number" and id >= 0 and id < size and id == math.floor(id) then return id end
end

local function flag(meta, key, default)
  local value = meta["tokenizer.ggml." .. key]
  if type(value) == "boolean" then return value end
  return default
end

--- Settings of a GGUF tokenizer.
-- @param meta table the keys "tokenizer.…"
-- @param info cdata wane_vocab_info
-- @return table {settings, model, template, bos_id, eos_id (list), pad_id, unk_id, chat_template}
function M.describe(meta, info)
  local model, size = meta["tokenizer.ggml.model"], tonumber(info.size)
  local settings, flags
  local r = { bos_id = id_of(meta, "bos_token_id", size), pad_id = id_of(meta, "padding_token_id", size), unk_id = id_of(meta, "unknown_token_id", size) }
  local eos = id_of(meta, "eos_token_id", size)
  local add_bos = false
  if model == "gpt2" then
    if info.merges == 0 then pipeline.refuse("WANE_E_FORMAT", "tokenizer.ggml.merges is missing") end
    local pre = meta["tokenizer.ggml.pre"] or "default"
    local family = type(pre) == "string" and families[pre]
    if not family then
      pipeline.refuse("WANE_E_UNSUPPORTED", "the pre-tokenizer '%s' (tokenizer.ggml.pre) is not known; there are: %s", tostring(pre), known())
    end
    settings, flags = byte_level(family)
    add_bos = family == llama3 or pre == "tekken"
  elseif model == "llama" then
    settings, flags = sentencepiece(flag(meta, "add_space_prefix", true))
    add_bos = true
    r.bos_id, eos, r.unk_id = r.bos_id or (size > 1 and 1 or nil), eos or (size > 2 and 2 or nil), r.unk_id or 0
  else
    pipeline.refuse("WANE_E_UNSUPPORTED", "a GGUF tokenizer of model '%s' is not supported yet; 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE) are",
      tostring(model))
  end
  local eot = id_of(meta, "eot_token_id", size)
  r.eos_id = { eos }
  if eot and eot ~= eos then r.eos_id[#r.eos_id + 1] = eot end
  r.settings, r.flags = settings, flags
  -- Byte-level BPE has a token for every byte; its unknown token is never produced.
  r.model_unk = model == "llama" and r.unk_id or nil
  r.template = pipeline.bracket(flag(meta, "add_bos_token", add_bos) and r.bos_id or nil, flag(meta, "add_eos_token", false) and eos or nil)
  local template = meta["tokenizer.chat_template"]
  r.chat_template = type(template) == "string" and template or nil
  return r
end

return M
