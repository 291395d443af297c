--- Training: the loop over updates, with its log, evaluations and checkpoints.
--
--     local rows = assert(wane.train.data.open("quotes.jsonl", tok, { text_field = "quote", max_length = 256 }))
--     lora.attach(model, { r = 8, alpha = 32, target_modules = "all-linear" })
--     local result = assert(wane.train.run(model, rows, { lr = 2e-4, max_steps = 200, optim = "paged_adamw_8bit", out = "adapters/quotes" }))
--
-- A run is a function of its options, seed and data: stopped anywhere and resumed from its last checkpoint it ends with the same bits.
-- Defaults are those of transformers' Trainer. A user's own loop needs none of this: see docs/finetuning.md.
-- @module wane.train
local autograd = require "wane.autograd"
local batches = require "wane.train.batches"
local core = require "wane.core"
local json = require "wane.checkpoint.json"
local logs = require "wane.train.log"
local optim = require "wane.optim"
local saves = require "wane.train.saves"
local schedule = require "wane.optim.schedule"

local M = { data = require "wane.train.data", batches = batches, curve = require "wane.train.curve", log = logs, saves = saves }

local defaults = { lr = 5e-5, schedule = "linear", warmup_steps = 0, epochs = 3, batch_size = 8, accumulate = 1, clip = 1.0, optim = "adamw",
  weight_decay = 0, seed = 42, shuffle = true, packing = false, group_by_length = false, resume = false }
local others = { max_steps = 1, out = 1, log = 1, save_every = 1, save_total_limit = 1, eval_rows = 1, eval_every = 1, patience = 1, cancelled = 1,
  on_update = 1, on_event = 1, optim_options = 1, schedule_options = 1, pad = 1, fingerprint = 1, remember = 1,
  held = 1, checkpointing = 1 }
-- What a resumed run must share with the one it goes on from, and what it is called where that is no option's name.
local same = { "lr", "schedule", "schedule_options", "warmup_steps", "batch_size", "accumulate", "clip", "optim", "optim_options", "weight_decay", "seed",
  "shuffle", "packing", "group_by_length", "total_steps", "data", "fingerprint" }
local called = { total_steps = "total_steps (max_steps, or epochs of these rows)", data = "the data's checksum", fingerprint = "the settings" }
local since = { schedule_options = true, optim_options = true, data = true }            -- checkpoints of older versions know nothing of these

local function options_of(given)
  local o = {}
  for key, value in pairs(defaults) do o[key] = value end
  for key, value in pairs(given or {}) do
    if defaults[key] == nil and not others[key] then core.raise("train.run: there is no option '%s'", tostring(key)) end
    o[key] = value
  end
  for _, key in ipairs { "batch_size", "accumulate", "save_every", "save_total_limit", "eval_every", "patience", "max_steps" } do
    local n = o[key]
    if n ~= nil and (type(n) ~= "number" or n < 1 or n % 1 ~= 0) then
      core.raise("train.run: %s: expected a whole number above 0, found %s", key, tostring(n))
    end
  end
  for _, key in ipairs { "lr", "warmup_steps", "weight_decay", "clip" } do
    local x = o[key]
    if type(x) ~= "number" or not (x >= 0 and x < math.huge) then core.raise("train.run: %s: expected a number from 0 on, found %s", key, tostring(x)) end
  end
  if type(o.epochs) ~= "number" or not (o.epochs > 0 and o.epochs < math.huge) then
    core.raise("train.run: epochs: expected a number above 0, found %s", tostring(o.epochs))
  end
  if (o.patience or o.eval_every) and not o.eval_rows then core.raise "train.run: eval_every and patience need eval_rows" end
  if o.save_total_limit and not o.save_every then core.raise "train.run: save_total_limit is of the checkpoints that save_every asks for" end
  if o.patience and not o.eval_every then core.raise "train.run: patience counts evaluations: it needs eval_every" end
  return o
end

-- ---------------------------------------------------------------- setting up

-- Two groups: what decays, and norms and biases, which do not (transformers trainer.py get_decay_parameter_names). Norms are told by their one dimension;
-- T5's relative_attention_bias has two.
local function groups_of(params, decay)
  local with, without = { params = {}, weight_decay = decay }, { params = {}, weight_decay = 0 }
  for _, p in ipairs(params) do
    local plain = p:dim() == 1 or p.name:lower():find "bias"
    table.insert((plain and without or with).params, p)
  end
  local groups = {}
  for _, group in ipairs { with, without } do if #group.params > 0 then groups[#groups + 1] = group end end
  return groups
end

-- Updates of an epoch in which no row is left out.
local function updates_of_all(rows, o)
  return math.ceil(math.ceil(rows.count / o.batch_size) / o.accumulate)
end

-- Updates of an epoch: a matter of numbers, unless rows are packed or may be left out, when one epoch is gone through.
local function updates_per_epoch(feed, o)
  if not o.packing and feed.rows.bad_rows ~= "skip" then return updates_of_all(feed.rows, o) end
  local n = 0
  while feed:rest() do n = n + 1 end
  feed:begin(0)
  return math.max(n, 1)
end

local function rate_of(o)
  local rate = { lr = o.lr, warmup_steps = o.warmup_steps, total_steps = o.total_steps }
  for key, value in pairs(o.schedule_options or {}) do rate[key] = value end
  return schedule.new(o.schedule, rate)
end

local Run = {}
Run.__index = Run

local function set_up(model, rows, o)
  local self = setmetatable({ model = model, o = o, step = 0, best = nil, stale = 0, broken = 0, seconds = 0, tokens = 0 }, Run)
  self.params = model:trainable_parameters()
  if #self.params == 0 then
    core.raise "train.run: the model trains nothing: attach an adapter (wane.lora.attach), or choose parameters (model:train_parameters)"
  end
  self.feed = batches.new(rows, { batch_size = o.batch_size, accumulate = o.accumulate, shuffle = o.shuffle, seed = o.seed, packing = o.packing,
    group_by_length = o.group_by_length, pad = o.pad, longest = model:learned_positions() })
  o.total_steps = o.max_steps or math.ceil(o.epochs * updates_per_epoch(self.feed, o))
  local make, name = optim.by_name(o.optim)
  if not make then core.raise("train.run: %s", name) end
  local settings = { lr = o.lr }
  for key, value in pairs(o.optim_options or {}) do settings[key] = value end
  self.opt = make(groups_of(self.params, o.weight_decay), settings)
  self.rate = rate_of(o)
  if o.checkpointing ~= nil then model:checkpoint_layers(o.checkpointing) end      -- nil: as lora.prepare_for_kbit_training left it
  self.opt:zero_grad()                             -- what a loss before this run, or a run that failed, left is no part of the first update
  return self
end

-- ---------------------------------------------------------------- checkpoints

-- A table of options as a text.
local function text_of(options) return next(options or {}) and (json.encode(options):gsub("\n%s*", " ")) or "none" end

-- What a run shares with those that go on from it, as its checkpoints hold it.
local function settings_of(run)
  local out = {}
  for _, key in ipairs(same) do out[key] = run.o[key] end
  out.optim = select(2, optim.by_name(out.optim))
  out.schedule_options, out.optim_options, out.data = text_of(out.schedule_options), text_of(out.optim_options), run.feed.rows.hash
  return out
end

--- Writes checkpoint-STEP; raises where that fails.
-- @param keep boolean|nil none of the older ones goes for it
function Run:save(keep)
  local state = { step = self.step, feed = self.before or self.feed:state(), best = self.best, stale = self.stale,
    remember = self.o.remember, settings = settings_of(self) }
  self.saving = true
  local path, message = saves.write(self.o.out, self.step, { model = self.model, params = self.params, opt = self.opt, state = state },
    not keep and self.o.save_total_limit or nil)
  if not path then core.raise("train.run: the checkpoint of step %d was not written: %s", self.step, message) end
  self.saved, self.saving = self.step, false
  if self.o.on_event then self.o.on_event("saved", path) end
end

-- Of two lists of settings ("model a, quant nf4"), those that differ.
local function apart(a, b)
  local function set(text)
    local entries = {}
    for entry in (text .. ", "):gmatch "(.-), " do entries[entry] = true end
    return entries
  end
  local function missing(from, other)
    local list = {}
    for entry in pairs(from) do if not other[entry] then list[#list + 1] = entry end end
    table.sort(list)
    return #list > 0 and table.concat(list, ", ") or "none of these"
  end
  a, b = set(a), set(b)
  return missing(a, b), missing(b, a)
end

--- Goes on from the newest checkpoint; nil and why where it belongs to another run.
function Run:resume()
  local path, step = saves.latest(self.o.out)
  if not path then return nil, ("there is no checkpoint in '%s' to resume from"):format(self.o.out) end
  local function damaged(message)
    local older = saves.whole_before(self.o.out, step)
    return nil, ("the checkpoint of step %d cannot be read: %s%s"):format(step, message, older and (". Remove %s to go on from %s"):format(path, older) or "")
  end
  local state, message = saves.state(path)
  if not state then return damaged(message) end
  -- A run that a bad row ended goes on with bad_rows = "skip": the order of rows is that of all rows, good or bad, so nothing before it was another.
  -- It keeps its number of updates, which an epoch without the bad ones may have fewer of.
  local was_total = state.settings.total_steps
  if not self.o.max_steps and self.feed.rows.bad_rows == "skip" and was_total == math.ceil(self.o.epochs * updates_of_all(self.feed.rows, self.o)) then
    self.o.total_steps = was_total
    self.rate = rate_of(self.o)
  end
  local earlier, now = state.settings, settings_of(self)
  earlier.optim = select(2, optim.by_name(earlier.optim))                   -- older versions kept the name as it was given
  for _, key in ipairs(same) do
    local was, is = earlier[key], now[key]
    if was ~= is and not (was == nil and since[key]) then
      if key == "fingerprint" and type(was) == "string" and type(is) == "string" then was, is = apart(was, is) end
      return nil, ("%s belongs to a run with %s = %s; this one has %s: give the same options, or another folder"):format(path, called[key] or key,
        tostring(was), tostring(is))
    end
  end
  local ok
  ok, message = saves.read(path, self, state)                                -- after the settings: another optimizer's state is no damage
  if not ok then return damaged(message) end
  self.step, self.best, self.stale = state.step, state.best, state.stale or 0
  self.saved, self.o.remember = state.step, state.remember
  self.feed:restore(state.feed)
  return true
end

-- ---------------------------------------------------------------- one update

local function loss_options(batch, count)
  return { count = count, attention_mask = batch.attention_mask, positions = batch.positions, first = batch.first }
end

--- Mean of -log p over rows held out, under no_grad.
-- @param model wane.Model
-- @param rows wane.Rows
-- @param o table|nil { batch_size = 8, pad = 0 }
-- @return table { loss, perplexity, count }
function M.evaluate(model, rows, o)
  o = o or {}
  local feed = batches.new(rows, { batch_size = o.batch_size or 8, shuffle = false, pad = o.pad, longest = model:learned_positions() })
  local sum, count = 0, 0
  for update in feed.rest, feed do
    local batch = update[1]
    autograd.no_grad(core.scope, function() sum = sum + model:loss(batch.ids, batch.labels, loss_options(batch, 1)):item() end)
    count = count + batch.count
  end
  if count == 0 then
    core.raise("train.evaluate: no row of '%s' has anything to score%s", tostring(rows.path), (rows.bad or 0) > 0 and ": all were left out" or "")
  end
  return { loss = sum / count, perplexity = math.exp(sum / count), count = count }
end

local function finite(x) return x - x == 0 end

-- The gradients of an update's batches: the loss and the gradients' norm before clipping. They are read, which waits for the backward: what is not
-- finite must not come into the parameters, or an adapter, its moments and the checkpoints of all later updates are lost with it.
local function gradients(self, update)
  local o, losses = self.o, {}
  for i, batch in ipairs(update) do
    autograd.seed(o.seed, self.step * o.accumulate + i)
    local loss = self.model:loss(batch.ids, batch.labels, loss_options(batch, update.count))
    loss:backward()
    losses[i] = loss
  end
  local total = losses[1]
  for i = 2, #losses do total = total + losses[i] end
  local norm = self.opt:clip(o.clip)
  return total:item(), norm:item()
end

--- An update, and its line in the log. Where its loss or its gradients' norm is not finite, nothing changes but the count of updates (torch's
-- GradScaler and its optimizers do the same): not the parameters, not the moments. The third such update in a row raises.
function Run:update()
  local o = self.o
  local record = { step = self.step + 1, lr = self.rate(self.step) }
  local started = core.C.wane_clock()
  self.before = self.feed:state()                  -- where the data stood before an update that may fail
  local update = self.feed:next()
  core.scope(function()
    record.loss, record.grad_norm = gradients(self, update)
    if finite(record.loss) and finite(record.grad_norm) then
      for _, group in ipairs(self.opt.groups) do group.lr = record.lr end
      self.stepping = true
      self.opt:step()
      self.stepping, self.broken = false, 0
    else
      record.skipped, self.broken = true, self.broken + 1
    end
    self.opt:zero_grad()
  end)
  self.step, self.before = self.step + 1, nil
  record.tokens, record.epoch, record.seconds = update.tokens, update.epoch, core.C.wane_clock() - started
  record.tokens_per_s = record.tokens / record.seconds
  collectgarbage("step", 200)          -- an update leaves 0.1 MB of Lua's own, and loading a model has set the collector's next round far off
  local memory = require("ffi").new "wane_memory"
  core.C.wane_memory_read(memory)
  record.rss_bytes = tonumber(memory.rss)
  self.seconds, self.tokens, self.last = self.seconds + record.seconds, self.tokens + record.tokens, record
  self.log:add(record)
  if self.broken == 3 then self:give_up() end
  if o.on_update then o.on_update(record, o.total_steps) end
end

--- Raises: the last updates were skipped, and the next would hardly fare better.
function Run:give_up()
  core.raise("train.run: the loss or the gradients of updates %d to %d are not finite: a smaller lr or f32 compute may help; "
    .. "wane.autograd.anomaly = true names the op", self.step - self.broken + 1, self.step)
end

--- Evaluates; true where the run should stop early.
function Run:look()
  local o = self.o
  local found = M.evaluate(self.model, o.eval_rows, { batch_size = o.batch_size, pad = o.pad })
  self.log:add { step = self.step, eval_loss = found.loss, perplexity = found.perplexity }
  if o.on_event then o.on_event("evaluated", found) end
  if finite(found.loss) and (not self.best or found.loss < self.best.eval_loss) then
    self.best, self.stale = { eval_loss = found.loss, step = self.step }, 0
    if o.out then
      local ok, message = saves.write_best(o.out, self)
      if not ok then core.raise("train.run: the best result was not written: %s", message) end
    end
    return false
  end
  self.stale = self.stale + 1
  return self:is_stale()
end

--- Whether so many evaluations brought no gain that the run ends.
function Run:is_stale() return self.o.patience ~= nil and self.stale >= self.o.patience end

local function due(step, every) return every and every > 0 and step % every == 0 end

--- The updates up to the last one. An evaluation or a checkpoint that falls on a skipped update waits for the next sound one: the run may be about to
-- end, and older checkpoints would go for one of the same parameters.
-- @return string|nil why it stopped before
function Run:go()
  local o, look, save = self.o, false, false
  local stopped = self:is_stale() and "early" or nil
  while self.step < o.total_steps and not stopped do
    self:update()
    look, save = look or (o.eval_rows and due(self.step, o.eval_every)), save or due(self.step, o.save_every)
    if o.cancelled and o.cancelled() then stopped = "cancelled" end
    if self.broken == 0 then
      if look and self:look() then stopped = "early" end
      if save then self:save() end
      look, save = false, false
    end
  end
  if o.out and (o.save_every or stopped == "cancelled") and self.saved ~= self.step then self:save() end
  return stopped
end

--- After an error: the checkpoint of the last whole update, if there is something to keep.
-- @return string|nil its path
function Run:rescue()
  if not self.o.out or self.saving or self.stepping or self.step == 0 or self.saved == self.step then return nil end
  return pcall(self.save, self, true) and saves.latest(self.o.out) or nil
end

-- ---------------------------------------------------------------- the run

-- The run itself; `out` is held.
local function run(model, rows, o)
  local self = set_up(model, rows, o)
  if o.out then saves.sweep(o.out) end
  local earlier = o.out and not o.resume and saves.latest(o.out)
  if earlier then return nil, ("'%s' is of an earlier run: go on from it (resume), remove it, or choose another folder"):format(earlier), "mismatch" end
  if o.resume then
    local ok, message = self:resume()
    if not ok then return nil, message, "mismatch" end
  end
  local log, message, code = logs.open(o.log, o.resume and self.step or nil, { rows.path, o.eval_rows and o.eval_rows.path })
  if not log then return nil, message, code end
  self.log = log
  local finished = self.step >= o.total_steps or self:is_stale()
  local ok, stopped = pcall(self.go, self)
  if not ok then
    local kept = self:rescue()
    self.log:close()
    if kept and type(stopped) == "string" then stopped = ("%s (written: %s; resume goes on from it, with the same rows)"):format(stopped, kept) end
    error(stopped, 0)
  end
  self.log:close()
  local records = self.log.records
  self.opt:close()
  local loss = self.last and self.last.loss
  for i = #records, 1, -1 do loss = loss or type(records[i].loss) == "number" and records[i].loss end
  return { steps = self.step, loss = loss or nil, finished = finished or nil, seconds = self.seconds, tokens = self.tokens,
    tokens_per_s = self.seconds > 0 and self.tokens / self.seconds or 0, best = self.best, stale = self.stale, stopped = stopped,
    records = records, remember = o.remember,
    curve = { { name = "loss", points = self.log:points "loss" }, { name = "held out", points = self.log:points "eval_loss" } } }
end

--- Trains what the model's leaves are.
-- @param model wane.Model
-- @param rows wane.Rows see wane.train.data
-- @param given table|nil { lr = 5e-5, schedule = "linear", warmup_steps = 0 (below 1: a share), epochs = 3, max_steps, batch_size = 8, accumulate = 1,
--   packing = false, group_by_length = false, shuffle = true, pad = id for padding, clip = 1.0 (0: off), optim = "adamw"
--   (wane.optim.by_name), optim_options, schedule_options, weight_decay = 0, seed = 42, checkpointing (nil: as the model is),
--   out = folder for checkpoints, save_every = updates, save_total_limit, resume = false, log = path of a JSONL file, eval_rows, eval_every, patience =
--   evaluations without gain, cancelled = function() -> true to save and stop, on_update = function(record, total), on_event = function(what, value),
--   fingerprint = any text that a resumed run must share,
--   remember = any table that checkpoints keep: a resumed run has the first run's, held = true where the caller holds `out` (wane.train.saves.holding) }
-- @return table|nil { steps, loss = of the last update, seconds, tokens, tokens_per_s, best = { eval_loss, step }, stale = evaluations since, stopped =
--   "cancelled" | "early" | nil, records = the log's, remember, finished = true where a resumed run had no update left (stopped = "early": it had no
--   patience left) }, string|nil message; an error raised by a later update leaves a checkpoint of the one before it in `out`
function M.run(model, rows, given)
  local o = options_of(given)
  if (o.save_every or o.resume) and not o.out then core.raise "train.run: save_every and resume need `out`, the folder of the checkpoints" end
  if not o.out or o.held then return run(model, rows, o) end
  return saves.holding(o.out, function() return run(model, rows, o) end)
end

return M
