-- The three recipes of docs/finetuning.md on golden models: they run, lower the loss, and leave what they freeze as it was.
local cjson = require "cjson"
local core = require "wane.core"
local files = require "spec.support.files"
local golden = require "spec.support.golden"
local lora = require "wane.lora"
local wane = require "wane"

local function rows()
  local list = { count = 24, max_length = 16, bad_rows = "fail", skipped = {}, bad = 0, path = "made up" }
  function list.get(_, i)
    local ids = {}
    for t = 1, 8 do ids[t] = 3 + (i * 5 + t) % 40 end
    return { ids = ids, labels = ids, line = i }
  end
  return list
end

local function bytes_of(model)
  local out = {}
  for path, tensor in model:parameters() do
    if not tensor.requires_grad then out[path] = tensor:is_float() and tensor:totable() or tensor.codes:totable() end
  end
  return out
end

local function trains(model, optim, lr)
  local before = bytes_of(model)
  local result = assert(wane.train.run(model, rows(), { lr = lr, max_steps = 20, batch_size = 4, optim = optim, checkpointing = true }))
  print(("  loss %.3f -> %.3f"):format(result.records[1].loss, result.loss))
  assert.is_true(result.loss < 0.85 * result.records[1].loss)
  assert.same(before, bytes_of(model))
  model:close()
end

describe("recipes:", function()
  it("QLoRA, NF4 with double quantization, every Linear, paged 8-bit AdamW, bf16", function()
    local model = assert(wane.load(golden.root .. "gpt_neox", { quant = { type = "nf4", double_quant = true, compute = "bf16" }, tokenizer = false }))
    lora.prepare_for_kbit_training(model)
    lora.attach(model, { r = 8, alpha = 32, dropout = 0.05, target_modules = "all-linear" })
    trains(model, "paged_adamw_8bit", 1e-2)
  end)

  it("BLOOM in 8 bits with outliers, LoRA on query_key_value", function()
    local model = assert(wane.load(golden.root .. "bloom", { quant = { type = "int8", threshold = 6.0 }, tokenizer = false }))
    lora.prepare_for_kbit_training(model)
    lora.attach(model, { r = 16, alpha = 32, dropout = 0.05, target_modules = { "query_key_value" } })
    trains(model, "adamw_8bit", 2e-2)
  end)

  it("GPT-J in blockwise 8 bits: adapters, norms and biases, checkpoints", function()
    local model = assert(wane.load(golden.root .. "gptj", { quant = "int8-blockwise", tokenizer = false }))
    lora.prepare_for_kbit_training(model)
    assert.is_true(model:train_parameters "1-d" > 0)
    lora.attach(model, { r = 2, alpha = 2, target_modules = { "q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out" } })
    local before = bytes_of(model)
    local result = assert(wane.train.run(model, rows(), { lr = 2e-2, max_steps = 20, batch_size = 4, optim = "adamw_8bit", checkpointing = true }))
    assert.is_true(result.loss < 0.85 * result.records[1].loss)
    assert.same(before, bytes_of(model))
    -- The adapter's files hold the norms and biases too: PEFT's modules_to_save and bias = "all".
    local ids, dir = { { 3, 4, 5, 6, 7, 8, 9, 10 } }, files.folder()
    local function loss_of(m) return wane.autograd.no_grad(core.scope, function() return m:loss(ids, ids):item() end) end
    local trained = loss_of(model)
    assert(lora.save(model, dir))
    model:close()
    local config = cjson.decode(files.read(dir .. "/adapter_config.json"))
    assert.same({ "ln_1", "ln_f" }, config.modules_to_save)
    assert.equal("all", config.bias)
    local again = assert(wane.load(golden.root .. "gptj", { quant = "int8-blockwise", tokenizer = false, lora = dir }))
    local plain = assert(wane.load(golden.root .. "gptj", { quant = "int8-blockwise", tokenizer = false }))
    assert.near(trained, loss_of(again), 1e-6)
    assert.is_true(math.abs(loss_of(plain) - trained) > 0.1)
    assert.error_matches(function() again:train_parameters "1-d" end, "choose parameters first")
    again:close()
    plain:close()
    files.clean()
  end)

  it("takes trained parameters into an adapter only as its files can hold them", function()
    local function attach(pattern, name)
      local model = assert(wane.load(golden.root .. (name or "gptj"), { compute = "f32", tokenizer = false }))
      lora.prepare_for_kbit_training(model)
      assert.is_true(model:train_parameters(pattern) > 0)
      lora.attach(model, { r = 2, target_modules = { "q_proj" }, modules_to_save = { "wte" } })
      return model
    end
    assert.error_matches(function() attach "fc_in%.bias" end, "all biases or none")
    assert.error_matches(function() attach "fc_in%.weight" end, "train the module whole, or its bias alone")
    local model = attach "h%.0%.ln_1"
    assert.same({ "wte", "transformer.h.0.ln_1" }, lora.list(model)[1].config.modules_to_save)
    local names = {}
    for _, p in ipairs(model:trainable_parameters()) do names[#names + 1] = p.name end
    table.sort(names)
    assert.truthy(table.concat(names, " "):find("ln_1", 1, true))
    model:close()
  end)

  it("every adapter kind: DoRA, biases, embeddings, rslora, modules saved whole, a mixture's experts", function()
    for _, case in ipairs {
      { "llama", { r = 4, alpha = 8, target_modules = "all-linear", use_dora = true } },
      { "gpt_neox", { r = 4, alpha = 8, target_modules = { "query_key_value" }, bias = "all", use_rslora = true, lora_bias = true } },
      { "llama3", { r = 4, alpha = 16, target_modules = { "embed_tokens", "q_proj" } } },
      { "gpt_neox", { r = 4, alpha = 8, target_modules = { "dense" }, modules_to_save = { "embed_out" } } },
      { "mixtral", { r = 4, alpha = 8, target_modules = "all-linear" } },
      { "t5", { r = 4, alpha = 8, target_modules = { "q", "v" } } },
    } do
      local model = assert(wane.load(golden.root .. case[1], { compute = "f32", tokenizer = false, quant = case[1] ~= "llama" and "nf4" or nil }))
      lora.attach(model, case[2])
      local list = rows()
      list.encoder_decoder = model.encode ~= nil
      local result = assert(wane.train.run(model, list, { lr = 2e-2, max_steps = 12, batch_size = 4 }))
      assert.is_true(result.loss < result.records[1].loss, case[1])
      for _, p in ipairs(model:trainable_parameters()) do assert.is_truthy(p.name) end
      model:close()
    end
  end)
end)
