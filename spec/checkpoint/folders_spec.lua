-- Which files of a folder are read, which links are followed, how names are resolved, and what is said of tensors too few and too many.
local ffi = require "ffi"
local cjson = require "cjson"
local wane = require "wane"
local checkpoint = require "wane.checkpoint"
local F = require "wane.nn.functional"
local files = require "support.files"
local safetensors = require "support.safetensors"
local torch = require "support.torch"

local models = "spec/fixtures/models/"
local program = os.getenv "WANE_BIN" or "bin/wane"

describe("folders", function()
  local folder
  before_each(function() folder = files.folder() end)
  teardown(files.clean)

  local function write(name, text) return files.write(folder .. "/" .. name, text) end
  local function copy(from, name) return write(name or from:match "[^/]+$", files.read(models .. from)) end
  local function run(command, ...) assert(os.execute(command:format(...)) == 0) end
  -- A safetensors file with one tensor, by whose name the file is known.
  local function tiny(name) return files.safetensors(('{"%s":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'):format(name), "x") end
  local function list(shard, tensor) return ('{"weight_map":{"%s":"%s"}}'):format(tensor, shard) end
  local function first(path, opts)
    local c, message = checkpoint.open(path or folder, opts)
    return c and c:names()[1], message
  end
  local function refused(words, path)
    local c, message, code = checkpoint.open(path or folder)
    assert.is_nil(c)
    assert.truthy(message:find(words, 1, true), message)
    return code
  end

  describe("which weights", function()
    before_each(function() write("config.json", '{"model_type":"other"}') end)

    it("takes them in transformers' order", function()
      copy("bloom_bin/pytorch_model.bin")
      assert.equal("h.0.input_layernorm.bias", first())
      write("model.safetensors.index.json", list("s.safetensors", "sharded"))
      write("s.safetensors", tiny "sharded")
      assert.equal("sharded", first())
      write("model.safetensors", tiny "whole")
      assert.equal("whole", first())
      write("config.json", '{"transformers_weights":"s.safetensors"}')
      assert.equal("sharded", first())
    end)

    it("takes a variant when asked for one", function()
      write("model.safetensors", tiny "plain")
      write("model.fp16.safetensors", tiny "half")
      write("model.safetensors.index.8bit.json", list("m.safetensors", "listed"))
      write("m.safetensors", tiny "listed")
      assert.equal("plain", first())
      assert.equal("half", first(folder, { variant = "fp16" }))
      assert.equal("listed", first(folder, { variant = "8bit" }))
      local _, message = first(folder, { variant = "bf16" })
      assert.truthy(message:find("model.bf16.safetensors, model.safetensors.index.bf16.json, pytorch_model.bf16.bin", 1, true), message)
      assert.has_error(function() first(folder, { variant = "../x" }) end)
    end)

    it("takes the file that is named, beside its config.json", function()
      write("model.safetensors", tiny "plain")
      copy("bloom_bin/pytorch_model.bin")
      assert.equal("h.0.input_layernorm.bias", first(folder .. "/pytorch_model.bin"))
      write("other.safetensors", tiny "other")
      assert.equal("other", first(folder .. "/other.safetensors"))
    end)

    it("says what is missing, an adapter, a git-lfs pointer", function()
      assert.equal("WANE_E_NOTFOUND", refused "none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json")
      write("adapter_config.json", "{}")
      refused "an adapter"
      write("pytorch_model.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
      refused "git lfs pull"
      write("config.json", '{"transformers_weights":"../x.safetensors"}')
      assert.equal("WANE_E_FORMAT", refused "must be a file beside it")
    end)
  end)

  describe("lists of torch shards", function()
    before_each(function() write("config.json", '{"model_type":"other"}') end)
    local function torch_list(shard, tensor) write("pytorch_model.bin.index.json", list(shard, tensor or "h.0.input_layernorm.bias")) end

    it("take any names, as the list decides", function()
      copy("bloom_bin/pytorch_model.bin", "any name.bin")
      torch_list "any name.bin"
      assert.equal("h.0.input_layernorm.bias", first())
    end)

    it("refuse names that lead out of the folder", function()
      for _, name in ipairs { "../x.bin", "/etc/passwd", "a/b.bin", "..", "" } do
        torch_list(name)
        assert.equal("WANE_E_FORMAT", refused "must be files beside it")
      end
    end)

    it("name a shard that is missing, a tensor that its shard lacks, and shards of another kind", function()
      torch_list "1.bin"
      refused "1.bin': No such file"
      copy("bloom_bin/pytorch_model.bin", "1.bin")
      torch_list("1.bin", "lm_head.weight")
      refused "'lm_head.weight' should be in"
      write("1.bin", tiny "x")
      torch_list("1.bin", "x")
      refused "neither as a zip archive"
      copy("bloom_bin/pytorch_model.bin", "1.bin")
      copy("bloom_bin/pytorch_model.bin", "2.bin")
      write("pytorch_model.bin.index.json", '{"weight_map":{"h.0.input_layernorm.bias":"1.bin","h.1.input_layernorm.bias":"2.bin"}}')
      refused "occurs twice"
    end)
  end)

  describe("symbolic links", function()
    before_each(function() write("config.json", '{"model_type":"other"}') end)

    it("are followed within the folder and to its neighbours", function()
      write("real.safetensors", tiny "own")
      run("ln -s real.safetensors '%s/model.safetensors'", folder)
      assert.equal("own", first())
      local other = files.folder()
      files.write(other .. "/there.safetensors", tiny "neighbour")
      run("ln -sf '%s/there.safetensors' '%s/model.safetensors'", other, folder)
      assert.equal("neighbour", first())
    end)

    it("are followed from a snapshot of the Hugging Face cache to its blobs", function()
      local repository = folder .. "/models--a--b"
      run("mkdir -p '%s/snapshots/abc' '%s/blobs'", repository, repository)
      files.write(repository .. "/blobs/1", '{"model_type":"other"}')
      files.write(repository .. "/blobs/2", list("s1.safetensors", "cached"))
      files.write(repository .. "/blobs/3", tiny "cached")
      for blob, name in ipairs { "config.json", "model.safetensors.index.json", "s1.safetensors" } do
        run("ln -s ../../blobs/%d '%s/snapshots/abc/%s'", blob, repository, name)
      end
      assert.equal("cached", first(repository .. "/snapshots/abc"))
      run("ln -s '%s/snapshots/abc' '%s/link'", repository, folder)         -- a link to the folder itself is the user's own
      assert.equal("cached", first(folder .. "/link"))
    end)

    for _, case in ipairs { { "weights", "model.safetensors" }, { "a shard", "s.safetensors" }, { "a list", "model.safetensors.index.json" },
                            { "a config", "config.json" } } do
      it("are refused where they lead out: " .. case[1], function()
        local inner = folder .. "/a/b/model"
        run("mkdir -p '%s' '%s/elsewhere'", inner, folder)
        local content = { ["model.safetensors"] = tiny "x", ["s.safetensors"] = tiny "x", ["model.safetensors.index.json"] = list("s.safetensors", "x"),
                          ["config.json"] = '{"model_type":"other"}' }
        files.write(inner .. "/config.json", content["config.json"])
        if case[2] ~= "model.safetensors" then
          files.write(inner .. "/model.safetensors.index.json", content["model.safetensors.index.json"])
          files.write(inner .. "/s.safetensors", content["s.safetensors"])
        end
        files.write(folder .. "/elsewhere/secret", content[case[2]])
        run("ln -sf '%s/elsewhere/secret' '%s/%s'", folder, inner, case[2])
        assert.equal("WANE_E_FORMAT", refused("outside of the model's folder", inner))
      end)
    end
  end)

  -- Logits of input_ids against a model's golden ones; the largest difference.
  local function distance(model, name)
    local expected = safetensors.read(models .. name .. "/expected.safetensors")
    local ids, want = {}, expected.logits
    local time = expected.input_ids.shape[2]
    for b = 1, expected.input_ids.shape[1] do
      ids[b] = {}
      for t = 1, time do ids[b][t] = tonumber(expected.input_ids.data[(b - 1) * time + t - 1]) end
    end
    local got, n = F.read(model:forward(ids), "float")
    assert.equal(want.numel, n)
    local worst = 0
    for i = 0, n - 1 do
      local d = math.abs(got[i] - want.data[i])
      if not (d <= worst) then worst = d end
    end
    return worst
  end

  describe("models", function()
    for _, name in ipairs { "bloom_bin", "bloom_legacy_bin", "bloom_sharded_bin", "bloom_sharded", "bloom_bf16", "gpt_neox_bin", "gpt_neox_sharded",
                            "opt_bin", "opt_sharded" } do
      it(name .. " gives transformers' logits; nothing is missing or left over", function()
        for _, io_mode in ipairs { "mmap", "read" } do
          local model = assert(wane.load(models .. name, { tokenizer = false, compute = "f32", io = io_mode }))
          local worst = distance(model, (name:gsub("_bin$", ""):gsub("_legacy$", ""):gsub("_sharded$", ""):gsub("_bf16$", "")))
          print(("  %s, %s: logits, largest difference %.2g"):format(name, io_mode, worst))
          assert.is_true(worst <= 2e-4)
          assert.same({ missing = {}, unexpected = {} }, model.report)
          model:close()
        end
      end)
    end

    -- GPT-2 stores [in, out]; a file of its transposed views is [out, in] in memory with the strides turned.
    it("gpt2 in transposed views and in f64 gives transformers' logits", function()
      local tensors = assert(checkpoint.read_safetensors(models .. "gpt2/model.safetensors"))
      for _, class in ipairs { "FloatStorage", "DoubleStorage" } do
        local entries, blobs, at = {}, {}, 0
        for name, values in pairs(tensors) do
          local shape = values:shape()
          if #shape == 2 then values = values:t():contiguous() end
          local x, n = files.floats(values)
          local y = ffi.new(class == "FloatStorage" and "float[?]" or "double[?]", n)
          for k = 0, n - 1 do y[k] = x[k] end
          entries[#entries + 1], blobs[#blobs + 1] = { name = name, shape = shape, offset = at }, ffi.string(y, ffi.sizeof(y))
          at = at + n
        end
        write("pytorch_model.bin", torch.archive(class, entries, table.concat(blobs), at))
        copy "gpt2/config.json"
        local c, out = assert(checkpoint.open(folder)), files.folder()
        assert(checkpoint.write_quantized(out, { checkpoint = c, scheme = { type = "nf4" } }))
        local plain = assert(checkpoint.read_safetensors(out .. "/model.safetensors"))["transformer.wte.weight"]
        assert.is_true(files.bytes(tensors["transformer.wte.weight"]) == files.bytes(plain))
        local model = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
        assert.is_true(distance(model, "gpt2") <= 2e-4)
        model:close()
      end
    end)

    it("gpt_neox_bin quantizes to the bytes of the safetensors folder", function()
      local a = assert(wane.load(models .. "gpt_neox_bin", { tokenizer = false, quant = { type = "nf4", double_quant = true } }))
      local b = assert(wane.load(models .. "gpt_neox", { tokenizer = false, quant = { type = "nf4", double_quant = true } }))
      for i, l in ipairs(a:linears()) do
        local other = b:linears()[i][2].weight
        if l[2].weight:dtype() == "nf4" then
          local parts = files.parts(other)
          for part, bytes in pairs(files.parts(l[2].weight)) do assert.is_true(bytes == parts[part]) end
        end
      end
    end)

    -- gpt_neox under other names.
    local function renamed(rename, change)
      local tensors = assert(checkpoint.read_safetensors(models .. "gpt_neox/model.safetensors"))
      local other = {}
      for name, t in pairs(tensors) do other[rename(name)] = t end
      if change then change(other) end
      assert(checkpoint.write_safetensors(folder .. "/model.safetensors", other, { format = "pt" }))
      copy "gpt_neox/config.json"
    end

    for _, case in ipairs {
      { "without the base model's prefix", function(n) return (n:gsub("^gpt_neox%.", "")) end },
      { "in a wrapper's module.", function(n) return "module." .. n end },
      { "in a wrapper's module., without the prefix", function(n) return "module." .. n:gsub("^gpt_neox%.", "") end },
      { "with the head called lm_head", function(n) return (n:gsub("^embed_out", "lm_head")) end },
    } do
      it("are found " .. case[1], function()
        renamed(case[2])
        local model = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
        assert.is_true(distance(model, "gpt_neox") <= 2e-4)
        assert.same({ missing = {}, unexpected = {} }, model.report)
        model:close()
      end)
    end

    local layer = "gpt_neox.layers.1."
    local function incomplete(t)
      t[layer .. "input_layernorm.weight"], t[layer .. "mlp.dense_h_to_4h.weight"], t[layer .. "mlp.dense_h_to_4h.bias"] = nil, nil, nil
      t["score.weight"] = files.tensor("f32", { 1 }, "\0\0\0\0")
      t[layer .. "attention.masked_bias"] = files.tensor("f32", {}, "\0\0\0\0")
    end

    it("with missing weights are refused by name, unless told otherwise", function()
      renamed(function(n) return n end, incomplete)
      local model, message, code = wane.load(folder, { tokenizer = false })
      assert.is_nil(model)
      assert.equal("WANE_E_FORMAT", code)
      assert.truthy(message:find("3 tensor(s) of the model are missing: " .. layer .. "input_layernorm.weight", 1, true), message)
      assert.truthy(message:find('missing = "allow"', 1, true), message)
      assert.has_error(function() wane.load(folder, { missing = true }) end)
    end)

    it("with missing weights get new ones on request, and report both sides", function()
      renamed(function(n) return n end, incomplete)
      for _, quant in ipairs { "none", "nf4", "int8" } do
        local model = assert(wane.load(folder, { tokenizer = false, compute = "f32", missing = "allow", quant = quant }))
        assert.same({ layer .. "input_layernorm.weight", layer .. "mlp.dense_h_to_4h.weight", layer .. "mlp.dense_h_to_4h.bias" }, model.report.missing)
        assert.same({ "score.weight" }, model.report.unexpected)
        local norm, linear = model:find(layer .. "input_layernorm"), model:find(layer .. "mlp.dense_h_to_4h")
        local one = files.floats(norm.weight)
        assert.equal(1, one[0])
        assert.equal(0, files.floats(linear.bias)[3])
        assert.equal(quant == "none" and "f32" or quant, linear.weight:dtype())
        local values = quant == "none" and linear.weight or linear.weight:dequantize "f32"
        local std = math.sqrt(values:to("f32"):var():item())
        assert.is_true(std > 0.015 and std < 0.025, std)                  -- initializer_range 0.02
        assert.is_true(distance(model, "gpt_neox") > 1e-3)
        model:close()
      end
    end)

    it("the commands name unused tensors on stderr and nowhere else", function()
      renamed(function(n) return n end, function(t) t["score.weight"] = files.tensor("f32", { 1 }, "\0\0\0\0") end)
      local pipe = assert(io.popen(("%s generate --model '%s' --prompt-ids 1,2,3 --json 2>'%s/err'"):format(program, folder, folder)))
      local out = pipe:read "*a"
      pipe:close()
      assert.equal(20, #cjson.decode(out).ids)
      assert.truthy(files.read(folder .. "/err"):find("1 tensor(s) that the model has no use for: score.weight", 1, true))
    end)
  end)
end)
