-- wane.autograd itself: gradients through frozen NF4, FP4, int8 and blockwise weights, norms and the loss against finite differences; what
-- a graph keeps and frees; checkpoints, hooks, anomalies. Gradients of whole models: gradients_spec.lua.
local ffi = require "ffi"
local core = require "wane.core"
local F = require "wane.nn.functional"
local wane = require "wane"
local autograd = require "wane.autograd"
local has_tiles = require "support.tiles"
local C = core.C

local M, K, N = 6, 96, 40                -- rows, width, classes: odd against every block size

local function random(seed, std, ...)
  local h = core.handle_type()
  local shape, n = core.shape { ... }
  core.check(C.wane_random(core.stream(), h, C.WANE_NORMAL, 0, std, seed, 0, C.WANE_F32, n, shape))
  return wane.Tensor.wrap(h)
end

local function upload(values, n, ...) return F.upload(values, C.WANE_F32, n * 4, ...) end

local labels = F.upload(ffi.new("int32_t[6]", 3, 39, 0, 17, 8, 21), C.WANE_I32, 24, M)

-- x [M, K] -> norm(weight) -> frozen product -> loss. `values` holds x, then the norm's weight.
local function model(frozen, norm)
  return function(x, weight, bias)
    local y = norm == "rms" and F.rms_norm(x, weight, 1e-5) or F.layer_norm(x, weight, bias, 1e-5)
    return F.mean(F.nll(F.linear(y, frozen, nil, C.WANE_COMPUTE_F32, -1), labels))
  end
end

local function check(frozen, norm)
  local loss_of = model(frozen, norm)
  local x, weight, bias = random(1, 1, M, K), random(2, 0.1, K), random(3, 0.1, K)
  weight = F.binary_scalar(weight, 1, C.WANE_ADD)
  for _, leaf in ipairs { x, weight, bias } do autograd.leaf(leaf) end
  autograd.record(loss_of, x, weight, bias):backward()
  local worst = 0
  local leaves = norm == "rms" and { x, weight } or { x, weight, bias }
  for which, leaf in ipairs(leaves) do
    local values, n = F.read(leaf, "float")
    local grad, gn = F.read(leaf.grad, "float")
    assert.equal(n, gn)
    local largest = 0
    for i = 0, n - 1 do largest = math.max(largest, math.abs(grad[i])) end
    for trial = 1, 12 do
      local i, step = (trial * 37 + which) % n, 2e-2
      local kept = values[i]
      local function at(v)
        values[i] = v
        local args = { x, weight, bias }
        args[which] = upload(values, n, unpack(leaf:shape()))
        return tonumber(F.read(loss_of(args[1], args[2], args[3]), "float")[0])
      end
      local slope = (at(kept + step) - at(kept - step)) / (2 * step)
      values[i] = kept
      worst = math.max(worst, math.abs(slope - grad[i]) / largest)
    end
  end
  return worst
end

describe("autograd", function()
  for _, kind in ipairs { "f32", "nf4", "nf4-dq", "fp4", "int8", "int8-blockwise" } do
    for _, norm in ipairs { "rms", "layer" } do
      it(("gradients through a frozen %s product, %s norm and the loss equal finite differences"):format(kind, norm), function()
        local dense = random(4, 0.2, N, K)
        local frozen = dense
        if kind ~= "f32" then
          frozen = wane.quant.quantize(dense, { type = kind:gsub("%-dq", ""), double_quant = kind == "nf4-dq", block_size = kind ~= "int8" and 64 or nil })
        end
        local worst = check(frozen, norm)
        print(("  %s, %s norm: largest difference %.1e of the largest gradient"):format(kind, norm, worst))
        assert.is_true(worst < 5e-3)
      end)
    end
  end

  it("float weights and biases get gradients too, and descent lowers the loss", function()
    local x = random(5, 1, M, K)
    local w, b = autograd.leaf(random(6, 0.1, N, K)), autograd.leaf(random(7, 0.1, N))
    local losses = {}
    for step = 1, 8 do
      core.scope(function()
        local loss = autograd.record(function() return F.mean(F.nll(F.linear(x, w, b, C.WANE_COMPUTE_F32), labels)) end)
        loss:backward()
        losses[step] = loss:item()
        for _, p in ipairs { w, b } do
          F.copy(p, F.binary(p, F.binary_scalar(p.grad, 0.5, C.WANE_MUL), C.WANE_SUB))
          p.grad:close()
          p.grad = nil
        end
      end)
    end
    assert.is_true(losses[8] < 0.3 * losses[1], ("%g -> %g"):format(losses[1], losses[8]))
  end)

  it("records nothing unless asked, and under no_grad nothing at all", function()
    local w = autograd.leaf(random(1, 1, 4))
    local function loss() return F.mean(w) end
    for _, value in ipairs { loss(), autograd.no_grad(loss), autograd.no_grad(autograd.record, loss),
      autograd.record(function() return F.mean(random(2, 1, 4)) end),
      autograd.record(function() return F.mean(w:detach()) end) } do
      assert.is_nil(rawget(value, "node"))
      assert.error_matches(function() value:backward() end, "nothing that requires a gradient led to this tensor")
    end
  end)

  it("asks for floats, for one value, and for a graph that has not run yet", function()
    assert.error_matches(function() autograd.leaf(labels) end, "a i32 tensor cannot have a gradient")
    assert.error_matches(function() autograd.leaf(3) end, "expected a Tensor, found a number")
    local w = autograd.leaf(random(1, 1, 4))
    local y = autograd.record(F.scale, w, 2)
    assert.error_matches(function() y:backward() end, "more than one value")
    y:backward(wane.tensor { 1, 2, 3, 4 })
    assert.same({ 2, 4, 6, 8 }, w.grad:totable())
    assert.error_matches(function() y:backward(wane.tensor { 1, 2, 3, 4 }) end, "has run backward already")
  end)

  it("adds up over uses, over broadcasts and over calls; half-wide gradients too", function()
    local w, b = autograd.leaf(wane.tensor { { 1, 2 }, { 3, 4 } }), autograd.leaf(wane.tensor { 10, 20 })
    for _ = 1, 2 do
      local loss = autograd.record(function()
        local x = F.add(F.binary(w, w, C.WANE_MUL), b)                   -- w^2 + b
        return F.mean(F.add(x, F.cast(F.cast(x, C.WANE_BF16), C.WANE_F32)))
      end)
      loss:backward()
    end
    assert.same({ { 2, 4 }, { 6, 8 } }, w.grad:totable())                -- 2 calls * 2 uses * 2 w / 4
    assert.same({ 2, 2 }, b.grad:totable())
    assert.equal("f32", w.grad:dtype())
  end)

  it("quotients and differences have gradients", function()
    local a, b = autograd.leaf(wane.tensor { 6, 8 }), autograd.leaf(wane.tensor { 2, 4 })
    autograd.record(function() return F.sum(F.binary(F.binary(a, b, C.WANE_DIV), F.binary(a, b, C.WANE_SUB), C.WANE_MUL), 0) end):backward()
    -- d/da (a/b)(a-b) = (a-b)/b + a/b;  d/db = -a(a-b)/b^2 - a/b
    assert.same({ 5, 3 }, a.grad:totable())
    assert.same({ -9, -4 }, b.grad:totable())
  end)

  it("tensors' own arithmetic, products, sums and means have gradients while recording", function()
    local a, b = autograd.leaf(wane.tensor { { 1, 2 }, { 3, 4 } }), autograd.leaf(wane.tensor { { 1, 0 }, { 2, 1 } })
    autograd.record(function() return ((2 * a - 1):matmul(b):square() / 2):sum(2):mean() - b:sum() end):backward()
    -- y = (2a - 1) b = {{7, 3}, {19, 7}}; d/dy = y / 2; da = y bT; db = (2a - 1)T y / 2 - 1
    assert.same({ { 7, 17 }, { 19, 45 } }, a.grad:totable())
    assert.same({ { 50, 18 }, { 76, 28 } }, b.grad:totable())
  end)

  it("parts of a split give one gradient, whichever of them are used", function()
    local x = autograd.leaf(wane.tensor { { 1, 2, 3, 4, 5, 6 } })
    autograd.record(function()
      local y = F.scale(x, 1)
      local a, _, c = F.split(y, 1, { 1, 2, 3 })
      return F.add(F.sum(F.sum(F.binary(c, a, C.WANE_MUL), 1), 0), F.sum(F.sum(y, 1), 0))
    end):backward()
    assert.same({ { 16, 1, 1, 2, 2, 2 } }, x.grad:totable())
  end)

  it("frees what it made as it unwinds, keeps the loss and what it is told to keep", function()
    local w = autograd.leaf(random(1, 1, 64, 64))
    local kept, lost
    local loss = autograd.record(function()
      lost = F.scale(w, 2)
      kept = F.scale(lost, 2):keep()
      return F.mean(kept)
    end)
    loss:backward()
    assert.is_number(loss:item())
    assert.equal(64, kept:shape()[1])
    assert.error_matches(function() lost:shape() end, "freed")
  end)

  it("tells hooks the gradient, of leaves and of what lies between", function()
    local w, seen = autograd.leaf(wane.tensor { 1, 2 }), {}
    local loss = autograd.record(function()
      local y = F.scale(w, 3)
      autograd.on_gradient(y, function(g) seen.y = g:totable() end)
      autograd.on_gradient(w, function(g) seen.w = g:totable() end)
      return F.sum(y, 0)
    end)
    loss:backward()
    assert.same({ y = { 1, 1 }, w = { 3, 3 } }, seen)
  end)

  it("in anomaly mode names the op of the first value, or gradient, that is not finite", function()
    autograd.anomaly = true
    local w = autograd.leaf(wane.tensor { -1, 4 })
    local ok, message = pcall(autograd.record, function() return F.sum(F.scale(F.unary(w, C.WANE_LOG), 2), 0) end)
    assert.is_false(ok)
    assert.matches("'unary' gave the first value that is not finite", message)
    local zero = autograd.leaf(wane.tensor { 0, 4 })
    local loss = autograd.record(function() return F.sum(F.unary(zero, C.WANE_SQRT), 0) end)
    ok, message = pcall(loss.backward, loss)
    autograd.anomaly = false
    assert.is_false(ok)
    assert.matches("backward of 'unary' gave the first gradient that is not finite", message)
    autograd.record(function() return F.mean(w) end):backward()           -- and works again
    assert.same({ 0.5, 0.5 }, w.grad:totable())
  end)

  it("a checkpoint gives the same bits with dropout in it, and reaches what it was not told of", function()
    local x0, w, hidden = random(5, 1, M, K), random(6, 0.3, K, K), random(8, 1, M, K)
    local function run(checkpointed)
      local weight, side = autograd.leaf(w:clone()), autograd.leaf(hidden:clone())
      autograd.seed(7, 3)
      local loss = autograd.record(function()
        local outer = F.scale(side, 2)                                    -- reached from inside the block alone
        local function block(x) return F.add(F.dropout(F.linear(x, weight, nil, C.WANE_COMPUTE_F32), 0.25), outer) end
        local x = x0
        for _ = 1, 3 do x = checkpointed and autograd.checkpoint(block, x) or block(x) end
        return F.mean(F.unary(x, C.WANE_SQUARE))
      end)
      loss:backward()
      return { loss:item(), weight.grad:totable(), side.grad:totable() }, weight.grad:totable()[1][1]
    end
    local plain, value = run(false)
    assert.is_true(value ~= 0)
    assert.same(plain, (run(true)))
    local calls = 0
    autograd.record(function() return autograd.checkpoint(function(x) calls = calls + 1 return F.mean(x) end, autograd.leaf(random(1, 1, 4))) end):backward()
    assert.equal(2, calls)
  end)

  it("a checkpoint that runs again draws nothing of what comes after it", function()
    local w = autograd.leaf(random(6, 1, M, K))
    autograd.seed(7, 3)
    local loss = autograd.record(function()
      return F.mean(F.dropout(autograd.checkpoint(function(x) return F.dropout(x, 0.5) end, w), 0.5))
    end)
    local before = autograd.random_state()
    loss:backward()
    assert.same(before, autograd.random_state())
  end)

  -- The gradient of y = x + z is one tensor that waits for both: the norm must not add x's other part to it.
  it("a norm adds to a gradient in place only where nobody else waits for it", function()
    for _, norm in ipairs { function(x) return F.rms_norm(x, nil, 1e-6) end, function(x) return F.layer_norm(x, nil, nil, 1e-6) end } do
      local a, b = autograd.leaf(random(1, 1, 4, 16)), autograd.leaf(random(2, 1, 4, 16))
      autograd.record(function()
        local x = a * 2
        local z = b * 3
        local n = norm(x)
        return (x + z):sum() + (n * n * n):sum()
      end):backward()
      assert.is_true(b.grad:equal(wane.full({ 4, 16 }, 3)), tostring(b.grad))
    end
  end)

  it("dropout keeps its share, and drops nothing where nothing is recorded", function()
    local x = autograd.leaf(wane.ones(100, 100))
    assert.equal(x, F.dropout(x, 0.5))
    autograd.seed(1)
    local a = autograd.record(F.dropout, x, 0.25)
    local kept = a:ne(0):sum():item()
    assert.is_true(math.abs(kept - 7500) < 200, tostring(kept))
    assert.is_true(math.abs(a:max():item() - 4 / 3) < 1e-6)
    local b = autograd.record(F.dropout, x, 0.25)
    assert.is_false(a:equal(b))                                           -- each draw has numbers of its own
    autograd.seed(1)
    assert.is_true(a:equal(autograd.record(F.dropout, x, 0.25)))
  end)

  it("a step leaves memory where it was", function()
    local frozen = wane.quant.quantize(random(4, 0.2, N, K), "nf4")
    local x, weight = random(1, 1, M, K), autograd.leaf(random(2, 0.1, K))
    local loss_of = model(frozen, "rms")
    local m = ffi.new "wane_memory"
    local function step()
      core.scope(function()
        autograd.record(loss_of, x, weight):backward()
        weight.grad:close()
        weight.grad = nil
      end)
    end
    for _ = 1, 20 do step() end
    core.wait()
    C.wane_memory_read(m)
    local heap = tonumber(m.heap)
    for _ = 1, 200 do step() end
    core.wait()
    C.wane_memory_read(m)
    assert.equal(heap, tonumber(m.heap))
  end)
end)

describe("the loss of a model", function()
  local safetensors = require "spec.support.safetensors"

  it("over masked labels and micro-batches equals torch's, value and gradient", function()
    local fixture = safetensors.read "spec/fixtures/train/loss/masked.safetensors"
    local shape = fixture.logits.shape
    local A, B, T, V = unpack(shape)
    local count = 0
    for i = 0, A * B * T - 1 do if i % T > 0 and tonumber(fixture.labels.data[i]) ~= -100 then count = count + 1 end end
    local cross_entropy = require("wane.loss").cross_entropy
    -- A model whose head gives back what enters it.
    local head = { out_features = V, modules = function() return function() end end }
    local identity = { family = { head = "head" }, find = function() return head end, head = function(_, x) return x end }
    local worst = 0
    for a = 0, A - 1 do
      local x = autograd.leaf(upload(fixture.logits.data + a * B * T * V, B * T * V, B * T, V))
      local targets = ffi.new("int32_t[?]", B * T)
      for b = 0, B - 1 do for t = 0, T - 1 do targets[b * T + t] = t + 1 < T and tonumber(fixture.labels.data[(a * B + b) * T + t + 1]) or -100 end end
      local loss = autograd.record(cross_entropy, identity, x, F.upload(targets, C.WANE_I32, B * T * 4, B * T), 1 / count)
      assert.is_true(math.abs(loss:item() - fixture.micro_losses.data[a]) <= 1e-6)
      loss:backward()
      local grad = F.read(x.grad, "float")
      for i = 0, B * T * V - 1 do worst = math.max(worst, math.abs(grad[i] - fixture.grad_logits.data[a * B * T * V + i])) end
    end
    print(("  masked labels: largest difference of the gradient %.2g"):format(worst))
    assert.is_true(worst <= 1e-6)
  end)

  it("takes a head for a bare product only where its forward is one", function()
    local golden, original, seen = require "spec.support.golden", F.linear_nll, 0
    local tiny = assert(wane.load(golden.root .. "llama", { compute = "bf16", tokenizer = false }))
    local lora = require "wane.lora"
    lora.attach(tiny, { r = 4, target_modules = { "q_proj" } })
    local head, ids = tiny:find(tiny.family.head), { { 1, 5, 9, 2, 7, 3, 8, 4, 6, 10, 12 } }
    F.linear_nll = function(...) seen = seen + 1 return original(...) end
    local ok, message = pcall(function()
      local function passes()
        seen = 0
        core.scope(tiny.loss, tiny, ids, ids)
        return seen
      end
      local bare = has_tiles() and 1 or 0
      assert.equal(bare, passes())
      head:quantize { type = "int8", threshold = 6.0 }              -- LLM.int8() multiplies int8 activations
      assert.equal(0, passes())
      head.threshold = -1
      assert.equal(bare, passes())
    end)
    F.linear_nll = original
    if not ok then error(message, 0) end
  end)

  -- A layer's residual is added in the op of the Linear that it ends in; whoever looks at a module still sees its own result.
  it("adds a residual where a module ends, whatever looks on, however many adapters", function()
    local golden, lora = require "spec.support.golden", require "wane.lora"
    local ids = { { 1, 5, 9, 2, 7, 3, 8, 4, 6, 10, 12 }, { 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5 } }
    local function run(prepare, names, checkpointing)
      local tiny = assert(wane.load(golden.root .. "llama", { compute = "bf16", tokenizer = false }))
      for i, name in ipairs(names) do
        lora.attach(tiny, { name = name, r = 4, alpha = 8, target_modules = "all-linear", init_lora_weights = false, seed = i })
      end
      lora.set_adapter(tiny, names)
      lora.train(tiny, true)
      tiny:checkpoint_layers(checkpointing or false)
      if prepare then prepare(tiny) end
      local loss = core.scope(function()
        local loss = tiny:loss(ids, ids)
        loss:backward()
        return loss:item()
      end)
      local sum = 0
      for _, t in ipairs(tiny:trainable_parameters()) do sum = sum + t.grad:abs():sum():item() end
      return loss, sum
    end
    local function near(a, b, slack) assert.is_true(math.abs(a - b) <= slack * math.abs(b), ("%.9g and %.9g"):format(a, b)) end
    for _, names in ipairs { { "default" }, { "default", "other" } } do
      local loss, gradient = run(nil, names)
      local again, same = run(nil, names, true)
      assert.equal(loss, again)
      assert.equal(gradient, same)
      for _, path in ipairs { "model.layers.0.mlp", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj" } do
        local seen = 0
        local other, other_gradient = run(function(tiny)
          tiny:on_forward(path, function(y, module, x)
            seen = seen + 1
            if module.down_proj then assert.equal(0, (y - module.down_proj(module:inner(x))):abs():max():item()) end     -- without the residual
          end)
        end, names)
        assert.equal(1, seen)
        near(other, loss, 2e-3)
        near(other_gradient, gradient, 2e-2)
      end
    end
    local complete                                                        -- a norm and a product add to it in place: a hook sees the whole
    local function catch(tiny)
      tiny:on_forward("model.layers.0", function(y)
        autograd.on_gradient(y, function(g) complete = g:abs():sum():item() end)
      end)
    end
    run(catch, { "default" })
    local fused = complete
    run(function(tiny)
      catch(tiny)
      tiny:on_forward("model.layers.1.self_attn", function() end)
      tiny:on_forward("model.layers.1.mlp", function() end)
    end, { "default" })
    near(fused, complete, 2e-2)
  end)

  it("adds the residual last where several adapters would be rounded at its scale, and broadcasts one of another shape", function()
    local layer = wane.nn.Linear(64, 32, false)
    layer.weight = F.cast(wane.full({ 32, 64 }, 0), C.WANE_BF16)
    local function part() return { name = "a", r = 1, scale = 1, A = wane.full({ 1, 64 }, 1 / 64), B = wane.full({ 32, 1 }, 0.6) } end
    layer.adapters = { part(), part() }
    local x, residual = F.cast(wane.full({ 16, 64 }, 1), C.WANE_BF16), F.cast(wane.full({ 16, 32 }, 256), C.WANE_BF16)
    local function value(onto) return autograd.record(function() return layer:added_to(onto, x) end):to("f32"):max():item() end
    assert.equal(258, value(residual))                                    -- 256 + 1.2; 0.6 alone is below half a step of 2
    layer.adapters = { part() }
    assert.equal(256, value(residual))
    assert.near(1.6, value(F.cast(wane.full({ 32 }, 1), C.WANE_BF16)), 0.01)
    assert.near(1.6, value(wane.full({ 16, 32 }, 1)), 0.01)
  end)

  it("adds up one gradient that comes twice, as a sum of a tensor with itself gives it", function()
    local function total(make)
      local leaf = autograd.leaf(F.binary_scalar(random(1, 0, 1, 4), 1, C.WANE_ADD))
      autograd.record(function() return F.sum(F.sum(make(F.scale(leaf, 1)), -1), 0) end):backward()
      return leaf.grad:sum():item()
    end
    assert.equal(8, total(function(z) return F.add(z, z) end))
    assert.equal(8, total(function(z) return F.add(F.binary_scalar(z, 1, C.WANE_ADD), z) end))
    assert.equal(16, total(function(z)
      local a, b = F.add(z, z), F.add(z, z)
      return F.add(a, b)
    end))
  end)

  -- Where tiles multiply, the second adapter adds to the first one's gradient in place; what is shared must stay as it is.
  it("adds up gradients that meet, of adapters and of a residual, and leaves those that others wait for", function()
    local rows, width, out = 40, 64, 96
    local function bf16(t) return F.cast(t, C.WANE_BF16) end
    local x, w1, w2 = random(1, 1, rows, width), bf16(random(2, 0.1, out, width)), bf16(random(3, 0.1, width, width))
    local function part(seed, n)
      return { A = autograd.leaf(random(seed, 0.1, 8, width)), B = autograd.leaf(random(seed + 1, 0.1, n, 8)), scale = 1 }
    end
    local p1, p2, p3 = part(10, out), part(12, out), part(14, width)
    local function weight(p, w) return F.cast(w, C.WANE_F32) + F.matmul(p.B, p.A) end
    local function run(linear)
      local leaf = autograd.leaf(x:clone())
      autograd.record(function()
        local z = bf16(leaf)
        local a, b = linear(z, w1, p1), linear(z, w1, p2)
        local c = F.add(z, linear(z, w2, p3))                     -- its gradient goes to z and into the product
        local d = F.add(c, linear(c, w2, p3))
        local function weigh(y, seed) return F.sum(F.sum(F.binary(F.cast(y, C.WANE_F32), random(seed, 1, unpack(y:shape())), C.WANE_MUL), -1), 0) end
        return F.add(F.add(weigh(a, 20), weigh(b, 21)), weigh(d, 22))
      end):backward()
      return leaf.grad
    end
    local got = run(function(y, w, p) return F.linear_lora(y, w, nil, { p }, C.WANE_COMPUTE_BF16) end)
    local want = run(function(y, w, p) return F.linear(F.cast(y, C.WANE_F32), weight(p, w), nil, C.WANE_COMPUTE_F32) end)
    local d = ((got - want):abs():max() / want:abs():max()):item()
    print(("  gradients that meet: within %.1e of the largest"):format(d))
    assert.is_true(d < 0.01)
  end)
end)
