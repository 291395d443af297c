-- Quantized tensors through the C API: making, taking apart, lifetimes, refusals, memory that runs out.
local ffi = require "ffi"
local core = require "wane.core"
local q = require "support.quant"
local C = core.C

local function message() return ffi.string(C.wane_error()) end
local function code(bytes) return q.upload("u8", { bytes }, string.rep("\1", bytes), bytes) end
local function scales(n)
  local list = {}
  for i = 1, n do list[i] = i end
  return q.f32(list)
end
local function refused(status, pattern, kind, shape, block, parts)
  local _, got = q.assemble(kind, shape, block, parts)
  assert.equal(tonumber(status), got)
  assert.matches(pattern, message())
end
local function live_tensors()
  collectgarbage() collectgarbage()
  local m = ffi.new "wane_memory"
  C.wane_memory_read(m)
  return tonumber(m.tensors)
end

describe("quantized tensors", function()
  it("are assembled from parts and share their memory", function()
    local codes, absmax = code(32), scales(1)
    local w = assert(q.assemble("nf4", { 1, 64 }, 64, { [0] = codes, absmax }))
    local y = q.values(q.dequantize(w), "float")
    assert.equal(-1, y[0])                                  -- 0x01: the high nibble first
    assert.equal(ffi.new("float", -0.6961928), y[1])
    core.check(C.wane_tensor_upload(core.stream(), q.part(w, C.WANE_PART_ABSMAX), ffi.new("float[1]", 2), 4))
    assert.equal(-2, q.values(q.dequantize(w), "float")[0])
    local info = core.info_type()
    core.check(C.wane_tensor_info(w, info))
    assert.equal(36, tonumber(info.nbytes))
    assert.equal(64, info.block_size)
  end)

  it("keep their parts alive, and parts keep their memory", function()
    local before = live_tensors()
    local w, values
    do
      local codes, absmax = code(32), scales(1)
      w = assert(q.assemble("nf4", { 64 }, 64, { [0] = codes, absmax }))
      C.wane_tensor_free(codes)
      C.wane_tensor_free(absmax)
      values = q.bytes(q.dequantize(w))
    end
    local part = q.part(w, C.WANE_PART_CODES)
    assert.equal(values, q.bytes(q.dequantize(w)))
    C.wane_tensor_free(w)
    assert.equal(string.rep("\1", 32), q.bytes(part))
    C.wane_tensor_free(part)
    assert.equal(before, live_tensors())
  end)

  it("made inside a scope go with it; moved out, they stay whole", function()
    local before, x = live_tensors(), scales(640)
    local s, scope = core.stream(), ffi.new "wane_scope *[1]"
    core.check(C.wane_scope_open(s, scope))
    local kept, gone = core.handle_type(), core.handle_type()
    core.check(C.wane_quantize(s, kept, x, C.WANE_NF4, 64, 1))
    core.check(C.wane_quantize(s, gone, x, C.WANE_INT8, 0, 0))
    core.check(C.wane_tensor_move(s, kept, nil))
    C.wane_scope_close(s, scope[0])
    assert.equal(640 * 4, #q.bytes(q.dequantize(kept)))
    local out = core.handle_type()
    assert.equal(tonumber(C.WANE_E_STALE), C.wane_dequantize(s, out, gone, C.WANE_F32))
    C.wane_tensor_free(kept)
    C.wane_tensor_free(x)
    assert.equal(before, live_tensors())
  end)

  it("refuse parts that do not fit, naming the part, what it must be and what it is", function()
    refused(C.WANE_E_ARG, "nf4 needs the part codes", "nf4", { 64 }, 64, {})
    refused(C.WANE_E_SHAPE, "part codes of nf4 must be contiguous, 32 bytes; found %[31%] u8", "nf4", { 64 }, 64, { [0] = code(31), scales(1) })
    refused(C.WANE_E_SHAPE, "part absmax of nf4 must be contiguous, 1 f32; found %[2%] f32", "nf4", { 64 }, 64, { [0] = code(32), scales(2) })
    refused(C.WANE_E_SHAPE, "part absmax of int8 must be contiguous, 3 f32; found %[1%]", "int8", { 3, 4 }, 0, { [0] = code(12), scales(1) })
    refused(C.WANE_E_ARG, "int8%-blockwise needs the part code$", "int8-blockwise", { 64 }, 64, { [0] = code(64), scales(1) })
    refused(C.WANE_E_SHAPE, "part absmax of fp4 must be contiguous, 1 u8; found %[1%] f32", "fp4", { 64 }, 64, { [0] = code(32), scales(1), scales(1) })
    refused(C.WANE_E_SHAPE, "rows of q4_k must be a multiple of 256 values, found 64", "q4_k", { 4, 64 }, 0, { [0] = code(144) })
    refused(C.WANE_E_ARG, "block size of nf4 must lie in 32 to 4096, found 8192", "nf4", { 64 }, 8192, { [0] = code(32), scales(1) })
    refused(C.WANE_E_DTYPE, "f32 is no quantized kind", "f32", { 64 }, 64, { [0] = code(32) })
    refused(C.WANE_E_SHAPE, "is impossible", "nf4", { 2 ^ 40, 2 ^ 40 }, 64, { [0] = code(32), scales(1) })
    refused(C.WANE_E_SHAPE, "is impossible", "nf4", { 4, -1 }, 64, { [0] = code(32), scales(1) })
  end)

  it("take 4-bit codes in another storage type, as bytes", function()
    local w = assert(q.assemble("nf4", { 2, 32 }, 64, { [0] = q.upload("bf16", { 16, 1 }, string.rep("\1", 32), 32), scales(1) }))
    assert.equal(-1, q.values(q.dequantize(w), "float")[0])
  end)

  it("say which parts and offset they have", function()
    local w, h, offset = q.quantize(scales(640), "nf4", 64), core.handle_type(), ffi.new "float[1]"
    assert.equal(tonumber(C.WANE_E_NOTFOUND), C.wane_quantized_part(core.stream(), h, w, C.WANE_PART_NESTED_ABSMAX))
    assert.matches("%[640%] nf4 has no part nested_absmax", message())
    assert.equal(tonumber(C.WANE_E_ARG), C.wane_quantized_part(core.stream(), h, w, 9))
    assert.equal(tonumber(C.WANE_E_DTYPE), C.wane_quantized_part(core.stream(), h, scales(3), 0))
    assert.matches("%[3%] f32 is not quantized", message())
    assert.equal(tonumber(C.WANE_E_NOTFOUND), C.wane_quantized_offset(w, offset))
    assert.equal(tonumber(C.WANE_E_STALE), C.wane_quantized_offset(core.handle_type(), offset))
    local nested = q.quantize(scales(640), "nf4", 64, true)
    core.check(core.wait())
    core.check(C.wane_quantized_offset(nested, offset))
    assert.equal(352, offset[0])                            -- the mean of 64, 128 … 640
  end)

  it("refuse what quantizing cannot make", function()
    local h, s = core.handle_type(), core.stream()
    assert.equal(tonumber(C.WANE_E_UNSUPPORTED), C.wane_quantize(s, h, scales(256), C.WANE_Q4_K, 0, 0))
    assert.equal(tonumber(C.WANE_E_DTYPE), C.wane_quantize(s, h, scales(256), C.WANE_F16, 64, 0))
    assert.equal(tonumber(C.WANE_E_DTYPE), C.wane_quantize(s, h, scales(256), 99, 64, 0))
    assert.equal(tonumber(C.WANE_E_DTYPE), C.wane_quantize(s, h, code(256), C.WANE_NF4, 64, 0))
    assert.equal(tonumber(C.WANE_E_ARG), C.wane_quantize(s, h, scales(256), C.WANE_BLOCK8, 0, 0))
    assert.equal(tonumber(C.WANE_E_DTYPE), C.wane_dequantize(s, h, q.quantize(scales(64), "nf4", 64), C.WANE_I8))
  end)

  it("decode any rows of a table: embedding over odd row lengths, every kind", function()
    local list = {}
    for i = 1, 64 * 33 do list[i] = math.sin(i) end
    local table_, ids = q.f32(list, { 64, 33 }), q.upload("i32", { 4 }, ffi.new("int32_t[4]", 63, 0, 31, 1), 16)
    q.each_level(function(level)
      for kind, block in pairs { nf4 = 64, fp4 = 33, int8 = 0, ["int8-blockwise"] = 50 } do
        for _, nested in ipairs(kind:match "4$" and { false, true } or { false }) do
          local w, y = q.quantize(table_, kind, block, nested), core.handle_type()
          core.check(C.wane_embedding(core.stream(), y, w, ids, C.WANE_F32))
          local got, all = q.bytes(ffi.gc(y, C.wane_tensor_free)), q.bytes(q.dequantize(w))
          for i, id in ipairs { 63, 0, 31, 1 } do
            assert.is_true(got:sub((i - 1) * 132 + 1, i * 132) == all:sub(id * 132 + 1, (id + 1) * 132), level .. " " .. kind)
          end
        end
      end
    end)
  end)

  it("survive every allocation failing once", function()
    local x = scales(4096)
    core.check(core.wait())
    for _, case in ipairs { { "nf4", 64, true }, { "int8-blockwise", 64, false }, { "int8", 0, false } } do
      local before, failures = live_tensors(), 0
      for n = 1, 200 do
        local h, y = core.handle_type(), core.handle_type()
        C.wane_fail_allocation(n)
        local status = C.wane_quantize(core.stream(), h, x, core.dtype(case[1]), case[2], case[3] and 1 or 0)
        if status == 0 then status = C.wane_dequantize(core.stream(), y, h, C.WANE_F32) end
        C.wane_fail_allocation(0)
        if status ~= 0 then
          assert.equal(tonumber(C.WANE_E_MEMORY), status)
          failures = failures + 1
        end
        C.wane_tensor_free(y)
        C.wane_tensor_free(h)
        assert.equal(before, live_tensors(), ("%s: allocation %d leaked"):format(case[1], n))
        if status == 0 then break end
        assert.is_true(n < 200)
      end
      core.check(core.wait())
      C.wane_stream_trim(core.stream(), 0)                  -- so that the next kind allocates too
      assert.is_true(failures > 0, case[1])
    end
  end)
end)
