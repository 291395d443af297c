--- Text to token ids and back, equal to Hugging Face's tokenizers: byte-level and SentencePiece-style BPE from tokenizer.json or from
-- a GGUF file.
--
--     local tok = assert(wane.tokenizer.load "SmolLM2-135M-Instruct.gguf")
--     local ids = tok:encode "Hello"
--     print(tok:decode(ids))
--
-- The tables are read by a job on a thread of its own; inside a host's event loop, loading and the encoding of long texts yield.
-- @module wane.tokenizer
local ffi = require "ffi"
local cjson = require "cjson"
local core = require "wane.core"
local pipeline = require "wane.tokenizer.pipeline"
local gguf = require "wane.tokenizer.gguf"
local chat = require "wane.tokenizer.chat"
local new_stream = require "wane.tokenizer.stream"
local bit = require "bit"
local C = core.C

local M = {}
local Tokenizer = {}
Tokenizer.__index = Tokenizer
Tokenizer.__name = "Tokenizer"

local LONG = 8192                    -- bytes; longer texts are encoded by a job
local SMALL_FILE = 4 * 1024 * 1024
local job_box, handle_box, encoding_box = ffi.new "wane_job *[1]", ffi.new "wane_tokenizer *[1]", ffi.new "wane_encoding *[1]"
local text_box, size_box, flags_box = ffi.new "const char *[1]", ffi.new "size_t[1]", ffi.new "int[1]"

local refuse = pipeline.refuse

-- ---------------------------------------------------------------- files

local function join(folder, name) return (folder:gsub("/$", "")) .. "/" .. name end

--- A small file's text, or nil.
local function read_small(path)
  local f = io.open(path, "rb")
  if not f then return nil end
  local text = f:read(SMALL_FILE)
  f:close()
  return text
end

local function is_file(path)
  local f = io.open(path, "rb")
  if not f then return false end
  local ok = f:read(0) ~= nil or f:seek "end" == 0       -- a folder opens, but cannot be read
  f:close()
  return ok
end

--- Turns cjson's null into nil, everywhere.
local function without_null(x)
  if x == cjson.null then return nil end
  if type(x) ~= "table" then return x end
  for k, v in pairs(x) do x[k] = without_null(v) end
  return x
end

local function parse_json(text, what)
  if text == "" then return {} end
  local ok, value = pcall(cjson.decode, text)
  if not ok or type(value) ~= "table" then refuse("WANE_E_FORMAT", "%s: %s", what, ok and "an object was expected" or tostring(value)) end
  return without_null(value)
end

--- Where the tables are, and the files beside them.
local function locate(path)
  local folder = path:match "^(.*)/[^/]*$" or "."
  if is_file(path) then
    if path:lower():match "%.gguf$" then return path, nil, nil end
    local config = join(folder, "tokenizer_config.json")
    return path, is_file(config) and config or nil, folder
  end
  local tables, config = join(path, "tokenizer.json"), join(path, "tokenizer_config.json")
  if is_file(tables) then return tables, is_file(config) and config or nil, path end
  if is_file(join(path, "tokenizer.model")) or is_file(join(path, "vocab.json")) then
    refuse("WANE_E_UNSUPPORTED", "%s holds no tokenizer.json; tokenizer.model and vocab.json alone are not read yet " ..
      "(transformers' save_pretrained writes a tokenizer.json)", path)
  end
  refuse("WANE_E_NOTFOUND", "no tokenizer at %s: a folder with tokenizer.json, a tokenizer.json or a .gguf file was expected", path)
end

-- ---------------------------------------------------------------- opening

local function take(status)
  if status < 0 then
    local _, message, code = core.failure(status)
    refuse(code, "%s", message)
  end
end

local function open(path, config_path, progress)
  take(C.wane_tokenizer_open(job_box, path, config_path))
  local job = ffi.gc(job_box[0], C.wane_job_free)
  local status = core.wait_job(job, progress)
  if status == 0 then status = C.wane_tokenizer_take(job, handle_box) end
  local handle = handle_box[0]
  C.wane_job_free(ffi.gc(job, nil))
  take(status)
  return ffi.gc(handle, C.wane_tokenizer_free)
end

local function find(handle, text)
  local id = C.wane_tokenizer_find(handle, text, #text)
  return id >= 0 and id or nil
end

--- The text of a special token's entry: a string, or an object with `content`.
local function special_text(entry)
  if type(entry) == "string" then return entry end
  return type(entry) == "table" and type(entry.content) == "string" and entry.content or nil
end

local ENTRY_FLAGS = {
  single_word = C.WANE_TOKEN_SINGLE_WORD, lstrip = C.WANE_TOKEN_LSTRIP, rstrip = C.WANE_TOKEN_RSTRIP, normalized = C.WANE_TOKEN_NORMALIZED,
}
local SPECIAL = { "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token" }

--- Tokens that the configuration names and the table does not yet hold as added ones (transformers' PreTrainedTokenizerFast).
local function add_special(handle, config)
  local function add(entry)
    local text = special_text(entry)
    if not text or text == "" then return end
    local id = find(handle, text)
    if id then
      take(C.wane_tokenizer_token(handle, id, text_box, size_box, flags_box))
      if bit.band(flags_box[0], C.WANE_TOKEN_ADDED) ~= 0 then return end
    end
    local flags = C.WANE_TOKEN_SPECIAL
    if type(entry) == "table" then
      for name, flag in pairs(ENTRY_FLAGS) do
        if entry[name] == true then flags = bit.bor(flags, flag) end
      end
    end
    take(C.wane_tokenizer_add(handle, text, #text, flags))
  end
  for _, name in ipairs(SPECIAL) do add(config[name]) end
  if type(config.additional_special_tokens) == "table" then
    for _, entry in ipairs(config.additional_special_tokens) do add(entry) end
  end
end

--- Classes that ignore the file's post-processor and build their own from add_bos_token and add_eos_token: default of the first.
local brackets = { Llama = true, CodeLlama = true, Gemma = true, GPTNeoX = false }

--- "Llama" for LlamaTokenizer and LlamaTokenizerFast.
local function class_of(config)
  return type(config.tokenizer_class) == "string" and config.tokenizer_class:match "^(.-)Tokenizer[Fast]*$" or ""
end

--- The template around a text, and the configuration's word on it (transformers 4, tokenization_*_fast.py `update_post_processor`).
local function template_of(settings, config, ids)
  local class = class_of(config)
  if brackets[class] == nil then return pipeline.template(settings.post_processor) end
  local bos, eos = config.add_bos_token, config.add_eos_token
  if bos == nil then bos = brackets[class] end
  if (bos and not ids.bos_token) or (eos and not ids.eos_token) then
    refuse("WANE_E_FORMAT", "%s adds a token that tokenizer_config.json does not name (bos_token, eos_token)", config.tokenizer_class)
  end
  return pipeline.bracket(bos and ids.bos_token or nil, eos and ids.eos_token or nil)
end

local function chat_template_of(config, folder)
  local file = folder and read_small(join(folder, "chat_template.jinja"))
  if file then return file end
  local t = config.chat_template
  if type(t) == "string" then return t end
  if type(t) ~= "table" then return nil end
  for _, entry in ipairs(t) do
    if type(entry) == "table" and entry.name == "default" and type(entry.template) == "string" then return entry.template end
  end
end

local function model_flags(model)
  return bit.bor(model.byte_fallback and C.WANE_MODEL_BYTE_FALLBACK or 0, model.fuse_unk and C.WANE_MODEL_FUSE_UNK or 0,
    model.ignore_merges and C.WANE_MODEL_IGNORE_MERGES or 0)
end

--- Describes a tokenizer.json.
local function from_json(handle, info, folder)
  local settings = parse_json(ffi.string(C.wane_tokenizer_config(handle, 0)), "tokenizer.json")
  local config = parse_json(ffi.string(C.wane_tokenizer_config(handle, 1)), "tokenizer_config.json")
  local model = settings.model
  if type(model) ~= "table" then refuse("WANE_E_FORMAT", "tokenizer.json has no model") end
  local kind = model.type or (info.merges > 0 and "BPE") or "?"
  if kind ~= "BPE" then
    refuse("WANE_E_UNSUPPORTED", "the tokenizer's model is '%s'; BPE is supported, Unigram and WordPiece (T5, BERT) are not yet", tostring(kind))
  end
  if info.tokens == 0 then refuse("WANE_E_FORMAT", "tokenizer.json: model.vocab is missing or empty") end
  local map = folder and read_small(join(folder, "special_tokens_map.json"))
  if map then
    for name, entry in pairs(parse_json(map, "special_tokens_map.json")) do
      if config[name] == nil then config[name] = entry end
    end
  end
  add_special(handle, config)
  local unk
  if model.unk_token ~= nil then
    unk = type(model.unk_token) == "string" and find(handle, model.unk_token)
    if not unk then refuse("WANE_E_FORMAT", "model.unk_token '%s' is not in the vocabulary", tostring(model.unk_token)) end
  end
  local ids = {}
  for _, name in ipairs(SPECIAL) do
    local text = special_text(config[name])
    ids[name] = text and find(handle, text) or nil
  end
  take(C.wane_tokenizer_model(handle, model_flags(model), unk or -1))
  -- These classes set the prefix space of a plain ByteLevel from their own configuration, which says no unless it says yes.
  local pre, class = settings.pre_tokenizer, class_of(config)
  if (class == "GPT2" or class == "GPTNeoX") and type(pre) == "table" and pre.type == "ByteLevel" then
    pre.add_prefix_space = config.add_prefix_space == true
  end
  pipeline.stages(handle, settings)
  return {
    template = template_of(settings, config, ids), bos_id = ids.bos_token, eos_id = { ids.eos_token }, pad_id = ids.pad_token, unk_id = ids.unk_token or unk,
    chat_template = chat_template_of(config, folder),
  }
end

--- Describes a GGUF file's tokenizer.
local function from_gguf(handle, info)
  local r = gguf.describe(parse_json(ffi.string(C.wane_tokenizer_config(handle, 0)), "GGUF metadata"), info)
  local flags = bit.bor(model_flags(r.flags), r.flags.use_scores and C.WANE_MODEL_USE_SCORES or 0)
  take(C.wane_tokenizer_model(handle, flags, r.model_unk or -1))
  pipeline.stages(handle, r.settings)
  return r
end

--- Whether a template begins (ends) with this id.
local function stands_at(template, id, last)
  local piece = template.single[last and #template.single or 1]
  return id ~= nil and piece ~= nil and piece.ids ~= nil and piece.ids[last and #piece.ids or 1] == id
end

--- Every id of a template must be a token, so that a text never holds one that the model has no row for.
local function check_template(handle, template)
  for _, list in pairs(template) do
    for _, piece in ipairs(list) do
      for _, id in ipairs(piece.ids or {}) do
        if type(id) ~= "number" or id ~= math.floor(id) then refuse("WANE_E_FORMAT", "the post-processor adds '%s', which is no id", tostring(id)) end
        take(C.wane_tokenizer_token(handle, id, text_box, size_box, flags_box))
      end
    end
  end
end

local function load(path, options)
  local tables, config_path, folder = locate(path)
  local handle = open(tables, config_path, options and options.progress)
  local info = ffi.new "wane_vocab_info"
  C.wane_vocab_info_read(handle, info)
  local r = info.source == C.WANE_VOCAB_GGUF and from_gguf(handle, info) or from_json(handle, info, folder)
  check_template(handle, r.template)
  take(C.wane_tokenizer_ready(handle))
  C.wane_vocab_info_read(handle, info)
  return setmetatable({
    handle = handle, template = r.template, vocab_size = tonumber(info.size), bos_id = r.bos_id, eos_id = r.eos_id, pad_id = r.pad_id, unk_id = r.unk_id,
    chat_template = r.chat_template, path = tables, add_bos = stands_at(r.template, r.bos_id, false), add_eos = stands_at(r.template, r.eos_id[1], true),
  }, Tokenizer)
end

--- Loads a tokenizer. Its fields: vocab_size (highest id + 1), bos_id, eos_id (a list), pad_id, unk_id (nil where there is none),
-- add_bos and add_eos (whether `encode` puts them around a text), chat_template.
-- @param path string a Hugging Face folder, a tokenizer.json, or a .gguf file
-- @param options table|nil {progress = function(done, total)}
-- @return Tokenizer|nil the tokenizer, or nil, message, code
function M.load(path, options)
  if type(path) ~= "string" then core.raise("tokenizer.load: a path was expected, found a %s", type(path)) end
  local tok, message, code
  path, message, code = require("wane.hub").resolve(path)
  if not path then return nil, message, code end
  tok, message, code = pipeline.protect(load, path, options)
  if tok then return tok end
  if not message:find(path, 1, true) then message = path .. ": " .. message end
  return nil, message, code
end

-- ---------------------------------------------------------------- encoding

local function alive(self, what)
  if getmetatable(self) ~= Tokenizer then core.raise("%s: call it with a colon, on a tokenizer", what) end
  if not self.handle then core.raise("%s: the tokenizer is closed", what) end
  return self.handle
end

local function check(status)
  if status < 0 then core.raise("%s", ffi.string(C.wane_error())) end
end

--- Encodes one text without its surroundings, on a job when it is long.
local function encode_raw(self, text)
  local handle = self.handle
  if #text <= LONG then
    check(C.wane_tokenizer_encode(handle, encoding_box, text, #text))
    return encoding_box[0]
  end
  check(C.wane_tokenizer_encode_start(handle, job_box, text, #text))
  local job = ffi.gc(job_box[0], C.wane_job_free)
  local status = core.wait_job(job)
  if status == 0 then status = C.wane_encoding_take(job, encoding_box) end
  local encoding = encoding_box[0]
  local message = status < 0 and ffi.string(C.wane_error())
  C.wane_job_free(ffi.gc(job, nil))
  if message then core.raise("%s", message) end
  return encoding
end

--- Appends an encoding's ids (and their texts, if wanted).
local function append(self, encoding, ids, tokens)
  local n, data, at = tonumber(C.wane_encoding_count(encoding)), C.wane_encoding_ids(encoding), #ids
  for i = 0, n - 1 do ids[at + i + 1] = data[i] end
  if tokens then
    for i = 0, n - 1 do
      check(C.wane_encoding_token(encoding, self.handle, i, text_box, size_box))
      tokens[#tokens + 1] = ffi.string(text_box[0], size_box[0])
    end
  end
end

--- Encodes a text. Texts of more than 8 KB are encoded on a thread of their own; in a host's loop the call yields meanwhile.
-- @param text string UTF-8; invalid bytes count as U+FFFD
-- @param options table|nil add_special_tokens (true): what the model's template puts around; pair: a second text; details (false)
-- @return integer[] ids, and with `details` a table {tokens = string[], type_ids = integer[]}
function Tokenizer:encode(text, options)
  alive(self, "encode")
  options = options or {}
  if type(text) ~= "string" then core.raise("encode: a string was expected, found a %s", type(text)) end
  if options.pair ~= nil and type(options.pair) ~= "string" then core.raise("encode: pair must be a string, found a %s", type(options.pair)) end
  local texts = { A = text, B = options.pair }
  local ids, tokens, type_ids = {}, options.details and {} or nil, {}
  for _, piece in ipairs(options.pair and self.template.pair or self.template.single) do
    local before = #ids
    if piece.sequence and texts[piece.sequence] then
      local encoding = ffi.gc(encode_raw(self, texts[piece.sequence]), C.wane_encoding_free)
      append(self, encoding, ids, tokens)
      C.wane_encoding_free(ffi.gc(encoding, nil))
    elseif piece.ids and options.add_special_tokens ~= false then
      for _, id in ipairs(piece.ids) do
        ids[#ids + 1] = id
        if tokens then tokens[#tokens + 1] = self:token_of(id) end
      end
    end
    if tokens then for _ = before + 1, #ids do type_ids[#type_ids + 1] = piece.type_id end end
  end
  if tokens then return ids, { tokens = tokens, type_ids = type_ids } end
  return ids
end

-- ---------------------------------------------------------------- decoding

--- Decodes ids, exactly as upstream does without clean-up.
-- @param ids integer[] ids without a token are left out
-- @param options table|nil skip_special_tokens (false)
-- @return string
function Tokenizer:decode(ids, options)
  local handle = alive(self, "decode")
  if type(ids) ~= "table" then core.raise("decode: a list of ids was expected, found a %s", type(ids)) end
  local n = #ids
  local list = ffi.new("int32_t[?]", n + 1)
  for i = 1, n do
    local id = ids[i]
    if type(id) ~= "number" or id ~= math.floor(id) or id < -2^31 or id >= 2^31 then core.raise("decode: ids[%d] is %s, no id", i, tostring(id)) end
    list[i - 1] = id
  end
  local room = 64 + 16 * n
  local skip = options and options.skip_special_tokens and 1 or 0
  while true do
    local buffer = ffi.new("char[?]", room)
    check(C.wane_tokenizer_decode(handle, list, n, skip, buffer, room, size_box))
    local size = tonumber(size_box[0])
    if size <= room then return ffi.string(buffer, size) end
    room = size
  end
end

--- Decodes ids as they come; see wane.tokenizer.stream. Two methods: `step(id)` gives text or nil, `finish()` what was held back.
-- @param options table|nil skip_special_tokens (true)
-- @return Stream
function Tokenizer:decode_stream(options)
  alive(self, "decode_stream")
  return new_stream(self, options)
end

-- ---------------------------------------------------------------- tokens

--- The id of a token by its exact text ("<|im_end|>", "Ġthe").
-- @param token string
-- @return integer|nil
function Tokenizer:id_of(token)
  local handle = alive(self, "id_of")
  if type(token) ~= "string" then core.raise("id_of: a string was expected, found a %s", type(token)) end
  return find(handle, token)
end

--- The text of a token as the vocabulary spells it.
-- @param id integer
-- @return string|nil
function Tokenizer:token_of(id)
  local handle = alive(self, "token_of")
  if type(id) ~= "number" then core.raise("token_of: an id was expected, found a %s", type(id)) end
  if id < 0 or id >= self.vocab_size or C.wane_tokenizer_token(handle, id, text_box, size_box, flags_box) < 0 then return nil end
  return ffi.string(text_box[0], size_box[0])
end

--- Whether an id is a special token (left out by skip_special_tokens).
-- @param id integer
-- @return boolean
function Tokenizer:is_special(id)
  local handle = alive(self, "is_special")
  if type(id) ~= "number" then core.raise("is_special: an id was expected, found a %s", type(id)) end
  if id < 0 or id >= self.vocab_size or C.wane_tokenizer_token(handle, id, text_box, size_box, flags_box) < 0 then return false end
  return bit.band(flags_box[0], C.WANE_TOKEN_SPECIAL) ~= 0
end

--- Frees the tables now; the tokenizer cannot be used afterwards.
function Tokenizer:close()
  if self.handle then
    C.wane_tokenizer_free(ffi.gc(self.handle, nil))
    self.handle = nil
  end
end

function Tokenizer:__tostring()
  return self.handle and ("Tokenizer(%d tokens, %s)"):format(self.vocab_size, self.path) or "Tokenizer(closed)"
end

-- ---------------------------------------------------------------- conversations

local function check_messages(messages)
  if type(messages) ~= "table" or #messages == 0 then core.raise "apply_chat_template: a list of messages {role =, content =} was expected" end
  for i, m in ipairs(messages) do
    if type(m) ~= "table" or type(m.role) ~= "string" or type(m.content) ~= "string" then
      core.raise("apply_chat_template: messages[%d] needs a role and a content, both strings", i)
    end
  end
end

--- Writes a conversation as the model was taught to read it. ChatML templates only, for now.
-- @param messages table[] {role = "user", content = "…"}
-- @param options table|nil add_generation_prompt (false), tokenize (true): ids instead of the text
-- @return integer[]|string, or nil, message, code
function Tokenizer:apply_chat_template(messages, options)
  alive(self, "apply_chat_template")
  options = options or {}
  check_messages(messages)
  if not self.chat_template then return nil, "this tokenizer has no chat template", "WANE_E_NOTFOUND" end
  if options.tools then return nil, "tools in chat templates are not supported yet", "WANE_E_UNSUPPORTED" end
  local form = chat.chatml(self.chat_template)
  if not form then return nil, "this model's chat template is not plain ChatML; other templates are not supported yet", "WANE_E_UNSUPPORTED" end
  local text = chat.render(form, messages, options.add_generation_prompt == true)
  if options.tokenize == false then return text end
  return self:encode(text, { add_special_tokens = false })
end

return M
