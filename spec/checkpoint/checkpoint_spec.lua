-- Checkpoints: folders and their names, bitsandbytes' layouts read and written, and what is said about folders that are broken.
local checkpoint = require "wane.checkpoint"
local json = require "wane.checkpoint.json"
local loader = require "wane.loader"
local names = require "wane.checkpoint.names"
local quantized = require "wane.checkpoint.quantized"
local files = require "support.files"

local golden = "spec/fixtures/quant/checkpoints/"
local folder

-- Largest relative (Frobenius) error of the dequantized weights of a folder against its source.
local function largest_error(path, source)
  local q, s = assert(checkpoint.open(path)), assert(checkpoint.open(source))
  local worst, count = 0, 0
  for _, name in ipairs(q:names()) do
    local e = q:find(name)
    if e.quant then
      local x, n = files.floats(assert(loader.load(q, { { entry = e, dtype = "f32" } }))[1])
      local y, m = files.floats(assert(loader.load(s, { { entry = s:find(name), dtype = "f32" } }))[1])
      assert.equal(m, n)
      local d, w = 0, 0
      for i = 0, n - 1 do d, w = d + (x[i] - y[i]) ^ 2, w + y[i] ^ 2 end
      worst, count = math.max(worst, math.sqrt(d / w)), count + 1
    end
  end
  return worst, count
end

local function differing(a, b)
  assert.equal(#a, #b)
  local n = 0
  for i = 1, #a do if a:byte(i) ~= b:byte(i) then n = n + 1 end end
  return n
end

describe("checkpoint", function()
  setup(function() folder = files.folder() end)
  teardown(files.clean)

  describe("names", function()
    it("are found under every spelling, canonical ones first", function()
      assert.same({ "model.norm.weight", "norm.weight", "module.model.norm.weight", "module.norm.weight" }, names.spellings("llama", "model.norm.weight"))
      assert.same({ "embed_out.weight", "lm_head.weight", "module.embed_out.weight", "module.lm_head.weight" }, names.spellings("gpt_neox", "embed_out.weight"))
      assert.same({ "model.decoder.x", "decoder.x", "x", "module.model.decoder.x", "module.decoder.x", "module.x" }, names.spellings("opt", "model.decoder.x"))
      assert.same({ "x.weight", "module.x.weight" }, names.spellings("of my own", "x.weight"))
    end)

    it("of the head stand in a written skip list under every spelling: transformers 5 knows GPT-NeoX's as lm_head", function()
      assert.same({ "embed_out", "lm_head" }, names.skip_list("gpt_neox", { "embed_out" }))
      assert.same({ "dense", "lm_head", "embed_out" }, names.skip_list("gpt_neox", { "dense", "lm_head" }))
      assert.same({ "dense" }, names.skip_list("gpt_neox", { "dense" }))
      assert.same({ "lm_head" }, names.skip_list("llama", { "lm_head" }))
      assert.same({ "x" }, names.skip_list("of my own", { "x" }))
      assert.is_nil(names.skip_list("gpt_neox", nil))
    end)

    it("become canonical", function()
      assert.equal("embed_out.weight", names.canonical("gpt_neox", "lm_head.weight", ""))
      assert.equal("model.layers.0.mlp.up_proj.weight", names.canonical("llama", "layers.0.mlp.up_proj.weight", "model."))
      assert.equal("lm_head.weight", names.canonical("llama", "module.lm_head.weight", "model."))
    end)

    it("may leave out all of a prefix, a part of it, or nothing", function()
      local function missing(model_type, list)
        local i = 0
        return names.missing_prefix(model_type, function() i = i + 1 return list[i] end)
      end
      assert.equal("", missing("opt", { "lm_head.weight", "model.decoder.layers.0.fc1.weight" }))
      assert.equal("model.", missing("opt", { "decoder.embed_tokens.weight", "decoder.layers.0.fc1.weight" }))
      assert.equal("model.decoder.", missing("opt", { "embed_tokens.weight", "layers.0.fc1.weight", "lm_head.weight" }))
      assert.equal("transformer.", missing("bloom", { "h.0.mlp.dense_4h_to_h.weight", "word_embeddings.weight" }))
      assert.equal("", missing("bloom", { "module.transformer.ln_f.weight" }))
      assert.equal("", missing("of my own", { "x" }))
    end)

    it("of a family from outside the tree, once it is registered", function()
      require("wane.models").register { name = "mine", architectures = { "MineForCausalLM" }, prefix = "core", embedding = "core.e", head = "out",
                                        build = function() end }
      assert.same({ "core.x.weight", "x.weight", "module.core.x.weight", "module.x.weight" }, names.spellings("mine", "core.x.weight"))
      assert.equal("core.x.weight", names.canonical("mine", "x.weight", "core."))
    end)

    it("of buffers are left out, biases are not", function()
      for _, case in ipairs {
        { "gpt_neox", "gpt_neox.layers.0.attention.bias", "layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias" },
        { "gpt2", "transformer.h.0.attn.bias", "h.11.attn.bias", "h.0.attn.masked_bias" }, { "gptj", "transformer.h.0.attn.bias" },
        { "gpt_neo", "transformer.h.0.attn.attention.bias", "transformer.h.1.attn.attention.masked_bias" },
        { "llama", "model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq" },
      } do
        for i = 2, #case do assert.is_true(names.is_ignorable(case[i], case[1]), case[i]) end
      end
      for _, case in ipairs {
        { "gpt_neox", "gpt_neox.layers.0.attention.dense.bias", "gpt_neox.layers.0.input_layernorm.bias" }, { "gptj", "lm_head.bias" },
        { "gpt2", "h.0.attn.c_attn.bias", "h.0.attn.c_proj.bias" }, { "gpt_neo", "transformer.h.0.attn.attention.out_proj.bias" },
        { "bloom", "h.0.self_attention.dense.bias" }, { "of my own", "layers.0.attn.bias", "layers.0.attention.bias" },
      } do
        for i = 2, #case do assert.is_false(names.is_ignorable(case[i], case[1]), case[i]) end
      end
    end)

    it("of Conv1D's weights say that the file holds them the other way round", function()
      for _, name in ipairs { "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj" } do
        assert.is_true(names.is_transposed("gpt2", "transformer.h.3." .. name .. ".weight"), name)
        assert.is_false(names.is_transposed("gpt2", "transformer.h.3." .. name .. ".bias"), name)
        assert.is_false(names.is_transposed("gpt_neo", "transformer.h.3." .. name .. ".weight"), name)
      end
      assert.is_false(names.is_transposed("gpt2", "transformer.wte.weight"))
      local c = assert(checkpoint.open "spec/fixtures/models/gpt2")
      local e = c:find "transformer.h.0.attn.c_attn.weight"
      assert.same({ { 144, 48 }, "transpose" }, { e.shape, e.arrange })
      local ours = files.floats(assert(loader.load(c, { { entry = e } }))[1])
      local theirs = files.floats(assert(checkpoint.read_safetensors "spec/fixtures/models/gpt2/model.safetensors")[e.file_name])
      for n = 0, 143 do for k = 0, 47 do assert.equal(theirs[k * 144 + n], ours[n * 48 + k]) end end
    end)

    it("of files without the base model's prefix and with a wrapper's", function()
      local tensors = assert(checkpoint.read_safetensors "spec/fixtures/models/llama/model.safetensors")
      for _, spelling in ipairs { { "^model%.", "" }, { "^", "module." } } do
        local renamed = {}
        for name, t in pairs(tensors) do renamed[(name:gsub(spelling[1], spelling[2]))] = t end
        renamed["layers.0.self_attn.rotary_emb.inv_freq"] = files.tensor("f32", { 1 }, "1234")
        assert(checkpoint.write_safetensors(folder .. "/model.safetensors", renamed, { format = "pt" }))
        files.write(folder .. "/config.json", files.read "spec/fixtures/models/llama/config.json")
        local c = assert(checkpoint.open(folder))
        local list = c:names()
        assert.equal(20, #list)
        for _, name in ipairs(list) do
          assert.is_truthy(tensors[name], name)
          assert.is_true(files.bytes(assert(loader.load(c, { { entry = c:find(name) } }))[1]) == files.bytes(tensors[name]))
        end
        assert.same({ missing = { "model.more.weight" }, unexpected = { "model.norm.weight" } }, (function()
          local wanted = { "model.more.weight" }
          for _, name in ipairs(list) do if name ~= "model.norm.weight" then wanted[#wanted + 1] = name end end
          return c:report(wanted)
        end)())
      end
    end)
  end)

  describe("of bitsandbytes", function()
    local expected = {
      { "llama", "nf4-dq-bf16", "source", { nf4 = 14, bf16 = 7 }, 0.1 }, { "llama", "fp4-f32", "source", { fp4 = 14, f32 = 7 }, 0.13 },
      { "llama", "int8", "source", { int8 = 13, f32 = 8 }, 0.007 }, { "gpt_neox", "nf4-dq-bf16", "source", { nf4 = 8, bf16 = 20 }, 0.1 },
      { "gpt_neox", "fp4-f32", "source", { fp4 = 8, f32 = 20 }, 0.13 }, { "gpt_neox", "int8", "source", { int8 = 6, f32 = 22 }, 0.007 },
      { "llama", "nf4-repacked-bf16", "source-repacked", { nf4 = 14, bf16 = 7 }, 0.1 },
    }
    for _, case in ipairs(expected) do
      local path = golden .. case[1] .. "/" .. case[2]
      local worst, count = largest_error(path, golden .. case[1] .. "/" .. case[3])
      it(("reads %s/%s: largest relative error of a weight %.5f"):format(case[1], case[2], worst), function()
        assert.is_true(worst > 0 and worst < case[5])
        local c = assert(checkpoint.open(path))
        local requests = {}
        for i, name in ipairs(c:names()) do requests[i] = { entry = c:find(name) } end
        for _, io_mode in ipairs { "mmap", "read" } do
          local dtypes = {}
          for _, t in ipairs(assert(loader.load(c, requests, { io = io_mode }))) do dtypes[t:dtype()] = (dtypes[t:dtype()] or 0) + 1 end
          assert.same(case[4], dtypes)
        end
        assert.equal(case[4][c.quant.type], count)
      end)
    end

    it("knows the scheme of a folder", function()
      local c = assert(checkpoint.open(golden .. "llama/nf4-dq-bf16"))
      assert.same({ type = "nf4", block_size = 64, double_quant = true, compute = "bf16" }, c.quant)
      local e = c:find "model.layers.0.mlp.down_proj.weight"
      assert.same({ 72, 104 }, e.shape)
      assert.same({ "nf4", 64, true, "bf16" }, { e.quant.type, e.quant.block_size, e.quant.double_quant, e.quant.dtype })
      c = assert(checkpoint.open(golden .. "gpt_neox/int8"))
      assert.same({ type = "int8", threshold = 6.0, skip = { "embed_out", "lm_head", "dense_4h_to_h" } }, c.quant)
      assert.is_nil(c:find("gpt_neox.layers.0.mlp.dense_4h_to_h.weight").quant)
    end)

    it("reads the GPT-J-6B-8bit layout with its own map", function()
      local c = assert(checkpoint.open(golden .. "gptj/blockwise8"))
      local e = c:find "transformer.h.0.mlp.fc_in.weight"
      assert.same({ "int8-blockwise", 4096 }, { e.quant.type, e.quant.block_size })
      local q = assert(loader.load(c, { { entry = e } }))[1]
      local parts = files.parts(q)
      assert.equal(-1, require("ffi").cast("const float *", parts[4])[0])
      -- the value of every element by hand: code[byte] * absmax[element / 4096]
      local ffi = require "ffi"
      local values, n = files.floats(assert(loader.load(c, { { entry = e, dtype = "f32" } }))[1])
      local code, absmax, codes = ffi.cast("const float *", parts[4]), ffi.cast("const float *", parts[1]), ffi.cast("const uint8_t *", parts[0])
      for i = 0, n - 1 do
        local x = ffi.new("float[1]", code[codes[i]] * absmax[math.floor(i / 4096)])
        assert.equal(x[0], values[i])
      end
    end)

    -- A golden folder with one tensor changed.
    local function broken(kind, change)
      local path = golden .. "llama/" .. kind
      local tensors, metadata = assert(checkpoint.read_safetensors(path .. "/model.safetensors", { io = "read" }))
      change(tensors)
      assert(checkpoint.write_safetensors(folder .. "/model.safetensors", tensors, metadata))
      files.write(folder .. "/config.json", files.read(path .. "/config.json"))
      local c = assert(checkpoint.open(folder))
      return loader.load(c, { { entry = c:find "model.layers.0.mlp.up_proj.weight" } })
    end
    local key = "model.layers.0.mlp.up_proj."
    local function state(text) return files.tensor("u8", { #text }, text) end
    local state_key = key .. "weight.quant_state.bitsandbytes__nf4"
    for _, case in ipairs {
      { "scales missing", "nf4-dq-bf16", function(t) t[key .. "weight.absmax"] = nil end, "is missing" },
      { "scales of another number", "nf4-dq-bf16", function(t) t[key .. "weight.absmax"] = files.tensor("u8", { 3 }, "abc") end, "asks for" },
      { "nested scales missing their map", "nf4-dq-bf16", function(t) t[key .. "weight.nested_quant_map"] = nil end, "is missing" },
      { "a state that is no JSON", "nf4-dq-bf16", function(t) t[state_key] = state "{" end, "no valid JSON" },
      { "a state without a shape", "nf4-dq-bf16", function(t) t[state_key] = state '{"quant_type": "nf4", "blocksize": 64}' end,
        "no valid quant_type or shape" },
      { "a state whose shape lies", "nf4-dq-bf16", function(t)
        t[state_key] = state '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1000, 72]}'
      end, "needs 36000" },
      { "a block size of 0", "nf4-dq-bf16", function(t)
        t[state_key] = state '{"quant_type": "nf4", "blocksize": 0, "dtype": "float32", "shape": [104, 72]}'
      end, "block size" },
      { "no nested offset", "nf4-dq-bf16", function(t)
        t[state_key] = state '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [104, 72]}'
      end, "nested_offset" },
      { "no state at all", "nf4-dq-bf16", function(t) t[state_key] = nil end, "no quant_state" },
      { "row scales of another number", "int8", function(t) t[key .. "SCB"] = files.tensor("f32", { 1 }, "1234") end, "asks for 104" },
      { "a tiled int8 layout", "int8", function(t) t[key .. "weight_format"] = files.tensor("u8", {}, "\2") end, "tiled layout" },
    } do
      it("refuses " .. case[1], function()
        local list, message, code = broken(case[2], case[3])
        assert.is_nil(list)
        assert.equal("WANE_E_FORMAT", code)
        assert.truthy(message:find(case[4], 1, true) and message:find("up_proj", 1, true), message)
      end)
    end
  end)

  describe("written", function()
    -- Bytes that may differ: codes 0 and 8 of fp4 are both zero, int8 codes at ties (README of the golden data).
    local cases = {
      { "llama", "fp4-f32", { type = "fp4" }, 1000 },
      { "llama", "int8", { type = "int8", skip = { "lm_head", "model.layers.0.self_attn.o_proj" } }, 20 },
      { "gpt_neox", "fp4-f32", { type = "fp4" }, 2000 },
      { "gpt_neox", "int8", { type = "int8", skip = { "embed_out", "lm_head", "dense_4h_to_h" } }, 40 },
    }
    for _, case in ipairs(cases) do
      local out = os.tmpname() .. ".out"
      local ok = checkpoint.write_quantized(out, { checkpoint = assert(checkpoint.open(golden .. case[1] .. "/source")), scheme = case[3] })
      local ours = ok and files.read(out .. "/model.safetensors") or ""
      local theirs = files.read(golden .. case[1] .. "/" .. case[2] .. "/model.safetensors")
      local count = #ours == #theirs and differing(ours, theirs) or -1
      it(("as upstream writes it: %s/%s, %d of %d bytes differ (zero signs and ties)"):format(case[1], case[2], count, #theirs), function()
        assert.is_true(count >= 0 and count <= case[4])
        local header = 8 + theirs:byte(1) + 256 * theirs:byte(2) + 65536 * theirs:byte(3)
        assert.equal(theirs:sub(1, header), ours:sub(1, header))
        local a, b = assert(json.read(out .. "/config.json")), assert(json.read(golden .. case[1] .. "/" .. case[2] .. "/config.json"))
        a.quantization_config.llm_int8_skip_modules, b.quantization_config.llm_int8_skip_modules = nil, nil
        assert.same(b.quantization_config, a.quantization_config)
        a.quantization_config, b.quantization_config = nil, nil
        a.dtype, b.dtype = nil, nil
        assert.same(b, a)
        assert.truthy(files.read(out .. "/config.json"):find('"llm_int8_threshold": 6.0', 1, true))
        os.execute("rm -rf '" .. out .. "'")
      end)
    end

    it("with double quantization: read back, bit-equal to quantizing while loading; shards too", function()
      local source = assert(checkpoint.open "spec/fixtures/gguf/llama-f16.gguf")
      local scheme = { type = "nf4", double_quant = true, block_size = 32 }
      for _, most in ipairs { 1e9, 30000 } do
        local out = folder .. "/nf4-" .. most
        local seen, last = 0, nil
        assert(checkpoint.write_quantized(out, { checkpoint = source, scheme = scheme, max_shard_bytes = most, on_tensor = function() seen = seen + 1 end,
                                                 progress = function(done, total) last = done == total end }))
        assert.equal(14, seen)
        assert.is_true(last)
        local back = assert(checkpoint.open(out))
        assert.equal(most < 1e6, #back.index:files() > 1)
        assert.same({ type = "nf4", block_size = 64, double_quant = true, compute = "f32", skip = { "lm_head" } }, back.quant)
        for _, name in ipairs(source:names()) do
          local e = back:find(name)
          local fresh = assert(loader.load(source, { { entry = source:find(name), scheme = name:find "_proj" and scheme or nil } }))[1]
          local read = assert(loader.load(back, { { entry = e } }))[1]
          assert.equal(fresh:dtype(), read:dtype())
          if e.quant then
            assert.equal(32, e.quant.block_size)
            local a, b = files.parts(fresh), files.parts(read)
            for part = 0, 5 do assert.is_true(a[part] == b[part], name .. " part " .. part) end
          else
            assert.is_true(files.bytes(fresh) == files.bytes(read), name)
          end
        end
        assert.equal("LlamaForCausalLM", back.config.architectures[1])
      end
    end)

    it("of Conv1D: quantized as a Linear, as bitsandbytes does it; what stays plain keeps its format's layout", function()
      local source = assert(checkpoint.open "spec/fixtures/models/gpt2")
      local out = folder .. "/gpt2-nf4"
      assert(checkpoint.write_quantized(out, { checkpoint = source, scheme = { type = "nf4", double_quant = true, skip = { "lm_head", "attn.c_proj" } } }))
      local back = assert(checkpoint.open(out))
      for _, name in ipairs(source:names()) do
        local from, to = source:find(name), back:find(name)
        assert.same(from.shape, to.shape)
        if to.quant then
          assert.is_nil(to.arrange)
          local a = files.parts(assert(loader.load(source, { { entry = from, scheme = { type = "nf4", block_size = 64, double_quant = true } } }))[1])
          local b = files.parts(assert(loader.load(back, { { entry = to } }))[1])
          for part = 0, 5 do assert.is_true(a[part] == b[part], name .. " part " .. part) end
        else
          assert.equal(from.arrange, to.arrange)
          assert.is_true(source.index:bytes(from) == back.index:bytes(to), name)
        end
      end
      assert.truthy(back:find("transformer.h.1.mlp.c_fc.weight").quant)
      assert.equal("transpose", back:find("transformer.h.1.attn.c_proj.weight").arrange)
    end)

    it("with the tokenizer of a GGUF file, which gives the same ids", function()
      local g = files
      local tokens, types, extra = {}, {}, 256
      local function utf8(n) return n < 128 and string.char(n) or string.char(0xc0 + math.floor(n / 64), 0x80 + n % 64) end
      for byte = 0, 255 do                            -- GPT-2's letters for bytes
        local printable = byte >= 33 and byte <= 126 or byte >= 161 and byte <= 172 or byte >= 174
        tokens[#tokens + 1] = utf8(printable and byte or extra)
        if not printable then extra = extra + 1 end
      end
      local merges = { "h e", "l l", "he ll", "hell o", utf8(256 + 32) .. " w" }
      for _, merge in ipairs(merges) do tokens[#tokens + 1] = (merge:gsub(" ", "")) end
      for i = 1, #tokens do types[i] = g.u32(1) end
      for _, special in ipairs { "<s>", "</s>" } do
        tokens[#tokens + 1] = special
        types[#types + 1] = g.u32(3)
      end
      local function strings(list)
        local out = {}
        for i, s in ipairs(list) do out[i] = g.gguf_string(s) end
        return g.u32(8) .. g.u64(#list) .. table.concat(out)
      end
      local data = ("\0"):rep(48 * #tokens * 4)
      local path = g.write(folder .. "/tok.gguf", g.gguf({
        g.gguf_pair("general.architecture", 8, g.gguf_string "llama"), g.gguf_pair("tokenizer.ggml.model", 8, g.gguf_string "gpt2"),
        g.gguf_pair("tokenizer.ggml.pre", 8, g.gguf_string "llama-bpe"), g.gguf_pair("tokenizer.ggml.tokens", 9, strings(tokens)),
        g.gguf_pair("tokenizer.ggml.merges", 9, strings(merges)), g.gguf_pair("tokenizer.ggml.token_type", 9, g.u32(5) .. g.u64(#types) .. table.concat(types)),
        g.gguf_pair("tokenizer.ggml.bos_token_id", 4, g.u32(#tokens - 2)), g.gguf_pair("tokenizer.ggml.eos_token_id", 4, g.u32(#tokens - 1)),
        g.gguf_pair("tokenizer.ggml.add_bos_token", 7, "\1"), g.gguf_pair("tokenizer.chat_template", 8, g.gguf_string "{{ 'x\"y' }}\n"),
      }, { { "token_embd.weight", { 48, #tokens }, 0, 0 } }, data))
      local out = folder .. "/tok"
      local result = assert(checkpoint.write_quantized(out, { checkpoint = assert(checkpoint.open(path)), scheme = { type = "nf4" },
                                                              select = function() return false end }))
      assert.is_nil(result.tokenizer_error)
      local tokenizer = require "wane.tokenizer"
      local a, b = assert(tokenizer.load(path)), assert(tokenizer.load(out))
      for _, text in ipairs { "hello world", "  hell\n<s> w\195\182 12", "", "</s>\240\159\152\128" } do
        assert.same(a:encode(text), b:encode(text))
        assert.same(a:decode(a:encode(text)), b:decode(b:encode(text)))
      end
      assert.same({ #tokens - 2, 259 }, b:encode "hello")
      assert.same({ a.bos_id, a.eos_id, a.chat_template }, { b.bos_id, b.eos_id, b.chat_template })
    end)

    it("refuses what is quantized already", function()
      local source = assert(checkpoint.open(golden .. "llama/int8"))
      local ok, message, code = checkpoint.write_quantized(folder .. "/x", { checkpoint = source, scheme = { type = "nf4" } })
      assert.is_nil(ok)
      assert.equal("WANE_E_ARG", code)
      assert.truthy(message:find("quantized already", 1, true))
    end)

    it("prints numbers and states as Python does", function()
      for x, text in pairs { [0.1] = "0.1", [1e-5] = "1e-05", [0.12450754642486572] = "0.12450754642486572", [1 / 3] = "0.3333333333333333" } do
        assert.equal(text, json.number(x, true))
      end
      assert.equal("6.0", json.number(6, true))
      assert.equal('{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [72, 104], "nested_blocksize": 256, "nested_dtype": "float32", '
        .. '"nested_offset": 0.12450754642486572}',
        quantized.state_text({ type = "nf4", block_size = 64, dtype = "bf16", shape = { 72, 104 }, double_quant = true }, 0.12450754642486572))
    end)
  end)

  it("raises once it is closed, and its tensors stay", function()
    local c = assert(checkpoint.open "spec/fixtures/models/llama")
    local e = c:find "model.norm.weight"
    local t = assert(loader.load(c, { { entry = e } }))[1]
    local before = files.bytes(t)
    c:close()
    c:close()
    collectgarbage()
    assert.equal(before, files.bytes(t))
    for _, use in ipairs { function() c:find "model.norm.weight" end, function() c:names() end, function() loader.load(c, { { entry = e } }) end,
                           function() loader.load(c, { { entry = e, dtype = "f16" } }) end } do
      local ok, message = pcall(use)
      assert.is_false(ok)
      assert.truthy(message:find("was closed", 1, true) and message:find("checkpoint_spec.lua", 1, true), message)
    end
    local w = assert(require("wane.checkpoint.writer").open(folder .. "/w.safetensors", {}))
    w:close()
    assert.has_error(function() w:finish() end)
  end)

  describe("folders that are broken", function()
    local function fails(path, words, code)
      local c, message, found = checkpoint.open(path)
      assert.is_nil(c)
      assert.truthy(message:find(words, 1, true), message)
      assert.equal(code, found)
    end
    local empty
    before_each(function() empty = files.folder() end)

    it("say what is missing", function()
      fails(empty, "has no config.json", "WANE_E_NOTFOUND")
      files.write(empty .. "/config.json", '{"model_type":"llama"}')
      fails(empty, "has none of model.safetensors", "WANE_E_NOTFOUND")
      files.write(empty .. "/pytorch_model.bin", "PK")
      fails(empty, "no end record of a zip archive", "WANE_E_FORMAT")
      fails(empty .. "/nothing", "No such file", "WANE_E_IO")
      fails("spec/fixtures/quant/blockwise8.safetensors", "without a config.json beside them", "WANE_E_NOTFOUND")
    end)

    it("say what is wrong with the config", function()
      for _, case in ipairs { { "", "is empty" }, { "{", "no valid JSON" }, { "[1", "no valid JSON" }, { "3", "an object was expected" },
                              { "version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer" } } do
        files.write(empty .. "/config.json", case[1])
        fails(empty, case[2], "WANE_E_FORMAT")
      end
      files.write(empty .. "/config.json", '{"quantization_config":{"quant_method":"gptq"}}')
      fails(empty, "gptq", "WANE_E_UNSUPPORTED")
    end)

    it("take weights by their own path when a config lies beside them", function()
      local c = assert(checkpoint.open "spec/fixtures/models/llama/model.safetensors")
      assert.equal("spec/fixtures/models/llama", c.folder)
      assert.has_error(function() checkpoint.open(7) end)
    end)
  end)
end)
