-- What users do with adapters: several at once, scaling, merging into every kind of base, fresh ones, and every refusal.
local ffi = require "ffi"
local core = require "wane.core"
local F = require "wane.nn.functional"
local wane = require "wane"
local files = require "support.files"
local lora = wane.lora

local root = "spec/fixtures/train/"
local IDS = { { 5, 6, 7, 8, 20, 21 }, { 9, 10, 11, 12, 13, 3 } }

local function load(base, o)
  o = o or {}
  o.tokenizer, o.compute = false, o.compute or "f32"
  return assert(wane.load(root .. "base/" .. base, o))
end

local function logits(model)
  local values, n = F.read(model:forward(IDS), "float")
  return values, n
end

local function bits(model)
  local values, n = logits(model)
  return ffi.string(values, n * 4)
end

-- Largest difference of two results, as a share of the first's largest value.
local function distance(a, b, n)
  local worst, largest = 0, 0
  for i = 0, n - 1 do worst, largest = math.max(worst, math.abs(a[i] - b[i])), math.max(largest, math.abs(a[i])) end
  return worst / largest
end

local function bytes_of(t)
  local list = {}
  for _, part in ipairs { "codes", "absmax", "nested_absmax", "offset" } do
    local p = t[part]
    if p then list[#list + 1] = p:bytes() end
  end
  return table.concat(list)
end

describe("several adapters", function()
  local model
  before_each(function() model = load "llama" end)
  after_each(function()
    model:close()
    files.clean()
  end)

  it("are loaded by name, switched, and add up: both at once equal both merged", function()
    assert(lora.load(model, root .. "lora/llama_all"))
    local first = bits(model)
    assert(lora.load(model, root .. "lora/llama_rslora", { name = "two" }))
    assert.is_true(bits(model) == first)                                    -- a second one waits
    lora.set_adapter(model, "two")
    local second = bits(model)
    assert.is_false(second == first)
    lora.set_adapter(model, { "default", "two" })
    local both, n = logits(model)
    lora.set_adapter(model, {})
    local base = bits(model)
    lora.set_adapter(model, "default")
    assert.is_true(bits(model) == first)
    assert(lora.merge(model, { "default", "two" }))
    local d = distance(both, logits(model), n)
    print(("  two adapters at once against both merged: %.2g of the largest logit"):format(d))
    assert.is_true(d <= 1e-6)
    assert(lora.unmerge(model, "two"))
    lora.set_adapter(model, {})
    local one = logits(model)
    assert(lora.unmerge(model))
    assert.is_true(bits(model) == base)
    lora.set_adapter(model, "default")
    assert.is_true(distance(one, logits(model), n) <= 1e-6)
  end)

  it("are listed, and go one by one", function()
    assert(lora.load(model, root .. "lora/llama_all"))
    assert(lora.load(model, root .. "lora/llama_dora", { name = "d" }))
    lora.scale(model, 0.5, "d")
    local list = lora.list(model)
    local first = { name = "default", r = 8, alpha = 32, modules = 14, parameters = 16128, bytes = 64512, active = true, merged = false,
                    scale = 1, dora = false }
    for key, value in pairs(first) do assert.equal(value, list[1][key], key) end
    assert.same({ "d", false, 0.5, true }, { list[2].name, list[2].active, list[2].scale, list[2].dora })
    lora.delete(model, "default")
    assert.equal(1, #lora.list(model))
    local base = bits(load "llama")
    assert.is_true(bits(model) == base)
    lora.set_adapter(model, "d")
    assert.is_false(bits(model) == base)
  end)

  it("scale: 0 is the base, twice is merging with twice the alpha", function()
    local base = logits(model)
    assert(lora.load(model, root .. "lora/llama_dora"))
    assert(lora.load(model, root .. "lora/llama_all", { name = "plain" }))
    lora.set_adapter(model, "plain")
    local once, n = logits(model)
    lora.scale(model, 0)
    assert.is_true(distance(base, logits(model), n) <= 1e-6)
    lora.scale(model, 2)
    local twice = logits(model)
    assert.is_true(distance(once, twice, n) > 1e-2)
    assert(lora.merge(model))
    assert.is_true(distance(twice, logits(model), n) <= 1e-6)
    assert.has_error(function() lora.scale(model, 1, "plain") end, "lora.scale: adapter 'plain' is merged: unmerge it first")
    assert(lora.unmerge(model))
    lora.scale(model, 1)
    assert.is_true(distance(once, logits(model), n) == 0)
    lora.set_adapter(model, "default")                                       -- DoRA's norm follows the scale
    local dora = logits(model)
    lora.scale(model, 3)
    local tripled = logits(model)
    assert(lora.merge(model))
    assert.is_true(distance(tripled, logits(model), n) <= 1e-6)
    assert.is_true(distance(dora, tripled, n) > 1e-3)
  end)

  it("disable rests a merged one too", function()
    local base = bits(model)
    assert(lora.load(model, root .. "lora/llama_all"))
    assert(lora.merge(model))
    local merged = bits(model)
    lora.disable(model)
    assert.is_true(bits(model) == base)
    lora.enable(model)
    assert.is_true(bits(model) == merged)
  end)

  it("unload leaves a plain model", function()
    assert(lora.load(model, root .. "lora/llama_all"))
    local adapted, n = logits(model)
    assert(lora.merge(model, nil, { unload = true }))
    assert.same({}, lora.list(model))
    assert.is_true(distance(adapted, logits(model), n) <= 1e-6)
    assert.is_nil(rawget(model:find "model.layers.0.mlp.up_proj", "adapters"))
  end)

  it("unload keeps what modules_to_save brought", function()
    local neox = load "gpt_neox"
    assert(lora.load(neox, root .. "lora/gpt_neox_modules_to_save"))
    local adapted, n = logits(neox)
    assert(lora.merge(neox, nil, { unload = true }))
    assert.is_true(distance(adapted, logits(neox), n) <= 1e-6)
    neox:close()
  end)

  it("unload keeps what a tied module still uses", function()
    local bloom = load "bloom"
    assert(lora.load(bloom, root .. "lora/bloom_embedding"))
    local adapted, n = logits(bloom)
    local own = bloom:find("lm_head").weight
    assert(lora.merge(bloom, nil, { unload = true }))
    assert.is_true(bloom:find("lm_head").weight == own and bloom:find("transformer.word_embeddings").weight ~= own)
    assert.is_true(distance(adapted, logits(bloom), n) <= 1e-6)
    bloom:close()
  end)

  it("that bring the same module cannot be active together", function()
    local neox = load "gpt_neox"
    assert(lora.load(neox, root .. "lora/gpt_neox_modules_to_save"))
    assert(lora.load(neox, root .. "lora/gpt_neox_modules_to_save", { name = "other" }))
    local before = bits(neox)
    assert.error_matches(function() lora.set_adapter(neox, { "default", "other" }) end, "'default' and 'other' both bring a weight of 'embed_out'")
    assert.is_true(bits(neox) == before)
    neox:close()
  end)

  it("give their memory back", function()
    bits(model)                                                              -- makes the rotary table
    collectgarbage()
    collectgarbage()
    core.check(core.wait())
    local before = wane.memory().tensors
    for _ = 1, 3 do
      assert(lora.load(model, root .. "lora/llama_dora"))
      bits(model)
      assert(lora.merge(model))
      assert(lora.unmerge(model))
      lora.delete(model, "default")
    end
    collectgarbage()
    collectgarbage()
    core.check(core.wait())
    assert.is_true(wane.memory().tensors <= before)     -- the collector may take what an earlier test left
  end)
end)

describe("a quantized base", function()
  for _, scheme in ipairs { { type = "nf4", double_quant = true }, { type = "nf4" }, { type = "fp4" }, { type = "int8", threshold = -1 },
                            { type = "int8-blockwise" } } do
    local name = scheme.type .. (scheme.double_quant and ", double" or "")
    it("of " .. name .. ": adapters as on its dequantized weights; merged with an error report; unmerged to the same bytes", function()
      local model = load("llama", { quant = scheme })
      assert(lora.load(model, root .. "lora/llama_all"))
      local adapted, n = logits(model)
      local path = "model.layers.0.self_attn.q_proj"
      local linear = model:find(path)
      local before, forward = bytes_of(linear.weight), bits(model)
      local report = assert(lora.merge(model))
      assert.equal(14, #report.layers)
      local line = report.layers[1]
      assert.same({ path, scheme.type }, { line.path, line.type })
      assert.equal(scheme.type, linear.weight:dtype())
      local merged = logits(model)
      print(("  %s: merged, relative error of %s %.3g, of the update %.2g lost; logits move by %.2g"):format(name, path, line.rel_error, line.lost,
        distance(adapted, merged, n)))
      -- What a quantizer does to such weights at all: rounding once more must not cost more.
      local weight = wane.randn { 72, 72, seed = 1 } * 0.02
      local usual = wane.quant.error(weight, wane.quant.quantize(weight, scheme)).rel_frobenius
      assert.is_true(line.rel_error > 0 and line.rel_error < 1.5 * usual, ("%g, usually %g"):format(line.rel_error, usual))
      assert.is_true(line.max_error > 0 and line.update > 0 and line.lost > 0)
      assert.is_true(distance(adapted, merged, n) < 0.6)
      assert(lora.unmerge(model))
      assert.is_true(bytes_of(linear.weight) == before)
      assert.is_true(bits(model) == forward)
      model:close()
    end)

    it("of " .. name .. ": logits equal those of the dequantized base with the adapter", function()
      for _, adapter in ipairs { "llama_all", "llama_dora" } do
        local model = load("llama", { quant = scheme })
        assert(lora.load(model, root .. "lora/" .. adapter))
        local got, n = logits(model)
        for _, l in ipairs(model:linears()) do
          l[2].weight, l[2].threshold = F.outside_scopes(function() return l[2].weight:dequantize "f32" end), nil
        end
        local d = distance(got, logits(model), n)
        print(("  %s, %s: %.2g of the largest logit"):format(name, adapter, d))
        assert.is_true(d <= 1e-5)
      end
    end)
  end

  it("warns when the update is below the quantization step", function()
    local model = load("llama", { quant = "nf4" })
    assert(lora.load(model, root .. "lora/llama_all"))
    lora.scale(model, 0.001)
    local report = assert(lora.merge(model))
    assert.equal(1, #report.warnings)
    assert.matches("^the update is below the quantization step in 14 of 14 layers", report.warnings[1])
    for _, line in ipairs(report.layers) do assert.is_true(line.below_step) end
    assert(lora.unmerge(model))
    lora.scale(model, 1)
    model:close()
    local exact = load "llama"
    assert(lora.load(exact, root .. "lora/llama_all"))
    assert.same({}, assert(lora.merge(exact)).warnings)
    exact:close()
  end)
end)

describe("experts of a mixture", function()
  local model
  before_each(function()
    model = assert(wane.load("spec/fixtures/models/mixtral", { tokenizer = false, compute = "f32" }))
    -- Its weights are 16-bit, and a merge into those rounds.
    for _, l in ipairs(model:linears()) do l[2].weight = F.outside_scopes(function() return l[2].weight:to "f32" end) end
  end)
  after_each(function()
    model:close()
    files.clean()
  end)

  it("take adapters, all of them or some: as merged", function()
    for _, targets in ipairs { { "w1", "w2", "w3", "gate", "q_proj" }, { "experts.0.w1", "experts.2.w1", "w2" } } do
      local base = logits(model)
      lora.attach(model, { target_modules = targets, init_lora_weights = false, alpha = 16 })
      local adapted, n = logits(model)
      local dir = files.folder()
      assert(lora.save(model, dir))
      assert(lora.merge(model))
      local d, moved = distance(adapted, logits(model), n), distance(base, adapted, n)
      print(("  mixtral, %s: adapters against merged %.2g of the largest logit; they move it by %.2g"):format(table.concat(targets, " "), d, moved))
      assert.is_true(d <= 2e-6 and moved > 1e-2)
      assert(lora.unmerge(model))
      lora.delete(model, "default")
      assert(lora.load(model, dir))
      assert.is_true(distance(adapted, logits(model), n) == 0)
      lora.delete(model, "default")
    end
  end)

  it("of one mixture need one rank and scale, and no DoRA", function()
    assert.error_matches(function() lora.attach(model, { target_modules = { "w1" }, rank_pattern = { ["experts\\.1\\.w1"] = 2 } }) end,
      "experts of one mixture need one rank and one scale")
    assert.error_matches(function() lora.attach(model, { target_modules = { "w1" }, use_dora = true }) end, "DoRA on experts of a mixture")
    assert.same({}, lora.list(model))
    lora.attach(model, { target_modules = { "w1", "w2" }, rank_pattern = { w2 = 3 } })
  end)
end)

describe("saving the model", function()
  it("writes what is merged, refuses what is active beside", function()
    local model, dir = load "llama", files.folder()
    assert(lora.load(model, root .. "lora/llama_all"))
    assert.error_matches(function() model:save(dir) end, "save: adapter 'default' is active beside the weights")
    assert(lora.merge(model))
    local merged = bits(model)
    assert(model:save(dir))
    local saved = assert(wane.load(dir, { tokenizer = false, compute = "f32" }))
    assert.is_true(bits(saved) == merged)
    saved:close()
    model:close()
    files.clean()
  end)
end)

describe("merging", function()
  it("a damaged adapter changes nothing", function()
    local model = load "llama"
    assert(lora.load(model, root .. "lora/llama_all"))
    local part = model:find("model.layers.1.mlp.down_proj").adapters[1]
    part.B:fill(1e38)
    part.A:fill(1e38)
    local weight = model:find("model.layers.0.self_attn.q_proj").weight
    local report, message, code = lora.merge(model)
    assert.is_nil(report)
    assert.matches("the weight of 'model.layers.1.mlp.down_proj' would not be finite", message)
    assert.equal("WANE_E_FORMAT", code)
    assert.is_true(model:find("model.layers.0.self_attn.q_proj").weight == weight)
    assert.is_false(lora.list(model)[1].merged)
    model:close()
  end)

  it("goes into 16-bit weights in their dtype", function()
    local model = load "llama"
    for _, l in ipairs(model:linears()) do l[2].weight = F.outside_scopes(function() return l[2].weight:to "bf16" end) end
    assert(lora.load(model, root .. "lora/llama_all"))
    local report = assert(lora.merge(model))
    assert.equal("bf16", model:find("model.layers.0.self_attn.q_proj").weight:dtype())
    assert.is_true(report.layers[1].rel_error > 0 and report.layers[1].rel_error < 2 ^ -8)
    model:close()
  end)
end)

describe("a fresh adapter", function()
  local model
  before_each(function() model = load "llama" end)
  after_each(function()
    model:close()
    files.clean()
  end)

  it("changes nothing, seeds reproduce, A is in its bounds", function()
    local base = bits(model)
    local report = lora.attach(model, { r = 4, alpha = 8, target_modules = "all-linear", seed = 3 })
    assert.equal(14, report.modules)
    assert.is_true(bits(model) == base)
    local A = model:find("model.layers.0.mlp.down_proj").adapters[1].A
    assert.same({ 4, 104 }, A:shape())
    assert.is_true(A:abs():amax():item() <= 1 / math.sqrt(104) and A:std():item() > 0.9 / math.sqrt(3 * 104))
    lora.attach(model, { name = "same", r = 4, alpha = 8, target_modules = "all-linear", seed = 3 })
    lora.attach(model, { name = "other", r = 4, alpha = 8, target_modules = "all-linear", seed = 4 })
    lora.set_adapter(model, { "default", "same", "other" })
    local parts = model:find("model.layers.0.mlp.down_proj").adapters
    assert.is_true(parts[1].A:equal(parts[2].A))
    assert.is_false(parts[1].A:equal(parts[3].A))
    assert.is_false(parts[1].A:equal(model:find("model.layers.1.mlp.down_proj").adapters[1].A))
  end)

  it("DoRA and embeddings too; with random B the result moves", function()
    local base, n = logits(model)
    lora.attach(model, { use_dora = true, target_modules = { "q_proj", "up_proj", "embed_tokens" } })
    assert.is_true(distance(base, logits(model), n) <= 1e-6)
    lora.delete(model, "default")
    lora.attach(model, { use_dora = true, target_modules = { "q_proj", "up_proj", "embed_tokens" }, init_lora_weights = false })
    local moved = logits(model)
    assert.is_true(distance(base, moved, n) > 1e-3)
    local dir = files.folder()
    assert(lora.save(model, dir .. "/a/b"))
    local other = load("llama", { lora = dir .. "/a/b" })
    assert.is_true(distance(moved, logits(other), n) == 0)
    assert.equal("model.embed_tokens", wane.lora.list(other)[1].config.target_modules[3] and "model.embed_tokens")
    other:close()
    assert(lora.merge(model))
    assert.is_true(distance(moved, logits(model), n) <= 2e-6)
  end)

  it("takes PEFT's options: patterns, biases, whole modules, layers", function()
    local neox = load "gpt_neox"
    local base = bits(neox)
    local report = lora.attach(neox, { r = 2, rank_pattern = { dense = 3 }, alpha_pattern = { dense = 6 },
      target_modules = { "dense", "query_key_value", "none" }, bias = "lora_only", lora_bias = true,
      modules_to_save = { "lm_head" }, layers_to_transform = { 1 } })
    assert.same({ "none" }, report.unused)
    assert.equal(2, report.modules)
    assert.is_true(bits(neox) == base)
    local part = neox:find("gpt_neox.layers.1.attention.dense").adapters[1]
    assert.same({ 3, 2 }, { part.r, part.scale })
    assert.is_nil(rawget(neox:find "gpt_neox.layers.0.attention.dense", "adapters"))
    local dir = files.folder()
    assert(lora.save(neox, dir))
    local tensors = assert(wane.checkpoint.read_safetensors(dir .. "/adapter_model.safetensors"))
    for _, key in ipairs { "base_model.model.lm_head.weight", "base_model.model.gpt_neox.layers.1.attention.dense.base_layer.bias",
                           "base_model.model.gpt_neox.layers.1.attention.dense.lora_B.bias" } do
      assert.is_truthy(tensors[key], key)
    end
    neox:close()
    neox = load("gpt_neox", { lora = { dir, named = root .. "lora/gpt_neox_qkv" } })
    assert.same({}, neox.warnings[2] and { neox.warnings[2] } or {})
    assert.matches("targets what is not there: none$", neox.warnings[1])
    assert.equal(2, #lora.list(neox))
    neox:close()
  end)

  it("refuses what makes no sense, at the caller's line", function()
    local function refuses(o, part)
      local ok, message = pcall(lora.attach, model, o)
      assert.is_false(ok)
      assert.is_truthy(message:find(part, 1, true), message)
      assert.is_truthy(message:find("adapters_spec.lua", 1, true) or message:find("^lora"), message)
    end
    refuses({ rank = 8 }, "there is no option 'rank'")
    refuses({ r = 0 }, "'r': expected a whole number above 0, found 0")
    refuses({ alpha = "8" }, "'lora_alpha': expected a number, found a string")
    refuses({ dropout = 1 }, "'lora_dropout'")
    refuses({ bias = "some" }, "'bias': expected none, all or lora_only, found 'some'")
    refuses({ target_modules = { "w1" } }, "nothing in this llama model is called w1")
    refuses({ target_modules = "(" }, "pattern '('")
    refuses({ target_modules = {} }, "target_modules names nothing")
    refuses({ target_modules = "" }, "target_modules names nothing")
    refuses({ modules_to_save = { "score" } }, "nothing in this model is called 'score'")
    refuses({ init_lora_weights = "pissa" }, "expected true, false or 'gaussian'")
    refuses({ use_dora = true, lora_bias = true }, "does not go with 'use_dora'")
    refuses({ name = "a.b" }, "a name is letters")
    lora.attach(model)
    refuses({}, "there is an adapter 'default' already")
    assert.error_matches(function() lora.set_adapter(model, "x") end, "there is no adapter 'x'; there are: default")
    assert.error_matches(function() lora.unmerge(model, "default") end, "is not merged")
    assert.error_matches(function() lora.load({}, "x") end, "expected a model")
    local quantized = load("llama", { quant = "nf4" })
    assert.error_matches(function() lora.attach(quantized, { modules_to_save = { "down_proj" } }) end, "is nf4, which cannot be trained")
    quantized:close()
  end)

  it("counts 4-bit weights packed, as the recipes' figures do", function()
    local quantized = load("llama", { quant = "nf4" })
    lora.attach(quantized, { r = 8 })
    local plan = assert(wane.plan.of(quantized.config, { quant = "nf4", lora = { r = 8 } }))
    local _, trainable, all = lora.trainable_report(quantized)
    assert.same({ plan.trainable, plan.all }, { trainable, all })
    quantized:close()
  end)
end)
