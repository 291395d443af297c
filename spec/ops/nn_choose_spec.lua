-- Penalties, the filter and the draw: transformers' own results, brute force on large vocabularies, statistics.
local ffi = require "ffi"
local cjson = require "cjson"
local S = require "ops.nn_support"
local safetensors = require "support.safetensors"
local C, core = S.C, S.core
local s = function() return core.stream() end

local golden = safetensors.read "spec/fixtures/models/logits_processors/expected.safetensors"
local cases = {}
do
  local file = assert(io.open "spec/fixtures/models/logits_processors/cases.json")
  for _, case in ipairs(cjson.decode(file:read "*a").cases) do cases[case.name] = case.args end
  file:close()
end
local function matrix(name)
  local t = golden[name]
  local list = {}
  for i = 1, t.numel do list[i] = tonumber(t.data[i - 1]) end
  return list, { t.shape[1], t.shape[2] }
end

local NINF = -math.huge

S.each_level(function(level, level_name)
  describe("at level " .. level_name, function()
    before_each(function() core.check(C.wane_set_cpu_level(level)) end)
    after_each(function() core.check(C.wane_set_cpu_level(S.level)) end)

    -- ------------------------------------------------------------ golden data

    local function golden_case(name, tolerance, apply)
      local logits, shape = matrix "logits"
      local ids, id_shape = matrix "input_ids"
      local difference, same
      local function compute()
        core.check(C.wane_set_cpu_level(level))
        local t = S.tensor(logits, shape)
        apply(t, S.tensor(ids, id_shape, C.WANE_I32), id_shape[2], cases[name])
        local result, expected = S.list(t), matrix("out." .. name)
        same = true
        for i = 1, #expected do same = same and (result[i] == NINF) == (expected[i] == NINF) end
        difference = S.difference(result, expected)
      end
      compute()
      it(("equals transformers: %s (largest difference %.1e)"):format(name, difference), function()
        assert.is_true(same, "the same logits are removed")
        assert.is_true(difference <= tolerance, difference)
      end)
    end

    for _, name in ipairs { "temperature_0.7", "temperature_1.9" } do
      golden_case(name, 1e-6, function(t, _, _, a) core.check(C.wane_logits_filter(s(), t, a.temperature, 0, 1, 0)) end)
    end
    for _, name in ipairs { "top_k_5", "top_k_500" } do
      golden_case(name, 0, function(t, _, _, a) core.check(C.wane_logits_filter(s(), t, 1, a.top_k, 1, 0)) end)
    end
    for _, name in ipairs { "top_p_0.9", "top_p_0.3" } do
      golden_case(name, 0, function(t, _, _, a) core.check(C.wane_logits_filter(s(), t, 1, 0, a.top_p, 0)) end)
    end
    golden_case("min_p_0.1", 0, function(t, _, _, a) core.check(C.wane_logits_filter(s(), t, 1, 0, 1, a.min_p)) end)
    for _, name in ipairs { "repetition_penalty_1.3", "repetition_penalty_0.8" } do
      golden_case(name, 1e-6, function(t, ids, n, a) core.check(C.wane_repetition_penalty(s(), t, ids, n, a.penalty)) end)
    end
    for _, name in ipairs { "no_repeat_ngram_1", "no_repeat_ngram_2", "no_repeat_ngram_3" } do
      golden_case(name, 0, function(t, ids, n, a) core.check(C.wane_no_repeat_ngram(s(), t, ids, n, a.ngram_size)) end)
    end
    golden_case("suppress_tokens", 0, function(t, _, _, a)
      core.check(C.wane_logits_set(s(), t, S.tensor(a.suppress_tokens, { #a.suppress_tokens }, C.WANE_I32), NINF))
    end)

    -- ------------------------------------------------------------ brute force

    -- The filter by sorting, in doubles.
    local function brute(x, temperature, top_k, top_p, min_p)
      local order, out = {}, {}
      for i = 1, #x do order[i], out[i] = i, S.round(x[i] / S.round(temperature, C.WANE_F32), C.WANE_F32) end
      table.sort(order, function(a, b) return out[a] > out[b] or (out[a] == out[b] and a > b) end)
      if top_k > 0 and top_k < #x then
        local least = out[order[top_k]]
        for i = 1, #x do if out[i] < least then out[i] = NINF end end
      end
      local max, total = out[order[1]], 0
      for i = 1, #x do total = total + math.exp(out[i] - max) end
      if top_p < 1 then
        local before = 0
        for n, i in ipairs(order) do
          local w = math.exp(out[i] - max)
          if n > 1 and before >= top_p * total then out[i] = NINF end
          before = before + w
        end
      end
      if min_p > 0 then
        for i = 1, #x do if out[i] < max + math.log(min_p) then out[i] = NINF end end
      end
      return out
    end

    local function survivors(list)
      local n = 0
      for _, v in ipairs(list) do if v > NINF then n = n + 1 end end
      return n
    end

    it("filters like a full sort, on flat, peaked and tied rows of many lengths", function()
      local settings = { { 1, 0, 0.9, 0 }, { 0.7, 50, 1, 0 }, { 1, 40, 0.8, 0 }, { 1.3, 0, 1, 0.05 }, { 0.9, 50, 0.95, 0.02 }, { 1, 1, 1, 0 },
                         { 1, 0, 0, 0 }, { 1, 3000, 1, 0 }, { 1, 0, 0.999, 0 }, { 1, 7, 0.5, 0.1 } }
      for _, V in ipairs { 1, 3, 50, 1000, 5003, 40011 } do
        for _, spread in ipairs { 0, 0.01, 2, 8 } do
          local x = S.random(V, V + spread * 100, spread)
          for i = 1, V, 97 do x[i] = x[1] end
          if V > 20 then x[5], x[17] = NINF, NINF end
          for i = 1, V do x[i] = S.round(x[i], C.WANE_F32) end
          for k, o in ipairs(settings) do
            if V < 10000 or k <= 5 then
              local t = S.tensor(x, { 1, V })
              core.check(C.wane_logits_filter(s(), t, o[1], o[2], o[3], o[4]))
              local result, expected = S.list(t), brute(x, o[1], o[2], o[3], o[4])
              -- On flat rows the sums' rounding may move the cut by a few parts in a million.
              local slack = o[3] < 1 and V * 2e-6 + (spread < 0.1 and V > 1000 and 2 or 0) or 0
              local what = ("V %d spread %g setting %d: %d survive, expected %d"):format(V, spread, k, survivors(result), survivors(expected))
              assert.is_true(math.abs(survivors(result) - survivors(expected)) <= slack, what)
              local differing = 0
              for i = 1, V do if result[i] ~= expected[i] then differing = differing + 1 end end
              assert.is_true(differing <= slack, what)
            end
          end
        end
      end
    end)

    it("filters vocabularies that the gathered list cannot hold", function()
      local V = 200003
      local data = ffi.new("float[?]", V)
      for i = 0, V - 1 do data[i] = (i * 7919 % 1009) * 1e-4 end
      for _, o in ipairs { { 0, 0.9 }, { 150001, 1 } } do
        local t = S.from_memory(data, { 1, V }, C.WANE_F32)
        core.check(C.wane_logits_filter(s(), t, 1, o[1], o[2], 0))
        local n = survivors(S.list(t))
        if o[1] > 0 then
          assert.is_true(n >= o[1] and n < o[1] + 400, n)       -- ties are kept
        else
          assert.is_true(math.abs(n - 0.897 * V) < 0.01 * V, n) -- nearly flat: the mass is nearly the count
        end
      end
    end)

    it("leaves a row with NaN or infinity to the draw, which reports it", function()
      for _, bad in ipairs { 0 / 0, math.huge } do
        local t, y = S.tensor({ 1, 2, bad, 0 }, { 1, 4 }), S.handle()
        core.check(C.wane_logits_filter(s(), t, 1, 2, 0.9, 0.1))
        core.check(C.wane_sample(s(), y, t, 1, 0))
        local values, message = S.list(y)
        assert.is_nil(values)
        assert.matches("sampling: the logits of sequence 1 hold NaN or infinity", message)
        S.take_report()
      end
    end)

    -- ------------------------------------------------------------ the draw

    it("draws each id as often as its probability says, reproducibly", function()
      local V, n = 40, 20000
      local x, p, total = S.random(V, 21, 2), {}, 0
      x[4], x[40] = NINF, NINF
      for i = 1, V do p[i] = math.exp(x[i]); total = total + p[i] end
      local rows = ffi.new("float[?]", n * V)
      for r = 0, n - 1 do for i = 1, V do rows[r * V + i - 1] = x[i] end end
      local t, y = S.from_memory(rows, { n, V }, C.WANE_F32), S.handle()
      core.check(C.wane_sample(s(), y, t, 42, 7))
      local ids, counts = S.list(y), {}
      for _, id in ipairs(ids) do counts[id + 1] = (counts[id + 1] or 0) + 1 end
      local chi2 = 0
      for i = 1, V do
        local expected = n * p[i] / total
        if expected == 0 then assert.is_nil(counts[i]) else chi2 = chi2 + ((counts[i] or 0) - expected) ^ 2 / expected end
      end
      assert.is_true(chi2 < 37 + 4 * math.sqrt(2 * 37), chi2)   -- 37 degrees of freedom
      -- Row b is a function of (seed, offset + b): a later offset continues the sequence.
      local later = S.handle()
      core.check(C.wane_sample(s(), later, t, 42, 1007))
      later = S.list(later)
      for b = 1, n - 1000 do assert.equal(ids[b + 1000], later[b]) end
      core.check(C.wane_sample(s(), y, t, 43, 7))
      assert.is_true(S.difference(ids, S.list(y)) > 0)
    end)

    it("draws the only one that is left, wherever it is", function()
      for _, V in ipairs { 1, 5, 1024, 1025, 9001 } do
        for _, id in ipairs { 0, math.floor(V / 2), V - 1 } do
          local x = {}
          for i = 1, V do x[i] = NINF end
          x[id + 1] = -3
          local y = S.handle()
          core.check(C.wane_sample(s(), y, S.tensor(x, { 1, V }), id, 0))
          assert.same({ id }, S.list(y))
        end
      end
    end)

    it("draws in index order by the inverse of the cumulated probabilities", function()
      -- Philox 4x32-10 with counter 0 and key 0 gives 6627e8d5 e169c58d (Random123's known answers): u = 0.39904647 …
      local u, V = (0x6627e8d5 + 0xe169c58d / 2 ^ 32) / 2 ^ 32, 1000
      local x = {}
      for i = 1, V do x[i] = 0.25 end
      local y = S.handle()
      core.check(C.wane_sample(s(), y, S.tensor(x, { 1, V }), 0, 0))
      assert.same({ math.floor(u * V) }, S.list(y))
    end)
  end)
end)

-- ---------------------------------------------------------------- failures

describe("choosing the next token", function()
  it("checks its arguments", function()
    local t, y = S.tensor(S.random(8), { 2, 4 }), S.handle()
    local ids = S.tensor({ 1, 2, 3, 0 }, { 2, 2 }, C.WANE_I32)
    assert.matches("temperature must be above 0", S.message(C.wane_logits_filter(s(), t, 0, 0, 1, 0)))
    assert.matches("top_p must lie in 0", S.message(C.wane_logits_filter(s(), t, 1, 0, 1.5, 0)))
    assert.matches("min_p must lie in 0", S.message(C.wane_logits_filter(s(), t, 1, 0, 1, -1)))
    assert.matches("top_k must be 0", S.message(C.wane_logits_filter(s(), t, 1, -1, 1, 0)))
    assert.matches("expected logits %[B, V%] f32", S.message(C.wane_sample(s(), y, ids, 1, 0)))
    assert.matches("must lie densely", S.message(C.wane_sample(s(), y, S.permute(t, { 1, 0 }), 1, 0)))
    assert.matches("penalty must be above 0", S.message(C.wane_repetition_penalty(s(), t, ids, 2, 0)))
    assert.matches("length 3 does not fit", S.message(C.wane_repetition_penalty(s(), t, ids, 3, 1.1)))
    assert.matches("n must be at least 1", S.message(C.wane_no_repeat_ngram(s(), t, ids, 2, 0)))
    assert.matches("expected ids %[2, capacity%] i32", S.message(C.wane_no_repeat_ngram(s(), t, t, 2, 1)))
    assert.matches("expected ids %[n%] i32", S.message(C.wane_logits_set(s(), t, ids, 0)))
  end)

  it("fails the op for an id outside the vocabulary", function()
    local t = S.tensor(S.random(8), { 2, 4 })
    core.check(C.wane_repetition_penalty(s(), t, S.tensor({ 1, 2, 3, 4 }, { 2, 2 }, C.WANE_I32), 2, 1.5))
    local _, message = S.list(t)
    assert.matches("token id 4 of sequence 2 is outside the vocabulary of 4", message)
    S.take_report()
  end)

  it("works on one row of a larger tensor", function()
    local t, row = S.tensor({ 1, 2, 3, 4, 5, 6, 7, 8 }, { 2, 4 }), S.handle()
    core.check(C.wane_view_narrow(s(), row, t, 0, 1, 1, 1))
    core.check(C.wane_logits_filter(s(), row, 1, 1, 1, 0))
    assert.same({ 1, 2, 3, 4, NINF, NINF, NINF, 8 }, S.list(t))
  end)
end)
