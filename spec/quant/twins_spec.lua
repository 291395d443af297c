-- Every instruction set against the scalar reference, bit for bit: random shapes, dtypes, block sizes and unpleasant values; and
-- the reference against a definition of its own in double precision.
local bit = require "bit"
local ffi = require "ffi"
local core = require "wane.core"
local data = require "support.safetensors"
local q = require "support.quant"
local C = core.C

local word = ffi.new "union { float f; uint32_t u; }"
local function bits(x) word.f = x return word.u end
local function float(u) word.u = u return word.f end

--- A small generator of its own (Marsaglia's xorshift), so that cases repeat.
local state = 2463534242
local function random(n)
  state = bit.bxor(state, bit.lshift(state, 13))
  state = bit.bxor(state, bit.rshift(state, 17))
  state = bit.bxor(state, bit.lshift(state, 5))
  return bit.band(state, 0x7fffffff) % n
end
local function normal()
  local sum = 0
  for _ = 1, 6 do sum = sum + random(32768) / 32768 - 0.5 end
  return sum
end

local special = { 0, -0.0, 1e-45, -1e-40, 1e-39, 2.9e-39, 3.4e38, -3e38, 65504, 65519, 65520, 6e-8, 1e-5, 1, -1 }
local fill = {
  normal = function(x, n) for i = 0, n - 1 do x[i] = normal() end end,
  outliers = function(x, n) for i = 0, n - 1 do x[i] = normal() * (random(50) == 0 and 300 or 0.02) end end,
  decades = function(x, n) for i = 0, n - 1 do x[i] = normal() * 10 ^ -random(12) end end,
  sparse = function(x, n) for i = 0, n - 1 do x[i] = i % 700 < 300 and 0 or random(2) == 0 and 0 or normal() end end,
  denormal = function(x, n) for i = 0, n - 1 do x[i] = normal() * 1e-40 end end,
  bits = function(x, n) -- any pattern, written as integers: LuaJIT would take some NaNs for tagged values
    local u = ffi.cast("uint32_t *", x)
    for i = 0, n - 1 do u[i] = random(65536) * 65536 + random(65536) end
  end,
  special = function(x, n) for i = 0, n - 1 do x[i] = special[random(#special) + 1] end end,
  poison = function(x, n) for i = 0, n - 1 do x[i] = i % 1000 == 7 and 0 / 0 or i % 900 == 450 and math.huge or normal() end end,
}

--- A tensor of n values of a kind, as f32 or cut to 16 bits by the library.
local function values(kind, dtype, shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  local x = ffi.new("float[?]", math.max(1, n))
  fill[kind](x, n)
  local h = q.upload("f32", shape, x, n * 4)
  if dtype == "f32" then return h end
  local out = core.handle_type()
  core.check(C.wane_cast(core.stream(), out, h, core.dtype(dtype)))
  return ffi.gc(out, C.wane_tensor_free)
end

local sizes = { { 0 }, { 1 }, { 2 }, { 31 }, { 32 }, { 33 }, { 64 }, { 65 }, { 7, 33 }, { 3, 100 }, { 5, 257 }, { 2, 3, 41 }, { 33, 129 }, { 1, 4097 },
  { 70, 2049 } }
local blocks = {
  nf4 = { 32, 33, 64, 100, 128, 512, 4096, 4095 }, fp4 = { 32, 64, 250, 1024, 4096 },
  ["int8-blockwise"] = { 1, 7, 64, 100, 256, 4096, 100000 }, ["int8-blockwise-unsigned"] = { 3, 256, 2048 }, int8 = { 0 },
}

describe("quantizer twins [" .. q.levels() .. "]", function()
  for kind, list in pairs(blocks) do
    it(kind .. ": codes, scales and values are the same at every level", function()
      local compared = 0
      for _, shape in ipairs(sizes) do
        for name in pairs(fill) do
          local dtype = ({ "f32", "f16", "bf16" })[random(3) + 1]
          local block = list[random(#list) + 1]
          local x, reference = values(name, dtype, shape), nil
          q.each_level(function(level)
            local got = q.fingerprint(x, kind, block)
            reference = reference or got
            for i = 1, #got do
              assert.is_true(got[i] == reference[i], ("%s: %s %s %s block %d, %s"):format(level, name, dtype, table.concat(shape, "x"), block,
                ({ "codes", "absmax", "values" })[i]))
            end
            compared = compared + 1
          end)
        end
      end
      assert.is_true(compared > 100)
    end)
  end

  it("double quantization is the same at every level", function()
    for _, kind in ipairs { "nf4", "fp4" } do
      for _, shape in ipairs { { 0, 64 }, { 1 }, { 64 }, { 129, 130 }, { 300, 641 } } do
        local x, reference = values("outliers", "f32", shape), nil
        q.each_level(function(level)
          local got = q.fingerprint(x, kind, 64, true)
          reference = reference or got
          for i = 1, 5 do assert.is_true(got[i] == reference[i], level .. " " .. kind .. " part " .. i) end
        end)
      end
    end
  end)

  it("one thread and two give the same bits", function()
    local x, reference = values("normal", "bf16", { 513, 1025 }), nil
    for _, threads in ipairs { 1, 2, 3 } do
      core.check(C.wane_set_threads(threads))
      for kind, block in pairs { nf4 = 64, int8 = 0, ["int8-blockwise"] = 100 } do
        local got = table.concat(q.fingerprint(x, kind, block))
        reference = reference or {}
        reference[kind] = reference[kind] or got
        assert.is_true(reference[kind] == got, kind)
      end
    end
    C.wane_set_threads(0)
  end)

  for _, kind in ipairs { "int8-blockwise", "int8-blockwise-unsigned" } do
    it(kind .. ": nearest code at every midpoint, its neighbours and both ends of every bucket; ties go to even", function()
      local maps = data.read "spec/fixtures/quant/maps.safetensors"      -- keeps the memory of `map`
      local map = maps[kind == "int8-blockwise" and "dynamic_signed" or "dynamic_unsigned"].data
      local list = { 1 }
      local function add(u)
        for sign = 0, 1 do
          local x = float(u)
          if x <= 1 then list[#list + 1] = sign == 0 and x or -x end
        end
      end
      for i = 0, 254 do
        local middle = bits(math.abs(float(bits((map[i] + map[i + 1]) * 0.5))))
        for d = -3, 3 do add(middle + d) end
        add(bits(math.abs(map[i])))
      end
      for octave = 127 - 25, 127 do
        for mantissa = 0, 127 do
          local first = bit.bor(bit.lshift(octave, 23), bit.lshift(mantissa, 16))
          add(first)
          add(first + 65535)
        end
      end
      local n, x = #list, q.f32(list)
      q.each_level(function(level)
        local codes = q.values(q.part(q.quantize(x, kind, n), C.WANE_PART_CODES), "uint8_t")
        for i = 1, n do
          local v, code = list[i], codes[i - 1]
          local own = math.abs(map[code] - v)
          for _, other in ipairs { code - 1, code + 1 } do
            if other >= 0 and other <= 255 then
              local theirs = math.abs(map[other] - v)
              -- The boundary is the midpoint rounded to f32: allow half an ulp of it on both sides.
              local slack = math.abs(v) * 2 ^ -23
              assert.is_true(own <= theirs + slack, ("%s: %.9g took code %d"):format(level, v, code))
              if own == theirs then assert.equal(0, code % 2, ("%s: %.9g is a tie"):format(level, v)) end
            end
          end
        end
      end)
    end)
  end

  it("4-bit: nearest level, thresholds belong to the lower code", function()
    local maps = data.read "spec/fixtures/quant/maps.safetensors"
    local list = { 1 }
    for i = 0, 14 do
      local t = maps.nf4_thresholds.data[i]
      for d = -2, 2 do
        local sign = t < 0 and -1 or 1
        list[#list + 1] = sign * float(bits(math.abs(t)) + sign * d)
      end
    end
    while #list % 64 ~= 0 do list[#list + 1] = 0 end
    q.each_level(function(level)
      local packed = q.values(q.part(q.quantize(q.f32(list), "nf4", 4096), C.WANE_PART_CODES), "uint8_t")
      for i = 0, 14 do
        for d = -2, 2 do
          local at = 1 + i * 5 + d + 2
          local byte = packed[math.floor(at / 2)]
          local code = at % 2 == 0 and bit.rshift(byte, 4) or bit.band(byte, 15)
          assert.equal(d > 0 and i + 1 or i, code, ("%s: threshold %d %+d ulp"):format(level, i, d))
        end
      end
    end)
  end)

  it("a block with NaN or infinity dequantizes to NaN and leaves its neighbours alone", function()
    local list = {}
    for i = 1, 192 do list[i] = i / 192 end
    list[10], list[70] = 0 / 0, -math.huge
    q.each_level(function()
      for kind, block in pairs { nf4 = 64, fp4 = 64, ["int8-blockwise"] = 64, int8 = 0 } do
        local y = q.values(q.dequantize(q.quantize(q.f32(list, { 3, 64 }), kind, block)), "float")
        for i = 0, 191 do
          if i < 128 then assert.is_true(y[i] ~= y[i], kind) else assert.is_true(math.abs(y[i] - list[i + 1]) < 0.2, kind) end
        end
      end
    end)
  end)

  it("errors on N(0,1) are those of exact nearest rounding", function()
    local n = 1048576
    local x = ffi.new("float[?]", n)
    local h = core.handle_type()
    local sizes1 = core.shape { n }
    core.check(C.wane_random(core.stream(), h, C.WANE_NORMAL, 0, 1, 5, 0, C.WANE_F32, 1, sizes1))
    ffi.copy(x, q.bytes(h), n * 4)
    -- Mean |error|: measured for exact nearest codes over a megabyte of N(0,1).
    for _, case in ipairs { { "nf4", 64, 0.072798 }, { "nf4", 4096, 0.092547 }, { "fp4", 64, 0.096543 }, { "int8-blockwise", 64, 0.00752 },
      { "int8-blockwise", 4096, 0.01002 } } do
      local y, sum = q.values(q.dequantize(q.quantize(h, case[1], case[2])), "float"), 0
      for i = 0, n - 1 do sum = sum + math.abs(y[i] - x[i]) end
      assert.is_true(math.abs(sum / n / case[3] - 1) < 0.01, ("%s %d: mean error %.6f, expected %.6f"):format(case[1], case[2], sum / n, case[3]))
    end
  end)
end)
