-- Writing folders: model:save, rules for mixed precision, errors as upstream's, memory while writing, runs that were killed.
local cjson = require "cjson"
local core = require "wane.core"
local checkpoint = require "wane.checkpoint"
local F = require "wane.nn.functional"
local files = require "support.files"
local json = require "wane.checkpoint.json"
local loader = require "wane.loader"
local paths = require "wane.checkpoint.paths"
local quantize = require "wane.checkpoint.quantize"
local rules = require "wane.quant.rules"
local sparse = require "support.sparse"
local wane = require "wane"

local models = "spec/fixtures/models/"
local golden = "spec/fixtures/quant/checkpoints/"
local program = os.getenv "WANE_BIN" or "bin/wane"
local folder

-- Bytes of every tensor of a folder by its name in the file.
local function contents(dir)
  local ix = assert(require("wane.checkpoint.index").open(paths.is_file(dir .. "/model.safetensors") and dir .. "/model.safetensors"
    or dir .. "/model.safetensors.index.json"))
  local out = {}
  for i = 0, ix:count() - 1 do
    local e = ix:entry(i)
    out[e.name] = e.file_dtype .. table.concat(e.shape, "x") .. ":" .. assert(ix:bytes(e))
  end
  ix:close()
  return out
end

local function logits(model, ids)
  local values, n = F.read(model:forward(ids), "float")
  return require("ffi").string(values, n * 4)
end

describe("folders that are written", function()
  before_each(function() folder = files.folder() end)
  teardown(files.clean)

  -- ---------------------------------------------------------------- model:save

  describe("by model:save", function()
    for _, name in ipairs(paths.list(models)) do
      if paths.is_file(models .. name .. "/model.safetensors") and require("wane.models").find(json.read(models .. name .. "/config.json")) then
        it("hold the same bytes as upstream's: " .. name, function()
          local model = assert(wane.load(models .. name, { tokenizer = false }))
          assert(model:save(folder))
          local ours, theirs = contents(folder), contents(models .. name)
          for key, bytes in pairs(theirs) do assert.is_true(ours[key] == bytes, key) end
          for key in pairs(ours) do assert.is_truthy(theirs[key], key) end
          assert.equal(files.read(models .. name .. "/config.json"), files.read(folder .. "/config.json"))
          model:close()
        end)
      end
    end

    for _, name in ipairs { "llama/nf4-dq-bf16", "llama/fp4-f32", "llama/int8", "gpt_neox/nf4-dq-bf16", "gpt_neox/int8" } do
      it("hold bitsandbytes' bytes where the model is quantized: " .. name, function()
        local model = assert(wane.load(golden .. name, { tokenizer = false }))
        assert(model:save(folder))
        assert.is_true(files.read(golden .. name .. "/model.safetensors") == files.read(folder .. "/model.safetensors"))
        local a, b = json.read(golden .. name .. "/config.json"), json.read(folder .. "/config.json")
        a.quantization_config.llm_int8_skip_modules, b.quantization_config.llm_int8_skip_modules = nil, nil
        assert.same(a, b)
        model:close()
      end)
    end

    it("give the same logits after convert, shards and another dtype included; a tied head is written once", function()
      local ids = { { 5, 9, 60, 33, 2 } }
      local model = assert(wane.load(models .. "llama3", { tokenizer = false, compute = "f32" }))
      wane.quant.convert(model, { type = "nf4", double_quant = true, rules = { { "*.0.mlp.*", "int8" } } })
      local before = logits(model, ids)
      local result = assert(model:save(folder .. "/q", { max_shard_bytes = 30000 }))
      assert.is_true(result.shards > 1)
      assert.matches("4%-bit and int8", result.upstream)
      local back = assert(wane.load(folder .. "/q", { tokenizer = false, compute = "f32" }))
      assert.equal("int8", back:find("model.layers.0.mlp.up_proj").weight:dtype())
      assert.is_true(before == logits(back, ids))
      back:close()
      model:close()

      model = assert(wane.load("spec/fixtures/gguf/llama-f16.gguf", { tokenizer = false, compute = "f32" }))
      model:find("lm_head").weight = model:find("model.embed_tokens").weight
      assert(model:save(folder .. "/g", { dtype = "f32" }))
      assert.is_nil(contents(folder .. "/g")["lm_head.weight"])
      assert.equal("float32", json.read(folder .. "/g/config.json").torch_dtype)
    end)

    it("may be the model's own", function()
      os.execute(("cp %sllama3/* %s/"):format(models, folder))
      local model = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
      wane.quant.convert(model, "int8")
      local before = logits(model, { { 1, 2, 3 } })
      assert(model:save(folder))
      assert.is_true(before == logits(model, { { 1, 2, 3 } }))             -- what it had mapped is still there
      local back = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
      assert.is_true(before == logits(back, { { 1, 2, 3 } }))
    end)

    it("are not written for mistakes", function()
      local model = assert(wane.load(models .. "llama3", { tokenizer = false }))
      for _, use in ipairs { function() model:save() end, function() model:save(folder, { type = "f16" }) end,
                             function() model:save(folder, { dtype = "int8" }) end } do
        assert.is_false((pcall(use)))
      end
      local ok, message, code = model:save "/proc/no/such"
      assert.is_nil(ok)
      assert.equal("WANE_E_IO", code)
      assert.matches("cannot make the directory", message)
    end)
  end)

  -- ---------------------------------------------------------------- rules

  describe("with rules", function()
    it("match globs over whole paths, the first one wins", function()
      local function matches(glob, path) return path:find(assert(rules.pattern(glob))) ~= nil end
      for _, case in ipairs { { "*.mlp.*", "model.layers.0.mlp.up_proj", true }, { "mlp", "model.layers.0.mlp", false }, { "lm_head", "lm_head", true },
                              { "lm.head", "lm_head", false }, { "*.[0-3].*", "model.layers.2.mlp", true }, { "*.[!0-3].*", "model.layers.2.mlp", false },
                              { "*.layers.?.*", "model.layers.12.mlp", false }, { "*a-b%*", "xa-b%c", true } } do
        assert.equal(case[3], matches(case[1], case[2]), case[1])
      end
      assert.is_nil((rules.pattern "*.[0"))
      local scheme = require("wane.load").scheme { type = "nf4", block_size = 128,
        rules = { { "*.up_proj", "none" }, { "*.mlp.*", { type = "fp4" } }, { "*", "int8" } } }
      local at = require("wane.load").scheme_at
      assert.is_nil(at("model.layers.0.mlp.up_proj", scheme, {}))
      assert.same({ "fp4", 128 }, { at("model.layers.0.mlp.down_proj", scheme, {}).type, at("model.layers.0.mlp.down_proj", scheme, {}).block_size })
      assert.equal("int8", at("lm_head", scheme, { "lm_head" }).type)                       -- a rule comes before the skip list
    end)

    it("are read from a file; mistakes are told with their line", function()
      local path = files.write(folder .. "/rules", "# a comment\n\n*.0.*  none # another\n*.down_proj nf4 block_size=128 double_quant=true\n")
      assert.same({ { "*.0.*", { type = "none" } }, { "*.down_proj", { type = "nf4", block_size = 128, double_quant = true } } }, (rules.read(path)))
      for text, words in pairs { ["x"] = "line 1: expected: PATTERN", ["\nx q8"] = "line 2: 'q8' is no scheme", ["x nf4 size=3"] = "'size=3' is no option",
                                 ["x nf4 block_size=y"] = "no valid value" } do
        local list, message, code = rules.read(files.write(path, text))
        assert.is_nil(list)
        assert.equal("WANE_E_FORMAT", code)
        assert.truthy(message:find(words, 1, true), message)
      end
      assert.equal("WANE_E_IO", select(3, rules.read(folder .. "/none")))
      for _, bad in ipairs { 7, { { "x" } }, { { "x", "q8" } }, { { "x", { type = "nf4", size = 3 } } }, { { "[", "nf4" } } } do
        assert.is_false((pcall(wane.load, models .. "llama3", { quant = { type = "nf4", rules = bad } })))
      end
    end)

    it("give the same model loaded, converted and written", function()
      local quant = { rules = { { "*.layers.0.*", "none" }, { "*.down_proj", { type = "nf4", block_size = 128, double_quant = true } },
                                { "*.self_attn.[qk]_proj", "fp4" }, { "lm_head", "nf4" } } }
      local ids = { { 5, 9, 60, 33, 2 } }
      local loaded = assert(wane.load(models .. "llama3", { tokenizer = false, compute = "f32", quant = quant }))
      local converted = assert(wane.load(models .. "llama3", { tokenizer = false, compute = "f32" }))
      assert.equal(4, wane.quant.convert(converted, quant))
      assert(checkpoint.write_quantized(folder, { checkpoint = assert(checkpoint.open(models .. "llama3")), scheme = quant }))
      local written = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
      local want = logits(loaded, ids)
      assert.is_true(want == logits(converted, ids))
      assert.is_true(want == logits(written, ids))
      assert.same({ "f16", "nf4", "fp4", "nf4", "f16" }, { written:find("model.layers.0.mlp.down_proj").weight:dtype(),
        written:find("model.layers.1.mlp.down_proj").weight:dtype(), written:find("model.layers.1.self_attn.q_proj").weight:dtype(),
        written:find("lm_head").weight:dtype(), written:find("model.layers.1.mlp.up_proj").weight:dtype() })
      local q = json.read(folder .. "/config.json").quantization_config
      local skip = {}
      for _, path in ipairs(q.llm_int8_skip_modules) do skip[path] = true end
      assert.is_true(skip["model.layers.0.mlp.down_proj"] and skip["model.layers.1.mlp.up_proj"])
      assert.is_nil(skip.lm_head)
      assert.is_true(q.load_in_4bit)
    end)

    it("that match no layer are told", function()
      local result = assert(checkpoint.write_quantized(folder, { checkpoint = assert(checkpoint.open(models .. "llama3")),
        scheme = { type = "nf4", rules = { { "*.down", "int8" }, { "*.up_proj", "fp4" }, { "*.layers.0.mlp.up_proj", "none" } } } }))
      assert.same({ "*.down" }, result.unused)                 -- the last one matches, though the one before it decides
    end)

    it("and skip lists that match no layer are told by a load too", function()
      local model = assert(wane.load(models .. "llama3", { tokenizer = false,
        quant = { type = "nf4", skip = { "lm_head", "no_such" }, rules = { { "*.down", "int8" }, { "*.up_proj", "fp4" } } } }))
      assert.same({ "quant.skip: 'no_such' matches no layer", "quant.rules: '*.down' matches no layer" }, model.warnings)
      model:close()
    end)

    it("that mix int8 and 4-bit make a folder that transformers refuses and wane reads", function()
      local result = assert(checkpoint.write_quantized(folder, { checkpoint = assert(checkpoint.open(models .. "llama3")),
        scheme = { type = "nf4", rules = { { "*.mlp.*", { type = "int8", threshold = 4 } } } } }))
      assert.matches("transformers knows", result.upstream)
      local config = json.read(folder .. "/config.json").quantization_config
      assert.is_nil(config.quant_method or config.load_in_4bit or config.load_in_8bit)
      local back = assert(wane.load(folder, { tokenizer = false }))
      assert.equal("int8", back:find("model.layers.0.mlp.up_proj").weight:dtype())
      assert.equal("nf4", back:find("model.layers.0.self_attn.q_proj").weight:dtype())
    end)

    it("that quantize what transformers never does say so", function()
      local c = assert(checkpoint.open(models .. "t5"))
      assert.is_nil(assert(checkpoint.write_quantized(folder, { checkpoint = c, scheme = { type = "nf4" } })).upstream)
      local result = assert(checkpoint.write_quantized(folder, { checkpoint = c, scheme = { type = "nf4", rules = { { "*.wo", "nf4" } } } }))
      assert.matches("wo', which transformers never does", result.upstream)
      local mixtral = assert(checkpoint.open(models .. "mixtral"))
      local function of(...)
        return assert(checkpoint.write_quantized(folder, { checkpoint = mixtral, scheme = { type = "nf4", rules = { ... } } })).upstream
      end
      assert.matches("experts or their router", of())
      assert.matches("experts or their router", of { "*.experts.*", "none" })
      assert.is_nil(of({ "*.experts.*", "none" }, { "*.gate", "none" }))
    end)

    it("name exceptions by whole path in the skip list, the rest as the caller does", function()
      local nf4 = { type = "nf4" }
      assert.same({ "lm_head" }, quantize.skip_list({ ["m.0.up"] = nf4, ["m.1.up"] = nf4, lm_head = false }, { "lm_head" }))
      assert.same({ "lm_head", "m.1.up" }, quantize.skip_list({ ["m.0.up"] = nf4, ["m.1.up"] = false, lm_head = false }, { "lm_head" }))
      assert.same({ "lm_head", "m.1.up" }, quantize.skip_list({ ["m.0.up"] = nf4, ["m.1.up"] = false, lm_head = false }, { "up", "lm_head" }))
      assert.same({}, quantize.skip_list({ lm_head = nf4 }, { "lm_head" }))
    end)
  end)

  -- ---------------------------------------------------------------- what loading them costs

  for _, scheme in ipairs { { type = "nf4" }, { type = "nf4", double_quant = true }, { type = "fp4" }, { type = "int8" }, { type = "int8-blockwise" } } do
    it(("are mapped and computed from as they lie: %s%s"):format(scheme.type, scheme.double_quant and ", nested" or ""), function()
      assert(os.execute("mkdir " .. folder .. "/source") == 0)
      sparse.llama(folder .. "/source", { layers = 2, hidden = 512, intermediate = 1024, vocabulary = 100 })
      assert(checkpoint.write_quantized(folder, { checkpoint = assert(checkpoint.open(folder .. "/source")), scheme = scheme }))
      local c = assert(checkpoint.open(folder))
      local requests, bytes = {}, 0
      for _, name in ipairs(c:names()) do
        local e = c:find(name)
        if e.quant then requests[#requests + 1], bytes = { entry = e }, bytes + e.bytes end
      end
      collectgarbage() collectgarbage()
      local before = wane.memory()
      local tensors = assert(loader.load(c, requests))
      local now = wane.memory()
      print(("  %s: %d bytes of quantized weights loaded, heap grew by %d"):format(scheme.type, bytes, now.heap - before.heap))
      assert.equal(14, #tensors)
      assert.is_true(now.heap - before.heap < 0.01 * bytes)          -- the scales alone are 11 % of nf4
      for _, t in ipairs(tensors) do t:close() end
    end)
  end

  -- ---------------------------------------------------------------- errors

  it("have the errors that numpy measures: every case of errors.json", function()
    local expected = cjson.decode(files.read(golden .. "errors.json")).layers
    local ways = { ["nf4"] = { type = "nf4" }, ["nf4-dq"] = { type = "nf4", double_quant = true }, ["fp4"] = { type = "fp4" },
                   ["fp4-dq"] = { type = "fp4", double_quant = true }, ["int8-blockwise-256"] = { type = "int8-blockwise", block_size = 256 },
                   ["int8-blockwise-4096"] = { type = "int8-blockwise", block_size = 4096 }, ["int8-rowwise"] = { type = "int8" } }
    local worst, count, sources = 0, 0, {}
    for path, by_way in pairs(expected) do
      local model, layer = path:match "^([^/]+)/(.*)$"
      if paths.is_folder(golden .. model .. "/source") then
        sources[model] = sources[model] or assert(checkpoint.read_safetensors(golden .. model .. "/source/model.safetensors"))
        local w = sources[model][layer .. ".weight"]
        assert.is_truthy(w, path)
        for way, want in pairs(by_way) do
          local q = wane.quant.quantize(w, assert(ways[way], way))
          local got = wane.quant.error(w, q)
          for key, value in pairs(want) do
            local off = math.abs(got[key] - value) / value
            worst, count = math.max(worst, off), count + 1
            assert.is_true(off < (way:find "dq" and 1e-4 or 1e-5), ("%s %s %s: %.9g, expected %.9g"):format(path, way, key, got[key], value))
          end
          q:close()
        end
      end
    end
    print(("  %d figures, largest relative difference %.2g"):format(count, worst))
    assert.is_true(count >= 300)
  end)

  it("hold large tensors that stay as they are, or widen, or leave their GGUF blocks: the same values as loading them", function()
    local rows, cols = 5003, 1024                        -- more than a piece of 8 MiB, and no whole number of pieces
    local x = wane.randn { rows, cols, dtype = "f16", seed = 3 }
    assert(checkpoint.write_safetensors(folder .. "/model.safetensors", { ["model.embed_tokens.weight"] = x }))
    files.write(folder .. "/config.json", '{"model_type": "llama"}')
    local r, random = files.random(7), {}
    for i = 1, 34 * 997 do random[i] = string.char(i % 34 == 2 and 0x20 + r(8) or r(256)) end     -- scales are small and finite
    local blocks = table.concat(random):rep(math.ceil(rows * cols / 32 / 997)):sub(1, rows * cols / 32 * 34)
    files.write(folder .. "/q.gguf", files.gguf({ files.gguf_pair("general.architecture", 8, files.gguf_string "llama") },
      { { "token_embd.weight", { cols, rows }, 8, 0 } }, blocks))
    for _, case in ipairs { { folder, nil, "f16" }, { folder, "f32", "f32" }, { folder, "bf16", "bf16" }, { folder .. "/q.gguf", nil, "f32" },
                            { folder .. "/q.gguf", "bf16", "bf16" } } do
      local c = assert(checkpoint.open(case[1]))
      local out = folder .. "/out-" .. tostring(case[2]) .. #case[1]
      assert(checkpoint.write_quantized(out, { checkpoint = c, scheme = { type = "nf4" }, dtype = case[2], select = function() return false end }))
      local want = assert(loader.load(c, { { entry = c:find "model.embed_tokens.weight", dtype = case[3] } }))[1]
      local got = assert(checkpoint.read_safetensors(out .. "/model.safetensors"))["model.embed_tokens.weight"]
      assert.equal(case[3], got:dtype())
      assert.is_true(files.bytes(want) == files.bytes(got), case[1] .. " as " .. case[3])
      want:close()
      got:close()
    end
    x:close()
  end)

  -- ---------------------------------------------------------------- memory and killed runs

  local function quantize_command(source, out, more)
    return ("%s quantize --model %s --quant nf4 --double-quant --out %s --json %s"):format(program, source, out, more or "")
  end

  local function run(command)
    local pipe = io.popen(command .. " 2>&1; echo \"status $?\"")
    local text = pipe:read "*a"
    pipe:close()
    return text:match "^(.*)status (%d+)\n$"
  end

  it("take no more memory than a few tensors, however large the model", function()
    if os.getenv "WANE_SANITIZER" then return pending "sanitizers have memory of their own" end
    local large = os.getenv "WANE_LARGE" == "1"
    local disk = large and (os.tmpname() .. ".large") or folder
    assert(os.execute("mkdir -p " .. disk .. "/source") == 0)
    local bytes = sparse.llama(disk .. "/source", large and { layers = 28, hidden = 4096, intermediate = 11008, vocabulary = 32000 }
      or { layers = 4, hidden = 2048, intermediate = 5632, vocabulary = 16000 })
    local text, status = run(quantize_command(disk .. "/source", disk .. "/out", "--max-shard-size 2GB"))
    os.execute("rm -rf " .. disk)
    assert.equal("0", status, text)
    local report = cjson.decode(text)
    print(("  %.2f GB to %.2f GB in %.1f s, peak memory %.0f MB"):format(bytes / 1e9, report.out_bytes / 1e9, report.seconds, report.peak_rss_bytes / 1e6))
    assert.equal(bytes, report.in_bytes)
    assert.is_true(report.peak_rss_bytes < (large and 500e6 or 150e6))
  end)

  describe("by a run that was killed", function()
    local source, whole

    setup(function()
      local dir = files.folder()
      source = dir .. "/source"
      assert(os.execute("mkdir " .. source) == 0)
      sparse.llama(source, { layers = 8, hidden = 256, intermediate = 512, vocabulary = 1000 })
      assert.equal("0", select(2, run(quantize_command(source, dir .. "/whole", "--max-shard-size 500K"))))
      whole = contents(dir .. "/whole")
    end)

    -- Starts the command and kills it once `when` holds of the folder; false if it was over before.
    local function killed(out, when)
      local pid = tonumber((run(("sh -c '%s >/dev/null 2>&1 & echo $!'"):format(quantize_command(source, out, "--max-shard-size 500K")))))
      local began = core.C.wane_clock()
      while core.C.wane_clock() - began < 30 do
        if when(out) then break end
        if not paths.is_folder("/proc/" .. pid) then return false end
      end
      os.execute("kill -9 " .. pid .. " 2>/dev/null; while kill -0 " .. pid .. " 2>/dev/null; do :; done")
      return true
    end

    local function shards(out)
      local n = 0
      for _, name in ipairs(paths.list(out .. "/.unfinished")) do if name:find "^model" then n = n + 1 end end
      return n
    end

    for _, moment in ipairs { { "before the first shard", function(out) return paths.is_file(out .. "/.unfinished/plan.json") end },
                              { "after the first shard", function(out) return shards(out) >= 1 end },
                              { "after the third shard", function(out) return shards(out) >= 3 end },
                              { "while it takes the old one's place", function(out) return paths.is_file(out .. "/.unfinished/complete") end } } do
      it("in a new folder are refused and finished by the same command: " .. moment[1], function()
        local out = folder .. "/out"
        local was_killed = killed(out, moment[2])
        local finished = paths.is_file(out .. "/config.json")
        if was_killed and not finished then
          local c, message, code = checkpoint.open(out)
          assert.is_nil(c)
          assert.equal("WANE_E_FORMAT", code)
          assert.matches("is the unfinished result of wane quantize: run it again to resume", message)
        end
        local kept = shards(out)
        local text, status = run(quantize_command(source, out, "--max-shard-size 500K"))
        assert.equal("0", status, text)
        text = text:match "{.*}"
        assert.is_true(cjson.decode(text).resumed >= kept)
        local got = contents(out)
        for key, bytes in pairs(whole) do assert.is_true(got[key] == bytes, key) end
        for key in pairs(got) do assert.is_truthy(whole[key], key) end
        assert.is_false(paths.is_folder(out .. "/.unfinished"))
      end)
    end

    it("are told apart from folders without a model even where the plan was not down yet", function()
      assert(core.C.wane_path_make(folder .. "/.unfinished") >= 0)
      local c, message, code = checkpoint.open(folder)
      assert.is_nil(c)
      assert.equal("WANE_E_FORMAT", code)
      assert.matches("is the unfinished result of a writer: run it again to resume", message)
    end)

    it("leave the old folder as it was", function()
      local out = folder .. "/out"
      assert.equal("0", select(2, run(("%s quantize --model %sllama3 --quant int8 --out %s"):format(program, models, out))))
      local old = files.read(out .. "/model.safetensors")
      killed(out, function() return shards(out) >= 1 end)
      if paths.is_folder(out .. "/.unfinished") and not paths.is_file(out .. "/.unfinished/complete") then
        assert.is_true(old == files.read(out .. "/model.safetensors"))
        assert.equal("int8", assert(checkpoint.open(out)):find("model.layers.0.mlp.up_proj.weight").quant.type)
      end
      assert.equal("0", select(2, run(quantize_command(source, out, "--max-shard-size 500K"))))
      assert.is_false(paths.is_file(out .. "/model.safetensors"))              -- the old one's single file
      for key, bytes in pairs(contents(out)) do assert.is_true(whole[key] == bytes, key) end
    end)

    it("while the old model goes are refused, and finished by renaming", function()
      local out = folder .. "/out"
      local old, new = assert(checkpoint.open(models .. "llama3")), assert(checkpoint.open(source))
      assert(checkpoint.write_quantized(out, { checkpoint = old, scheme = { type = "int8" } }))
      local rename, calls = os.rename, 0
      os.rename = function(...)                                -- luacheck: ignore 122
        calls = calls + 1
        if calls > 2 then return nil, "killed" end
        return rename(...)
      end
      local ok, message = checkpoint.write_quantized(out, { checkpoint = new, scheme = { type = "nf4", double_quant = true }, max_shard_bytes = 500000 })
      os.rename = rename                                       -- luacheck: ignore 122
      assert.is_nil(ok)
      assert.matches("killed", message)
      assert.matches("unfinished result of wane quantize", (select(2, checkpoint.open(out))))
      local result = assert(checkpoint.write_quantized(out, { checkpoint = new, scheme = { type = "nf4", double_quant = true }, max_shard_bytes = 500000 }))
      assert.equal(result.shards, result.resumed)
      for key, bytes in pairs(contents(out)) do assert.is_true(whole[key] == bytes, key) end
    end)

    it("are written anew by another command, and damaged shards are not taken", function()
      local out = folder .. "/out"
      if not killed(out, function() return shards(out) >= 2 end) then return pending "the machine is too quick" end
      local first = table.concat(paths.list(out .. "/.unfinished"), " "):match "model%-00001[^ ]+"
      os.execute(("truncate -s -1 '%s/.unfinished/%s'"):format(out, first))
      local kept = shards(out)
      local text = run(quantize_command(source, out, "--max-shard-size 500K"))
      assert.equal(kept - 1, cjson.decode(text:match "{.*}").resumed)
      for key, bytes in pairs(contents(out)) do assert.is_true(whole[key] == bytes, key) end

      out = folder .. "/other"
      killed(out, function() return shards(out) >= 2 end)
      text = run(("%s quantize --model %s --quant int8 --out %s --json --max-shard-size 500K"):format(program, source, out))
      assert.equal(0, cjson.decode(text:match "{.*}").resumed)
      assert.equal("int8", assert(checkpoint.open(out)):find("model.layers.0.mlp.up_proj.weight").quant.type)
      assert.is_false(paths.is_folder(out .. "/.unfinished"))
    end)

    it("by a full disk say so, and go on once there is room", function()
      local disk = folder .. "/disk"
      assert(os.execute("mkdir " .. disk) == 0)
      if os.execute(("mount -t tmpfs -o size=2m none %s 2>/dev/null"):format(disk)) ~= 0 then return pending "needs the right to mount" end
      local text, status = run(quantize_command(source, disk .. "/out", "--max-shard-size 500K"))
      local message = checkpoint.open(disk .. "/out") or select(2, checkpoint.open(disk .. "/out"))
      os.execute(("mount -o remount,size=64m %s"):format(disk))
      local again, second = run(quantize_command(source, disk .. "/out", "--max-shard-size 500K"))
      local got = second == "0" and contents(disk .. "/out")
      os.execute("umount " .. disk)
      assert.equal("1", status)
      assert.matches("No space left on device", text)
      assert.matches("unfinished result", message)
      assert.equal("0", second, again)
      assert.is_true(cjson.decode(again:match "{.*}").resumed > 0)
      for key, bytes in pairs(whole) do assert.is_true(got[key] == bytes, key) end
    end)
  end)
end)
