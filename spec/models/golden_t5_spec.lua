-- T5 and flan-T5 against transformers (spec/fixtures/make/models.py): both stacks, masks on both sides, the loss, generation with a cache,
-- every scheme; and what an encoder-decoder refuses.
local ffi = require "ffi"
local core = require "wane.core"
local F = require "wane.nn.functional"
local passes = require "wane.nn.pass"
local relative = require "wane.nn.relative"
local wane = require "wane"
local cli = require "support.files"
local golden = require "spec.support.golden"
local safetensors = require "spec.support.safetensors"

local lists, difference = golden.lists, golden.difference

local function load(name, options)
  local o = { tokenizer = false, compute = "f32" }
  for k, v in pairs(options or {}) do o[k] = v end
  return assert(wane.load(golden.root .. name, o))
end

local function refused(pattern, fn, ...)
  local ok, message = pcall(fn, ...)
  assert.is_false(ok)
  assert.is_truthy(tostring(message):find(pattern, 1, true), tostring(message))
end

-- Results of the modules that the fixtures call hidden states, while fn runs.
local function watch(model, fn)
  local seen, paths, embeds = {}, {}, 0
  local function on(path, key)
    paths[#paths + 1] = path
    model:on_forward(path, function(y)
      local name = key
      if not key then
        embeds = embeds + 1
        name = embeds == 1 and "encoder.hidden.embed" or "decoder.hidden.embed"
      end
      seen[name] = F.outside_scopes(F.cast, y, core.C.WANE_F32)
    end)
  end
  on "shared"
  on("encoder.final_layer_norm", "encoder.hidden.final")
  for i = 0, model.config.num_hidden_layers - 1 do on("encoder.block." .. i, "encoder.hidden.layer_" .. i) end
  for i = 0, model.config.num_decoder_layers - 1 do on("decoder.block." .. i, "decoder.hidden.layer_" .. i) end
  fn()
  for _, path in ipairs(paths) do model:on_forward(path, nil) end
  return seen
end

for name, layers in pairs { t5 = { 3, 2 }, flan_t5 = { 2, 2 } } do
  describe(name, function()
    local expected = safetensors.read(golden.root .. name .. "/expected.safetensors")
    local json = golden.read_json(golden.root .. name .. "/expected.json")
    local ids, decoder_ids = lists(expected.input_ids), lists(expected.decoder_input_ids)
    local vocab = expected.logits.shape[3]
    local function forward(model) return model:forward(ids, { decoder_input_ids = decoder_ids }) end
    local model

    setup(function() model = load(name) end)
    teardown(function() if model then model:close() end end)

    it("logits and every hidden state of both stacks equal transformers'", function()
      local seen = watch(model, function() forward(model) end)
      seen.logits = forward(model)
      local source = model:source(ids)
      local tensor, batch, time = model.ids_tensor(decoder_ids)
      seen["decoder.hidden.final"] = model:backbone(tensor, passes.new { batch = batch, time = time, source = source })
      local worst, count = 0, 0
      for key, t in pairs(seen) do
        local values, n = F.read(t, "float")
        assert.equal(expected[key].numel, n)
        local d = difference(values, expected[key])
        assert.is_true(d <= golden.TOLERANCE, ("%s differs by %g"):format(key, d))
        worst, count = math.max(worst, d), count + 1
      end
      assert.equal(layers[1] + layers[2] + 5, count)
      source:close()
      print(("  %s: logits and hidden states, largest difference %.2g"):format(name, worst))
    end)

    it("right-padded on both sides: logits and encoder states equal transformers'", function()
      local mask, decoder_mask = lists(expected.masked_attention_mask), lists(expected.masked_decoder_attention_mask)
      local function seen(m, width)
        return function(i)
          local position = math.floor(i / width)
          return m[math.floor(position / #m[1]) + 1][position % #m[1] + 1] ~= 0
        end
      end
      local logits = model:forward(lists(expected.masked_input_ids), { attention_mask = mask, decoder_input_ids = lists(expected.masked_decoder_input_ids),
        decoder_attention_mask = decoder_mask })
      local d = difference(F.read(logits, "float"), expected.masked_logits, seen(decoder_mask, vocab))
      local source = model:source(lists(expected.masked_input_ids), mask)
      local e = difference(F.read(source.states, "float"), expected["masked_encoder.hidden.final"], seen(mask, model.config.hidden_size))
      source:close()
      print(("  %s: padded logits, largest difference %.2g, encoder %.2g"):format(name, d, e))
      assert.is_true(d <= golden.TOLERANCE and e <= golden.TOLERANCE)
    end)

    it("loss equals transformers': labels shifted right, -100 not counted", function()
      local d = math.abs(model:loss(ids, lists(expected.labels)):item() - expected.loss.data[0])
      print(("  %s: loss, difference %.2g"):format(name, d))
      assert.is_true(d <= 1e-5)
    end)

    it("the older spelling of the config gives the same bits", function()
      local dir, remove = golden.with_v4_config(name)
      local other = assert(wane.load(dir, { tokenizer = false, compute = "f32" }))
      local a, n = F.read(forward(model), "float")
      local b = F.read(forward(other), "float")
      assert.is_true(ffi.string(a, n * 4) == ffi.string(b, n * 4))
      other:close()
      remove()
    end)

    it("greedy ids equal, one prompt", function()
      assert.same(json.greedy.new_ids, model:generate({ json.greedy.prompt }, { max_new_tokens = 24, ignore_eos = true })[1])
    end)

    it("greedy ids equal, a batch: padded on the right, on the left, and by wane", function()
      local g = json.greedy_batch
      local o = { max_new_tokens = 24, ignore_eos = true, attention_mask = g.attention_mask }
      assert.same(g.new_ids, model:generate(g.input_ids, o))
      local ragged, left, left_mask = {}, {}, {}
      for b, row in ipairs(g.input_ids) do
        ragged[b], left[b], left_mask[b] = {}, {}, {}
        for t, id in ipairs(row) do if g.attention_mask[b][t] == 1 then table.insert(ragged[b], id) end end
        for t = 1, #row do
          local from = t - (#row - #ragged[b])
          left[b][t], left_mask[b][t] = ragged[b][from] or 0, from > 0 and 1 or 0
        end
      end
      assert.same(g.new_ids, model:generate(ragged, { max_new_tokens = 24, ignore_eos = true }))
      o.attention_mask = left_mask
      assert.same(g.new_ids, model:generate(left, o))
    end)

    it("greedy ids equal with repetition penalty and banned bigrams of the decoder's ids, alone and in a batch", function()
      local g = json.greedy_penalty
      local o = { max_new_tokens = 24, ignore_eos = true, repetition_penalty = g.repetition_penalty, no_repeat_ngram_size = g.no_repeat_ngram_size }
      assert.same(g.new_ids, model:generate({ g.prompt }, o)[1])
      g = json.greedy_penalty_batch
      o.attention_mask = g.attention_mask
      assert.same(g.new_ids, model:generate(g.input_ids, o))
    end)

    it("rows end at eos and the others go on", function()
      local g = json.greedy_eos_batch
      local out, reasons = model:generate(g.input_ids, { attention_mask = g.attention_mask, max_new_tokens = 24, eos_token_id = g.eos_token_id })
      local ended = 0
      for b, row in ipairs(g.new_ids) do
        local want, reason = {}, "length"
        for _, id in ipairs(row) do
          want[#want + 1] = id
          if id == g.eos_token_id then reason = "eos" break end
        end
        if reason == "eos" then ended = ended + 1 end
        assert.same(want, out[b])
        assert.equal(reason, reasons[b])
      end
      assert.is_true(ended > 0)
    end)

    it("a cache gives what a whole pass gives, the source's keys made once: token by token, in pieces, all at once", function()
      local mask = lists(expected.masked_attention_mask)
      local whole = F.read(model:forward(ids, { attention_mask = mask, decoder_input_ids = decoder_ids }), "float")
      local time, made = #decoder_ids[1], 0
      model:on_forward("decoder.block.1.layer.1.EncDecAttention.k", function() made = made + 1 end)
      local worst = 0
      for _, piece in ipairs { 1, 4, time } do
        made = 0
        core.scope(function()
          local tensor = model.ids_tensor(decoder_ids)
          local source, cache = model:source(ids, mask), passes.cache(2, time, core.C.WANE_F32)
          for from = 0, time - 1, piece do
            local n = math.min(piece, time - from)
            local pass = passes.new { batch = 2, time = n, start = from, cache = cache, source = source }
            local values = F.read(model:head(model:backbone(F.narrow(tensor, 1, from, n), pass)), "float")
            for b = 0, 1 do
              for i = 0, n * vocab - 1 do worst = math.max(worst, math.abs(values[b * n * vocab + i] - whole[(b * time + from) * vocab + i])) end
            end
          end
          cache:close()
          source:close()
        end)
        assert.equal(1, made)
      end
      model:on_forward("decoder.block.1.layer.1.EncDecAttention.k", nil)
      print(("  %s: pieces against the whole, largest difference %.2g"):format(name, worst))
      assert.is_true(worst < 2e-5)
    end)

    golden.schemes(name, forward)

    it("wo and the head stay as they are stored unless a skip list says otherwise, and wo's products are exact", function()
      local function held(options)
        local m, dtypes = load(name, options), {}
        for _, l in ipairs(m:linears()) do
          local last = l[1]:match "[^.]+$"
          if last == "wo" or last == "lm_head" or last == "q" then dtypes[last] = { l[2].weight:dtype(), l[2].compute } end
        end
        m:close()
        return dtypes
      end
      local stored = name == "t5" and "f32" or "f16"
      local f32, bf16 = core.C.WANE_COMPUTE_F32, core.C.WANE_COMPUTE_BF16
      assert.same({ wo = { stored, f32 }, lm_head = { stored, bf16 }, q = { "nf4", bf16 } }, held { quant = "nf4", compute = "bf16" })
      assert.same({ wo = { "nf4", bf16 }, lm_head = { stored, bf16 }, q = { "nf4", bf16 } },
        held { quant = { type = "nf4", skip = { "lm_head" } }, compute = "bf16" })
      assert.same({ wo = { stored, f32 }, lm_head = { "int8", bf16 }, q = { "int8", bf16 } },
        held { quant = { type = "int8", skip = { "wo" } }, compute = "bf16" })
      local m = load(name, { quant = { type = "nf4", skip = { "wo" } } })
      assert.equal(name == "t5" and 1 or 0, #m.warnings)               -- the tied pair is split, at a price
      if name == "t5" then
        assert.is_truthy(m.warnings[1]:find("lm_head shares its weight with shared", 1, true))
        assert.equal("f32", m.shared.weight:dtype())
      end
      m:close()
      m = load(name)
      assert.equal(#m:linears() - 1 - layers[1] - layers[2], wane.quant.convert(m, "nf4"))
      m:close()
    end)
  end)
end

describe("an encoder-decoder", function()
  local model, dir

  setup(function()
    model, dir = load "flan_t5", cli.folder()
  end)
  teardown(function()
    model:close()
    cli.clean()
  end)

  it("says what is missing or does not fit", function()
    refused("decoder_input_ids", model.forward, model, { { 5, 6 } })
    refused("decoder_input_ids: expected 1 row(s)", model.forward, model, { { 5, 6 } }, { decoder_input_ids = { { 0 }, { 0 } } })
    refused("decoder_input_ids: row 1 has 2", model.forward, model, { { 5 }, { 6 } }, { decoder_input_ids = { { 0, 1 }, { 0 } } })
    refused("attention_mask: expected 2 row(s)", model.forward, model, { { 5 }, { 6 } }, { attention_mask = { { 1 } }, decoder_input_ids = { { 0 }, { 0 } } })
    refused("all are -100", model.loss, model, { { 5, 6 } }, { { -100, -100 } })
    refused("expected lists", model.loss, model, { { 5, 6 } }, 7)
    assert.equal(model:loss({ { 5, 6 } }, { { 7, 8 } }):item(), model:loss({ 5, 6 }, { 7, 8 }):item())
    refused("encoder-decoder", wane.evaluate.perplexity, model, { 5, 6, 7 })
    refused("prompt 2 is empty", model.generate, model, { { 5 }, {} })
    local start, defaults = model.config.decoder_start_token_id, model.generation_config
    model.config.decoder_start_token_id, model.generation_config = nil, {}
    refused("decoder_start_token_id", model.generate, model, { { 5 } })
    refused("decoder_start_token_id", model.loss, model, { { 5 } }, { { 6 } })
    assert.equal(3, #model:generate({ { 5 } }, { decoder_start_token_id = 2, max_new_tokens = 3, ignore_eos = true })[1])
    model.config.decoder_start_token_id, model.generation_config = start, defaults
  end)

  it("leaves no tensor behind after a generation", function()
    local memory = ffi.new "wane_memory"
    local function tensors()
      core.wait()
      collectgarbage() collectgarbage()
      core.C.wane_memory_read(memory)
      return tonumber(memory.tensors)
    end
    model:generate({ { 5, 6, 7 }, { 8 } }, { max_new_tokens = 5 })
    local before = tensors()
    for _ = 1, 3 do model:generate({ { 5, 6, 7 }, { 8 } }, { max_new_tokens = 5 }) end
    assert.equal(before, tensors())
  end)

  it("counts lengths in decoder ids, the start token among them, as upstream does", function()
    local prompt = {}
    for i = 1, 30 do prompt[i] = i + 5 end
    assert.equal(9, #model:generate({ prompt }, { max_length = 10, ignore_eos = true })[1])
    assert.equal(20, #model:generate({ prompt }, { ignore_eos = true })[1])
  end)

  it("streams, and the command prints only the answer", function()
    local prompt = { 80, 176, 105, 64, 32 }
    local want = model:generate({ prompt }, { max_new_tokens = 6, ignore_eos = true })[1]
    local tok = { decode_stream = function() return { step = function(_, id) return id .. " " end } end }
    local pieces = {}
    for piece in model:stream(tok, prompt, { max_new_tokens = 6, ignore_eos = true }) do pieces[#pieces + 1] = tonumber(piece) end
    assert.same(want, pieces)
    local pipe = io.popen(("%s generate --model %sflan_t5 --compute f32 --prompt-ids %s --max-new-tokens 6 --ignore-eos 2>&1"):format(
      os.getenv "WANE_BIN" or "bin/wane", golden.root, table.concat(prompt, ",")))
    local text = pipe:read "*a"
    pipe:close()
    assert.equal(table.concat(want, ","), text:match "^[%d,]+")
  end)

  it("decoder-only models have the same loss under model:loss as transformers", function()
    local expected = safetensors.read(golden.root .. "gpt_neox/expected.safetensors")
    local neox = load "gpt_neox"
    local ids = lists(expected.input_ids)
    assert.is_true(math.abs(neox:loss(ids, ids):item() - expected.loss.data[0]) <= 1e-5)
    refused("all are -100", neox.loss, neox, { { 5, 6 } }, { { 5, -100 } })
    neox:close()
  end)

  it("reads the shared table under any of its names, and ignores the bias that cross-attention never had", function()
    local tensors, want = assert(wane.checkpoint.read_safetensors(golden.root .. "t5/model.safetensors")), load "t5"
    local ids, o = { { 7, 8, 9 } }, { decoder_input_ids = { { 0, 3 } } }
    local a, n = F.read(want:forward(ids, o), "float")
    cli.write(dir .. "/config.json", cli.read(golden.root .. "t5/config.json"))
    local shared = tensors["shared.weight"]
    for _, names in ipairs { { "encoder.embed_tokens" }, { "decoder.embed_tokens" }, { "lm_head" }, { "decoder.embed_tokens", "encoder.embed_tokens" },
                             { "shared", "encoder.embed_tokens", "lm_head" } } do
      local renamed = {}
      for key, t in pairs(tensors) do renamed[key] = t end
      renamed["shared.weight"] = nil
      for _, key in ipairs(names) do renamed[key .. ".weight"] = shared end
      renamed["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = shared
      assert(wane.checkpoint.write_safetensors(dir .. "/model.safetensors", renamed))
      local other = assert(wane.load(dir, { tokenizer = false, compute = "f32" }))
      local b = F.read(other:forward(ids, o), "float")
      assert.is_true(ffi.string(a, n * 4) == ffi.string(b, n * 4), names[1])
      other:close()
      local ckpt, count = assert(wane.checkpoint.open(dir)), {}
      for _, key in ipairs(ckpt:names()) do count[key] = (count[key] or 0) + 1 end
      assert.is_true((count["shared.weight"] or 0) + (count["lm_head.weight"] or 0) >= 1)
      for key, times in pairs(count) do assert.equal(1, times, key) end
      assert.is_nil(count["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"])
      ckpt:close()
    end
    want:close()
  end)

  it("configs: gates, as many decoder blocks as encoder blocks where none are said, transformers 5's scaling flag", function()
    local function config(changes)
      local c = golden.read_json(golden.root .. "flan_t5/config_v4.json")
      for k, v in pairs(changes) do c[k] = v end
      return assert(wane.models.build(c))
    end
    local null = require("cjson").null
    local tree = config { num_layers = 4, num_decoder_layers = null, feed_forward_proj = "gated-silu" }
    assert.equal(4, #tree.decoder.block)
    assert.equal("silu", tree.config.dense_act_fn)
    assert.is_truthy(tree:find "decoder.block.3.layer.2.DenseReluDense.wi_1")
    assert.equal("gelu_new", config({}).config.dense_act_fn)
    assert.equal("gelu", config({ feed_forward_proj = "gelu" }).config.dense_act_fn)
    assert.is_false(config({}).config.scale_decoder_outputs)
    assert.is_true(config({ tie_word_embeddings = null }).config.scale_decoder_outputs)
    assert.is_false(config({ tie_word_embeddings = true, scale_decoder_outputs = false }).config.scale_decoder_outputs)
    local bad = golden.read_json(golden.root .. "flan_t5/config_v4.json")
    bad.d_model = nil
    local none, message = wane.models.build(bad)
    assert.is_nil(none)
    assert.is_truthy(message:find("hidden_size", 1, true))
  end)
end)

describe("buckets of distances", function()
  it("are T5's, in both directions and one", function()
    local both, one = relative.new(32, 1, 128, true), relative.new(32, 1, 128, false)
    for distance, bucket in pairs { [-200] = 15, [-64] = 14, [-32] = 12, [-16] = 10, [-8] = 8, [-7] = 7, [0] = 0, [1] = 17, [8] = 24, [12] = 25, [16] = 26,
                                    [64] = 30, [128] = 31 } do
      assert.equal(bucket, both:bucket(distance))
    end
    for distance, bucket in pairs { [-7] = 7, [-16] = 16, [-32] = 21, [-64] = 26, [-127] = 31, [1] = 0 } do assert.equal(bucket, one:bucket(distance)) end
  end)
end)
