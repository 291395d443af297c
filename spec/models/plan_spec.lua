-- What a model needs, told from its config alone: the figures that published recipes print, and what loading really holds.
local cjson = require "cjson"
local wane = require "wane"

local program = os.getenv "WANE_BIN" or "bin/wane"

local function read_json(path)
  local f = assert(io.open(path))
  local text = f:read "*a"
  f:close()
  return cjson.decode(text)
end

local function large(name) return read_json("spec/fixtures/plan/" .. name .. ".json") end

describe("plan", function()
  it("counts GPT-NeoX-20B in NF4 with LoRA as peft prints it", function()
    local lora = { r = 8, target_modules = { "query_key_value" } }
    local p = assert(wane.plan.of(large "gpt-neox-20b", { quant = { type = "nf4", double_quant = true }, lora = lora }))
    assert.equal(20554567680, p.parameters)
    assert.equal(8650752, p.trainable)
    assert.equal(10597552128, p.all)
  end)

  it("gives BLOOM-176B in int8 its 180 GB", function()
    local p = assert(wane.plan.of(large "bloom-176b", { quant = "int8" }))
    assert.equal(176247271424, p.parameters)
    assert.is_true(math.abs(p.weights_bytes - 180e9) < 0.5e9)
  end)

  it("gives GPT-J-6B its 11 GiB in 16 bit, and fits its 8-bit fine-tuning into an 11 GB card", function()
    local plain = assert(wane.plan.of(large "gpt-j-6b"))
    assert.equal(6050882784, plain.parameters)
    assert.is_true(math.abs(plain.weights_bytes / 2 ^ 30 - 11.3) < 0.1)
    local eight = assert(wane.plan.of(large "gpt-j-6b", { quant = { type = "int8-blockwise", skip = { "nothing" } } }))
    assert.is_true(eight.train_bytes < 11e9 and eight.train_bytes > eight.weights_bytes + 1e9)
  end)

  -- The sum over the weights is exact: it is what the loaded model holds.
  for _, name in ipairs { "llama", "gpt_neox", "bloom", "gptj", "opt_350", "gpt2", "falcon", "mixtral", "gemma2", "qwen3_moe", "phi3", "t5", "flan_t5" } do
    it("of " .. name .. " says what the loaded model holds, under every scheme", function()
      local folder = "spec/fixtures/models/" .. name
      local config = read_json(folder .. "/config.json")
      local stored = wane.checkpoint.open(folder)
      local dtype = stored:find(stored:names()[1]).dtype
      stored:close()
      for _, quant in ipairs { "none", { type = "nf4", double_quant = true }, "fp4", "int8", "int8-blockwise" } do
        local model = assert(wane.load(folder, { tokenizer = false, quant = quant }))
        local plan = assert(wane.plan.of(config, { quant = quant, dtype = dtype }))
        assert.equal(model:memory_footprint(), plan.weights_bytes)
        model:close()
      end
    end)
  end

  it("refuses what cannot be planned", function()
    local plan, message, code = wane.plan.of { architectures = { "NoSuchModel" } }
    assert.is_nil(plan)
    assert.equal("WANE_E_UNSUPPORTED", code)
    assert.matches("NoSuchModel", message)
    plan, message = wane.plan.of(large "gpt-j-6b", { lora = { target_modules = { "query_key_value" } } })
    assert.is_nil(plan)
    assert.matches("query_key_value", message)
    assert.has_error(function() wane.plan.of(large "gpt-j-6b", { dtype = "f64" }) end)
  end)

  it("is a command", function()
    local pipe = io.popen(program .. " inspect --plan spec/fixtures/plan/gpt-neox-20b.json --quant nf4 --max-memory 16GB --context 512 --json")
    local out = cjson.decode(pipe:read "*a")
    pipe:close()
    assert.equal(10597552128, out.plans[1].all)
    assert.is_true(out.plans[1].fits.load and out.plans[1].fits.generate)
    assert.equal(44 * 2 * 512 * 6144 * 2, out.plans[1].cache_bytes)
    pipe = io.popen(program .. " inspect --plan spec/fixtures/models/llama --max-memory 1MB")
    local text = pipe:read "*a"
    pipe:close()
    assert.matches("nf4, double .*too much", text)
    assert.equal(512, os.execute(program .. " inspect spec/fixtures/models/llama --quant nf4 2>/dev/null"))
  end)
end)
