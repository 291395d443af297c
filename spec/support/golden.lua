--- What every decoder-only family must show on its tiny model with random weights (spec/fixtures/models/NAME), against what transformers
-- computes from the same files (spec/fixtures/make/models.py). A family's spec calls M.check, one line a model.
local ffi = require "ffi"
local cjson = require "cjson"
local core = require "wane.core"
local F = require "wane.nn.functional"
local wane = require "wane"
local safetensors = require "spec.support.safetensors"

local M = {}

local root = "spec/fixtures/models/"
local TOLERANCE = 2e-4                -- of the fixtures' page; upstream's own spread is 1.3e-5

--- A [B, T] tensor of the fixtures as lists of ids.
local function lists(tensor)
  local rows, n = {}, tensor.shape[2]
  for b = 1, tensor.shape[1] do
    rows[b] = {}
    for t = 1, n do rows[b][t] = tonumber(tensor.data[(b - 1) * n + t - 1]) end
  end
  return rows
end

--- Largest difference; `use(i)` may leave elements out.
local function difference(values, expected, use)
  local worst = 0
  for i = 0, expected.numel - 1 do
    if not use or use(i) then
      local d = math.abs(values[i] - expected.data[i])
      if not (d <= worst) then worst = d end            -- NaN counts as worst
    end
  end
  return worst
end

--- The same folder with the older spelling of its config: its path, and a function that removes it.
local function with_v4_config(name)
  local dir = os.tmpname()
  os.remove(dir)
  assert(os.execute(("mkdir -p %s && cp %s%s/model.safetensors %s/ && cp %s%s/config_v4.json %s/config.json"):format(
    dir, root, name, dir, root, name, dir)) == 0)
  return dir, function() os.execute("rm -rf " .. dir) end
end

local function read_json(path)
  local f = assert(io.open(path))
  local text = f:read "*a"
  f:close()
  return cjson.decode(text)
end

M.root, M.TOLERANCE, M.lists, M.difference, M.with_v4_config, M.read_json = root, TOLERANCE, lists, difference, with_v4_config, read_json

--- The tests of a model under every scheme: its logits equal those of the dequantized weights.
-- @param name string folder of spec/fixtures/models
-- @param forward function(model) -> logits
function M.schemes(name, forward)
  setfenv(1, getfenv(2))
  for _, scheme in ipairs { { type = "nf4", double_quant = true }, { type = "fp4" }, { type = "int8", threshold = -1 }, { type = "int8-blockwise" } } do
    it("logits under " .. scheme.type .. " equal those of the dequantized weights", function()
      local quantized = assert(wane.load(root .. name, { tokenizer = false, compute = "f32", quant = scheme }))
      local count = 0
      local got, n = F.read(forward(quantized), "float")
      for _, l in ipairs(quantized:linears()) do
        local linear = l[2]
        if linear.weight:dtype() == scheme.type then
          count = count + 1
          linear.weight, linear.threshold = F.outside_scopes(function() return linear.weight:dequantize "f32" end), nil
        end
      end
      assert.is_true(count > 0)
      local want, worst = F.read(forward(quantized), "float"), 0
      for i = 0, n - 1 do
        local d = math.abs(got[i] - want[i])
        if not (d <= worst) then worst = d end
      end
      print(("  %s, %s: %d layers, largest difference %.2g"):format(name, scheme.type, count, worst))
      assert.is_true(worst <= TOLERANCE)
      quantized:close()
    end)
  end
end

-- Largest difference of the logits of left-padded rows, where the mask is not 0.
local function padded_difference(model, expected)
  local mask = lists(expected.padded_attention_mask)
  local logits = model:forward(lists(expected.padded_input_ids), { attention_mask = mask })
  local vocab, time = expected.padded_logits.shape[3], expected.padded_logits.shape[2]
  return difference(F.read(logits, "float"), expected.padded_logits, function(i)
    local position = math.floor(i / vocab)
    return mask[math.floor(position / time) + 1][position % time + 1] ~= 0
  end)
end

--- The tests of a model that sets a family's switches another way (spec/fixtures/models/variants/NAME): logits alone.
-- @param name string
function M.variant(name)
  setfenv(1, getfenv(2))
  it(name .. ": logits equal transformers', left-padded too", function()
    local folder = root .. "variants/" .. name
    local expected = safetensors.read(folder .. "/expected.safetensors")
    local model = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
    local plain = difference(F.read(model:forward(lists(expected.input_ids)), "float"), expected.logits)
    local padded = padded_difference(model, expected)
    print(("  %s: logits, largest difference %.2g, padded %.2g"):format(name, plain, padded))
    assert.is_true(plain <= TOLERANCE and padded <= TOLERANCE)
    model:close()
  end)
end

--- The tests of one model.
-- @param name string folder of spec/fixtures/models
-- @param where table paths of the modules whose results are the fixtures' hidden states: { layer (with %d), embed = nil | path (default:
--   what enters layer 0), final = nil | path (default: what enters the head) }
function M.check(name, where)
  setfenv(1, getfenv(2))              -- busted gives `describe` and `it` to the spec's own environment
  describe(name, function()
    local expected = safetensors.read(root .. name .. "/expected.safetensors")
    local json = read_json(root .. name .. "/expected.json")
    local model

    setup(function() model = assert(wane.load(root .. name, { tokenizer = false, compute = "f32" })) end)
    teardown(function() if model then model:close() end end)

    it("logits and every hidden state equal transformers'", function()
      local seen, watched = {}, {}
      local function watch(path, key, input)
        local function keep(state, t) if state then seen[state] = F.outside_scopes(F.cast, t, core.C.WANE_F32) end end
        model:on_forward(path, function(y, _, x) keep(key, y) keep(input, x) end)
        watched[#watched + 1] = path
      end
      for i = 0, model.config.num_hidden_layers - 1 do
        watch(where.layer:format(i), "hidden.layer_" .. i, i == 0 and not where.embed and "hidden.embed" or nil)
      end
      if where.embed then watch(where.embed, "hidden.embed") end
      if where.final then watch(where.final, "hidden.final") else watch(model.family.head, nil, "hidden.final") end
      local logits = model:forward(lists(expected.input_ids))
      seen.logits = logits
      local worst = 0
      for key, tensor in pairs(seen) do
        local values, n = F.read(tensor, "float")
        assert.equal(expected[key].numel, n)
        local d = difference(values, expected[key])
        assert.is_true(d <= TOLERANCE, ("%s differs by %g"):format(key, d))
        worst = math.max(worst, d)
      end
      assert.is_truthy(seen["hidden.layer_1"] and seen["hidden.embed"] and seen["hidden.final"])
      print(("  %s: logits and hidden states, largest difference %.2g"):format(name, worst))
      for _, path in ipairs(watched) do model:on_forward(path, nil) end
    end)

    it("logits of left-padded rows equal transformers'", function()
      local d = padded_difference(model, expected)
      print(("  %s: padded logits, largest difference %.2g"):format(name, d))
      assert.is_true(d <= TOLERANCE)
    end)

    it("loss equals transformers'", function()
      local ids = lists(expected.input_ids)
      local total, count = 0, 0
      for _, row in ipairs(ids) do
        for _, v in ipairs(require("wane.evaluate").window_nll(model, row, 1)) do total, count = total + v, count + 1 end
      end
      assert.is_true(math.abs(total / count - expected.loss.data[0]) <= 1e-5)
    end)

    it("the older spelling of the config gives the same bits", function()
      local dir, remove = with_v4_config(name)
      local other = assert(wane.load(dir, { tokenizer = false, compute = "f32" }))
      local ids = lists(expected.input_ids)
      local a, n = F.read(model:forward(ids), "float")
      local b = F.read(other:forward(ids), "float")
      assert.is_true(ffi.string(a, n * 4) == ffi.string(b, n * 4))
      other:close()
      remove()
    end)

    it("greedy ids equal, one prompt", function()
      assert.same(json.greedy.new_ids, model:generate({ json.greedy.prompt }, { max_new_tokens = 24, ignore_eos = true })[1])
    end)

    it("greedy ids equal, a left-padded batch", function()
      local g = json.greedy_batch
      assert.same(g.new_ids, model:generate(g.input_ids, { attention_mask = g.attention_mask,
        max_new_tokens = 24, ignore_eos = true }))
      local ragged = {}                                  -- prompts of different lengths are padded for the caller
      for b, row in ipairs(g.input_ids) do
        ragged[b] = {}
        for t, id in ipairs(row) do if g.attention_mask[b][t] == 1 then table.insert(ragged[b], id) end end
      end
      assert.same(g.new_ids, model:generate(ragged, { max_new_tokens = 24, ignore_eos = true, pad_token_id = 0 }))
    end)

    it("greedy ids equal with repetition penalty and banned bigrams, alone and in a batch", function()
      local g = json.greedy_penalty
      local o = { max_new_tokens = 24, ignore_eos = true, repetition_penalty = g.repetition_penalty, no_repeat_ngram_size = g.no_repeat_ngram_size }
      assert.same(g.new_ids, model:generate({ g.prompt }, o)[1])
      g = json.greedy_penalty_batch
      o.attention_mask = g.attention_mask
      assert.same(g.new_ids, model:generate(g.input_ids, o))
    end)

    it("rows end at eos and the others go on", function()
      local g = json.greedy_eos_batch
      local out, reasons = model:generate(g.input_ids, { attention_mask = g.attention_mask, max_new_tokens = 24,
        eos_token_id = g.eos_token_id, pad_token_id = 0 })
      for b, row in ipairs(g.new_ids) do
        local want, ended = {}, "length"
        for _, id in ipairs(row) do
          want[#want + 1] = id
          if id == g.eos_token_id then ended = "eos" break end
        end
        assert.same(want, out[b])
        assert.equal(ended, reasons[b])
      end
    end)

    it("a cache gives what a full pass gives: token by token, in pieces, all at once", function()
      local passes = require "wane.nn.pass"
      local ids = { lists(expected.input_ids)[1] }
      local whole = F.read(model:forward(ids), "float")
      local time, vocab = #ids[1], expected.logits.shape[3]
      for _, piece in ipairs { 1, 5, 22 } do
        core.scope(function()
          local tensor = model.ids_tensor(ids)
          local cache = passes.cache(1, time, core.C.WANE_F32)
          local worst = 0
          for from = 0, time - 1, piece do
            local n = math.min(piece, time - from)
            local pass = passes.new { batch = 1, time = n, start = from, reach = time, cache = cache }
            local logits = model:head(model:backbone(F.narrow(tensor, 1, from, n), pass))
            local values = F.read(logits, "float")
            for i = 0, n * vocab - 1 do worst = math.max(worst, math.abs(values[i] - whole[from * vocab + i])) end
          end
          cache:close()
          assert.is_true(worst < 2e-5, ("pieces of %d: %g"):format(piece, worst))
        end)
      end
    end)

    M.schemes(name, function(quantized) return quantized:forward(lists(expected.input_ids)) end)
  end)
end

return M
