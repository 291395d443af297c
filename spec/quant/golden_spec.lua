-- The quantizers against golden data (spec/fixtures/make/quant.py: the CUDA kernels' rules in numpy): bit for bit, at every
-- instruction-set level that the machine or build has.
local ffi = require "ffi"
local core = require "wane.core"
local data = require "support.safetensors"
local q = require "support.quant"
local C = core.C

local dir = "spec/fixtures/quant/"
local upload_name = { F32 = "f32", F16 = "f16", BF16 = "bf16" }

local function upload(tensor) return q.upload(upload_name[tensor.dtype], tensor.shape, tensor.data, tensor.nbytes) end

--- Every (case, block size) of a file: fn(case name, block size).
local function cases(tensors, fn)
  for name in pairs(tensors) do
    local case, block = name:match "^(.*)/(%d+)/absmax$"
    if case then fn(case, tonumber(block)) end
  end
end

--- Compares the bytes of a part or of values with the file's; names the case.
local function same(h, tensor, what)
  if q.bytes(h) ~= data.bytes(tensor) then error(what .. ": bytes differ from the golden data", 0) end
end

describe("quantizers, golden data [" .. q.levels() .. "]", function()
  it("blockwise 8-bit: 543 cases, codes, absmax and values, difference 0", function()
    local t = data.read(dir .. "blockwise8.safetensors")
    q.each_level(function(level)
      local count = 0
      cases(t, function(case, block)
        local kind = case:match "^unsigned" and "int8-blockwise-unsigned" or "int8-blockwise"
        local x, key = t[case .. "/x"], case .. "/" .. block
        local got = q.quantize(upload(x), kind, block)
        same(q.part(got, C.WANE_PART_CODES), t[key .. "/codes"], level .. " " .. key .. " codes")
        same(q.part(got, C.WANE_PART_ABSMAX), t[key .. "/absmax"], level .. " " .. key .. " absmax")
        if t[key .. "/y"] then same(q.dequantize(got, upload_name[x.dtype]), t[key .. "/y"], level .. " " .. key .. " values") end
        count = count + 1
      end)
      assert.equal(543, count)
    end)
  end)

  for _, kind in ipairs { "nf4", "fp4" } do
    it(kind .. ": 256 cases, packed codes, absmax, values in f32, bf16, f16, difference 0", function()
      local t = data.read(dir .. kind .. ".safetensors")
      q.each_level(function(level)
        local count = 0
        cases(t, function(case, block)
          local key = case .. "/" .. block
          local got = q.quantize(upload(t[case .. "/x"]), kind, block)
          same(q.part(got, C.WANE_PART_CODES), t[key .. "/packed"], level .. " " .. key .. " codes")
          same(q.part(got, C.WANE_PART_ABSMAX), t[key .. "/absmax"], level .. " " .. key .. " absmax")
          for suffix, dtype in pairs { y = "f32", y_bf16 = "bf16", y_f16 = "f16" } do
            local want = t[key .. "/" .. suffix]
            if want then same(q.dequantize(got, dtype), want, level .. " " .. key .. " " .. suffix) end
          end
          count = count + 1
        end)
        assert.equal(256, count)
      end)
    end)

    it(kind .. " double quantization: offset to 1e-6, nested codes off by one at most in 0.5 %; exact values from the file's parts", function()
      local t = data.read(dir .. kind .. ".safetensors")
      local maps = data.read(dir .. "maps.safetensors")
      q.each_level(function(level)
        local codes, off, worst, count = 0, 0, 0, 0
        for name, offset in pairs(t) do
          local case = name:match "^(.*)/64/nested/offset$"
          if case then
            local key = case .. "/64/nested"
            local x = t[case .. "/x"]
            local got = q.quantize(upload(x), kind, 64, true)
            same(q.part(got, C.WANE_PART_CODES), t[case .. "/64/packed"], level .. " " .. key)
            local found = ffi.new "float[1]"
            core.check(core.wait())
            core.check(C.wane_quantized_offset(got, found))
            worst = math.max(worst, math.abs(found[0] - offset.data[0]) / math.max(math.abs(offset.data[0]), 1e-30))
            local want = t[key .. "/absmax"]
            local mine = q.values(q.part(got, C.WANE_PART_ABSMAX), "uint8_t")
            for i = 0, want.numel - 1 do
              local difference = math.abs(mine[i] - want.data[i])
              assert.is_true(difference <= 1, level .. " " .. key)
              off, codes = off + difference, codes + 1
            end
            -- The stored parts alone give the stored values exactly.
            local stored = q.assemble(kind, x.shape, 64, {
              [0] = q.upload("u8", t[case .. "/64/packed"].shape, t[case .. "/64/packed"].data, t[case .. "/64/packed"].nbytes),
              q.upload("u8", want.shape, want.data, want.nbytes), upload(t[key .. "/nested_absmax"]), upload(maps.dynamic_signed),
            }, offset.data[0])
            same(q.dequantize(stored), t[key .. "/y"], level .. " " .. key .. " values of the stored parts")
            count = count + 1
          end
        end
        assert.is_true(count >= 40)
        assert.is_true(worst <= 1e-6, ("offset differs by %g"):format(worst))
        assert.is_true(off <= 0.005 * codes, ("%d of %d nested codes differ"):format(off, codes))
      end)
    end)
  end

  it("row-wise int8: codes and row maxima exact, values to 1 ulp of f32", function()
    local t = data.read(dir .. "int8.safetensors")
    q.each_level(function(level)
      for name, weight in pairs(t) do
        local case = name:match "^(.*)/weight$"
        if case then
          local got = q.quantize(upload(weight), "int8", 0)
          same(q.part(got, C.WANE_PART_CODES), t[case .. "/CB"], level .. " " .. case .. " CB")
          same(q.part(got, C.WANE_PART_ABSMAX), t[case .. "/SCB"], level .. " " .. case .. " SCB")
          same(q.dequantize(got), t[case .. "/weight_dequantized"], level .. " " .. case .. " values")
        end
      end
    end)
  end)

  it("the dynamic maps equal upstream's bit for bit", function()
    local maps = data.read(dir .. "maps.safetensors")
    for kind, name in pairs { ["int8-blockwise"] = "dynamic_signed", ["int8-blockwise-unsigned"] = "dynamic_unsigned" } do
      same(q.part(q.quantize(q.f32 { 1 }, kind, 64), C.WANE_PART_CODE), maps[name], name)
    end
  end)

  it("GGUF blocks decode as the gguf package does, difference 0", function()
    local t = data.read(dir .. "gguf.safetensors")
    q.each_level(function(level)
      local count = 0
      for name, blocks in pairs(t) do
        local kind = name:match "^(.*)/blocks$"
        if kind then
          local want = t[kind .. "/values"]
          local w = assert(q.assemble(kind, want.shape, 0, { [0] = q.upload("u8", blocks.shape, blocks.data, blocks.nbytes) }))
          same(q.dequantize(w), want, level .. " " .. kind)
          count = count + 1
        end
      end
      assert.equal(23, count)
    end)
  end)
end)
