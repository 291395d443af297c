--- A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json, for folders made from GGUF files.
-- Byte-level BPE only: a SentencePiece model's merges are not in its GGUF file.
-- @module wane.checkpoint.tokenizer
local json = require "wane.checkpoint.json"
local writer = require "wane.checkpoint.writer"

local M = {}

-- Token types of the metadata.
local CONTROL, USER_DEFINED = 3, 4

-- The scalar keys that describe the tokenizer.
local function metadata(ix)
  local meta = {}
  for _, key in ipairs(ix:keys()) do
    if key:find "^tokenizer%." then meta[key] = ix:meta(key) end
  end
  return meta
end

-- '"a": 0,' … and the tokens that are no part of the merging.
local function vocabulary(count, token, kind)
  local vocab, added = {}, {}
  for i = 1, count do
    local text = json.string(token(i))
    vocab[i] = text .. ":" .. ("%d"):format(i - 1)
    local type_ = kind and kind(i)
    if type_ == CONTROL or type_ == USER_DEFINED then
      added[#added + 1] = ('{"id":%d,"content":%s,"single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":%s}'):format(
        i - 1, text, tostring(type_ == CONTROL))
    end
  end
  return table.concat(vocab, ","), table.concat(added, ",")
end

-- TemplateProcessing for the ids that stand around a text, or null.
local function post_processor(template, token)
  local single, specials = {}, {}
  for i, piece in ipairs(template.single) do
    if piece.ids then
      local text = token(piece.ids[1] + 1)
      single[i] = { SpecialToken = { id = text, type_id = 0 } }
      specials[text] = { id = text, ids = { piece.ids[1] }, tokens = { text } }
    else
      single[i] = { Sequence = { id = "A", type_id = 0 } }
    end
  end
  if not next(specials) then return "null" end
  local pair = {}
  for i, piece in ipairs(single) do pair[i] = piece end
  for _, piece in ipairs(single) do
    pair[#pair + 1] = piece.Sequence and { Sequence = { id = "B", type_id = 1 } } or { SpecialToken = { id = piece.SpecialToken.id, type_id = 1 } }
  end
  return json.encode { type = "TemplateProcessing", single = single, pair = pair, special_tokens = specials }
end

--- Writes tokenizer.json and tokenizer_config.json.
-- @param ix wane.Index of a GGUF file
-- @param dir string
-- @return true|nil, string|nil message, string|nil code
function M.write(ix, dir)
  local count, token = ix:array "tokenizer.ggml.tokens"
  local merge_count, merge = ix:array "tokenizer.ggml.merges"
  if not count then return nil, "the GGUF file holds no tokenizer", "WANE_E_NOTFOUND" end
  if ix:meta "tokenizer.ggml.model" ~= "gpt2" or not merge_count then
    return nil, ("a GGUF tokenizer of model '%s' cannot be written as tokenizer.json"):format(tostring(ix:meta "tokenizer.ggml.model")), "WANE_E_UNSUPPORTED"
  end
  local pipeline = require "wane.tokenizer.pipeline"
  local r, message, code = pipeline.protect(require("wane.tokenizer.gguf").describe, metadata(ix), { size = count, merges = merge_count })
  if not r then return nil, message, code end
  local _, kind = ix:array "tokenizer.ggml.token_type"
  local vocab, added = vocabulary(count, token, kind)
  local merges = {}
  for i = 1, merge_count do merges[i] = json.string(merge(i)) end
  local function part(name) return r.settings[name] and json.encode(r.settings[name]) or "null" end
  local ok
  ok, message, code = writer.write_text(dir .. "/tokenizer.json", table.concat {
    '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[', added, '],"normalizer":', part "normalizer",
    ',"pre_tokenizer":', part "pre_tokenizer", ',"post_processor":', post_processor(r.template, token), ',"decoder":', part "decoder",
    ',"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,',
    '"ignore_merges":', tostring(r.flags.ignore_merges == true), ',"vocab":{', vocab, '},"merges":[', table.concat(merges, ","), "]}}\n" })
  if not ok then return nil, message, code end
  local config = { tokenizer_class = "PreTrainedTokenizerFast", chat_template = r.chat_template, clean_up_tokenization_spaces = false }
  for field, id in pairs { bos_token = r.bos_id or -1, eos_token = r.eos_id[1] or -1, pad_token = r.pad_id or -1, unk_token = r.unk_id or -1 } do
    if id >= 0 and id < count then config[field] = token(id + 1) end
  end
  return writer.write_text(dir .. "/tokenizer_config.json", json.encode(config) .. "\n")
end

return M
