-- Attention against a double-precision reference, at every instruction-set level.
local ffi = require "ffi"
local S = require "ops.nn_support"
local C, core = S.C, S.core

local NAMES = { [C.WANE_F32] = "f32", [C.WANE_F16] = "f16", [C.WANE_BF16] = "bf16" }

-- Inputs of a case: numbers as the dtypes hold them, and the tensors.
local function inputs(c)
  local B, T, H, KV, D, cap = c.B, c.T, c.H, c.KV, c.D, c.capacity or c.keys
  local x = { q = S.random(B * T * H * D, c.seed or 1), k = S.random(B * KV * cap * D, 2), v = S.random(B * KV * cap * D, 3) }
  for i = 1, #x.q do x.q[i] = S.round(x.q[i], c.q_dtype or 0) end
  for i = 1, #x.k do x.k[i], x.v[i] = S.round(x.k[i], c.dtype or 0), S.round(x.v[i], c.dtype or 0) end
  x.tq = S.tensor(x.q, { B, T, H, D }, c.q_dtype or C.WANE_F32)
  x.tk, x.tv = S.tensor(x.k, { B, KV, cap, D }, c.dtype), S.tensor(x.v, { B, KV, cap, D }, c.dtype)
  if c.mask then
    x.mask = {}
    for b = 0, B - 1 do for j = 0, cap - 1 do x.mask[b * cap + j + 1] = c.mask(b, j) and 1 or 0 end end
    x.tmask = S.tensor(x.mask, { B, cap }, C.WANE_U8)
  end
  if c.bias then
    x.bias = S.random(S.numel(c.bias), 5)
    x.tbias = S.tensor(x.bias, c.bias)
  end
  return x
end

local function options(c)
  local o = ffi.new "wane_attention_options"
  o.scale, o.softcap, o.q_start, o.kv_length = c.scale or 0, c.softcap or 0, c.q_start or 0, c.keys
  o.window, o.causal = c.window or 0, c.causal and 1 or 0
  return o
end

local function run(c, x)
  local out = S.handle()
  core.check(C.wane_attention(core.stream(), out, x.tq, x.tk, x.tv, x.tmask, x.tbias, options(c)))
  return assert(S.list(out))
end

-- What wane.h says, in doubles.
local function reference(c, x)
  local B, T, H, KV, D, cap = c.B, c.T, c.H, c.KV, c.D, c.capacity or c.keys
  local out, scale = {}, c.scale or 1 / math.sqrt(D)
  local function bias_at(b, h, t, j)
    local s, at = c.bias, 0
    for i, index in ipairs { b, h, t, j } do at = at * s[i] + (s[i] == 1 and 0 or index) end
    return x.bias[at + 1]
  end
  for b = 0, B - 1 do for t = 0, T - 1 do for h = 0, H - 1 do
    local g, time, scores, max = math.floor(h / (H / KV)), (c.q_start or 0) + t, {}, -math.huge
    local q = ((b * T + t) * H + h) * D
    for j = 0, c.keys - 1 do
      local seen = (not c.causal or j <= time) and (not c.window or time - c.window < j) and (not c.mask or x.mask[b * cap + j + 1] ~= 0)
      if seen then
        local dot, k = 0, ((b * KV + g) * cap + j) * D
        for d = 1, D do dot = dot + x.q[q + d] * x.k[k + d] end
        dot = dot * scale
        if c.softcap then
          local e = math.exp(2 * dot / c.softcap)
          dot = c.softcap * (1 - 2 / (e + 1))
        end
        if c.bias then dot = dot + bias_at(b, h, t, j) end
        scores[j], max = dot, math.max(max, dot)
      end
    end
    local sum, acc = 0, {}
    for d = 1, D do acc[d] = 0 end
    for j = 0, c.keys - 1 do
      if scores[j] then
        local w, v = math.exp(scores[j] - max), ((b * KV + g) * cap + j) * D
        sum = sum + w
        for d = 1, D do acc[d] = acc[d] + w * x.v[v + d] end
      end
    end
    for d = 1, D do out[q + d] = sum > 0 and acc[d] / sum or 0 end
  end end end
  return out
end

local cases = {
  { "one query, one key", B = 1, T = 1, H = 1, KV = 1, D = 8, keys = 1 },
  { "no mask, odd head size", B = 2, T = 5, H = 2, KV = 2, D = 7, keys = 67 },
  { "causal, grouped heads", B = 2, T = 70, H = 6, KV = 2, D = 16, keys = 70, causal = true },
  { "decode over several pieces", B = 2, T = 1, H = 6, KV = 2, D = 24, keys = 601, capacity = 640, q_start = 600, causal = true },
  { "decode, one head", B = 1, T = 1, H = 1, KV = 1, D = 64, keys = 300, q_start = 299, causal = true },
  { "decode, two heads a group", B = 1, T = 1, H = 4, KV = 2, D = 20, keys = 333, q_start = 332, causal = true },
  { "later chunk of a prompt", B = 1, T = 40, H = 4, KV = 1, D = 32, keys = 310, capacity = 400, q_start = 270, causal = true },
  { "sliding window", B = 1, T = 90, H = 2, KV = 1, D = 16, keys = 290, q_start = 200, causal = true, window = 33 },
  { "window without causal", B = 1, T = 9, H = 2, KV = 2, D = 16, keys = 9, window = 4 },
  { "left padding", B = 2, T = 30, H = 3, KV = 1, D = 16, keys = 30, causal = true, mask = function(b, j) return b == 0 or j >= 11 end },
  { "padding over pieces", B = 2, T = 1, H = 3, KV = 1, D = 16, keys = 400, q_start = 399, causal = true, mask = function(b, j) return b == 0 or j >= 270 end },
  { "bias per head (ALiBi)", B = 2, T = 12, H = 4, KV = 4, D = 16, keys = 80, q_start = 68, causal = true, bias = { 1, 4, 1, 80 } },
  { "bias per pair (T5)", B = 2, T = 13, H = 2, KV = 2, D = 16, keys = 13, scale = 1, bias = { 1, 2, 13, 13 } },
  { "bias full, decode over pieces", B = 2, T = 1, H = 2, KV = 1, D = 16, keys = 270, bias = { 2, 2, 1, 270 } },
  { "softcap", B = 1, T = 20, H = 2, KV = 1, D = 16, keys = 20, causal = true, softcap = 1.5, scale = 0.5 },
  { "softcap and bias", B = 1, T = 3, H = 2, KV = 1, D = 16, keys = 9, softcap = 1.5, bias = { 1, 1, 3, 9 } },
  { "f16 cache", B = 1, T = 17, H = 2, KV = 1, D = 20, keys = 65, q_start = 48, causal = true, dtype = C.WANE_F16 },
  { "bf16 cache", B = 1, T = 3, H = 2, KV = 1, D = 64, keys = 129, q_start = 126, causal = true, dtype = C.WANE_BF16 },
  { "bf16 all over", B = 1, T = 8, H = 2, KV = 2, D = 32, keys = 8, causal = true, dtype = C.WANE_BF16, q_dtype = C.WANE_BF16, tolerance = 8e-3 },
}

describe("attention", function()
  S.each_level(function(level, name)
    for _, c in ipairs(cases) do
      local x = inputs(c)
      core.check(C.wane_set_cpu_level(level))
      local difference = S.difference(run(c, x), reference(c, x))
      it(("%s: %s (largest difference %.1e)"):format(name, c[1], difference), function()
        assert.is_true(difference < (c.tolerance or 3e-6), difference)
      end)
    end
  end)

  it("gives the same row whether computed alone, in a chunk or with all (bit for bit)", function()
    for _, dtype in ipairs { C.WANE_F32, C.WANE_BF16 } do
      local whole = { B = 1, T = 300, H = 3, KV = 1, D = 64, keys = 300, causal = true, dtype = dtype }
      local x = inputs(whole)
      local all = run(whole, x)
      for _, part in ipairs { { 299, 1 }, { 255, 1 }, { 100, 1 }, { 256, 3 }, { 290, 10 }, { 200, 100 } } do
        local first, T = part[1], part[2]
        local q = {}
        for i = 1, T * 3 * 64 do q[i] = x.q[first * 3 * 64 + i] end
        local c = { B = 1, T = T, H = 3, KV = 1, D = 64, keys = first + T, q_start = first, capacity = 300, causal = true }
        local rows = run(c, { tq = S.tensor(q, { 1, T, 3, 64 }), tk = x.tk, tv = x.tv })
        local expected = {}
        for i = 1, #rows do expected[i] = all[first * 3 * 64 + i] end
        assert.equal(0, S.difference(rows, expected), ("%s: rows %d + %d"):format(NAMES[dtype], first, T))
      end
    end
  end)

  it("does not depend on the number of threads", function()
    for _, c in ipairs { cases[3], cases[4] } do
      local x, results = inputs(c), {}
      for threads = 1, 3 do
        core.check(C.wane_set_threads(threads))
        results[threads] = run(c, x)
      end
      core.check(C.wane_set_threads(0))
      assert.equal(0, S.difference(results[1], results[2]))
      assert.equal(0, S.difference(results[1], results[3]))
    end
  end)

  it("takes views", function()
    local c = { B = 2, T = 4, H = 3, KV = 3, D = 8, keys = 9 }
    local x = inputs(c)
    local expected = run(c, x)
    -- q as [B, H, T, D] and k as [B, T, KV, D] in memory, turned round.
    local q, k = {}, {}
    for b = 0, 1 do for h = 0, 2 do
      for t = 0, 3 do for d = 1, 8 do q[((b * 3 + h) * 4 + t) * 8 + d] = x.q[((b * 4 + t) * 3 + h) * 8 + d] end end
      for t = 0, 8 do for d = 1, 8 do k[((b * 9 + t) * 3 + h) * 8 + d] = x.k[((b * 3 + h) * 9 + t) * 8 + d] end end
    end end
    local tq, tk = S.tensor(q, { 2, 3, 4, 8 }), S.tensor(k, { 2, 9, 3, 8 })
    assert.equal(0, S.difference(run(c, { tq = S.permute(tq, { 0, 2, 1, 3 }), tk = S.permute(tk, { 0, 2, 1, 3 }), tv = x.tv }), expected))
  end)

  it("gives 0 where a row sees no key", function()
    local c = { B = 1, T = 3, H = 2, KV = 1, D = 8, keys = 3, mask = function() return false end }
    for _, v in ipairs(run(c, inputs(c))) do assert.equal(0, v) end
    c = { B = 1, T = 2, H = 2, KV = 1, D = 8, keys = 0, capacity = 4 }
    for _, v in ipairs(run(c, inputs(c))) do assert.equal(0, v) end
  end)

  for _, T in ipairs { 1, 5, 150 } do
    it(("does not make numbers of what is none: %d rows with NaN in a query or in every key they see"):format(T), function()
      for _, q_dtype in ipairs { C.WANE_F32, C.WANE_BF16 } do
        local c = { B = 1, T = T, H = 2, KV = 2, D = 16, keys = 200, q_start = 200 - T, q_dtype = q_dtype, dtype = q_dtype, causal = true }
        for _, where in ipairs { "query", "keys" } do
          local x, nan = inputs(c), 0 / 0
          if where == "query" then for d = 1, 16 do x.q[(T - 1) * 32 + d] = nan end                    -- head 0 of the last row
          else for i = 1, 200 * 16 do x.k[i] = nan end end                                             -- head 0's
          x.tq, x.tk = S.tensor(x.q, { 1, T, 2, 16 }, q_dtype), S.tensor(x.k, { 1, 2, 200, 16 }, q_dtype)
          for _, softcap in ipairs { 0, 20 } do
            c.softcap = softcap
            S.each_level(function(level)
              local out = run(c, x)
              for t = 0, T - 1 do
                for h = 0, 1 do
                  local v = out[(t * 2 + h) * 16 + 3]
                  local none = h == 0 and (where == "keys" or t == T - 1)
                  assert.equal(none, v ~= v, ("level %d, %s, softcap %g: row %d of head %d is %s"):format(level, where, softcap, t, h, v))
                end
              end
            end)
          end
        end
      end
    end)
  end

  it("ignores what lies in the cache behind kv_length", function()
    local c = { B = 1, T = 2, H = 2, KV = 1, D = 8, keys = 5, capacity = 9 }
    local x = inputs(c)
    local expected = run(c, x)
    for i = 5 * 8 + 1, #x.k do x.k[i], x.v[i] = 0 / 0, 0 / 0 end
    x.tk, x.tv = S.tensor(x.k, { 1, 1, 9, 8 }), S.tensor(x.v, { 1, 1, 9, 8 })
    assert.equal(0, S.difference(run(c, x), expected))
  end)

  it("takes an empty batch", function()
    local c = { B = 1, T = 0, H = 2, KV = 1, D = 8, keys = 5 }
    assert.same({}, run(c, inputs(c)))
  end)

  it("names what does not fit", function()
    local function message(c, change)
      local x, o, out = inputs(c), options(c), S.handle()
      change(x, o)
      return S.message(C.wane_attention(core.stream(), out, x.tq, x.tk, x.tv, x.tmask, x.tbias, o)) or "no error"
    end
    local c = { B = 2, T = 3, H = 4, KV = 2, D = 8, keys = 5, capacity = 6 }
    assert.matches("kv_length 7 does not fit", message(c, function(_, o) o.kv_length = 7 end))
    assert.matches("must not be negative", message(c, function(_, o) o.q_start = -1 end))
    assert.matches("must have one shape", message(c, function(x) x.tv = S.tensor(S.random(2 * 2 * 5 * 8), { 2, 2, 5, 8 }) end))
    assert.matches("differ in B or D", message(c, function(x) x.tq = S.tensor(S.random(2 * 3 * 4 * 4), { 2, 3, 4, 4 }) end))
    assert.matches("4 query heads cannot share 3", message(c, function(x)
      x.tk = S.tensor(S.random(2 * 3 * 6 * 8), { 2, 3, 6, 8 })
      x.tv = x.tk
    end))
    assert.matches("must be f32, f16 or bf16", message(c, function(x) x.tq = S.tensor(S.random(2 * 3 * 4 * 8), { 2, 3, 4, 8 }, C.WANE_I32) end))
    assert.matches("expected a key mask %[2, >= 5%]", message(c, function(x) x.tmask = S.tensor({ 1, 1, 1, 1, 1, 1, 1, 1 }, { 2, 4 }, C.WANE_U8) end))
    assert.matches("key mask must be u8 or bool", message(c, function(x) x.tmask = S.tensor(S.random(12), { 2, 6 }) end))
    assert.matches("does not broadcast to %[2, 4, 3, 5%]", message(c, function(x) x.tbias = S.tensor(S.random(6), { 6 }) end))
  end)
end)
