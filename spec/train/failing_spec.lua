-- Runs that fail: updates that are not finite, rows and files that break, what is left and what resumes.
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


  it("puts off checkpoints and evaluations; three in a row end the run, and nothing is lost", function()
    local dir, model, sound = folder(), sick { [3] = true, [4] = true, [5] = true }, nil
    local o = with { accumulate = 1, max_steps = 9, out = dir, save_every = 1, save_total_limit = 1, eval_rows = open(), eval_every = 1,
      log = dir .. "/l.jsonl", on_update = function(r) if r.step == 2 then sound = values(model) end end }
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
        if n == 1 then sound = values(model) end
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
