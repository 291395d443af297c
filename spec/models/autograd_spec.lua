-- The proof that training will fit: gradients through frozen NF4, FP4, int8 and blockwise weights, norms and the loss, by the tape,
-- against finite differences; and a few steps of gradient descent that lower the loss.
local ffi = require "ffi"
local core = require "wane.core"
local F = require "wane.nn.functional"
local wane = require "wane"
local autograd = require "wane.autograd"
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
  local tape, loss = autograd.record(loss_of, x, weight, bias)
  tape:backward(loss)
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

describe("the tape", function()
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
        local tape, loss = autograd.record(function() return F.mean(F.nll(F.linear(x, w, b, C.WANE_COMPUTE_F32), labels)) end)
        tape:backward(loss)
        losses[step] = tonumber(F.read(loss, "float")[0])
        for _, p in ipairs { w, b } do
          F.copy(p, F.binary(p, F.binary_scalar(p.grad, 0.5, C.WANE_MUL), C.WANE_SUB))
          p.grad = nil
        end
      end)
    end
    assert.is_true(losses[8] < 0.3 * losses[1], ("%g -> %g"):format(losses[1], losses[8]))
  end)

  it("records nothing for what leads to no leaf, and says so", function()
    local tape, loss = autograd.record(function() return F.mean(random(1, 1, 4)) end)
    assert.equal(0, #tape.entries)
    assert.has_error(function() tape:backward(loss) end)
  end)

  it("a step leaves memory where it was", function()
    local frozen = wane.quant.quantize(random(4, 0.2, N, K), "nf4")
    local x, weight = random(1, 1, M, K), autograd.leaf(random(2, 0.1, K))
    local loss_of = model(frozen, "rms")
    local m = ffi.new "wane_memory"
    local function step()
      core.scope(function()
        local tape, loss = autograd.record(loss_of, x, weight)
        tape:backward(loss)
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
