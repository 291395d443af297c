-- wane finetune as users run it: options, mistakes, results; kill -9 at random moments and ctrl-C.
local cjson = require "cjson"
local ffi = require "ffi"
local golden = require "spec.support.golden"
local safetensors = require "spec.support.safetensors"
local wane = require "wane"

local bin = os.getenv "WANE_BIN" or "bin/wane"
local folders = {}
local function folder()
  local dir = os.tmpname()
  os.remove(dir)
  folders[#folders + 1] = dir
  os.execute("mkdir -p " .. dir)
  return dir
end
teardown(function() for _, dir in ipairs(folders) do os.execute("rm -rf " .. dir) end end)

local rows_path = folder() .. "/rows.jsonl"
do
  local f = assert(io.open(rows_path, "w"))
  for i = 1, 30 do
    local ids = {}
    for t = 1, 5 + i % 4 do ids[t] = 3 + (i * 5 + t) % 40 end
    f:write(cjson.encode { input_ids = ids }, "\n")
  end
  f:close()
end

local base = ("%s finetune --model %sllama --data %s --quant nf4 --lora-r 4 --lora-alpha 8 --lora-dropout 0.1 --target-modules all-linear "
  .. "--optim paged_adamw_8bit --lr 1e-2 --batch-size 4 --accumulate 2 --warmup-steps 2 --seed 3"):format(bin, golden.root, rows_path)

-- Output, error output and exit status of a command.
local function run(command)
  local errors = os.tmpname()
  local f = assert(io.popen(("%s 2>%s; echo \"[$?]\""):format(command, errors)))
  local out = f:read "*a"
  f:close()
  local e = assert(io.open(errors))
  local err = e:read "*a"
  e:close()
  os.remove(errors)
  local text, status = out:match "^(.*)%[(%d+)%]\n$"
  return text, err, tonumber(status)
end

-- Bytes of the adapter's tensors, by name.
local function adapter(dir)
  local out = {}
  for name, t in pairs(safetensors.read(dir .. "/adapter_model.safetensors")) do out[name] = ffi.string(t.data, t.numel * 4) end
  assert.is_truthy(next(out))
  return out
end

describe("wane finetune", function()
  it("does not write over a result or a model, and refuses what makes no sense", function()
    local dir = folder()
    for _, name in ipairs { "adapter_config.json", "config.json", "model.safetensors" } do
      os.execute(("touch %s/%s"):format(dir, name))
      local _, err, status = run(base .. " --max-steps 1 --out " .. dir)
      assert.equal(2, status)
      assert.matches("holds " .. name:gsub("%p", "%%%0") .. ", an earlier result's or a model's", err)
      os.execute(("rm %s/%s"):format(dir, name))
    end
    for _, c in ipairs { { "--save-total-limit 0", "--save%-total%-limit: a number above 0" },
      { "--patience 1 --eval-data " .. rows_path, "needs %-%-eval%-every" },
      { "--schedule warmup_stable_decay", "needs num_decay_steps.*%-%-num%-decay%-steps" },
      { "--schedule cosine_with_min_lr", "needs min_lr.*%-%-min%-lr" }, { "--save-total-limit 2", "of the checkpoints that %-%-save%-every asks for" },
      { "--min-lr 1e-5", "%-%-schedule: linear has no option 'min_lr'" }, { "--schedule cosine --power 2", "cosine has no option 'power'; it has num_cycles" },
      { "--warmup-steps=-5", "%-%-warmup%-steps: a number from 0 on" }, { "--weight-decay=-1", "%-%-weight%-decay: a number" },
      { "--clip=-1", "%-%-clip: a number" },
      { "--epochs 0", "--epochs: a number above 0" } } do
      local _, err, status = run(("%s --max-steps 1 %s --out %s"):format(base, c[1], dir))
      assert.equal(2, status, c[1])
      assert.matches(c[2], err)
    end
    local _, err, status = run(base .. " --max-steps 2 --schedule warmup_stable_decay --num-decay-steps 1 --target-modules q_proj,nope --out " .. dir)
    assert.equal(0, status, err)
    assert.matches("nothing in this model is called nope", err)
  end)

  it("trains, reports, and writes an adapter that generate takes", function()
    local dir = folder()
    local out, err, status = run(base .. " --max-steps 8 --eval-data " .. rows_path .. " --json --out " .. dir)
    assert.equal(0, status, err)
    local report = cjson.decode(out)
    for _, key in ipairs { "steps", "loss", "seconds", "tokens_per_s", "peak_rss_bytes", "trainable", "all", "perplexity_before", "perplexity_after" } do
      assert.is_number(report[key], key)
    end
    assert.equal(8, report.steps)
    assert.is_true(report.perplexity_after < report.perplexity_before)
    local f = assert(io.open(dir .. "/log.svg"))
    assert.matches("<svg", f:read "*l")
    f:close()
    out, err, status = run(("%s generate --model %sllama --quant nf4 --lora %s --prompt-ids 5,6,7 --max-new-tokens 4 --json"):format(bin, golden.root, dir))
    assert.equal(0, status, err)
    assert.equal(4, #cjson.decode(out).ids)
    -- For people: the counts, the curve, a sentence.
    out, err, status = run(base .. " --max-steps 4 --checkpointing --schedule polynomial --power 2 --out " .. folder())
    assert.equal(0, status, err)
    assert.matches("trainable params: [%d,]+ || all params: [%d,]+ || trainable%%", out)
    assert.matches("└─", out)
    assert.matches("4 updates in .* tokens/s, loss .* peak memory", out)
  end)

  it("trains norms and biases of the model itself, and writes the model", function()
    local dir = folder()
    local command = ("%s finetune --model %sgpt2 --data %s --trainable 1-d --lr 1e-2 --max-steps 3 --out %s"):format(bin, golden.root, rows_path, dir)
    local _, err, status = run(command)
    assert.equal(0, status, err)
    assert(wane.load(dir, { tokenizer = false })):close()
  end)

  it("refuses rows longer than the model has learned positions for, and cuts there by default", function()
    local dir = folder()
    local path, ids = dir .. "/long.jsonl", {}
    for t = 1, 70 do ids[t] = 5 + t % 9 end
    local f = assert(io.open(path, "w"))
    f:write(cjson.encode { input_ids = ids }, "\n")
    f:close()
    local command = ("%s finetune --model %sgpt2 --data %s --max-steps 1 --out %s/out"):format(bin, golden.root, path, dir)
    local _, err, status = run(command .. " --max-length 65")
    assert.equal(1, status)
    assert.matches("%-%-max%-length 65: the model has learned positions for 64", err)
    _, err, status = run(command)
    assert.equal(0, status, err)
    assert.matches("1 row%(s%) cut to %-%-max%-length", err)
  end)

  it("goes on without a bad row that ended it", function()
    local dir = folder()
    local path = dir .. "/rows.jsonl"
    local f = assert(io.open(path, "w"))
    for i = 1, 30 do f:write(i % 10 == 0 and '{"input_ids":[5,"a"]}' or cjson.encode { input_ids = { 5, 6, 7, i } }, "\n") end
    f:close()
    local command = ("%s finetune --model %sllama --data %s --batch-size 2 --epochs 1 --out %s/out"):format(bin, golden.root, path, dir)
    local _, err, status = run(command)
    assert.equal(1, status)
    assert.matches("%-%-bad%-rows skip on the command line.*checkpoint%-%d+; resume goes on from it, with the same rows%)", err)
    _, err, status = run(command .. " --bad-rows skip --resume")
    assert.equal(0, status, err)
    assert.matches("row%(s%) left out", err)
  end)

  for pattern, options in pairs {
    ["%-%-out is missing"] = "--out-missing", ["%-%-batch%-size: a number above 0"] = "--batch-size 0 --out x",
    ["there is no optimizer 'adamx'"] = "--optim adamx --out x", ["there is no 'liner'"] = "--schedule liner --out x",
    ["exclude each other"] = "--packing --group-by-length --out x", ["need %-%-eval%-data"] = "--patience 2 --out x",
    ["expected a share in"] = "--lora-dropout 1 --out x", ["%-%-target%-modules names nothing"] = "--target-modules '' --out x",
    ["%-%-modules%-to%-save names nothing"] = "--modules-to-save , --out x",
  } do
    it("tells wrong usage with status 2: " .. options, function()
      local command = options == "--out-missing" and base or base .. " " .. options
      local _, err, status = run(command)
      assert.equal(2, status)
      assert.matches(pattern, err)
    end)
  end

  it("refuses an adapter's options where only the model's own parameters are trained", function()
    local own = ("%s finetune --model %sgpt2 --data %s --trainable 1-d --out x "):format(bin, golden.root, rows_path)
    for _, option in ipairs { "--use-dora", "--use-rslora", "--target-modules c_attn", "--modules-to-save wte", "--lora-alpha 8", "--lora-dropout 0.1",
                              "--bias all" } do
      local _, err, status = run(own .. option)
      assert.equal(2, status, err)
      assert.is_truthy(err:find(option:match "%S+" .. " is an adapter's, and --trainable trains none by itself: give --lora-r too", 1, true), err)
    end
  end)

  it("trains an adapter further with --lora, as its files say", function()
    local first, second, none = folder(), folder(), folder()
    local more = ("%s finetune --model %sllama --data %s --quant nf4 --batch-size 4 --max-steps 2 --lora %s "):format(bin, golden.root, rows_path, first)
    local _, err, status = run(base .. " --max-steps 2 --out " .. first)
    assert.equal(0, status, err)
    _, err, status = run(more .. "--lr 0 --out " .. second)
    assert.equal(0, status, err)
    assert.same(adapter(first), adapter(second))
    local function config(dir)
      local c = cjson.decode(assert(io.open(dir .. "/adapter_config.json")):read "*a")
      return { c.r, c.lora_alpha, c.lora_dropout, #c.target_modules }
    end
    assert.same(config(first), config(second))
    local third = folder()
    _, err, status = run(more .. "--lr 1e-2 --save-every 1 --out " .. third)
    assert.equal(0, status, err)
    assert.not_same(adapter(first), adapter(third))
    for name in pairs(adapter(first)) do assert.is_truthy(adapter(third)[name], name) end
    for _, case in ipairs { { more .. "--lora-r 8 --out " .. none, 2, "--lora-r: the adapter of --lora is trained further" },
                            { more .. "--lora " .. second .. " --out " .. none, 2, "one adapter is trained further" },
                            { more:gsub("--lora %S+", "--lora " .. none) .. "--out " .. none .. "/x", 1, "holds no adapter_config.json" },
                            { more .. "--out " .. first, 2, "an earlier result's or a model's" },
                            { more:gsub("--lora %S+", "--lora " .. second) .. "--lr 1e-2 --save-every 1 --resume --out " .. third, 1, "the settings" } } do
      _, err, status = run(case[1])
      assert.equal(case[2], status, err)
      assert.is_truthy(err:find(case[3], 1, true), err)
    end
  end)

  it("tells what fails with status 1", function()
    local dir = folder()
    for pattern, options in pairs {
      ["there is no checkpoint in"] = "--resume --out " .. dir, ["no parameter of this model is called so"] = "--trainable nonsense --out " .. dir,
      ["%-%-trainable q_proj%(: .*unfinished capture"] = "--trainable 'q_proj(' --out " .. dir,
      ["target_modules"] = "--target-modules nonsense --out " .. dir,
    } do
      local _, err, status = run(base .. " --max-steps 2 " .. options)
      assert.equal(1, status, err)
      assert.matches(pattern, err)
    end
    local _, err, status = run(base:gsub("%-%-data %S+", "--data /nowhere.jsonl") .. " --out " .. dir)
    assert.equal(1, status)
    assert.matches("/nowhere.jsonl", err)
  end)

  it("leaves nothing where it does not begin", function()
    local parent = folder()
    local dir, bad = parent .. "/a/b", parent .. "/bad.jsonl"
    local f = assert(io.open(bad, "w"))
    f:write('{"input_ids":[5,6]}\n', ('{"input_ids":[5000,5001]}\n'):rep(20))
    f:close()
    for _, c in ipairs { { "--model %S+", "--model /nowhere" }, { "--data %S+", "--data /nowhere.jsonl" }, { "--data %S+", "--data " .. bad },
      { "$", " --resume" }, { "$", " --trainable nonsense" }, { "$", " --log /nowhere/log.jsonl" }, { "$", " --num-beams 3" }, { "$", " --epochs 0" } } do
      local _, err, status = run((base .. " --max-steps 2"):gsub(c[1], c[2], 1) .. " --out " .. dir)
      assert.is_true(status > 0, c[2])
      assert.is_true(require("wane.core").C.wane_path_kind(parent .. "/a") == 0, c[2] .. err)
    end
  end)

  it("tells what needs no model before it looks for one", function()
    local dir = folder()
    local function text(name, bytes)
      local f = assert(io.open(dir .. "/" .. name, "w"))
      f:write(bytes)
      f:close()
      return dir .. "/" .. name
    end
    local out = " --out " .. dir .. "/out"
    for _, c in ipairs { { 1, "--data /nowhere.jsonl" .. out, "/nowhere.jsonl" }, { 1, "--data " .. text("binary", "a\0b") .. out, "a binary file" },
      { 1, "--data " .. text("fields.jsonl", '{"a":1}') .. out, "none of the fields" }, { 1, "--data " .. dir .. out, "is a directory" },
      { 1, ("--data %s --eval-data /nowhere.txt"):format(rows_path) .. out, "/nowhere.txt" },
      { 1, ("--data %s --resume"):format(rows_path) .. out, "there is no checkpoint in" },
      { 1, ("--data %s --log /nowhere/log"):format(rows_path) .. out, "cannot write the log: .*/nowhere/log" },
      { 1, ("--data %s --log %s"):format(rows_path, dir) .. out, "cannot write the log: .* is a folder" },
      { 1, ("--data %s --log %s"):format(rows_path, rows_path) .. out, "cannot write the log: .* is the data" },
      { 1, ("--data %s --eval-data %s --log %s"):format(rows_path, rows_path, text("text", "a\n")) .. out, "is there, and no log of wane" },
      { 1, ("--data %s --out %s"):format(rows_path, text("file", "x")), "cannot write in the folder '.*/file'" },
      { 2, ("--data %s --max-length 1"):format(rows_path) .. out, "%-%-max%-length" }, { 2, ("--data %s --lr=-1"):format(rows_path) .. out, "%-%-lr" },
      { 2, "--data /nowhere --quant int8 --double-quant" .. out, "%-%-double%-quant is for" } } do
      local _, err, status = run(("%s finetune --model /nowhere %s"):format(bin, c[2]))
      assert.equal(c[1], status, err)
      assert.matches(c[3], err)
      assert.is_nil(err:find "/nowhere'", err)                            -- the model's name in quotes: it was looked for
    end
    local _, err = run(("%s finetune --model /nowhere --data %s"):format(bin, rows_path) .. out)
    assert.matches("/nowhere", err)
    assert.equal(0, require("wane.core").C.wane_path_kind(dir .. "/out"))
  end)

  it("leaves memory where it was", function()
    if os.getenv "WANE_SANITIZER" then return pending "counts memory" end
    local dir, rss = folder(), {}
    local _, err, status = run(base .. " --max-steps 200 --out " .. dir)
    assert.equal(0, status, err)
    for line in io.lines(dir .. "/log.jsonl") do
      local record = require("cjson").decode(line)
      rss[record.step] = record.rss_bytes
    end
    assert.is_true(rss[200] - rss[20] < 2 ^ 20, ("%d bytes more"):format(rss[200] - rss[20]))
  end)

  it("killed at random moments and resumed ends with the same bits", function()
    if os.getenv "WANE_SANITIZER" then return pending "takes its time" end
    local whole = folder()
    local _, err, status = run(base .. " --max-steps 40 --save-every 2 --out " .. whole)
    assert.equal(0, status, err)
    local want, kills = adapter(whole), os.getenv "WANE_LARGE" == "1" and 50 or 8
    local dir, killed = folder(), 0
    math.randomseed(7)
    local f = assert(io.popen(("(time -p %s --max-steps 40 --save-every 2 --out %s) 2>&1 | grep real"):format(base, folder())))
    local seconds = tonumber(f:read("*a"):match "[%d.]+")
    f:close()
    local function command()
      return base .. " --max-steps 40 --save-every 2 --out " .. dir .. (require("wane.train.saves").latest(dir) and " --resume" or "")
    end
    while killed < kills do
      local _, _, ended = run(("timeout -s KILL %.3f %s"):format(0.05 + math.random() * seconds * 0.5, command()))
      if ended == 0 then                                  -- it came to its end: begin anew
        assert.same(want, adapter(dir))
        os.execute("rm -rf " .. dir .. "/*")
      else
        killed = killed + 1
      end
    end
    _, err, status = run(command())
    assert.equal(0, status, err)
    assert.same(want, adapter(dir))
    print(("  killed %d times, the same bits in the end"):format(killed))
  end)

  -- timeout sends its signal to its child and to the child's group: twice, but for ctrl-C, whose second one would end the program.
  for signal, expected in pairs { ["--foreground -s INT"] = 130, ["-s TERM"] = 143, ["-s HUP"] = 129 } do
    it("ends the running update, saves and leaves with the signal's status: " .. signal, function()
      if os.getenv "WANE_SANITIZER" then return pending "takes its time" end
      local dir = folder()
      local out, err, status = run(("timeout --preserve-status %s 1 %s --max-steps 100000 --eval-data %s --json --out %s"):format(signal, base, rows_path, dir))
      assert.equal(expected, status, err)
      assert.matches("interrupted: saved, and what is held out was not looked at again", err)
      local _, step = require("wane.train.saves").latest(dir)
      assert.equal(cjson.decode(out).steps, step)
      assert.is_true(require("wane.lora").is_adapter(dir))
    end)
  end

  it("does not end by a SIGHUP that its parent had it ignore (nohup)", function()
    if os.getenv "WANE_SANITIZER" then return pending "takes its time" end
    local dir = folder()
    local _, err, status = run(("timeout --preserve-status -s HUP -k 0.5 1 sh -c 'trap \"\" HUP; exec %s --max-steps 100000 --out %s'"):format(base, dir))
    assert.equal(137, status, err)
    assert.is_nil(require("wane.train.saves").latest(dir))
  end)

  it("says of a run that stopped early that it is finished, and why, and goes on with more patience", function()
    local dir = folder()
    local command = ("%s --lr 0.3 --schedule constant --max-steps 60 --eval-data %s --eval-every 2 --out %s"):format(base, rows_path, dir)
    local out, err, status = run(command .. "/a --save-every 2 --patience 2 --json")
    assert.equal(0, status, err)
    local first = cjson.decode(out)
    assert.equal("early", first.stopped)
    assert.is_nil(first.finished)
    out, err = run(command .. "/a --save-every 2 --patience 2 --resume --json")
    local again = cjson.decode(out)
    assert.same({ first.steps, "early", true }, { again.steps, again.stopped, again.finished })
    assert.is_number(first.perplexity_before)
    assert.near(first.perplexity_before, again.perplexity_before, 1e-9)  -- of the beginning, which the checkpoint remembers
    assert.matches(("was finished already, with %d updates: it stopped early, 2 evaluations after the best one %%(step %d, "):format(first.steps,
      first.best.step), err)
    out, err = run(command .. "/a --save-every 2 --patience 4 --resume --json")
    assert.is_true(cjson.decode(out).steps > first.steps, err)
    run(command .. "/b --patience 2")
    out, err, status = run(command .. "/b --patience 2 --resume")
    assert.equal("", out)
    assert.equal(1, status)
    assert.matches("there is no checkpoint in .* but an earlier result %(adapter_config.json%)", err)
  end)

  it("resumes with the same options in other words: lists in another order, defaults given", function()
    local plain = ("%s finetune --model %sllama --data %s --quant nf4 --lr 1e-2 --max-steps 6 --save-every 3"):format(bin, golden.root, rows_path)
    local given = " --lora-r 8 --lora-alpha 16 --lora-dropout 0.0 --bias none --max-length 512 --bad-rows fail --block-size 64 --compute bf16 --optim adamw "
      .. "--schedule linear --warmup-steps 0 --clip 1.0 --accumulate 1 --seed 42 --weight-decay 0"
    local slashed = (plain:gsub("%-%-model %S+", "%0//"))
    for _, c in ipairs { { plain .. given .. " --target-modules q_proj,v_proj,o_proj", slashed .. " --target-modules o_proj,v_proj,q_proj,v_proj" },
      { plain, plain .. given .. " --target-modules v_proj,q_proj" } } do
      local dir = folder()
      local _, err, status = run(c[1] .. " --out " .. dir)
      assert.equal(0, status, err)
      local want = adapter(dir)
      os.execute(("rm -r %s/checkpoint-6"):format(dir))
      _, err, status = run(c[2] .. " --resume --out " .. dir)
      assert.equal(0, status, err)
      assert.same(want, adapter(dir))
      -- As an older version wrote it.
      os.execute(("rm -r %s/checkpoint-6"):format(dir))
      local path = dir .. "/checkpoint-3/trainer_state.json"
      local f = assert(io.open(path))
      local state = cjson.decode(f:read "*a")
      f:close()
      local text = state.settings.fingerprint:gsub("nf4", "%0, lora_r 8")
      state.settings.fingerprint, state.xxh64 = text:gsub("target_modules .*", "target_modules v_proj,q_proj,o_proj"), nil
      f = assert(io.open(path, "w"))
      f:write(cjson.encode(state))
      f:close()
      _, err, status = run(c[1] .. " --resume --out " .. dir)
      assert.equal(0, status, err)
      assert.same(want, adapter(dir))
      for option, pattern in pairs { ["--lora-r 4"] = "lora_r 4", ["--compute f32"] = "compute f32" } do
        _, err, status = run(("%s %s --resume --out %s"):format(plain, option, dir))
        assert.equal(1, status)
        assert.matches("belongs to a run with the settings = .*; this one has .*" .. pattern, err)
      end
    end
  end)

  it("refuses a folder in which another run is at work, and resumes at once when that one is killed", function()
    if os.getenv "WANE_SANITIZER" then return pending "takes its time" end
    local dir = folder()
    local script = assert(io.open(dir .. "/script", "w"))
    local command = ("%s --max-steps 100000 --save-every 2 --save-total-limit 2 --out %s/run"):format(base, dir)
    script:write(("%s & pid=$!\n"):format(command), ("until ls %s/run/checkpoint-* >/dev/null 2>&1; do sleep 0.05; done\n"):format(dir),
      ("%s --resume; echo refused $? $pid\n"):format(command), "kill -9 $pid\n",
      ("timeout --preserve-status -s TERM 1 %s --resume; echo resumed $?\n"):format(command))
    script:close()
    local out, err = run("sh " .. dir .. "/script")
    local refused, pid = out:match "refused (%d+) (%d+)"
    assert.equal("1", refused, err)
    assert.matches(("another run is at work in '%s/run': .* is held by process %s on "):format(dir:gsub("%p", "%%%0"), pid), err)
    assert.matches("resumed 143", out)
  end)

  it("tells an error that comes behind a signal", function()
    if os.getenv "WANE_SANITIZER" then return pending "takes its time" end
    local dir = folder()
    local _, err, status = run(("( sleep 1; mkdir -p %s/adapter_config.json/x ) & timeout --preserve-status -s TERM 1.5 %s --max-steps 100000 --out %s"):format(
      dir, base, dir))
    assert.equal(1, status)
    assert.matches("the result was not written to", err)
  end)
end)
