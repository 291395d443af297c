--- Matrix products with float and 4-bit weights, and the backward: every level against a product in double precision with the exactly
-- dequantized weight, on shapes that hit every tail.
local ffi = require "ffi"
local s = require "linear8.support"
local q = require "support.quant"
local has_tiles = require "support.tiles"
local C = s.C

--- { M, N, K }: one row, odd sizes, rows that straddle blocks, no whole chunk, several tiles, panels and blocks of rows; the last: few rows
--- and more scales than one block of double quantization, at every block size up to 256.
local shapes = {
  { 1, 1, 1 }, { 1, 7, 64 }, { 2, 37, 96 }, { 3, 64, 128 }, { 4, 33, 192 }, { 5, 5, 33 }, { 7, 130, 64 }, { 8, 3, 257 },
  { 9, 50, 80 }, { 16, 12, 576 }, { 17, 97, 320 }, { 33, 61, 512 }, { 50, 100, 130 }, { 70, 131, 300 }, { 2, 150, 448 },
}
local kinds = {
  { "f32" }, { "f16" }, { "bf16" },
  { "nf4", 64 }, { "nf4", 64, true }, { "nf4", 32 }, { "nf4", 32, true }, { "nf4", 128 }, { "nf4", 256, true }, { "nf4", 4096 },
  { "fp4", 64 }, { "fp4", 64, true }, { "fp4", 512 },
}

local function cast(x, dtype)
  local h = ffi.new "wane_handle"
  s.core.check(C.wane_cast(s.core.stream(), h, x, s.core.dtype(dtype)))
  return h
end

--- A weight of N x K and its exact values.
local function weight(kind, N, K, r)
  local data = ffi.new("float[?]", N * K)
  for i = 0, N * K - 1 do data[i] = 0.05 * r.normal() end
  local plain = s.tensor("f32", { N, K }, data)
  local w = kind[2] and q.quantize(plain, kind[1], kind[2], kind[3]) or cast(plain, kind[1])
  return w, (s.dequantized(w))
end

local function label(kind) return kind[1] .. (kind[2] and (" bs " .. kind[2] .. (kind[3] and " nested" or "")) or "") end

local function rms(a, n)
  local sum = 0
  for i = 0, n - 1 do sum = sum + a[i] * a[i] end
  return math.sqrt(sum / math.max(n, 1))
end

--- The outputs' typical size: what rounding errors are measured against.
local function scale_of(y, n) return math.max(rms(y, n), 1e-3) end

--- The values rounded to bf16, ties to even: what a tile multiplies.
local function rounded(a, n)
  local box, out = ffi.new "union { float f; uint32_t u; }", ffi.new("float[?]", n)
  for i = 0, n - 1 do
    box.f = a[i]
    local low = box.u % 65536
    box.u = box.u - low
    if low > 32768 or (low == 32768 and box.u % 131072 >= 65536) then box.u = box.u + 65536 end
    out[i] = box.f
  end
  return out
end

local largest = {}
local function note(what, ratio) largest[what] = math.max(largest[what] or 0, ratio) end

describe("products", function()
  teardown(function()
    for what, ratio in pairs(largest) do print(("  %s: largest difference %.2g of the rms output"):format(what, ratio)) end
  end)

  for _, kind in ipairs(kinds) do
    it(label(kind) .. ": forward in f32 (3e-5 of the rms) and bf16 (4e-3; tiles 3e-5 of the product of bf16 values), every level and shape", function()
      local r = s.random(7)
      for _, shape in ipairs(shapes) do
        local M, N, K = shape[1], shape[2], shape[3]
        local w, values = weight(kind, N, K, r)
        local xdata, bdata = s.activations(r, M, K), s.activations(r, 1, N)
        local x, bias = s.tensor("f32", { M, K }, xdata), s.tensor("f32", { N }, bdata)
        local want, plain = s.product(xdata, values, M, N, K, bdata), s.product(xdata, values, M, N, K)
        local size = scale_of(plain, M * N)
        local tiles = s.product(rounded(xdata, M * K), rounded(values, N * K), M, N, K, bdata)
        s.at_levels(function(level)
          for _, mode in ipairs { { "f32", C.WANE_COMPUTE_F32, 3e-5 }, { "bf16", C.WANE_COMPUTE_BF16, 4e-3 },
                                  { "invariant", C.WANE_COMPUTE_BF16 + C.WANE_COMPUTE_INVARIANT, 4e-3 } } do
            local got, n = s.linear(x, w, bias, mode[2], -1)
            local by_tiles = has_tiles() and mode[1] == "bf16" and M > 8
            local worst = s.difference(got, by_tiles and tiles or want, n)
            note(level .. " " .. mode[1] .. (by_tiles and " (of the bf16 product)" or ""), worst / size)
            assert.is_true(worst <= (by_tiles and 3e-5 or mode[3]) * size + 1e-6, ("%s %s %dx%dx%d: differs by %.3g, rms %.3g"):format(
              level, mode[1], M, N, K, worst, size))
          end
        end)
      end
    end)

    it(label(kind) .. ": backward in f32 (3e-5 of the rms), every level and shape", function()
      local r = s.random(11)
      for _, shape in ipairs(shapes) do
        local M, N, K = shape[1], shape[2], shape[3]
        local w, values = weight(kind, N, K, r)
        local data = s.activations(r, M, N)
        local dy = s.tensor("f32", { M, N }, data)
        local turned = ffi.new("float[?]", N * K)
        for n = 0, N - 1 do for k = 0, K - 1 do turned[k * N + n] = values[n * K + k] end end
        local want = s.product(data, turned, M, K, N)
        local size = scale_of(want, M * K)
        local tiles = s.product(rounded(data, M * N), rounded(turned, N * K), M, K, N)
        s.at_levels(function(level)
          for _, mode in ipairs { { "f32", C.WANE_COMPUTE_F32, 3e-5 }, { "bf16", C.WANE_COMPUTE_BF16, 3e-5 } } do
            local got, n = s.linear_backward(dy, w, mode[2])
            local worst = s.difference(got, has_tiles() and mode[1] == "bf16" and tiles or want, n)
            note(level .. " backward " .. mode[1], worst / size)
            assert.is_true(worst <= mode[3] * size + 1e-6, ("%s %s %dx%dx%d: differs by %.3g, rms %.3g"):format(
              level, mode[1], M, N, K, worst, size))
          end
        end)
      end
    end)
  end

  it("16-bit x and bias: the f32 result of the widened values, rounded once", function()
    local r = s.random(3)
    for _, dtype in ipairs { "f16", "bf16" } do
      for _, shape in ipairs { { 3, 40, 64 }, { 21, 40, 70 } } do
        local M, N, K = shape[1], shape[2], shape[3]
        local w = weight({ "nf4", 64 }, N, K, r)
        local x = cast(s.tensor("f32", { M, K }, s.activations(r, M, K)), dtype)
        local bias = cast(s.tensor("f32", { N }, s.activations(r, 1, N)), dtype)
        s.at_levels(function(level)
          local wide, n = s.linear(cast(x, "f32"), w, cast(bias, "f32"))
          local want = s.read(cast(s.tensor("f32", { M, N }, wide), dtype))
          local got = s.linear(x, w, bias)
          for i = 0, n - 1 do assert.equal(want[i], got[i], level .. " " .. dtype) end
        end)
      end
    end
  end)

  it("results do not depend on the number of threads, bit for bit", function()
    local r, before = s.random(5), C.wane_threads()
    for _, kind in ipairs { { "nf4", 64, true }, { "bf16" } } do
      for _, shape in ipairs { { 1, 300, 512 }, { 40, 300, 512 } } do
        local M, N, K = shape[1], shape[2], shape[3]
        local w = weight(kind, N, K, r)
        local x, dy = s.tensor("f32", { M, K }, s.activations(r, M, K)), s.tensor("f32", { M, N }, s.activations(r, M, N))
        s.at_levels(function(level)
          local seen = {}
          for _, threads in ipairs { 1, 2, 3 } do
            C.wane_set_threads(threads)
            local y, n = s.linear(x, w, nil, C.WANE_COMPUTE_BF16, -1)
            local dx, m = s.linear_backward(dy, w, C.WANE_COMPUTE_BF16)
            seen[threads] = ffi.string(y, n * 4) .. ffi.string(dx, m * 4)
          end
          C.wane_set_threads(before)
          assert.is_true(seen[1] == seen[2] and seen[1] == seen[3], level)
        end)
      end
    end
  end)

  it("batch-invariant: a row's result is the same bits in any batch", function()
    local r = s.random(9)
    local M, N, K = 30, 45, 192
    local mode = C.WANE_COMPUTE_BF16 + C.WANE_COMPUTE_INVARIANT
    for _, kind in ipairs(kinds) do
      local w = weight(kind, N, K, r)
      local data = s.activations(r, M, K)
      s.at_levels(function(level)
        local all = s.linear(s.tensor("f32", { M, K }, data), w, nil, mode, -1)
        for _, count in ipairs { 1, 2, 3, 4, 7, 13 } do
          local some, n = s.linear(s.tensor("f32", { count, K }, data + K), w, nil, mode, -1)
          assert.equal(ffi.string(all + N, n * 4), ffi.string(some, n * 4), ("%s %s: %d rows"):format(level, label(kind), count))
        end
      end)
    end
  end)

  it("more rows than one slice", function()
    local r = s.random(13)
    local M, N, K = 1100, 9, 64
    local w, values = weight({ "nf4", 64 }, N, K, r)
    local data = s.activations(r, M, K)
    local want = s.product(data, values, M, N, K)
    s.at_levels(function(level)
      local got, n = s.linear(s.tensor("f32", { M, K }, data), w, nil, C.WANE_COMPUTE_F32, -1)
      local worst, top = s.difference(got, want, n)
      assert.is_true(worst <= 1e-5 * top, level)
    end)
  end)

  it("contractions longer than a worker's scratch", function()
    local r = s.random(15)
    for _, kind in ipairs { { "nf4", 64, true }, { "bf16" } } do
      local M, long, short = 40, 16576, 37
      local w, values = weight(kind, short, long, r)
      local data = s.activations(r, M, long)
      local want = s.product(rounded(data, M * long), rounded(values, short * long), M, short, long)
      local x = s.tensor("f32", { M, long }, rounded(data, M * long))
      s.at_levels(function(level)
        local got, n = s.linear(x, w, nil, C.WANE_COMPUTE_BF16, -1)
        local worst = s.difference(got, want, n)
        assert.is_true(worst <= 1.5e-2 * rms(want, n), ("%s %s forward: %g of %g"):format(level, label(kind), worst, rms(want, n)))
      end)
      w, values = weight(kind, long, short, r)
      local turned = ffi.new("float[?]", long * short)
      for n = 0, long - 1 do for k = 0, short - 1 do turned[k * long + n] = values[n * short + k] end end
      want = s.product(rounded(data, M * long), rounded(turned, long * short), M, short, long)
      s.at_levels(function(level)
        local got, n = s.linear_backward(x, w, C.WANE_COMPUTE_BF16)
        local worst = s.difference(got, want, n)
        assert.is_true(worst <= 1.5e-2 * rms(want, n), ("%s %s backward: %g of %g"):format(level, label(kind), worst, rms(want, n)))
      end)
    end
  end)

  it("units of many rows, outputs and phases: one weight after the other, any number of threads", function()
    local r, before = s.random(19), C.wane_threads()
    for _, kind in ipairs { { "nf4", 64, true }, { "bf16" } } do
      for _, shape in ipairs { { 270, 161, 192 }, { 262, 35, 3136 }, { 259, 3200, 33 } } do
        local M, N, K = shape[1], shape[2], shape[3]
        if kind[2] then K = math.ceil(K / 64) * 64 end
        local w, wanted = {}, {}
        local xdata, dydata = rounded(s.activations(r, M, K), M * K), rounded(s.activations(r, M, N), M * N)
        local x, dy = s.tensor("f32", { M, K }, xdata), s.tensor("f32", { M, N }, dydata)
        for i = 1, 2 do
          local values
          w[i], values = weight(kind, N, K, r)
          local exact = s.tensor("f32", { N, K }, rounded(values, N * K))
          wanted[i] = { (s.linear(x, exact, nil, C.WANE_COMPUTE_F32, -1)), (s.linear_backward(dy, exact, C.WANE_COMPUTE_F32)) }
        end
        s.at_levels(function(level)
          local seen
          for _, threads in ipairs { 1, 2 } do
            C.wane_set_threads(threads)
            local bits = {}
            for i = 1, 2 do
              local y, n = s.linear(x, w[i], nil, C.WANE_COMPUTE_BF16, -1)
              local dx, m = s.linear_backward(dy, w[i], C.WANE_COMPUTE_BF16)
              bits[i] = ffi.string(y, n * 4) .. ffi.string(dx, m * 4)
              local forward, back = s.difference(y, wanted[i][1], n), s.difference(dx, wanted[i][2], m)
              local what = ("%s %s %d %d %d: %g, %g"):format(level, label(kind), M, N, K, forward, back)
              assert.is_true(forward <= 1.5e-2 * rms(y, n) and back <= 1.5e-2 * rms(dx, m), what)
            end
            seen = seen or bits
            assert.is_true(seen[1] == bits[1] and seen[2] == bits[2], level)
          end
          C.wane_set_threads(before)
        end)
      end
    end
  end)

  it("NaN and infinity in x show in their rows and nowhere else", function()
    local r = s.random(17)
    for _, M in ipairs { 3, 20 } do
      local N, K = 33, 192
      local w = weight({ "nf4", 64 }, N, K, r)
      local data = s.activations(r, M, K)
      data[K + 70], data[2 * K] = 0 / 0, math.huge
      s.at_levels(function(level)
        for _, mode in ipairs { C.WANE_COMPUTE_F32, C.WANE_COMPUTE_BF16 } do
          local got = s.linear(s.tensor("f32", { M, K }, data), w, nil, mode, -1)
          for m = 0, M - 1 do
            for n = 0, N - 1 do
              local v = got[m * N + n]
              local finite = v == v and math.abs(v) < math.huge
              assert.equal(m ~= 1 and m ~= 2, finite, ("%s mode %d row %d"):format(level, mode, m))
            end
          end
        end
      end)
    end
  end)

  it("strided x and strided float weights are read as what they show", function()
    local r = s.random(19)
    local M, N, K = 6, 10, 12
    local xd, wd = s.activations(r, K, M), s.activations(r, K, N)
    local function turned(h)
      local out = ffi.new "wane_handle"
      s.core.check(C.wane_view_permute(s.core.stream(), out, h, ffi.new("int32_t[2]", 1, 0)))
      return out
    end
    local x, w = ffi.new("float[?]", M * K), ffi.new("float[?]", N * K)
    for m = 0, M - 1 do for k = 0, K - 1 do x[m * K + k] = xd[k * M + m] end end
    for n = 0, N - 1 do for k = 0, K - 1 do w[n * K + k] = wd[k * N + n] end end
    local want = s.product(x, w, M, N, K)
    local got, n = s.linear(turned(s.tensor("f32", { K, M }, xd)), turned(s.tensor("f32", { K, N }, wd)))
    assert.is_true(s.difference(got, want, n) < 1e-4)
  end)

  it("leading dimensions stay; no rows and no columns are fine", function()
    local r = s.random(23)
    local w = weight({ "f32" }, 5, 4, r)
    local y, info = ffi.new "wane_handle", ffi.new "wane_info"
    s.core.check(C.wane_linear(s.core.stream(), y, s.tensor("f32", { 2, 3, 4 }, s.activations(r, 6, 4)), w, nil, 0, 0))
    s.core.check(C.wane_tensor_info(y, info))
    assert.same({ 3, 2, 3, 5 }, { info.ndim, tonumber(info.shape[0]), tonumber(info.shape[1]), tonumber(info.shape[2]) })
    local _, n = s.linear(s.tensor("f32", { 0, 4 }, nil), w)
    assert.equal(0, n)
    local none = s.tensor("f32", { 3, 0 }, nil)
    for _, M in ipairs { 2, 20 } do
      s.at_levels(function()
        local bias = ffi.new("float[3]", 1, 2, 3)
        local got = s.linear(s.tensor("f32", { M, 0 }, nil), none, s.tensor("f32", { 3 }, bias))
        for m = 0, M - 1 do for i = 0, 2 do assert.equal(bias[i], got[m * 3 + i]) end end
      end)
    end
  end)

  it("misuse says what was expected and found", function()
    local r = s.random(29)
    local w = weight({ "nf4", 64 }, 8, 64, r)
    local x, y = s.tensor("f32", { 2, 64 }, s.activations(r, 2, 64)), ffi.new "wane_handle"
    local stream = s.core.stream()
    local function refused(status, pattern, ...)
      assert.equal(status, (C.wane_linear(stream, y, ...)))
      assert.matches(pattern, ffi.string(C.wane_error()))
    end
    refused(C.WANE_E_SHAPE, "the last dimension must be 64", s.tensor("f32", { 2, 32 }, s.activations(r, 2, 32)), w, nil, 0, 0)
    refused(C.WANE_E_SHAPE, "bias is %[3%] f32; expected a float tensor of %[8%]", x, w, s.tensor("f32", { 3 }, s.activations(r, 1, 3)), 0, 0)
    refused(C.WANE_E_DTYPE, "x is .*i32", s.tensor("i32", { 2, 64 }, ffi.new "int32_t[128]"), w, nil, 0, 0)
    refused(C.WANE_E_DTYPE, "weight is .*i32", x, s.tensor("i32", { 2, 64 }, ffi.new "int32_t[128]"), nil, 0, 0)
    refused(C.WANE_E_SHAPE, "two dimensions", x, s.tensor("f32", { 64 }, s.activations(r, 1, 64)), nil, 0, 0)
    refused(C.WANE_E_ARG, "compute is 9", x, w, nil, 9, 0)
    local gone = s.tensor("f32", { 2, 64 }, s.activations(r, 2, 64))
    local copy = ffi.new("wane_handle", gone)
    C.wane_tensor_free(gone)
    assert.equal(C.WANE_E_STALE, (C.wane_linear(stream, y, copy, w, nil, 0, 0)))
  end)
end)
