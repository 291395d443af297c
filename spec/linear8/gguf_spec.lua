--- Products with GGUF, blockwise 8-bit and row-wise int8 (weight-only) weights: every level against double precision over the exactly
-- dequantized weight, for few and many rows, and the backward product.
local bit = require "bit"
local ffi = require "ffi"
local s = require "linear8.support"
local C = s.C

-- { block, bytes of a block, offsets of its f16 numbers, nil | { offset of a byte, what to keep of it, what to add } }
local kinds = {
  q4_0 = { 32, 18, { 0 } }, q4_1 = { 32, 20, { 0, 2 } }, q5_0 = { 32, 22, { 0 } }, q5_1 = { 32, 24, { 0, 2 } }, q8_0 = { 32, 34, { 0 } },
  q2_k = { 256, 84, { 80, 82 } }, q3_k = { 256, 110, { 108 } }, q4_k = { 256, 144, { 0, 2 } }, q5_k = { 256, 176, { 0, 2 } }, q6_k = { 256, 210, { 208 } },
  iq4_nl = { 32, 18, { 0 } }, iq4_xs = { 256, 136, { 0 } }, mxfp4 = { 32, 17, {}, { 0, 7, 118 } }, nvfp4 = { 64, 36, {} },
  tq1_0 = { 256, 54, { 52 } }, tq2_0 = { 256, 66, { 64 } }, iq1_s = { 256, 50, { 0 } }, iq1_m = { 256, 56, {}, { 55, 0x1f, 0x20 } },
  iq2_xxs = { 256, 66, { 0 } }, iq2_xs = { 256, 74, { 0 } }, iq2_s = { 256, 82, { 0 } }, iq3_xxs = { 256, 98, { 0 } }, iq3_s = { 256, 110, { 0 } },
}

--- Random blocks: any byte is valid but the f16 factors, which become 2^-7 to 2^-3 with either sign.
local function gguf(r, kind, N, K)
  local block, bytes, halves, scale = unpack(kinds[kind])
  local row = K / block * bytes
  local data = ffi.new("uint8_t[?]", N * row)
  for i = 0, N * row - 1 do data[i] = r.integer(256) end
  for b = 0, N * K / block - 1 do
    for _, at in ipairs(halves) do data[b * bytes + at + 1] = 0x20 + r.integer(0x10) + (r.uniform() < 0.3 and 0x80 or 0) end
    if scale then data[b * bytes + scale[1]] = scale[3] + bit.band(data[b * bytes + scale[1]], scale[2]) end
  end
  return s.quantized(kind, { N, K }, 0, { [0] = s.tensor("u8", { N, row }, data) })
end

local names = { block8 = "int8-blockwise", block8u = "int8-blockwise-unsigned" }

local function block8(r, kind, N, K, block)
  local x = ffi.new("float[?]", N * K)
  for i = 0, N * K - 1 do x[i] = kind == "block8u" and r.uniform() or r.normal() end
  return s.quantize(names[kind], s.tensor("f32", { N, K }, x), block)
end

local function int8(r, N, K)
  local x = ffi.new("float[?]", N * K)
  for i = 0, N * K - 1 do x[i] = r.normal() end
  return s.quantize("int8", s.tensor("f32", { N, K }, x))
end

--- What the products of a weight are checked with: all row counts, dtypes and thread counts.
local function check(name, w, N, K, seed)
  local r = s.random(seed)
  local wide = s.dequantized(w)
  local bias = ffi.new("float[?]", N)
  for n = 0, N - 1 do bias[n] = r.normal() end
  local bias_tensor = s.tensor("f32", { N }, bias)
  for _, M in ipairs { 1, 2, 3, 5, 17, 130 } do
    local x = s.activations(r, M, K, M > 2 and { 5 } or nil)
    local want = s.product(x, wide, M, N, K, bias)
    local size = 0                                          -- of the terms of a sum: what rounding is measured by
    for m = 0, math.min(M, 17) - 1 do
      for n = 0, N - 1 do
        local sum = 0
        for k = 0, K - 1 do sum = sum + (x[m * K + k] * wide[n * K + k]) ^ 2 end
        size = math.max(size, math.sqrt(sum))
      end
    end
    local xt = s.tensor("f32", { M, K }, x)
    s.at_levels(function(level, number)
      for _, compute in ipairs { C.WANE_COMPUTE_F32, C.WANE_COMPUTE_BF16 } do
        local got, n = s.linear(xt, w, bias_tensor, compute, -1)
        local worst = s.difference(got, want, n)
        local bar = compute == C.WANE_COMPUTE_F32 and 4e-6 or 1e-3
        if compute ~= C.WANE_COMPUTE_F32 and number > 1 then                   -- bf16 tiles; levels of a map as bf16
          bar = M > 8 and 2e-2 or name:find "^block8" and 4e-3 or bar
        end
        assert.is_true(worst <= bar * size, ("%s %s: M %d compute %d differs by %.3g of %.3g"):format(name, level, M, compute, worst, size))
        C.wane_set_threads(1)
        local one = s.linear(xt, w, bias_tensor, compute, -1)
        C.wane_set_threads(0)
        assert.is_true(s.same_bits(one, got, n), name .. " " .. level .. ": threads change the result")
      end
    end)
  end
end

describe("few and many rows times a GGUF weight", function()
  for kind, k in pairs(kinds) do
    local block = k[1]
    for i, shape in ipairs { { 17, block * 3 }, { 1, block < 256 and 17 * block or 256 }, { 35, block < 256 and block or 512 } } do
      it(("%s [%d, %d]: f32 within 4e-6, bf16 within 1e-3 of the terms; the same for 1 and 2 threads"):format(kind, shape[1], shape[2]), function()
        check(kind, gguf(s.random(100 * i + k[2]), kind, shape[1], shape[2]), shape[1], shape[2], i)
      end)
    end
  end

  it("more weight rows than a chunk, and a row count of every rest", function()
    local w = gguf(s.random(8), "q4_k", 333, 256)
    check("q4_k", w, 333, 256, 3)
  end)
end)

describe("few and many rows times an 8-bit weight", function()
  for _, c in ipairs { { "block8", 33, 37, 64 }, { "block8", 17, 300, 4096 }, { "block8u", 9, 256, 256 }, { "block8", 21, 320, 64 },
                       { "block8", 7, 192, 4096 }, { "block8", 5, 520, 7 }, { "block8", 1, 1, 64 } } do
    it(("%s [%d, %d] in blocks of %d"):format(unpack(c)), function() check(c[1], block8(s.random(c[2]), c[1], c[2], c[3], c[4]), c[2], c[3], c[4]) end)
  end

  for _, K in ipairs { 130, 192 } do it(("block8 [6, %d] obeys a stored map that is not the usual one"):format(K), function()
    local r = s.random(77)
    local N, block = 6, 64
    local codes, map = ffi.new("uint8_t[?]", N * K), ffi.new "float[256]"
    local blocks = math.ceil(N * K / block)
    local absmax = ffi.new("float[?]", blocks)
    for i = 0, N * K - 1 do codes[i] = r.integer(256) end
    for i = 0, 255 do map[i] = math.sin(i) end
    for b = 0, blocks - 1 do absmax[b] = 0.1 + r.uniform() end
    local w = s.quantized(names.block8, { N, K }, block, { [0] = s.tensor("u8", { N, K }, codes), [1] = s.tensor("f32", { blocks }, absmax),
                                                       [C.WANE_PART_CODE] = s.tensor("f32", { 256 }, map) })
    check("block8", w, N, K, 5)
  end) end

  it("block8 obeys the usual map with -1 as its first value, as old CPU builds of bitsandbytes stored it", function()
    local r = s.random(78)
    local q = block8(r, "block8", 8, 256, 128)
    local h
    local parts = {}
    for _, part in ipairs { 0, 1, tonumber(C.WANE_PART_CODE) } do
      h = ffi.new "wane_handle"
      s.core.check(C.wane_quantized_part(s.core.stream(), h, q, part))
      parts[part] = h
    end
    local codes, map = s.read(parts[0]), s.read(parts[tonumber(C.WANE_PART_CODE)])
    map[0] = -1
    for i = 0, 8 * 256 - 1, 5 do codes[i] = 0 end
    parts[0], parts[tonumber(C.WANE_PART_CODE)] = s.tensor("u8", { 8, 256 }, codes), s.tensor("f32", { 256 }, map)
    check("block8", s.quantized(names.block8, { 8, 256 }, 128, parts), 8, 256, 6)
  end)

  for _, c in ipairs { { 33, 37 }, { 65, 600 }, { 1, 1 }, { 16, 256 } } do
    it(("int8 weight-only [%d, %d]"):format(unpack(c)), function() check("int8", int8(s.random(c[2]), c[1], c[2]), c[1], c[2], c[1]) end)
  end
end)

describe("a row alone and in a batch", function()
  local weights = {
    q4_0 = function(r) return gguf(r, "q4_0", 19, 288) end, q6_k = function(r) return gguf(r, "q6_k", 19, 512) end,
    q4_k = function(r) return gguf(r, "q4_k", 19, 512) end, iq4_nl = function(r) return gguf(r, "iq4_nl", 19, 288) end,
    block8 = function(r) return block8(r, "block8", 19, 300, 64) end,
    int8 = function(r) return int8(r, 19, 300) end,
  }
  for name, make in pairs(weights) do
    it(name .. ": the same bits when batch-invariant", function()
      local r = s.random(41)
      local w = make(r)
      local info = ffi.new "wane_info"
      s.core.check(C.wane_tensor_info(w, info))
      local N, K, M = tonumber(info.shape[0]), tonumber(info.shape[1]), 23
      local x = s.activations(r, M, K)
      s.at_levels(function(level)
        for _, compute in ipairs { C.WANE_COMPUTE_F32, C.WANE_COMPUTE_BF16 } do
          local mode = compute + C.WANE_COMPUTE_INVARIANT
          local all = s.linear(s.tensor("f32", { M, K }, x), w, nil, mode, -1)
          for m = 0, M - 1 do
            local one = s.linear(s.tensor("f32", { 1, K }, x + m * K), w, nil, mode, -1)
            for n = 0, N - 1 do assert.equal(one[n], all[m * N + n], ("%s %s row %d"):format(name, level, m)) end
          end
        end
      end)
    end)
  end
end)

describe("the backward product", function()
  local weights = {
    q8_0 = function(r) return gguf(r, "q8_0", 21, 96) end, mxfp4 = function(r) return gguf(r, "mxfp4", 21, 96) end,
    q4_k = function(r) return gguf(r, "q4_k", 21, 256) end,
    block8 = function(r) return block8(r, "block8", 21, 100, 64) end, int8 = function(r) return int8(r, 21, 70) end,
  }
  for name, make in pairs(weights) do
    it(name .. ": dx = dy W within 4e-6 of the terms", function()
      local r = s.random(43)
      local w = make(r)
      local wide, count = s.dequantized(w)
      local N = 21
      local K = count / N
      local turned = ffi.new("float[?]", count)
      for n = 0, N - 1 do
        for k = 0, K - 1 do turned[k * N + n] = wide[n * K + k] end
      end
      for _, M in ipairs { 1, 5, 40 } do
        local dy = s.activations(r, M, N)
        local want = s.product(dy, turned, M, K, N)
        s.at_levels(function(level)
          local got, n = s.linear_backward(s.tensor("f32", { M, N }, dy), w)
          local worst, top = s.difference(got, want, n)
          assert.is_true(worst <= 4e-6 * top, ("%s %s: differs by %.3g of %.3g"):format(name, level, worst, top))
        end)
      end
    end)
  end
end)

describe("few rows in 16-bit floats", function()
  it("q4_0: x and y in bf16 and f16, one rounding away", function()
    local r = s.random(12)
    local w = gguf(r, "q4_0", 11, 96)
    for _, dtype in ipairs { "bf16", "f16" } do
      local short, wide = ffi.new "uint16_t[288]", ffi.new "float[288]"
      for i = 0, 287 do
        short[i] = (dtype == "bf16" and 0x3f00 or 0x3800) + r.integer(256) + (r.uniform() < 0.5 and 0x8000 or 0)
        wide[i] = s.half(dtype, short[i])
      end
      s.at_levels(function(level)
        local got, n = s.linear(s.tensor(dtype, { 3, 96 }, short), w, nil, C.WANE_COMPUTE_F32, 0)
        local want = s.linear(s.tensor("f32", { 3, 96 }, wide), w, nil, C.WANE_COMPUTE_F32, 0)
        for i = 0, n - 1 do assert.is_true(math.abs(s.half(dtype, got[i]) - want[i]) <= math.abs(want[i]) / 250 + 1e-6, level) end
      end)
    end
  end)
end)
