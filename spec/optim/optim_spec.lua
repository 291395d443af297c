-- Optimizers against golden data of torch and bitsandbytes (spec/fixtures/train/optimizers, README-quant's bars), schedules, clipping, files.
local ffi = require "ffi"
local cjson = require "cjson"
local core = require "wane.core"
local F = require "wane.nn.functional"
local schedule = require "wane.optim.schedule"
local safetensors = require "spec.support.safetensors"
local wane = require "wane"
local C = core.C

local root = "spec/fixtures/train/"

local function json(path)
  local f = assert(io.open(path))
  local text = f:read "*a"
  f:close()
  return cjson.decode(text)
end

local function upload(data, n) return F.outside_scopes(F.upload, data, C.WANE_F32, n * 4, n) end

-- Largest difference to what the fixtures hold; for codes, how many differ and by how much at most.
local function difference(tensor, want)
  local codes = tensor:dtype() == "u8"
  local got, n = F.read(tensor, codes and "uint8_t" or "float")
  assert.equal(want.numel, n)
  local worst, count = 0, 0
  for i = 0, n - 1 do
    local d = math.abs(got[i] - want.data[i])
    if not (d <= worst) then worst = d end
    if d ~= 0 then count = count + 1 end
  end
  return worst, count / n
end

-- Steps an optimizer through a file's gradients; visit(step, opt, p) at the steps that the file keeps.
local function run(file, make, visit)
  local p = upload(file.p0.data, file.p0.numel)
  p.name = "p"
  local opt = make { p }
  local n = file.p0.numel
  for step = 1, file.grads.shape[1] do
    p.grad = upload(file.grads.data + (step - 1) * n, n)
    opt:step()
    opt:zero_grad()
    visit(step, opt, p)
  end
  return opt, p
end

local cases = {
  adam = { "Adam", {} }, adamw = { "AdamW", { weight_decay = true } }, sgd_momentum = { "SGD", { momentum = 0.9, weight_decay = true } },
  lion = { "Lion", { betas = { 0.9, 0.99 }, weight_decay = true } }, rmsprop = { "RMSprop", { alpha = 0.99 } }, adagrad = { "Adagrad", { eps = 1e-10 } },
  adamw8bit_reference = { "AdamW8bit", { weight_decay = true, upstream = true } },
  lion8bit_reference = { "Lion8bit", { betas = { 0.9, 0.99 }, weight_decay = true, upstream = true } },
  sgd8bit_reference = { "SGD8bit", { momentum = 0.9, weight_decay = true, upstream = true } },
}

local function options_of(case, settings)
  local o = { lr = settings.lr }
  for key, value in pairs(case[2]) do o[key] = value end
  if o.weight_decay then o.weight_decay = settings.weight_decay.adamw end
  return o
end

-- Lion's sign is undecided where its sum cancels: those elements are left out.
local function lion_difference(got, want, lr)
  local values, n = F.read(got, "float")
  local worst, undecided = 0, 0
  for i = 0, n - 1 do
    local d = math.abs(values[i] - want.data[i])
    if d > 1.5 * lr then undecided = undecided + 1 elseif d > worst then worst = d end
  end
  return worst, undecided
end

describe("moments and parameters equal torch's and bitsandbytes'", function()
  local best = C.wane_cpu_best()
  after_each(function() core.check(C.wane_set_cpu_level(best)) end)

  for level = 0, math.min(best, C.WANE_CPU_AVX512) do
    for _, size in ipairs { 300, 5000 } do
      local settings = json(root .. "optimizers/plain" .. size .. ".json")
      local file = safetensors.read(root .. "optimizers/plain" .. size .. ".safetensors")
      for name, case in pairs(cases) do
        if file[name .. "/step1/p"] then
          it(("%s, %d values, %s"):format(name, size, ffi.string(C.wane_cpu_level_name(level))), function()
            core.check(C.wane_set_cpu_level(level))
            local worst, codes_off = 0, 0
            run(file, function(params) return wane.optim[case[1]](params, options_of(case, settings)) end, function(step, opt, p)
              local want = file[("%s/step%d/p"):format(name, step)]
              if not want then return end
              local d = case[1]:find "Lion" and lion_difference(p, want, settings.lr) or difference(p, want)
              worst = math.max(worst, d)
              for key, tensor in pairs(opt:state().params.p) do
                local moment = type(tensor) == "table" and file[("%s/step%d/%s"):format(name, step, key)]
                if moment then
                  local largest, share = difference(tensor, moment)
                  if tensor:dtype() == "u8" then
                    codes_off = math.max(codes_off, share)
                    if step <= 2 then assert.is_true(largest <= 1, key .. " is more than one code off") end
                  elseif not name:find "8bit" then
                    worst = math.max(worst, largest)
                  end
                end
              end
            end)
            print(("  %s, %d values: largest difference %.2g, %.3f %% of codes off"):format(name, size, worst, 100 * codes_off))
            assert.is_true(worst <= (name:find "8bit" and 2e-3 or 2e-6))
            assert.is_true(codes_off <= 0.03)
          end)
        end
      end
    end
  end
end)

describe("an 8-bit second moment", function()
  local file = safetensors.read(root .. "optimizers/vanishing.safetensors")
  local settings = json(root .. "optimizers/vanishing.json")

  local function travel(upstream)
    local function make(params) return wane.optim.AdamW8bit(params, { lr = settings.lr, weight_decay = 0, upstream = upstream }) end
    local _, p = run(file, make, function() end)
    local got, n = F.read(p, "float")
    local most = 0
    for i = 5, n - 1, 64 do most = math.max(most, math.abs(got[i] - file.p0.data[i]) / settings.lr) end
    return most
  end

  it("never vanishes beside a first moment, unless upstream's rounding is asked for", function()
    local ours, theirs = travel(false), travel(true)
    print(("  seen once, then never: moves by %.1f lr in 3 steps, by %.0f lr with upstream's rounding"):format(ours, theirs))
    assert.is_true(ours < 3)
    assert.is_true(math.abs(theirs - 21394) < 50)
  end)

  it("leaves elements without a gradient to decay alone", function()
    local plain = safetensors.read(root .. "optimizers/plain5000.safetensors")
    local _, p = run(plain, function(params) return wane.optim.AdamW8bit(params, { lr = 1e-2, weight_decay = 0.05 }) end, function() end)
    local got, n = F.read(p, "float")
    for i = 0, n - 1, 17 do assert.is_true(math.abs(got[i] - plain.p0.data[i] * (1 - 5e-4) ^ 10) < 1e-5) end
  end)
end)

describe("an optimizer", function()
  local function parameter(n, seed)
    local p = F.outside_scopes(function() return wane.randn { n, seed = seed } end)
    p.name = "p" .. n
    p.grad = F.outside_scopes(function() return wane.randn { n, seed = seed + 1 } end)
    return p
  end

  it("steps every size, in any float dtype, the same with one thread and with two, paged or not", function()
    for _, n in ipairs { 1, 255, 256, 257, 4095, 4096, 4097, 100003 } do
      local results = {}
      for i, name in ipairs { "AdamW8bit", "PagedAdamW8bit", "AdamW8bit" } do
        wane.threads(i == 3 and 1 or 2)
        local p = parameter(n, 7)
        local opt = wane.optim[name]({ p }, { lr = 0.1 })
        for _ = 1, 3 do opt:step() end
        results[i] = p:totable()
        local state = opt:state().params["p" .. n]
        assert.equal(n >= 4096 and "u8" or "f32", state.m:dtype())
        assert.equal(3, state.step)
        opt:close()
      end
      assert.same(results[1], results[2])
      assert.same(results[1], results[3])
    end
    wane.threads(0)
    for _, dtype in ipairs { "bf16", "f16" } do
      local p = parameter(300, 3)
      p.grad = p.grad:to(dtype)
      local half = p:to(dtype)
      half.grad = p.grad
      wane.optim.AdamW({ p }, { lr = 0.1 }):step()
      wane.optim.AdamW({ half }, { lr = 0.1 }):step()
      assert.is_true((p - half:to "f32"):abs():max():item() < 0.02)
      assert.equal(dtype, half:dtype())
    end
  end)

  it("leaves alone what has no gradient, and elements whose gradient is no number", function()
    local a, b = parameter(10, 1), parameter(10, 5)
    a.grad = wane.tensor { 1, 0 / 0, 1, math.huge, 1, 1, 1, 1, 1, 1 }
    b.grad = nil
    local before_a, before_b = a:totable(), b:totable()
    local opt = wane.optim.AdamW({ a, b }, { lr = 0.1, weight_decay = 0 })
    opt:step()
    local after = a:totable()
    assert.same(before_b, b:totable())
    for i = 1, 10 do assert.equal(i == 2 or i == 4, after[i] == before_a[i]) end
    assert.is_nil(opt:state().params.p10 and opt.states[b])
  end)

  it("clips by the global norm of all groups, once", function()
    local a, b = parameter(3, 1), parameter(2, 5)
    a.grad, b.grad = wane.tensor { 3, 0, 0 }, wane.tensor { 0, 4 }
    local opt = wane.optim.SGD({ { params = { a } }, { params = { b }, lr = 2 } }, { lr = 1, momentum = 0 })
    local a0, b0 = a:totable(), b:totable()
    local norm = opt:clip(1)
    assert.is_true(math.abs(norm:item() - 5) < 1e-5)
    opt:step()
    assert.is_true(math.abs(a0[1] - a:totable()[1] - 3 / 5) < 1e-5)
    assert.is_true(math.abs(b0[2] - b:totable()[2] - 2 * 4 / 5) < 1e-5)
    opt:step()                                                            -- not clipped
    assert.is_true(math.abs(a0[1] - a:totable()[1] - 3 / 5 - 3) < 1e-5)
    opt:clip(100)
    local a1 = a:totable()
    opt:step()
    assert.is_true(math.abs(a1[1] - a:totable()[1] - 3) < 1e-5)
    opt:zero_grad()
    assert.is_nil(a.grad)
    assert.equal(0, opt:clip(1):item())
  end)

  it("goes on from a file as if it had not stopped, and says why another file does not fit", function()
    local path = os.tmpname()
    local function start() local p = parameter(5000, 9) return p, wane.optim.PagedAdamW8bit({ p }, { lr = 0.01 }) end
    local p, opt = start()
    for _ = 1, 4 do opt:step() end
    local q, first = start()
    for _ = 1, 2 do first:step() end
    assert(first:save(path))
    local second = wane.optim.PagedAdamW8bit({ q }, { lr = 1 })
    assert(second:load(path))
    assert.equal(0.01, second.groups[1].lr)
    for _ = 1, 2 do second:step() end
    assert.same(p:totable(), q:totable())
    local function refused(o, pattern)
      local ok, message = o:load(path)
      assert.is_nil(ok)
      assert.matches(pattern, message)
    end
    refused(wane.optim.Lion8bit({ q }), "holds the state of adamw with 8 bits in 1 group%(s%); this is lion")
    refused(wane.optim.PagedAdamW({ q }), "with 8 bits in 1 group%(s%); this is adamw with 32 bits in 1")
    local other = parameter(6000, 1)
    other.name = "p5000"
    refused(wane.optim.AdamW8bit({ other }), "'p5000': '.*' is %[%d+%] %a%d+ in the file, expected %[%d+%]")
    other.name = "stranger"
    refused(wane.optim.AdamW8bit({ other }), "holds a state of 'p5000', which is not trained here")
    -- One that does not fit before one that does: nothing is changed.
    local mine = wane.optim.AdamW8bit({ parameter(6000, 1), parameter(5000, 2) }, { lr = 1 })
    mine.groups[1].params[1].name, mine.groups[1].params[2].name = "first", "second"
    mine:step()
    local both = wane.optim.AdamW8bit({ parameter(5000, 1), parameter(5000, 2) }, { lr = 0.5 })
    both.groups[1].params[1].name, both.groups[1].params[2].name = "first", "second"
    both:step()
    assert(both:save(path))
    local codes = mine.states[mine.groups[1].params[2]].m
    refused(mine, "'first': '.*' is %[%d+%] %a%d+ in the file, expected %[%d+%]")
    assert.equal(1, mine.groups[1].lr)
    assert.equal(codes, mine.states[mine.groups[1].params[2]].m)
    local f = io.open(path, "w")
    f:write "junk"
    f:close()
    refused(wane.optim.AdamW8bit({ q }), ".")
    os.remove(path)
  end)

  it("keeps parameters without names apart, and a whole block from one gradient too large to square", function()
    local a, b = parameter(8, 1), parameter(8, 2)
    a.name, b.name = nil, nil
    a.grad, b.grad = wane.full({ 8 }, 1), wane.full({ 8 }, 2)
    local path = os.tmpname()
    local function make() return wane.optim.AdamW({ { params = { a } }, { params = { b } } }, { lr = 0 }) end
    local opt = make()
    opt:step()
    assert(opt:save(path))
    local again = make()
    assert(again:load(path))
    os.remove(path)
    assert.is_true(math.abs(again.states[a].m:totable()[1] - 0.1) < 1e-6 and math.abs(again.states[b].m:totable()[1] - 0.2) < 1e-6)
    local p = parameter(4096, 3)
    opt = wane.optim.AdamW8bit({ p }, { lr = 0.01, weight_decay = 0 })
    for step = 1, 3 do
      local before = p:totable()
      p.grad = wane.ones(4096)
      if step == 1 then p.grad[5] = 1e22 end
      opt:step()
      local after = p:totable()
      assert.is_true(after[4] ~= before[4] and after[6] ~= before[6])
      assert.equal(step == 1, after[5] == before[5])
    end
  end)

  it("tells mistakes", function()
    local p = parameter(10, 1)
    assert.error_matches(function() wane.optim.AdamW({}) end, "expected a list of parameters")
    assert.error_matches(function() wane.optim.AdamW({ p, p }) end, "'p10' is in two groups")
    assert.error_matches(function() wane.optim.AdamW({ p }, { lrr = 1 }) end, "adamw has no option 'lrr'; it has betas, eps, lr, weight_decay")
    assert.error_matches(function() wane.optim.AdamW({ wane.tensor({ 1 }, "i32") }) end, "is no float tensor")
    local make, message = wane.optim.by_name "paged_sdg_8bit"
    assert.is_nil(make)
    assert.matches("there is no optimizer 'paged_sdg_8bit'", message)
    for name, want in pairs { adamw_torch = "adamw 32", paged_adamw_8bit = "adamw 8 paged", adamw_bnb_8bit = "adamw 8", lion_32bit = "lion 32",
      sgd = "sgd 32" } do
      local opt = wane.optim.by_name(name)({ p })
      assert.equal(want, opt.kind .. " " .. opt.bits .. (opt.paged and " paged" or ""))
    end
    local opt = wane.optim.PagedAdamW8bit({ parameter(100003, 1) }, { dir = "/nowhere" })
    assert.error_matches(function() opt:step() end, "cannot make a file in '/nowhere'")
  end)

  it("keeps paged moments through memory pressure", function()
    local p = parameter(300000, 3)
    local opt = wane.optim.PagedAdamW32bit({ p }, { lr = 0.01 })
    opt:step()
    core.check(core.wait())
    local m = opt:state().params[p.name].m
    local before = m:totable()
    ffi.cdef "int madvise(void *, size_t, int); int msync(void *, size_t, int);"
    local data, bytes = C.wane_tensor_data(core.stream(), m.h), m:nbytes()
    assert.equal(0, ffi.C.msync(data, bytes, 4))
    assert.equal(0, ffi.C.madvise(data, bytes, 21))                        -- MADV_PAGEOUT: what the kernel does when memory is short
    assert.same(before, m:totable())
    opt:step()
  end)

  it("fails cleanly where memory runs out", function()
    local p = parameter(5000, 3)
    for n = 1, 6 do
      local opt = wane.optim.AdamW8bit({ p }, { lr = 0.01 })
      C.wane_fail_allocation(n)
      pcall(opt.step, opt)
      C.wane_fail_allocation(0)
      opt:step()
      opt:close()
    end
  end)
end)

describe("schedules", function()
  local table_ = json(root .. "schedules.json")
  for name, case in pairs(table_.schedules) do
    it(name .. " equals transformers'", function()
      local o = { lr = table_.base_lr, warmup_steps = table_.warmup_steps, total_steps = table_.total_steps }
      for key, value in pairs(case.settings) do o[key] = value end
      local rate = schedule.new(name, o)
      for t, want in ipairs(case.lr) do
        assert.is_true(math.abs(rate(t - 1) - want) <= 1e-12, ("update %d: %.17g, expected %.17g"):format(t - 1, rate(t - 1), want))
      end
    end)
  end

  it("take a share as warm-up, and tell mistakes", function()
    assert.equal(0.5, schedule.new("linear", { lr = 1, warmup_steps = 0.1, total_steps = 20 })(1))
    assert.error_matches(function() schedule.new("liner", { lr = 1 }) end, "there is no 'liner'; there are constant, ")
    assert.error_matches(function() schedule.new("linear", { lr = 1 }) end, "'linear' needs total_steps")
    for _, lr in ipairs { -1, 0 / 0, math.huge, "1" } do
      assert.error_matches(function() schedule.new("linear", { lr = lr, total_steps = 1 }) end, "expected a learning rate, a number from 0 on, found ")
    end
    assert.error_matches(function() schedule.new("linear", {}) end, "expected a learning rate, .* found nil")
    assert.error_matches(function() schedule.new("linear", { lr = 1, total_steps = 9, warmup_steps = -5 }) end, "warmup_steps: expected a number from 0 on")
    assert.error_matches(function() schedule.new("linear", { lr = 1, total_steps = 9, min_lr = 0 }) end, "linear has no option 'min_lr'; it has none")
    assert.error_matches(function() schedule.new("cosine", { lr = 1, total_steps = 9, numcycles = 1 }) end, "no option 'numcycles'; it has num_cycles")
    assert.error_matches(function() schedule.new("polynomial", { lr = 1, total_steps = 9, power = "2" }) end, "power: expected a number, found 2")
  end)
end)
