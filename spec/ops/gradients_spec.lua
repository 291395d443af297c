-- Gradients of single ops, at every instruction-set level: against central differences of the forward in f32, against the portable level for
-- other dtypes and sizes, with one thread and two; and their mistakes. Whole models: spec/models/gradients_spec.lua.
local ffi = require "ffi"
local autograd = require "wane.autograd"
local core = require "wane.core"
local F = require "wane.nn.functional"
local wane = require "wane"
local C = core.C

local best = C.wane_cpu_best()
local levels = {}
for level = 0, best do levels[#levels + 1] = level end
local function at_level(level, fn, ...)
  core.check(C.wane_set_cpu_level(level))
  local results = { pcall(fn, ...) }
  core.check(C.wane_set_cpu_level(best))
  if not results[1] then error(results[2], 0) end
  return unpack(results, 2)
end

local function random(seed, ...) return F.outside_scopes(wane.randn, { seed = seed, ... }) end

-- A fixed weighting of y's values, so that every one of them matters differently.
local function weigh(y)
  local w = random(99, unpack(y:shape()))
  return F.reduce(F.binary(F.cast(y, C.WANE_F32), w, C.WANE_MUL), C.WANE_SUM, -1, false)
end

-- Gradients of `make(leaves…)` by the graph: lists of numbers.
local function gradients(make, values, dtype)
  local leaves = {}
  for i, v in ipairs(values) do leaves[i] = autograd.leaf(F.outside_scopes(F.cast, v, dtype or C.WANE_F32)) end
  core.scope(function() autograd.record(function() return weigh(make(unpack(leaves))) end):backward() end)
  local out = {}
  for i, leaf in ipairs(leaves) do out[i] = leaf.grad end
  return out
end

-- Largest difference to central differences at some places, as a share of the largest gradient.
local function against_differences(make, values)
  local worst = 0
  local got = gradients(make, values)
  for which, v in ipairs(values) do
    local grad, n = F.read(got[which], "float")
    local largest = 1e-3
    for i = 0, n - 1 do largest = math.max(largest, math.abs(grad[i])) end
    local data = F.read(v, "float")
    for trial = 0, math.min(n, 9) - 1 do
      local i, step = (trial * 7919 + which) % n, 1e-2
      local kept = data[i]
      local function at(x)
        data[i] = x
        local args = { unpack(values) }
        args[which] = F.upload(data, C.WANE_F32, n * 4, unpack(v:shape()))
        return weigh(make(unpack(args))):item()
      end
      local slope = core.scope(function() return (8 * (at(kept + step) - at(kept - step)) - (at(kept + 2 * step) - at(kept - 2 * step))) / (12 * step) end)
      data[i] = kept
      worst = math.max(worst, math.abs(slope - grad[i]) / largest)
    end
  end
  return worst
end

local function largest_difference(a, b)
  local worst = 0
  for i = 1, #a do
    local d = (a[i] - b[i]):abs():max():item() / math.max(b[i]:abs():max():item(), 1e-3)
    if not (d <= worst) then worst = d end
  end
  return worst
end

-- Every level in f32 against differences; every level in every dtype against the portable one; one thread against two.
local function check(name, make, values, bar)
  it(name, function()
    local worst, between = 0, 0
    for _, level in ipairs(levels) do
      worst = math.max(worst, at_level(level, against_differences, make, values))
      for _, dtype in ipairs { C.WANE_F32, C.WANE_BF16, C.WANE_F16 } do
        local got, want = at_level(level, gradients, make, values, dtype), at_level(0, gradients, make, values, dtype)
        local d = largest_difference(got, want)
        assert.is_true(d <= (dtype == C.WANE_F32 and 1e-4 or dtype == C.WANE_BF16 and 0.03 or 4e-3), ("level %d, dtype %d: %g"):format(level, dtype, d))
        between = math.max(between, dtype == C.WANE_F32 and d or 0)
      end
      wane.threads(1)
      local alone = at_level(level, gradients, make, values)
      wane.threads(2)
      local two = at_level(level, gradients, make, values)
      wane.threads(0)
      for i = 1, #alone do assert.is_true(alone[i]:equal(two[i])) end
    end
    print(("  %s: %.1e of the largest from differences, %.1e between levels"):format(name, worst, between))
    assert.is_true(worst <= (bar or 5e-3))
  end)
end

describe("gradients of", function()
  local x, y = random(1, 7, 53), random(2, 7, 53)
  for _, op in ipairs { "neg", "exp", "sin", "cos", "tanh", "sigmoid", "square", "silu", "gelu", "gelu_tanh", "quick_gelu", "erf" } do
    check(op, function(a) return F.unary(a, C["WANE_" .. op:upper()]) end, { x })
  end
  local positive = F.outside_scopes(function() return x:abs() + 0.5 end)
  for _, op in ipairs { "sqrt", "rsqrt", "log", "reciprocal", "abs", "relu" } do
    check(op .. " of positive values", function(a) return F.unary(a, C["WANE_" .. op:upper()]) end, { positive }, 1e-2)
  end
  for _, act in ipairs { "silu", "gelu", "gelu_tanh", "quick_gelu", "sigmoid", "tanh" } do
    check("a gate of " .. act, function(a, b) return F.glu(a, b, C["WANE_" .. act:upper()]) end, { x, y })
  end
  check("softmax, last dimension", function(a) return F.softmax(a, 1) end, { x })
  check("softmax, first dimension", function(a) return F.softmax(a, 0) end, { x })
  check("the largest of a row", function(a) return (F.topk(a, 3)) end, { x })
  local ids = F.outside_scopes(F.upload, ffi.new("int32_t[6]", 4, 0, 4, 2, 6, 4), C.WANE_I32, 24, 2, 3)
  check("rows that occur several times", function(a) return F.rows(a, ids) end, { x })
  check("an embedding", function(a) return F.embedding(a, ids, C.WANE_F32) end, { x })
  check("parts of a tensor", function(a) local p, _, q = F.split(a, 1, { 5, 40, 5 }) return F.binary(p, q, C.WANE_MUL) end, { x })
  check("an rms norm", function(a, w) return F.rms_norm(a, w, 1e-5, 1) end, { x, random(3, 53) })
  check("a layer norm", function(a, w, b) return F.layer_norm(a, w, b, 1e-5) end, { x, random(3, 53), random(4, 53) })
  check("a product with bias", function(a, w, b) return F.linear(a, w, b, C.WANE_COMPUTE_F32) end, { x, random(5, 9, 53), random(6, 9) })
  check("products of experts", function(a, w1, w2, w3)
    local chosen = F.upload(ffi.new("int32_t[14]", 0, 2, 2, 0, 0, 2, 2, 2, 0, 0, 2, 0, 0, 2), C.WANE_I32, 56, 7, 2)     -- expert 1 gets no row
    local source, _, bounds = F.route(chosen, 3)
    return F.linear_experts(F.rows(a, source), bounds, { w1, w2, w3 }, C.WANE_COMPUTE_F32)
  end, { x, random(7, 9, 53), random(8, 9, 53), random(9, 9, 53) })
end)

-- ---------------------------------------------------------------- attention

local function mask_of(B, keys, hidden)
  local data = ffi.new("uint8_t[?]", B * keys)
  for i = 0, B * keys - 1 do data[i] = hidden(math.floor(i / keys), i % keys) and 0 or 1 end
  return F.outside_scopes(F.upload, data, C.WANE_U8, B * keys, B, keys)
end

local function firsts(B, T, of)
  local data = ffi.new("int32_t[?]", B * T)
  for i = 0, B * T - 1 do data[i] = of(math.floor(i / T), i % T) end
  return F.outside_scopes(F.upload, data, C.WANE_I32, B * T * 4, B, T)
end

local function attend(o)
  return function(q, k, v, bias)
    local how = { q_start = o.q_start or 0, kv_length = k:shape()[2], bias = bias }
    for key, value in pairs(o) do how[key] = value end
    return F.attend(q, k, v, how)
  end
end

describe("gradients of attention:", function()
  local function case(name, B, T, S, H, KV, D, o, bias)
    local values = { random(11, B, T, H, D), random(12, B, S, KV, D), random(13, B, S, KV, D), bias }
    check(name, attend(o), values, 1e-2)
  end
  case("causal", 2, 13, 13, 2, 2, 8, {})
  case("grouped heads, odd dimensions", 1, 19, 19, 6, 2, 13, {})
  case("several blocks of rows and keys", 1, 150, 150, 2, 1, 16, {})
  case("not causal, over a source", 2, 5, 71, 2, 2, 8, { causal = false })
  case("a window", 1, 90, 90, 2, 2, 8, { window = 17 })
  case("a soft cap and a scale", 1, 21, 21, 2, 1, 8, { softcap = 2, scale = 0.7 })
  case("hidden keys, some rows seeing none", 2, 12, 12, 2, 2, 8, { key_mask = mask_of(2, 12, function(b, j) return j < 3 * b or j == 7 end) })
  case("packed samples", 2, 70, 70, 2, 2, 8, { first = firsts(2, 70, function(b, t) return t < 9 + b and 0 or t < 66 and 9 + b or 66 end) })
  case("a bias a head", 2, 9, 9, 2, 1, 8, {}, random(14, 2, 9, 9))
  case("a bias a key", 2, 9, 9, 2, 2, 8, { causal = false }, random(15, 1, 2, 1, 9))
  case("a bias for all, capped", 2, 9, 9, 2, 2, 8, { softcap = 3 }, random(16, 9, 9))
  case("one row, one key", 1, 1, 1, 1, 1, 4, {})

  it("wide heads, long sequences: the levels agree, in bf16 with f32 of the same values, with one thread and two", function()
    local worst = 0
    for _, s in ipairs { { 1, 33, 33, 1, 1, 600 }, { 1, 300, 300, 4, 2, 64 }, { 2, 130, 130, 3, 1, 80 }, { 1, 70, 200, 2, 2, 256, { causal = false } },
                         { 1, 40, 900, 1, 1, 256, { causal = false } }, { 1, 257, 257, 2, 1, 128, { window = 70 } }, { 2, 1, 65, 2, 2, 32, { q_start = 64 } },
                         { 1, 200, 200, 6, 2, 48, { first = firsts(1, 200, function(_, t) return math.floor(t / 67) * 67 end) } },
                         { 1, 128, 128, 1, 1, 32, { first = firsts(1, 128, function(_, t) return t < 32 and 0 or t < 64 and 1000 or t < 96 and 64 or 0 end) } },
                         { 8, 40, 40, 4, 2, 64 }, { 2, 97, 97, 2, 2, 64, { key_mask = mask_of(2, 97, function(b, j) return j % 5 == b or j < 3 end) } } } do
      local B, T, S, H, KV, D, o = unpack(s, 1, 7)
      local values, rounded = {}, {}
      for i, v in ipairs { random(21, B, T, H, D), random(22, B, S, KV, D), random(23, B, S, KV, D) } do
        values[i], rounded[i] = v, F.outside_scopes(function() return F.cast(F.cast(v, C.WANE_BF16), C.WANE_F32) end)
      end
      local make = attend(o or {})
      local want, want_rounded = at_level(0, gradients, make, values), at_level(0, gradients, make, rounded)
      for _, level in ipairs(levels) do
        assert.is_true(largest_difference(at_level(level, gradients, make, values), want) < 1e-4)
        local got = at_level(level, gradients, make, values, C.WANE_BF16)
        local d = largest_difference(got, want_rounded)
        assert.is_true(d < 0.02, ("%s at level %d: %g"):format(table.concat(s, " ", 1, 6), level, d))
        worst = math.max(worst, d)
        wane.threads(1)
        local alone = at_level(level, gradients, make, values, C.WANE_BF16)
        wane.threads(0)
        for i = 1, #alone do assert.is_true(alone[i]:equal(got[i])) end
      end
    end
    print(("  bf16 is within %.1e of the largest of f32"):format(worst))
  end)

  it("the result and the logarithm of the sums in bf16 are f32's, rounded, at every level", function()
    local worst, worst_lse = 0, 0
    for _, s in ipairs { { 1, 300, 300, 6, 2, 64, {} }, { 2, 45, 45, 3, 3, 80, { window = 9 } },
                         { 2, 40, 40, 2, 1, 24, { key_mask = mask_of(2, 40, function(b, j) return j < 4 * b + 2 end) } } } do
      local B, T, S, H, KV, D, o = unpack(s)
      local q, k, v = random(51, B, T, H, D), random(52, B, KV, S, D), random(53, B, KV, S, D)
      local how = require("ffi").new("wane_attention_options", { kv_length = S, window = o.window or 0, causal = 1 })
      local function run(...)
        local y, lse, list = core.handle_type(), core.handle_type(), { ... }
        core.check(C.wane_attention_train(core.stream(), y, lse, list[1].h, list[2].h, list[3].h, o.key_mask and o.key_mask.h, nil, nil, how))
        return F.cast(wane.Tensor.wrap(y), C.WANE_F32), wane.Tensor.wrap(lse)
      end
      local half = { F.cast(q, C.WANE_BF16), F.cast(k, C.WANE_BF16), F.cast(v, C.WANE_BF16) }
      local want, want_lse = at_level(0, run, F.cast(half[1], C.WANE_F32), F.cast(half[2], C.WANE_F32), F.cast(half[3], C.WANE_F32))
      for _, level in ipairs(levels) do
        local y, lse = at_level(level, run, unpack(half))
        local seen = want_lse:isfinite()
        assert.is_true(seen:equal(lse:isfinite()))
        worst = math.max(worst, (y - want):abs():max():item())
        worst_lse = math.max(worst_lse, (wane.where(seen, lse, 0) - wane.where(seen, want_lse, 0)):abs():max():item())
      end
    end
    print(("  results within %.1e, logarithms within %.1e"):format(worst, worst_lse))
    assert.is_true(worst < 0.02 and worst_lse < 1e-4)
  end)

  it("first keys that rise and fall equal a bias that hides as much", function()
    local T = 150
    local function begin(t) return t == 0 and 0 or math.min(t, (t * 37) % 97) end
    local hide = {}
    for t = 0, T - 1 do
      hide[t + 1] = {}
      for j = 1, T do hide[t + 1][j] = j - 1 < begin(t) and -1e30 or 0 end
    end
    local values = { random(41, 1, T, 2, 16), random(42, 1, T, 1, 16), random(43, 1, T, 1, 16) }
    local want = at_level(0, gradients, attend { bias = wane.tensor { { unpack(hide) } } }, values)
    local first = { first = firsts(1, T, function(_, t) return begin(t) end) }
    for _, level in ipairs { 0, unpack(levels) } do
      assert.is_true(largest_difference(at_level(level, gradients, attend(first), values), want) < 1e-5)
    end
  end)

  it("a packed row equals its samples alone", function()
    local q, k, v = random(31, 1, 40, 2, 8), random(32, 1, 40, 2, 8), random(33, 1, 40, 2, 8)
    local whole = F.attend(q, k, v, { q_start = 0, kv_length = 40, first = firsts(1, 40, function(_, t) return t < 15 and 0 or 15 end) })
    for _, part in ipairs { { 0, 15 }, { 15, 25 } } do
      local function cut(t) return F.cast(F.narrow(t, 1, part[1], part[2]), C.WANE_F32) end
      local alone = F.attend(cut(q), cut(k), cut(v), { q_start = 0, kv_length = part[2] })
      assert.is_true((cut(whole) - alone):abs():max():item() < 1e-6)
    end
  end)
end)

-- ---------------------------------------------------------------- mistakes

describe("a gradient's mistakes are told:", function()
  local function refused(pattern, fn, ...)
    local h = core.handle_type()
    local args = { ... }
    assert.error_matches(function() core.check(fn(core.stream(), h, unpack(args))) end, pattern)
  end
  local a, b, ints = random(1, 3, 4), random(2, 3, 5), wane.tensor({ 1, 2, 3 }, "i32")

  it("shapes, dtypes, codes", function()
    refused("dy %[3, 5%] f32 must have the shape of x %[3, 4%] f32", C.wane_unary_backward, b.h, a.h, C.WANE_EXP)
    refused("has no derivative", C.wane_unary_backward, a.h, a.h, C.WANE_ISNAN)
    refused("x must be f32, f16 or bf16", C.wane_unary_backward, a.h, ints.h, C.WANE_EXP)
    refused("has no dimension 3", C.wane_softmax_backward, a.h, a.h, 2)
    refused("p is 1; expected a share", C.wane_dropout, a.h, 1, 1ULL, 0ULL)
    refused("index must be i32 or i64", C.wane_scatter_add, a.h, a.h, 4)
    refused("expected src %[index's shape, C%]", C.wane_scatter_add, a.h, wane.tensor({ 0, 1 }, "i32").h, 4)
    assert.error_matches(function() core.check(C.wane_add_into(core.stream(), a.h, b.h, 1)) end, "must have one shape")
    assert.error_matches(function() core.check(C.wane_add_into(core.stream(), F.cast(a, C.WANE_BF16).h, a.h, 1)) end, "dst must be a contiguous f32 tensor")
    assert.error_matches(function() F.attend(random(1, 1, 4, 2, 8), random(2, 1, 4, 2, 8), random(3, 1, 4, 2, 8), { q_start = 0, kv_length = 4,
      first = wane.tensor({ { 0, 0 } }, "i32") }) end, "expected first %[1, 4%] i32")
  end)

  it("an index outside the table, when the op runs", function()
    local h = core.handle_type()
    core.check(C.wane_scatter_add(core.stream(), h, a.h, wane.tensor({ 0, 1, 9 }, "i32").h, 4))
    assert.error_matches(function() wane.Tensor.wrap(h):totable() end, "index 9 of row 3 is outside the 4 rows")
    pcall(function() core.check(core.wait()) end)
  end)

  it("memory that runs out, at every allocation of a step", function()
    local values = { random(11, 1, 9, 2, 8), random(12, 1, 9, 1, 8), random(13, 1, 9, 1, 8) }
    local failed = 0
    for n = 1, 40 do
      C.wane_fail_allocation(n)
      local ok, message = pcall(gradients, attend {}, values)
      C.wane_fail_allocation(0)
      if not ok then
        failed = failed + 1
        assert.matches("memory", tostring(message))
      end
    end
    gradients(attend {}, values)
    print(("  %d of 40 allocations failed with an error"):format(failed))
  end)

  it("empty tensors have empty gradients", function()
    local empty = wane.zeros(0, 5)
    local got = gradients(function(t) return F.unary(F.glu(t, t, C.WANE_SILU), C.WANE_GELU) end, { empty })
    assert.same({ 0, 5 }, got[1]:shape())
  end)
end)
