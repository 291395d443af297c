--- Batches of training rows: shuffled, padded or packed, endless, and resumable: what comes next is a function of a few numbers.
--
--     local feed = batches.new(rows, { batch_size = 4, accumulate = 2, seed = 42 })
--     local update = feed:next()                 -- { count = labels in all, tokens, epoch, { ids, labels, attention_mask, count } … }
--     local state = feed:state()                 -- a small table; batches.new(rows, options):restore(state) goes on from there
-- @module wane.train.batches
local bit = require "bit"
local core = require "wane.core"

local M = {}

local IGNORED = -100
local MEGA = 50                          -- batches that are sorted by length together (transformers' LengthGroupedSampler)

-- ---------------------------------------------------------------- shuffling

-- 32 bits out of 32 bits and a key (the finalizer of MurmurHash3).
local function mix(x, key)
  x = bit.bxor(x, key)
  for _, step in ipairs { { 16, 0x85ebca6b }, { 13, 0xc2b2ae35 } } do
    x = bit.bxor(x, bit.rshift(x, step[1]))
    local low, high = bit.band(x, 0xffff), bit.rshift(x, 16)
    local factor_low, factor_high = bit.band(step[2], 0xffff), bit.rshift(step[2], 16)
    x = bit.tobit(low * factor_low + bit.lshift(bit.tobit(high * factor_low + low * factor_high), 16))
  end
  return bit.bxor(x, bit.rshift(x, 16))
end

--- A permutation of 0 … n - 1 that needs no memory: a Feistel network over the next power of four, walked until it falls inside
-- (Black & Rogaway 2002).
-- @param n integer
-- @param seed integer
-- @return function(i) -> integer, both from 0
function M.permutation(n, seed)
  local half = 1
  while 4 ^ half < n do half = half + 1 end
  local size, keys = 2 ^ half, {}
  for round = 1, 4 do keys[round] = mix(bit.tobit(seed % 2 ^ 32), round * 0x9e3779b) end
  local function once(i)
    local left, right = math.floor(i / size), i % size
    for round = 1, 4 do left, right = right, bit.bxor(left, mix(right, keys[round]) % size) end
    return left * size + right
  end
  return function(i)
    repeat i = once(i) until i < n
    return i
  end
end

-- ---------------------------------------------------------------- feed

---@class wane.Feed
local Feed = {}
Feed.__index = Feed

local known = { batch_size = true, accumulate = true, shuffle = true, seed = true, packing = true, group_by_length = true, pad = true,
  longest = true }

--- An endless source of updates.
-- @param rows wane.Rows
-- @param o table|nil { batch_size = 8, accumulate = 1, shuffle = true, seed = 42, packing = false (samples side by side, in rows of rows.max_length),
--   group_by_length = false, pad = 0, longest = ids that a row may have, as model:learned_positions() says; a longer one raises }
-- @return wane.Feed
function M.new(rows, o)
  o = o or {}
  for key in pairs(o) do if not known[key] then core.raise("batches.new: there is no option '%s'", tostring(key)) end end
  local self = setmetatable({ rows = rows, batch_size = o.batch_size or 8, accumulate = o.accumulate or 1, seed = o.seed or 42, packing = o.packing or false,
    by_length = o.group_by_length or false, pad = o.pad or 0,
    shuffle = o.shuffle ~= false, longest = o.longest or math.huge, epoch = 0, at = 0 }, Feed)
  if rows.count == 0 then core.raise("batches: %s has no rows", tostring(rows.path)) end
  if self.packing and rows.encoder_decoder then core.raise "batches: rows of an encoder-decoder cannot be packed" end
  if self.packing and not rows.max_length then core.raise "batches: rows that are packed tell the longest packed row: max_length" end
  if self.packing and self.by_length then core.raise "batches: packing and group_by_length exclude each other" end
  self:begin(0)
  return self
end

--- Goes to the beginning of an epoch (from 0).
function Feed:begin(epoch)
  self.epoch, self.at = epoch, 0
  self.order = self.shuffle and M.permutation(self.rows.count, self.seed * 1000003 + epoch) or function(i) return i end
  self.sorted, self.left = nil, nil
end

-- The row at place k (from 0) of this epoch's order, nil for one left out, and its number.
local function row_at(self, k)
  local number = self.order(k) + 1
  return self.rows:get(number), number
end

-- Places of a stretch of MEGA batches, longest rows first.
local function sort_stretch(self)
  local first = math.floor(self.at / (MEGA * self.batch_size)) * MEGA * self.batch_size
  if self.sorted and self.sorted.first == first then return self.sorted end
  local list = { first = first }
  for k = first, math.min(first + MEGA * self.batch_size, self.rows.count) - 1 do
    local row = row_at(self, k)
    list[#list + 1] = { place = k, length = row and #row.ids or 0 }
  end
  table.sort(list, function(a, b) return a.length > b.length or (a.length == b.length and a.place < b.place) end)
  self.sorted = list
  return list
end

-- The next row of this epoch and its number, or nil at its end. Rows left out are passed over.
local function take(self)
  while self.at < self.rows.count do
    local place = self.at
    if self.by_length then
      local list = sort_stretch(self)
      place = list[self.at - list.first + 1].place
    end
    self.at = self.at + 1
    local row, number = row_at(self, place)
    if row and #row.ids > self.longest then
      core.raise("%s, line %s: %d ids, and the model has learned positions for %d: max_length = %d (--max-length) cuts such rows", tostring(self.rows.path),
        tostring(row.line), #row.ids, self.longest, self.longest)
    end
    if row then return row, number end
  end
end

-- ---------------------------------------------------------------- making batches

local function labels_that_count(labels, from)
  local n = 0
  for t = from, #labels do if labels[t] ~= IGNORED then n = n + 1 end end
  return n
end

-- Rows side by side, padded on the right. Labels come from the rows: a pad that is the end token hides no end.
local function padded(self, list)
  local width, label_width, uneven = 0, 0, false
  for _, row in ipairs(list) do
    width, label_width = math.max(width, #row.ids), math.max(label_width, #row.labels)
    uneven = uneven or #row.ids ~= #list[1].ids
  end
  local seq2seq = self.rows.encoder_decoder
  local batch = { ids = {}, labels = {}, attention_mask = uneven and {} or nil, count = 0, tokens = 0, rows = {} }
  for b, row in ipairs(list) do
    local ids, labels, mask = {}, {}, {}
    for t = 1, width do ids[t], mask[t] = row.ids[t] or self.pad, row.ids[t] and 1 or 0 end
    for t = 1, label_width do labels[t] = row.labels[t] or IGNORED end
    batch.ids[b], batch.labels[b], batch.rows[b] = ids, labels, row.line
    if uneven then batch.attention_mask[b] = mask end
    batch.count = batch.count + labels_that_count(row.labels, seq2seq and 1 or 2)
    batch.tokens = batch.tokens + #row.ids + (seq2seq and #row.labels or 0)
  end
  return batch
end

-- One packed row: samples one behind the other until the next would not fit. Positions begin anew, `first` keeps samples apart, and a
-- sample's first id is nobody's label. A row that was taken and did not fit opens the next.
local function pack_row(self)
  local out, most = { ids = {}, labels = {}, positions = {}, first = {}, lines = {} }, self.rows.max_length
  while true do
    local row, number = self.left, self.left_number
    if not row then row, number = take(self) end
    self.left = nil
    if not row then break end
    if #out.ids > 0 and #out.ids + #row.ids > most then
      self.left, self.left_number = row, number
      break
    end
    local begin = #out.ids
    for t = 1, #row.ids do
      local k = begin + t
      out.ids[k], out.labels[k], out.positions[k], out.first[k] = row.ids[t], t == 1 and IGNORED or row.labels[t], t - 1, begin
    end
    out.lines[#out.lines + 1] = row.line
  end
  return #out.ids > 0 and out or nil
end

local function packed(self, list)
  local width = 0
  for _, row in ipairs(list) do width = math.max(width, #row.ids) end
  local batch = { ids = {}, labels = {}, positions = {}, first = {}, count = 0, tokens = 0, rows = {} }
  for b, row in ipairs(list) do
    local n = #row.ids
    batch.count = batch.count + labels_that_count(row.labels, 2)
    batch.tokens = batch.tokens + n
    for t = n + 1, width do                             -- the rest is a sample of pads, which nobody sees
      row.ids[t], row.labels[t], row.positions[t], row.first[t] = self.pad, IGNORED, t - n - 1, n
    end
    batch.ids[b], batch.labels[b], batch.positions[b], batch.first[b] = row.ids, row.labels, row.positions, row.first
    for _, line in ipairs(row.lines) do batch.rows[#batch.rows + 1] = line end
  end
  return batch
end

-- The next batch of this epoch, or nil at its end.
local function next_batch(self)
  local list = {}
  for i = 1, self.batch_size do
    list[i] = self.packing and pack_row(self) or (not self.packing and take(self)) or nil
    if not list[i] then break end
  end
  if #list == 0 then return nil end
  return self.packing and packed(self, list) or padded(self, list)
end

--- The next update of this epoch, or nil at its end.
-- @return table|nil { count = labels that count in all, tokens, epoch = this update's (from 0), batches … }
function Feed:rest()
  repeat
    local update = { count = 0, tokens = 0, epoch = self.epoch }
    for i = 1, self.accumulate do
      local batch = next_batch(self)
      if not batch then break end
      update[i] = batch
      update.count, update.tokens = update.count + batch.count, update.tokens + batch.tokens
    end
    if update.count > 0 then return update end
  until #update == 0
end

--- The micro-batches of the next update: `accumulate` of them, fewer at the end of an epoch. After an epoch's last comes the next epoch's first.
-- @return table { count = labels that count in all, tokens, epoch = this update's (from 0), batches … }
function Feed:next()
  local update = self:rest()
  if update then return update end
  self:begin(self.epoch + 1)
  update = self:rest()
  if update then return update end
  core.raise("batches: no row of %s can be used%s", tostring(self.rows.path),
    self.rows.skipped[1] and (": line %d: %s"):format(self.rows.skipped[1].line, self.rows.skipped[1].reason) or "")
end

--- Where the feed stands.
-- @return table { epoch, at, left = the number of a row that opens the next packed one }
function Feed:state() return { epoch = self.epoch, at = self.at, left = self.left and self.left_number or nil } end

--- Goes to where state() was taken, with the same rows and options.
-- @param state table
-- @return wane.Feed self
function Feed:restore(state)
  self:begin(state.epoch)
  self.at = state.at
  if state.left then self.left, self.left_number = self.rows:get(state.left), state.left end
  return self
end

return M
