-- The Tensor class: making, indexing, views, reading, printing, and what misuse says. Values of the operations themselves are
-- checked against numpy in numpy_spec.lua.
local ffi = require "ffi"
local wane = require "wane"
local Tensor = wane.Tensor

local function t2(...) return wane.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, ...) end

--- The message of the error that fn raises, which must name this file.
local function message_of(fn, ...)
  local ok, message = pcall(fn, ...)
  assert.is_false(ok)
  assert.truthy(tostring(message):find("tensor_spec.lua:%d+: ", 1), "not at the caller's line: " .. tostring(message))
  return (tostring(message):gsub("^.-tensor_spec.lua:%d+: ", ""))
end

describe("making tensors", function()
  it("from numbers, booleans and nested lists", function()
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, t2():totable())
    assert.equal("f32", t2():dtype())
    assert.equal(7, wane.tensor(7):item())
    assert.same({}, wane.tensor(7):shape())
    assert.same({ true, false }, wane.tensor({ true, false }):totable())
    assert.same({ 0, 3 }, wane.zeros(0, 3):shape())
    assert.same({}, wane.tensor({}):totable())
    assert.same({ { -128, 127 } }, wane.tensor({ { -128, 127 } }, "i8"):totable())
    assert.same({ 2 ^ 53, -2 ^ 53 }, wane.tensor({ 2 ^ 53, -2 ^ 53 }, "i64"):totable())
  end)

  it("rounds 16-bit floats once", function()
    assert.equal(2048, wane.tensor({ 2049 }, "f16"):totable()[1])
    assert.equal(1, wane.tensor({ 1 + 2 ^ -8 }, "bf16"):totable()[1])
    assert.equal(1 + 2 ^ -7, wane.tensor({ 1 + 2 ^ -8 + 2 ^ -20 }, "bf16"):totable()[1])
    assert.equal(math.huge, wane.tensor({ 65520 }, "f16"):totable()[1])
  end)

  it("refuses what is no rectangle of numbers", function()
    assert.truthy(message_of(wane.tensor, { { 1, 2 }, { 3 } }):find "uneven lists: expected 2 entries at depth 2, found 1")
    assert.truthy(message_of(wane.tensor, { 1, "x" }):find "found a string")
    assert.truthy(message_of(wane.tensor, { 300 }, "u8"):find "300 is no u8")
    assert.truthy(message_of(wane.tensor, { 1.5 }, "i32"):find "1.5 is no i32")
    assert.truthy(message_of(wane.tensor, { 1 }, "f23"):find "no dtype 'f23'")
    assert.truthy(message_of(wane.tensor, { 1 }, "nf4"):find "wane.quant.quantize")
  end)

  it("by size, value and sequence", function()
    assert.same({ { 0, 0 } }, wane.zeros(1, 2):totable())
    assert.same({ 1, 1 }, wane.ones({ 2 }, "i32"):totable())
    assert.same({ { 0.5 } }, wane.full({ 1, 1 }, 0.5):totable())
    assert.same({ 0, 1, 2 }, wane.arange(3):totable())
    assert.same({ 5, 3, 1 }, wane.arange(5, 0, -2, "i64"):totable())
    assert.same({ { 1, 0, 0 }, { 0, 1, 0 } }, wane.eye(2, 3):totable())
    assert.truthy(message_of(wane.arange, 0, 1, 0):find "step not 0")
    assert.truthy(message_of(wane.zeros, -1):find "negative")
    assert.truthy(message_of(wane.zeros, 2 ^ 40, 2 ^ 40):find "overflow")
    assert.truthy(message_of(wane.zeros, 0, 2 ^ 40, 2 ^ 40):find "overflow")
    assert.truthy(message_of(wane.zeros, 1, 1, 1, 1, 1, 1, 1, 1, 1):find "at most 8")
  end)

  it("from buffers, and back", function()
    local data = ffi.new("float[4]", 1, 2, 3, 4)
    assert.same({ { 1, 2 }, { 3, 4 } }, wane.from_buffer(data, "f32", { 2, 2 }):totable())
    local bytes = wane.tensor({ 1, 2 }, "bf16"):bytes()
    assert.equal("\128\63\0\64", bytes)
    assert.same({ 1, 2 }, wane.from_buffer(bytes, "bf16", { 2 }):totable())
    assert.truthy(message_of(wane.from_buffer, "abc", "f32", { 2 }):find "takes 8 bytes, the buffer has 3")
  end)

  it("at random, repeatably", function()
    assert.is_true(wane.randn({ 3, 5, seed = 42 }):equal(wane.randn { 3, 5, seed = 42 }))
    assert.is_false(wane.randn({ 3, 5, seed = 42 }):equal(wane.randn { 3, 5, seed = 43 }))
    wane.manual_seed(5)
    local a, b = wane.rand(10), wane.rand(10)
    wane.manual_seed(5)
    assert.is_true(a:equal(wane.rand(10)) and b:equal(wane.rand(10)))
    assert.is_false(a:equal(b))
    local x = wane.randn { 1000, 100, seed = 1 }
    assert.is_true(math.abs(x:mean():item()) < 0.01)
    assert.is_true(math.abs(x:std():item() - 1) < 0.01)
    local u = wane.rand({ 100000, seed = 3 }, "f16")
    assert.is_true(u:amax():item() < 1 and u:amin():item() >= 0)
    local i = wane.randint(3, 6, { 1000, seed = 1 })
    assert.same({ 3, 5 }, { i:amin():item(), i:amax():item() })
  end)
end)

describe("indexing", function()
  it("selects rows and values from 1 on, negative from the end", function()
    local x = t2()
    assert.same({ 4, 5, 6 }, x[2]:totable())
    assert.same({ 4, 5, 6 }, x[-1]:totable())
    assert.equal(6, x[2][3])
    assert.equal(6, x[{ -1, -1 }])
    assert.equal(true, wane.tensor({ true })[1])
  end)

  it("slices", function()
    local x = wane.arange(20):reshape(4, 5)
    assert.same({ { 5, 6 }, { 10, 11 } }, x[{ { 2, 3 }, { 1, 2 } }]:totable())
    assert.same({ 1, 6, 11, 16 }, x[{ {}, 2 }]:totable())
    assert.same({ { 0, 2, 4 } }, x[{ { 1 }, { 1, -1, 2 } }]:totable())
    assert.same({ 4, 5 }, x[{}]:shape())
  end)

  it("by masks and index tensors", function()
    local x = t2()
    assert.same({ 5, 6 }, x[x:gt(4)]:totable())
    assert.same({ { 4, 5, 6 }, { 1, 2, 3 } }, x[wane.tensor({ 1, 0 }, "i64")]:totable())
    assert.same({ { 0, 2 }, { 1, 0 } }, wane.tensor({ { 0, 0, 3 }, { 9, 0, 0 } }):nonzero():totable())
  end)

  it("assigns to parts, which share the tensor's memory", function()
    local x = wane.zeros(3, 3)
    x[1] = 1
    x[{ {}, 3 }] = wane.tensor { 7, 8, 9 }
    local all = wane.zeros(2)
    all[{ {} }] = 5
    all[{}] = all + 1
    assert.same({ 6, 6 }, all:totable())
    local one = wane.tensor(3)
    assert.equal(6, one[{}] + one[{}])
    x[{ 2, { 1, 2 } }] = { 4, 5 }
    x[{ 3, 1 }] = -1
    assert.same({ { 1, 1, 7 }, { 4, 5, 8 }, { -1, 0, 9 } }, x:totable())
    x[x:lt(1)] = 100
    assert.same({ { 1, 1, 7 }, { 4, 5, 8 }, { 100, 100, 9 } }, x:totable())
    local row = x[1]
    row:fill(0)
    assert.equal(0, x[1][3])
  end)

  it("copies between overlapping parts as if through a copy", function()
    local x = wane.arange(6)
    x[{ { 2, 6 } }] = x[{ { 1, 5 } }]
    assert.same({ 0, 0, 1, 2, 3, 4 }, x:totable())
    local m = wane.arange(9):reshape(3, 3)
    m:copy(m:t())
    assert.same({ { 0, 3, 6 }, { 1, 4, 7 }, { 2, 5, 8 } }, m:totable())
  end)

  it("says what does not exist", function()
    local x = t2()
    assert.truthy(message_of(function() return x[3] end):find "position 3 is outside dimension 1 of %[2, 3%] f32 %(1 to 2")
    assert.truthy(message_of(function() return x[0] end):find "position 0 is outside")
    assert.truthy(message_of(function() return x[{ 1, 1, 1 }] end):find "3 entries for %[2, 3%] f32")
    assert.truthy(message_of(function() return x[{ { 2, 1 } }] end):find "runs backwards")
    assert.truthy(message_of(function() x[1] = { 1, 2 } end):find "copy: shapes %[3%] f32 and %[2%] f32 do not broadcast")
    assert.truthy(message_of(function() x[1] = "a" end):find "found a string")
    assert.truthy(message_of(function() x:expand(4, 2, 3):fill(1) end):find "expanded view")
    assert.is_nil(x.no_such_method)
    x.grad = 5
    assert.equal(5, x.grad)
  end)

  it("reports an index outside the tensor once, with the operation's name", function()
    local y = t2():index_select(1, wane.tensor({ 0, 7 }, "i64"))
    assert.truthy(message_of(y.totable, y):find "index 7 is out of range: the dimension has 2 elements")
    assert.same({ { 4, 5, 6 } }, t2():index_select(1, wane.tensor({ -1 }, "i64")):totable())
  end)
end)

describe("views", function()
  it("share memory", function()
    local x = t2()
    x:t()[1]:fill(0)
    x:narrow(2, 3, 1):fill(9)
    x:view(6)[2] = 8
    x:unsqueeze(1):select(3, 2):narrow(2, 2, 1):fill(7)
    assert.same({ { 0, 8, 9 }, { 0, 7, 9 } }, x:totable())
  end)

  it("have the shapes that Torch gives them", function()
    local x = wane.arange(24):reshape(2, 3, 4)
    assert.same({ 4, 2, 3 }, x:permute(3, 1, 2):shape())
    assert.same({ 4, 3, 2 }, x:transpose(1, -1):shape())
    assert.same({ 6, 4 }, x:flatten(1, 2):shape())
    assert.same({ 24 }, x:flatten():shape())
    assert.same({ 2, 12 }, x:view(2, -1):shape())
    assert.same({ 2, 3, 4, 1 }, x:unsqueeze(-1):shape())
    assert.same({ 2, 3, 4 }, x:unsqueeze(2):squeeze(2):shape())
    assert.same({ 5, 2, 3, 4 }, x:expand(5, -1, -1, -1):shape())
    assert.same({ 12, 4, 1 }, x:stride())
    assert.equal(3, x:size(2))
    assert.equal(24, x:numel())
    assert.equal(96, x:nbytes())
    local parts = x:split(2, 2)
    assert.equal(2, #parts)
    assert.same({ 2, 1, 4 }, parts[2]:shape())
    assert.same({ { 2, 1, 4 }, { 2, 2, 4 } }, { x:split({ 1, 2 }, 2)[1]:shape(), x:split({ 1, 2 }, 2)[2]:shape() })
    assert.equal(2, #x:chunk(3, 3))             -- parts of 2, as Torch has it
    assert.is_false(x:transpose(1, 2):is_contiguous())
    assert.is_true(x:transpose(1, 2):contiguous():is_contiguous())
  end)

  it("copy only where they must", function()
    local x = wane.arange(6):reshape(2, 3)
    assert.truthy(message_of(function() return x:t():view(6) end):find "make it contiguous first")
    assert.same({ 0, 3, 1, 4, 2, 5 }, x:t():reshape(6):totable())
    x:reshape(6)[1] = 5
    assert.equal(5, x[1][1])
  end)

  it("say what does not fit", function()
    local x = t2()
    assert.truthy(message_of(x.view, x, 4, 2):find "6 elements, the new shape 8")
    assert.truthy(message_of(x.narrow, x, 2, 2, 3):find "do not lie in dimension 2 of %[2, 3%] f32")
    assert.truthy(message_of(x.select, x, 3, 1):find "has no dimension 3 %(1 to 2")
    assert.truthy(message_of(x.permute, x, 1, 1):find "named twice")
    assert.truthy(message_of(x.expand, x, 4, 3):find "only sizes of 1 repeat")
    assert.truthy(message_of(x.split, x, { 1 }, 1):find "the sizes sum to 1")
    assert.truthy(message_of(x.reshape, x, 4):find "6 elements, the new shape 4")
  end)
end)

describe("arithmetic", function()
  it("broadcasts and takes numbers on either side", function()
    local x = wane.tensor { { 1, 2 }, { 3, 4 } }
    assert.same({ { 11, 22 }, { 13, 24 } }, (x + wane.tensor { 10, 20 }):totable())
    assert.same({ { 9, 8 }, { 7, 6 } }, (10 - x):totable())
    assert.same({ { 2, 1 }, { 0.5, 0.25 } }, (2 ^ (2 - x)):totable())
    assert.same({ { 12, 6 }, { 4, 3 } }, (12 / x):totable())
    assert.same({ { -1, -2 }, { -3, -4 } }, (-x):totable())
    assert.same({ 2, 1, 0 }, (wane.tensor({ -1, 1, 3 }, "i32") % 3):totable())
    assert.same({ { true, false }, { false, false } }, x:lt(2):totable())
  end)

  it("keeps dtypes as wane.h says", function()
    local function dtype(a, b) return (wane.ones({ 1 }, a) + wane.ones({ 1 }, b)):dtype() end
    assert.equal("i32", dtype("u8", "i8"))
    assert.equal("f32", dtype("f16", "bf16"))
    assert.equal("bf16", dtype("i64", "bf16"))
    assert.equal("i64", dtype("bool", "i64"))
    assert.equal("f16", (wane.ones({ 1 }, "f16") * 0.1):dtype())
    assert.equal("i32", (wane.ones({ 1 }, "i32") * 2):dtype())
    assert.equal("f32", (wane.ones({ 1 }, "i32") * 0.5):dtype())
    assert.equal("f32", (wane.ones({ 1 }, "i32") / wane.ones({ 1 }, "i32")):dtype())
    assert.equal("i64", (wane.ones({ 1 }, "bool") + 1):dtype())
    assert.equal("i64", wane.ones({ 3 }, "u8"):sum():dtype())
  end)

  it("propagates NaN through extremes, and sorts it last", function()
    local nan = 0 / 0
    local x = wane.tensor { 1, nan, -2 }
    assert.is_true(x:amax():item() ~= x:amax():item())
    assert.equal(1, x:argmax():item())
    local up, order = x:sort()
    assert.same({ -2, 1 }, up[{ { 1, 2 } }]:totable())
    assert.same({ 2, 0, 1 }, order:totable())
    assert.same({ 0, 2, 1 }, x:argsort(1, true):totable())
    assert.same({ 0, 2 }, select(2, x:topk(2)):totable())
  end)

  it("gives the lowest index of equals", function()
    local x = wane.tensor { { 3, 3, 1 }, { 0, 2, 2 } }
    assert.same({ 0, 1 }, x:argmax(2):totable())
    assert.same({ 2, 0 }, x:argmin(-1):totable())
    local long = wane.zeros(100000)
    long[70000], long[90000] = 1, 1
    assert.equal(69999, long:argmax():item())
    assert.same({ 0, 1, 2 }, select(2, wane.ones(3):sort(1, true)):totable())
    local zeros = wane.tensor { 0, 1, 0 } * -1                   -- -0, -1, -0
    zeros[1] = 0
    assert.same({ 1, 0, 2 }, zeros:argsort():totable())
    assert.same({ 0, 2, 1 }, zeros:argsort(1, true):totable())
  end)

  it("reduces over everything, one dimension or several", function()
    local x = wane.arange(24):reshape(2, 3, 4)
    assert.equal(276, x:sum():item())
    assert.same({ 60, 92, 124 }, x:sum({ 1, 3 }):totable())
    assert.same({ 1, 3, 1 }, x:sum({ 1, -1 }, true):shape())
    assert.same({ { 12, 13, 14, 15 }, { 16, 17, 18, 19 }, { 20, 21, 22, 23 } }, (x:max(1)):totable())
    assert.equal(0, wane.zeros(0):sum():item())
    assert.equal(23, x:max():item())
    assert.equal(3, wane.tensor({ 3, -4 }):norm(math.huge):item() - 1)
    assert.equal(5, wane.tensor({ 3, 4 }):norm():item())
    assert.truthy(message_of(function() return wane.zeros(0, 2):amax(1) end):find "no largest or smallest of nothing")
    assert.truthy(message_of(x.sum, x, 4):find "sum: %[2, 3, 4%] f32 has no dimension 4")
  end)

  it("selects by condition", function()
    local x = t2()
    assert.same({ { 0, 0, 3 }, { 4, 5, 6 } }, wane.where(x:gt(2), x, 0):totable())
    assert.same({ { -1, 2, -1 }, { 4, -1, 6 } }, x:masked_fill((x % 2):eq(1), -1):totable())
    assert.same({ { 2, 2, 3 }, { 4, 4, 4 } }, x:clamp(2, 4):totable())
    assert.same({ { 1, 0, 0 }, { 4, 5, 0 } }, x:tril():totable())
    assert.same({ { 0, 2, 3 }, { 0, 0, 6 } }, x:triu(1):totable())
  end)

  it("multiplies matrices of any strides", function()
    local x = t2()
    assert.same({ { 14, 32 }, { 32, 77 } }, x:matmul(x:t()):totable())
    assert.equal(14, x[1]:dot(x[1]):item())
    assert.same({ { 1, 2 }, { 2, 4 } }, wane.tensor({ 1, 2 }):outer(wane.tensor { 1, 2 }):totable())
    assert.truthy(message_of(x.matmul, x, x):find "matmul: %[2, 3%] f32 times %[2, 3%] f32: the inner sizes 3 and 2 differ")
  end)

  it("names shapes and types of what does not fit", function()
    local x = t2()
    assert.truthy(message_of(function() return x + wane.zeros(2) end):find "shapes %[2, 3%] f32 and %[2%] f32 do not broadcast: sizes 3 and 2")
    assert.truthy(message_of(function() return x + {} end):find "found %[2, 3%] f32 and a table")
    assert.truthy(message_of(function() return wane.cat({ x, wane.zeros(3, 2) }, 1) end):find "cat: %[3, 2%] f32 %(number 2%) does not fit to %[2, 3%] f32")
    assert.truthy(message_of(x.index_select, x, 1, wane.tensor { 1 }):find "index is %[1%] f32; expected i32 or i64")
    assert.truthy(message_of(x.topk, x, 4):find "k = 4, but dimension 2 of %[2, 3%] f32 has only 3")
    assert.truthy(message_of(x.item, x):find "item: %[2, 3%] f32 has 6 elements")
  end)

  it("compares whole tensors", function()
    local x = t2()
    assert.is_true(x:equal(t2()))
    assert.is_false(x:equal(t2() + 1))
    assert.is_false(x:equal(x[1]))
    assert.is_true(x:allclose(x + 1e-6, 1e-5))
    assert.is_false(x:allclose(x + 1e-3, 1e-5))
    local nan = wane.tensor { 0 / 0, 1 / 0 }
    assert.is_false(nan:allclose(nan))
    assert.is_true(nan:allclose(nan, nil, nil, true))
  end)

  it("works in eight dimensions that no loop merges", function()
    local x = wane.arange(256):reshape(2, 2, 2, 2, 2, 2, 2, 2)
    local y = x:permute(8, 7, 6, 5, 4, 3, 2, 1)
    local sum = (x + y):totable()
    assert.equal(0 + 0, sum[1][1][1][1][1][1][1][1])
    assert.equal(1 + 128, sum[1][1][1][1][1][1][1][2])
    assert.equal(128 + 1, sum[2][1][1][1][1][1][1][1])
    assert.equal(32640, y:clone():sum():item())
  end)
end)

describe("results", function()
  local C = wane.core.C
  local function bytes_of(fn)
    return wane.scope(function()
      local out = { fn() }
      for i, t in ipairs(out) do out[i] = t:bytes() end
      return table.concat(out)
    end)
  end
  local function work()
    local x = wane.randn { 300, 257, seed = 9 }
    local values, order = x:sort(1)
    return x:sum(), x:mean(1), x:var(2), x:norm(), x:t():sum(1), x:cumsum(1), values, order, x:matmul(x:t()), x:t():clone(), x:half(), x:bfloat16(),
      x:exp(), x:amax(1), x:argmax()
  end

  it("are the same bits for 1, 2 and 5 threads", function()
    local expected = bytes_of(work)
    for _, n in ipairs { 1, 2, 5 } do
      wane.threads(n)
      local ok = bytes_of(work) == expected
      wane.threads(0)
      assert.is_true(ok)
    end
  end)

  it("are the same bits with the portable kernels, exponentials and products excepted", function()
    local function exact()
      local x = wane.randn { 100, 257, seed = 9 }
      return x, wane.rand { 1000, seed = 2 }, x:sum(), x:mean(1), x:var(2), x:norm(), x:prod(1), x:t():sum(1), x:cumsum(1), x:half(),
        x:bfloat16(), x:half():float(), x:int(), x / (x + 1), x:sqrt(), x:floor(), x:amax(1), x:argmin(2), x:maximum(x:t():reshape(100, 257)), x % 0.3
    end
    local level = C.wane_cpu_level()
    local expected = bytes_of(exact)
    assert(C.wane_set_cpu_level(C.WANE_CPU_GENERIC) == 0)
    local found = bytes_of(exact)
    C.wane_set_cpu_level(level)
    assert.is_true(found == expected)
  end)
end)

describe("printing", function()
  it("gives shape, dtype, device, statistics and a corner", function()
    local text = tostring(t2())
    assert.truthy(text:find("tensor [2, 3] f32 cpu", 1, true))
    assert.truthy(text:find("min 1  max 6  mean 3.5  std 1.708", 1, true))
    assert.truthy(text:find("[[1 2 3]\n [4 5 6]]", 1, true))
  end)

  it("is never a wall of digits", function()
    for _, t in ipairs { wane.randn(1000), wane.randn(300, 300), wane.randn(40, 40, 40), wane.randn(9, 9, 9, 9) } do
      local text = tostring(t)
      assert.is_true(#text < 4000, #text .. " characters")
      assert.truthy(text:find("...", 1, true))
    end
  end)

  it("counts NaN and infinities and leaves them out of the statistics", function()
    local text = tostring(wane.tensor { 1, 3, 0 / 0, 1 / 0, -1 / 0 })
    assert.truthy(text:find("min 1  max 3  mean 2  std 1  NaN 1  Inf 2", 1, true))
    assert.truthy(text:find("nan", 1, true) and text:find("-inf", 1, true))
    assert.truthy(tostring(wane.tensor { 0 / 0 }):find "nan")
  end)

  it("takes every dtype, no values, no dimensions and closed tensors", function()
    assert.truthy(tostring(wane.tensor { true, false, true }):find("true 2  false 1", 1, true))
    assert.truthy(tostring(wane.zeros(0, 3)):find "no values")
    assert.truthy(tostring(wane.tensor(2.5)):find "2.5")
    local x = wane.zeros(2)
    x:close()
    x:close()
    assert.truthy(tostring(x):find "closed")
    assert.truthy(message_of(function() return x + 1 end):find "")
  end)
end)

describe("memory", function()
  local function heap()
    local m = wane.memory()
    return m.heap, m.tensors
  end

  it("does not grow over 100000 operations in scopes", function()
    local x = wane.randn(10, 10)
    local function round()
      wane.scope(function() return ((x + 1) * 2 - x:t()):sum(1):sum():item() end)
    end
    for _ = 1, 100 do round() end
    collectgarbage()
    local before, tensors = heap()
    for _ = 1, 15000 do round() end
    local after, left = heap()
    assert.equal(tensors, left)
    assert.equal(before, after)
  end)

  it("is freed at the end of a scope, except what it returns", function()
    local _, before = heap()
    local kept = wane.scope(function()
      local a = wane.zeros(100)
      for _ = 1, 10 do a = a + 1 end
      return { inner = a:narrow(1, 1, 3) }
    end)
    local _, after = heap()
    assert.equal(before + 1, after)
    assert.same({ 10, 10, 10 }, kept.inner:totable())
    kept.inner:close()
  end)

  it("leaves tensors alone that a scope returns but does not own", function()
    local x = wane.ones(3)
    wane.scope(function()
      wane.scope(function() return x end)
    end)
    assert.equal(3, x:sum():item())
  end)

  it("running out gives an error and leaves nothing behind, whichever allocation fails", function()
    local C = wane.core.C
    local x = wane.randn { 60, 50, seed = 1 }
    local work = {
      function() return (x + x:t():reshape(60, 50)):sum() end, function() return x:t():sum(1) end, function() return wane.randn(300, 300):sum() end,
      function() return x:sort() end, function() return x:half():matmul(x:t():half()) end, function() return wane.cat({ x, x }, 2):topk(3) end,
      function() return wane.where(x:gt(0), x, 0) end, function() x[{ 1, { 2, 50 } }] = x[{ 1, { 1, 49 } }] end, function() return tostring(x) end,
      function() return wane.tensor({ 1, 2, 3 }, "f16"):totable() end,
    }
    for number, fn in ipairs(work) do
      wane.core.wait()
      C.wane_stream_trim(wane.core.stream(), 0)
      wane.core.wait()
      collectgarbage()
      collectgarbage()
      local _, before = heap()
      local failed, n = 0, 0
      repeat
        n = n + 1
        C.wane_stream_trim(wane.core.stream(), 0)              -- an empty pool, so that every tensor allocates
        C.wane_fail_allocation(n)
        local ok, problem = pcall(wane.scope, function() fn() end)
        C.wane_fail_allocation(0)
        if not ok then
          failed = failed + 1
          assert.truthy(tostring(problem):find "out of memory", tostring(problem))
        end
        local _, after = heap()
        assert.equal(before, after, "work " .. number .. ", allocation " .. n)
      until ok
      assert.is_true(failed > 0)
    end
  end)

  it("is freed at once by close()", function()
    local _, before = heap()
    local x = wane.zeros(1000)
    local y = x + 1
    x:close()
    assert.equal(1000, y:sum():item())
    y:close()
    collectgarbage()
    collectgarbage()
    local _, after = heap()
    assert.equal(before, after)
    assert.is_true(Tensor.is(x))
  end)
end)
