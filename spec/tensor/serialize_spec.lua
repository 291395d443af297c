-- wane.save and wane.load_tensors.
local wane = require "wane"
local safetensors = require "support.safetensors"

describe("saving tensors", function()
  local path
  before_each(function() path = os.tmpname() end)
  after_each(function() os.remove(path) end)

  it("keeps one tensor of every dtype, views too", function()
    for _, dtype in ipairs { "f32", "f16", "bf16", "i8", "u8", "i32", "i64", "bool" } do
      local x = wane.arange(6):reshape(2, 3):to(dtype):t()
      assert(wane.save(path, x))
      local y = assert(wane.load_tensors(path))
      assert.equal(dtype, y:dtype())
      assert.same({ 3, 2 }, y:shape())
      assert.equal(x:bytes(), y:bytes())
    end
  end)

  it("keeps nested tables with numbers, strings and booleans", function()
    local value = { step = 10, lr = 1 / 3, name = "run", done = false, nothing = {}, big = math.huge,
      layers = { { w = wane.ones(2, 2), b = wane.zeros(0) }, { w = wane.full({ 1 }, 3, "i64") } } }
    assert(wane.save(path, value))
    local back = assert(wane.load_tensors(path))
    assert.same({ 10, 1 / 3, "run", false, math.huge }, { back.step, back.lr, back.name, back.done, back.big })
    assert.same({}, back.nothing)
    assert.same({ { 1, 1 }, { 1, 1 } }, back.layers[1].w:totable())
    assert.same({ 0 }, back.layers[1].b:shape())
    assert.same({ 3 }, back.layers[2].w:totable())
    local stored = safetensors.read(path)
    assert.equal("F32", stored["layers.1.w"].dtype)
  end)

  it("keeps quantized tensors bit for bit", function()
    for _, options in ipairs { { type = "nf4", block_size = 64, double_quant = true }, { type = "fp4" }, { type = "int8" }, { type = "int8-blockwise" } } do
      local q = wane.quant.quantize(wane.randn { 8, 96, seed = 1 }, options)
      assert(wane.save(path, { q = q }))
      local back = assert(wane.load_tensors(path)).q
      assert.equal(q:dtype(), back:dtype())
      assert.equal(q.codes:bytes(), back.codes:bytes())
      assert.is_true(q:dequantize("f32"):equal(back:dequantize("f32")))
    end
  end)

  it("reads other files by name, and writing to what was read leaves the file alone", function()
    assert(wane.checkpoint.write_safetensors(path, { a = wane.ones(3) }, { format = "pt" }))
    local a = assert(wane.load_tensors(path)).a
    a:fill(5)
    assert.same({ 5, 5, 5 }, a:totable())
    assert.same({ 1, 1, 1 }, assert(wane.load_tensors(path)).a:totable())
  end)

  it("gives nil and a message for what the world does, raises for what the caller does", function()
    local value, message, code = wane.load_tensors "/nonexistent/file.safetensors"
    assert.is_nil(value)
    assert.truthy(message:find "/nonexistent/file.safetensors")
    assert.truthy(code)
    local ok
    ok, message = wane.save("/nonexistent/file.safetensors", wane.ones(1))
    assert.is_nil(ok)
    assert.truthy(message)
    assert.has_error(function() wane.save(path, { f = print }) end)
    assert.has_error(function() wane.save(path, { [1] = wane.ones(1), [3] = wane.ones(1) }) end)
    assert(wane.checkpoint.write_safetensors(path, { a = wane.ones(3) }, { ["wane.structure"] = '{"tensor":"b"}' }))
    value, message = wane.load_tensors(path)
    assert.is_nil(value)
    assert.truthy(message:find "tensor 'b' is missing")
  end)
end)
