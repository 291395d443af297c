-- PEFT's adapters on transformers' models (spec/fixtures/make/train.py): logits of the base, with the adapter, with it disabled, merged and
-- unmerged, within 1e-5 of the largest logit; the line that PEFT prints; and what wane writes, read again.
local ffi = require "ffi"
local F = require "wane.nn.functional"
local wane = require "wane"
local files = require "support.files"
local golden = require "spec.support.golden"
local safetensors = require "spec.support.safetensors"
local lora = wane.lora

local root = "spec/fixtures/train/"
local BAR = 1e-5

local cases = { "llama_all", "llama_rslora", "llama_patterns", "llama_dora", "gpt_neox_qkv", "gpt_neox_modules_to_save", "gptj_qv", "bloom_embedding" }
local architectures = { llama = "LlamaForCausalLM", gpt_neox = "GPTNeoXForCausalLM", gptj = "GPTJForCausalLM", bloom = "BloomForCausalLM" }

local function bits(model, ids)
  local values, n = F.read(model:forward(ids), "float")
  return ffi.string(values, n * 4)
end

for _, name in ipairs(cases) do
  local base = name:match "^gpt_neox" or name:match "^[^_]+"
  describe("adapter " .. name, function()
    local expected = safetensors.read(root .. "lora/" .. name .. "/expected.safetensors")
    local json = golden.read_json(root .. "lora/" .. name .. "/expected.json")
    local ids = golden.lists(expected.input_ids)
    if not wane.models.find { architectures = { architectures[base] } } then
      pending("there is no family " .. base)
      return
    end

    local model
    before_each(function() model = assert(wane.load(root .. "base/" .. base, { tokenizer = false, compute = "f32" })) end)
    after_each(function()
      model:close()
      files.clean()
    end)

    -- Largest difference of the model's logits from those of a key, as a share of the largest.
    local function distance(key)
      local largest = 0
      for i = 0, expected[key].numel - 1 do largest = math.max(largest, math.abs(expected[key].data[i])) end
      return golden.difference(F.read(model:forward(ids), "float"), expected[key]) / largest
    end

    it("gives peft's logits: base, enabled, disabled, merged, unmerged", function()
      local d = { base = distance "logits_base" }
      local report = assert(lora.load(model, root .. "lora/" .. name))
      assert.same({}, report.missing)
      assert.same({}, report.unexpected)
      assert.same({}, report.unused)
      d.enabled = distance "logits_enabled"
      local before = bits(model, ids)
      lora.disable(model)
      d.disabled = distance "logits_disabled"
      lora.enable(model)
      assert(lora.merge(model))
      d.merged = distance "logits_enabled"
      assert(lora.unmerge(model))
      assert.is_true(bits(model, ids) == before)
      print(("  %s, of the largest logit: base %.2g, enabled %.2g, disabled %.2g, merged %.2g"):format(name, d.base, d.enabled, d.disabled, d.merged))
      for _, value in pairs(d) do assert.is_true(value <= BAR) end
    end)

    it("counts parameters as peft does", function()
      assert(lora.load(model, root .. "lora/" .. name))
      local line, trainable, all = lora.trainable_report(model)
      assert.equal(json.printed, line)
      assert.equal(json.trainable, trainable)
      assert.equal(json.all, all)
    end)

    it("written and read again is the same, and peft's keys", function()
      assert(lora.load(model, root .. "lora/" .. name))
      local before, dir = bits(model, ids), files.folder()
      assert(lora.save(model, dir))
      local source, written = safetensors.read(root .. "lora/" .. name .. "/adapter_model.safetensors"), safetensors.read(dir .. "/adapter_model.safetensors")
      local count = 0
      for key, tensor in pairs(source) do
        assert.is_truthy(written[key], key)
        assert.is_true(ffi.string(tensor.data, tensor.nbytes) == ffi.string(written[key].data, written[key].nbytes), key)
        count = count + 1
      end
      for _ in pairs(written) do count = count - 1 end
      assert.equal(0, count)
      local config, given = golden.read_json(dir .. "/adapter_config.json"), golden.read_json(root .. "lora/" .. name .. "/adapter_config.json")
      for _, key in ipairs { "peft_type", "r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
                             "task_type" } do
        assert.same(given[key], config[key], key)
      end
      lora.delete(model, "default")
      assert(lora.load(model, dir))
      assert.is_true(bits(model, ids) == before)
    end)

    if base == "bloom" then
      it("a tied head is left alone by a merge; changed with it, the logits are those of peft's merge in place", function()
        assert(lora.load(model, root .. "lora/" .. name))
        local report = assert(lora.merge(model))
        assert.matches("shared a weight", table.concat(report.warnings, "\n"))
        local own = model.lm_head.weight
        model.lm_head.weight = model.transformer.word_embeddings.weight
        local d = distance "logits_merged"
        print(("  %s merged as peft merges tied weights: %.2g of the largest logit"):format(name, d))
        assert.is_true(d <= BAR)
        model.lm_head.weight = own
        local dir, before = files.folder(), bits(model, ids)                  -- saved, the pair stays parted
        assert(model:save(dir))
        local saved = assert(wane.load(dir, { tokenizer = false, compute = "f32" }))
        assert.is_false(saved.config.tie_word_embeddings)
        assert.is_true(bits(saved, ids) == before)
        saved:close()
      end)
    end
  end)
end
