-- Reading and writing safetensors: golden files, every rule of the format broken once, mutated headers and lists.
local core = require "wane.core"
local checkpoint = require "wane.checkpoint"
local index = require "wane.checkpoint.index"
local files = require "support.files"
local mutate = require "support.mutate"

local fixtures = "spec/fixtures/"
local folder

describe("safetensors", function()
  setup(function() folder = files.folder() end)
  teardown(files.clean)

  local function path_of(text) return files.write(folder .. "/t.safetensors", text) end

  describe("reading", function()
    it("gives the golden model's tensors, names, shapes and metadata", function()
      local tensors, metadata = assert(checkpoint.read_safetensors(fixtures .. "models/llama/model.safetensors"))
      assert.equal("pt", metadata.format)
      local count = 0
      for _ in pairs(tensors) do count = count + 1 end
      assert.equal(20, count)
      assert.same({ 211, 48 }, tensors["model.embed_tokens.weight"]:shape())
      assert.equal("f32", tensors["model.norm.weight"]:dtype())
      local raw = files.read(fixtures .. "models/llama/model.safetensors")
      assert.equal(raw:sub(2065, 2064 + 40512), files.bytes(tensors["model.embed_tokens.weight"]))
    end)

    it("is equal when copied instead of mapped", function()
      local path = fixtures .. "models/gpt_neox/model.safetensors"
      local mapped, copied = assert(checkpoint.read_safetensors(path)), assert(checkpoint.read_safetensors(path, { io = "read" }))
      for name, t in pairs(mapped) do assert.equal(files.bytes(t), files.bytes(copied[name])) end
    end)

    it("reads shards through their list, equal to the single file", function()
      local whole = assert(checkpoint.read_safetensors(fixtures .. "models/gpt_neox/model.safetensors"))
      local shards = assert(checkpoint.read_safetensors(fixtures .. "models/gpt_neox_sharded/model.safetensors.index.json"))
      for name, t in pairs(whole) do
        assert.is_truthy(shards[name], name)
        assert.equal(files.bytes(t), files.bytes(shards[name]))
        shards[name] = nil
      end
      assert.is_nil(next(shards))
    end)

    it("takes tensors that lie unaligned, empty ones and scalars", function()
      local header = '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"f":{"dtype":"F32","shape":[2],"data_offsets":[3,11]},'
        .. '"none":{"dtype":"F16","shape":[0,7],"data_offsets":[11,11]},"s":{"dtype":"I64","shape":[],"data_offsets":[11,19]}}'
      local f = require("ffi").new("float[2]", 1.5, -2)
      local tensors = assert(checkpoint.read_safetensors(path_of(files.safetensors(header, "abc" .. require("ffi").string(f, 8) .. files.u64(77)))))
      assert.equal("abc", files.bytes(tensors.a))
      local values = files.floats(tensors.f)
      assert.equal(1.5, values[0])
      assert.equal(-2, values[1])
      assert.same({ 0, 7 }, tensors.none:shape())
      assert.same({}, tensors.s:shape())
      assert.equal(files.u64(77), files.bytes(tensors.s))
    end)

    it("lets a mapped tensor be written without touching the file", function()
      local header = '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
      local path = path_of(files.safetensors(header, "abcd"))
      local tensors = assert(checkpoint.read_safetensors(path))
      core.check(core.C.wane_fill(core.stream(), tensors.a.h, 65))
      assert.equal("AAAA", files.bytes(tensors.a))
      assert.equal("abcd", files.read(path):sub(-4))
    end)

    it("lists dtypes that wane does not compute with, and refuses them by name when read", function()
      local header = '{"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
      local path = path_of(files.safetensors(header, "abcd"))
      local ix = assert(index.open(path))
      assert.equal("F8_E4M3", ix:find("x").file_dtype)
      assert.is_nil(ix:find("x").dtype)
      local tensors, message, code = checkpoint.read_safetensors(path)
      assert.is_nil(tensors)
      assert.equal("WANE_E_UNSUPPORTED", code)
      assert.truthy(message:find("'x'", 1, true) and message:find("F8_E4M3", 1, true))
    end)

    it("keeps mapped tensors when the file is replaced and the index closed", function()
      local header = '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
      local path = path_of(files.safetensors(header, "abcd"))
      local tensors = assert(checkpoint.read_safetensors(path))
      assert(checkpoint.write_safetensors(path, { a = files.tensor("u8", { 4 }, "wxyz") }))
      collectgarbage()
      assert.equal("abcd", files.bytes(tensors.a))
      assert.equal("wxyz", files.bytes(assert(checkpoint.read_safetensors(path)).a))
    end)

    it("refuses a file that changed its size between opening and mapping", function()
      local header = '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
      local path = path_of(files.safetensors(header, "abcd"))
      local ix = assert(index.open(path))
      files.write(path, "short")
      local t, message, code = ix:map(ix:find "a")
      assert.is_nil(t)
      assert.equal("WANE_E_IO", code)
      assert.truthy(message:find "changed its size")
    end)
  end)

  -- Each rule broken once: what is in the file, the code, and words of the message.
  local function tensor(name, dtype, shape, from, to)
    return ('"%s":{"dtype":"%s","shape":%s,"data_offsets":[%s,%s]}'):format(name, dtype, shape, from, to)
  end
  local one = tensor("a", "U8", "[4]", 0, 4)
  local bad = {
    { "an empty file", "", "WANE_E_FORMAT", "is empty" },
    { "seven bytes", "1234567", "WANE_E_FORMAT", "too few" },
    { "only a length", files.u64(0), "WANE_E_FORMAT", "does not begin with '{'" },
    { "a header longer than 100 MB", files.le(100000001, 8) .. "{}", "WANE_E_FORMAT", "100,000,000" },
    { "a header length of 2^63", ("\0"):rep(7) .. "\128{}", "WANE_E_FORMAT", "100,000,000" },
    { "a header cut short", files.u64(100) .. "{", "WANE_E_FORMAT", "truncated" },
    { "a header that is a list", files.safetensors "[]", "WANE_E_FORMAT", "does not begin with '{'" },
    { "broken JSON", files.safetensors '{"a":', "WANE_E_FORMAT", "no valid JSON" },
    { "bad UTF-8", files.safetensors('{"\255":{}}'), "WANE_E_FORMAT", "no valid JSON" },
    { "text behind the header's object", files.safetensors("{} x"), "WANE_E_FORMAT", "no valid JSON" },
    { "data cut short", files.safetensors("{" .. one .. "}", "abc"), "WANE_E_FORMAT", "cut short" },
    { "data too long", files.safetensors("{" .. one .. "}", "abcde"), "WANE_E_FORMAT", "appended" },
    { "a hole", files.safetensors("{" .. one .. "," .. tensor("b", "U8", "[1]", 5, 6) .. "}", "abcdef"), "WANE_E_FORMAT", "hole" },
    { "an overlap", files.safetensors("{" .. one .. "," .. tensor("b", "U8", "[4]", 2, 6) .. "}", "abcdef"), "WANE_E_FORMAT", "inside the tensor" },
    { "a hole at the start", files.safetensors("{" .. tensor("a", "U8", "[4]", 1, 5) .. "}", "abcde"), "WANE_E_FORMAT", "hole" },
    { "offsets that lie about the size", files.safetensors("{" .. tensor("a", "F32", "[4]", 0, 4) .. "}", "abcd"), "WANE_E_FORMAT", "needs 16 bytes" },
    { "an end before its beginning", files.safetensors("{" .. tensor("a", "U8", "[4]", 4, 0) .. "}", "abcd"), "WANE_E_FORMAT", "ends before" },
    { "a shape that overflows", files.safetensors("{" .. tensor("a", "F32", "[4294967296,4294967296]", 0, 4) .. "}", "abcd"), "WANE_E_FORMAT", "overflow" },
    { "a size beyond 2^63", files.safetensors("{" .. tensor("a", "U8", "[99999999999999999999]", 0, 4) .. "}", "abcd"), "WANE_E_FORMAT", "2^63" },
    { "a negative size", files.safetensors("{" .. tensor("a", "U8", "[-4]", 0, 4) .. "}", "abcd"), "WANE_E_FORMAT", "no whole number" },
    { "a fractional size", files.safetensors("{" .. tensor("a", "U8", "[4.0]", 0, 4) .. "}", "abcd"), "WANE_E_FORMAT", "no whole number" },
    { "nine dimensions", files.safetensors("{" .. tensor("a", "U8", "[1,1,1,1,1,1,1,1,4]", 0, 4) .. "}", "abcd"), "WANE_E_FORMAT", "8 dimensions" },
    { "an unknown dtype", files.safetensors("{" .. tensor("a", "X9", "[4]", 0, 4) .. "}", "abcd"), "WANE_E_FORMAT", "unknown dtype 'X9'" },
    { "bits that fill no byte", files.safetensors("{" .. tensor("a", "F4", "[3]", 0, 2) .. "}", "ab"), "WANE_E_FORMAT", "whole bytes" },
    { "a name twice", files.safetensors("{" .. one .. "," .. tensor("a", "U8", "[0]", 4, 4) .. "}", "abcd"), "WANE_E_FORMAT", "occurs twice" },
    { "a dtype twice", files.safetensors('{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', "abcd"), "WANE_E_FORMAT", "two dtypes" },
    { "a tensor without a shape", files.safetensors('{"a":{"dtype":"U8","data_offsets":[0,4]}}', "abcd"), "WANE_E_FORMAT", "no shape" },
    { "a tensor without offsets", files.safetensors('{"a":{"dtype":"U8","shape":[4]}}', "abcd"), "WANE_E_FORMAT", "no data_offsets" },
    { "a tensor that is a number", files.safetensors '{"a":4}', "WANE_E_FORMAT", "number" },
    { "metadata that is no text", files.safetensors '{"__metadata__":{"x":1}}', "WANE_E_FORMAT", "number" },
    { "a zero byte in a name", files.safetensors('{"a\\u0000b":' .. one:sub(5) .. "}", "abcd"), "WANE_E_FORMAT", "zero byte" },
    { "JSON nested without end", files.safetensors('{"a":{"x":' .. ("["):rep(5000)), "WANE_E_FORMAT", "nested too deeply" },
    { "a git-lfs pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "WANE_E_FORMAT", "git lfs pull" },
  }
  for _, case in ipairs(bad) do
    it("refuses " .. case[1], function()
      local path = path_of(case[2])
      local ix, message, code = index.open(path)
      assert.is_nil(ix)
      assert.equal(case[3], code)
      assert.truthy(message:find(case[4], 1, true), message)
      assert.truthy(message:find(path, 1, true), message)
    end)
  end

  it("names a missing file and a directory", function()
    local ix, message, code = index.open(folder .. "/nothing.safetensors")
    assert.is_nil(ix)
    assert.equal("WANE_E_IO", code)
    assert.truthy(message:find("No such file", 1, true))
    ix, message = index.open(folder)
    assert.is_nil(ix)
    assert.truthy(message:find("is a directory", 1, true))
  end)

  it("survives 10,000 mutated headers", function()
    local header = "{" .. '"__metadata__":{"format":"pt"},' .. one .. "," .. tensor("b", "F32", "[2,1]", 4, 12) .. "}"
    mutate.run {
      name = "safetensors headers", sources = { files.safetensors(header, "abcdefghijkl") }, words = mutate.json_words, path = folder .. "/t.safetensors",
      accepted = 100, refused = 5000,
      try = function(path, bytes)
        local ix, message, code = index.open(path)
        if not ix then return nil, message, code end
        for i = 0, ix:count() - 1 do
          local e = ix:entry(i)
          assert.is_true(e.offset + e.bytes <= #bytes)
          ix:bytes(e)
        end
        ix:close()
        return true
      end,
    }
  end)

  describe("lists of shards", function()
    local function list(map, extra)
      return files.write(folder .. "/model.safetensors.index.json", '{"metadata":{"total_size":4},"weight_map":{' .. map .. "}" .. (extra or "") .. "}")
    end
    local function shard(name, text) files.write(folder .. "/" .. name, files.safetensors("{" .. text .. "}", "abcd")) end

    it("refuses paths that leave the folder", function()
      for _, name in ipairs { "../x", "/etc/passwd", "a/b", "..", ".", "" } do
        local ix, message, code = index.open(list(('"a":"%s"'):format(name)))
        assert.is_nil(ix)
        assert.equal("WANE_E_FORMAT", code)
        assert.truthy(message:find("must be files beside it", 1, true), message)
      end
    end)

    it("names a shard that is missing, a tensor that is in no shard or in another", function()
      os.remove(folder .. "/1.safetensors")
      local ix, message = index.open(list '"a":"1.safetensors"')
      assert.is_nil(ix)
      assert.truthy(message:find("1.safetensors", 1, true) and message:find("No such file", 1, true), message)
      shard("1.safetensors", one)
      ix, message = index.open(list '"a":"1.safetensors","b":"1.safetensors"')
      assert.is_nil(ix)
      assert.truthy(message:find("'b'", 1, true) and message:find("in no shard", 1, true), message)
      shard("2.safetensors", tensor("b", "U8", "[4]", 0, 4))
      ix, message = index.open(list '"a":"2.safetensors","b":"1.safetensors"')
      assert.is_nil(ix)
      assert.truthy(message:find("another model", 1, true), message)
    end)

    it("survives 10,000 mutated lists", function()
      shard("1.safetensors", one)
      shard("2.safetensors", tensor("b", "U8", "[4]", 0, 4))
      mutate.run {
        name = "lists of shards", words = mutate.json_words, path = folder .. "/model.safetensors.index.json", accepted = 100, refused = 5000,
        sources = { '{"metadata":{"total_size":8},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}' },
        names = folder,                                -- a shard's own name, where the damaged list names another file
        try = function(path)
          local ix, message, code = index.open(path)
          if not ix then return nil, message, code end
          for i = 0, ix:count() - 1 do ix:bytes(ix:entry(i)) end
          ix:close()
          return true
        end,
      }
    end)

    it("refuses a tensor in two shards, a list without a map, and values that are no names", function()
      shard("1.safetensors", one)
      shard("2.safetensors", one)
      local ix, message = index.open(list '"a":"1.safetensors","c":"2.safetensors"')
      assert.is_nil(ix)
      assert.truthy(message:find("is in '", 1, true), message)
      ix, message = index.open(files.write(folder .. "/x.index.json", '{"metadata":{}}'))
      assert.is_nil(ix)
      assert.truthy(message:find("weight_map", 1, true), message)
      ix, message = index.open(list '"a":1')
      assert.is_nil(ix)
      assert.truthy(message:find("no file name", 1, true), message)
      ix, message = index.open(list '"a":"1.safetensors","a":"1.safetensors"')
      assert.is_nil(ix)
      assert.truthy(message:find("twice", 1, true), message)
    end)
  end)

  describe("writing", function()
    it("gives back what was written: names, dtypes, shapes, bytes, metadata", function()
      local tensors = { b = files.tensor("f32", { 2, 1 }, "12345678"), a = files.tensor("u8", { 3 }, "abc"), ["q\"é\n"] = files.tensor("i64", {}, "87654321"),
                        empty = files.tensor("f16", { 0, 4 }, "") }
      local path = folder .. "/w.safetensors"
      assert(checkpoint.write_safetensors(path, tensors, { format = "pt", note = "a\"b" }))
      local text = files.read(path)
      local length = text:byte(1) + 256 * text:byte(2)
      assert.equal(0, (8 + length) % 8)
      local back, metadata = assert(checkpoint.read_safetensors(path))
      assert.same({ format = "pt", note = "a\"b" }, metadata)
      for name, t in pairs(tensors) do
        assert.same(t:shape(), back[name]:shape())
        assert.equal(t:dtype(), back[name]:dtype())
        assert.equal(files.bytes(t), files.bytes(back[name]))
      end
    end)

    it("writes a golden file byte for byte as upstream's writer does", function()
      for _, name in ipairs { "models/llama", "models/gpt_neox", "quant/checkpoints/gpt_neox/int8" } do
        local path = fixtures .. name .. "/model.safetensors"
        local tensors, metadata = assert(checkpoint.read_safetensors(path))
        assert(checkpoint.write_safetensors(folder .. "/copy.safetensors", tensors, metadata))
        assert.is_true(files.read(path) == files.read(folder .. "/copy.safetensors"), name)
      end
    end)

    it("writes views and refuses quantized tensors", function()
      local t = files.tensor("u8", { 2, 3 }, "abcdef")
      local h = core.handle_type()
      core.check(core.C.wane_view_permute(core.stream(), h, t.h, require("ffi").new("int32_t[2]", 1, 0)))
      local view = require("wane.tensor").wrap(h)
      local path = folder .. "/v.safetensors"
      assert(checkpoint.write_safetensors(path, { v = view }))
      assert.equal("adbecf", files.bytes(assert(checkpoint.read_safetensors(path)).v))
      local q = files.quantize(files.tensor("f32", { 2 }, "\0\0\128\63\0\0\0\64"), "int8-blockwise", 64)
      assert.has_error(function() checkpoint.write_safetensors(path, { q = q }) end)
    end)

    it("keeps the old file when the disk is full, and leaves nothing behind", function()
      local limited = os.execute "test -w /dev/full" == 0
      if not limited then pending "no /dev/full here" return end
      local path = folder .. "/old.safetensors"
      assert(checkpoint.write_safetensors(path, { a = files.tensor("u8", { 3 }, "old") }))
      -- a file size limit stands in for a full disk: the write fails half-way (SIGXFSZ ignored by the shell's trap)
      local script = ([[trap '' XFSZ; ulimit -f 8; LUA_PATH='lua/?.lua;lua/?/init.lua;spec/?.lua' ${WANE_TEST_LUA:-luajit} -e '
        local files, checkpoint = require "support.files", require "wane.checkpoint"
        local big = files.tensor("u8", { 1000000 }, ("x"):rep(1000000))
        local ok, message, code = checkpoint.write_safetensors("%s", { a = big })
        assert(not ok and code == "WANE_E_IO" and message:find("the old file stays", 1, true), message)']]):format(path)
      assert.equal(0, os.execute("bash -c \"" .. script:gsub('"', '\\"') .. "\""))
      assert.equal("old", files.bytes(assert(checkpoint.read_safetensors(path)).a))
      assert.equal(0, os.execute("test -z \"$(ls -A " .. folder .. " | grep part)\""))
    end)

    it("says where a file cannot be made", function()
      local ok, message, code = checkpoint.write_safetensors(folder .. "/no/such/x.safetensors", {})
      assert.is_nil(ok)
      assert.equal("WANE_E_IO", code)
      assert.truthy(message:find("cannot write", 1, true))
    end)
  end)
end)
