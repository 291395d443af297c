-- Methods of tensors while wane.autograd records: each that has a derivative against central differences, at ties and poles against torch's
-- numbers; each that has none, or works in place, is an error; and what is changed in place after it was recorded is told in backward.
local wane = require "wane"
local autograd = require "wane.autograd"
local methods = require "wane.autograd.methods"
local F = require "wane.nn.functional"
local Tensor = wane.Tensor

local x = wane.randn { 3, 4, seed = 1 }
local y = wane.randn { 3, 4, seed = 2 }
local positive = x:abs() + 0.5
local cube = wane.randn { 2, 3, 4, seed = 3 }
local row, column = wane.randn { 4, seed = 4 }, wane.randn { 3, 1, seed = 5 }
local mask = y:gt(0)
local index = wane.tensor({ { 0, -1, 2 }, { 2, 2, 0 } }, "i64")

-- name of the method, function, its leaves
local cases = {
  { "add", function(a, b) return a + b + 1 end, x, row },
  { "sub", function(a, b) return 1 - (a - b) end, x, column },
  { "mul", function(a, b) return a * b * 2 end, x, row },
  { "div", function(a, b) return 2 / a / b + a / 3 end, positive, positive * 2 },
  { "pow", function(a, b) return a ^ b + a ^ 3 + 2 ^ b + a ^ -0.5 end, positive, row },
  { "minimum", Tensor.minimum, x, row },
  { "minimum", function(a) return a:minimum(0.1) + Tensor.maximum(0.3, a) end, x },
  { "maximum", Tensor.maximum, x, y },
  { "max", function(a, b) return a:max(b) * a:max(1) + a:min() end, x, y },
  { "where", function(a, b) return wane.where(mask, a, b) + mask:where(a, 0) + mask:where(2, b) end, x, row },
  { "masked_fill", function(a) return a:masked_fill(mask, 3) end, x },
  { "masked_fill", function(a, b) return a:masked_fill(mask, b) end, x, wane.tensor(0.7) },
  { "clamp", function(a) return a:clamp(-0.5, 0.5) + a:clamp(0.2) + a:clamp(nil, 0.1) end, x },
  { "clamp", function(a, low) return a:clamp(low, 0.8) end, x, row },
  { "clamp", function(a, high) return a:clamp(-0.3, high) end, x, row },
  { "sum", function(a) return a:sum({ 1, 3 }) + a:sum() end, cube },
  { "sum", function(a) return a:sum(2, true) * a:sum({ 2, 3 }, true) + a:sum(-1, true) end, cube },
  { "mean", function(a) return a:mean({ 1, 3 }) * a:mean(2):sum() + a:mean() end, cube },
  { "amax", function(a) return a:amax(1) + a:amax({ 1, 2 }) + a:amax() end, x },
  { "amin", function(a) return a:amin(2, true) end, x },
  { "var", function(a) return a:var() + a:var(1) + a:var({ 1, 2 }, true, 0) end, x },
  { "std", function(a) return a:std(2, true) + a:std(nil, nil, 0) end, x },
  { "norm", function(a) return a:norm() + a:norm(1, 1) + a:norm(2, { 1, 2 }) end, x },
  { "norm", function(a) return a:norm(math.huge, 2) * a:norm(math.huge) end, x },
  { "cumsum", function(a) return a:cumsum(1) + a:cumsum(2) end, x },
  { "cumsum", function(a) return a:cumsum() end, row },
  { "softmax", function(a) return a:softmax() + a:softmax(1) end, x },
  { "log_softmax", function(a) return a:log_softmax() + a:log_softmax(1) end, x },
  { "matmul", Tensor.matmul, x, y:t() },
  { "matmul", Tensor.matmul, cube, row },
  { "matmul", Tensor.matmul, wane.randn { 3, seed = 6 }, cube },
  { "matmul", function(a, b) return a:unsqueeze(1):matmul(b) end, x:t(), cube },
  { "mm", Tensor.mm, x:t(), y },
  { "mv", Tensor.mv, x, row },
  { "dot", Tensor.dot, row, row * 2 },
  { "bmm", Tensor.bmm, cube, wane.randn { 2, 4, 2, seed = 7 } },
  { "outer", Tensor.outer, row, column:squeeze() },
  { "tril", function(a) return a:tril() + a:triu(1) * 2 end, x },
  { "triu", function(a) return a:triu(-1) end, cube },
  { "cat", function(a, b) return wane.cat({ a, b, a }, 1) end, x, row:unsqueeze(1) },
  { "cat", function(a, b) return wane.cat({ a, b }, -1) end, x, column },
  { "stack", function(a, b) return wane.stack({ a, b }, 2) + wane.stack({ b, a }, -1):transpose(2, 3) end, x, y },
  { "sort", function(a) return (a:sort(1, true)) end, x },
  { "sort", function(a) return (a:sort()) end, cube },
  { "topk", function(a) return (a:topk(2)) + a:topk(1, 1)[{ {}, { 1, 2 } }] end, x },
  { "index_select", function(a) return a:index_select(1, index) end, x },
  { "index_select", function(a) return a:index_select(2, index) end, cube },
  { "index_select", function(a) return a[index] end, row },
  { "gather", function(a) return a:gather(2, index) end, wane.randn { 2, 4, seed = 8 } },
  { "gather", function(a) return a:gather(1, index) end, wane.randn { 3, 1, seed = 8 } },
  { "masked_select", function(a) return a[mask] end, x },
  { "select", function(a) return a:select(2, -1) + a[{ 1, 2, {} }] end, cube },
  { "select", function(a) return a[2][{ { 1, 3, 2 } }] end, x },
  { "narrow", function(a) return a:narrow(2, -2, 2) * a[{ {}, { 1, 4, 3 } }] end, x },
  { "split", function(a) local p = a:split({ 2, 2 }, 2) return p[1] * p[2] end, x },
  { "chunk", function(a) local p = a:chunk(2, 2) return p[2] / (p[1] + 5) end, x },
  { "permute", function(a) return a:permute(3, 1, 2) end, cube },
  { "transpose", function(a) return a:transpose(1, -1) * 2 end, cube },
  { "t", function(a) return a:t() * y:t() end, x },
  { "view", function(a) return a:view(2, 6) end, x },
  { "reshape", function(a) return a:t():reshape(6, 2) end, x },
  { "reshape", function(a) return a:reshape(2, 1, 3, 2, 2, 1) * 2 end, cube },
  { "flatten", function(a) return a:flatten() end, cube },
  { "expand", function(a) return a:expand(2, 3, 4) end, column },
  { "expand_as", function(a) return a:expand_as(cube) end, row },
  { "squeeze", function(a) return a:squeeze() end, column },
  { "unsqueeze", function(a) return a:unsqueeze(-1) * y:unsqueeze(3) end, x },
  { "clone", function(a) return a:clone() * 2 end, x },
  { "contiguous", function(a) return a:t():contiguous() * 3 end, x },
  { "to", function(a) return a:to "f32" * a:float() end, x },
}
for _, name in ipairs { "neg", "abs", "sin", "cos", "tanh", "sigmoid", "exp", "square", "relu", "silu", "gelu", "gelu_tanh", "quick_gelu", "erf" } do
  cases[#cases + 1] = { name, Tensor[name], x }
end
for _, name in ipairs { "sqrt", "rsqrt", "log", "reciprocal" } do cases[#cases + 1] = { name, Tensor[name], positive } end

local function weigh(t) return (t * wane.randn { t:numel(), seed = 9 }:view(t:shape())):sum() end

-- Gradients of a function's leaves.
local function gradients(fn, ...)
  local leaves = {}
  for i, value in ipairs { ... } do leaves[i] = autograd.leaf(value:clone()) end
  autograd.record(fn, unpack(leaves)):backward()
  local out = {}
  for i, leaf in ipairs(leaves) do out[i] = leaf.grad end
  return unpack(out)
end

describe("while recording,", function()
  local seen = {}
  for number, case in ipairs(cases) do
    local name, fn, values = case[1], case[2], { case[3], case[4] }
    it(("%s has its gradient (%d)"):format(name, number), function()
      seen[name] = true
      local function loss(...) return weigh(fn(...)) end
      local grads = { gradients(loss, unpack(values)) }
      assert.equal(#values, #grads)
      for which, got in ipairs(grads) do
        local list, want = values[which]:flatten():totable(), {}
        for i, value in ipairs(list) do
          local function at(v)
            list[i] = v
            local args = { unpack(values) }
            args[which] = wane.tensor(list):view(values[which]:shape())
            list[i] = value
            return loss(unpack(args)):item()
          end
          want[i] = (at(value + 5e-3) - at(value - 5e-3)) / 1e-2
        end
        want = wane.tensor(want):view(values[which]:shape())
        assert.is_true(got:allclose(want, 1e-2, 1e-2), ("input %d: %s, by differences %s"):format(which, tostring(got), tostring(want)))
      end
    end)
  end

  it("gradients at ties, bounds and poles are torch's", function()
    local inf = math.huge
    local function check(want, fn, ...)
      local got = { gradients(function(...) return fn(...):sum() end, ...) }
      assert.equal(#want, #got)
      for i, g in ipairs(got) do
        assert.is_true(g:allclose(wane.tensor(want[i]), 1e-6), ("%s, expected %s"):format(tostring(g), table.concat(want[i], " ")))
      end
    end
    local t = wane.tensor
    check({ { 0, 0, 1, 0, 0 } }, function(a) return a:clamp(0, 2) end, t { -1, 0, 1, 2, 3 })
    check({ { 0, 0.5, 1 }, { 1, 0.5, 0 } }, Tensor.maximum, t { 1, 2, 3 }, t { 2, 2, 2 })
    check({ { 1, 0.5, 0 }, { 0, 0.5, 1 } }, Tensor.minimum, t { 1, 2, 3 }, t { 2, 2, 2 })
    check({ { 0, 12, 27 } }, function(a) return a ^ 3 end, t { 0, -2, 3 })
    check({ { 0, 0, 0 } }, function(a) return a ^ 0 end, t { 0, -2, 3 })
    check({ { 0.69314718, 0.1732867956 } }, function(a) return 2 ^ a end, t { 0, -2 })
    check({ { 0, 0 } }, function(a) return 0 ^ a end, t { 0, 2 })
    check({ { 0, 0, 12, -0.1111111119 }, { 0, 0, 5.545177459716797, 0.3662041127681732 } }, Tensor.pow, t { 0, 0, 2, 3 }, t { 0, 2, 3, -1 })
    check({ { 0, 0.5, 0.5 } }, function(a) return a:amax() end, t { 1, 3, 3 })
    check({ { -0.5, 0.5, 0 } }, function(a) return a:norm(inf) end, t { -3, 3, 1 })
    check({ { 0, 0 } }, Tensor.norm, t { 0, 0 })
    check({ { 0, 0 } }, Tensor.std, t { 2, 2 })
    check({ { 1, 1 } }, Tensor.sum, t { 1, inf })
    check({ { 0.5, 0.5 } }, Tensor.mean, t { 1, inf })
    check({ { 0, 0 } }, function(a) return a:floor() + a:ceil() + a:round() + a:sign() end, t { 1.5, -2.5 })
    check({ { 0, -1 } }, Tensor.abs, t { 0, -2 })
    seen.floor, seen.ceil, seen.round, seen.sign = true, true, true, true
  end)

  it("conversions pass gradients in the dtype of what they came from", function()
    local w = autograd.leaf(x:to "bf16")
    autograd.record(function()
      local half = (w * 2):keep()
      autograd.on_gradient(half, function(g) assert.equal("bf16", g:dtype()) end)
      return (half:float():to "f16":clone "f32" * half:dequantize()):sum()
    end):backward()
    assert.equal("f32", w.grad:dtype())
    assert.is_true(w.grad:allclose(w:float() * 8, 0.02))
    seen.dequantize = true
  end)

  it("what no gradient passes is an error at once, with what to do", function()
    local w = autograd.leaf(x:clone())
    local function refused(name, pattern, fn)
      seen[name] = true
      local ok, message = pcall(autograd.record, fn)
      assert.is_false(ok, name)
      assert.matches("gradients_spec.lua:%d+: " .. name .. ": " .. pattern, message)
    end
    local none = "no gradient passes this method, and an operand leads to a leaf: detach%(%) that operand, or call it in autograd.no_grad"
    refused("prod", none, function() return w:prod() end)
    refused("mod", none, function() return 2 % w end)
    refused("atan2", none, function() return y:atan2(w * 2) end)
    local changed = "changes a tensor in place while recording, and an operand leads to a leaf: make a new tensor"
    for _, name in ipairs { "add_", "sub_", "mul_", "div_", "pow_", "copy" } do
      refused(name, changed, function() return w[name](w, 2) end)
      refused(name, changed, function() return y[name](y, w * 2) end)
    end
    refused("fill", changed, function() return (w * 2):fill(0) end)
    refused("zero", changed, function() return w:narrow(1, 1, 1):zero() end)
    refused("copy", changed, function() w[1] = 3 end)
    refused("copy", changed, function() y[{ 1, {} }] = w[1] end)
    refused("copy", changed, function() w[mask] = 0 end)
    refused("%[%]", "one value is read as a number, which no gradient passes: select", function() return w[1][2] end)
    local some = wane.tensor({ 0, 1, 2 }, "i32")
    for name, fn in pairs {
      where = function() return F.where(mask, w, y) end,
      select = function() return F.select(w, 0, 1) end,
      cumsum = function() return F.cumsum(w, 0) end,
      copy = function() return F.copy(y, w) end,
      scatter_add = function() return F.scatter_add(w, some, 3) end,
      reduce = function() return F.reduce(w, wane.core.C.WANE_AMAX, 0) end,
      kv_append = function() return F.kv_append(wane.zeros(1, 1, 4, 2), w:view(1, 2, 1, -1), 0) end,
      ["attention over a cache"] = function()
        local heads = w:view(1, 1, 3, 4)
        return F.attention(heads, heads, heads, { q_start = 0, kv_length = 3 })
      end,
    } do
      local ok, message = pcall(autograd.record, fn)
      assert.is_false(ok, name)
      assert.matches(name .. ": no gradient passes this op", message)
    end
    -- It is the operands that count: these lead to no leaf.
    autograd.record(function()
      local other = w:detach():clone():mul_(2):fill(1)
      other[1] = other:prod()
      assert.is_nil(rawget(other, "node"))
      assert.equal(1, other[1][1])
      autograd.no_grad(function() w:prod() end)
      assert.same({ 3, 4 }, w:shape())
      assert.is_number(w:select(1, 1):select(1, 2):item())
      assert.is_string(tostring(w * 2))
      assert.is_true(w:equal(w) and w:allclose(w))
      assert.equal("bool", w:gt(0):dtype())
      assert.equal("i64", w:argmax():dtype())
      assert.equal("i32", (w * 2):int():dtype())
    end)
  end)

  it("quantizing a leaf is refused, and so is an outer product of matrices", function()
    local w = autograd.leaf(wane.randn { 64, 64 })
    assert.error_matches(function() autograd.record(function() return wane.quant.quantize(w, "nf4") end) end, "quantize: no gradient passes it")
    assert.equal("nf4", wane.quant.quantize(w, "nf4"):dtype())
    assert.error_matches(function() return w:outer(w) end, "outer: expected two vectors")
  end)

  it("nothing has to be loaded first", function()
    local pipe = assert(io.popen("LUA_PATH='" .. package.path .. [[' ${WANE_TEST_LUA:-luajit} -e "
      local wane = require 'wane'
      local sum, w = wane.Tensor.sum, wane.autograd.leaf(wane.tensor { 1, 2 })
      local loss = wane.autograd.record(function() return sum(wane.cat { w * w, w }) end)
      loss:backward()
      print(table.concat(w.grad:totable(), ' '))" 2>&1]]))
    assert.equal("3 5\n", pipe:read "*a")
    pipe:close()
  end)

  it("no method is forgotten", function()
    for _, class in ipairs { Tensor, Tensor.constructors } do
      for name, fn in pairs(class) do
        if methods.written[fn] and not name:find "^__" then assert.is_true(seen[name], name .. " has no case here") end
      end
    end
    assert.equal(Tensor.add, Tensor.__add)
    assert.equal(Tensor.pow, Tensor.__pow)
  end)
end)

describe("a tensor that a graph needs and that is changed in place", function()
  local function told(what, change, fn, ...)
    local leaf = autograd.leaf(wane.tensor { 1, 2, 3 })
    local loss, other = autograd.record(fn, leaf, ...)
    change(other or leaf)
    local ok, message = pcall(loss.backward, loss)
    assert.is_false(ok)
    assert.matches(what .. ", %[.-, or what it shares memory with, was changed in place after it was recorded: .*; change a clone", message)
    assert.is_nil(rawget(leaf, "grad"))
    autograd.record(fn, leaf, ...):backward()                     -- and the next graph is a new one
    assert.is_table(leaf.grad)
  end
  local function twice(t) t:mul_(2) end

  it("is told in backward: a leaf, a constant, a result, a view of them, an index", function()
    told("an input of 'binary'", twice, function(w) return (w * w):sum() end)
    told("an input of 'binary'", twice, function(w) local c = wane.tensor { 3, 4, 5 } return (w * c):sum(), c end)
    told("an input of 'sum'", twice, function(w) local z = w * 2 return z:sum(), z end)
    told("an input of 'binary'", function(w) w:narrow(1, 2, 1):fill(7) end, function(w) return (w * w):sum() end)
    told("the result of 'softmax'", function(z) z:fill(0) end, function(w)
      local z = w:narrow(1, 1, 1):softmax()
      return z, z:detach()
    end)
    told("an input of 'index_select'", function(i) i:fill(0) end, function(w)
      local at = wane.tensor({ 0, 2 }, "i64")
      return w:index_select(1, at):sum(), at
    end)
    told("an input of 'rows'", function(i) i:fill(0) end, function(w)
      local at = wane.tensor({ 0, 2 }, "i64")
      return F.rows(w:view(3, 1), at):sum(), at
    end)
    told("an input of 'checkpoint'", twice, function(w)
      local c = wane.tensor { 3, 4, 5 }
      return autograd.checkpoint(function(a, b) return (a * b):sum() end, w, c), c
    end)
  end)

  it("is the old one where a copy was changed, or the change came before", function()
    local w = autograd.leaf(wane.tensor { 1, 2, 3 })
    w:mul_(2)
    local loss = autograd.record(function()
      local z = w * w
      z:detach():clone():mul_(5)
      return z:sum()
    end)
    loss:backward()
    assert.same({ 4, 8, 12 }, w.grad:totable())
    w:mul_(2)                                                      -- after backward: the step
  end)
end)
