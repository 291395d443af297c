-- What of a model is trained beside an adapter, and that the adapter's files hold all of it.
local files = require "support.files"
local wane = require "wane"
local lora = wane.lora

local root = "spec/fixtures/models/"
local function load(name, o)
  o = o or {}
  o.tokenizer, o.compute = false, o.compute or "f32"
  return assert(wane.load(root .. name, o))
end

-- Paths of what is trained, in order, without what an adapter adds.
local function trained(model)
  local names = {}
  for _, p in ipairs(model:trainable_parameters()) do
    if not p.name:find("lora_", 1, true) then names[#names + 1] = p.name end
  end
  return names
end

local model
after_each(function()
  if model then model:close() end
  model = nil
  files.clean()
end)

describe("parameters that were chosen before attach", function()
  it("are trained, and no others: names that PEFT would take for those of modules around them", function()
    for _, case in ipairs {
      { "t5", "%.k%.weight$", 7 }, { "t5", "SelfAttention%.o%.weight$", 5 }, { "t5", "encoder.*layer_norm%.weight$", 7 }, { "flan_t5", "^lm_head", 1 },
      { "flan_t5", "^shared", 1 }, { "llama", "norm", 5 },
      { "llama", "model%.norm", 1 }, { "gpt_neox", "^embed_out", 1 }, { "gpt_neox", "%.1%.input_layernorm", 2 },
    } do
      model = load(case[1])
      model:train_parameters(case[2])
      local chosen = trained(model)
      assert.equal(case[3], #chosen, case[1] .. " " .. case[2])
      lora.attach(model)
      assert.same(chosen, trained(model))
      local dir = files.folder()
      assert(lora.save(model, dir))
      model:close()
      model = load(case[1], { lora = { dir } })
      assert.same({}, model.warnings)
      assert.same({}, trained(model))
      lora.train(model, true)
      assert.same(chosen, trained(model))                                     -- the files mean the same
      model:close()
    end
    model = nil
  end)

  it("are named in as few words as mean them", function()
    for pattern, names in pairs { norm = { "norm" }, _layernorm = { "input_layernorm", "post_attention_layernorm" }, ["model%.norm"] = { "model.norm" } } do
      model = load "llama"
      model:train_parameters(pattern)
      lora.attach(model)
      assert.same(names, lora.list(model)[1].config.modules_to_save)
      model:close()
    end
    model = nil
  end)

  it("are refused where no name means them alone", function()
    model = load "gpt_neox"
    model.old_embed_out = wane.nn.Linear(4, 4)
    model.old_embed_out.weight = wane.zeros(4, 4)
    model:train_parameters "^embed_out"
    assert.error_matches(function() lora.attach(model) end, "'embed_out' is trained and 'old_embed_out' is not, but modules_to_save cannot name one without")
    assert.same({}, lora.list(model))
  end)

  it("are refused where they are tied: a file would hold one of two", function()
    model = load "gpt2"
    model:train_parameters "wte"
    assert.error_matches(function() lora.attach(model) end, "'lm_head.weight' is trained and shared with 'transformer.wte', which an adapter cannot hold")
    assert.same({}, lora.list(model))
  end)

  it("are the adapter's from then on: without it nothing is trained", function()
    model = load "llama"
    model:train_parameters "norm"
    lora.attach(model)
    lora.disable(model)
    assert.is_false(model:trains())
    lora.enable(model)
    assert.is_true(model:trains())
    lora.delete(model, "default")
    assert.is_false(model:trains())
  end)
end)

describe("an adapter from files", function()
  it("is not trained beside parameters that its files do not hold", function()
    local dir = files.folder()
    model = load "llama"
    lora.attach(model)
    assert(lora.save(model, dir))
    lora.delete(model, "default")
    model:train_parameters "norm"
    local said = "'model.layers.0.input_layernorm.weight' of the model itself is trained, which this adapter's files cannot hold"
    assert.error_matches(function() lora.load(model, dir, { trainable = true }) end, "lora.load: " .. said)
    assert.same({}, lora.list(model))
    assert(lora.load(model, dir))                                             -- frozen, beside trained weights: model:save writes those
    assert.error_matches(function() lora.train(model, true) end, "lora.train: " .. said)
    lora.train(model, false)
    model:freeze()
    lora.train(model, true)
    assert.same({}, trained(model))
    assert.equal(4 * 2, #model:trainable_parameters())
  end)

  it("is trained in f32, whatever its files hold, and rests in what they hold", function()
    local dir = files.folder()
    model = load "llama"
    lora.attach(model, { modules_to_save = { "lm_head" } })
    local state = model.lora.adapters.default.replaced
    for _, replaced in pairs(state) do replaced.weight = replaced.weight:to "bf16" end
    assert(lora.save(model, dir))
    model:close()
    model = load("llama", { lora = dir })
    local head = model:find "lm_head"
    assert.equal("bf16", head.weight:dtype())
    lora.train(model, true)
    assert.equal("f32", head.weight:dtype())
    assert.same({ "lm_head.weight" }, trained(model))
    lora.train(model, false)
    assert.is_false(model:trains())
    model:close()
    model = load "mixtral"                                                    -- of 16-bit weights
    lora.attach(model, { modules_to_save = { "lm_head" } })
    assert.same({ "f32" }, { model:find("lm_head").weight:dtype() })
  end)
end)

describe("gradients", function()
  local IDS = { { 1, 5, 9, 2, 7, 3, 8, 4, 6, 10, 12 } }

  local function backward(m)
    wane.scope(function() m:loss(IDS, IDS):backward() end)
  end

  local function assert_near(want, got, what)
    local worst = (want - got):abs():amax():item()
    assert.is_true(worst <= 1e-5 * want:abs():amax():item(), ("%s: off by %g of %g"):format(what, worst, want:abs():amax():item()))
  end

  it("of a weight and a bias that are trained beside an adapter are those without it", function()
    local path = "gpt_neox.layers.0.attention.query_key_value"
    for _, field in ipairs { "weight", "bias" } do
      local want
      for _, adapted in ipairs { false, true } do
        model = load "gpt_neox"
        if adapted then lora.attach(model, { target_modules = { "query_key_value" } }) end           -- its B is 0: it changes nothing yet
        local leaf = wane.autograd.leaf(model:find(path)[field])
        backward(model)
        assert.is_truthy(leaf.grad, field)
        want = want or leaf.grad:clone()
        assert_near(want, leaf.grad, field)
        if adapted then assert.is_true(model:find(path).adapters[1].B.grad:abs():amax():item() > 0) end
        model:close()
      end
    end
    model = nil
  end)

  it("of a rank that one op has no room for are those of two adapters of half that rank", function()
    local path, half = "model.layers.0.self_attn.q_proj", 150
    model = load "llama"
    lora.attach(model, { name = "whole", r = 2 * half, alpha = 2 * half, init_lora_weights = false })
    lora.attach(model, { name = "one", r = half, alpha = half })
    lora.attach(model, { name = "two", r = half, alpha = half })
    local adapters = model.lora.adapters
    for at, whole in pairs(adapters.whole.parts) do
      for i, name in ipairs { "one", "two" } do
        local from, part = (i - 1) * half + 1, adapters[name].parts[at]
        part.A:copy(whole.A:narrow(1, from, half))
        part.B:copy(whole.B:narrow(2, from, half))
      end
    end
    backward(model)
    lora.set_adapter(model, { "one", "two" })
    backward(model)
    local whole = adapters.whole.parts[path]
    for i, name in ipairs { "one", "two" } do
      local from, part = (i - 1) * half + 1, adapters[name].parts[path]
      assert_near(whole.A.grad:narrow(1, from, half), part.A.grad, "A")
      assert_near(whole.B.grad:narrow(2, from, half), part.B.grad, "B")
    end
  end)
end)
