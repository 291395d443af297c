--- Mixtures of experts: rows sorted by expert against a plain sort, and their products against wane_linear of each expert's rows alone,
-- bit for bit: every level, every kind of weight, experts without rows, with few, with many and with more than one slice.
local ffi = require "ffi"
local s = require "linear8.support"
local q = require "support.quant"
local C = s.C
local check, stream = s.core.check, s.core.stream

local function handle() return ffi.new "wane_handle" end
local function cast(x, dtype)
  local h = handle()
  check(C.wane_cast(stream(), h, x, s.core.dtype(dtype)))
  return h
end

--- ids [M, k] as lists -> tensor.
local function ids_tensor(ids, dtype)
  local M, k = #ids, #ids[1]
  local data = ffi.new("int32_t[?]", M * k)
  for m = 1, M do for j = 1, k do data[(m - 1) * k + j - 1] = ids[m][j] end end
  local t = s.tensor("i32", { M, k }, data)
  return dtype == "i64" and cast(t, "i64") or t
end

local function route(ids, experts)
  local source, place, bounds = handle(), handle(), handle()
  check(C.wane_route(stream(), source, place, bounds, ids, experts))
  return source, place, bounds
end

local function multiply(x, bounds, weights, compute, threshold)
  local list = ffi.new("const wane_handle *[?]", #weights)
  for i, w in ipairs(weights) do list[i - 1] = w end
  local y = handle()
  check(C.wane_linear_experts(stream(), y, x, bounds, list, #weights, compute, threshold))
  return y
end

local function select(x, index)
  local h = handle()
  check(C.wane_index_select(stream(), h, x, 0, index))
  return h
end

local function narrow(x, start, length)
  local h = handle()
  check(C.wane_view_narrow(stream(), h, x, 0, start, length, 1))
  return h
end

--- Choices of M rows, k different ones of `experts` a row; `used` of them only.
local function choices(r, M, k, used)
  local ids = {}
  for m = 1, M do
    local left = {}
    for e = 0, used - 1 do left[#left + 1] = e end
    ids[m] = {}
    for j = 1, k do ids[m][j] = table.remove(left, r.integer(#left) + 1) end
  end
  return ids
end

local function weight(kind, N, K, r)
  local data = ffi.new("float[?]", N * K)
  for i = 0, N * K - 1 do data[i] = 0.05 * r.normal() end
  local plain = s.tensor("f32", { N, K }, data)
  if kind == "f32" or kind == "f16" or kind == "bf16" then return cast(plain, kind) end
  local name, nested = kind:match "^(%S+)", kind:find "nested" ~= nil
  return q.quantize(plain, name, 64, nested)
end

--- { M, k, experts, experts in use }
local cases = { { 1, 2, 4, 4 }, { 1, 1, 1, 1 }, { 3, 2, 5, 3 }, { 7, 3, 130, 130 }, { 40, 2, 3, 3 }, { 60, 1, 6, 2 } }

describe("a mixture's rows", function()
  it("are sorted by expert, in the order of rows within one", function()
    local r = s.random(21)
    for _, dtype in ipairs { "i32", "i64" } do
      for _, case in ipairs(cases) do
        local M, k, E = case[1], case[2], case[3]
        local ids = choices(r, M, k, case[4])
        local source, place, bounds = route(ids_tensor(ids, dtype), E)
        local from, to, limits = s.read(source), s.read(place), s.read(bounds)
        local at = 0
        for e = 0, E - 1 do
          assert.equal(at, limits[e])
          for m = 1, M do
            for j = 1, k do
              if ids[m][j] == e then
                assert.equal(m - 1, from[at])
                assert.equal(at, to[(m - 1) * k + j - 1])
                at = at + 1
              end
            end
          end
        end
        assert.equal(M * k, limits[E])
      end
    end
  end)

  for _, kind in ipairs { "f32", "f16", "bf16", "nf4", "nf4 nested", "fp4", "int8", "int8 threshold 0", "int8 threshold 3", "int8-blockwise", "mixed" } do
    it("times their experts' weights, " .. kind .. ": the bits of each expert's product alone", function()
      local r, N, K = s.random(23), 50, 128
      local threshold = tonumber(kind:match "threshold (%d+)") or -1
      for _, case in ipairs { cases[1], cases[3], cases[4], cases[5], cases[6] } do
        local M, E = case[1], case[3]
        local weights = {}
        local mixed = { "f32", "nf4", "int8", "bf16" }
        for e = 1, E do weights[e] = weight(kind == "mixed" and mixed[e % 4 + 1] or kind, N, K, r) end
        local source, _, bounds = route(ids_tensor(choices(r, M, case[2], case[4])), E)
        local x = select(s.tensor("f32", { M, K }, s.activations(r, M, K, { 5, 77 })), source)
        local limits = s.read(bounds)
        s.at_levels(function(level)
          for _, compute in ipairs { C.WANE_COMPUTE_F32, C.WANE_COMPUTE_BF16, C.WANE_COMPUTE_BF16 + C.WANE_COMPUTE_INVARIANT } do
            local got = s.read(multiply(x, bounds, weights, compute, threshold))
            for e = 0, E - 1 do
              local rows = limits[e + 1] - limits[e]
              if rows > 0 then
                local want, n = s.linear(narrow(x, limits[e], rows), weights[e + 1], nil, compute, threshold)
                assert.equal(ffi.string(want, n * 4), ffi.string(got + limits[e] * N, n * 4), ("%s: %d rows of expert %d"):format(level, rows, e))
              end
            end
          end
        end)
      end
    end)
  end

  it("of one expert that has more than a slice", function()
    local r, N, K, M = s.random(25), 9, 64, 2600
    for _, kind in ipairs { "nf4", "int8 threshold 3" } do
      local threshold = tonumber(kind:match "threshold (%d+)") or -1
      local weights, ids = { weight(kind, N, K, r), weight(kind, N, K, r) }, {}
      for m = 1, M do ids[m] = { m % 9 == 0 and 0 or 1 } end
      local source, _, bounds = route(ids_tensor(ids), 2)
      local x = select(s.tensor("f32", { M, K }, s.activations(r, M, K)), source)
      local limits = s.read(bounds)
      local got = s.read(multiply(x, bounds, weights, C.WANE_COMPUTE_F32, threshold))
      for e = 0, 1 do
        local want, n = s.linear(narrow(x, limits[e], limits[e + 1] - limits[e]), weights[e + 1], nil, C.WANE_COMPUTE_F32, threshold)
        assert.equal(ffi.string(want, n * 4), ffi.string(got + limits[e] * N, n * 4), kind)
      end
    end
  end)

  it("give the same bits with any number of threads, and 16-bit rows 16-bit results", function()
    local r, N, K, before = s.random(27), 200, 256, C.wane_threads()
    local weights = {}
    for e = 1, 5 do weights[e] = weight("nf4", N, K, r) end
    for _, M in ipairs { 1, 30 } do
      local source, _, bounds = route(ids_tensor(choices(r, M, 2, 5)), 5)
      local x = select(s.tensor("f32", { M, K }, s.activations(r, M, K)), source)
      local seen = {}
      for threads = 1, 3 do
        C.wane_set_threads(threads)
        local y, n = s.read(multiply(x, bounds, weights, C.WANE_COMPUTE_BF16, -1))
        seen[threads] = ffi.string(y, n * 4)
      end
      C.wane_set_threads(before)
      assert.is_true(seen[1] == seen[2] and seen[1] == seen[3])
      local half = multiply(cast(x, "bf16"), bounds, weights, C.WANE_COMPUTE_F32, -1)
      local wide = s.read(cast(multiply(cast(cast(x, "bf16"), "f32"), bounds, weights, C.WANE_COMPUTE_F32, -1), "bf16"))
      local got, n = s.read(half)
      for i = 0, n - 1 do assert.equal(wide[i], got[i]) end
    end
  end)

  it("of none: no rows give no rows", function()
    local r = s.random(29)
    local source, _, bounds = route(s.tensor("i32", { 0, 2 }, nil), 3)
    local w = weight("nf4", 8, 64, r)
    local x = select(s.tensor("f32", { 1, 64 }, s.activations(r, 1, 64)), source)
    local _, n = s.read(multiply(x, bounds, { w, w, w }, C.WANE_COMPUTE_F32, -1))
    assert.equal(0, n)
  end)
end)

describe("a mixture's mistakes", function()
  local function message(status) assert.is_true(status < 0) return ffi.string(C.wane_error()) end
  local a, b, c = handle(), handle(), handle()

  it("are told", function()
    local r = s.random(31)
    local w, other, x = weight("f32", 4, 8, r), weight("f32", 5, 8, r), s.tensor("f32", { 2, 8 }, s.activations(r, 2, 8))
    local ids = ids_tensor { { 0 }, { 1 } }
    local _, _, bounds = route(ids, 2)
    local function product(list, count, given, over)
      local weights = ffi.new("const wane_handle *[?]", #list)
      for i, t in ipairs(list) do weights[i - 1] = t end
      return message(C.wane_linear_experts(stream(), a, given or x, over or bounds, weights, count or #list, C.WANE_COMPUTE_F32, -1))
    end
    assert.matches("expert 1 is %[5, 8%] f32; expected %[4, 8%]", product { w, other })
    assert.matches("bounds %[4%] i32", product { w, w, w })
    assert.matches("expected 1 to 4096", product({ w, w }, 0))
    assert.matches("expected x %[rows, K%]", product({ w, w }, 2, w == x and w or s.tensor("i32", { 2, 8 }, ffi.new "int32_t[16]")))
    assert.matches("bounds %[3%] i32", product({ w, w }, 2, x, ids))
    local narrow_x = s.tensor("f32", { 2, 7 }, s.activations(r, 2, 7))
    assert.matches("expert 0 is %[4, 8%] f32; expected %[4, 7%]", product({ w, w }, 2, narrow_x))
    assert.matches("expected ids %[rows, choices%]", message(C.wane_route(stream(), a, b, c, bounds, 2)))
    assert.matches("i32 or i64", message(C.wane_route(stream(), a, b, c, x, 2)))
    assert.matches("expected 1 to 4096", message(C.wane_route(stream(), a, b, c, ids, 0)))
  end)

  it("a choice out of range fails the op", function()
    for _, id in ipairs { 2, -1 } do
      local source = route(ids_tensor { { 0 }, { id } }, 2)
      local info = ffi.new "wane_info"
      check(C.wane_tensor_info(source, info))
      assert.is_true(s.core.wait(info.ticket) < 0)
      assert.is_truthy(ffi.string(C.wane_error()):find("choice 0 of row 1 is expert " .. id .. ", there are 2", 1, true))
      C.wane_tensor_free(source)
      C.wane_stream_poll(stream(), 0)
      pcall(check, C.wane_fill(stream(), s.tensor("f32", { 1 }, ffi.new "float[1]"), 0))
    end
  end)
end)
