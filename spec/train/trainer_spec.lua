-- The training loop: what it logs, saves and resumes; that a run cut anywhere ends with the same bits; the command.
local cjson = require "cjson"
local curve = require "wane.train.curve"
local data = require "wane.train.data"
local golden = require "spec.support.golden"
local log = require "wane.train.log"
local lora = require "wane.lora"
local paths = require "wane.checkpoint.paths"
local saves = require "wane.train.saves"
local wane = require "wane"

local folders = {}
local function folder()
  local dir = os.tmpname()
  os.remove(dir)
  folders[#folders + 1] = dir
  os.execute("mkdir -p " .. dir)
  return dir
end
teardown(function() for _, dir in ipairs(folders) do os.execute("rm -rf " .. dir) end end)

local function write(path, text)
  local f = assert(io.open(path, "w"))
  f:write(text)
  f:close()
  return path
end

-- Rows of ids that a tiny model can learn: a run of numbers.
local function rows_file(n)
  local out = {}
  for i = 1, n do
    local ids = {}
    for t = 1, 5 + i % 4 do ids[t] = 3 + (i * 5 + t) % 40 end
    out[i] = cjson.encode { input_ids = ids }
  end
  return write(folder() .. "/rows.jsonl", table.concat(out, "\n"))
end

local rows_path = rows_file(40)
local function open(max_length) return assert(data.open(rows_path, nil, { max_length = max_length })) end

local function adapted(o)
  o = o or {}
  local model = assert(wane.load(golden.root .. "llama", { tokenizer = false, compute = "f32", quant = o.quant }))
  lora.attach(model, { r = 4, alpha = 8, dropout = o.dropout or 0.1, target_modules = "all-linear", seed = 3 })
  return model
end

local function values(model)
  local out = {}
  for _, p in ipairs(model:trainable_parameters()) do out[p.name] = p:totable() end
  return out
end

local settings = { lr = 1e-2, batch_size = 4, accumulate = 2, max_steps = 12, warmup_steps = 2, optim = "adamw_8bit", seed = 5 }
local function with(more)
  local o = {}
  for _, source in ipairs { settings, more } do for key, value in pairs(source) do o[key] = value end end
  return o
end

describe("a run", function()
  it("lowers the loss and logs every update", function()
    local dir, model, seen = folder(), adapted(), {}
    local o = with { log = dir .. "/log.jsonl", max_steps = 30, on_update = function(r) seen[#seen + 1] = r.step end }
    local result = assert(wane.train.run(model, open(), o))
    assert.equal(30, result.steps)
    assert.equal(30, #seen)
    assert.is_true(result.loss < 0.7 * result.records[1].loss, ("%g -> %g"):format(result.records[1].loss, result.loss))
    local n = 0
    for line in io.lines(dir .. "/log.jsonl") do
      n = n + 1
      local r = cjson.decode(line)
      assert.equal(n, r.step)
      for _, key in ipairs { "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "rss_bytes", "seconds", "epoch" } do assert.is_number(r[key]) end
    end
    assert.equal(30, n)
    assert.equal(0, cjson.decode(io.open(dir .. "/log.jsonl"):read "*l").lr)
    model:close()
  end)

  for _, o in ipairs { {}, { checkpointing = true }, { packing = true }, { optim = "paged_lion_8bit" } } do
    it("cut and resumed ends with the same bits: " .. (next(o) or "plain"), function()
      local whole = adapted()
      assert(wane.train.run(whole, open(24), with(o)))
      local dir, asked = folder(), 0
      local first = adapted()
      local cut = with { out = dir, save_every = 3, log = dir .. "/log.jsonl", cancelled = function() asked = asked + 1 return asked == 7 end }
      for key, value in pairs(o) do cut[key] = value end
      assert.equal("cancelled", assert(wane.train.run(first, open(24), cut)).stopped)
      assert.equal(7, select(2, saves.latest(dir)))                       -- a cancelled run saves before it leaves
      os.execute("rm -r " .. dir .. "/checkpoint-7")                      -- as if it had been killed: two updates are lost
      local second = adapted()
      cut.cancelled, cut.resume = nil, true
      local result = assert(wane.train.run(second, open(24), cut))
      assert.equal(12, result.steps)
      assert.same(values(whole), values(second))
      local steps = {}
      for line in io.lines(dir .. "/log.jsonl") do steps[#steps + 1] = cjson.decode(line).step end
      assert.same({ 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 }, steps)        -- none twice
      for _, m in ipairs { whole, first, second } do m:close() end
    end)
  end

  it("gives the same bits with one thread and with two, checkpointed or not", function()
    local results = {}
    for i, o in ipairs { {}, { checkpointing = true }, {} } do
      wane.threads(i == 3 and 1 or 2)
      local model = adapted { quant = "nf4" }
      assert(wane.train.run(model, open(), with(o)))
      results[i] = values(model)
      model:close()
    end
    wane.threads(0)
    assert.same(results[1], results[2])
    assert.same(results[1], results[3])
  end)

  it("is the loop that anyone would write: a number of dropout for every batch, one count of labels, clipped, at the schedule's rate", function()
    local own, ran, o = adapted { dropout = 0.5 }, adapted { dropout = 0.5 }, with { max_steps = 5, optim = "adamw", clip = 0.5, weight_decay = 0 }
    local feed = wane.train.batches.new(open(), { batch_size = 4, accumulate = 2, seed = 5 })
    local opt = wane.optim.AdamW(own:trainable_parameters(), { lr = 0, weight_decay = 0 })
    local rate = require("wane.optim.schedule").new("linear", { lr = 1e-2, warmup_steps = 2, total_steps = 5 })
    for step = 0, 4 do
      local update = feed:next()
      for i, batch in ipairs(update) do
        wane.autograd.seed(5, step * 2 + i)
        own:loss(batch.ids, batch.labels, { attention_mask = batch.attention_mask, count = update.count }):backward()
      end
      opt:clip(0.5)
      opt.groups[1].lr = rate(step)
      opt:step()
      opt:zero_grad()
    end
    assert(wane.train.run(ran, open(), o))
    assert.same(values(own), values(ran))
    own:close()
    ran:close()
  end)

  it("decays neither norms nor biases, of however many dimensions", function()
    local optim, groups = require "wane.optim", nil
    local real = optim.by_name
    optim.by_name = function(name)
      local make, spelled = real(name)
      return function(g, ...)
        groups = g
        return make(g, ...)
      end, spelled
    end
    local model = assert(wane.load(golden.root .. "t5", { tokenizer = false, compute = "f32" }))
    model:train_parameters "."
    local rows = open()
    rows.encoder_decoder = true
    assert(wane.train.run(model, rows, with { max_steps = 1, optim = "adamw", weight_decay = 0.1 }))
    optim.by_name = real
    assert.same({ 0.1, 0 }, { groups[1].weight_decay, groups[2].weight_decay })
    local decays = {}
    for i, group in ipairs(groups) do
      for _, p in ipairs(group.params) do
        if p.name:find "relative_attention_bias" then assert.equal(2, p:dim()) end
        decays[p.name:match "[^.]+%.[^.]+$"] = i == 1
      end
    end
    assert.same({ false, false, true, true },
      { decays["relative_attention_bias.weight"], decays["layer_norm.weight"], decays["q.weight"], decays["wo.weight"] })
    model:close()
  end)

  it("tells of what it saves, each checkpoint once, and of what it evaluates", function()
    local model, dir, seen = adapted(), folder(), {}
    assert(wane.train.run(model, open(), with { max_steps = 4, out = dir, save_every = 2, eval_rows = open(), eval_every = 4, log = dir .. "/l.jsonl",
      on_event = function(what, value)
        local logged = 0
        for _ in io.lines(dir .. "/l.jsonl") do logged = logged + 1 end
        seen[#seen + 1] = ("%s %s %d"):format(what, what == "saved" and value:match "[^/]+$" or type(value.loss), logged)
      end }))
    -- The log has the lines of the updates that a checkpoint holds, and the evaluation's.
    assert.same({ "saved checkpoint-2 2", "evaluated number 5", "saved checkpoint-4 5" }, seen)
    model:close()
  end)

  it("leaves layers checkpointed or not as the model has them, unless told", function()
    local model = adapted()
    for _, c in ipairs { { true, nil, true }, { false, nil, nil }, { true, false, nil }, { false, true, true } } do
      model:checkpoint_layers(c[1])
      assert(wane.train.run(model, open(), with { max_steps = 1, checkpointing = c[2] }))
      assert.equal(c[3], model.checkpointing)
    end
    model:close()
  end)

  it("begins without the gradients that something left behind", function()
    local results = {}
    for i = 1, 2 do
      local model = adapted { dropout = 0 }
      local ids = { { 9, 8, 7, 6, 5 } }
      if i == 2 then model:loss(ids, ids):backward() end
      assert(wane.train.run(model, open(), with { max_steps = 2 }))
      results[i] = values(model)
      model:close()
    end
    assert.same(results[1], results[2])
  end)

  it("keeps the best adapter, stops when held-out rows gain no more, and rotates checkpoints", function()
    local dir, model = folder(), adapted { dropout = 0 }
    local held_out = open()
    local result = assert(wane.train.run(model, open(), with { out = dir, lr = 0.3, max_steps = 60, save_every = 2, save_total_limit = 2, eval_rows = held_out,
      eval_every = 2, patience = 2, schedule = "constant", warmup_steps = 0 }))
    assert.equal("early", result.stopped)
    assert.is_true(result.steps < 60)
    assert.is_true(lora.is_adapter(dir .. "/best"))
    local n = 0
    for _, name in ipairs(paths.list(dir)) do if name:find "^checkpoint" then n = n + 1 end end
    assert.equal(2, n)
    local best = assert(wane.load(golden.root .. "llama", { tokenizer = false, compute = "f32", lora = dir .. "/best" }))
    assert.is_true(math.abs(wane.train.evaluate(best, held_out, { batch_size = 4 }).loss - result.best.eval_loss) < 1e-5)
    best:close()
    local again = assert(wane.train.run(model, open(), with { out = dir, lr = 0.3, max_steps = 60, save_every = 2, save_total_limit = 2, eval_rows = held_out,
      eval_every = 2, patience = 2, schedule = "constant", warmup_steps = 0, resume = true }))
    assert.same({ "early", result.steps, true, 2 }, { again.stopped, again.steps, again.finished, again.stale })      -- what stopped does not train on
    model:close()
  end)

  it("saves the adapters that it trains, by name, beside frozen and waiting ones", function()
    local function several(trained)
      local model = assert(wane.load(golden.root .. "llama", { tokenizer = false, compute = "f32" }))
      for i, name in ipairs { "a", "b", "waits" } do
        lora.attach(model, { name = name, r = 2 * i, alpha = 8, target_modules = { "q_proj", "v_proj" }, init_lora_weights = false, seed = i })
      end
      lora.set_adapter(model, { "a", "b" })
      lora.train(model, false)
      for _, name in ipairs(trained) do lora.train(model, true, name) end
      return model
    end
    for _, trained in ipairs { { "b" }, { "a", "b" } } do
      local whole, cut, dir = several(trained), several(trained), folder()
      local function folder_of(at, name) return dir .. "/" .. at .. (#trained > 1 and "/" .. name or "") end
      assert(wane.train.run(whole, open(), with {}))
      local held_out, asked = open(), 0
      local o = with { out = dir, save_every = 2, save_total_limit = 2, eval_rows = held_out, eval_every = 6,
        cancelled = function() asked = asked + 1 return asked == 7 end }
      assert.equal("cancelled", assert(wane.train.run(cut, open(), o)).stopped)
      local again = several(trained)
      o.cancelled, o.resume = nil, true
      assert(wane.train.run(again, open(), o))
      assert.same(values(whole), values(again))
      local checkpoints = {}
      for _, name in ipairs(paths.list(dir)) do checkpoints[#checkpoints + 1] = name:match "^%.?checkpoint.*" end
      table.sort(checkpoints)
      assert.same({ "checkpoint-10", "checkpoint-12" }, checkpoints)                -- what went before is gone, its folders too
      for _, at in ipairs { "checkpoint-12", "best" } do
        assert.equal(#trained == 1, lora.is_adapter(dir .. "/" .. at))
        for _, name in ipairs(trained) do
          local saved = assert(lora.describe(folder_of(at, name)))
          assert.same({ name == "a" and 2 or 4, lora.parameters(again, name) }, { saved.config.r, saved.parameters })
        end
        assert.is_false(paths.is_folder(dir .. "/" .. at .. "/waits"))
      end
      local other = several(trained)                                                -- the last checkpoint is what the model is
      for _, name in ipairs(trained) do
        lora.delete(other, name)
        assert(lora.load(other, folder_of("checkpoint-12", name), { name = name }))
      end
      lora.set_adapter(other, { "a", "b" })
      local function loss_of(m) return wane.train.evaluate(m, held_out, { batch_size = 4 }).loss end
      assert.near(loss_of(again), loss_of(other), 1e-6)
      for _, m in ipairs { whole, cut, again, other } do m:close() end
    end
  end)

  it("does not save an adapter that it does not train", function()
    local model, dir = adapted(), folder()
    lora.train(model, false)
    wane.autograd.leaf(model:find("model.norm").weight)
    assert(wane.train.run(model, open(), with { out = dir, max_steps = 2, save_every = 2 }))
    assert.is_false(lora.is_adapter(dir .. "/checkpoint-2"))
    local saved = assert(require("wane.serialize").load(dir .. "/checkpoint-2/parameters.safetensors"))
    assert.equal("model.norm.weight", next(saved))
    assert.is_nil(next(saved, "model.norm.weight"))
    model:close()
  end)

  it("trains parameters of the model itself: full weights, norms, an encoder-decoder", function()
    for name, pattern in pairs { llama = ".", gpt2 = "1-d", t5 = "layer_norm" } do
      local model = assert(wane.load(golden.root .. name, { tokenizer = false, compute = "f32" }))
      assert.is_true(model:train_parameters(pattern) > 0)
      local rows = open()
      rows.encoder_decoder = model.encode ~= nil
      local dir = folder()
      local o = with { optim = "adamw", out = dir, save_every = 6, lr = 5e-3, eval_rows = rows, eval_every = 12 }
      local result = assert(wane.train.run(model, rows, o))
      assert.is_true(result.loss < result.records[1].loss)
      local best, last = assert(require("wane.serialize").load(dir .. "/best/parameters.safetensors")), model:trainable_parameters()
      for _, p in ipairs(last) do assert.same(p:totable(), best[p.name]:totable()) end
      local again = assert(wane.load(golden.root .. name, { tokenizer = false, compute = "f32" }))
      again:train_parameters(pattern)
      o.resume = true
      assert(wane.train.run(again, rows, o))                              -- nothing is left to do: the weights are read back
      assert.same(values(model), values(again))
      model:close()
      again:close()
    end
  end)

  it("refuses to resume another run, and says what differs", function()
    local dir = folder()
    local model = adapted()
    assert(wane.train.run(model, open(), with { out = dir, save_every = 12 }))
    local function refused(o, pattern)
      local ok, message = wane.train.run(model, open(), with(o))
      assert.is_nil(ok)
      assert.matches(pattern, message)
    end
    refused({ out = dir, resume = true, lr = 1 }, "belongs to a run with lr = 0.01; this one has 1")
    refused({ out = dir, resume = true, optim = "adamw" }, "optim = adamw_8bit; this one has adamw")
    refused({ out = dir, resume = true, optim_options = { betas = { 0.9, 0.99 } } }, "with optim_options = none; this one has .*0.99")
    refused({ out = dir, resume = true, schedule = "cosine" }, "with schedule = linear; this one has cosine")
    refused({ out = folder(), resume = true }, "there is no checkpoint in")
    local path = folder() .. "/other.jsonl"
    write(path, (assert(io.open(rows_path)):read("*a"):gsub("7", "8", 1)))
    local ok, message = wane.train.run(model, assert(data.open(path, nil)), with { out = dir, resume = true })
    assert.is_nil(ok)
    assert.matches("belongs to a run with the data's checksum = %x+; this one has %x+: give the same", message)
    -- Names that mean the same are no difference, nor is what an older version did not keep.
    local state = assert(saves.state(dir .. "/checkpoint-12"))
    assert.equal("adamw_8bit", state.settings.optim)
    state.settings.optim, state.settings.data, state.settings.optim_options, state.xxh64 = "adamw_bnb_8bit", nil, nil, nil
    write(dir .. "/checkpoint-12/trainer_state.json", cjson.encode(state))
    assert.is_true(assert(wane.train.run(model, open(), with { out = dir, resume = true, optim = "adamw_hf_8bit" })).finished)
    refused({ out = dir }, "checkpoint%-12' is of an earlier run: go on from it")
    write(dir .. "/checkpoint-12/trainer_state.json", "{")
    refused({ out = dir, resume = true }, "is no JSON")
    assert.error_matches(function() wane.train.run(model, open(), { lrr = 1 }) end, "there is no option 'lrr'")
    assert.error_matches(function() wane.train.run(model, open(), { resume = true }) end, "need `out`")
    lora.train(model, false)
    assert.error_matches(function() wane.train.run(model, open(), settings) end, "the model trains nothing")
    model:close()
  end)
end)

describe("a checkpoint", function()
  it("is whole or not there, whichever file fails", function()
    local model, dir, asked = adapted(), folder(), 0
    local function after_four()
      asked = asked + 1
      return asked == 4
    end
    assert.equal("cancelled", assert(wane.train.run(model, open(), with { out = dir, max_steps = 8, cancelled = after_four })).stopped)
    local serialize = require "wane.serialize"
    local real = serialize.save
    for fail = 1, 2 do
      local calls = 0
      serialize.save = function(...)
        calls = calls + 1
        if calls == fail then return nil, "no space left on the device" end
        return real(...)
      end
      local ok, message = pcall(wane.train.run, model, open(), with { out = dir, save_every = 8, max_steps = 8, resume = true })
      serialize.save = real
      assert.is_false(ok)
      assert.matches("the checkpoint of step 8 was not written: no space left", message)
      assert.equal(4, select(2, saves.latest(dir)))
    end
    os.execute(("mkdir -p %s/.checkpoint-9.part && touch %s/.checkpoint-9.part/x"):format(dir, dir))     -- of a run that was killed
    os.execute(("mkdir -p %s/.checkpoint-2.old %s/.best.part %s/.best.old && touch %s/.best.old/x"):format(dir, dir, dir, dir))
    os.execute(("mkdir -p %s/checkpoint-9 && touch %s/checkpoint-9/optimizer.safetensors"):format(dir, dir))                -- without its state
    assert.equal(4, select(2, saves.latest(dir)))
    saves.sweep(dir)
    for _, name in ipairs { ".checkpoint-9.part", ".checkpoint-2.old", ".best.part", ".best.old" } do assert.is_false(paths.is_folder(dir .. "/" .. name)) end
    assert.is_true(paths.is_file(dir .. "/best/x"))                     -- killed before the new one was in place
    model:close()
  end)

  it("says why the adapter in it was not written", function()
    local model, dir, real = adapted(), folder(), lora.save
    lora.save = function() return nil, "no space left on the device", "io" end
    local ok, message = pcall(wane.train.run, model, open(), with { out = dir, save_every = 1, max_steps = 1 })
    lora.save = real
    assert.is_false(ok)
    assert.matches("the checkpoint of step 1 was not written: no space left", message)
    model:close()
  end)

  it("is flushed to the disk before an older one goes", function()
    local model, dir, done = adapted(), folder(), {}
    local flush, rename = paths.flush, os.rename
    paths.flush = function(path)                                          -- luacheck: ignore
      done[#done + 1] = "flush " .. path:sub(#dir + 1)
      return flush(path)
    end
    os.rename = function(from, to)                                        -- luacheck: ignore
      done[#done + 1] = "to " .. to:sub(#dir + 1)
      return rename(from, to)
    end
    local ok, message = pcall(wane.train.run, model, open(), with { out = dir, max_steps = 2, save_every = 1, save_total_limit = 1 })
    paths.flush, os.rename = flush, rename                                -- luacheck: ignore
    assert.is_true(ok, message)
    assert.equal("to /best", table.remove(done, 1))                       -- what a killed run may have left
    assert.same({ "to /checkpoint-1", "flush ", "to /checkpoint-2", "flush ", "to /.checkpoint-1.old" }, done)
    model:close()
  end)
end)

describe("a run's folder", function()
  local patience = saves.patience
  setup(function() saves.patience = 0.1 end)
  teardown(function() saves.patience = patience end)

  it("is held by one at a time, made where it is missing, and gone where nothing came of it", function()
    local dir = folder() .. "/a/b"
    local function nested() return saves.holding(dir, function() return true end) end
    local ok, message, code = saves.holding(dir, nested)
    assert.is_nil(ok)
    assert.matches("another run is at work in '.*/a/b': '.*/a/b/.lock' is held by process %d+ on .", message)
    assert.equal("busy", code)
    assert.is_false(paths.is_folder((dir:gsub("/b$", ""))))
    assert.error_matches(function() saves.holding(dir, function() error("inside", 0) end) end, "^inside$")
    local function writes()
      write(dir .. "/result", "x")
      return 1, 2
    end
    assert.same({ 1, 2 }, { saves.holding(dir, writes) })
    assert.same({ "result" }, paths.list(dir))                            -- the lock is gone
    write(dir .. "/.lock", "1 on a machine that is off")                  -- of a run that was killed
    assert.is_true(nested())
    assert.same({ "result" }, paths.list(dir))
    assert.is_true(saves.holding(dir, function()                          -- removed under a run, and made again by another
      os.execute(("rm -r %s && mkdir %s && echo theirs >%s/.lock"):format(dir, dir, dir))
      return true
    end))
    assert.same({ ".lock" }, paths.list(dir))
    write(dir .. "/result", "x")
    assert.matches("cannot write in the folder '.*/result/x'", select(2, saves.holding(dir .. "/result/x", nested)))
  end)

  it("held by a run is refused to another, which leaves alone what is being written", function()
    local model, dir = adapted(), folder()
    local part = dir .. "/.best.part"
    os.execute("mkdir " .. part)
    local o = with { out = dir, max_steps = 1 }
    saves.holding(dir, function()
      local ok, message, code = wane.train.run(model, open(), o)
      assert.is_nil(ok, message)
      assert.equal("busy", code)
      assert.is_true(paths.is_folder(part))
    end)
    o.held = true
    assert.equal(1, saves.holding(dir, function() return assert(wane.train.run(model, open(), o)).steps end))
    assert.is_false(paths.is_folder(part))
    model:close()
  end)
end)

describe("an update that is not finite", function()
  -- A model whose loss and gradients, or one of them alone, are not finite in the updates (of one batch each) that `bad` names.
  local function sick(bad, alone)
    local model = adapted { dropout = 0 }
    local real, n = model.loss, 0
    rawset(model, "loss", function(self, ...)
      local loss = real(self, ...)
      n = n + (wane.autograd.allowed() and 1 or 0)                        -- evaluations are not counted
      if not wane.autograd.allowed() or not bad[n] then return loss end
      local p = self:trainable_parameters()[1]
      if alone == "its loss" then
        local shown = loss + math.huge
        shown.backward = function() loss:backward() end
        return shown
      end
      return wane.autograd.record(function() return alone and loss + (p - p):sqrt():sum() or loss * (0 / 0) end)
    end)
    return model
  end
  local function lines_of(path)
    local list = {}
    for line in io.lines(path) do list[#list + 1] = cjson.decode(line) end
    return list
  end

  for _, what in ipairs { "both", "its gradients", "its loss" } do
    it("changes nothing, and the run goes on: " .. what, function()
      local dir, before = folder(), {}
      local model = sick({ [2] = true, [3] = true, [5] = true, [6] = true }, what ~= "both" and what)
      local result = assert(wane.train.run(model, open(), with { accumulate = 1, optim = "adamw", max_steps = 7, log = dir .. "/l.jsonl",
        on_update = function(r) before[r.step] = values(model) end }))
      assert.equal(7, result.steps)
      for step, skipped in ipairs { false, true, true, false, true, true, false } do
        if step > 1 then assert.equal(skipped, pcall(assert.same, before[step - 1], before[step]), step) end
        local line = lines_of(dir .. "/l.jsonl")[step]
        assert.equal(skipped, line.skipped == true)
        assert.equal(skipped and what ~= "its loss", line.grad_norm == cjson.null)
        assert.equal(skipped and what ~= "its gradients", line.loss == cjson.null)
      end
      model:close()
    end)
  end

  -- Values of a checkpoint's trained tensors, as values(model) has them.
  local function saved_values(dir, step)
    local out = {}
    for name, p in pairs(assert(require("wane.serialize").load(("%s/checkpoint-%d/parameters.safetensors"):format(dir, step)))) do out[name] = p:totable() end
    return out
  end
  local function model_values(model)
    local out = {}
    for _, p in ipairs(model:trainable_parameters()) do out[p.name] = p:totable() end
    return out
  end

  it("puts off checkpoints and evaluations; three in a row end the run, and nothing is lost", function()
    local dir, model, sound = folder(), sick { [3] = true, [4] = true, [5] = true }, nil
    local o = with { accumulate = 1, max_steps = 9, out = dir, save_every = 1, save_total_limit = 1, eval_rows = open(), eval_every = 1,
      log = dir .. "/l.jsonl", on_update = function(r) if r.step == 2 then sound = model_values(model) end end }
    assert.error_matches(function() wane.train.run(model, open(), o) end,
      "the loss or the gradients of updates 3 to 5 are not finite: a smaller lr.*checkpoint%-5")
    local looked = 0
    for _, line in ipairs(lines_of(o.log)) do looked = looked + (line.eval_loss and 1 or 0) end
    assert.equal(2, looked)
    assert.same(sound, saved_values(dir, 2))                                                 -- still there, whatever the limit
    assert.same(sound, saved_values(dir, 5))
    assert.is_false(paths.is_folder(dir .. "/checkpoint-3"))
    model:close()
  end)

  it("makes up for a checkpoint and an evaluation that fell on it with the next sound update", function()
    local dir, model = folder(), sick { [4] = true }
    local result = assert(wane.train.run(model, open(), with { accumulate = 1, max_steps = 6, out = dir, save_every = 4, eval_rows = open(), eval_every = 4,
      log = dir .. "/l.jsonl" }))
    assert.equal(5, result.best.step)
    for step, there in pairs { [4] = false, [5] = true, [6] = true } do assert.equal(there, paths.is_folder(("%s/checkpoint-%d"):format(dir, step)), step) end
    model:close()
  end)

  it("loses nothing where it is the last, by the run's length, by ctrl-C or by an error behind it", function()
    for _, how in ipairs { "max_steps", "cancelled", "on_update" } do
      local dir, model = folder(), sick { [2] = true }
      local o, n, sound = with { accumulate = 1, max_steps = how == "max_steps" and 2 or 9, save_every = 50, out = dir }, 0, nil
      o.on_update = function(r)
        n = r.step
        if n == 1 then sound = model_values(model) end
        if n == 2 and how == "on_update" then error("full", 0) end
      end
      if how == "cancelled" then o.cancelled = function() return n == 2 end end
      local ok, result = pcall(wane.train.run, model, open(), o)
      assert.equal(how ~= "on_update", ok)
      if how == "cancelled" then assert.equal("cancelled", result.stopped) end
      assert.equal(2, select(2, saves.latest(dir)))
      assert.same(sound, saved_values(dir, 2))
      model:close()
    end
  end)

  it("does not hold back the best result: a held-out loss that is NaN is none", function()
    local dir, model, n = folder(), adapted(), 0
    local real = wane.train.evaluate
    wane.train.evaluate = function(...)
      n = n + 1
      local found = real(...)
      if n == 1 then found.loss = 0 / 0 end
      return found
    end
    local result = assert(wane.train.run(model, open(), with { max_steps = 2, out = dir, eval_rows = open(), eval_every = 1 }))
    wane.train.evaluate = real
    assert.equal(2, result.best.step)
    assert.is_true(lora.is_adapter(dir .. "/best"))
    model:close()
  end)
end)

describe("a run that fails", function()
  -- Row 30 of 40 is broken: with rows in their order, update 4 (of batches of 4, two an update) meets it.
  local function broken_rows()
    local rows, fail = open(), true
    local proxy = setmetatable({ mend = function() fail = false end }, { __index = rows })
    function proxy.get(_, i)
      if fail and i == 30 then error("line 30: broken", 0) end
      return rows:get(i)
    end
    return proxy
  end

  it("keeps the updates before it, and goes on with the row that failed", function()
    local whole, cut, dir = adapted(), adapted(), folder()
    assert(wane.train.run(whole, open(), with { shuffle = false, max_steps = 5 }))
    local rows = broken_rows()
    local ok, message = pcall(wane.train.run, cut, rows, with { shuffle = false, max_steps = 5, out = dir, log = dir .. "/l.jsonl" })
    assert.is_false(ok)
    local logged = 0
    for line in io.lines(dir .. "/l.jsonl") do
      logged = logged + 1
      assert.equal(logged, cjson.decode(line).step)
    end
    assert.equal(3, logged)
    assert.matches("line 30: broken", message)
    assert.matches("checkpoint%-3; resume goes on from it, with the same rows%)", message)
    assert.equal(3, select(2, saves.latest(dir)))
    cut:close()
    rows.mend()
    local again = adapted()
    local o = with { shuffle = false, max_steps = 5, out = dir, resume = true, save_every = 5, log = dir .. "/l.jsonl" }
    local result = assert(wane.train.run(again, rows, o))
    assert.same(values(whole), values(again))
    local finished = assert(wane.train.run(again, rows, o))
    assert.is_true(finished.finished)
    assert.near(result.loss, finished.loss, 1e-9)
    whole:close()
    again:close()
  end)

  it("in the midst of a step leaves no checkpoint: some parameters have changed, some have not", function()
    local model, dir, optim, n = adapted(), folder(), require "wane.optim", 0
    local real = optim.by_name
    optim.by_name = function(name)
      local make, spelled = real(name)
      return function(...)
        local opt = make(...)
        local step = opt.step
        opt.step = function(self)
          n = n + 1
          step(self)
          if n == 2 then error("out of memory", 0) end
        end
        return opt
      end, spelled
    end
    local ok, message = pcall(wane.train.run, model, open(), with { out = dir })
    optim.by_name = real
    assert.is_false(ok)
    assert.equal("out of memory", message)
    assert.is_nil(saves.latest(dir))
    model:close()
  end)

  it("at a bad row goes on without it, as a run does that had left it out from the first", function()
    local text = assert(io.open(rows_path)):read "*a"
    local path, n = folder() .. "/rows.jsonl", 0
    write(path, (text:gsub("[^\n]+", function(line)
      n = n + 1
      return n >= 30 and n <= 37 and '{"input_ids":[5,"a"]}' or line     -- as many as an update takes: an epoch has one fewer
    end)))
    local function rows(bad_rows) return assert(data.open(path, nil, { bad_rows = bad_rows })) end
    for _, length in ipairs { { max_steps = 7 }, { epochs = 2 } } do
      local whole, cut, dir = adapted(), adapted(), folder()
      local function o(more)
        local out = with(more)
        out.shuffle, out.max_steps, out.epochs = false, length.max_steps, length.epochs
        return out
      end
      assert.error_matches(function() wane.train.run(cut, rows "fail", o { out = dir }) end,
        "line 30: .*checkpoint%-3; resume goes on from it, with the same rows%)")
      local again = adapted()
      local result = assert(wane.train.run(again, rows "skip", o { out = dir, resume = true }))
      assert.equal(length.max_steps or 10, result.steps)                  -- its own number, 8 with the bad rows left out from the first
      assert.is_true(result.records[#result.records].lr > 0)
      if length.max_steps then
        assert(wane.train.run(whole, rows "skip", o {}))
        assert.same(values(whole), values(again))
      end
      for _, m in ipairs { whole, cut, again } do m:close() end
    end
  end)

  it("says which line is longer than the model has learned positions for", function()
    local ids = {}
    for t = 1, 70 do ids[t] = 5 + t % 9 end
    local path = write(folder() .. "/long.jsonl", '{"input_ids":[5,6,7]}\n\n' .. cjson.encode { input_ids = ids } .. "\n")
    for name, most in pairs { gpt2 = 64, opt = 64, llama = false } do
      local model = assert(wane.load(golden.root .. name, { tokenizer = false, compute = "f32" }))
      assert.equal(most or nil, (model:learned_positions()))
      model:train_parameters "1-d"
      local function rows(length) return assert(data.open(path, nil, { max_length = length })) end
      local o = { batch_size = 1, max_steps = 2 }
      for _, packing in ipairs(most and { false, true } or {}) do
        o.packing = packing
        assert.error_matches(function() wane.train.run(model, rows(), o) end,
          "long.jsonl, line 3: 70 ids, and the model has learned positions for 64: max_length = 64 %(%-%-max%-length%) cuts such rows")
      end
      if most then assert.error_matches(function() wane.train.evaluate(model, rows()) end, "line 3: 70 ids") end
      assert(wane.train.run(model, rows(most or nil), o))
      model:close()
    end
  end)

  it("says which checkpoint is damaged and which one is whole", function()
    local model, dir = adapted(), folder()
    assert(wane.train.run(model, open(), with { max_steps = 4, save_every = 2, out = dir }))
    for _, text in ipairs { "{}", "[]", "5", "{" } do
      write(dir .. "/checkpoint-4/trainer_state.json", text)
      local ok, message = wane.train.run(model, open(), with { max_steps = 4, save_every = 2, out = dir, resume = true })
      assert.is_nil(ok)
      assert.matches("the checkpoint of step 4 cannot be read: .*trainer_state.json", message)
      assert.matches("Remove .*/checkpoint%-4 to go on from .*/checkpoint%-2", message)
    end
    model:close()
  end)

  it("says which file of a checkpoint has a flipped bit, and which older checkpoint has none", function()
    local model, dir = adapted(), folder()
    local o = with { max_steps = 6, save_every = 2, out = dir }
    assert(wane.train.run(model, open(), o))
    o.resume = true
    local function flip(path, share)                                      -- again: back
      local f = assert(io.open(path, "r+b"))
      local text = f:read "*a"
      local at = math.floor(#text * share)
      f:seek("set", at)
      f:write(string.char(bit.bxor(text:byte(at + 1), 1)))
      f:close()
    end
    for name, share in pairs { ["parameters.safetensors"] = 0.9, ["optimizer.safetensors"] = 0.7, ["trainer_state.json"] = 0.02 } do
      local path = dir .. "/checkpoint-6/" .. name
      local f = assert(io.open(path))
      if name:find "state" then share = (f:read "*a":find '"at": %d' + 5) / f:seek() end     -- a digit: it is still JSON
      f:close()
      flip(path, share)
      local ok, message = wane.train.run(model, open(), o)
      assert.is_nil(ok)
      assert.matches(("the checkpoint of step 6 cannot be read: .*/checkpoint%%-6/%s is damaged: its checksum is %%x+, expected %%x+"):format(name), message)
      assert.matches("Remove .*/checkpoint%-6 to go on from .*/checkpoint%-4$", message)
      flip(dir .. "/checkpoint-4/optimizer.safetensors", 0.9)
      assert.matches("to go on from .*/checkpoint%-2$", (select(2, wane.train.run(model, open(), o))))
      flip(dir .. "/checkpoint-4/optimizer.safetensors", 0.9)
      flip(path, share)
    end
    assert.is_true(assert(wane.train.run(model, open(), o)).finished)
    model:close()
  end)

  it("leaves the model alone where a checkpoint does not fit, in whichever file", function()
    local model, other, dir = adapted(), adapted(), folder()
    local o = with { max_steps = 2, save_every = 2, out = dir }
    assert(wane.train.run(model, open(), o))
    local path = dir .. "/checkpoint-2/"
    local function resign()                                               -- as if it had been written so: no checksums
      local state = cjson.decode(assert(io.open(path .. "trainer_state.json")):read "*a")
      state.xxh64 = nil
      write(path .. "trainer_state.json", cjson.encode(state))
    end
    resign()
    local before, serialize = values(other), require "wane.serialize"
    o.resume = true
    local function refused(pattern)
      local ok, message = wane.train.run(other, open(), o)
      assert.is_nil(ok)
      assert.matches("the checkpoint of step 2 cannot be read: .*" .. pattern, message)
      assert.same(before, values(other))
    end
    os.execute(("cp -r %s %s/kept"):format(path, dir))
    write(path .. "optimizer.safetensors", "no tensors")
    refused "optimizer.safetensors"
    os.execute(("cp %s/kept/* %s"):format(dir, path))
    for _, change in ipairs { function(t, name) t[name] = wane.zeros(3, 3) end, function(t, name) t[name] = nil end } do
      local tensors = assert(serialize.load(dir .. "/kept/parameters.safetensors"))
      local name = other:trainable_parameters()[2].name
      change(tensors, name)
      assert(serialize.save(path .. "parameters.safetensors", tensors))
      refused(tensors[name] and "is .*%[3, 3%].*expected" or "holds no '.*', which is trained here")
    end
    model:close()
    other:close()
  end)

  it("goes on from a checkpoint that an older wane wrote, without checksums", function()
    local model, dir = adapted(), folder()
    local o = with { max_steps = 2, save_every = 2, out = dir }
    assert(wane.train.run(model, open(), o))
    local path = dir .. "/checkpoint-2/trainer_state.json"
    local state = assert(saves.state(dir .. "/checkpoint-2"))
    state.xxh64, o.resume = nil, true
    write(path, cjson.encode(state))
    assert.is_true(assert(wane.train.run(model, open(), o)).finished)
    model:close()
  end)

  it("is told at once what makes no sense", function()
    local model = adapted()
    local nan = 0 / 0
    for _, c in ipairs { { { lr = nan }, "lr: expected a number from 0 on, found %-?nan" },
      { { lr = -1 }, "lr: expected" }, { { lr = math.huge }, "lr: expected" },
      { { weight_decay = -0.1 }, "weight_decay: expected a number from 0 on, found %-0.1" }, { { clip = -1 }, "clip: expected" },
      { { warmup_steps = -5 }, "warmup_steps: expected" }, { { save_total_limit = 1, out = "x" }, "is of the checkpoints that save_every asks for" },
      { { schedule_options = { numcycles = 2 } }, "linear has no option 'numcycles'; it has none" },
      { { max_length = 9 }, "there is no option 'max_length'" }, { { drop_last = true }, "there is no option 'drop_last'" },
      { { batch_size = 0 }, "batch_size: expected a whole number above 0, found 0" }, { { accumulate = 1.5 }, "accumulate: expected" },
      { { epochs = 0 }, "epochs: expected a number above 0, found 0" }, { { epochs = -1, max_steps = 2 }, "epochs: expected" },
      { { epochs = 0 / 0 }, "epochs: expected" }, { { max_steps = 0 }, "max_steps: expected a whole number above 0, found 0" },
      { { max_steps = -3 }, "max_steps:" },
      { { schedule = "cosine_with_min_lr" }, "cosine_with_min_lr needs min_lr" },
      { { schedule = "warmup_stable_decay" }, "warmup_stable_decay needs num_decay_steps" },
      { { save_total_limit = 0 }, "save_total_limit: expected" }, { { patience = 1, eval_rows = open() }, "it needs eval_every" },
      { { eval_every = 1 }, "need eval_rows" } } do
      assert.error_matches(function() wane.train.run(model, open(), with(c[1])) end, c[2])
    end
    local path = write(folder() .. "/none.jsonl", '{"input_ids":[5]}\n{"input_ids":[6]}\n')
    assert.error_matches(function() wane.train.evaluate(model, assert(data.open(path, nil, { bad_rows = "skip" }))) end,
      "has anything to score: all were left out")
    model:close()
  end)
end)

describe("logs and curves", function()
  it("a log goes on from a step, without a line that a kill cut short", function()
    local path = write(folder() .. "/l.jsonl", '{"step":1,"loss":3}\n{"step":2,"loss":2}\n{"step":3,"loss":1}\n{"step":')
    local l = assert(log.open(path, 2))
    l:add { step = 3, loss = 0.5 }
    l:add { step = 4, loss = 0 / 0 }
    l:close()
    local f = assert(io.open(path))
    assert.matches('"loss": 2,.-\n.-"loss": 0.5,.-\n.-"loss": null,', f:read "*a")
    f:close()
    assert.same({ { 1, 3 }, { 2, 2 }, { 3, 0.5 } }, l:points "loss")
    assert.equal(4, #l.records)
    for _, place in ipairs { "/nowhere/l.jsonl", folder() } do
      local none, message = log.open(place)
      assert.is_nil(none)
      assert.matches("cannot write the log: ", message)
    end
  end)

  it("a new log leaves what stands there until it has a record", function()
    local old = '{"step": 9, "loss": 1}'
    local path = write(folder() .. "/l.jsonl", old .. "\n")
    assert(log.open(path)):close()
    assert.equal(old, io.open(path):read "*l")
    local l = assert(log.open(path))
    l:add { step = 1, loss = 1 }
    l:add { step = 2, loss = 1 }
    l:close()
    local steps = {}
    for line in io.lines(path) do steps[#steps + 1] = cjson.decode(line).step end
    assert.same({ 1, 2 }, steps)
  end)

  it("a log is written over nothing but another log, and never over the data", function()
    local dir = folder()
    local path, model = dir .. "/mine.jsonl", adapted()
    for _, text in ipairs { "old\n", '{"text":"a"}\n', '{"step":1,"text":"a"}\n', "\n", "[1]\n" } do
      write(path, text)
      local ok, message, code = wane.train.run(model, open(), with { max_steps = 1, log = path })
      assert.is_nil(ok)
      assert.matches("cannot write the log: '.*/mine.jsonl' is there, and no log of wane: choose another file", message)
      assert.equal("io", code)
      assert.equal(text, io.open(path):read "*a")
    end
    write(path, '{"step":1,"loss":2,"input_ids":[5,6,7]}\n')         -- a log by its first line
    os.execute(("ln -s mine.jsonl %s/link.jsonl"):format(dir))
    for data_path, log_path in pairs { [path] = path, [dir .. "/link.jsonl"] = path, [dir .. "/../" .. dir:match "[^/]*$" .. "/mine.jsonl"] = path } do
      local rows = assert(data.open(data_path, nil))
      assert.matches("cannot write the log: .* is the data", (select(2, wane.train.run(model, rows, with { max_steps = 1, log = log_path }))))
      assert.matches("is the data", (select(2, wane.train.run(model, open(), with { max_steps = 1, log = log_path, eval_rows = rows, eval_every = 1 }))))
    end
    write(path, "")
    assert(wane.train.run(model, open(), with { max_steps = 1, log = path }))
    assert(wane.train.run(model, open(), with { max_steps = 1, log = path }))
    model:close()
  end)

  it("a log is written through a link, and over no pipe or device", function()
    local dir = folder()
    write(dir .. "/real.jsonl", "")
    os.execute(("ln -s real.jsonl %s/link.jsonl; mkfifo %s/pipe"):format(dir, dir))
    local l = assert(log.open(dir .. "/link.jsonl"))
    l:add { step = 1, loss = 1 }
    l:close()
    assert.equal(1, cjson.decode(io.open(dir .. "/real.jsonl"):read "*l").step)
    assert.equal(0, os.execute(("test -h %s/link.jsonl"):format(dir)))
    for _, path in ipairs { dir .. "/pipe", "/dev/null", dir } do
      assert.matches("is a folder, a device or a pipe", (select(2, log.open(path))))
    end
    assert.equal(0, os.execute(("test -p %s/pipe && test -c /dev/null"):format(dir)))
  end)

  it("a log is one run's at a time", function()
    local dir, patience = folder(), saves.patience
    saves.patience = 0.1
    local first = assert(log.open(dir .. "/l.jsonl"))
    local second, message, code = log.open(dir .. "/l.jsonl")
    assert.is_nil(second)
    assert.matches("another run writes the log '.*/l.jsonl': .* is held by process %d+", message)
    assert.equal("busy", code)
    first:close()
    assert(log.open(dir .. "/l.jsonl")):close()
    assert.same({}, paths.list(dir))                                      -- the lock is gone
    saves.patience = patience
  end)

  it("a full disk under a log is told", function()
    local l = assert(log.open(folder() .. "/l.jsonl"))
    l:add { step = 6, loss = 1 }
    l.file:close()
    l.file = assert(io.open("/dev/full", "w"))
    assert.error_matches(function() l:add { step = 7, loss = 1 } end, "the line of step 7 was not written: .*[Nn]o space")
  end)

  it("a curve is drawn in a terminal's characters", function()
    local points = {}
    for i = 1, 100 do points[i] = { i, 5 - i / 25 } end
    local text = curve.terminal({ { name = "loss", points = points } }, 60, 8)
    local lines = {}
    for line in text:gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.equal(10, #lines)
    assert.matches("^ 4%.96│⠉", lines[1])
    assert.matches("^    1│.+[^ ]$", lines[8])
    assert.matches("^ +1 +100$", lines[10])
    assert.equal("", curve.terminal({ { name = "loss", points = {} } }, 60, 8))
  end)

  it("a curve of one update has an axis of one step, and a dot", function()
    local one = { { name = "loss", points = { { 1, 2 } } } }
    local lines = {}
    for line in curve.terminal(one, 24, 4):gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.equal("    │         ⠈", lines[3])
    assert.equal("              1", lines[6])
    local svg = curve.svg(one, "one")
    assert.matches('<circle cx="384%.0" cy="178%.0"', svg)
    assert.matches('<text x="384%.0" y="334" text%-anchor="middle">1</text>', svg)
    assert.equal(1, select(2, svg:gsub('y="334"', "")))
    -- Steps are whole, however few.
    svg = curve.svg({ { name = "loss", points = { { 1, 4 }, { 3, 2 } } } }, "three")
    assert.equal(3, select(2, svg:gsub('y="334"', "")))
  end)

  it("and as an SVG with axes, both curves and a title", function()
    local svg = curve.svg({ { name = "loss", points = { { 1, 4 }, { 10, 2 } } }, { name = "held out", points = { { 5, 3 } } } }, "a < b & c")
    assert.matches("^<svg xmlns=", svg)
    assert.matches("a &lt; b &amp; c", svg)
    assert.equal(1, select(2, svg:gsub("<polyline", "")))
    assert.equal(1, select(2, svg:gsub("<circle", "")))                   -- a line of one point would not be seen
    assert.matches(">step<", svg)
    assert.matches('points="64%.0,40%.0 704%.0,316%.0"', svg)
    assert.matches("</svg>\n$", svg)
    assert.is_string(curve.svg({ { name = "loss", points = {} } }, "empty"))
  end)
end)
