--- Generation: prompts in, new ids out. Option names, defaults and the order of the processors are transformers' own
-- (generation/utils.py, logits_process.py).
--
-- The loop runs one token ahead: ids stay on the device, and while token t is being read and printed, token t+1 is being computed.
-- What is computed past an end is thrown away.
-- @module wane.generate
local ffi = require "ffi"
local core = require "wane.core"
local F = require "wane.nn.functional"
local passes = require "wane.nn.pass"
local Model = require "wane.model"
local inputs = require "wane.generate.inputs"
local C, check, stream = core.C, core.check, core.stream

local M = {}

local PREFILL = 512                  -- prompt positions a pass: bounds the memory of activations

-- Options that transformers has and a later version will: refused by name rather than ignored.
local later = { num_beams = 1, num_beam_groups = 1, penalty_alpha = 0, num_return_sequences = 1, guidance_scale = 1, typical_p = 1,
  epsilon_cutoff = 0, eta_cutoff = 0 }
local known = {
  max_new_tokens = true, max_length = true, min_length = true, min_new_tokens = true, do_sample = true, temperature = true, top_k = true,
  top_p = true, min_p = true, repetition_penalty = true, no_repeat_ngram_size = true, seed = true, eos_token_id = true, pad_token_id = true,
  bos_token_id = true, decoder_start_token_id = true, ignore_eos = true, stop = true, attention_mask = true, use_cache = true,
  tokenizer = true, add_special_tokens = true,
}

-- ---------------------------------------------------------------- options

local function list_of(ids)
  if ids == nil then return {} end
  return type(ids) == "table" and ids or { ids }
end

local function number(o, name, low, what)
  local v = o[name]
  if v == nil then return end
  if type(v) ~= "number" or v ~= v or v < low then core.raise("%s: expected %s, found %s", name, what, tostring(v)) end
end

--- Options of a call over the model's generation_config over transformers' defaults, checked.
-- @param model wane.Model
-- @param opts table|nil
-- @param prompt_length integer
-- @return table
function M.options(model, opts, prompt_length)
  if opts ~= nil and type(opts) ~= "table" then core.raise("generate: expected a table of options, found a %s", type(opts)) end
  local o = { do_sample = false, temperature = 1, top_k = 50, top_p = 1, min_p = 0, repetition_penalty = 1, no_repeat_ngram_size = 0, min_length = 0 }
  for k, v in pairs(model.generation_config or {}) do if known[k] then o[k] = v end end
  for k, v in pairs(opts or {}) do
    if later[k] ~= nil then
      if v ~= later[k] then core.raise("generate: '%s' comes with a later version of wane", k) end
    elseif not known[k] then
      core.raise("generate: there is no option '%s'", tostring(k))
    else
      o[k] = v
    end
  end
  number(o, "temperature", 0, "a number above 0")
  if o.do_sample and o.temperature == 0 then core.raise "temperature: 0 is no temperature; do_sample = false is greedy" end
  number(o, "top_k", 0, "0 (off) or more")
  number(o, "top_p", 0, "a number from 0 to 1")
  number(o, "min_p", 0, "a number from 0 to 1")
  number(o, "repetition_penalty", 1e-9, "a number above 0")
  number(o, "no_repeat_ngram_size", 0, "0 (off) or more")
  number(o, "max_new_tokens", 0, "0 or more")
  number(o, "max_length", 1, "1 or more")
  -- max_new_tokens wins over max_length, except that a call's max_length wins over a file's max_new_tokens.
  if opts and opts.max_length and not opts.max_new_tokens then o.max_new_tokens = nil end
  if not o.max_new_tokens then o.max_new_tokens = o.max_length and math.max(o.max_length - prompt_length, 0) or 20 end
  local limit = model.config.max_position_embeddings
  if not (opts and (opts.max_new_tokens or opts.max_length)) and limit then
    o.max_new_tokens = math.max(math.min(o.max_new_tokens, limit - prompt_length), 0)
  end
  o.min_length = math.max(o.min_length, o.min_new_tokens and prompt_length + o.min_new_tokens or 0)
  o.eos = o.ignore_eos and {} or list_of(o.eos_token_id or model.config.eos_token_id)
  o.pad = o.pad_token_id or model.config.pad_token_id or list_of(o.eos_token_id or model.config.eos_token_id)[1] or 0
  o.decoder_start_token_id = o.decoder_start_token_id or model.config.decoder_start_token_id
  o.stop = list_of(o.stop)
  o.seed = o.seed or (o.do_sample and os.time() * 1000 + math.floor(C.wane_clock() * 1e6) % 1000) or 0
  return o
end

-- ---------------------------------------------------------------- a run

---@class wane.Run
local Run = {}
Run.__index = Run

--- Starts a generation; run:next() gives a list of new ids, one a row, until it gives nil. run:close() frees its memory.
-- @param model wane.Model
-- @param prompts integer[][]
-- @param opts table|nil
-- @return wane.Run
function M.start(model, prompts, opts)
  prompts = inputs.check(prompts)
  local o = M.options(model, opts, inputs.length(model, prompts))
  local lists, mask, source = F.outside_scopes(inputs.prepare, model, prompts, o)
  local time = #lists[1]
  local batch = #lists
  local capacity = time + o.max_new_tokens
  local self = setmetatable({ model = model, o = o, batch = batch, source = source, prompt_length = time, produced = 0, enqueued = 0, finished = {},
                             left = batch }, Run)
  local compute_f32 = (model.compute or "f32") == "f32"
  self.cache = passes.cache(batch, capacity, compute_f32 and C.WANE_F32 or C.WANE_BF16)
  self.ids = F.persistent(C.WANE_I32, batch, capacity)
  self.pending = {}
  local data = ffi.new("int32_t[?]", batch * time)
  for b = 1, batch do for t = 1, time do data[(b - 1) * time + t - 1] = lists[b][t] end end
  F.outside_scopes(function()
    local function prompt_into(ids)
      local prompt = F.upload(data, C.WANE_I32, batch * time * 4, batch, time)
      F.copy(F.narrow(ids, 1, 0, time), prompt)
      prompt:close()
    end
    prompt_into(self.ids)
    self.penalised = self.ids
    if mask and o.repetition_penalty ~= 1 then
      -- The penalty passes over padding on the left. It takes an id once, so a pad that repeats the row's first id is as good as none.
      for b = 1, batch do
        local pads = 0
        while pads < time - 1 and mask[b][pads + 1] == 0 do pads = pads + 1 end
        for t = 0, pads - 1 do data[(b - 1) * time + t] = lists[b][pads + 1] end
      end
      self.penalised = F.persistent(C.WANE_I32, batch, capacity)
      prompt_into(self.penalised)
    end
    if mask then
      self.positions, self.key_mask = Model.mask_tensors(mask, batch, time, capacity)
      -- A generated token of row b stands `pads` places before its absolute time.
      if self.positions then
        self.shift = ffi.new("int32_t[?]", batch)
        for b = 1, batch do
          local sum = 0
          for t = 1, time do sum = sum + (mask[b][t] ~= 0 and 1 or 0) end
          self.shift[b - 1] = sum - time
        end
      end
    end
    local function i32_list(ids)
      if #ids == 0 then return nil end
      return F.upload(ffi.new("int32_t[?]", #ids, ids), C.WANE_I32, #ids * 4, #ids)
    end
    self.eos_tensor = i32_list(o.eos)
  end)
  return self
end

--- Enqueues the model over positions [from, from + count) of a sequence of length `reach`; returns the logits [B, V] of its last one, nil
-- from a piece before it.
function Run:forward(from, count, reach)
  local positions
  if self.positions then
    if from < self.prompt_length then
      positions = F.narrow(self.positions, 1, from, count)
    else
      local at = ffi.new("int32_t[?]", self.batch * count)
      for b = 0, self.batch - 1 do for t = 0, count - 1 do at[b * count + t] = math.max(from + t + self.shift[b], 0) end end
      positions = F.upload(at, C.WANE_I32, self.batch * count * 4, self.batch, count)
    end
  end
  local pass = passes.new { batch = self.batch, time = count, start = from, reach = reach, positions = positions, key_mask = self.key_mask,
                            cache = self.cache, source = self.source, tail_rows = 1 }
  local model = self.model
  local hidden = model:backbone(F.narrow(self.ids, 1, from, count), pass)
  if from + count < reach then return nil end
  return F.cast(F.view(model:head(hidden), self.batch, -1), C.WANE_F32)
end

--- Enqueues the processors and the choice of the id at position `at`. Returns ids [B] (i64 greedy, i32 sampled).
function Run:choose(logits, at)
  local o, s = self.o, stream()
  if o.repetition_penalty ~= 1 then check(C.wane_repetition_penalty(s, logits.h, self.penalised.h, at, o.repetition_penalty)) end
  if o.no_repeat_ngram_size > 0 then check(C.wane_no_repeat_ngram(s, logits.h, self.ids.h, at, o.no_repeat_ngram_size)) end
  if self.eos_tensor and at < o.min_length then check(C.wane_logits_set(s, logits.h, self.eos_tensor.h, -math.huge)) end
  if not o.do_sample then return F.argmax(logits, 1) end
  check(C.wane_logits_filter(s, logits.h, o.temperature, o.top_k, o.top_p, o.min_p))
  local h = core.handle_type()
  check(C.wane_sample(s, h, logits.h, o.seed, self.enqueued * 65536))   -- row b draws number b of the step
  return require("wane.tensor").wrap(h)
end

--- Rows that have ended go on as pad; the device must know, because the host reads a token late.
function Run:hold_finished(picked)
  if self.batch == 1 or not self.eos_tensor then return picked end
  picked = F.cast(picked, C.WANE_I64)
  if self.done then picked = F.where(self.done, self.pad_tensor, picked) end
  local done = self.done
  for _, eos in ipairs(self.o.eos) do
    local hit = F.binary_scalar(picked, eos, C.WANE_EQ)
    done = done and F.binary(done, hit, C.WANE_OR) or hit
  end
  if not self.pad_tensor then
    self.pad_tensor = F.outside_scopes(F.upload, ffi.new("int64_t[1]", self.o.pad), C.WANE_I64, 8, 1)
    self.done = F.persistent(C.WANE_BOOL, self.batch)
  end
  F.copy(self.done, done)
  return picked
end

--- Enqueues one more token (the prompt first).
function Run:enqueue()
  local step = self.enqueued
  local at = self.prompt_length + step
  local rotary = self.model.config.rotary
  local whole = step == 0 or rotary and rotary:turns_over(at)
  local from = whole and 0 or at - 1
  while from < at do
    local count = math.min(PREFILL, at - from)
    if from < self.prompt_length then count = math.min(count, self.prompt_length - from) end
    if from + count < at then core.scope(self.forward, self, from, count, at) else
      self.pending[#self.pending + 1] = core.scope(function() return self:place(self:forward(from, count, at), at) end)
    end
    from = from + count
  end
  if whole then C.wane_stream_trim(stream(), 4 * 2 ^ 20) end           -- a prompt's activations are far larger than a token's
  self.enqueued = step + 1
end

--- Chooses the id at position `at` and writes it into the running sequences.
function Run:place(logits, at)
  local picked = self:hold_finished(self:choose(logits, at))
  F.copy(F.narrow(self.ids, 1, at, 1), F.view(picked, self.batch, 1))
  if self.penalised ~= self.ids then F.copy(F.narrow(self.penalised, 1, at, 1), F.view(picked, self.batch, 1)) end
  return picked
end

--- The next token of each row: a list of ids, false for rows that had ended before. nil when all is over.
-- @return table|nil
function Run:next()
  local o = self.o
  if self.left == 0 or self.produced >= o.max_new_tokens then return nil end
  if self.enqueued == self.produced then self:enqueue() end
  if self.enqueued < o.max_new_tokens and self.enqueued == self.produced + 1 then self:enqueue() end
  local picked = table.remove(self.pending, 1)
  local values = F.read(picked, picked:dtype() == "i64" and "int64_t" or "int32_t")
  picked:close()
  self.produced = self.produced + 1
  local row = {}
  for b = 1, self.batch do
    local id = tonumber(values[b - 1])
    row[b] = not self.finished[b] and id
    if not self.finished[b] then
      for _, eos in ipairs(o.eos) do if id == eos then self:finish(b, "eos") break end end
    end
  end
  if self.produced == o.max_new_tokens then
    for b = 1, self.batch do if not self.finished[b] then self:finish(b, "length") end end
  end
  return row
end

--- Ends a row: "eos", "length" or "stop".
function Run:finish(b, reason)
  if self.finished[b] then return end
  self.finished[b] = reason
  self.left = self.left - 1
end

--- Frees the cache and the sequences.
function Run:close()
  for _, p in ipairs(self.pending) do p:close() end
  self.pending = {}
  self.cache:close()
  if self.penalised == self.ids then self.penalised = nil end
  for _, name in ipairs { "ids", "penalised", "source", "positions", "key_mask", "eos_tensor", "pad_tensor", "done" } do
    if self[name] then
      self[name]:close()
      self[name] = nil
    end
  end
end

-- ---------------------------------------------------------------- what users call

--- New ids for each prompt. Rows end at an eos (included), at a stop string (opts.tokenizer needed) or at the length.
-- @param model wane.Model
-- @param prompts integer[][] lists of ids; padded to one length, on the left (an encoder-decoder, whose encoder reads them: on the right)
-- @param opts table|nil
-- @return integer[][] new ids; second result: finish reasons
function M.generate(model, prompts, opts)
  local run = M.start(model, prompts, opts)
  local out, matchers = {}, {}
  for b = 1, run.batch do
    out[b] = {}
    matchers[b] = M.stop_matcher(run.o)
  end
  local ok, message = pcall(function()
    for row in run.next, run do
      for b = 1, run.batch do
        if row[b] then
          out[b][#out[b] + 1] = row[b]
          if matchers[b] and matchers[b](row[b]) then run:finish(b, "stop") end
        end
      end
    end
  end)
  run:close()
  if not ok then error(message, 0) end
  return out, run.finished
end

--- A function id -> true once a stop string overlaps the text's newest token; nil when there are no stop strings.
function M.stop_matcher(o)
  if #o.stop == 0 then return nil end
  if not o.tokenizer then core.raise "stop: stop strings need the tokenizer: opts.tokenizer" end
  local decoder, text = o.tokenizer:decode_stream { skip_special_tokens = false }, ""
  local longest = 0
  for _, s in ipairs(o.stop) do longest = math.max(longest, #s) end
  return function(id)
    local piece = decoder:step(id)
    if not piece or piece == "" then return false end
    local from = math.max(#text - longest + 2, 1)       -- an occurrence must end inside the new piece
    text = text .. piece
    for _, s in ipairs(o.stop) do if text:find(s, from, true) then return true end end
    if #text > 4 * longest + 1024 then text = text:sub(-longest) end
    return false
  end
end

--- Pieces of text as they are generated; never half a character. The text ends before a stop string.
-- @param model wane.Model
-- @param tok wane.Tokenizer
-- @param prompt string|integer[]
-- @param opts table|nil
-- @return function iterator of strings
-- @return wane.Run for counters: run.finished[1] says why it ended; run.on_token, if set, is called with each id
function M.stream(model, tok, prompt, opts)
  local ids = prompt
  if type(prompt) == "string" then ids = tok:encode(prompt, { add_special_tokens = not (opts and opts.add_special_tokens == false) }) end
  local run = M.start(model, { ids }, opts)
  local decoder = tok:decode_stream { skip_special_tokens = true }
  local stop, held, over = run.o.stop, "", false
  -- Text that may be the beginning of a stop string is held back.
  local function release(text, last)
    held = held .. text
    local cut
    for _, s in ipairs(stop) do
      local at = held:find(s, 1, true)
      if at and (not cut or at < cut) then cut = at end
    end
    if cut then
      over = true
      run:finish(1, "stop")
      local out = held:sub(1, cut - 1)
      held = ""
      return out
    end
    local keep = 0
    if not last then
      for _, s in ipairs(stop) do
        for n = math.min(#s - 1, #held), keep + 1, -1 do
          if held:sub(-n) == s:sub(1, n) then keep = n break end
        end
      end
    end
    local out = held:sub(1, #held - keep)
    held = held:sub(#held - keep + 1)
    return out
  end
  local function step()
    if over then return nil end
    while true do
      local row = run:next()
      if row and run.on_token then run.on_token(row[1]) end
      if not row then
        over = true
        local rest = release(decoder.finish and decoder:finish() or "", true)
        run:close()
        return rest ~= "" and rest or nil
      end
      local piece = decoder:step(row[1])
      if piece and piece ~= "" then
        local text = release(piece)
        if over then run:close() end
        if text ~= "" then return text end
        if over then return nil end
      end
    end
  end
  return function()
    local ok, text = pcall(step)
    if not ok then
      over = true
      run:close()
      error(text, 0)
    end
    return text
  end, run
end

return M
