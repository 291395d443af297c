--- LLM.int8(): against bitsandbytes' arithmetic (golden data in float64), and every level against the scalar reference, bit for bit.
local ffi = require "ffi"
local s = require "linear8.support"
local safetensors = require "support.safetensors"
local C = s.C

local golden = safetensors.read "spec/fixtures/quant/int8.safetensors"
local cases = { "1x80x96", "4x16x70", "5x33x37", "7x80x96", "7x80x98" }

local function weight_of(case)
  local codes, scb = golden[case .. "/CB"], golden[case .. "/SCB"]
  return s.quantized("int8", codes.shape, 0, { [0] = s.tensor("i8", codes.shape, codes.data), [1] = s.tensor("f32", scb.shape, scb.data) })
end

local function float(case, name)
  local t = golden[case .. "/" .. name]
  return s.tensor("f32", t.shape, t.data)
end

describe("LLM.int8() and bitsandbytes", function()
  local largest = 0
  teardown(function() print(("  int8 golden data: largest difference %.2g of the largest output"):format(largest)) end)

  for _, case in ipairs(cases) do
    for _, t in ipairs { 0, 6 } do
      it(("%s threshold %d: out and out_nobias at every level, within 1e-6 of the largest"):format(case, t), function()
        local w, x, bias = weight_of(case), float(case, "x"), float(case, "bias")
        s.at_levels(function(level)
          for _, with_bias in ipairs { true, false } do
            local want = golden[("%s/t%d/%s"):format(case, t, with_bias and "out" or "out_nobias")]
            local got, n = s.linear(x, w, with_bias and bias or nil, C.WANE_COMPUTE_F32, t)
            local worst, top = s.difference(got, want.data, n)
            largest = math.max(largest, worst / top)
            assert.is_true(worst <= 1e-6 * top, ("%s: differs by %.3g of %.3g"):format(level, worst, top))
          end
        end)
      end)
    end

    it(case .. " weight-only and the backward product: within 2e-6 of the largest", function()
      local w, x, bias, dy = weight_of(case), float(case, "x"), float(case, "bias"), float(case, "grad_out")
      s.at_levels(function(level)
        local got, n = s.linear(x, w, bias, C.WANE_COMPUTE_F32, -1)
        local worst, top = s.difference(got, golden[case .. "/out_weight_only"].data, n)
        assert.is_true(worst <= 2e-6 * top, ("%s: weight-only differs by %.3g of %.3g"):format(level, worst, top))
        got, n = s.linear_backward(dy, w)
        worst, top = s.difference(got, golden[case .. "/grad_input"].data, n)
        assert.is_true(worst <= 2e-6 * top, ("%s: gradient differs by %.3g of %.3g"):format(level, worst, top))
      end)
    end)

    it(case .. " in bf16: one rounding away from the f32 result", function()
      local w, x = weight_of(case), golden[case .. "/x"]
      local rows, K = x.shape[1], x.shape[2]
      local short, wide = ffi.new("uint16_t[?]", rows * K), ffi.new("float[?]", rows * K)
      for i = 0, rows * K - 1 do
        short[i] = bit.rshift(ffi.cast("const uint32_t *", x.data)[i], 16)
        wide[i] = s.half("bf16", short[i])
      end
      s.at_levels(function(level)
        local got, n = s.linear(s.tensor("bf16", x.shape, short), w, nil, C.WANE_COMPUTE_BF16, 6)
        local want = s.linear(s.tensor("f32", x.shape, wide), w, nil, C.WANE_COMPUTE_F32, 6)
        for i = 0, n - 1 do
          assert.is_true(math.abs(s.half("bf16", got[i]) - want[i]) <= math.abs(want[i]) / 256, level .. ": element " .. i)
        end
      end)
    end)
  end
end)

describe("LLM.int8() at every level", function()
  local function random_weight(r, N, K)
    local codes, scb = ffi.new("int8_t[?]", math.max(N * K, 1)), ffi.new("float[?]", math.max(N, 1))
    for i = 0, N * K - 1 do codes[i] = r.integer(255) - 127 end
    for n = 0, N - 1 do scb[n] = 0.05 + r.uniform() end
    return s.quantized("int8", { N, K }, 0, { [0] = s.tensor("i8", { N, K }, codes), [1] = s.tensor("f32", { N }, scb) })
  end

  local shapes = { { 1, 1 }, { 3, 5 }, { 33, 37 }, { 130, 200 }, { 65, 1000 }, { 1, 320 } }
  for _, nk in ipairs(shapes) do
    local N, K = nk[1], nk[2]
    it(("[%d, %d]: the reference's bits for 1 to 130 rows, with and without outliers, for 1 and 2 threads"):format(N, K), function()
      local r = s.random(N * 1000 + K)
      local w = random_weight(r, N, K)
      for _, M in ipairs { 1, 2, 3, 4, 5, 9, 17, 130 } do
        local x = s.tensor("f32", { M, K }, s.activations(r, M, K, { 2, 11, 333 }))
        for _, mode in ipairs { { 6, 0 }, { 0, 0 }, { 6, C.WANE_COMPUTE_INVARIANT }, { 0.5, 0 } } do
          local function run() return s.linear(x, w, nil, C.WANE_COMPUTE_F32 + mode[2], mode[1]) end
          local want, n = s.at_level(0, run)
          s.at_levels(function(level)
            assert.is_true(s.same_bits(want, (run()), n), ("%s differs: M %d threshold %g"):format(level, M, mode[1]))
          end)
          C.wane_set_threads(1)
          local one = run()
          C.wane_set_threads(2)
          local two = run()
          C.wane_set_threads(0)
          assert.is_true(s.same_bits(one, two, n), "threads change the result")
        end
      end
    end)
  end

  for _, dtype in ipairs { "f32", "bf16", "f16" } do
    it(dtype .. ": the reference's bits for rows with NaN, infinities and zeros, with a bias, few rows and many", function()
      local r = s.random(77)
      local N, K = 70, 101
      local w, bias = random_weight(r, N, K), s.tensor("f32", { N }, s.activations(r, 1, N))
      for _, M in ipairs { 5, 67, 130 } do
        local x = s.activations(r, M, K, { 2 })
        x[3], x[K + 9], x[2 * K + 100] = 0 / 0, math.huge, -math.huge
        for k = 0, K - 1 do x[3 * K + k] = 0 end
        local t = s.tensor("f32", { M, K }, x)
        if dtype ~= "f32" then
          local half = ffi.new "wane_handle"
          s.core.check(C.wane_dequantize(s.core.stream(), half, t, s.core.dtype(dtype)))
          t = half
        end
        local function number(v) return dtype == "f32" and v or s.half(dtype, v) end
        for _, threshold in ipairs { 0, 6 } do
          local function run() return s.linear(t, w, bias, C.WANE_COMPUTE_F32, threshold) end
          local want, n = s.at_level(0, run)
          s.at_levels(function(level)
            local got = run()
            local wrong
            for i = 0, n - 1 do
              local a, b = number(got[i]), number(want[i])
              if a ~= b and (a == a or b == b) then wrong = wrong or i end   -- one NaN is as good as another
            end
            assert.is_nil(wrong, ("%s: M %d threshold %g, the first element that differs"):format(level, M, threshold))
          end)
        end
      end
    end)
  end

  it("gives [0, N] for no rows", function()
    local w = random_weight(s.random(3), 7, 12)
    local _, n = s.linear(s.tensor("f32", { 0, 12 }, nil), w, nil, 0, 6)
    assert.equal(0, n)
  end)

  it("batch-invariant: a row alone and in a batch give the same bits, whatever the others' outliers", function()
    local r = s.random(9)
    local N, K, M = 40, 150, 21
    local w, x = random_weight(r, N, K), s.activations(r, M, K, { 3 })
    for m = 0, M - 1 do x[m * K + m] = 30 end
    local mode = C.WANE_COMPUTE_F32 + C.WANE_COMPUTE_INVARIANT
    s.at_levels(function(level)
      local all = s.linear(s.tensor("f32", { M, K }, x), w, nil, mode, 6)
      local plain = s.linear(s.tensor("f32", { M, K }, x), w, nil, C.WANE_COMPUTE_F32, 6)
      local moved = false
      for m = 0, M - 1 do
        local one = s.linear(s.tensor("f32", { 1, K }, x + m * K), w, nil, mode, 6)
        for n = 0, N - 1 do
          assert.equal(one[n], all[m * N + n], ("%s: row %d"):format(level, m))
          moved = moved or plain[m * N + n] ~= one[n]
        end
      end
      assert.is_true(moved, "the batch's columns should have mattered without it")
    end)
  end)

  it("keeps a NaN in its own row, and values beyond f16 finite", function()
    local r = s.random(5)
    local N, K = 9, 33
    local w, x = random_weight(r, N, K), s.activations(r, 3, K)
    x[K + 4], x[2 * K + 7] = 0 / 0, 1e6
    local wide = s.dequantized(w)
    s.at_levels(function(level)
      for _, threshold in ipairs { 0, 6 } do
        local y = s.linear(s.tensor("f32", { 3, K }, x), w, nil, 0, threshold)
        for n = 0, N - 1 do
          assert.is_true(y[n] == y[n] and y[N + n] ~= y[N + n], level)
          assert.is_true(math.abs(y[2 * N + n] - 1e6 * wide[n * K + 7]) <= 0.006 * 1e6 * math.abs(wide[n * K + 7]) + 1e4, level)
        end
      end
    end)
  end)

  it("says what is wrong", function()
    local w = random_weight(s.random(1), 4, 8)
    assert.has_error(function() s.linear(s.tensor("f32", { 1, 7 }, ffi.new "float[7]"), w, nil, 0, 6) end)
    local long = s.quantized("int8", { 1, 140000 }, 0,
      { [0] = s.tensor("i8", { 1, 140000 }, ffi.new("int8_t[?]", 140000)), [1] = s.tensor("f32", { 1 }, ffi.new "float[1]") })
    local ok, message = pcall(s.linear, s.tensor("f32", { 1, 140000 }, ffi.new("float[?]", 140000)), long, nil, 0, 6)
    assert.is_false(ok)
    assert.matches("weight%-only", message)
  end)
end)
