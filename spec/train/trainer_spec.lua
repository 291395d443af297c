-- The training loop: what it logs, saves and resumes; that a run cut anywhere ends with the same bits.
local cjson = require "cjson"
local data = require "wane.train.data"
local lora = require "wane.lora"
local paths = require "wane.checkpoint.paths"
local saves = require "wane.train.saves"
local golden = require "spec.support.golden"
local wane = require "wane"
local support = require "train.support"

local folder, write, rows_path, open, adapted, values, with
  = support.folder, support.write, support.rows_path, support.open, support.adapted, support.values, support.with

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
    assert.error_matches(function() wane.train.run(model, open(), with {}) end, "the model trains nothing")
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
