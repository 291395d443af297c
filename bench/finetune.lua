--- A LoRA training step of a real model, timed: tokens a second, operations a second of its products beside what the machine multiplies at
-- most, memory, and how far one step's memory is from another's. The batches are random ids: speed does not depend on them.
--
--     luajit bench/finetune.lua MODEL [quant=nf4] [r=8] [batch=4] [length=256] [steps=12] [checkpointing=true] [optim=AdamW] [targets=all-linear]
--
-- MODEL is a folder or a .gguf file; "1.1b" makes a Llama of TinyLlama's shape with random weights. spec/upstream/finetune.py is the other side.
package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
local wane = require "wane"
local bench = require "wane.bench"
local core = require "wane.core"
local lora = require "wane.lora"
local C = core.C

local o = { quant = "nf4", r = 8, batch = 4, length = 256, steps = 12, optim = "AdamW", targets = "all-linear", lr = 1e-4, dropout = 0 }
local path = arg[1]
assert(path, "usage: luajit bench/finetune.lua MODEL [name=value ...]")
for i = 2, #arg do
  local key, value = arg[i]:match "^(%w+)=(.*)$"
  assert(key, "expected name=value, found " .. arg[i])
  o[key] = value == "true" or (value ~= "false" and (tonumber(value) or value))
end

local function load_model()
  local scheme = o.quant ~= "none" and { type = o.quant, double_quant = o.quant == "nf4" or nil, compute = "bf16" } or nil
  local model
  if bench.shapes[path] then model = bench.random_model(path, scheme)
  else model = assert(wane.load(path, { tokenizer = false, compute = "bf16", quant = scheme })) end
  lora.prepare_for_kbit_training(model, { checkpointing = o.checkpointing or false })
  lora.attach(model, { r = o.r, alpha = 2 * o.r, dropout = o.dropout, target_modules = o.targets, seed = 1 })
  return model
end

-- Multiplications and additions of a step's products with weights: forward, and the gradient of the input; adapters aside.
local function operations(model)
  local n = 0
  for _, l in ipairs(model:linears()) do n = n + l[2].in_features * l[2].out_features end
  return 2 * 2 * n * o.batch * o.length * (o.checkpointing and 1.5 or 1)
end

local function random_batch(vocabulary, step)
  local rows = {}
  for b = 1, o.batch do
    rows[b] = {}
    for t = 1, o.length do rows[b][t] = (step * 7919 + b * 104729 + t * 31 * t) % vocabulary end
  end
  return rows
end

local model = load_model()
local report, trainable = lora.trainable_report(model)
local opt = wane.optim[o.optim](model:trainable_parameters(), { lr = o.lr, weight_decay = 0 })
print(("%s, %s, r %d on %s, %d x %d, %s%s"):format(path, o.quant, o.r, tostring(o.targets), o.batch, o.length, o.optim,
  o.checkpointing and ", checkpointed" or ""))
print(report)

local seconds, rss = {}, {}
for step = 1, o.steps do
  local ids = random_batch(model.config.vocab_size, step)
  core.check(core.wait())
  local started = C.wane_clock()
  local loss = core.scope(function()
    local loss = model:loss(ids, ids)
    loss:backward()
    opt:clip(1.0)
    opt:step()
    opt:zero_grad()
    return loss:item()
  end)
  core.check(core.wait())
  collectgarbage("step", 200)                   -- as the trainer does
  seconds[step], rss[step] = C.wane_clock() - started, wane.memory().rss
  print(("step %2d  loss %.4f  %.3f s"):format(step, loss, seconds[step]))
end
local measured = {}
for i = 3, #seconds do measured[#measured + 1] = seconds[i] end
local step, memory = bench.median(measured), wane.memory()
local limit = bench.compute_rate(C.WANE_PROBE_BF16) or bench.compute_rate(C.WANE_PROBE_F32)
print(("median step %.3f s, %.0f tokens/s, %.0f GFLOP/s of products (%.0f %% of the probe's %.0f), peak RSS %.0f MB, %s trainable"):format(step,
  o.batch * o.length / step, operations(model) / step / 1e9, 100 * operations(model) / step / limit, limit / 1e9, memory.rss_peak / 1e6, tostring(trainable)))
local early = math.min(#rss, #rss > 20 and 20 or 3)
print(("RSS at step %d %.2f MB, at step %d %.2f MB"):format(early, rss[early] / 1e6, #rss, rss[#rss] / 1e6))
