--- Reads the settings of a tokenizer.json and describes them to C as steps: normalizer, pre-tokenizer, decoder, and the template that
-- puts special tokens around a text. Every object there carries a `type`; the steps that make it up are in the three tables below.
-- Source: tokenizers, normalizers/, pre_tokenizers/, decoders/, processors/.
-- @module wane.tokenizer.pipeline
local core = require "wane.core"
local regex = require "wane.tokenizer.regex"
local bit = require "bit"
local C = core.C

local M = {}

local GPT2 = [['s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+]]
M.GPT2_PATTERN = GPT2
local BEHAVIOR = {
  Isolated = C.WANE_SPLIT_ISOLATED, Removed = C.WANE_SPLIT_REMOVED, MergedWithPrevious = C.WANE_SPLIT_MERGED_WITH_PREVIOUS,
  MergedWithNext = C.WANE_SPLIT_MERGED_WITH_NEXT, Contiguous = C.WANE_SPLIT_CONTIGUOUS,
}

-- Errors travel as tables through pcall, so that a mistake in this file still shows its traceback.
local function refuse(code, message, ...) error({ code = code, message = message:format(...) }, 0) end
local function bad(message, ...) refuse("WANE_E_FORMAT", message, ...) end

local function is_object(x) return type(x) == "table" end

local function field(object, name, kind, default)
  local value = object[name]
  if value == nil then value = default end
  if type(value) ~= kind then bad("%s.%s: a %s was expected, found a %s", object.type or "settings", name, kind, type(value)) end
  return value
end

-- ---------------------------------------------------------------- steps

local Builder = {}
Builder.__index = Builder

--- Appends a step to the stage being built.
function Builder:step(kind, pattern, content, flags)
  local status = C.wane_tokenizer_step(self.handle, self.stage, kind, pattern, pattern and #pattern or 0, content, content and #content or 0, flags or 0)
  if status < 0 then
    local _, message, code = core.failure(status)
    refuse(code, "%s", message)
  end
end

--- A pattern field {String = …} or {Regex = …}: the pattern for C and its flag.
local function pattern_of(object)
  local p = object.pattern
  if type(p) == "string" then return p, 0 end
  if is_object(p) and type(p.String) == "string" and p.String ~= "" then return p.String, 0 end
  if not is_object(p) or type(p.Regex) ~= "string" then bad("%s.pattern: {\"String\": …} or {\"Regex\": …} was expected", object.type) end
  local translated, message = regex.translate(p.Regex)
  if not translated then refuse("WANE_E_UNSUPPORTED", "%s: %s", object.type, message) end
  return translated, C.WANE_STEP_REGEX
end

--- Cuts by a pattern in Oniguruma's syntax that this file states.
local function split_by(b, pattern, behavior)
  b:step(C.WANE_STEP_SPLIT, assert(regex.translate(pattern)), nil, bit.bor(C.WANE_STEP_REGEX, behavior))
end

local function behavior_of(object, default)
  local name = field(object, "behavior", "string", default)
  return BEHAVIOR[name] or bad("%s.behavior: '%s' is not known", object.type, name)
end

local function replace(b, object)
  local pattern, flag = pattern_of(object)
  b:step(C.WANE_STEP_REPLACE, pattern, field(object, "content", "string"), flag)
end

--- How a Metaspace adds its prefix: "always", "first" or "never"; old files say add_prefix_space instead.
local function metaspace_scheme(object)
  if object.add_prefix_space == false and (object.prepend_scheme == nil or object.prepend_scheme == "never") then return "never" end
  local scheme = field(object, "prepend_scheme", "string", "always")
  if scheme ~= "always" and scheme ~= "first" and scheme ~= "never" then bad("Metaspace.prepend_scheme: '%s' is not known", scheme) end
  return scheme
end

local normalizers, pre_tokenizers, decoders = {}, {}, {}

--- Runs the entry of `kinds` for an object; a Sequence runs its members.
local function run(kinds, what, list, b, object, depth)
  if not is_object(object) then bad("%s: an object was expected, found a %s", what, type(object)) end
  local kind = field(object, "type", "string")
  if kind == "Sequence" then
    if depth > 8 then bad("%s: sequences nested deeper than 8", what) end
    for _, member in ipairs(field(object, list, "table")) do run(kinds, what, list, b, member, depth + 1) end
    return
  end
  local entry = kinds[kind]
  if not entry then refuse("WANE_E_UNSUPPORTED", "the %s '%s' is not supported", what, kind) end
  entry(b, object)
end

for _, name in ipairs { "NFC", "NFD", "NFKC", "NFKD" } do
  normalizers[name] = function(b) b:step(C["WANE_STEP_" .. name]) end
end
function normalizers.Lowercase(b) b:step(C.WANE_STEP_LOWERCASE) end
function normalizers.StripAccents(b) b:step(C.WANE_STEP_STRIP_ACCENTS) end
function normalizers.Strip(b, o)
  local left, right = field(o, "strip_left", "boolean", true), field(o, "strip_right", "boolean", true)
  b:step(C.WANE_STEP_STRIP, nil, nil, bit.bor(left and C.WANE_STRIP_LEFT or 0, right and C.WANE_STRIP_RIGHT or 0))
end
function normalizers.Prepend(b, o)
  local prefix = field(o, "prepend", "string")
  if prefix ~= "" then b:step(C.WANE_STEP_PREFIX, nil, prefix, 0) end
end
normalizers.Replace = replace
function normalizers.ByteLevel(b) b:step(C.WANE_STEP_BYTES) end

function pre_tokenizers.ByteLevel(b, o)
  if field(o, "add_prefix_space", "boolean", true) then b:step(C.WANE_STEP_PREFIX, nil, " ", C.WANE_PREFIX_UNLESS_THERE) end
  if field(o, "use_regex", "boolean", true) then split_by(b, GPT2, C.WANE_SPLIT_ISOLATED) end
  b:step(C.WANE_STEP_BYTES)
end
function pre_tokenizers.Split(b, o)
  local pattern, flag = pattern_of(o)
  b:step(C.WANE_STEP_SPLIT, pattern, nil, bit.bor(flag, behavior_of(o), field(o, "invert", "boolean", false) and C.WANE_SPLIT_INVERT or 0))
end
function pre_tokenizers.Digits(b, o)
  split_by(b, [[\p{N}]], field(o, "individual_digits", "boolean", false) and C.WANE_SPLIT_ISOLATED or C.WANE_SPLIT_CONTIGUOUS)
end
function pre_tokenizers.Metaspace(b, o)
  local mark, scheme = field(o, "replacement", "string", "▁"), metaspace_scheme(o)
  b:step(C.WANE_STEP_REPLACE, " ", mark)
  if scheme ~= "never" then
    b:step(C.WANE_STEP_PREFIX, nil, mark, bit.bor(C.WANE_PREFIX_UNLESS_THERE, scheme == "first" and C.WANE_PREFIX_AT_START or 0))
  end
  if field(o, "split", "boolean", true) then b:step(C.WANE_STEP_SPLIT, mark, nil, C.WANE_SPLIT_MERGED_WITH_NEXT) end
end
function pre_tokenizers.Whitespace(b)
  b:step(C.WANE_STEP_SPLIT, regex.WHITESPACE, nil, bit.bor(C.WANE_STEP_REGEX, C.WANE_SPLIT_REMOVED, C.WANE_SPLIT_INVERT))
end
function pre_tokenizers.WhitespaceSplit(b) split_by(b, [[\s]], C.WANE_SPLIT_REMOVED) end
function pre_tokenizers.Punctuation(b, o) split_by(b, [=[[\p{P}!-/:-@\[-`{-~]]=], behavior_of(o, "Isolated")) end
function pre_tokenizers.CharDelimiterSplit(b, o) b:step(C.WANE_STEP_SPLIT, field(o, "delimiter", "string"), nil, C.WANE_SPLIT_REMOVED) end

function decoders.ByteLevel(b) b:step(C.WANE_STEP_BYTES) end
function decoders.Metaspace(b, o)
  b:step(C.WANE_STEP_METASPACE, nil, field(o, "replacement", "string", "▁"), metaspace_scheme(o) == "never" and C.WANE_METASPACE_KEEP_FIRST or 0)
end
decoders.Replace = replace
function decoders.ByteFallback(b) b:step(C.WANE_STEP_BYTE_FALLBACK) end
function decoders.Fuse(b) b:step(C.WANE_STEP_FUSE) end
function decoders.Strip(b, o)
  local start, stop = field(o, "start", "number", 0), field(o, "stop", "number", 0)
  if start < 0 or stop < 0 or start > 65535 or stop > 65535 then bad "Strip: start and stop run from 0 to 65535" end
  b:step(C.WANE_STEP_TRIM, nil, field(o, "content", "string"), start + stop * 65536)
end

--- Builds the three stages of a tokenizer from tokenizer.json's objects; nil where one is absent.
-- @param handle cdata wane_tokenizer *
-- @param settings table {normalizer =, pre_tokenizer =, decoder =}
function M.stages(handle, settings)
  local b = setmetatable({ handle = handle }, Builder)
  b.stage = C.WANE_STAGE_NORMALIZE
  if settings.normalizer then run(normalizers, "normalizer", "normalizers", b, settings.normalizer, 0) end
  b.stage = C.WANE_STAGE_SPLIT
  if settings.pre_tokenizer then run(pre_tokenizers, "pre-tokenizer", "pretokenizers", b, settings.pre_tokenizer, 0) end
  b.stage = C.WANE_STAGE_DECODE
  if settings.decoder then run(decoders, "decoder", "decoders", b, settings.decoder, 0) end
end

-- ---------------------------------------------------------------- what stands around a text

local function template_list(o, pieces)
  local list = {}
  for i, piece in ipairs(pieces) do
    if is_object(piece.Sequence) then
      local which = piece.Sequence.id
      if which ~= "A" and which ~= "B" then bad("TemplateProcessing: sequence '%s'", tostring(which)) end
      list[i] = { sequence = which, type_id = tonumber(piece.Sequence.type_id) or 0 }
    elseif is_object(piece.SpecialToken) then
      local token = o.special_tokens[piece.SpecialToken.id]
      if not is_object(token) or not is_object(token.ids) then
        bad("TemplateProcessing: the special token '%s' is not described in special_tokens", tostring(piece.SpecialToken.id))
      end
      list[i] = { ids = token.ids, type_id = tonumber(piece.SpecialToken.type_id) or 0 }
    else
      bad "TemplateProcessing: a Sequence or a SpecialToken was expected"
    end
  end
  return list
end

local A, B = { sequence = "A", type_id = 0 }, { sequence = "B", type_id = 1 }
local plain = { single = { A }, pair = { A, B } }

local function pair_of_special(o, name)
  local token = o[name]
  if not is_object(token) or type(token[2]) ~= "number" then bad("%s.%s: [token, id] was expected", o.type, name) end
  return { ids = { token[2] }, type_id = 0 }
end

local processors = {}
function processors.ByteLevel() end              -- only moves offsets
function processors.TemplateProcessing(o)
  field(o, "special_tokens", "table")
  return { single = template_list(o, field(o, "single", "table")), pair = template_list(o, field(o, "pair", "table")) }
end
function processors.RobertaProcessing(o)
  local cls, sep, second = pair_of_special(o, "cls"), pair_of_special(o, "sep"), { sequence = "B", type_id = 0 }
  return { single = { cls, A, sep }, pair = { cls, A, sep, sep, second, sep } }
end
function processors.BertProcessing(o)
  local cls, sep = pair_of_special(o, "cls"), pair_of_special(o, "sep")
  return { single = { cls, A, sep }, pair = { cls, A, sep, B, { ids = sep.ids, type_id = 1 } } }
end

--- The template of a post-processor.
-- @param object table|nil tokenizer.json's post_processor
-- @param depth integer|nil of nested sequences
-- @return table {single = list, pair = list} of {ids =} or {sequence = "A"|"B"}, each with type_id
function M.template(object, depth)
  if object == nil then return plain end
  if not is_object(object) then bad("post_processor: an object was expected, found a %s", type(object)) end
  local kind = field(object, "type", "string")
  if kind == "Sequence" then
    local found
    if (depth or 0) > 8 then bad "post_processor: sequences nested deeper than 8" end
    for _, member in ipairs(field(object, "processors", "table")) do
      local t = M.template(member, (depth or 0) + 1)
      if t ~= plain then
        if found then refuse("WANE_E_UNSUPPORTED", "two post-processors that add tokens") end
        found = t
      end
    end
    return found or plain
  end
  if not processors[kind] then refuse("WANE_E_UNSUPPORTED", "the post-processor '%s' is not supported", kind) end
  return processors[kind](object) or plain
end

--- The template of a beginning and an end token, either may be nil.
-- @param bos integer|nil
-- @param eos integer|nil
-- @return table as from `template`
function M.bracket(bos, eos)
  local function around(piece, type_id, list)
    if bos then list[#list + 1] = { ids = { bos }, type_id = type_id } end
    list[#list + 1] = piece
    if eos then list[#list + 1] = { ids = { eos }, type_id = type_id } end
    return list
  end
  return { single = around(A, 0, {}), pair = around(B, 1, around(A, 0, {})) }
end

--- Runs fn(...); a refusal raised in this module becomes nil, message, code.
function M.protect(fn, ...)
  local function finish(ok, ...)
    if ok then return ... end
    local e = ...
    if type(e) == "table" and e.message then return nil, e.message, e.code end
    error(e, 0)
  end
  return finish(pcall(fn, ...))
end
M.refuse = refuse

return M
