-- wane.quant: what a script or the REPL uses.
local cjson = require "cjson"
local data = require "support.safetensors"
local wane = require "wane"
local core = require "wane.core"
local F = require "wane.nn.functional"
local C = core.C

local function tensor(list, ...) return wane.tensor(list, ...) end

--- The message of an error that fn must raise.
local function refusal(fn, ...)
  local ok, message = pcall(fn, ...)
  assert.is_false(ok)
  return message
end

describe("wane.quant", function()
  it("gives parts as tensors and values back", function()
    local x = wane.randn(48, 80)
    local q = wane.quant.quantize(x, { type = "nf4", block_size = 64, double_quant = true })
    assert.equal("nf4", q:dtype())
    assert.same({ 48, 80 }, q:shape())
    assert.same({ 48 * 80 / 2 }, q.codes:shape())
    assert.equal("u8", q.codes:dtype())
    assert.same({ 60 }, q.absmax:shape())
    assert.equal("u8", q.absmax:dtype())
    assert.same({ 1 }, q.nested_absmax:shape())
    assert.same({ 256 }, q.nested_code:shape())
    assert.same({ 1 }, q.offset:shape())
    assert.is_nil(q.code)
    assert.equal("bf16", q:dequantize("bf16"):dtype())
    assert.is_nil(x.codes)
    -- The offset is the mean of the single-precision scales.
    local scales = wane.quant.quantize(x, "nf4").absmax:totable()
    local sum = 0
    for _, v in ipairs(scales) do sum = sum + v end
    assert.is_true(math.abs(q.offset:item() - sum / 60) < 1e-6)
  end)

  it("keeps the shape of 8-bit codes; signed chooses the map", function()
    local x = wane.rand(6, 40)
    local rows = wane.quant.quantize(x, "int8")
    assert.same({ 6, 40 }, rows.codes:shape())
    assert.equal("i8", rows.codes:dtype())
    assert.same({ 6 }, rows.absmax:shape())
    local blocks = wane.quant.quantize(x, { type = "int8-blockwise", block_size = 100 })
    assert.same({ 6, 40 }, blocks.codes:shape())
    assert.same({ 3 }, blocks.absmax:shape())
    assert.same({ 256 }, blocks.code:shape())
    local positive = wane.quant.quantize(x, { type = "int8-blockwise", signed = false })
    assert.equal("int8-blockwise-unsigned", positive:dtype())
    assert.equal(0, positive.code:totable()[1])
    assert.is_true(wane.quant.error(x, positive).mean_abs < wane.quant.error(x, wane.quant.quantize(x, { type = "int8-blockwise" })).mean_abs)
  end)

  local expected = cjson.decode(assert(io.open "spec/fixtures/quant/errors.json"):read "*a").layers
  local schemes = { nf4 = { type = "nf4" }, ["nf4-dq"] = { type = "nf4", double_quant = true }, fp4 = { type = "fp4" },
    ["fp4-dq"] = { type = "fp4", double_quant = true }, ["int8-blockwise-256"] = { type = "int8-blockwise", block_size = 256 },
    ["int8-blockwise-4096"] = { type = "int8-blockwise" }, ["int8-rowwise"] = { type = "int8" } }
  it("reports the errors of golden data: 15 layers of a Llama, 7 schemes, to 1e-6", function()
    local file = data.read "spec/fixtures/quant/llama.safetensors"
    local worst, count = 0, 0
    for layer, results in pairs(expected) do
      local weight = file[layer .. ".weight"]
      local x = F.upload(weight.data, C.WANE_F32, weight.nbytes, weight.shape[1], weight.shape[2])
      for scheme, want in pairs(results) do
        local got = wane.quant.error(x, wane.quant.quantize(x, assert(schemes[scheme], scheme)))
        for key, value in pairs(want) do worst = math.max(worst, math.abs(got[key] / value - 1)) end
        count = count + 1
      end
    end
    assert.equal(105, count)
    assert.is_true(worst < 1e-6, ("largest relative difference %g"):format(worst))
  end)

  it("says what is wrong with the arguments, at the caller's line", function()
    local x = wane.ones(4, 64)
    assert.matches("lua_spec.lua:%d+: .*expected type nf4, fp4, int8 or int8%-blockwise, found 'q4'", refusal(function() wane.quant.quantize(x, "q4") end))
    assert.matches("no option 'blocksize'", refusal(wane.quant.quantize, x, { type = "nf4", blocksize = 64 }))
    assert.matches("block size of nf4 must lie in 32 to 4096, found 16", refusal(wane.quant.quantize, x, { type = "nf4", block_size = 16 }))
    assert.matches("block_size must be an integer", refusal(wane.quant.quantize, x, { type = "nf4", block_size = 64.5 }))
    assert.matches("double quantization is for the scales of nf4 and fp4", refusal(wane.quant.quantize, x, { type = "int8", double_quant = true }))
    assert.matches("signed = false is for int8%-blockwise", refusal(wane.quant.quantize, x, { type = "nf4", signed = false }))
    assert.matches("expected a tensor, found a number", refusal(wane.quant.quantize, 7, "nf4"))
    assert.matches("quantize takes f32, f16 or bf16", refusal(wane.quant.quantize, tensor({ 1, 2 }, "i32"), "nf4"))
    assert.matches("quantize takes f32, f16 or bf16", refusal(wane.quant.quantize, wane.quant.quantize(x, "nf4"), "nf4"))
    assert.matches("the shapes differ: %[4, 64%] and %[64%]", refusal(wane.quant.error, x, wane.ones(64)))
  end)

  it("takes views, empty tensors and 16-bit floats", function()
    local x = wane.randn(33, 65)
    local transposed = wane.quant.quantize(x:t(), { type = "int8" })
    assert.same({ 65, 33 }, transposed:shape())
    assert.is_true(wane.quant.error(x:t(), transposed).rel_frobenius < 0.01)
    for _, kind in ipairs { "nf4", "fp4", "int8", "int8-blockwise" } do
      for _, shape in ipairs { { 0, 64 }, { 64, 0 }, { 0 } } do
        local empty = wane.zeros(unpack(shape))
        local q = wane.quant.quantize(empty, kind)
        assert.same(shape, q:dequantize():shape())
        if kind == "int8" then assert.same({ #shape == 2 and shape[1] or 1 }, q.absmax:shape()) end
        assert.equal(0, wane.quant.error(empty, q).max_abs)
      end
    end
    local half = x:to "bf16"
    assert.is_true(wane.quant.error(half, wane.quant.quantize(half, "nf4")).rel_frobenius < 0.12)
  end)

  it("reads NaNs of any bits as numbers", function()
    local ffi = require "ffi"
    local bits = ffi.new("uint32_t[3]", 0xffffffff, 0xfffe0123, 0x3f800000)
    local list = F.upload(bits, C.WANE_F32, 12, 3):totable()
    assert.equal("number", type(list[1]))
    assert.is_true(list[1] ~= list[1] and list[2] ~= list[2])
    assert.equal(1, list[3])
  end)
end)
