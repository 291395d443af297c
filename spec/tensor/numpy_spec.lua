-- Tensor operations against numpy: cases made by numpy_cases.py, a fixed set from spec/fixtures/tensor and a larger one that is
-- made now, where .cache/venv (scripts/setup test) or $WANE_NUMPY_PYTHON has numpy.
local cjson = require "cjson"
local ffi = require "ffi"
local wane = require "wane"
local safetensors = require "support.safetensors"

local names = { F32 = "f32", F16 = "f16", BF16 = "bf16", I8 = "i8", U8 = "u8", I32 = "i32", I64 = "i64", BOOL = "bool" }

-- What a case does, by its "op": inputs (tensors) and parameters to outputs. Methods of that name are the default.
local ops = {}
for _, name in ipairs { "add", "sub", "mul", "div", "pow", "mod" } do
  local symbols = {
    add = function(a, b) return a + b end, sub = function(a, b) return a - b end, mul = function(a, b) return a * b end,
    div = function(a, b) return a / b end, pow = function(a, b) return a ^ b end, mod = function(a, b) return a % b end,
  }
  ops[name] = function(_, a, b) return symbols[name](a, b) end
  ops["scalar_" .. name] = function(p, a)
    if p.reverse then return symbols[name](p.value, a) end
    return symbols[name](a, p.value)
  end
end
for _, name in ipairs { "minimum", "maximum", "atan2", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor" } do
  ops["scalar_" .. name] = function(p, a)
    if p.reverse then return wane.Tensor[name](p.value, a) end
    return a[name](a, p.value)
  end
end
for _, name in ipairs { "sum", "mean", "amax", "amin", "prod", "argmax", "argmin", "any", "all" } do
  ops[name] = function(p, a) return a[name](a, p.dim, p.keep) end
end
function ops.norm(p, a) return a:norm(2, p.dim, p.keep) end
function ops.var(p, a) return a:var(p.dim, p.keep) end
function ops.var0(p, a) return a:var(p.dim, p.keep, 0) end
function ops.cumsum(p, a) return a:cumsum(p.dim) end
function ops.cat(p, ...) return wane.cat({ ... }, p.dim) end
function ops.stack(p, ...) return wane.stack({ ... }, p.dim) end
function ops.sort(p, a) return a:sort(p.dim, p.descending) end
function ops.topk(p, a) return a:topk(p.k, p.dim, p.largest) end
function ops.index_select(p, a, i) return a:index_select(p.dim, i) end
function ops.gather(p, a, i) return a:gather(p.dim, i) end
function ops.cast(p, a) return a:to(p.dtype) end
function ops.reshape(p, a) return a:reshape(p.sizes) end
function ops.slice(p, a) return a[p.key] end
function ops.arange(p) return wane.arange(p.start, p.stop, p.step, p.dtype) end
local function drawn(p)
  local spec = { seed = p.seed, offset = p.offset, mean = p.mean, std = p.std }
  for i, size in ipairs(p.sizes) do spec[i] = size end
  return spec
end
function ops.rand(p) return wane.rand(drawn(p)) end
function ops.randn(p) return wane.randn(drawn(p)) end
function ops.randint(p) return wane.randint(p.low, p.high, drawn(p)) end

local function equal_lists(a, b)
  if #a ~= #b then return false end
  for i = 1, #a do if a[i] ~= b[i] then return false end end
  return true
end

--- Largest difference of two tensors' values (relative to values above 1) and the first place that is out of tolerance (or nil).
local function compare(found, expected, rtol, atol)
  local a, n = found:cdata()
  local b = expected:cdata()
  local largest, bad = 0, nil
  for i = 0, n - 1 do
    local x, y = tonumber(a[i]), tonumber(b[i])
    if x ~= y and not (x ~= x and y ~= y) then
      local d = math.abs(x - y)
      if d == d and d < math.huge then largest = math.max(largest, d / math.max(1, math.abs(y))) end
      if (d ~= d or d > atol + rtol * math.abs(y)) and not bad then bad = { i, x, y } end
    end
  end
  return largest, bad
end

--- Runs all cases of a pair of files; counts and largest differences a group.
local function run(prefix)
  local file = assert(io.open(prefix .. ".json"))
  local cases = cjson.decode(file:read "*a").cases
  file:close()
  local stored = safetensors.read(prefix .. ".safetensors")
  local function load(name)
    local t = stored[name]
    return wane.from_buffer(ffi.string(t.data, t.nbytes), names[t.dtype], t.shape)
  end
  local groups, order, failures = {}, {}, {}
  for number, case in ipairs(cases) do
    wane.scope(function()
      local inputs, bases = {}, {}
      for i, input in ipairs(case.inputs) do
        local t = load(input.tensor)
        bases[i] = t
        for _, step in ipairs(input.views) do t = t[step[1]](t, unpack(step, 2)) end
        inputs[i] = t
      end
      for k, v in pairs(case.params) do if v == cjson.null then case.params[k] = nil end end
      local outputs
      if case.op == "copy" then
        inputs[1]:copy(inputs[2])
        outputs = { bases[1] }
      else
        local op = ops[case.op] or function(_, a, ...) return a[case.op](a, ...) end
        outputs = { op(case.params, unpack(inputs)) }
      end
      local group = groups[case.group]
      if not group then
        group = { count = 0, largest = 0 }
        groups[case.group] = group
        order[#order + 1] = case.group
      end
      group.count = group.count + 1
      for i, out in ipairs(case.outputs) do
        local expected, found = load(out.tensor), outputs[i]
        local what = ("case %d (%s), output %d"):format(number, case.group, i)
        if not wane.Tensor.is(found) then
          failures[#failures + 1] = what .. ": no tensor"
        elseif found:dtype() ~= out.dtype or not equal_lists(found:shape(), expected:shape()) then
          failures[#failures + 1] = ("%s: expected [%s] %s, found %s"):format(what, table.concat(expected:shape(), ", "), out.dtype, found:describe())
        else
          local largest, bad = compare(found, expected, case.rtol, case.atol)
          group.largest = math.max(group.largest, largest)
          if bad then failures[#failures + 1] = ("%s %s: at %d found %.9g, numpy %.9g"):format(what, cjson.encode(case.params), bad[1], bad[2], bad[3]) end
        end
      end
    end)
  end
  return groups, order, failures, #cases
end

--- Reports and asserts.
local function check(prefix)
  local groups, order, failures, count = run(prefix)
  table.sort(order)
  local report = {}
  for _, name in ipairs(order) do report[#report + 1] = ("%s %dx %.2g"):format(name, groups[name].count, groups[name].largest) end
  print(("    %d cases; op, cases, largest difference: %s"):format(count, table.concat(report, "; ")))
  assert.is_true(count > 300)
  assert.equal("", table.concat(failures, "\n", 1, math.min(#failures, 20)))
end

--- A Python that can import numpy, or nil.
local function python()
  for _, program in ipairs { os.getenv "WANE_NUMPY_PYTHON" or "", ".cache/venv/bin/python", "python3" } do
    if program ~= "" and os.execute(program .. " -c 'import numpy' 2>/dev/null") == 0 then return program end
  end
end

describe("tensor operations equal numpy's", function()
  it("on the fixed set of cases", function() check "spec/fixtures/tensor/cases" end)

  it("on the fixed set of cases with the portable kernels", function()
    local C = wane.core.C
    local level = C.wane_cpu_level()
    assert(C.wane_set_cpu_level(C.WANE_CPU_GENERIC) == 0)
    local ok, problem = pcall(check, "spec/fixtures/tensor/cases")
    C.wane_set_cpu_level(level)
    assert.is_true(ok, problem)
  end)

  it("on cases made now", function()
    local program = python()
    if not program then
      pending "no numpy: run scripts/setup test, or set WANE_NUMPY_PYTHON to a Python that has it"
      return
    end
    assert.equal(0, os.execute "mkdir -p build/cases")
    local seed = os.getenv "WANE_SEED" or "1"
    assert.equal(0, os.execute(program .. " spec/tensor/numpy_cases.py build/cases/numpy " .. seed .. " 21 >/dev/null 2>&1"))
    check "build/cases/numpy"
  end)
end)
