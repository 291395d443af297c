-- Files of torch.save: golden tensors of every dtype and layout, both formats, and whatever must be refused. The files are made by
-- spec/fixtures/make/torch_files.py (torch's own values beside them) and spec/fixtures/make/models.py.
local ffi = require "ffi"
local core = require "wane.core"
local checkpoint = require "wane.checkpoint"
local index = require "wane.checkpoint.index"
local loader = require "wane.loader"
local files = require "support.files"
local handmade = require "support.torch"
local mutate = require "support.mutate"

local torch, models = "spec/fixtures/torch/", "spec/fixtures/models/"
local folder

local zip, text, global, storage, tensor, dict = handmade.zip, handmade.text, handmade.global, handmade.storage, handmade.tensor, handmade.dict
local rebuild, ordered = handmade.rebuild, handmade.ordered
local float = global("torch", "FloatStorage")
local plain = tensor(storage(float, "0", 2), 0, "K\2\133", "K\1\133")
local values = files.le(0, 3) .. "\63" .. files.le(0, 3) .. "\64"                    -- 0.5, 2
local function archive(pickle, extra)
  local entries = { { "m/data.pkl", pickle }, { "m/data/0", values } }
  for _, e in ipairs(extra or {}) do entries[#entries + 1] = e end
  return zip(entries)
end

describe("torch files", function()
  setup(function() folder = files.folder() end)
  teardown(files.clean)

  local function path_of(bytes) return files.write(folder .. "/t.bin", bytes) end

  -- Every tensor of `got` equals the one of that name in the safetensors file, in shape, dtype and bytes.
  local function compare(got, golden, rename)
    local want, count = assert(checkpoint.read_safetensors(golden)), 0
    for name, t in pairs(want) do
      local g = got[rename and rename(name) or name]
      assert.is_truthy(g, name)
      assert.same(t:shape(), g:shape(), name)
      assert.equal(t:dtype(), g:dtype(), name)
      assert.is_true(files.bytes(t) == files.bytes(g), name .. " differs")
      count = count + 1
    end
    return count
  end

  describe("reading", function()
    for _, name in ipairs { "dtypes", "views", "small" } do
      for _, format in ipairs { "", "_legacy" } do
        for _, io_mode in ipairs { "mmap", "read" } do
          it(("gives torch's values: %s%s, %s"):format(name, format, io_mode), function()
            local got = assert(checkpoint.read_torch(torch .. name .. format .. ".bin", { io = io_mode }))
            local count = compare(got, torch .. name .. ".safetensors")
            for _ in pairs(got) do count = count - 1 end
            assert.equal(0, count)
          end)
        end
      end
    end

    it("takes what a module's state_dict holds: parameters, attributes, _metadata; passes over what is no tensor", function()
      local got = assert(checkpoint.read_torch(torch .. "module.bin"))
      assert.equal(4, compare(got, torch .. "module.safetensors"))
      assert.is_nil(got.epoch)
    end)

    it("quantizes strided and f64 tensors as it does those in order", function()
      local c = { path = "views", index = assert(index.open(torch .. "views.bin")) }
      local golden = assert(checkpoint.read_safetensors(torch .. "views.safetensors"))
      for _, scheme in ipairs { { type = "nf4", block_size = 64, double_quant = true }, { type = "int8" }, { type = "int8-blockwise", block_size = 64 } } do
        for _, name in ipairs { "linear.weight", "f64_t", "transposed" } do
          local q = assert(loader.load(c, { { entry = c.index:find(name), scheme = scheme } }))[1]
          local want = files.quantize(golden[name], scheme.type, scheme.block_size, scheme.double_quant)
          local a, b = files.parts(want), files.parts(q)
          for part, bytes in pairs(a) do assert.is_true(bytes == b[part], ("%s of %s, part %d"):format(scheme.type, name, part)) end
        end
      end
      local half = assert(loader.load(c, { { entry = c.index:find "transposed", dtype = "f16" } }))[1]
      assert.equal("f16", half:dtype())
      assert.same(golden.transposed:totable(), half:to("f32"):totable())
      assert.same({ 6, 4 }, half:shape())
    end)

    it("lists dtypes that wane does not compute with, and refuses them by name only when they are read", function()
      local ix = assert(index.open(torch .. "others.bin"))
      assert.equal("F8_E4M3", ix:find("f8").file_dtype)
      assert.equal("C64", ix:find("c64").file_dtype)
      local c = { path = torch .. "others.bin", index = ix }
      compare({ f32 = assert(loader.load(c, { { entry = ix:find "f32" } }))[1] }, torch .. "others.safetensors")
      for _, name in ipairs { "f8", "u16", "c64" } do
        local list, message, code = loader.load(c, { { entry = ix:find(name) } })
        assert.is_nil(list)
        assert.equal("WANE_E_UNSUPPORTED", code)
        assert.truthy(message:find(ix:find(name).file_dtype, 1, true) and message:find(name, 1, true), message)
      end
    end)

    it("takes a handmade archive, any top folder, and a key that is set twice as Python does", function()
      local got = assert(checkpoint.read_torch(path_of(archive(dict(text "a", "K\1", text "a", plain, text "b", plain, text "b", "N")))))
      assert.same({ 0.5, 2 }, got.a:totable())
      assert.is_nil(got.b)
      assert.equal(0, assert(index.open(path_of(archive "\128\2}."))):count())
    end)
  end)

  describe("models", function()
    local function bare(name) return (name:gsub("^transformer%.", "")) end
    for _, case in ipairs {
      { "bloom_bin/pytorch_model.bin", "bloom", 29, bare }, { "bloom_legacy_bin/pytorch_model.bin", "bloom", 29 },
      { "bloom_sharded_bin/pytorch_model.bin.index.json", "bloom", 29, bare },
      { "gpt_neox_bin/pytorch_model.bin", "gpt_neox", 28 }, { "opt_bin/pytorch_model.bin", "opt", 36 },
    } do
      it(case[1] .. " is bit-equal to its safetensors", function()
        local got = assert(checkpoint.read_torch(models .. case[1]))
        assert.equal(case[3], compare(got, models .. case[2] .. "/model.safetensors", case[4]))
      end)
    end

    for _, name in ipairs { "bloom_sharded", "opt_sharded", "gpt_neox_sharded" } do
      it(name .. " is bit-equal to the single file", function()
        local got = assert(checkpoint.read_safetensors(models .. name .. "/model.safetensors.index.json"))
        assert.is_true(compare(got, models .. name:gsub("_sharded", "") .. "/model.safetensors") > 0)
      end)
    end

    it("bloom_bf16 holds the same values", function()
      local a = assert(checkpoint.read_safetensors(models .. "bloom_bf16/model.safetensors"))
      for name, t in pairs(assert(checkpoint.read_safetensors(models .. "bloom/model.safetensors"))) do
        assert.equal("bf16", a[name]:dtype())
        assert.is_true(files.bytes(t:to "f32") == files.bytes(a[name]:to "f32"), name)
      end
    end)

    it("one storage under two names is read once and given twice", function()
      local ix = assert(index.open(models .. "opt_bin/pytorch_model.bin"))
      local head, embedding = ix:find "lm_head.weight", ix:find "model.decoder.embed_tokens.weight"
      assert.equal(embedding.offset, head.offset)
      assert.equal(embedding.bytes, head.bytes)
    end)
  end)

  describe("refusing", function()
    for _, case in ipairs {
      { "bad_evil", "'posix.system'" }, { "bad_evil_legacy", "'posix.system'" }, { "bad_protocol4", "opcode FRAME" },
      { "bad_nested", "under 'state_dict'" }, { "bad_tensor", "holds a tensor" }, { "bad_sparse", "'torch._utils._rebuild_sparse_tensor'" },
      { "bad_meta", "'torch._utils._rebuild_meta_tensor_no_storage'" }, { "bad_quantized", "'torch._utils._rebuild_qtensor'" },
      { "bad_compressed", "compressed (deflate)" }, { "bad_endian", "big-endian" }, { "bad_no_storage", "no entry for storage '0'" },
      { "bad_short_storage", "its 6 F32 values need 24" }, { "bad_no_pickle", "without data.pkl" }, { "bad_script", "TorchScript" },
    } do
      it(case[1] .. " by name", function()
        local ix, message, code = index.open(torch .. case[1] .. ".bin")
        assert.is_nil(ix)
        assert.equal("WANE_E_FORMAT", code)
        assert.truthy(message:find(case[2], 1, true) and message:find(torch .. case[1] .. ".bin", 1, true), message)
      end)
    end

    it("runs nothing", function() assert.is_nil(io.open "wane_ran_this") end)

    -- What is in the pickle, and words of the message.
    local long = ("\136"):rep(70000)
    for _, case in ipairs {
      { "a global of no tensor", dict(text "a", global("builtins", "eval"), "(" .. text "1" .. "tR"), "wants to use 'builtins.eval'" },
      { "a global with control characters", dict(text "a", global("\27[2J", "x")), "wants to use '?[2J.x'" },
      { "a call of a text", dict(text "a", text "b" .. ")R"), "REDUCE of a string" },
      { "a call of a dtype", dict(text "a", global("torch", "float32") .. ")R"), "REDUCE of a torch.float32" },
      { "an object of another class", dict(text "a", global("torch", "FloatStorage") .. ")\129"), "NEWOBJ of a torch.FloatStorage" },
      { "arguments that are no tuple", dict(text "a", rebuild .. "]R"), "instead of a tuple" },
      { "a tensor over a number", dict(text "a", rebuild .. "(K\1K\0K\2\133K\1\133\137" .. ordered .. ")RtR"), "a storage was expected" },
      { "state of a tensor", dict(text "a", plain .. "}b"), "BUILD on a tensor" },
      { "persistent ids that are no storage", dict(text "a", text "x" .. "Q"), "no storage" },
      { "a storage of an unknown class", dict(text "a", "(" .. text "storage" .. ordered .. text "0" .. text "cpu" .. "K\2tQ"), "storage of class" },
      { "more values than the storage has", dict(text "a", tensor(storage(float, "0", 2), 0, "K\3\133", "K\1\133")), "storage of 8" },
      { "an offset past the storage", dict(text "a", tensor(storage(float, "0", 2), 1, "K\2\133", "K\1\133")), "storage of 8" },
      { "strides past the storage", dict(text "a", tensor(storage(float, "0", 2), 0, "K\2\133", "K\2\133")), "storage of 8" },
      { "sizes that overflow", dict(text "a", tensor(storage(float, "0", 2), 0, "J\255\255\255\127J\255\255\255\127J\255\255\255\127\135", "K\1K\1K\1\135")),
        "storage of 8" },
      { "repeated values that overflow", dict(text "a", tensor(storage(float, "0", 2), 0, "J\255\255\255\127J\255\255\255\127J\255\255\255\127\135",
        "K\0K\0K\0\135")), "repeats its values" },
      { "a value repeated to terabytes", dict(text "a", tensor(storage(float, "0", 2), 0, "J\255\255\255\127J\0\2\0\0\134", "K\0K\0\134")),
        "repeats its values" },
      { "a negative size", dict(text "a", tensor(storage(float, "0", 2), 0, "J\255\255\255\255\133", "K\1\133")), "shape of a tensor is -1" },
      { "a negative stride", dict(text "a", tensor(storage(float, "0", 2), 0, "K\2\133", "J\255\255\255\255\133")), "stride of a tensor is -1" },
      { "a size that is a fraction", dict(text "a", tensor(storage(float, "0", 2), 0, "G\63\248\0\0\0\0\0\0\133", "K\1\133")), "shape of a tensor is 1.5" },
      { "a size beyond 2^53", dict(text "a", tensor(storage(float, "0", 2), 0, "\138\8\0\0\0\0\0\0\0\64\133", "K\1\133")), "4.6116860184273879e+18" },
      { "nine dimensions", dict(text "a", tensor(storage(float, "0", 2), 0, "(" .. ("K\1"):rep(9) .. "t", "K\1\133")),
        "9 dimensions" },
      { "sizes and strides of different number", dict(text "a", tensor(storage(float, "0", 2), 0, "K\2\133", "K\1K\1\134")), "1 sizes and 2 strides" },
      { "a lazily negated tensor", dict(text "a", rebuild .. "(" .. storage(float, "0", 2) .. "K\0K\2\133K\1\133\137" .. ordered .. ")R}"
        .. text "neg" .. "\136stR"), "lazily changed ('neg')" },
      { "a storage that is not there", dict(text "a", tensor(storage(float, "1", 2), 0, "K\2\133", "K\1\133")), "no entry for storage '1'" },
      { "an empty name", dict(text "", plain), "printable" },
      { "a name with a zero byte", dict(text "a\0b", plain), "printable" },
      { "a number on top", "\128\2K\1.", "holds a number" },
      { "no tensors", dict(text "a", "K\1"), "holds no tensors" },
      { "a stack without bottom", "\128\2}(uuuuu.", "without a MARK" },
      { "a value that is not there", "\128\2R.", "REDUCE needs a value" },
      { "a memo that is not there", "\128\2h\7.", "value number 7" },
      { "a key without a value", "\128\2}(K\1u.", "no value" },
      { "no end", "\128\2}", "truncated" },
      { "a text longer than the file", "\128\2X\255\255\255\255a.", "truncated" },
      { "a deep stack", "\128\2" .. long .. ".", "65536 values on the stack" },
      { "many marks", "\128\2" .. ("("):rep(100) .. ".", "64 nested MARKs" },
      { "many objects", "\128\2]" .. (")a"):rep(1e6 + 1) .. ".", "objects" },
      { "an unknown opcode", "\128\2\255.", "opcode 0xff" },
      { "an opcode that imports by stack", "\128\4" .. text "os" .. text "system" .. "\147.", "opcode STACK_GLOBAL" },
      { "a class from a script", "\128\2(ios\nsystem\n.", "opcode INST" },
      { "protocol 9", "\128\9.", "protocol 9" },
      { "a name without end", "\128\2c" .. ("x"):rep(300), "name without end" },
    } do
      it("refuses " .. case[1], function()
        local path = path_of((archive(case[2])))
        local ix, message, code = index.open(path)
        assert.is_nil(ix)
        assert.equal("WANE_E_FORMAT", code)
        assert.truthy(message:find(case[3], 1, true), message)
        assert.truthy(message:find(path, 1, true), message)
      end)
    end
  end)

  describe("archives", function()
    local pickle = dict(text "a", plain)
    local function end_record(count, bytes, offset)
      return "PK\5\6" .. files.u32(0) .. files.le(count, 2):rep(2) .. files.u32(bytes) .. files.u32(offset) .. files.le(0, 2)
    end
    local whole, directory_at, directory_bytes = zip { { "m/data.pkl", pickle }, { "m/data/0", values } }
    for _, case in ipairs {
      { "compression", zip { { "m/data.pkl", pickle, method = 12 } }, "compressed (bzip2)" },
      { "encryption", zip { { "m/data.pkl", pickle, flags = 1 } }, "encrypted" },
      { "a size that lies", zip { { "m/data.pkl", pickle, size = 1e9 } }, "has 1000000000" },
      { "a bomb: a size of 4 GB", zip { { "m/data.pkl", pickle, size = 4e9, packed = 4e9 } }, "reaches past the end" },
      { "a bomb: entries over each other", zip { { "m/data.pkl", pickle }, { "m/data.pkl2", pickle, header = 0, inner = "m/data.pkl" } }, "otherwise" },
      { "overlapping entries", zip { { "m/data.pkl", pickle .. "PK\3\4" .. files.le(0, 22) .. files.le(3, 2) .. files.le(0, 2) .. "m/x" },
        { "m/x", "", header = 40 + #pickle } }, "overlap" },
      { "a name twice", zip { { "m/data.pkl", pickle }, { "m/data.pkl", pickle } }, "two entries called" },
      { "another name inside", zip { { "m/data.pkl", pickle, inner = "m/data.pkx" } }, "otherwise" },
      { "a header outside", zip { { "m/data.pkl", pickle, header = 1e9 } }, "outside the file" },
      { "a header that is none", zip { { "m/data.pkl", pickle, header = 5 } }, "has no header at byte 5" },
      { "no end record", whole:sub(1, directory_at + directory_bytes), "no end record" },
      { "several parts", (whole:gsub("PK\5\6..", "PK\5\6\1%z")), "of several" },
      { "a directory past the end", whole:sub(1, -23) .. end_record(2, directory_bytes + 1, directory_at), "past its end" },
      { "fewer entries than said", whole:sub(1, -23) .. end_record(3, directory_bytes, directory_at), "number 3 is damaged" },
      { "more entries than said", whole:sub(1, -23) .. end_record(1, directory_bytes, directory_at), "bytes too many" },
      { "a missing zip64 size", zip { { "m/data.pkl", pickle, size = 0xffffffff, packed = 0xffffffff } }, "zip64 sizes" },
      { "a zip without a pickle", zip { { "word/document.xml", "<x/>" } }, "without data.pkl" },
      { "an empty zip", end_record(0, 0, 0), "without data.pkl" },
      { "a git-lfs pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull" },
      { "a text", "hello world, this is no model", "neither as a zip archive" },
      { "a tar of torch 0.1", ("x"):rep(257) .. "ustar" .. ("\0"):rep(300), "torch 0.1" },
    } do
      it("refuses " .. case[1], function()
        local path = path_of(case[2])
        local ix, message, code = index.open(path)
        assert.is_nil(ix)
        assert.equal("WANE_E_FORMAT", code)
        assert.truthy(message:find(case[3], 1, true), message)
        assert.truthy(message:find(path, 1, true), message)
      end)
    end

    it("reads sizes from zip64 fields and a zip64 end record", function()
      local bytes, at, size = zip { { "m/data.pkl", pickle }, { "m/data/0", values, size = 0xffffffff, packed = 0xffffffff,
                                    extra = files.le(1, 2) .. files.le(16, 2) .. files.u64(8) .. files.u64(8) } }
      local record = "PK\6\6" .. files.u64(44) .. files.le(45, 2):rep(2) .. files.u32(0):rep(2) .. files.u64(2):rep(2) .. files.u64(size) .. files.u64(at)
      local locator = "PK\6\7" .. files.u32(0) .. files.u64(#bytes - 22) .. files.u32(1)
      local last = end_record(0xffff, 0xffffffff, 0xffffffff)
      assert.same({ 0.5, 2 }, assert(checkpoint.read_torch(path_of(bytes:sub(1, -23) .. record .. locator .. last))).a:totable())
    end)
  end)

  -- The same rules once more in C, whatever Lua checked before.
  describe("describing in C", function()
    local C = core.C
    local ix
    before_each(function() ix = assert(index.open(path_of((archive "\128\2}.")))) end)

    local function entry(change)
      local e = ffi.new "wane_entry"
      e.name, e.dtype_name, e.ndim, e.bytes, e.offset = "t", "F32", 2, 24, 40
      e.shape[0], e.shape[1] = 2, 3
      for field, value in pairs(change) do
        if field == "shape" or field == "stride" then for i, v in ipairs(value) do e[field][i - 1] = v end else e[field] = value end
      end
      return e
    end

    it("takes what fits, strided and of unknown dtypes too", function()
      assert.equal(0, C.wane_index_describe(ix:live(), entry {}))
      assert.equal(0, C.wane_index_describe(ix:live(), entry { name = "s", strided = 1, stride = { 1, 2 }, bytes = 24 }))
      assert.equal(0, C.wane_index_describe(ix:live(), entry { name = "u", dtype_name = "C128" }))
      assert.same({ 1, 2 }, ix:find("s").stride)
      assert.equal("f32", ix:find("t").dtype)
      assert.is_nil(ix:find("u").dtype)
      assert.equal("C128", ix:find("u").file_dtype)
    end)

    for _, case in ipairs {
      { "bytes that the shape does not need", { bytes = 20 }, "does not have the bytes" },
      { "bytes that the strides do not reach", { strided = 1, stride = { 3, 2 } }, "does not have the bytes" },
      { "a place past the end", { offset = 10000 }, "past the end" }, { "a place that overflows", { offset = -1024ULL }, "past the end" },
      { "sizes that overflow", { shape = { 2 ^ 40, 2 ^ 40 } }, "overflow" }, { "a negative size", { shape = { -2, 3 } }, "negative" },
      { "a negative stride", { strided = 1, stride = { -1, 1 } }, "negative" },
      { "strides that overflow", { strided = 1, stride = { 2 ^ 62, 2 ^ 62 } }, "overflow" },
      { "nine dimensions", { ndim = 9 }, "8 dimensions" }, { "a file that is none", { file = 1 }, "file 1 of an index of 1", "WANE_E_ARG" },
      { "no name", { name = "" }, "needs a name", "WANE_E_ARG" },
    } do
      it("refuses " .. case[1], function()
        local _, message, code = core.failure(C.wane_index_describe(ix:live(), entry(case[2])))
        assert.equal(case[4] or "WANE_E_FORMAT", code)
        assert.truthy(message:find(case[3], 1, true), message)
        assert.equal(0, ix:count())
      end)
    end

    it("refuses a name twice, other formats' indexes, reads past the end", function()
      core.check(C.wane_index_describe(ix:live(), entry {}))
      local _, message = core.failure(C.wane_index_describe(ix:live(), entry {}))
      assert.truthy(message:find("occurs twice", 1, true), message)
      local other = assert(index.open(torch .. "small.safetensors"))
      _, message = core.failure(C.wane_index_describe(other:live(), entry {}))
      assert.truthy(message:find("torch files only", 1, true), message)
      local size, byte = C.wane_index_file_size(ix:live(), 0), ffi.new "char[8]"
      assert.equal(0, tonumber(C.wane_index_file_size(ix:live(), 1)))
      assert.equal(0, C.wane_index_file_read(ix:live(), 0, size - 1, byte, 1))
      assert.equal(C.WANE_E_FORMAT, C.wane_index_file_read(ix:live(), 0, size - 1, byte, 2))
      assert.equal(C.WANE_E_FORMAT, C.wane_index_file_read(ix:live(), 0, size + 1, byte, 0))
      assert.equal(C.WANE_E_ARG, C.wane_index_file_read(ix:live(), 1, 0, byte, 1))
    end)

    it("strided views stay within their tensor", function()
      local t = require("wane").arange(6)
      local function view(shape, stride)
        local h = core.handle_type()
        return C.wane_view_strided(core.stream(), h, t.h, #shape, ffi.new("int64_t[8]", shape), ffi.new("int64_t[8]", stride)), h
      end
      local status, h = view({ 3, 2 }, { 1, 3 })
      assert.equal(0, status)
      assert.same({ { 0, 3 }, { 1, 4 }, { 2, 5 } }, require("wane.tensor").wrap(h):totable())
      for _, bad in ipairs { { { 7 }, { 1 } }, { { 2, 2 }, { 3, 3 } }, { { 2 }, { -1 } }, { { 2 ^ 40, 2 ^ 40 }, { 0, 0 } } } do
        assert.equal(C.WANE_E_SHAPE, (view(bad[1], bad[2])))
      end
    end)
  end)

  describe("damaged files", function()
    local function try(path)
      local ix, message, code = index.open(path)
      if not ix then return nil, message, code end
      for i = 0, ix:count() - 1 do
        local e = ix:entry(i)
        assert(e.offset + e.bytes <= tonumber(core.C.wane_index_file_size(ix:live(), e.file)))
        local list = loader.load({ path = path, index = ix }, { { entry = e } })
        if list then
          assert.equal(0, core.wait())                   -- the next round truncates the file that is being read
          list[1]:close()
        end
      end
      ix:close()
      return true
    end

    for _, name in ipairs { "small", "small_legacy" } do
      it(name .. " cut at every byte is refused", function()
        local bytes, path = files.read(torch .. name .. ".bin"), folder .. "/cut.bin"
        for length = 1, #bytes - 1 do
          files.write(path, bytes:sub(1, length))
          local ok, message, code = try(path)
          assert.is_nil(ok, ("%d of %d bytes were accepted"):format(length, #bytes))
          assert.truthy(message:find(path, 1, true) and code:find "^WANE_E_", message)
        end
      end)
    end

    local words = { "(", "t", "R", "u", "\136", "Q", "PK\1\2", "PK\3\4", "PK\5\6", "\0\0\0\0", "\255\255\255\255", "c__builtin__\neval\n" }
    it("10,000 archives", function()
      mutate.run { name = "zip archives", path = folder .. "/m.bin", words = words, accepted = 500, refused = 3000, try = try,
                   sources = { files.read(torch .. "small.bin"), files.read(torch .. "module.bin"), (zip { { "m/data.pkl", dict(text "a", plain) },
                               { "m/data/0", values } }) } }
    end)

    it("10,000 pickles in archives that are whole", function()
      local source = dict(text "a", plain, text "b", tensor(storage(float, "0", 2), 1, "K\1K\1\134", "K\1K\1\134"), text "c",
        global("torch._utils", "_rebuild_parameter") .. "(" .. tensor(storage(float, "0", 2), 0, "K\2K\1\134", "K\1K\2\134") .. "\136" .. ordered .. ")RtR")
      mutate.run { name = "pickles", words = words, sources = { source, dict(text "a", plain) }, accepted = 300, refused = 3000, names = folder .. "/p.bin",
                   try = function(_, bytes) return try(files.write(folder .. "/p.bin", (archive(bytes)))) end }
    end)

    it("10,000 files of the older format", function()
      mutate.run { name = "legacy files", path = folder .. "/l.bin", words = words, accepted = 200, refused = 3000, try = try,
                   sources = { files.read(torch .. "small_legacy.bin"), files.read(torch .. "views_legacy.bin"):sub(1, 4000) } }
    end)

    it("10,000 lists of shards", function()
      files.write(folder .. "/1.bin", files.read(torch .. "small.bin"))
      files.write(folder .. "/2.bin", (archive(dict(text "c", plain))))
      mutate.run { name = "lists of torch shards", path = folder .. "/pytorch_model.bin.index.json", words = mutate.json_words, names = folder,
                   accepted = 100, refused = 3000, try = try,
                   sources = { '{"metadata":{"total_size":48},"weight_map":{"a":"1.bin","b":"1.bin","c":"2.bin"}}' } }
    end)
  end)
end)
