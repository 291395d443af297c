-- Reading GGUF: metadata of every type, tensors, the converter's arrangement undone, every rule broken once, parts, 10,000 mutated headers.
local ffi = require "ffi"
local checkpoint = require "wane.checkpoint"
local index = require "wane.checkpoint.index"
local loader = require "wane.loader"
local files = require "support.files"
local mutate = require "support.mutate"

local fixtures = "spec/fixtures/"
local pair, str, u32, u64, le = files.gguf_pair, files.gguf_string, files.u32, files.u64, files.le
local folder

local function f32(...)
  local n = select("#", ...)
  return ffi.string(ffi.new("float[?]", n, ...), 4 * n)
end

describe("GGUF", function()
  setup(function() folder = files.folder() end)
  teardown(files.clean)

  local function path_of(text) return files.write(folder .. "/t.gguf", text) end

  it("gives metadata of every type by key", function()
    local strings = {}
    for i = 1, 1000 do strings[i] = str("token " .. i .. "\0\255") end
    local text = files.gguf({
      pair("u8", 0, "\200"), pair("i8", 1, "\200"), pair("u16", 2, le(65535, 2)), pair("i16", 3, le(65535, 2)), pair("u32", 4, u32(4294967295)),
      pair("i32", 5, u32(4294967295)), pair("f32", 6, f32(0.5)), pair("yes", 7, "\1"), pair("no", 7, "\0"), pair("text", 8, str "h\195\169llo"),
      pair("u64", 10, u64(2 ^ 40)), pair("i64", 11, ("\255"):rep(8)), pair("f64", 12, ffi.string(ffi.new("double[1]", -2.25), 8)),
      pair("strings", 9, u32(8) .. u64(1000) .. table.concat(strings)), pair("floats", 9, u32(6) .. u64(3) .. f32(1, -2, 4)),
      pair("flags", 9, u32(7) .. u64(2) .. "\0\1"), pair("none", 9, u32(8) .. u64(0)),
    }, {})
    local ix = assert(index.open(path_of(text)))
    assert.equal("gguf", ix:format())
    local expected = { u8 = 200, i8 = -56, u16 = 65535, i16 = -1, u32 = 4294967295, i32 = -1, f32 = 0.5, yes = true, no = false, text = "h\195\169llo",
                       u64 = 2 ^ 40, i64 = -1, f64 = -2.25 }
    for key, value in pairs(expected) do assert.equal(value, ix:meta(key), key) end
    assert.is_nil(ix:meta "absent")
    local n, item = ix:array "strings"
    assert.equal(1000, n)
    assert.equal("token 1\0\255", item(1))
    assert.equal("token 1000\0\255", item(1000))
    assert.has_error(function() item(1001) end)
    assert.has_error(function() item(0) end)
    n, item = ix:array "floats"
    assert.same({ 3, 1, -2, 4 }, { n, item(1), item(2), item(3) })
    n, item = ix:array "flags"
    assert.same({ 2, false, true }, { n, item(1), item(2) })
    assert.equal(0, (ix:array "none"))
    assert.equal(17, #ix:keys())
  end)

  it("gives tensors of every dtype that wane computes with, and lists the others", function()
    local kinds = { { 0, "f32", 128 }, { 1, "f16", 64 }, { 30, "bf16", 64 }, { 2, "q4_0", 18 }, { 3, "q4_1", 20 }, { 6, "q5_0", 22 }, { 7, "q5_1", 24 },
                    { 8, "q8_0", 34 }, { 20, "iq4_nl", 18 }, { 39, "mxfp4", 17 }, { 24, "i8", 32 }, { 26, "i32", 128 }, { 27, "i64", 256 } }
    local infos, data = {}, {}
    for i, k in ipairs(kinds) do
      infos[i] = { "t" .. i, { 32, 2 }, k[1], (i - 1) * 512 }
      data[i] = ("\0"):rep(512)
    end
    infos[#infos + 1] = { "odd", { 32 }, 25, #kinds * 512 }
    data[#data + 1] = ("\0"):rep(64)
    local path = path_of(files.gguf({}, infos, table.concat(data)))
    local ix = assert(index.open(path))
    for i, k in ipairs(kinds) do
      local e = ix:find("t" .. i)
      assert.same({ k[2], { 2, 32 }, 2 * k[3] }, { e.dtype, e.shape, e.bytes })
      local t = assert(ix:map(e))
      assert.equal(k[2], t:dtype())
      assert.same({ 2, 32 }, t:shape())
    end
    assert.equal("I16", ix:find("odd").file_dtype)
    local list, message, code = loader.load({ path = path }, { { entry = ix:find "odd" } })
    assert.is_nil(list)
    assert.equal("WANE_E_UNSUPPORTED", code)
    assert.truthy(message:find("I16", 1, true))
  end)

  local ok_tensor = { "a", { 4 }, 0, 0 }
  local bad = {
    { "four bytes", "GGUF", "reaches beyond the end" },
    { "version 1", "GGUF" .. u32(1) .. u64(0) .. u64(0), "version 1" },
    { "a big-endian file", "GGUF\0\0\0\3" .. u64(0) .. u64(0), "big-endian" },
    { "a huge number of tensors", "GGUF" .. u32(3) .. u64(2 ^ 52) .. u64(0), "more than its" },
    { "a huge number of pairs", "GGUF" .. u32(3) .. u64(0) .. ("\255"):rep(8), "more than its" },
    { "a key longer than the file", "GGUF" .. u32(3) .. u64(0) .. u64(1) .. u64(2 ^ 40) .. ("x"):rep(40), "reaches beyond the end" },
    { "a string longer than the file", files.gguf({ pair("k", 8, u64(2 ^ 60)) }, {}), "reaches beyond the end" },
    { "a huge array", files.gguf({ pair("k", 9, u32(8) .. u64(2 ^ 60)) }, {}), "reaches beyond the end" },
    { "an array of numbers beyond the end", files.gguf({ pair("k", 9, u32(12) .. u64(100)) }, {}), "reaches beyond the end" },
    { "an array of arrays", files.gguf({ pair("k", 9, u32(9) .. u64(1)) }, {}), "array of arrays" },
    { "an unknown value type", files.gguf({ pair("k", 13, "1234") }, {}), "unknown type 13" },
    { "an unknown item type", files.gguf({ pair("k", 9, u32(99) .. u64(1)) }, {}), "unknown type 99" },
    { "a key twice", files.gguf({ pair("k", 0, "a"), pair("k", 0, "b") }, {}), "occurs twice" },
    { "a zero byte in a key", files.gguf({ pair("k\0y", 0, "a") }, {}), "zero byte" },
    { "a tensor twice", files.gguf({}, { ok_tensor, { "a", { 4 }, 0, 32 } }, ("\0"):rep(64)), "occurs twice" },
    { "five dimensions", files.gguf({}, { { "a", { 1, 1, 1, 1, 4 }, 0, 0 } }, ("\0"):rep(16)), "4 at most" },
    { "a shape that overflows", files.gguf({}, { { "a", { 2 ^ 40, 2 ^ 40 }, 0, 0 } }, ("\0"):rep(16)), "overflow" },
    { "a size beyond 2^63", files.gguf({}, { { "a", { 2 ^ 63 }, 0, 0 } }, ("\0"):rep(16)), "overflow" },
    { "rows that fill no block", files.gguf({}, { { "a", { 33 }, 8, 0 } }, ("\0"):rep(64)), "no multiple of the 32" },
    { "data cut short", files.gguf({}, { ok_tensor }, "123456789"), "truncated" },
    { "an offset beyond the end", files.gguf({}, { { "a", { 4 }, 0, 2 ^ 50 } }, ("\0"):rep(16)), "truncated" },
    { "an unaligned offset", files.gguf({}, { { "a", { 4 }, 0, 4 } }, ("\0"):rep(64)), "alignment" },
    { "an overlap", files.gguf({}, { { "a", { 16 }, 0, 0 }, { "b", { 4 }, 0, 32 } }, ("\0"):rep(64)), "inside the tensor" },
    { "an alignment that is no power of two", files.gguf({ pair("general.alignment", 4, u32(24)) }, {}), "power of two" },
    { "an alignment of 0", files.gguf({ pair("general.alignment", 4, u32(0)) }, {}), "power of two" },
  }
  for _, case in ipairs(bad) do
    it("refuses " .. case[1], function()
      local path = path_of(case[2])
      local ix, message = index.open(path)
      assert.is_nil(ix)
      assert.truthy(message:find(case[3], 1, true), message)
      assert.truthy(message:find(path, 1, true), message)
    end)
  end

  it("survives 10,000 mutated headers", function()
    local whole = files.gguf
    local llama = whole({ pair("general.architecture", 8, str "llama"), pair("llama.embedding_length", 4, u32(4)), pair("llama.block_count", 4, u32(1)),
        pair("llama.attention.head_count", 4, u32(1)), pair("llama.rope.scaling.type", 8, str "yarn"), pair("general.alignment", 4, u32(32)),
        pair("x", 9, u32(8) .. u64(2) .. str "ab" .. str "c"), pair("y", 9, u32(6) .. u64(2) .. f32(1, 2)), pair("split.count", 2, le(1, 2)) },
      { { "blk.0.attn_q.weight", { 4, 4 }, 0, 0 }, { "blk.0.ffn_up_exps.weight", { 32, 2, 2 }, 8, 64 }, { "rope_freqs.weight", { 2 }, 0, 224 } },
      ("\0"):rep(232))
    local t5 = whole({ pair("general.architecture", 8, str "t5"), pair("t5.embedding_length", 4, u32(4)), pair("t5.attention.head_count", 4, u32(1)),
        pair("t5.attention.key_length", 4, u32(4)), pair("t5.decoder_block_count", 4, u32(1)), pair("t5.block_count", 4, u32(1)) },
      { { "enc.blk.0.attn_q.weight", { 4, 4 }, 1, 0 }, { "enc.blk.0.ffn_gate.weight", { 32 }, 20, 32 } }, ("\0"):rep(50))
    local falcon = whole({ pair("general.architecture", 8, str "falcon"), pair("falcon.embedding_length", 4, u32(4)),
        pair("falcon.attention.head_count", 4, u32(2)), pair("falcon.attention.head_count_kv", 9, u32(5) .. u64(2) .. u32(1) .. u32(1)) },
      { { "blk.0.attn_qkv.weight", { 4, 8 }, 0, 0 }, { "blk.0.attn_norm_2.weight", { 4 }, 0, 128 } }, ("\0"):rep(144))
    mutate.run {
      name = "GGUF headers", sources = { llama, t5, falcon }, path = folder .. "/mutated.gguf",
      spans = { { 5, #llama - 232 }, { 5, #t5 - 50 }, { 5, #falcon - 144 } },
      try = function(path, bytes)
        local g, message, code = checkpoint.open(path)
        if not g then return nil, message, code end
        for _, name in ipairs(g:names()) do
          local e = g:find(name)
          if e then
            assert(e.offset + e.bytes <= #bytes)
            g.index:bytes(e, 16)
            local list, why = loader.load(g, { { entry = e } })
            assert(list or why:find(path, 1, true) or why:find("tensor '", 1, true), why)
          end
        end
        for _, key in ipairs(g.index:keys()) do
          g.index:meta(key)
          local n, item = g.index:array(key)
          for i = 1, math.min(n or 0, 3) do item(i) end
        end
        g:close()
        return true
      end,
    }
  end)

  describe("in several files", function()
    local function part(no, count, infos, data, more)
      local list = { pair("split.no", 2, le(no, 2)), pair("split.count", 2, le(count, 2)), pair("split.tensors.count", 5, u32(3)) }
      for _, m in ipairs(more or {}) do list[#list + 1] = m end
      return files.gguf(list, infos, data)
    end
    local function write(no, text) return files.write(("%s/m-%05d-of-00003.gguf"):format(folder, no), text) end
    local one = { pair("general.architecture", 8, str "llama"), pair("general.name", 8, str "m") }
    local first

    before_each(function()
      first = write(1, part(0, 3, { { "a", { 4 }, 0, 0 } }, f32(1, 2, 3, 4), one))
      write(2, part(1, 3, { { "b", { 2 }, 0, 0 }, { "c", { 2 }, 0, 32 } }, f32(5, 6) .. ("\0"):rep(24) .. f32(7, 8)))
      write(3, part(2, 3, {}))
    end)

    it("takes the metadata from the first and the tensors from all", function()
      local ix = assert(index.open(first))
      assert.equal(3, #ix:files())
      assert.equal("llama", ix:meta "general.architecture")
      assert.equal(5, #ix:keys())
      for name, values in pairs { a = { 1, 2, 3, 4 }, b = { 5, 6 }, c = { 7, 8 } } do assert.same(values, assert(ix:map(ix:find(name))):totable()) end
      assert.equal(1, ix:find("c").file)
    end)

    local function refused(what, make, ...)
      local expected = { ... }
      it("refuses " .. what, function()
        local ix, message, code = index.open(make() or first)
        assert.is_nil(ix)
        assert.matches("^WANE_E_", code)
        for _, text in ipairs(expected) do assert.truthy(message:find(text, 1, true), message) end
      end)
    end
    refused("a part that is missing", function() os.remove(folder .. "/m-00002-of-00003.gguf") end, "m-00002-of-00003.gguf")
    refused("a later part", function() return folder .. "/m-00002-of-00003.gguf" end, "part 2 of 3", "-00001-of-00003.gguf")
    refused("parts in a wrong order", function() write(2, part(2, 3, {})) end, "m-00002", "part 3 of 3", "part 2 of 3 was expected")
    refused("a part of another number of parts", function() write(3, part(2, 4, {})) end, "m-00003", "part 3 of 4")
    refused("a part that knows of no parts", function() write(3, files.gguf({}, {})) end, "m-00003", "part 3 of 3 was expected")
    refused("a part that is no GGUF file", function() write(3, "what is this") end, "m-00003", "no GGUF file")
    refused("a tensor in two parts", function() write(3, part(2, 3, { { "a", { 1 }, 0, 0 } }, f32(1))) end, "m-00003", "'a' occurs twice")
    refused("another number of tensors than was promised", function() write(2, part(1, 3, {})) end, "promises 3 tensors", "they hold 1")
    refused("a first part under another name", function() return files.write(folder .. "/other.gguf", files.read(first)) end,
      "other.gguf", "-00001-of-00003.gguf")
    refused("a part cut short", function() write(2, part(1, 3, { { "b", { 200 }, 0, 0 } }, "1234")) end, "m-00002", "truncated")
  end)

  describe("as a checkpoint", function()
    for _, case in ipairs { { "llama", "gguf/llama-f16.gguf" }, { "gpt_neox", "gguf/gpt_neox-f16.gguf" } } do
      it("has the names, the config and the values of the model it was made from: " .. case[1], function()
        local g = assert(checkpoint.open(fixtures .. case[2]))
        local s = assert(checkpoint.open(fixtures .. "models/" .. case[1]))
        local a, b = g:names(), s:names()
        table.sort(a)
        table.sort(b)
        assert.same(b, a)
        local old = assert(require("wane.checkpoint.json").read(fixtures .. "models/" .. case[1] .. "/config_v4.json"))
        for _, key in ipairs { "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                               "rms_norm_eps", "layer_norm_eps", "vocab_size", "tie_word_embeddings", "hidden_act", "rotary_pct", "use_parallel_residual",
                               "rope_theta", "max_position_embeddings", "bos_token_id", "eos_token_id", "attention_bias", "mlp_bias" } do
          assert.equal(old[key], g.config[key], key)
        end
        assert.same({ 1, 2 }, { g.generation_config.bos_token_id, g.generation_config.eos_token_id })
        local want, have = {}, {}
        for i, name in ipairs(b) do want[i], have[i] = { entry = s:find(name), dtype = "f32" }, { entry = g:find(name), dtype = "f32" } end
        want, have = assert(loader.load(s, want)), assert(loader.load(g, have))
        for i, name in ipairs(b) do
          assert.same(want[i]:shape(), have[i]:shape())
          assert.is_true(files.bytes(want[i]) == files.bytes(have[i]), name)
        end
        -- as they lie (rows put back, F16 kept), and quantized on the way
        for _, name in ipairs(b) do
          local e = g:find(name)
          local kept = assert(loader.load(g, { { entry = e } }))[1]
          assert.equal(e.dtype, kept:dtype())
          local cast = assert(loader.load(s, { { entry = s:find(name), dtype = e.dtype } }))[1]
          assert.is_true(files.bytes(kept) == files.bytes(cast), name)
        end
      end)
    end

    it("puts the rows of quantized heads back as whole blocks", function()
      -- two heads of four rows, 32 values each: Q8_0 rows of 34 bytes, told apart by their first byte
      local rows, order = {}, { 1, 3, 2, 4, 5, 7, 6, 8 }        -- file row of each row of the model: halves were interleaved
      for r = 1, 8 do rows[r] = string.char(r, 60) .. string.char(r):rep(32) end
      local text = files.gguf({ pair("general.architecture", 8, str "llama"), pair("llama.embedding_length", 4, u32(8)),
                                pair("llama.attention.head_count", 4, u32(2)), pair("llama.block_count", 4, u32(1)) },
        { { "blk.0.attn_q.weight", { 32, 8 }, 8, 0 }, { "blk.0.attn_v.weight", { 32, 8 }, 8, 288 } },
        table.concat(rows) .. ("\0"):rep(16) .. table.concat(rows))
      local g = assert(checkpoint.open(path_of(text)))
      local q = assert(loader.load(g, { { entry = g:find "model.layers.0.self_attn.q_proj.weight" },
                                        { entry = g:find "model.layers.0.self_attn.v_proj.weight" } }))
      local expected = {}
      for r = 1, 8 do expected[r] = rows[order[r]] end
      assert.equal("q8_0", q[1]:dtype())
      assert.equal(table.concat(expected), files.parts(q[1])[0])
      assert.equal(table.concat(rows), files.parts(q[2])[0])
    end)

    it("puts fused rows back group by group: Falcon's query heads that share a key and a value", function()
      -- 4 heads in 2 groups, one row a head: q0 q1 q2 q3 k0 k1 v0 v1 becomes q0 q1 k0 v0 q2 q3 k1 v1
      local rows = {}
      for r = 1, 8 do rows[r] = f32(r, 0, 0, 0) end
      local function falcon(kv)
        return checkpoint.open(path_of(files.gguf({ pair("general.architecture", 8, str "falcon"), pair("falcon.embedding_length", 4, u32(4)),
          pair("falcon.attention.head_count", 4, u32(4)), pair("falcon.attention.head_count_kv", 4, u32(kv)) },
          { { "blk.0.attn_qkv.weight", { 4, 8 }, 0, 0 } }, table.concat(rows))))
      end
      local g = assert(falcon(2))
      local name = "transformer.h.0.self_attention.query_key_value.weight"
      for _, dtype in ipairs { "f32", "f16" } do                 -- moved as they are read, or as they are converted
        local t = assert(loader.load(g, { { entry = g:find(name), dtype = dtype } }))[1]
        local order = {}
        for r, row in ipairs(t:to("f32"):totable()) do order[r] = row[1] end
        assert.same({ 1, 2, 5, 7, 3, 4, 6, 8 }, order)
      end
      local _, message, code = loader.load(assert(falcon(3)), { { entry = falcon(3):find(name) } })
      assert.equal("WANE_E_SHAPE", code)
      assert.truthy(message:find("4 heads", 1, true), message)
    end)

    it("takes one expert out of a tensor that holds all, mapped, copied, cast and quantized, blocks too", function()
      local data, infos = {}, {}
      for e = 0, 2 do data[e + 1] = (string.char(e + 1, 60) .. string.char(e):rep(32)):rep(2) end   -- 3 experts of [2, 32] in Q8_0
      infos[1] = { "blk.0.ffn_down_exps.weight", { 32, 2, 3 }, 8, 0 }
      local fused = {}
      for i = 1, 3 * 4 * 2 do fused[i] = i end                                                      -- 3 experts of gate [2, 2] and up [2, 2]
      infos[2] = { "blk.0.ffn_gate_up_exps.weight", { 2, 4, 3 }, 0, 224 }
      local g = assert(checkpoint.open(path_of(files.gguf({ pair("general.architecture", 8, str "qwen3moe") }, infos,
        table.concat(data) .. ("\0"):rep(20) .. f32(unpack(fused))))))
      assert.equal(9, #g:names())
      for e = 0, 2 do
        local down = "model.layers.0.mlp.experts." .. e .. ".down_proj.weight"
        for _, io_mode in ipairs { "mmap", "read" } do
          local t = assert(loader.load(g, { { entry = g:find(down) } }, { io = io_mode }))[1]
          assert.same({ 2, 32 }, t:shape())
          assert.equal(data[e + 1], files.parts(t)[0])
        end
        local both = assert(loader.load(g, { { entry = g:find(down), dtype = "f32" }, { entry = g:find(down), scheme = { type = "int8" } } }))
        local value = both[1]:totable()[2][32]
        assert.near(e * (1 + (e + 1) / 1024), value, 1e-6)
        assert.near(value, both[2]:dequantize("f32"):totable()[2][32], 0.02)
        local gate, up = g:find("model.layers.0.mlp.experts." .. e .. ".gate_proj.weight"), g:find("model.layers.0.mlp.experts." .. e .. ".up_proj.weight")
        local list = assert(loader.load(g, { { entry = gate }, { entry = up } }))
        assert.same({ { 8 * e + 1, 8 * e + 2 }, { 8 * e + 3, 8 * e + 4 } }, list[1]:totable())
        assert.same({ { 8 * e + 5, 8 * e + 6 }, { 8 * e + 7, 8 * e + 8 } }, list[2]:totable())
      end
      assert.truthy(g:find("model.layers.0.mlp.experts.3.down_proj.weight").invalid:find("expert 3", 1, true))
    end)

    it("keeps kinds with tables as blocks, which embed and quantize as their exact values", function()
      local golden = require("support.safetensors").read(fixtures .. "quant/gguf.safetensors")
      local F, wane = require "wane.nn.functional", require "wane"
      for kind, number in pairs { iq4_nl = 20, mxfp4 = 39, iq2_xs = 17, iq1_m = 29 } do
        local blocks, values = golden[kind .. "/blocks"], golden[kind .. "/values"]
        local N, K = tonumber(values.shape[1]), tonumber(values.shape[2])
        local g = assert(checkpoint.open(path_of(files.gguf({ pair("general.architecture", 8, str "llama") }, { { "token_embd.weight", { K, N }, number, 0 } },
          ffi.string(blocks.data, blocks.nbytes)))))
        local e = g:find "model.embed_tokens.weight"
        local list = assert(loader.load(g, { { entry = e }, { entry = e, dtype = "f32" }, { entry = e, scheme = { type = "nf4", block_size = 32 } } }))
        assert.equal(kind, list[1]:dtype())
        assert.equal(ffi.string(values.data, values.nbytes), files.bytes(list[2]), kind)
        assert.same(files.parts(files.quantize(list[2], "nf4", 32)), files.parts(list[3]))
        local rows = F.embedding(list[1], wane.tensor({ { 2, 0 } }, "i32"), require("wane.core").C.WANE_F32)
        assert.equal(files.bytes(list[2]):sub(8 * K + 1) .. files.bytes(list[2]):sub(1, 4 * K), files.bytes(rows), kind)
      end
    end)

    it("says what it does not apply: a second scale, more layers than tensors", function()
      local base = { pair("general.architecture", 8, str "llama"), pair("llama.block_count", 4, u32(4000000000)) }
      local tensors = { { "output.weight", { 64, 1 }, 40, 0 }, { "output.scale", { 1 }, 0, 64 } }
      local g, message, code = checkpoint.open(path_of(files.gguf(base, tensors, ("\0"):rep(68))))
      assert.is_nil(g)
      assert.equal("WANE_E_FORMAT", code)
      assert.truthy(message:find("promises 4000000000 layers", 1, true), message)
      base[2] = nil
      g = assert(checkpoint.open(path_of(files.gguf(base, tensors, ("\0"):rep(68)))))
      local list
      list, message = loader.load(g, { { entry = g:find "lm_head.weight" } })
      assert.is_nil(list)
      assert.truthy(message:find("output.scale", 1, true), message)
    end)

    it("gives rope scaling: stored factors as longrope, the others by name", function()
      local base = { pair("general.architecture", 8, str "llama"), pair("llama.embedding_length", 4, u32(8)), pair("llama.attention.head_count", 4, u32(1)),
                     pair("llama.context_length", 4, u32(64)) }
      local g = assert(checkpoint.open(path_of(files.gguf(base, { { "rope_freqs.weight", { 4 }, 0, 0 } }, f32(1, 2, 4, 8)))))
      assert.same({ rope_type = "longrope", short_factor = { 1, 2, 4, 8 }, long_factor = { 1, 2, 4, 8 }, attention_factor = 1,
                    original_max_position_embeddings = 64 }, g.config.rope_scaling)
      assert.same({}, g:names())
      local rotary = require "wane.nn.rotary"
      local inv, scale = rotary.frequencies(rotary.parameters(g.config), 8, 10)
      assert.equal(1, scale)
      for j, expected in ipairs { 0.1 / 2, 0.01 / 4, 0.001 / 8 } do assert.near(expected, inv[j], 1e-12) end
      base[#base + 1] = pair("llama.rope.scaling.type", 8, str "linear")
      base[#base + 1] = pair("llama.rope.scaling.factor", 6, f32(4))
      g = assert(checkpoint.open(path_of(files.gguf(base, {}))))
      assert.same({ rope_type = "linear", factor = 4 }, g.config.rope_scaling)
    end)

    it("says which heads do not fit", function()
      local text = files.gguf({ pair("general.architecture", 8, str "llama"), pair("llama.embedding_length", 4, u32(8)),
                                pair("llama.attention.head_count", 4, u32(3)), pair("llama.block_count", 4, u32(1)) },
        { { "blk.0.attn_q.weight", { 8, 8 }, 0, 0 } }, ("\0"):rep(256))
      local g = assert(checkpoint.open(path_of(text)))
      local q, message, code = loader.load(g, { { entry = g:find "model.layers.0.self_attn.q_proj.weight" } })
      assert.is_nil(q)
      assert.equal("WANE_E_SHAPE", code)
      assert.truthy(message:find("3 heads", 1, true), message)
    end)
  end)
end)
