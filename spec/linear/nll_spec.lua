--- The loss of a head without scores in memory: against the scores' own loss and gradient in f32.
local ffi = require "ffi"
local wane = require "wane"
local F = require "wane.nn.functional"
local S = require "ops.nn_support"
local has_tiles = require "support.tiles"
local core, C = S.core, S.C

local function randn(seed, ...) return F.outside_scopes(wane.randn, { seed = seed, ... }) end
local function cast(t, dtype) return F.outside_scopes(F.cast, t, dtype) end
local function apart(a, b) return ((F.cast(a, C.WANE_F32) - F.cast(b, C.WANE_F32)):abs():max() / F.cast(b, C.WANE_F32):abs():max()):item() end

local function labels_of(M, V, wide, bad)
  local list = ffi.new(wide and "int64_t[?]" or "int32_t[?]", M)
  for i = 0, M - 1 do list[i] = i % 5 == 3 and -100 or (i * 7919 + 1) % V end
  if bad then list[M - 1] = bad end
  return F.outside_scopes(F.upload, list, wide and C.WANE_I64 or C.WANE_I32, M * (wide and 8 or 4), M)
end

--- { M, K, V }: one row, blocks and groups that end early, fewer rows than a panel, several runs of the contraction, smaller blocks for long rows.
local CASES = { { 1, 64, 33 }, { 64, 64, 300 }, { 33, 100, 70 }, { 5, 64, 3000 }, { 40, 1500, 500 }, { 20, 3200, 130 }, { 300, 128, 1025 } }

describe("linear_nll", function()
  local tiled = has_tiles()
  for _, kind in ipairs { "bf16", "f32", "nf4", "int8" } do
    it(kind .. ": is what the scores in f32 give, for every shape", function()
      if not tiled then return end
      local worst, slope = 0, 0
      for n, c in ipairs(CASES) do
        core.scope(function()
          local M, K, V = unpack(c)
          local w = randn(2, V, K) * (2 / math.sqrt(K))
          w = kind == "bf16" and F.cast(w, C.WANE_BF16) or kind == "f32" and w or require("wane.quant").quantize(w, { type = kind })
          local dense = kind == "f32" and F.cast(F.cast(w, C.WANE_BF16), C.WANE_F32) or w:dtype() == "bf16" and F.cast(w, C.WANE_F32) or w:dequantize "f32"
          if kind ~= "f32" and kind ~= "bf16" then dense = F.cast(F.cast(dense, C.WANE_BF16), C.WANE_F32) end          -- as it enters the product
          for _, dtype in ipairs { C.WANE_BF16, C.WANE_F32 } do
            local x = F.cast(F.cast(randn(1, M, K), C.WANE_BF16), dtype)
            local labels = labels_of(M, V, n % 2 == 0)
            local nll, dx = F.linear_nll(x, w, labels, 0.25, -100, C.WANE_COMPUTE_BF16)
            local scores = F.linear(F.cast(x, C.WANE_F32), dense, nil, C.WANE_COMPUTE_F32)
            local want, dscores = F.nll_with_gradient(scores, labels, 0.25, -100, C.WANE_F32)
            local want_dx = F.linear(dscores, F.transpose(dense), nil, C.WANE_COMPUTE_F32)
            assert.equal(x:dtype(), dx:dtype())
            worst, slope = math.max(worst, apart(nll, want)), math.max(slope, apart(dx, want_dx))
          end
        end)
      end
      print(("  %s: losses within %.1e, gradients within %.1e of the largest"):format(kind, worst, slope))
      assert.is_true(worst < 2e-6 and slope < 8e-3)
    end)
  end

  it("follows scores that grow from block to block, and keeps the small gradient of a sure row", function()
    if not tiled then return end
    local M, K, V = 40, 64, 4500
    local w = randn(2, V, K) * 0.5
    local x, labels = randn(1, M, K), labels_of(M, V)
    local grown = w:clone()
    for v = 0, V - 1, 500 do F.narrow(grown, 0, v, 500):copy(F.narrow(w, 0, v, 500) * (0.3 + v / 1000)) end
    local sure = randn(1, M, K) * 0.01                         -- row i is its label's row of W, so scaled that 1 - p is some 1e-4
    for i = 0, M - 1 do
      local row = F.narrow(w, 0, (i * 7919 + 1) % V, 1)
      F.narrow(sure, 0, i, 1):copy(row * (17.5 / (row * row):sum():item()))
    end
    for name, c in pairs { grown = { x, grown }, sure = { sure, w } } do
      local a, b = F.cast(c[1], C.WANE_BF16), F.cast(c[2], C.WANE_BF16)
      local dense = F.cast(b, C.WANE_F32)
      local scores = F.linear(F.cast(a, C.WANE_F32), dense, nil, C.WANE_COMPUTE_F32)
      local want, dscores = F.nll_with_gradient(scores, labels, 1, -100, C.WANE_F32)
      local nll, dx = F.linear_nll(F.cast(a, C.WANE_F32), b, labels, 1, -100, C.WANE_COMPUTE_BF16)
      local slope = apart(dx, F.linear(dscores, F.transpose(dense), nil, C.WANE_COMPUTE_F32))
      print(("  %s: losses within %.1e of the largest (%.1e), gradients within %.1e"):format(name, apart(nll, want), want:max():item(), slope))
      assert.is_true(apart(nll, want) < (name == "sure" and 1e-3 or 2e-6) and slope < 8e-3)
    end
  end)

  it("keeps the digits of a sure row's loss and gradient, however large its scores", function()
    if not tiled then return end
    for _, c in ipairs { { 250, 12 }, { 100, 13 }, { 30, 12 }, { 20, 7 }, { 4000, 10 } } do
      local score, gap = unpack(c)                             -- the label's row of W is (score, 0, …), its rival's (score, -gap, 0, …); x = (1, 1, 0, …)
      local x, w = ffi.new("float[?]", 32 * 64), ffi.new("float[?]", 300 * 64)
      for m = 0, 31 do x[m * 64], x[m * 64 + 1] = 1, 1 end
      for v = 0, 299 do w[v * 64] = -score end
      w[7 * 64], w[290 * 64], w[290 * 64 + 1] = score, score, -gap
      local labels = ffi.new "int32_t[32]"
      for m = 0, 31 do labels[m] = 7 end
      local nll, dx = F.linear_nll(F.upload(x, C.WANE_F32, 32 * 256, 32, 64), F.cast(F.upload(w, C.WANE_F32, 300 * 256, 300, 64), C.WANE_BF16),
        F.upload(labels, C.WANE_I32, 128, 32), 1, -100, C.WANE_COMPUTE_BF16)
      local rest = 1 / (1 + math.exp(gap))                     -- 1 - p; the others weigh nothing
      local got, slope = S.list(nll.h), S.list(dx.h)
      for m = 0, 31 do
        assert.near(-math.log(1 - rest), got[m + 1], 0.02 * rest)
        assert.near(-gap * rest, slope[m * 64 + 2], 0.01 * gap * rest)
        assert.is_true(math.abs(slope[m * 64 + 1]) <= 0.02 * score * rest)          -- (p - 1) score + rest score
      end
    end
  end)

  it("gives the same bits for any number of threads", function()
    if not tiled then return end
    local x, w, labels = cast(randn(1, 70, 96), C.WANE_BF16), cast(randn(2, 5000, 96), C.WANE_BF16), labels_of(70, 5000)
    local before, seen = C.wane_threads(), nil
    for threads = 1, 3 do
      core.check(C.wane_set_threads(threads))
      local nll, dx = F.linear_nll(x, w, labels, 1, -100, C.WANE_COMPUTE_BF16)
      local all = { S.list(nll.h), S.list(dx.h) }
      seen = seen or all
      assert.same(seen, all)
    end
    core.check(C.wane_set_threads(before))
  end)

  it("names a label that is no class, and says where it is not offered", function()
    local x, w = cast(randn(1, 20, 64), C.WANE_BF16), cast(randn(2, 50, 64), C.WANE_BF16)
    local nll, dx = S.handle(), S.handle()
    local function call(weight, labels, compute)
      return C.wane_linear_nll(core.stream(), nll, dx, x.h, weight.h, labels.h, 1, -100, compute or C.WANE_COMPUTE_BF16)
    end
    assert.is_false(F.linear_nll_fits(w, C.WANE_COMPUTE_F32))
    assert.matches("ask wane_linear_nll_fits first", S.message(call(w, labels_of(20, 50), C.WANE_COMPUTE_F32)))
    assert.matches("expected labels %[20%]", S.message(call(w, labels_of(19, 50))))
    assert.matches("expected x %[M, K%]", S.message(call(cast(randn(2, 50, 60), C.WANE_BF16), labels_of(20, 50))))
    core.check(C.wane_set_cpu_level(math.min(S.level, C.WANE_CPU_AVX2)))
    assert.is_false(F.linear_nll_fits(w, C.WANE_COMPUTE_BF16))
    core.check(C.wane_set_cpu_level(S.level))
    assert.is_false(F.linear_nll_fits(w, 99))
    local none = F.linear_nll(F.narrow(x, 0, 0, 0), F.narrow(w, 0, 0, 0), F.narrow(labels_of(20, 50), 0, 0, 0), 1, -100, C.WANE_COMPUTE_BF16)
    assert.same({ 0 }, none:shape())
    if not tiled then return end
    local hot = x:clone()                                              -- an ignored row without numbers leaves the others alone, and its own gradient 0
    local bits, n = F.read(hot, "uint16_t")
    for i = 3 * 64, 4 * 64 - 1 do bits[i] = 0x7fc0 end
    local _, slope = F.linear_nll(F.upload(bits, C.WANE_BF16, n * 2, 20, 64), w, labels_of(20, 50), 1, -100, C.WANE_COMPUTE_BF16)
    for i, v in ipairs(S.list(slope.h)) do
      assert.equal(v, v)
      if i > 3 * 64 and i <= 4 * 64 then assert.equal(0, v) end
    end
    assert.is_true(F.linear_nll_fits(w, C.WANE_COMPUTE_BF16))
    assert.is_false(F.linear_nll_fits(cast(randn(2, 3, 20000), C.WANE_BF16), C.WANE_COMPUTE_BF16))
    core.check(call(w, labels_of(20, 50, false, 50)))
    assert.error_matches(function() core.check(core.wait()) end, "label 50 of row 20 is outside the 50 classes")
    core.check(call(w, labels_of(20, 50, true, -1)))
    assert.error_matches(function() core.check(core.wait()) end, "label %-1 of row 20")
  end)
end)
