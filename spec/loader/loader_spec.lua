-- Loading: chunks equal the whole, cancel and failures leave nothing, memory stays bounded, hosts keep ticking.
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C
local checkpoint = require "wane.checkpoint"
local loader = require "wane.loader"
local files = require "support.files"
local wane = require "wane"

local folder

-- n pseudo-random f32 values, a normal-ish mixture with outliers and zeros, as bytes.
local function values(n, seed)
  local out, state = ffi.new("float[?]", n), seed
  for i = 0, n - 1 do
    state = (state * 16807) % 2147483647
    local u = state / 2147483647 - 0.5
    out[i] = i % 97 == 0 and u * 40 or i % 31 == 0 and 0 or u * u * u
  end
  return ffi.string(out, 4 * n)
end

local function tensor_as(dtype, shape, seed)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  local t = files.tensor("f32", shape, values(n, seed))
  if dtype == "f32" then return t end
  local h = core.handle_type()
  core.check(C.wane_cast(core.stream(), h, t.h, core.dtype(dtype)))
  return require("wane.tensor").wrap(h)
end

-- A checkpoint of one tensor "w.weight" in a folder of its own; with heads, as GGUF's converter would have arranged it.
local function checkpoint_of(t, name)
  local path = files.folder()
  assert(checkpoint.write_safetensors(path .. "/model.safetensors", { [name or "w.weight"] = t }))
  files.write(path .. "/config.json", '{"model_type":"none"}')
  return assert(checkpoint.open(path)), path
end

local schemes = {
  { type = "nf4", block_size = 64, double_quant = true }, { type = "nf4", block_size = 4096 }, { type = "fp4", block_size = 32 },
  { type = "fp4", block_size = 128, double_quant = true }, { type = "int8" }, { type = "int8-blockwise", block_size = 4096 },
  { type = "int8-blockwise", block_size = 77 }, { type = "int8-blockwise", block_size = 256, signed = false },
}

local function assert_same_parts(whole, loaded, what)
  local a, b = files.parts(whole), files.parts(loaded)
  for part = 0, C.WANE_PARTS - 1 do assert.is_true(a[part] == b[part], ("%s: part %d differs"):format(what, part)) end
end

local function kind_of(scheme) return scheme.signed == false and "int8-blockwise-unsigned" or scheme.type end

describe("loader", function()
  setup(function() folder = files.folder() end)
  teardown(files.clean)

  describe("chunk by chunk", function()
    -- 1500 x 1001 f32 is 6 MB: three chunks, whose borders fall inside rows; 3 x 7 is smaller than a block
    for _, dtype in ipairs { "f32", "f16", "bf16" } do
      it("equals quantizing the whole " .. dtype .. " tensor, every scheme, odd shapes", function()
        for _, shape in ipairs { { 1500, 1001 }, { 3, 7 }, { 64, 64 }, { 1, 5 } } do
          local t = tensor_as(dtype, shape, 5)
          local c = checkpoint_of(t)
          for _, scheme in ipairs(schemes) do
            local list = assert(loader.load(c, { { entry = c:find "w.weight", scheme = scheme } }))
            local whole = files.quantize(t, kind_of(scheme), scheme.block_size, scheme.double_quant)
            assert_same_parts(whole, list[1], ("%s [%d, %d] %s"):format(dtype, shape[1], shape[2], scheme.type))
            list[1]:close()
            whole:close()
          end
        end
      end)

      it("equals casting the whole " .. dtype .. " tensor", function()
        local t = tensor_as(dtype, { 1500, 1001 }, 9)
        local c = checkpoint_of(t)
        for _, target in ipairs { "f32", "f16", "bf16" } do
          local list = assert(loader.load(c, { { entry = c:find "w.weight", dtype = target } }, { io = "read" }))
          local h = core.handle_type()
          core.check(C.wane_cast(core.stream(), h, t.h, core.dtype(target)))
          local whole = require("wane.tensor").wrap(h)
          assert.is_true(files.bytes(whole) == files.bytes(list[1]), target)
          list[1]:close()
          whole:close()
        end
      end)
    end

    it("takes rows and blocks larger than a chunk", function()
      local t = tensor_as("f32", { 3, 700001 }, 15)
      local c = checkpoint_of(t)
      for _, scheme in ipairs { { type = "int8" }, { type = "int8-blockwise", block_size = 1000003 } } do
        local list = assert(loader.load(c, { { entry = c:find "w.weight", scheme = scheme } }))
        assert_same_parts(files.quantize(t, scheme.type, scheme.block_size), list[1], scheme.type)
      end
    end)

    it("puts rows of heads back while it quantizes, blocks straddling heads", function()
      local heads, size, width = 6, 10, 37            -- a head of 370 values: no multiple of any block
      local t = tensor_as("f32", { heads * size, width }, 21)
      local text, rows = files.bytes(t), {}
      for h = 0, heads - 1 do
        for j = 0, size / 2 - 1 do
          for s = 0, 1 do
            local r = h * size + s * size / 2 + j
            rows[#rows + 1] = text:sub(r * width * 4 + 1, (r + 1) * width * 4)
          end
        end
      end
      local c = checkpoint_of(files.tensor("f32", { heads * size, width }, table.concat(rows)))
      local e = c:find "w.weight"
      e.arrange, e.heads = "rope", heads
      for _, scheme in ipairs(schemes) do
        local list = assert(loader.load(c, { { entry = e, scheme = scheme } }))
        assert_same_parts(files.quantize(t, kind_of(scheme), scheme.block_size, scheme.double_quant), list[1], scheme.type)
      end
      assert.is_true(files.bytes(assert(loader.load(c, { { entry = e } }))[1]) == text)
      local h = core.handle_type()
      core.check(C.wane_cast(core.stream(), h, t.h, C.WANE_BF16))
      assert.is_true(files.bytes(assert(loader.load(c, { { entry = e, dtype = "bf16" } }))[1]) == files.bytes(require("wane.tensor").wrap(h)))
    end)

    it("turns matrices round while it quantizes and casts them, tile by tile", function()
      -- [1001, 1500] f32 is 6 MB: three tiles; 48 columns and blocks of 64: a block straddles rows
      for _, case in ipairs { { "f32", 1001, 1500 }, { "f16", 48, 200 }, { "bf16", 64, 33 }, { "f32", 1, 5 }, { "f16", 700, 3001 } } do
        local dtype, cols, rows = unpack(case)
        local t = tensor_as(dtype, { cols, rows }, 27)
        local turned = t:t():contiguous()
        local c = checkpoint_of(t)
        local e = c:find "w.weight"
        e.arrange, e.shape = "transpose", { rows, cols }
        for _, scheme in ipairs(schemes) do
          local list = assert(loader.load(c, { { entry = e, scheme = scheme } }))
          local whole = files.quantize(turned, kind_of(scheme), scheme.block_size, scheme.double_quant)
          assert_same_parts(whole, list[1], ("%s [%d, %d] %s"):format(dtype, rows, cols, scheme.type))
          list[1]:close()
          whole:close()
        end
        for _, target in ipairs { "f32", "f16", "bf16" } do
          local list = assert(loader.load(c, { { entry = e, dtype = target } }))
          assert.same({ rows, cols }, list[1]:shape())
          assert.is_true(files.bytes(turned:to(target)) == files.bytes(list[1]), dtype .. " to " .. target)
        end
      end
    end)

    it("refuses to turn what is no float matrix", function()
      for _, case in ipairs { { "f32", { 2, 3, 4 } }, { "i32", { 2, 3 } } } do
        local c = checkpoint_of(files.tensor(case[1], case[2], ("\0"):rep(case[1] == "f32" and 96 or 24)))
        local e = c:find "w.weight"
        e.arrange = "transpose"
        local list, message, code = loader.load(c, { { entry = e } })
        assert.is_nil(list)
        assert.equal("WANE_E_SHAPE", code)
        assert.truthy(message:find("a float matrix was expected", 1, true))
      end
    end)

    it("fails, and leaves nothing, where a file was cut inside a matrix that is turned", function()
      local c, path = checkpoint_of(tensor_as("f32", { 1001, 1500 }, 3))
      local e = c:find "w.weight"
      e.arrange, e.shape = "transpose", { 1500, 1001 }
      assert(os.execute(("truncate -s 3000000 '%s/model.safetensors'"):format(path)) == 0)
      local list, message, code = loader.load(c, { { entry = e, scheme = schemes[1] } })
      assert.is_nil(list)
      assert.equal("WANE_E_IO", code)
      assert.truthy(message:find("truncated", 1, true))
    end)

    it("quantizes GGUF blocks as their exact values", function()
      local random = files.random(3)
      for _, kind in ipairs { { 2, 18 }, { 3, 20 }, { 6, 22 }, { 7, 24 }, { 8, 34 } } do
        local rows, width, blocks = 300, 1024, {}
        for i = 1, rows * width / 32 do
          local bytes = { string.char(random(256), 0x20 + random(20)) }        -- an f16 scale that is finite
          if kind[1] == 3 or kind[1] == 7 then bytes[2] = string.char(random(256), 0x20 + random(20)) end
          while #table.concat(bytes) < kind[2] do bytes[#bytes + 1] = string.char(random(256)) end
          blocks[i] = table.concat(bytes)
        end
        local path = files.write(folder .. "/b.gguf", files.gguf({}, { { "w.weight", { width, rows }, kind[1], 0 } }, table.concat(blocks)))
        local c = assert(checkpoint.open(path))
        local e = c:find "w.weight"
        local exact = assert(loader.load(c, { { entry = e, dtype = "f32" } }))[1]
        local h = core.handle_type()
        local mapped = assert(loader.load(c, { { entry = e } }))[1]
        core.check(C.wane_dequantize(core.stream(), h, mapped.h, C.WANE_F32))
        assert.is_true(files.bytes(require("wane.tensor").wrap(h)) == files.bytes(exact), e.dtype)
        for _, scheme in ipairs { schemes[1], schemes[5], schemes[7] } do
          local list = assert(loader.load(c, { { entry = e, scheme = scheme } }))
          assert_same_parts(files.quantize(exact, scheme.type, scheme.block_size, scheme.double_quant), list[1], e.dtype .. " " .. scheme.type)
        end
        assert.is_true(files.parts(assert(loader.load(c, { { entry = e } }, { io = "read" }))[1])[0] == table.concat(blocks))
      end
    end)

    it("gives the same bytes with one worker and with several", function()
      local t = tensor_as("f16", { 900, 1001 }, 33)
      local c = checkpoint_of(t)
      local first
      for _, threads in ipairs { 1, 2, 4 } do
        wane.threads(threads)
        local parts = files.parts(assert(loader.load(c, { { entry = c:find "w.weight", scheme = schemes[1] } }))[1])
        first = first or parts
        for part, text in pairs(first) do assert.is_true(parts[part] == text) end
      end
      wane.threads(0)
    end)

    it("loads empty tensors and an empty list", function()
      local c = checkpoint_of(files.tensor("f32", { 0, 8 }, ""))
      local list = assert(loader.load(c, { { entry = c:find "w.weight", dtype = "f16" }, { entry = c:find "w.weight" } }))
      assert.same({ 0, 8 }, list[1]:shape())
      assert.equal("f16", list[1]:dtype())
      assert.same({}, assert(loader.load(c, {})))
    end)
  end)

  it("quantizes another way what a folder holds quantized", function()
    local c = assert(checkpoint.open "spec/fixtures/quant/checkpoints/llama/nf4-dq-bf16")
    local e = c:find "model.layers.0.mlp.up_proj.weight"
    local exact = assert(loader.load(c, { { entry = e, dtype = "f32" } }))[1]
    local again = assert(loader.load(c, { { entry = e, scheme = { type = "int8" } } }))[1]
    assert_same_parts(files.quantize(exact, "int8"), again, "nf4 to int8")
    local same = assert(loader.load(c, { { entry = e, scheme = { type = "nf4", block_size = 64, double_quant = true } } }))[1]
    assert_same_parts(assert(loader.load(c, { { entry = e } }))[1], same, "the same scheme")
  end)

  it("tells progress, calls on_done, and refuses requests that make no sense", function()
    local t = tensor_as("f32", { 2000, 1000 }, 2)
    local c = checkpoint_of(t)
    local e, calls, got = c:find "w.weight", {}, nil
    local list = assert(loader.load(c, { { entry = e, scheme = { type = "nf4" }, on_done = function(x) got = x end } },
      { progress = function(done, total, tensors) calls[#calls + 1] = { done, total, tensors } end }))
    assert.equal(list[1], got)
    assert.same({ 8000000, 8000000, 1 }, calls[#calls])
    assert.has_error(function() loader.load(c, { {} }) end)
    assert.has_error(function() loader.load(c, { { entry = e } }, { io = "telepathy" }) end)
    assert.has_error(function() loader.load(c, { { entry = e, scheme = { type = "q3" } } }) end)
    for _, bad in ipairs { { scheme = { type = "nf4", block_size = 48 } }, { scheme = { type = "fp4", block_size = 8192 } }, { dtype = "i32" } } do
      local nothing, message, code = loader.load(c, { { entry = e, scheme = bad.scheme, dtype = bad.dtype } })
      assert.is_nil(nothing)
      assert.is_string(message)
      assert.is_truthy(code == "WANE_E_ARG" or code == "WANE_E_DTYPE")
    end
  end)

  describe("when it ends early", function()
    local function memory()
      collectgarbage()
      collectgarbage()
      core.check(core.wait())
      local m = wane.memory()
      return m.heap, m.tensors
    end

    -- The job's thread lets go a moment after the caller does.
    local function settles(heap, tensors)
      local now_heap, now_tensors
      for _ = 1, 200 do
        now_heap, now_tensors = memory()
        if now_heap <= heap and now_tensors == tensors then return true end
        os.execute "sleep 0.01"
      end
      return false, ("heap %d, was %d; tensors %d, were %d"):format(now_heap, heap, now_tensors, tensors)
    end

    it("by a cancel at any point, nothing is left behind", function()
      local c = checkpoint_of(tensor_as("f32", { 3000, 1000 }, 2))
      local e = c:find "w.weight"
      local request = { { entry = e, scheme = schemes[1] }, { entry = e, dtype = "f16" }, { entry = e, scheme = { type = "int8" } } }
      for _, t in ipairs(assert(loader.load(c, request))) do t:close() end
      local heap, tensors = memory()
      local cancelled = 0
      for point = 1, 12 do
        local count = 0
        local list, _, code = loader.load(c, request, {
          started = function(cancel) if point == 1 then cancel() end end,
          cancelled = function()
            count = count + 1
            return count >= point - 1
          end })
        if list then
          for _, t in ipairs(list) do t:close() end
        else
          cancelled = cancelled + 1
          assert.equal("WANE_E_CANCELLED", code)
        end
      end
      assert.is_true(cancelled >= 1)
      assert(settles(heap, tensors))
    end)

    it("by a job that nobody waits for", function()
      local c = checkpoint_of(tensor_as("f32", { 3000, 1000 }, 2))
      local heap, tensors = memory()
      for _ = 1, 5 do
        local load, job = ffi.new "wane_load *[1]", ffi.new "wane_job *[1]"
        core.check(C.wane_load_new(load))
        local item = ffi.new("wane_load_item", { entry = 0, source = C.WANE_F32, target = C.WANE_NF4, block_size = 64, nested = 1, ndim = 2 })
        item.shape[0], item.shape[1] = 3000, 1000
        core.check(C.wane_load_add(load[0], c.index.handle, item))
        core.check(C.wane_load_start(load[0], job))
        C.wane_job_free(job[0])
      end
      assert(settles(heap, tensors))
    end)

    it("by a file cut short meanwhile, naming tensor and file", function()
      local c, path = checkpoint_of(tensor_as("f32", { 3000, 1000 }, 2))
      local e = c:find "w.weight"
      assert.equal(0, os.execute("truncate -s 5000000 '" .. path .. "/model.safetensors'"))
      local heap, tensors = memory()
      for _, request in ipairs { { scheme = schemes[1] }, { dtype = "bf16" } } do
        local list, message, code = loader.load(c, { { entry = e, scheme = request.scheme, dtype = request.dtype } })
        assert.is_nil(list)
        assert.equal("WANE_E_IO", code)
        assert.truthy(message:find("w.weight", 1, true) and message:find(path, 1, true) and message:find("truncated", 1, true), message)
      end
      local list, message = loader.load(c, { { entry = e } })
      assert.is_nil(list)
      assert.truthy(message:find("changed its size", 1, true), message)
      assert(settles(heap, tensors))
    end)

    it("by the failure of any single allocation", function()
      local t = files.tensor("f32", { 100, 64 }, values(6400, 7))
      local _, path = checkpoint_of(t, "model.layers.0.mlp.up_proj.weight")
      files.write(path .. "/config.json", '{"model_type":"llama"}')
      local function attempt()
        local c, message, code = checkpoint.open(path)
        if not c then return nil, message, code end
        local e = c:find "model.layers.0.mlp.up_proj.weight"
        local list
        list, message, code = loader.load(c, { { entry = e, scheme = schemes[1] }, { entry = e, dtype = "bf16" }, { entry = e } })
        c:close()
        return list, message, code
      end
      for _, x in ipairs(assert(attempt())) do x:close() end
      local heap, tensors = memory()
      local n, done = 0
      repeat
        n = n + 1
        C.wane_fail_allocation(n)
        local ok, list, message, code = pcall(attempt)
        C.wane_fail_allocation(0)
        done = ok and list
        if not done then
          assert.truthy((ok and message or list):find("out of memory", 1, true), ok and message or list)
          if ok then assert.equal("WANE_E_MEMORY", code) end
        end
      until done or n > 1000
      for _, x in ipairs(done) do x:close() end
      print(("the first allocation that no longer fails a load: %d"):format(n))
      assert.is_true(n > 20 and n < 1000)
      assert(settles(heap, tensors))
    end)
  end)

  it("does not grow over 50 loads", function()
    local c = checkpoint_of(tensor_as("f16", { 700, 1001 }, 2))
    local e, rss = c:find "w.weight", nil
    for round = 1, 50 do
      for _, t in ipairs(assert(loader.load(c, { { entry = e, scheme = schemes[1] }, { entry = e } }))) do t:close() end
      if round == 10 then rss = wane.memory().rss end
    end
    assert.is_true(wane.memory().rss < rss + 4e6)
  end)

  it("keeps a luv loop ticking, and can be cancelled from it", function()
    local found, uv = pcall(require, "luv")
    if not found then pending "luv is not installed" return end
    local c = checkpoint_of(tensor_as("f32", { 4000, 1000 }, 2))
    local e = c:find "w.weight"
    local host = require "wane.host.luv"
    local ticks, result, code = 0, nil, nil
    local timer = uv.new_timer()
    timer:start(1, 1, function() ticks = ticks + 1 end)
    host.run(function() result = assert(loader.load(c, { { entry = e, scheme = schemes[1] }, { entry = e, scheme = { type = "int8" } } })) end,
      function(err) timer:close() assert(not err, err) end)
    uv.run()
    assert.equal("nf4", result[1]:dtype())
    assert.is_true(ticks >= 2)
    host.run(function()
      local cancel
      local stopper = uv.new_timer()
      stopper:start(1, 0, function() stopper:close() cancel() end)
      local message
      result, message, code = loader.load(c, { { entry = e, scheme = schemes[1] }, { entry = e, scheme = schemes[2] }, { entry = e, scheme = schemes[3] } },
        { started = function(fn) cancel = fn end })
      assert.equal(result == nil, message ~= nil)
    end, function(err) assert(not err, err) end)
    uv.run()
    assert.is_truthy(result or code == "WANE_E_CANCELLED")
  end)
end)
