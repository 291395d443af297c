-- Folders that bitsandbytes wrote, as whole models: logits against the exactly dequantized weights of the file in float32, and against
-- what upstream's own modules gave (spec/fixtures/make/quant.py; two defects of its CPU code repaired). The bars are README-quant's:
-- 1e-5 of the largest logit where both sides are float32; for bfloat16, 3 and 2 times how far upstream's logits move (largest and mean)
-- when its embedding moves by an ulp.
local ffi = require "ffi"
local F = require "wane.nn.functional"
local wane = require "wane"
local golden = require "spec.support.golden"
local safetensors = require "spec.support.safetensors"

local root = "spec/fixtures/quant/checkpoints/"

local bits = ffi.new "union { uint32_t i; float f; }"
local function value(t, i)
  if t.dtype ~= "BF16" then return t.data[i] end
  bits.i = t.data[i] * 65536
  return bits.f
end

-- Largest and mean difference of a model's logits from a tensor of the fixtures.
local function distance(model, expected, name)
  local o = expected.decoder_input_ids and { decoder_input_ids = golden.lists(expected.decoder_input_ids) }
  local got, n = F.read(model:forward(golden.lists(expected.input_ids), o), "float")
  local t, worst, sum = expected[name], 0, 0
  assert.equal(t.numel, n)
  for i = 0, n - 1 do
    local d = math.abs(got[i] - value(t, i))
    if not (d <= worst) then worst = d end
    sum = sum + d
  end
  return worst, sum / n
end

local function weights_only(model)
  for _, l in ipairs(model:linears()) do if l[2].threshold then l[2].threshold = -1 end end
  return model
end

for _, family in ipairs { "llama", "gpt_neox", "t5", "bloom", "opt" } do
  for _, scheme in ipairs { "nf4-dq-bf16", "fp4-f32", "int8" } do
    local folder = root .. family .. "/" .. scheme
    describe(folder:sub(#root + 1), function()
      local expected = safetensors.read(folder .. "/expected.safetensors")
      local json = golden.read_json(folder .. "/expected.json")
      local function load(compute) return assert(wane.load(folder, { tokenizer = false, compute = compute })) end

      it("logits in float32 equal those of the dequantized weights", function()
        local model = weights_only(load "f32")
        local d = distance(model, expected, "logits_dequant_f32") / json.logits_absmax
        print(("  %s/%s: against the dequantized weights %.2g of the largest logit"):format(family, scheme, d))
        assert.is_true(d <= 1e-5)
        model:close()
      end)

      it("logits as the folder is loaded equal upstream's", function()
        local model = load(scheme == "int8" and "f32" or nil)            -- upstream computed it in float32; AMX's bf16 products round
        local worst, mean = distance(model, expected, "logits")
        local bar, mean_bar = 1e-5 * json.logits_absmax, 1e-5 * json.logits_absmax
        if scheme == "nf4-dq-bf16" then bar, mean_bar = 3 * json.noise_probe_max, 2 * json.noise_probe_mean end
        print(("  %s/%s: against upstream's modules %.2g (bar %.2g), mean %.2g (bar %.2g)"):format(family, scheme, worst, bar, mean, mean_bar))
        assert.is_true(worst <= bar and mean <= mean_bar)
        model:close()
      end)

      it("memory_footprint: transformers' own figure on request", function()
        local model = load()
        assert.equal(json.memory_footprint, model:memory_footprint "transformers")
        assert.is_true(model:memory_footprint() > json.memory_footprint)
        assert.equal(1, select("#", model:memory_footprint()))
        model:close()
      end)
    end)
  end
end

describe("llama/nf4-repacked-bf16", function()
  -- Saved by a CPU that repacks: upstream's own product of such weights loses more than the format does, so there is no bar for it.
  it("logits in float32 equal those of the dequantized weights", function()
    local folder = root .. "llama/nf4-repacked-bf16"
    local expected = safetensors.read(folder .. "/expected.safetensors")
    local model = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
    local most = 0
    for i = 0, expected.logits_dequant_f32.numel - 1 do most = math.max(most, math.abs(expected.logits_dequant_f32.data[i])) end
    local d = distance(model, expected, "logits_dequant_f32") / most
    print(("  llama/nf4-repacked-bf16: against the dequantized weights %.2g of the largest logit"):format(d))
    assert.is_true(d <= 1e-5)
    model:close()
  end)
end)

for _, name in ipairs { "bloom/blockwise8", "gptj/blockwise8" } do
  describe(name .. " (as GPT-J-6B-8bit: embeddings too, a code of its own)", function()
    local json = golden.read_json(root .. name .. "/expected.json")
    local expected = safetensors.read(root .. name .. "/expected.safetensors")
    local model
    setup(function() model = assert(wane.load(root .. name, { tokenizer = false, compute = "f32" })) end)
    teardown(function() model:close() end)

    it("logits equal upstream's", function()
      local most = 0
      for i = 0, expected.logits.numel - 1 do most = math.max(most, math.abs(expected.logits.data[i])) end
      local d = distance(model, expected, "logits") / most
      print(("  %s: %.2g of the largest logit"):format(name, d))
      assert.is_true(d <= 1e-5)
    end)

    it("every module that the recipe quantizes is held so; a tied head shares the embedding's codes", function()
      for _, path in ipairs(json.quantized_modules) do assert.equal("int8-blockwise", model:find(path).weight:dtype(), path) end
      local tied = model.config.tie_word_embeddings ~= false
      assert.equal(tied, model:find(model.family.embedding).weight == model:find("lm_head").weight)
    end)
  end)
end
