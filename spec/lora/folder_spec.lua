-- Adapter folders: what wane.load makes of them, keys as PEFT spells them in files and in memory, every refusal, 10,000 damaged ones.
local ffi = require "ffi"
local cjson = require "cjson"
local F = require "wane.nn.functional"
local wane = require "wane"
local files = require "support.files"
local mutate = require "support.mutate"
local lora = wane.lora

local root = "spec/fixtures/train/"
local IDS = { { 5, 6, 7, 8, 20, 21 } }

local function bits(model)
  local values, n = F.read(model:forward(IDS), "float")
  return ffi.string(values, n * 4)
end

local function load(path, o)
  o = o or {}
  o.tokenizer, o.compute = false, "f32"
  return wane.load(path, o)
end

-- A copy of an adapter's folder: its config's text and its tensors may be changed first.
local function copy(name, edit_config, edit_tensors)
  local dir = files.folder()
  local text = files.read(root .. "lora/" .. name .. "/adapter_config.json")
  files.write(dir .. "/adapter_config.json", edit_config and edit_config(text) or text)
  local tensors = assert(wane.checkpoint.read_safetensors(root .. "lora/" .. name .. "/adapter_model.safetensors"))
  assert(wane.checkpoint.write_safetensors(dir .. "/adapter_model.safetensors", edit_tensors and edit_tensors(tensors) or tensors))
  return dir
end

-- Changes a field of a config's text; the value is JSON.
local function set(key, value)
  return function(text)
    local config = cjson.decode(text)
    config[key] = cjson.decode("[" .. value .. "]")[1]
    return cjson.encode(config)
  end
end

describe("a folder that holds an adapter alone", function()
  after_each(files.clean)

  it("is loaded with the base that its config names, from the folder or from here", function()
    local with = assert(load(root .. "base/llama", { lora = root .. "lora/llama_all" }))
    local alone = assert(load(root .. "lora/llama_all/"))
    assert.is_true(bits(with) == bits(alone))
    assert.equal("default", lora.list(alone)[1].name)
    alone:close()
    local here = copy("llama_all", set("base_model_name_or_path", '"' .. root .. 'base/llama"'))
    alone = assert(load(here, { lora = { named = root .. "lora/llama_dora" } }))
    assert.equal(2, #lora.list(alone))
    alone:close()
    with:close()
  end)

  it("says what is missing where the base is not there", function()
    local dir = copy("llama_all", set("base_model_name_or_path", '"nobody/nothing"'))
    local model, message, code = load(dir)
    assert.is_nil(model)
    assert.matches("adapter of 'nobody/nothing'", message)
    assert.equal("WANE_E_NOTFOUND", code)
    model, message = load(copy("llama_all", set("base_model_name_or_path", "null")))
    assert.is_nil(model)
    assert.matches("does not name its base model", message)
  end)

  it("names of the Hugging Face cache do for both", function()
    local cache = files.folder()
    local function put(name, source)
      local folder = cache .. "/models--" .. name:gsub("/", "--")
      assert(os.execute(("mkdir -p %s/snapshots %s/refs && cp -r %s %s/snapshots/abc"):format(folder, folder, source, folder)) == 0)
      files.write(folder .. "/refs/main", "abc")
    end
    put("someone/tiny-llama", root .. "base/llama")
    put("someone/tiny-adapter", copy("llama_all", set("base_model_name_or_path", '"someone/tiny-llama"')))
    local code = 'local m = assert(require("wane").load("someone/tiny-adapter", { tokenizer = false })) io.write(m.lora.order[1], " ", m.path)'
    local pipe = io.popen(("HF_HUB_CACHE=%s LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' ${WANE_TEST_LUA:-luajit} -e '%s' 2>&1"):format(cache, code))
    local text = pipe:read "*a"
    pipe:close()
    assert.equal("default " .. cache .. "/models--someone--tiny-llama/snapshots/abc", text)
  end)

  it("several are named after their folders and all active; nonsense raises", function()
    local model = assert(load(root .. "base/llama", { lora = { root .. "lora/llama_all", root .. "lora/llama_dora/" } }))
    local list = lora.list(model)
    assert.same({ "llama_all", true, "llama_dora", true }, { list[1].name, list[1].active, list[2].name, list[2].active })
    model:close()
    assert.has_error(function() load(root .. "base/llama", { lora = 5 }) end, "load: lora: expected an adapter's folder or a list of them, found a number")
    local nothing, message = load(root .. "base/llama", { lora = "/nowhere" })
    assert.is_nil(nothing)
    assert.matches("/nowhere/adapter_config.json", message)
  end)

  it("is described without its base", function()
    local adapter = assert(lora.describe(root .. "lora/llama_patterns"))
    assert.same({ 8, 32, 11, 6176, 24704, 8 }, { adapter.config.r, adapter.config.lora_alpha, adapter.config.rank_pattern.gate_proj, adapter.parameters,
      adapter.bytes, #adapter.tensors })
    assert.is_true(lora.is_adapter(root .. "lora/llama_patterns"))
    assert.is_false(lora.is_adapter(root .. "base/llama"))
  end)
end)

describe("keys", function()
  local model, reference
  setup(function()
    model = assert(load(root .. "base/llama"))
    assert(lora.load(model, root .. "lora/llama_dora"))
    reference = bits(model)
    lora.delete(model, "default")
  end)
  teardown(function() model:close() end)
  after_each(files.clean)

  local function same(rename, tensors_of)
    local dir = copy("llama_dora", nil, function(tensors)
      local out = {}
      for key, tensor in pairs(tensors) do out[rename(key)] = tensors_of and tensors_of(tensor) or tensor end
      return out
    end)
    assert(lora.load(model, dir))
    local equal = bits(model) == reference
    lora.delete(model, "default")
    return equal
  end

  it("of a dump from memory, with the adapter's name between", function()
    assert.is_true(same(function(key)
      return (key:gsub("(lora_[AB])%.weight$", "%1.default.weight"):gsub("(lora_magnitude_vector)$", "%1.default.weight"))
    end))
  end)

  it("without PEFT's prefix, and of a model without its head", function()
    assert.is_true(same(function(key) return (key:gsub("^base_model%.model%.", "")) end))
    assert.is_true(same(function(key) return (key:gsub("^base_model%.model%.model%.", "base_model.model.")) end))
  end)

  it("of the older adapter_model.bin", function()
    assert(lora.load(model, root .. "lora/llama_patterns"))
    local want = bits(model)
    lora.delete(model, "default")
    assert(lora.load(model, root .. "lora/llama_patterns_bin"))
    assert.is_true(bits(model) == want)
    lora.delete(model, "default")
    assert.equal("adapter_model.bin", lora.describe(root .. "lora/llama_patterns_bin").file)
  end)

  it("half precision is widened", function()
    local dir = copy("llama_all", nil, function(tensors)
      for key, tensor in pairs(tensors) do tensors[key] = tensor:to "bf16" end
      return tensors
    end)
    assert(lora.load(model, dir))
    assert.equal("f32", model:find("model.layers.0.self_attn.q_proj").adapters[1].A:dtype())
    lora.delete(model, "default")
  end)

  it("that lack or exceed what the config targets are reported", function()
    local dir = copy("llama_dora", set("target_modules", '["q_proj", "v_proj", "o_proj", "w1"]'))
    local report = assert(lora.load(model, dir))
    assert.same({ "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj" }, report.missing)
    assert.same({ "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj" }, report.unexpected)
    assert.same({ "w1" }, report.unused)
    assert.equal(4, report.modules)
    lora.delete(model, "default")
  end)
end)

describe("refused", function()
  local model
  setup(function() model = assert(load(root .. "base/llama")) end)
  teardown(function() model:close() end)
  after_each(files.clean)

  local function refuses(dir, part, wanted)
    local report, message, code = lora.load(model, dir)
    assert.is_nil(report)
    assert.is_truthy(message:find(part, 1, true), message)
    assert.is_truthy(message:find(dir, 1, true), message)
    assert.equal(wanted or "WANE_E_FORMAT", code)
    assert.same({}, lora.list(model))
  end

  it("other methods, and what changes the arithmetic, by name", function()
    for _, kind in ipairs { "PREFIX_TUNING", "IA3", "ADALORA", "LOHA" } do
      refuses(copy("llama_all", set("peft_type", '"' .. kind .. '"')), "peft_type '" .. kind .. "'", "WANE_E_UNSUPPORTED")
    end
    for key, value in pairs { layer_replication = "[[0, 1], [0, 2]]", target_parameters = '["experts.w"]', trainable_token_indices = "[1, 2]",
                              alora_invocation_tokens = "[5]", use_qalora = "true", arrow_config = '{"top_k": 3}' } do
      refuses(copy("llama_all", set(key, value)), "'" .. key .. "' changes what the adapter computes", "WANE_E_UNSUPPORTED")
    end
    for _, init in ipairs { "pissa_niter_16", "olora", "corda", "loftq" } do
      refuses(copy("llama_all", set("init_lora_weights", '"' .. init .. '"')), "init_lora_weights '" .. init .. "'", "WANE_E_UNSUPPORTED")
    end
  end)

  it("configs that are none", function()
    for key, case in pairs { r = { "-1", "'r'" }, lora_alpha = { '"x"', "'lora_alpha': expected a number, found a string" }, bias = { '"maybe"', "'bias'" },
                             target_modules = { "[1]", "'target_modules': expected a list of names" }, rank_pattern = { '{"a": 0.5}', "'rank_pattern'" },
                             layers_to_transform = { '["a"]', "'layers_to_transform'" }, use_dora = { "1", "'use_dora': expected a boolean" } } do
      refuses(copy("llama_all", set(key, case[1])), case[2])
    end
    refuses(copy("llama_all", function() return "[" end), "no valid JSON")
    refuses(copy("llama_all", function() return "{}" end), "no 'peft_type'")
    refuses(copy("llama_patterns", set("target_modules", '"(q_proj"')), "target_modules: pattern '(q_proj'")
    refuses(copy("llama_patterns", set("target_modules", '"(?:.|.)*[^a-z.0-9_]"')), "match", "WANE_E_FORMAT")
    refuses(copy("llama_all", set("target_modules", '[]')), "target_modules names nothing", "WANE_E_ARG")
    refuses(copy("llama_all", set("target_modules", '["w1"]')), "nothing in this llama model is called w1", "WANE_E_ARG")
  end)

  it("tensors that do not fit, with both shapes", function()
    local key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    local function with(change) return copy("llama_all", nil, change) end
    refuses(with(function(t) t[key] = wane.zeros(8, 71) return t end), "'" .. key .. "' has shape [8, 71], the model and the adapter's config ask for [8, 72]")
    refuses(with(function(t) t[key] = wane.zeros(4, 72) return t end), "has shape [4, 72], the model and the adapter's config ask for [8, 72]")
    refuses(with(function(t) t[key] = nil return t end), "module 'model.layers.0.self_attn.q_proj' has no lora A")
    refuses(with(function(t) t["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = wane.zeros(8, 72) return t end),
      "belongs to a module that this llama model has not: is it the adapter's base?")
    refuses(with(function(t) t["base_model.model.model.layers.0.self_attn.q_proj.lora_E.weight"] = wane.zeros(8) return t end), "a 'lora_E' is not built")
    refuses(with(function(t) t["base_model.model.model.layers.0.self_attn.q_proj.lora_A.x.weight"] = wane.zeros(8, 72) return t end), "comes twice")
    refuses(with(function(t) t["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = wane.zeros(72) return t end),
      "although use_dora is false")
    refuses(copy("llama_all", set("use_dora", "true")), "has no lora magnitude")
    refuses(copy("llama_all", set("modules_to_save", '["norm"]'), function(t) t["base_model.model.model.norm.weight"] = wane.zeros(70) return t end),
      "has shape [70], the model's is [72]")
  end)

  it("links out of the folder", function()
    for _, name in ipairs { "adapter_config.json", "adapter_model.safetensors" } do
      local dir = copy "llama_all"
      local outside = require("wane.checkpoint.paths").real(root .. "lora/llama_all/" .. name)
      assert(os.execute(("ln -sf %s %s/%s"):format(outside, dir, name)) == 0)
      refuses(dir, name)
    end
  end)

  it("a folder without weights, and an empty one", function()
    local dir = files.folder()
    files.write(dir .. "/adapter_config.json", files.read(root .. "lora/llama_all/adapter_config.json"))
    refuses(dir, "has no adapter_model.safetensors", "WANE_E_NOTFOUND")
    refuses(copy("llama_all", nil, function() return {} end), "holds nothing of what its config targets")
  end)
end)

describe("damaged folders", function()
  local model, dir
  setup(function()
    model = assert(load(root .. "base/llama"))
    dir = copy "llama_patterns"
  end)
  teardown(function()
    model:close()
    files.clean()
  end)

  local function try()
    local report, message, code = lora.load(model, dir)
    if not report then return nil, message, code end
    lora.delete(model, "default")
    return true
  end

  it("10,000 configs", function()
    local text = files.read(root .. "lora/llama_patterns/adapter_config.json")
    mutate.run { name = "adapter configs", sources = { text, files.read(root .. "lora/llama_all/adapter_config.json") }, words = mutate.json_words,
                 path = dir .. "/adapter_config.json", names = dir, accepted = 100, refused = 1000, try = try }
    files.write(dir .. "/adapter_config.json", text)
  end)

  it("10,000 weights", function()
    local bytes = files.read(dir .. "/adapter_model.safetensors")
    local header = 8 + bytes:byte(1) + 256 * bytes:byte(2)
    mutate.run { name = "adapter weights", sources = { bytes }, words = mutate.json_words, path = dir .. "/adapter_model.safetensors", names = dir,
                 spans = { { 1, header } }, accepted = 20, refused = 1000, try = try }
  end)
end)
