--- Low-rank adapters in training: every level against sums in double precision, with the masks that wane_random's numbers give.
local ffi = require "ffi"
local S = require "ops.nn_support"
local has_tiles = require "support.tiles"
local core, C = S.core, S.C
local s = core.stream

local DTYPES = { { "f32", C.WANE_F32, 0 }, { "bf16", C.WANE_BF16, 2 ^ -8 }, { "f16", C.WANE_F16, 2 ^ -10 } }

--- { M, C, r }: one row, one column, odd sizes, tails of every vector, several pieces of a row, strips and blocks of rows; 0 rows, 0 columns.
local SHAPES = {
  { 1, 1, 1 }, { 1, 40, 8 }, { 5, 33, 3 }, { 7, 64, 8 }, { 4, 129, 1 }, { 35, 17, 5 }, { 66, 97, 8 }, { 3, 1100, 9 }, { 34, 70, 64 },
  { 2, 75, 256 }, { 0, 20, 8 }, { 6, 0, 4 },
}
--- For tiles: several blocks of rows, strips, pieces; the largest rank.
local LARGE = { { 300, 96, 8 }, { 70, 600, 16 }, { 33, 2100, 64 }, { 40, 64, 128 } }

local function uniform(n, seed, offset)
  local u = S.handle()
  core.check(C.wane_random(s(), u, C.WANE_UNIFORM, 0, 1, seed, offset, C.WANE_F32, 1, ffi.new("int64_t[8]", n)))
  return S.list(u)
end

--- What each element of x is multiplied with: 0 or 1 / (1 - p).
local function factors(n, p, seed, offset)
  local f = {}
  if p == 0 then for i = 1, n do f[i] = 1 end return f end
  for i, u in ipairs(uniform(n, seed, offset)) do f[i] = u >= p and 1 / (1 - p) or 0 end
  return f
end

local function rounded(list, dtype)
  local out = {}
  for i, v in ipairs(list) do out[i] = S.round(v, dtype) end
  return out
end

--- Sums over the middle index of a(i, k) * b(k, j), scaled, row by row.
local function product(I, J, K, a, b, scale)
  local out = {}
  for i = 0, I - 1 do for j = 0, J - 1 do
    local sum = 0
    for k = 0, K - 1 do sum = sum + a(i, k) * b(k, j) end
    out[i * J + j + 1] = sum * (scale or 1)
  end end
  return out
end

local function at(list, columns) return function(i, j) return list[i * columns + j + 1] end end
local function turned(list, columns) return function(i, j) return list[j * columns + i + 1] end end

--- Fails unless each value is near the wanted one: rounding of a result by `step`, and f32 sums (or `slack`) against the largest value.
local function near_to(want, h, step, what, slack)
  local got = S.list(h)
  local largest, worst = 1e-3, 0
  for _, v in ipairs(want) do largest = math.max(largest, math.abs(v)) end
  assert.equal(#want, #got, what)
  for i, v in ipairs(want) do
    if not (math.abs(got[i] - v) <= step * math.abs(v) + (slack or 2e-6) * largest) then
      error(("%s: value %d is %.9g, wanted %.9g"):format(what, i, got[i], v))
    end
    if step == 0 then worst = math.max(worst, math.abs(got[i] - v) / largest) end
  end
  return worst
end

--- All inputs of a case: lists as the dtype holds them, and tensors.
local function case(shape, dtype, p)
  local M, K, r = shape[1], shape[2], shape[3]
  local o = { M = M, K = K, r = r, dtype = dtype, p = p, seed = 77 + M, offset = 3 * r + 1 }
  local function add(name, list, sizes, kind)
    o[name] = rounded(list, kind)
    o["t" .. name] = S.tensor(list, sizes, kind)
  end
  add("x", S.random(M * K, 1), { M, K }, dtype)
  add("y", S.random(M * K, 2), { M, K }, dtype)
  add("A", S.random(r * K, 3), { r, K }, C.WANE_F32)
  add("B", S.random(K * r, 4), { K, r }, C.WANE_F32)
  add("u", S.random(M * r, 5), { M, r }, C.WANE_F32)
  o.f, o.dropped = factors(M * K, p, o.seed, o.offset), {}
  for i, v in ipairs(o.x) do o.dropped[i] = v * o.f[i] end
  return o
end

--- y + factor * u W for W given by element.
local function added(o, w)
  local out = product(o.M, o.K, o.r, at(o.u, o.r), w)
  for i, v in ipairs(out) do out[i] = o.y[i] + v * o.f[i] end
  return out
end

local function fresh(o) return S.tensor(o.y, { o.M, o.K }, o.dtype) end

describe("low-rank products", function()
  for _, d in ipairs(DTYPES) do
    for _, p in ipairs { 0, 0.3 } do
      it(d[1] .. ", p " .. p .. ": all four, every level and shape, against double precision", function()
        local worst = {}
        local shapes = { unpack(SHAPES) }
        if d[2] == C.WANE_BF16 and p == 0 then for _, shape in ipairs(LARGE) do shapes[#shapes + 1] = shape end end
        for _, shape in ipairs(shapes) do
          local o = case(shape, d[2], p)
          local M, K, r = o.M, o.K, o.r
          local down = product(M, r, K, at(o.dropped, K), turned(o.A, K), 1.5)
          local dA = product(r, K, M, turned(o.u, r), at(o.dropped, K))
          local dx = added(o, at(o.A, K))
          local du, dB, y
          if p == 0 then
            du, dB, y = product(M, r, K, at(o.x, K), at(o.B, r), 0.5), product(K, r, M, turned(o.x, K), at(o.u, r)), added(o, turned(o.B, r))
          end
          S.each_level(function(_, level)
            local what = ("%s %d x %d, r %d: "):format(level, M, K, r)
            local a, b, in_place = S.handle(), S.handle(), fresh(o)
            local slack = has_tiles() and d[2] == C.WANE_BF16 and p == 0 and 2e-5 or nil       -- tiles multiply f32 values as two of bf16
            local function near(want, h, step, name) worst[level] = math.max(worst[level] or 0, near_to(want, h, step, name, slack)) end
            core.check(C.wane_lora_down(s(), a, o.tx, o.tA, 1.5, p, o.seed, o.offset))
            near(down, a, 0, what .. "down")
            core.check(C.wane_lora_down_backward(s(), in_place, b, o.tu, o.tx, o.tA, p, o.seed, o.offset))
            near(dA, b, 0, what .. "dA")
            near(dx, in_place, d[3], what .. "dx")
            core.check(C.wane_lora_down_backward(s(), nil, b, o.tu, o.tx, o.tA, p, o.seed, o.offset))
            near(dA, b, 0, what .. "dA alone")
            if p > 0 then return end
            in_place = fresh(o)
            core.check(C.wane_lora_up(s(), in_place, o.tu, o.tB))
            near(y, in_place, d[3], what .. "up")
            core.check(C.wane_lora_up_backward(s(), a, b, o.tx, o.tu, o.tB, 0.5))
            near(du, a, 0, what .. "du")
            near(dB, b, 0, what .. "dB")
            core.check(C.wane_lora_up_backward(s(), a, nil, o.tx, o.tu, o.tB, 0.5))
            near(du, a, 0, what .. "du alone")
          end)
        end
        for level, most in pairs(worst) do print(("  %s: f32 results within %.1e of the largest"):format(level, most)) end
      end)
    end
  end

  it("give the same bits for any number of threads", function()
    local before = C.wane_threads()
    for _, shape in ipairs { { 150, 300, 8 }, { 40, 700, 33 } } do
      local o = case(shape, C.WANE_BF16, 0.1)
      S.each_level(function(_, level)
        local seen
        for threads = 1, 3 do
          core.check(C.wane_set_threads(threads))
          local u, du, dA, dB, y = S.handle(), S.handle(), S.handle(), S.handle(), fresh(o)
          core.check(C.wane_lora_down(s(), u, o.tx, o.tA, 2, o.p, o.seed, o.offset))
          core.check(C.wane_lora_up(s(), y, u, o.tB))
          core.check(C.wane_lora_up_backward(s(), du, dB, y, u, o.tB, 2))
          core.check(C.wane_lora_down_backward(s(), y, dA, du, o.tx, o.tA, o.p, o.seed, o.offset))
          local all = {}
          for i, h in ipairs { u, du, dA, dB, y } do all[i] = table.concat(S.list(h), " ") end
          seen = seen or all
          assert.same(seen, all, level)
        end
        core.check(C.wane_set_threads(before))
      end)
    end
  end)

  it("take views and more dimensions as the rows they hold", function()
    local o = case({ 6, 20, 4 }, C.WANE_F32, 0.5)
    local want, got, dA, other = S.handle(), S.handle(), S.handle(), S.handle()
    core.check(C.wane_lora_down(s(), want, o.tx, o.tA, 1, o.p, o.seed, o.offset))
    local across = {}
    for i = 0, 119 do across[i % 20 * 6 + math.floor(i / 20) + 1] = o.x[i + 1] end
    local view = S.permute(S.tensor(across, { 20, 6 }), { 1, 0 })
    core.check(C.wane_lora_down(s(), got, view, o.tA, 1, o.p, o.seed, o.offset))
    assert.same(S.list(want), S.list(got))
    local deep = S.tensor(o.x, { 2, 3, 20 })
    core.check(C.wane_lora_down(s(), got, deep, o.tA, 1, o.p, o.seed, o.offset))
    assert.same(S.list(want), S.list(got))
    assert.same({ 6, 4 }, (S.shape(got)))
    local a, b = S.tensor(o.y, { 2, 3, 20 }), fresh(o)
    core.check(C.wane_lora_down_backward(s(), a, dA, o.tu, deep, o.tA, o.p, o.seed, o.offset))
    core.check(C.wane_lora_down_backward(s(), b, other, o.tu, o.tx, o.tA, o.p, o.seed, o.offset))
    assert.same(S.list(a), S.list(b))
    assert.same(S.list(dA), S.list(other))
    core.check(C.wane_lora_up(s(), a, o.tu, o.tB))
    core.check(C.wane_lora_up(s(), b, o.tu, o.tB))
    assert.same(S.list(a), S.list(b))
  end)
end)

describe("a product with an adapter, as one op,", function()
  local wane, F = require "wane", require "wane.nn.functional"
  local wrap = wane.Tensor.wrap
  local function values(h) return F.cast(wrap(h), C.WANE_F32) end
  local function apart(a, b) return ((a - b):abs():max() / b:abs():max()):item() end
  local function randn(seed, ...) return F.outside_scopes(wane.randn, { seed = seed, ... }) end

  --- { M, K, N, r }: tiles that end early, several runs, phases and units, the largest rank of tiles and one beyond it, few rows.
  local CASES = { { 64, 192, 96, 8 }, { 33, 100, 70, 8 }, { 40, 64, 64, 16 }, { 40, 4096, 128, 8 }, { 40, 128, 4096, 5 }, { 100, 128, 192, 64 },
    { 40, 70, 90, 128 }, { 40, 70, 90, 129 }, { 3, 64, 64, 8 }, { 1100, 64, 64, 4 }, { 448, 256, 64, 128 }, { 448, 64, 256, 128 } }

  for _, kind in ipairs { "bf16", "nf4", "int8" } do
    it(kind .. ": gives what the products give one after the other, at every level", function()
      local worst = 0
      for _, c in ipairs(CASES) do
        local M, K, N, r = unpack(c)
        local w = randn(2, N, K)
        w = F.outside_scopes(function() return kind == "bf16" and F.cast(w, C.WANE_BF16) or require("wane.quant").quantize(w, { type = kind }) end)
        local A, B, bias, threshold = randn(3, r, K), randn(4, N, r), randn(6, N), kind == "int8" and 6 or -1
        for _, dtype in ipairs { C.WANE_F32, C.WANE_BF16 } do
          local x, dy = F.outside_scopes(F.cast, randn(1, M, K), dtype), F.outside_scopes(F.cast, randn(5, M, N), dtype)
          for _, p in ipairs { 0, 0.3 } do
            local o = ffi.new("wane_lora_options", { scale = 1.5, p = p, seed = 7 })
            S.each_level(function(_, level)
              core.scope(function()
                local what = ("%s %s, dtype %d, p %g"):format(level, table.concat(c, " "), dtype, p)
                local y, u, dx, dA, dB = S.handle(), S.handle(), S.handle(), S.handle(), S.handle()
                core.check(C.wane_linear_lora(s(), y, u, x.h, w.h, bias.h, A.h, B.h, o, C.WANE_COMPUTE_BF16, threshold, nil))
                core.check(C.wane_linear_lora_backward(s(), dx, dA, dB, dy.h, x.h, u, w.h, A.h, B.h, o, C.WANE_COMPUTE_BF16, nil, nil))
                local y2, u2, du, dx2, dA2, dB2 = S.handle(), S.handle(), S.handle(), S.handle(), S.handle(), S.handle()
                core.check(C.wane_linear(s(), y2, x.h, w.h, bias.h, C.WANE_COMPUTE_BF16, threshold))
                core.check(C.wane_lora_down(s(), u2, x.h, A.h, 1.5, p, 7, 0))
                core.check(C.wane_lora_up(s(), y2, u2, B.h))
                core.check(C.wane_linear_backward(s(), dx2, dy.h, w.h, C.WANE_COMPUTE_BF16))
                core.check(C.wane_lora_up_backward(s(), du, dB2, dy.h, u2, B.h, 1.5))
                core.check(C.wane_lora_down_backward(s(), dx2, dA2, du, x.h, A.h, p, 7, 0))
                for _, h in ipairs { du } do wrap(h) end
                for _, pair in ipairs { { y, y2 }, { dx, dx2 }, { u, u2 }, { dA, dA2 }, { dB, dB2 } } do
                  local d = apart(values(pair[1]), values(pair[2]))
                  assert.is_true(d <= (dtype == C.WANE_F32 and 2e-5 or 2 ^ -6), what .. ": " .. d)
                  if dtype == C.WANE_F32 then worst = math.max(worst, d) end
                end
              end)
            end)
          end
        end
      end
      print(("  %s: with f32 activations within %.1e of the largest"):format(kind, worst))
    end)
  end

  it("does not lose a change that is smaller than the result's own rounding", function()
    if not has_tiles() then return end
    local M, K, N = 64, 64, 64                              -- y near 100 moves by 0.1 on average: bf16 is 0.5 apart there
    local x, w, A = F.cast(wane.full({ M, K }, 1.25), C.WANE_BF16), F.cast(wane.full({ N, K }, 1.26), C.WANE_BF16), wane.full({ 8, K }, 1 / K)
    local B = randn(8, N, 8) * 0.02 + 0.01
    local y, plain, u, o = S.handle(), S.handle(), S.handle(), ffi.new("wane_lora_options", { scale = 1 })
    core.check(C.wane_linear_lora(s(), y, u, x.h, w.h, nil, A.h, B.h, o, C.WANE_COMPUTE_BF16, -1, nil))
    core.check(C.wane_linear(s(), plain, x.h, w.h, nil, C.WANE_COMPUTE_BF16, -1))
    local moved, want = (values(y) - values(plain)):mean():item(), (B:sum(2) * 1.25):mean():item()
    assert.is_true(math.abs(moved) > 0.25 * math.abs(want), ("moved by %g, wanted %g"):format(moved, want))
  end)

  it("adds to a gradient that is there, where tiles multiply, else says that it did not", function()
    for _, c in ipairs { { 40, 70, 90, 8 }, { 64, 128, 96, 5 }, { 33, 64, 4000, 16 }, { 70, 40, 3136, 43 }, { 96, 64, 1088, 128 } } do
      local M, K, N, r = unpack(c)
      local w, A, B, u = F.cast(randn(2, N, K), C.WANE_BF16), randn(3, r, K), randn(4, N, r), randn(7, M, r)
      for _, dtype in ipairs { C.WANE_F32, C.WANE_BF16 } do
        local x, dy, old = F.cast(randn(1, M, K), dtype), F.cast(randn(5, M, N), dtype), F.cast(randn(8, M, K) * 50, dtype)
        S.each_level(function()
          local o, was_added = ffi.new("wane_lora_options", { scale = 1 }), ffi.new "int[1]"
          local onto, dx, plain, dA, dB = F.binary_scalar(old, 0, C.WANE_ADD), S.handle(), S.handle(), S.handle(), S.handle()
          local function run(target, place)
            core.check(C.wane_linear_lora_backward(s(), target, dA, dB, dy.h, x.h, u.h, w.h, A.h, B.h, o, C.WANE_COMPUTE_BF16, place, was_added))
            wrap(dA) wrap(dB)
            dA, dB = S.handle(), S.handle()
          end
          run(plain, nil)
          run(dx, onto.h)
          assert.equal(has_tiles() and 1 or 0, was_added[0])
          local got = was_added[0] == 1 and F.cast(onto, C.WANE_F32) or values(dx) + F.cast(old, C.WANE_F32)
          assert.is_true(apart(got, values(plain) + F.cast(old, C.WANE_F32)) <= (dtype == C.WANE_F32 and 2e-6 or 2 ^ -7))
        end)
      end
    end
  end)

  it("adds the result to a tensor, once rounded where tiles multiply and no bias stands in the way", function()
    for _, c in ipairs { { 40, 70, 90, 8 }, { 64, 128, 96, 5 }, { 33, 64, 4000, 16 }, { 3, 64, 32, 4 }, { 1030, 64, 64, 2 }, { 33, 3136, 40, 16 } } do
      local M, K, N, r = unpack(c)
      local w, A, B, bias = F.cast(randn(2, N, K), C.WANE_BF16), randn(3, r, K), randn(4, N, r), randn(6, N)
      for _, dtype in ipairs { C.WANE_F32, C.WANE_BF16, C.WANE_F16 } do
        local x, old = F.cast(randn(1, M, K), dtype), F.cast(randn(8, M, N) * 50, dtype)
        local before = F.cast(old, C.WANE_F32)
        S.each_level(function()
          for _, b in ipairs { false, bias } do
            local o, y, plain, u = ffi.new("wane_lora_options", { scale = 1 }), S.handle(), S.handle(), S.handle()
            core.check(C.wane_linear_lora(s(), plain, u, x.h, w.h, b and b.h or nil, A.h, B.h, o, C.WANE_COMPUTE_BF16, -1, nil))
            wrap(u)
            u = S.handle()
            core.check(C.wane_linear_lora(s(), y, u, x.h, w.h, b and b.h or nil, A.h, B.h, o, C.WANE_COMPUTE_BF16, -1, old.h))
            wrap(u)
            local want = values(plain) + before
            assert.is_true(apart(values(y), want) <= (dtype == C.WANE_F32 and 2e-6 or dtype == C.WANE_F16 and 2 ^ -10 or 2 ^ -7))
          end
        end)
        assert.equal(0, apart(old, before))
      end
    end
    local y, u, x = S.handle(), S.handle(), randn(1, 20, 8)
    local weight, A, B, o = randn(2, 12, 8), randn(3, 4, 8), randn(4, 12, 4), ffi.new("wane_lora_options", { scale = 1 })
    assert.matches("onto is .*20, 11.*; expected .*20, 8.*with 12 at the end",
      S.message(C.wane_linear_lora(s(), y, u, x.h, weight.h, nil, A.h, B.h, o, C.WANE_COMPUTE_BF16, -1, randn(5, 20, 11).h)))
  end)

  it("refuses factors of other shapes", function()
    local x, w, o = randn(1, 20, 8), randn(2, 12, 8), ffi.new("wane_lora_options", { scale = 1 })
    local y, u = S.handle(), S.handle()
    local function message(A, B) return S.message(C.wane_linear_lora(s(), y, u, x.h, w.h, nil, A.h, B.h, o, C.WANE_COMPUTE_BF16, -1, nil)) end
    assert.matches("do not belong to a product of 20 rows with 12 outputs", message(randn(3, 4, 8), randn(4, 11, 4)))
    assert.matches("do not belong", message(randn(3, 4, 8), randn(4, 12, 5)))
    assert.matches("expected A %[r, 8%]", message(randn(3, 4, 9), randn(4, 12, 4)))
  end)
end)

describe("the mask of a low-rank product", function()
  --- factors of M x K elements, read off the product with a row of the identity: u[m][j] = drop(1)[m][j].
  local function mask(M, K, p, seed, offset)
    local ones, eye, u = {}, {}, S.handle()
    for i = 1, M * K do ones[i] = 1 end
    for i = 0, K * K - 1 do eye[i + 1] = i % (K + 1) == 0 and 1 or 0 end
    core.check(C.wane_lora_down(s(), u, S.tensor(ones, { M, K }, C.WANE_BF16), S.tensor(eye, { K, K }), 1, p, seed, offset))
    return S.list(u)
  end

  it("is that of wane_random's uniform numbers, exactly, at every level; also from an odd offset and past 2^32 elements", function()
    for _, where in ipairs { { 5, 0 }, { 2 ^ 40 + 9, 7 }, { 1, 2 ^ 34 - 21 } } do
      local want = factors(60 * 51, 0.37, where[1], where[2])
      S.each_level(function(_, level)
        for i, v in ipairs(mask(60, 51, 0.37, where[1], where[2])) do
          if not (math.abs(v - want[i]) < 1e-6 and (v == 0) == (want[i] == 0)) then error(level .. " element " .. i) end
        end
      end)
    end
  end)

  it("drops the share p and keeps the mean", function()
    for _, p in ipairs { 0.05, 0.5, 0.9 } do
      local f = mask(400, 100, p, 11, 0)
      local zeros, sum = 0, 0
      for _, v in ipairs(f) do
        if v == 0 then zeros = zeros + 1 end
        sum = sum + v
      end
      local deviation = math.sqrt(p * (1 - p) / #f)
      assert.is_true(math.abs(zeros / #f - p) < 4 * deviation)
      assert.is_true(math.abs(sum / #f - 1) < 4 * deviation / (1 - p))
    end
  end)
end)

describe("arguments of the low-rank products", function()
  local x, A, B, u = S.tensor(S.random(12), { 3, 4 }), S.tensor(S.random(8), { 2, 4 }), S.tensor(S.random(8), { 4, 2 }), S.tensor(S.random(6), { 3, 2 })
  local out, other = S.handle(), S.handle()

  local function fails(pattern, status)
    assert.matches(pattern, S.message(status))
  end

  it("are checked, with messages that say what was expected", function()
    local i32 = S.tensor({ 1, 2, 3 }, { 3 }, C.WANE_I32)
    fails("lora_down: x must be f32, f16 or bf16, found", C.wane_lora_down(s(), out, i32, A, 1, 0, 0, 0))
    fails("lora_down: expected A %[r, 4%] f32, found %[4, 2%] f32", C.wane_lora_down(s(), out, x, B, 1, 0, 0, 0))
    fails("expected A %[r, 4%] f32, found %[2, 4%] f16", C.wane_lora_down(s(), out, x, S.tensor(S.random(8), { 2, 4 }, C.WANE_F16), 1, 0, 0, 0))
    fails("must be in %[0, 1%), found 1", C.wane_lora_down(s(), out, x, A, 1, 1, 0, 0))
    fails("must be in %[0, 1%), found %-?nan", C.wane_lora_down(s(), out, x, A, 1, 0 / 0, 0, 0))
    fails("the scale inf must be finite", C.wane_lora_down(s(), out, x, A, math.huge, 0, 0, 0))
    fails("the rank of A %[257, 4%] f32 must be 1 to 256", C.wane_lora_down(s(), out, x, S.tensor(S.random(1028), { 257, 4 }), 1, 0, 0, 0))
    fails("the rank of A %[0, 4%] f32 must be 1 to 256", C.wane_lora_down(s(), out, x, S.tensor({}, { 0, 4 }), 1, 0, 0, 0))
    fails("lora_up: expected B %[4, r%] f32", C.wane_lora_up(s(), x, u, A))
    fails("lora_up: expected u %[3, 2%] f32, found %[4, 2%]", C.wane_lora_up(s(), x, B, B))
    local across = S.permute(x, { 1, 0 })
    fails("lora_up: y is written in place and must be contiguous", C.wane_lora_up(s(), across, B, u))
    fails("lora_up: y must be f32, f16 or bf16", C.wane_lora_up(s(), i32, u, B))
    fails("lora_up_backward: expected u %[3, 2%]", C.wane_lora_up_backward(s(), out, other, x, x, B, 1))
    fails("lora_up_backward: expected B %[4, r%]", C.wane_lora_up_backward(s(), out, nil, x, u, A, 1))
    fails("lora_down_backward: dx .* must have the shape and dtype of x",
      C.wane_lora_down_backward(s(), S.tensor(S.random(12), { 4, 3 }), out, u, x, A, 0, 0, 0))
    fails("lora_down_backward: dx .* must have the shape and dtype of x",
      C.wane_lora_down_backward(s(), S.tensor(S.random(12), { 3, 4 }, C.WANE_BF16), out, u, x, A, 0, 0, 0))
    fails("lora_down_backward: expected du %[3, 2%]", C.wane_lora_down_backward(s(), nil, out, x, x, A, 0, 0, 0))
    assert.is_true(out.t == nil and other.t == nil)
  end)

  it("that were freed are found out", function()
    local gone = S.tensor(S.random(8), { 2, 4 })
    C.wane_tensor_free(gone)
    assert.equal(C.WANE_E_STALE, C.wane_lora_down(s(), out, x, gone, 1, 0, 0, 0))
    assert.equal(C.WANE_E_STALE, C.wane_lora_up(s(), x, gone, B))
    assert.equal(C.WANE_E_STALE, C.wane_lora_up_backward(s(), out, other, x, u, gone, 1))
    assert.equal(C.WANE_E_STALE, C.wane_lora_down_backward(s(), gone, out, u, x, A, 0, 0, 0))
  end)
end)
