-- What happens when things go wrong around a whole model: memory, cancel, wrong arguments, unknown families.
local ffi = require "ffi"
local core = require "wane.core"
local wane = require "wane"
local C = core.C

local folder = "spec/fixtures/models/llama"

local function allocations()
  local m = ffi.new "wane_memory"
  C.wane_memory_read(m)
  return tonumber(m.allocations), tonumber(m.tensors)
end

local function load_and_generate()
  local model, message = wane.load(folder, { quant = { type = "nf4", double_quant = true }, tokenizer = false })
  if not model then return nil, message end
  local ok, ids = pcall(model.generate, model, { { 5, 6, 7 } }, { max_new_tokens = 5, ignore_eos = true })
  model:close()
  if not ok then return nil, ids end
  return ids[1]
end

describe("memory that runs out", function()
  it("at any allocation gives a clear error, leaks nothing, and the next try succeeds", function()
    local good = assert(load_and_generate())
    core.wait()
    collectgarbage() collectgarbage()
    local _, tensors = allocations()
    local n, failed, survived = 0, 0, 0
    repeat
      n = n + 1
      local before = allocations()
      C.wane_fail_allocation(n)
      local ids, message = load_and_generate()
      C.wane_fail_allocation(0)
      local used = allocations() - before
      core.wait()
      if ids then
        assert.same(good, ids)                          -- an allocation that can be done without (a worker's, a cache's)
        survived = survived + 1
      else
        failed = failed + 1
        assert.truthy(tostring(message):find("out of memory", 1, true), ("allocation %d: %s"):format(n, tostring(message)))
      end
      collectgarbage() collectgarbage()
      local _, now = allocations()
      assert.is_true(now <= tensors, ("allocation %d left tensors behind: %d, before %d"):format(n, now, tensors))
    until used < n
    print(("  a load and 5 tokens make %d allocations: %d of them failed with an error, %d were survived"):format(n - 1, failed, survived - 1))
    assert.is_true(failed > 20)
    assert.same(good, load_and_generate())
  end)
end)

describe("cancel", function()
  it("stops a generation with an error; the model goes on working", function()
    local model = assert(wane.load(folder, { tokenizer = false }))
    local prompt = {}
    for i = 1, 60 do prompt[i] = i end
    local want = model:generate({ prompt }, { max_new_tokens = 5, ignore_eos = true })[1]
    local run = require("wane.generate").start(model, { prompt }, { max_new_tokens = 60, ignore_eos = true })
    for _ = 1, 3 do run:next() end
    C.wane_stream_cancel(core.stream())
    local ok, message = pcall(function() for _ = 1, 50 do run:next() end end)
    assert.is_false(ok)
    assert.truthy(tostring(message):find("cancel", 1, true), tostring(message))
    run:close()
    assert.same(want, model:generate({ prompt }, { max_new_tokens = 5, ignore_eos = true })[1])
    model:close()
  end)

  it("a load that is cancelled from its progress leaves nothing behind", function()
    core.wait()
    collectgarbage() collectgarbage()
    local _, before = allocations()
    local model, message, code = wane.load(folder, { tokenizer = false, quant = "nf4", cancelled = function() return true end })
    if not model then
      assert.equal("WANE_E_CANCELLED", code, message)
    else
      model:close()                                     -- it was done before anybody asked
    end
    collectgarbage() collectgarbage()
    local _, after = allocations()
    assert.is_true(after <= before)                     -- the collector may take what an earlier spec left
  end)
end)

describe("wrong use", function()
  local model
  setup(function() model = assert(wane.load(folder, { tokenizer = false })) end)
  teardown(function() model:close() end)

  -- The message must carry this file's name: the mistake is here.
  local function refused(words, fn, ...)
    local ok, message = pcall(fn, ...)
    assert.is_false(ok)
    assert.truthy(tostring(message):find(words, 1, true), tostring(message))
    return tostring(message)
  end

  it("is told at the caller's line", function()
    local message = refused("ids", function() model:forward(7) end)
    assert.truthy(message:find("failure_spec.lua", 1, true), message)
    message = refused("row 2 has 1", function() model:forward({ { 1, 2 }, { 3 } }) end)
    refused("prompt 1 is empty", function() model:generate({ {} }) end)
    refused("id 2 of prompt 1 is 1.5", function() model:generate({ { 1, 1.5 } }) end)
    refused("id 1 of prompt 1 is a;", function() model:generate({ { "a" } }) end)
    refused("there is no option 'max_tokens'", function() model:generate({ { 1 } }, { max_tokens = 3 }) end)
    refused("later version", function() model:generate({ { 1 } }, { num_beams = 4 }) end)
    refused("temperature", function() model:generate({ { 1 } }, { temperature = -1 }) end)
    refused("expected a path", function() wane.load(nil) end)
    refused("expected none, nf4", function() wane.load(folder, { quant = "nf5" }) end)
    refused("double_quant", function() wane.load(folder, { quant = { type = "int8", double_quant = true } }) end)
    assert.truthy(message)
  end)

  it("ids outside the vocabulary name the id and the vocabulary's size", function()
    local ok, message = pcall(function() return model:generate({ { 1, 99999 } }, { max_new_tokens = 2 }) end)
    assert.is_false(ok)
    assert.truthy(tostring(message):find("99999", 1, true), tostring(message))
    assert.equal(3, #model:generate({ { 1, 2 } }, { max_new_tokens = 3, ignore_eos = true })[1])
  end)

  it("unknown architectures name the families there are", function()
    local tree, message = wane.models.build { architectures = { "MambaForCausalLM" }, model_type = "mamba" }
    assert.is_nil(tree)
    assert.truthy(message:find("there are: bloom, falcon, ", 1, true))
    assert.truthy(message:find("docs/adding-a-family.md", 1, true))
  end)

  it("a wrong shape against the config names the tensor and both shapes", function()
    local dir = os.tmpname()
    os.remove(dir)
    os.execute(("mkdir -p %s && cp %s/model.safetensors %s/ && " ..
      "sed 's/\"intermediate_size\": 104/\"intermediate_size\": 96/' %s/config.json > %s/config.json"):format(dir, folder, dir, folder, dir))
    local other, message, code = wane.load(dir, { tokenizer = false })
    os.execute("rm -rf " .. dir)
    assert.is_nil(other)
    assert.equal("WANE_E_FORMAT", code)
    assert.truthy(message:find("104, 48", 1, true) and message:find("96, 48", 1, true), message)
  end)
end)

describe("convert and quantize in memory", function()
  it("a model quantized in memory equals one quantized while loading, bit for bit", function()
    local F = require "wane.nn.functional"
    for _, scheme in ipairs { "nf4", "fp4", "int8", "int8-blockwise" } do
      local a = assert(wane.load(folder, { tokenizer = false, quant = scheme, compute = "f32" }))
      local b = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
      assert.equal(14, wane.quant.convert(b, { type = scheme }))
      local x, n = F.read(a:forward { { 1, 2, 3, 4 } }, "float")
      local y = F.read(b:forward { { 1, 2, 3, 4 } }, "float")
      assert.is_true(ffi.string(x, n * 4) == ffi.string(y, n * 4), scheme)
      a:close()
      b:close()
    end
  end)

  it("a filter chooses layers by path; one layer alone; the tree tells", function()
    local model = assert(wane.load(folder, { tokenizer = false }))
    assert.equal(6, wane.quant.convert(model, { type = "int8", threshold = 6.0 }, function(path) return path:match "mlp" end))
    assert.equal("int8", model:find("model.layers.1.mlp.up_proj").weight:dtype())
    assert.equal("f32", model:find("model.layers.1.self_attn.q_proj").weight:dtype())
    assert.truthy(tostring(model):find("up_proj) Linear(48 -> 104, no bias, int8)", 1, true))
    model:close()
    local lin = wane.nn.Linear(64, 32):quantize { type = "nf4" }
    assert.equal("Linear(64 -> 32, nf4)", tostring(lin))
    local F = require "wane.nn.functional"
    local _, n = F.read(lin(F.upload(ffi.new("float[128]"), C.WANE_F32, 512, 2, 64)), "float")
    assert.equal(64, n)
  end)
end)

describe("a family from outside the tree", function()
  it("is registered from a file or a table and loads like the others (docs/adding-a-family.md)", function()
    local text = assert(io.open "docs/adding-a-family.md"):read "*a"
    local source = text:match "```lua\n(%-%-%- OLMo 2%..-)```"
    local path = os.tmpname() .. ".lua"
    local f = assert(io.open(path, "w"))
    f:write(source)
    f:close()
    wane.models.register(path)
    os.remove(path)
    local tree = assert(wane.models.build { architectures = { "Olmo2ForCausalLM" }, hidden_size = 32, num_attention_heads = 4, num_key_value_heads = 2,
      intermediate_size = 64, num_hidden_layers = 2, vocab_size = 50 })
    for _, m in tree:modules() do
      for _, p in ipairs(m:own_parameters()) do
        local h = core.handle_type()
        local shape, n = core.shape(p.shape)
        core.check(C.wane_random(core.stream(), h, C.WANE_NORMAL, 0, 0.1, 1, 0, C.WANE_F32, n, shape))
        m[p.name] = wane.Tensor.wrap(h)
      end
    end
    local model = require("wane.model").new(tree):set_compute "f32"
    assert.equal(5, #model:generate({ { 1, 2, 3 } }, { max_new_tokens = 5, ignore_eos = true })[1])
    model:close()
  end)
end)
