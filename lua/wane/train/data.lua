--- Training data: rows of token ids and labels out of a file, made when they are asked for.
--
--     local rows = assert(data.open("quotes.jsonl", tok, { text_field = "quote", max_length = 512 }))
--     local row = rows:get(1)                    -- { ids = { … }, labels = { … } }; -100 is not scored
--
-- Kinds, told from the first row that can be read:
--   text       a file that is no JSONL: its text, cut into rows of max_length ids (whole lines at a time, no end between them)
--   jsonl      { "text": … } or another field: a sample of its own, all of it scored, the tokenizer's beginning in front, its end behind
--   messages   { "messages": [ { role, content } … ] }: a ChatML conversation; the assistant's answers and their ends are scored
--   pairs      { "input", "target" } or { "prompt", "completion" }: the second is scored; for an encoder-decoder the first is what it reads
--   ids        { "input_ids", "labels" }: rows that were made elsewhere (data.export writes such); padding, as "attention_mask" tells it, is left out
-- A file of JSONL of any size: lines are found through an index (wane.train.lines) and tokenized one at a time; blank ones are no rows. A plain text is
-- tokenized whole when it is opened, and its ids are held.
-- @module wane.train.data
local ffi = require "ffi"
local core = require "wane.core"
local cjson = require "cjson"
local lines = require "wane.train.lines"

local M = {}

local IGNORED = -100
local HEAD = 2 ^ 16                      -- bytes in which a NUL tells a binary file

---@class wane.Rows
---@field path string
---@field kind string
---@field count integer rows: lines that are not blank (text: of max_length ids, the last one shorter)
---@field hash string XXH64 of the file: a resumed run must have the same
---@field max_length integer longer rows are cut; may be set before bind
---@field skipped table[] { line, reason }: the first bad rows
---@field bad integer how many were skipped so far
---@field truncated integer how many were cut to max_length so far, each counted once
local Rows = {}
Rows.__index = Rows

-- ---------------------------------------------------------------- one row of each kind

-- The fields of a row, for messages.
local function fields_of(row)
  local names = {}
  for name in pairs(row) do names[#names + 1] = ("'%s'"):format(tostring(name)) end
  if #names == 0 then return "none" end
  table.sort(names)
  return table.concat(names, ", ", 1, math.min(#names, 10)) .. (#names > 10 and ", …" or "")
end

local makers = {}

local function append(ids, labels, more, scored)
  for _, id in ipairs(more) do
    ids[#ids + 1] = id
    labels[#labels + 1] = scored and id or IGNORED
  end
end

local function plain(self, text) return self.tok:encode(text, { add_special_tokens = false }) end

-- The ids that the tokenizer puts around a text, and its end where it puts none.
local function around(self)
  if self.front then return self.front, self.back end
  local bare, whole = plain(self, "a"), self.tok:encode("a", { add_special_tokens = true })
  local front, at = {}, 0
  while at < #whole and whole[at + 1] ~= bare[1] do
    at = at + 1
    front[at] = whole[at]
  end
  local back = {}
  for i = at + #bare + 1, #whole do back[#back + 1] = whole[i] end
  if #back == 0 and self.eos then back[1] = self.eos end
  self.front, self.back = front, back
  return front, back
end

function makers.jsonl(self, row)
  local text = row[self.text_field]
  if type(text) ~= "string" then return nil, ("no text in '%s'; its fields are %s"):format(self.text_field, fields_of(row)) end
  local ids, labels = {}, {}
  local front, back = around(self)
  append(ids, labels, front, true)
  append(ids, labels, plain(self, text), true)
  if #ids == #front then return nil, "an empty text" end
  append(ids, labels, back, true)
  return ids, labels
end

function makers.messages(self, row)
  local messages = row.messages
  if type(messages) ~= "table" or type(messages[1]) ~= "table" then return nil, "'messages' is no list of messages" end
  for i, m in ipairs(messages) do
    if type(m) ~= "table" or type(m.role) ~= "string" or type(m.content) ~= "string" then return nil, ("message %d has no role and content"):format(i) end
  end
  if messages[1].role == "assistant" then return nil, "the conversation begins with an answer" end
  local ids, labels, done, list = {}, {}, "", {}
  -- Parts are tokenized on their own, as they are when the model answers: its prompt ends where the answer begins.
  for i, m in ipairs(messages) do
    if m.role == "assistant" then
      local before, message = self.tok:apply_chat_template(list, { add_generation_prompt = true, tokenize = false })
      if not before then return nil, message end
      if before:sub(1, #done) ~= done then return nil, "the template changes earlier turns" end
      append(ids, labels, plain(self, before:sub(#done + 1)), false)
      done = before
    end
    list[i] = m
    local after, message = self.tok:apply_chat_template(list, { add_generation_prompt = false, tokenize = false })
    if not after then return nil, message end
    local part = after:sub(#done + 1)
    if m.role == "assistant" then
      local answer, rest = part:match "^(.*%S)(%s*)$"
      append(ids, labels, plain(self, answer or part), true)
      append(ids, labels, plain(self, rest or ""), false)
    else
      append(ids, labels, plain(self, part), false)
    end
    done = after
  end
  return ids, labels
end

function makers.pairs(self, row)
  local input, target = row.input or row.prompt, row.target or row.completion
  if type(input) ~= "string" or type(target) ~= "string" then return nil, "no strings in 'input' and 'target' ('prompt' and 'completion')" end
  local ids, labels = {}, {}
  local front, back = around(self)
  if self.encoder_decoder then
    local unused = {}
    append(ids, unused, plain(self, input), false)
    append(ids, unused, back, false)
    append(unused, labels, plain(self, target), true)
    append(unused, labels, back, true)
    return ids, labels
  end
  append(ids, labels, front, false)
  append(ids, labels, plain(self, input), false)
  append(ids, labels, plain(self, target), true)
  append(ids, labels, back, true)
  return ids, labels
end

-- The first and the last entry of a list of ids that a mask of ones and zeros keeps; nil and why where it is none, or has zeros between its ones.
local function unmasked(mask, ids)
  if type(ids) ~= "table" or type(mask) ~= "table" or #mask ~= #ids then return nil, "'attention_mask' is no list as long as 'input_ids'" end
  local from, to, ones = 1, 0, 0
  for i, m in ipairs(mask) do
    if m ~= 0 and m ~= 1 then return nil, ("entry %d of 'attention_mask' is neither 0 nor 1"):format(i) end
    if m == 1 then
      if ones == 0 then from = i end
      to, ones = i, ones + 1
    end
  end
  if ones ~= to - from + 1 then return nil, "'attention_mask' has a 0 between its ones: padding is expected at the ends alone" end
  return from, to
end

local function slice(list, from, to)
  local out = {}
  for i = from, to do out[#out + 1] = list[i] end
  return out
end

-- Rows that were made elsewhere may be made for another model: an id that this one lacks is told here, by its line, not by the op that meets it.
function makers.ids(self, row)
  local ids, labels = row.input_ids, row.labels or row.input_ids
  local size, apart = self.vocabulary or 2 ^ 31, self.encoder_decoder and row.labels         -- apart: labels of the decoder's
  if row.attention_mask ~= nil then
    local from, to = unmasked(row.attention_mask, ids)
    if not from then return nil, to end
    if not apart and type(labels) == "table" then
      if #labels ~= #ids then return nil, ("%d ids and %d labels"):format(#ids, #labels) end
      labels = slice(labels, from, to)
    end
    ids = slice(ids, from, to)
  end
  for _, field in ipairs { { "input_ids", ids }, { "labels", labels } } do
    local name, list = field[1], field[2]
    if type(list) ~= "table" then return nil, ("'%s' is no list of ids"):format(name) end
    for i = 1, #list do
      local id = list[i]
      if type(id) ~= "number" or id % 1 ~= 0 then return nil, ("entry %d of '%s' is no id"):format(i, name) end
      if (id < 0 or id >= size) and not (name == "labels" and id == IGNORED) then
        return nil, ("entry %d of '%s' is %.0f: expected an id %s%s"):format(i, name, id,
          self.vocabulary and ("of the vocabulary, 0 to %d"):format(size - 1) or "from 0 on", name == "labels" and ", or -100" or "")
      end
    end
  end
  return ids, labels
end

-- ---------------------------------------------------------------- rows

-- A text_field that was asked for is what a row is about, whatever else is in it.
local function kind_of(row, text_field, asked)
  if asked then return type(row[text_field]) == "string" and "jsonl" or nil end
  if row.messages then return "messages" end
  if row.input_ids then return "ids" end
  if row.input and row.target or row.prompt and row.completion then return "pairs" end
  if row[text_field] then return "jsonl" end
end

local function decode(text)
  local ok, row = pcall(cjson.decode, text)
  if not ok then return nil, "no JSON object: " .. tostring(row) end
  if type(row) ~= "table" then return nil, ("no JSON object, but a %s"):format(row == cjson.null and "null" or type(row)) end
  for name, value in pairs(row) do if value == cjson.null then row[name] = nil end end      -- as tables of many columns have it: none
  return row
end

local function cut(list, n)
  if #list <= n then return list, false end
  return slice(list, 1, n), true
end

local function scored(labels, from)
  for i = from, #labels do if labels[i] ~= IGNORED then return true end end
  return false
end

-- Row i, out of a line: ids, labels, or nil and why not.
local function make(self, i, line)
  local text, message = self.lines:get(line)
  if not text then return nil, message end
  local valid = tonumber(core.C.wane_utf8_valid(text, #text))
  if valid < #text then return nil, ("byte %d is no UTF-8"):format(valid + 1) end
  local row
  row, message = decode(text)
  if not row then return nil, message end
  local ids, labels = makers[self.kind](self, row)
  if not ids then return nil, labels end
  if not self.encoder_decoder and #ids ~= #labels then return nil, ("%d ids and %d labels"):format(#ids, #labels) end
  local short, was_cut = cut(ids, self.max_length)
  local short_labels, labels_cut = cut(labels, self.max_length)
  if (was_cut or labels_cut) and self.seen_cut[i] == 0 then self.seen_cut[i], self.truncated = 1, self.truncated + 1 end
  if not scored(short_labels, self.encoder_decoder and 1 or 2) then return nil, was_cut and "nothing to learn before it is cut" or "nothing to learn" end
  return { ids = short, labels = short_labels, line = line }
end

--- Row i. A bad one raises, naming its line, or is left out (bad_rows = "skip").
-- @param i integer 1 … count
-- @return table|nil { ids, labels, line }, nil for a row left out
function Rows:get(i)
  if self.blocks then
    local ids = self.blocks(i)
    return { ids = ids, labels = ids, line = i }
  end
  local line = self.lines:full(i)
  local row, reason = make(self, i, line)
  if row then return row end
  if self.bad_rows ~= "skip" then
    core.raise("%s, line %d: %s (bad_rows = \"skip\", or --bad-rows skip on the command line, leaves such rows out)", self.path, line, reason)
  end
  if not self.seen_bad[i] then
    self.seen_bad[i] = true
    self.bad = self.bad + 1
    if #self.skipped < 10 then self.skipped[#self.skipped + 1] = { line = line, reason = reason } end
  end
end

-- The first line that can be read says the kind.
local function detect(self, opts)
  local reason, tried = nil, 0                           -- the first line's: what follows it is mostly like it
  for i = 1, self.lines.count do
    local text, message = self.lines:get(i)
    if not text or text:find "%S" then
      local row
      if text then row, message = decode(text) end
      local kind = row and kind_of(row, self.text_field, opts.text_field)
      if kind then return kind end
      if row then
        message = ("%s; its fields are %s (text_field, or --text-field on the command line, names the one with the text)"):format(
          opts.text_field and ("no text in '%s'"):format(self.text_field) or "none of the fields 'text', 'messages', 'input' and 'target', 'input_ids'",
          fields_of(row))
      elseif text and not self.path:find "%.jsonl?$" and not opts.text_field then
        return "text"
      end
      reason, tried = reason or ("line %d: %s"):format(i, message), tried + 1
      if tried == 100 then break end
    end
  end
  return nil, reason or "all its lines are blank"
end

-- A plain text in rows of max_length ids. Ids are 4 bytes each: the text is tokenized once, a thousand lines at a time.
local function open_text(self)
  local room, n = 4096, 0
  local all = ffi.new("int32_t[?]", room)
  for from = 1, self.lines.count, 1000 do
    local part = {}
    for i = from, math.min(from + 999, self.lines.count) do
      local text, message = self.lines:get(i)
      if not text then return nil, ("%s, line %d: %s"):format(self.path, i, message) end
      part[#part + 1] = text
    end
    local ids = plain(self, table.concat(part, "\n") .. "\n")
    if n + #ids > room then
      local grown = ffi.new("int32_t[?]", math.max(2 * room, n + #ids))
      ffi.copy(grown, all, n * 4)
      all, room = grown, math.max(2 * room, n + #ids)
    end
    for k, id in ipairs(ids) do all[n + k - 1] = id end
    n = n + #ids
  end
  local length = self.max_length
  self.count = math.ceil(n / length)
  if n % length == 1 then self.count = self.count - 1 end          -- a single id has nothing to predict
  self.blocks = function(i)
    local ids = {}
    for k = (i - 1) * length, math.min(i * length, n) - 1 do ids[#ids + 1] = all[k] end
    return ids
  end
  return self
end

-- What is no training data by its first bytes, told before the file is indexed: why, or nil.
local function not_text(path)
  local f = core.C.wane_path_kind(path) == core.C.WANE_PATH_FILE and io.open(path, "rb")
  if not f then return nil end                           -- the index says why
  local head, message = f:read(HEAD)
  f:close()
  if not head then return not message and "the file is empty: expected JSONL, a row a line, or a plain text" or nil end
  local nul = head:find("\0", 1, true)
  if nul then return ("a binary file (byte %d is NUL): expected JSONL, a row a line, or a plain text, in UTF-8"):format(nul) end
end

local known = { kind = true, text_field = true, max_length = true, encoder_decoder = true, bad_rows = true, eos = true, vocabulary = true }

local function check_options(opts)
  for key in pairs(opts) do if not known[key] then core.raise("data.open: there is no option '%s'", tostring(key)) end end
  local size, length, bad = opts.vocabulary, opts.max_length, opts.bad_rows
  if bad and bad ~= "fail" and bad ~= "skip" then core.raise("data.open: bad_rows: expected 'fail' or 'skip', found '%s'", tostring(bad)) end
  if length and (type(length) ~= "number" or length < 2 or length % 1 ~= 0) then
    core.raise("data.open: max_length: expected a whole number above 1, found %s", tostring(length))
  end
  if size and (type(size) ~= "number" or size < 1 or size % 1 ~= 0) then
    core.raise("data.open: vocabulary: expected how many ids there are, a whole number above 0, found %s", tostring(size))
  end
  if opts.kind and opts.kind ~= "text" and not makers[opts.kind] then
    core.raise("data.open: kind: expected text, jsonl, messages, pairs or ids, found '%s'", tostring(opts.kind))
  end
end

--- The part of open that needs no model: finds the lines of a file and tells what kind of rows it holds. rows:bind(tok, opts) is the rest.
-- @param path string
-- @param opts table|nil as for open; those that tell of the model may be left to bind
-- @return wane.Rows|nil without a count yet, string|nil message
function M.scan(path, opts)
  opts = opts or {}
  check_options(opts)
  local self = setmetatable({ path = path, kind = opts.kind, text_field = opts.text_field or "text", max_length = opts.max_length or 1024,
    bad_rows = opts.bad_rows or "fail", bad = 0, skipped = {}, seen_bad = {}, truncated = 0 }, Rows)
  local message = not_text(path)
  if message then return nil, ("%s: no training data: %s"):format(path, message) end
  self.lines, message = lines.open(path)
  if not self.lines then return nil, message end
  self.hash = self.lines.hash
  if not self.kind then
    self.kind, message = detect(self, opts)
    if not self.kind then return nil, ("%s: no training data: %s"):format(path, message) end
  end
  return self
end

--- Makes rows of what scan found.
-- @param tok wane.Tokenizer|nil needed for all kinds but ids
-- @param opts table|nil { encoder_decoder, eos, vocabulary }: as for open
-- @return wane.Rows|nil self, string|nil message
function Rows:bind(tok, opts)
  opts = opts or {}
  check_options(opts)
  if self.kind ~= "ids" and not tok then return nil, ("%s holds text, and the model has no tokenizer that wane reads"):format(self.path) end
  self.tok, self.encoder_decoder, self.vocabulary = tok, opts.encoder_decoder or false, opts.vocabulary or tok and tok.vocab_size
  self.eos = opts.eos or (tok and tok.eos_id and tok.eos_id[1])
  if self.kind == "text" then return open_text(self) end
  self.count = self.lines.count - self.lines.blanks
  self.seen_cut = ffi.new("uint8_t[?]", self.count + 1)  -- 1 for a row that was counted in `truncated`
  return self
end

--- Opens training data.
-- @param path string
-- @param tok wane.Tokenizer|nil needed for all kinds but ids
-- @param opts table|nil { kind = nil (told from the file), text_field = "text" (where it is given, rows are of this field alone),
--   max_length = 1024, encoder_decoder = false, bad_rows = "fail" | "skip",
--   eos = id put behind samples where the tokenizer puts none (default: the tokenizer's eos token),
--   vocabulary = integer, how many ids the model has: rows of ids with others are bad rows (default: the tokenizer's vocab_size; without both any id
--   from 0 on is taken) }
-- @return wane.Rows|nil, string|nil message
function M.open(path, tok, opts)
  local rows, message = M.scan(path, opts)
  if not rows then return nil, message end
  return rows:bind(tok, opts)
end

--- Writes rows as JSONL of { input_ids, labels }, in the order given: the same data for another program.
-- @param rows wane.Rows
-- @param path string
-- @param order integer[]|nil row numbers; default: all in the file's order
-- @return integer|nil how many, string|nil message
function M.export(rows, path, order)
  local f, message = io.open(path, "w")
  if not f then return nil, message end
  local n = 0
  for k = 1, order and #order or rows.count do
    local row = rows:get(order and order[k] or k)
    if row then
      f:write('{"input_ids":[', table.concat(row.ids, ","), '],"labels":[', table.concat(row.labels, ","), "]}\n")
      n = n + 1
    end
  end
  f:close()
  return n
end

return M
