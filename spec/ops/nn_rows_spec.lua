-- Norms, softmax, loss, gated activations, rotary embedding, cache and embedding against double-precision references, at every
-- instruction-set level; gradients against finite differences of those references.
local S = require "ops.nn_support"
local C, core = S.C, S.core

local s = function() return core.stream() end
local DTYPES = { { "f32", C.WANE_F32, 3e-6 }, { "bf16", C.WANE_BF16, 4e-3 }, { "f16", C.WANE_F16, 6e-4 } }

-- Numbers as a dtype holds them.
local function held(list, dtype)
  local out = {}
  for i, v in ipairs(list) do out[i] = S.round(v, dtype) end
  return out
end

-- Largest difference, relative to the larger of 1 and the value.
local function relative(a, b)
  if #a ~= #b then return math.huge end
  local worst = 0
  for i = 1, #a do
    local d = math.abs(a[i] - b[i]) / math.max(1, math.abs(b[i]))
    if d ~= d then return math.huge end
    worst = math.max(worst, d)
  end
  return worst
end

-- ---------------------------------------------------------------- references

local function norm(x, rows, n, w, b, eps, offset, centred)
  local y = {}
  for r = 0, rows - 1 do
    local mean, var = 0, 0
    if centred then
      for i = 1, n do mean = mean + x[r * n + i] / n end
    end
    for i = 1, n do var = var + (x[r * n + i] - mean) ^ 2 / n end
    for i = 1, n do
      y[r * n + i] = (x[r * n + i] - mean) / math.sqrt(var + eps) * (w and w[i] + offset or 1) + (b and b[i] or 0)
    end
  end
  return y
end

local function softmax(x, n, log)
  local y, max, sum = {}, -math.huge, 0
  for i = 1, n do max = math.max(max, x[i]) end
  for i = 1, n do sum = sum + math.exp(x[i] - max) end
  for i = 1, n do y[i] = log and x[i] - max - math.log(sum) or math.exp(x[i] - max) / sum end
  return y
end

local function erf(x)                                   -- Abramowitz & Stegun 7.1.6: the series with positive terms
  local term, sum, n = x, x, 0
  while math.abs(term) > 1e-18 do
    n = n + 1
    term = term * 2 * x * x / (2 * n + 1)
    sum = sum + term
  end
  return 2 / math.sqrt(math.pi) * math.exp(-x * x) * sum
end

local activations = {
  [C.WANE_RELU] = function(x) return math.max(0, x) end,
  [C.WANE_SILU] = function(x) return x / (1 + math.exp(-x)) end,
  [C.WANE_SIGMOID] = function(x) return 1 / (1 + math.exp(-x)) end,
  [C.WANE_TANH] = math.tanh,
  [C.WANE_GELU] = function(x) return x * 0.5 * (1 + erf(x / math.sqrt(2))) end,
  [C.WANE_GELU_TANH] = function(x) return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ^ 3))) end,
  [C.WANE_QUICK_GELU] = function(x) return x / (1 + math.exp(-1.702 * x)) end,
}

-- ---------------------------------------------------------------- norms

S.each_level(function(level, level_name)
  describe("at level " .. level_name, function()
    before_each(function() core.check(C.wane_set_cpu_level(level)) end)
    after_each(function() core.check(C.wane_set_cpu_level(S.level)) end)

    for _, d in ipairs(DTYPES) do
      it("rms_norm and layer_norm, " .. d[1], function()
        for _, size in ipairs { { 1, 1 }, { 3, 7 }, { 2, 64 }, { 5, 129 }, { 2, 1000 } } do
          local rows, n = size[1], size[2]
          local x, w, b = held(S.random(rows * n, 1, 3), d[2]), S.random(n, 2), held(S.random(n, 3), C.WANE_BF16)
          for i = 1, #x do x[i] = S.round(x[i] + 2, d[2]) end
          local tx, tw, tb = S.tensor(x, { rows, n }, d[2]), S.tensor(w, { n }), S.tensor(b, { n }, C.WANE_BF16)
          local y = S.handle()
          core.check(C.wane_rms_norm(s(), y, tx, tw, 1e-5, 1))
          assert.is_true(relative(S.list(y), norm(x, rows, n, w, nil, 1e-5, 1)) < d[3] * 2)
          core.check(C.wane_rms_norm(s(), y, tx, nil, 1e-5, 0))
          assert.is_true(relative(S.list(y), norm(x, rows, n, nil, nil, 1e-5, 0)) < d[3] * 2)
          core.check(C.wane_layer_norm(s(), y, tx, tw, tb, 1e-3))
          local difference = relative(S.list(y), norm(x, rows, n, w, b, 1e-3, 0, true))
          assert.is_true(difference < d[3] * 2, difference)
        end
      end)

      it("softmax and log-softmax over any dimension, " .. d[1], function()
        for _, shape in ipairs { { 3, 1 }, { 2, 3, 5 }, { 2, 3, 40 }, { 3, 1500 }, { 1, 17, 19 } } do
          local x = held(S.random(S.numel(shape), 4, 4), d[2])
          local tx = S.tensor(x, shape, d[2])
          for dim = 0, #shape - 1 do
            local inner, n = 1, shape[dim + 1]
            for i = dim + 2, #shape do inner = inner * shape[i] end
            for log = 0, 1 do
              local y, expected = S.handle(), {}
              core.check(C.wane_softmax(s(), y, tx, dim, log))
              for o = 0, #x / (n * inner) - 1 do for c = 1, inner do
                local column = {}
                for i = 0, n - 1 do column[i + 1] = x[o * n * inner + i * inner + c] end
                for i, v in ipairs(softmax(column, n, log == 1)) do expected[o * n * inner + (i - 1) * inner + c] = v end
              end end
              local difference = relative(S.list(y), expected)
              assert.is_true(difference < d[3], ("%s dim %d log %d: %g"):format(table.concat(shape, "x"), dim, log, difference))
            end
          end
        end
      end)

      it("glu with every activation, " .. d[1], function()
        for act, f in pairs(activations) do
          local gate, up = held(S.random(203, 6, 3), d[2]), held(S.random(203, 7), d[2])
          local y, expected = S.handle(), {}
          core.check(C.wane_glu(s(), y, S.tensor(gate, { 7, 29 }, d[2]), S.tensor(up, { 7, 29 }, d[2]), act))
          for i = 1, 203 do expected[i] = f(gate[i]) * up[i] end
          local difference = relative(S.list(y), expected)
          assert.is_true(difference < d[3], ("act %d: %g"):format(act, difference))
        end
      end)

      it("rope, both arrangements, partial, from views, far positions, " .. d[1], function()
        local B, T, H, D = 2, 3, 2, 22
        local x = held(S.random(B * T * H * D, 8), d[2])
        local tx = S.tensor(x, { B, H, T, D }, d[2])
        for _, R in ipairs { 11, 4, 9 } do
          local freq = {}
          for j = 0, R - 1 do freq[j + 1] = S.round(10000 ^ (-j / R), C.WANE_F32) end
          local positions = { 0, 5, 99999, 3, 1, 2 }
          for interleaved = 0, 1 do for _, start in ipairs { 0, 70001, false } do
            local y, expected = S.handle(), {}
            local tp = not start and S.tensor(positions, { B, T }, C.WANE_I32) or nil
            core.check(C.wane_rope(s(), y, S.permute(tx, { 0, 2, 1, 3 }), S.tensor(freq, { R }), tp, start or 0, 1.25, interleaved))
            for b = 0, B - 1 do for t = 0, T - 1 do for h = 0, H - 1 do
              local from, to = ((b * H + h) * T + t) * D, ((b * T + t) * H + h) * D
              for i = 1, D do expected[to + i] = x[from + i] end
              for j = 0, R - 1 do
                local angle = S.round((start and start + t or positions[b * T + t + 1]) * freq[j + 1], C.WANE_F32)
                local c, sn = math.cos(angle) * 1.25, math.sin(angle) * 1.25
                local i1, i2 = j + 1, j + R + 1
                if interleaved == 1 then i1, i2 = 2 * j + 1, 2 * j + 2 end
                expected[to + i1] = x[from + i1] * c - x[from + i2] * sn
                expected[to + i2] = x[from + i2] * c + x[from + i1] * sn
              end
            end end end
            local difference = relative(S.list(y), expected)
            assert.is_true(difference < d[3], ("R %d interleaved %d start %s: %g"):format(R, interleaved, tostring(start), difference))
          end end
        end
      end)
    end

    it("nll, with ignored labels", function()
      for _, V in ipairs { 1, 9, 5000 } do
        local M = 6
        local x, labels, expected = S.random(M * V, 9, 3), {}, {}
        for r = 1, M do
          labels[r] = r == 3 and -100 or (r * 7919) % V
          local row = {}
          for i = 1, V do row[i] = x[(r - 1) * V + i] end
          expected[r] = r == 3 and 0 or -softmax(row, V, true)[labels[r] + 1]
        end
        for _, dtype in ipairs { C.WANE_I32, C.WANE_I64 } do
          local y = S.handle()
          core.check(C.wane_nll(s(), y, S.tensor(x, { M, V }), S.tensor(labels, { M }, dtype), -100))
          assert.is_true(relative(S.list(y), expected) < 1e-6)
        end
      end
    end)

    it("gradients of the norms equal finite differences", function()
      local rows, n = 3, 37
      local x, w, dy = S.random(rows * n, 11, 2), S.random(n, 12), S.random(rows * n, 13)
      local tx, tw, tdy = S.tensor(x, { rows, n }), S.tensor(w, { n }), S.tensor(dy, { rows, n })
      for centred = 0, 1 do
        local function loss()
          local total, y = 0, norm(x, rows, n, w, nil, 1e-5, 1 - centred, centred == 1)
          for i = 1, #y do total = total + y[i] * dy[i] end
          return total
        end
        local function numeric(list)
          local g, h = {}, 1e-5
          for i = 1, #list do
            local before = list[i]
            list[i] = before + h
            local above = loss()
            list[i] = before - h
            g[i] = (above - loss()) / (2 * h)
            list[i] = before
          end
          return g
        end
        local dx, dw, db = S.handle(), S.handle(), S.handle()
        if centred == 1 then core.check(C.wane_layer_norm_backward(s(), dx, dw, db, tdy, tx, tw, 1e-5, nil))
        else core.check(C.wane_rms_norm_backward(s(), dx, dw, tdy, tx, tw, 1e-5, 1, nil)) end
        assert.is_true(relative(S.list(dx), numeric(x)) < 2e-5)
        assert.is_true(relative(S.list(dw), numeric(w)) < 2e-5)
        if centred == 1 then
          local sums = {}
          for i = 1, n do sums[i] = dy[i] + dy[n + i] + dy[2 * n + i] end
          assert.is_true(relative(S.list(db), sums) < 1e-6)
        end
        -- added to a gradient that is there; one of another dtype is left alone
        local there, other, before = S.tensor(S.random(3 * n, 15, 3), { 3, n }), S.tensor(S.random(3 * n, 15, 3), { 3, n }, C.WANE_BF16), S.list(dx)
        for _, onto in ipairs { there, other } do
          local old, made = S.list(onto), S.handle()
          if centred == 1 then core.check(C.wane_layer_norm_backward(s(), made, nil, nil, tdy, tx, tw, 1e-5, onto))
          else core.check(C.wane_rms_norm_backward(s(), made, nil, tdy, tx, tw, 1e-5, 1, onto)) end
          assert.equal(onto == there, made.t == nil)
          local got = S.list(onto)
          for i = 1, 3 * n do if onto == there then assert.near(old[i] + before[i], got[i], 1e-5) else assert.equal(old[i], got[i]) end end
        end
        -- without a weight, and dx alone
        local unit = {}
        for i = 1, n do unit[i] = centred end
        w, unit = unit, w
        if centred == 1 then core.check(C.wane_layer_norm_backward(s(), dx, nil, nil, tdy, tx, nil, 1e-5, nil))
        else core.check(C.wane_rms_norm_backward(s(), dx, nil, tdy, tx, nil, 1e-5, 0, nil)) end
        assert.is_true(relative(S.list(dx), numeric(x)) < 2e-5)
        w = unit
      end
    end)

    it("gradient of nll equals softmax minus one-hot", function()
      local M, V = 4, 21
      local x, labels, scale, expected = S.random(M * V, 14, 2), { 3, -100, 20, 0 }, { 0.5, 2, -1, 0.25 }, {}
      for r = 0, M - 1 do
        local row = {}
        for i = 1, V do row[i] = x[r * V + i] end
        for i, p in ipairs(softmax(row, V)) do
          expected[r * V + i] = labels[r + 1] < 0 and 0 or scale[r + 1] * (p - (labels[r + 1] == i - 1 and 1 or 0))
        end
      end
      local dx = S.handle()
      core.check(C.wane_nll_backward(s(), dx, S.tensor(x, { M, V }), S.tensor(labels, { M }, C.WANE_I32), S.tensor(scale, { M }), -100))
      assert.is_true(S.difference(S.list(dx), expected) < 1e-6)
    end)

    it("nll with its gradient gives what both give alone, rounded to the dtype asked for", function()
      local M, V = 5, 37
      local labels, logits = S.tensor({ 3, -100, 20, 0, 36 }, { M }, C.WANE_I32), S.random(M * V, 15, 2)
      for _, from in ipairs(DTYPES) do
        local x, half = S.tensor(logits, { M, V }, from[2]), S.tensor({ 0.5, 0.5, 0.5, 0.5, 0.5 }, { M })
        local want, slope = S.handle(), S.handle()
        core.check(C.wane_nll(s(), want, x, labels, -100))
        core.check(C.wane_nll_backward(s(), slope, S.tensor(S.list(x), { M, V }), labels, half, -100))
        for _, to in ipairs(DTYPES) do
          local nll, dx = S.handle(), S.handle()
          core.check(C.wane_nll_with_gradient(s(), nll, dx, x, labels, 0.5, -100, to[2]))
          assert.same(S.list(want), S.list(nll))
          for i, v in ipairs(S.list(slope)) do
            assert.is_true(math.abs(S.list(dx)[i] - v) <= 2 ^ -8 * math.abs(v) * (to[2] == C.WANE_F32 and 0 or 1) + 1e-7)
          end
        end
      end
      local dx, nll = S.handle(), S.handle()                         -- a factor of 0 leaves the values
      core.check(C.wane_nll_with_gradient(s(), nll, dx, S.tensor(logits, { M, V }), labels, 0, -100, C.WANE_F32))
      assert.is_true(S.list(nll)[1] > 0)
      assert.equal(0, S.difference(S.list(dx), S.list(S.tensor(S.random(M * V, 1, 0), { M, V }))))
      assert.matches("must be f32, f16 or bf16", S.message(C.wane_nll_with_gradient(s(), nll, dx, S.tensor(logits, { M, V }), labels, 1, -100, C.WANE_I32)))
    end)

    it("kv_append converts and places, and leaves the rest", function()
      for _, d in ipairs(DTYPES) do
        local B, T, H, D, cap = 2, 3, 2, 5, 7
        local x, old = S.random(B * T * H * D, 15), {}
        for i = 1, B * H * cap * D do old[i] = 9 end
        local cache = S.tensor(old, { B, H, cap, D }, d[2])
        core.check(C.wane_kv_append(s(), cache, S.tensor(x, { B, T, H, D }), 4))
        for b = 0, B - 1 do for t = 0, T - 1 do for h = 0, H - 1 do for i = 1, D do
          old[((b * H + h) * cap + 4 + t) * D + i] = S.round(x[((b * T + t) * H + h) * D + i], d[2])
        end end end end
        assert.equal(0, S.difference(S.list(cache), old))
      end
    end)
  end)
end)

-- ---------------------------------------------------------------- embedding

describe("embedding", function()
  it("takes rows of f32, f16 and bf16 tables, ids i32 and i64, into any float", function()
    local table_values = S.random(10 * 33, 16)
    for _, d in ipairs(DTYPES) do for _, id_type in ipairs { C.WANE_I32, C.WANE_I64 } do for _, out_type in ipairs(DTYPES) do
      local y, expected = S.handle(), {}
      core.check(C.wane_embedding(s(), y, S.tensor(table_values, { 10, 33 }, d[2]), S.tensor({ 9, 0, 4, 4 }, { 2, 2 }, id_type), out_type[2]))
      for i, id in ipairs { 9, 0, 4, 4 } do
        for j = 1, 33 do expected[(i - 1) * 33 + j] = S.round(S.round(table_values[id * 33 + j], d[2]), out_type[2]) end
      end
      assert.same({ 2, 2, 33 }, (S.shape(y)))
      assert.equal(0, S.difference(S.list(y), expected))
    end end end
  end)

  it("takes rows of quantized tables: the same as dequantizing first", function()
    local values = S.random(6 * 64, 17)
    for _, kind in ipairs { C.WANE_NF4, C.WANE_FP4, C.WANE_INT8, C.WANE_BLOCK8 } do for nested = 0, (kind == C.WANE_NF4 or kind == C.WANE_FP4) and 1 or 0 do
      local q, whole, y = S.handle(), S.handle(), S.handle()
      core.check(C.wane_quantize(s(), q, S.tensor(values, { 6, 64 }), kind, 64, nested))
      core.check(C.wane_dequantize(s(), whole, q, C.WANE_F32))
      core.check(C.wane_embedding(s(), y, q, S.tensor({ 5, 2 }, { 2 }, C.WANE_I32), C.WANE_F32))
      local all, expected = S.list(whole), {}
      for i, id in ipairs { 5, 2 } do for j = 1, 64 do expected[(i - 1) * 64 + j] = all[id * 64 + j] end end
      assert.equal(0, S.difference(S.list(y), expected))
    end end
  end)

  it("fails, and says which id, outside the table", function()
    local y = S.handle()
    core.check(C.wane_embedding(s(), y, S.tensor(S.random(8), { 4, 2 }), S.tensor({ 1, 4 }, { 2 }, C.WANE_I32), C.WANE_F32))
    local values, message = S.list(y)
    assert.is_nil(values)
    assert.matches("id 4 %(number 2 of the input%) is outside the table of 4 rows", message)
    S.take_report()
    core.check(C.wane_embedding(s(), y, S.tensor(S.random(8), { 4, 2 }), S.tensor({ 1 }, { 1 }, C.WANE_I32), C.WANE_F32))
    assert.equal(2, #S.list(y))
  end)
end)

-- ---------------------------------------------------------------- failures

describe("arguments", function()
  it("are checked, with messages that say what was expected", function()
    local x, y = S.tensor(S.random(12), { 3, 4 }), S.handle()
    local i32 = S.tensor({ 1, 2, 3 }, { 3 }, C.WANE_I32)
    local four = S.tensor(S.random(24), { 1, 2, 3, 4 })
    assert.matches("expected weight %[4%], the last dimension of x; found %[3%]", S.message(C.wane_rms_norm(s(), y, x, S.tensor({ 1, 2, 3 }, { 3 }), 1e-5, 0)))
    assert.matches("x must be f32, f16 or bf16", S.message(C.wane_layer_norm(s(), y, i32, nil, nil, 1e-5)))
    assert.matches("has no dimension 3", S.message(C.wane_softmax(s(), y, x, 2, 0)))
    assert.matches("must have one shape", S.message(C.wane_glu(s(), y, x, four, C.WANE_SILU)))
    assert.matches("no activation", S.message(C.wane_glu(s(), y, x, x, C.WANE_NEG)))
    assert.matches("labels must be i32 or i64", S.message(C.wane_nll(s(), y, x, S.tensor({ 1, 2, 3 }, { 3 }), -100)))
    assert.matches("expected labels %[3%]", S.message(C.wane_nll(s(), y, x, S.tensor({ 1, 2 }, { 2 }, C.WANE_I32), -100)))
    assert.matches("2 R <= 4", S.message(C.wane_rope(s(), y, four, S.tensor({ 1, 1, 1 }, { 3 }), nil, 0, 1, 0)))
    assert.matches("expected positions %[1, 2%]", S.message(C.wane_rope(s(), y, four, S.tensor({ 1 }, { 1 }), S.tensor({ 1 }, { 1, 1 }, C.WANE_I32), 0, 1, 0)))
    assert.matches("do not fit a cache of capacity 3", S.message(C.wane_kv_append(s(), S.tensor(S.random(36), { 1, 3, 3, 4 }), four, 2)))
    assert.matches("expected a table", S.message(C.wane_embedding(s(), y, four, i32, C.WANE_F32)))
    assert.matches("ids must be i32 or i64", S.message(C.wane_embedding(s(), y, x, x, C.WANE_F32)))
    assert.matches("dy .* must have the shape of x", S.message(C.wane_rms_norm_backward(s(), y, nil, four, x, nil, 1e-5, 0, nil)))
    assert.matches("scale is missing", S.message(C.wane_nll_backward(s(), y, x, i32, nil, -100)))
  end)

  it("may be empty", function()
    local y = S.handle()
    core.check(C.wane_rms_norm(s(), y, S.tensor({}, { 0, 4 }), nil, 1e-5, 0))
    assert.same({}, S.list(y))
    core.check(C.wane_softmax(s(), y, S.tensor({}, { 2, 0 }), 1, 0))
    assert.same({}, S.list(y))
    core.check(C.wane_nll(s(), y, S.tensor({}, { 0, 4 }), S.tensor({}, { 0 }, C.WANE_I32), -100))
    assert.same({}, S.list(y))
  end)

  it("a label outside the classes fails the op", function()
    local y = S.handle()
    core.check(C.wane_nll(s(), y, S.tensor(S.random(8), { 2, 4 }), S.tensor({ 1, 4 }, { 2 }, C.WANE_I32), -100))
    local _, message = S.list(y)
    assert.matches("label 4 of row 2 is outside the 4 classes", message)
    S.take_report()
  end)
end)
