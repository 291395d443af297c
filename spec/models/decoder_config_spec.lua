-- What Llama's relatives read out of configs and files beyond what their golden models show: windows by layer, sparse steps, a text model
-- inside a multimodal one, a head in a tied model's file, scales in 16 bits; and the mixture's arithmetic against plain loops.
local ffi = require "ffi"
local core = require "wane.core"
local files = require "spec.support.files"
local json = require "wane.checkpoint.json"
local safetensors = require "spec.support.safetensors"
local wane = require "wane"
local F = wane.nn.functional
local C = core.C

local root = "spec/fixtures/models/"

local function config(name, changes)
  local c = assert(json.read(root .. name .. "/config_v4.json"))
  for k, v in pairs(changes or {}) do if v == "none" then c[k] = nil else c[k] = v end end
  return c
end

--- A folder with a changed config and renamed (or added) tensors.
local function folder(name, changed, rename, added)
  local dir = files.folder()
  files.write(dir .. "/config.json", json.encode(changed))
  local tensors = {}
  local from = assert(wane.checkpoint.read_safetensors(root .. name .. "/model.safetensors"))
  for key, tensor in pairs(from) do tensors[rename and rename(key) or key] = tensor end
  for key, tensor in pairs(added and added(tensors) or {}) do tensors[key] = tensor end
  assert(wane.checkpoint.write_safetensors(dir .. "/model.safetensors", tensors, { format = "pt" }))
  return dir
end

local function load(dir, compute) return assert(wane.load(dir, { tokenizer = false, compute = compute or "f32" })) end

local function ids_of(name)
  local t = safetensors.read(root .. name .. "/expected.safetensors").input_ids
  local row = {}
  for i = 1, t.shape[2] do row[i] = tonumber(t.data[i - 1]) end
  return { row }
end

local function logits(model, ids)
  local values, n = F.read(model:forward(ids), "float")
  return values, n, n / #ids[1]
end

local function same(a, b, n) return ffi.string(a, n * 4) == ffi.string(b, n * 4) end
local function difference(a, b, n)
  local worst = 0
  for i = 0, n - 1 do worst = math.max(worst, math.abs(a[i] - b[i])) end
  return worst
end

after_each(files.clean)

describe("sliding windows", function()
  -- Rows before the window's end see the same keys; from there on they see fewer.
  local function windowed(name, changes, full)
    local ids = ids_of(name)
    local a, b = load(folder(name, config(name, changes))), load(folder(name, config(name, full)))
    local x, n, vocab = logits(a, ids)
    local y = logits(b, ids)
    a:close()
    b:close()
    return x, y, n, vocab
  end

  it("of Qwen2 are for layers from max_window_layers on, if they are used at all", function()
    local slides = { use_sliding_window = true, sliding_window = 5, max_window_layers = 1, layer_types = "none" }
    local x, y, n, vocab = windowed("qwen2", slides, { layer_types = "none" })
    assert.is_true(same(x, y, 5 * vocab))
    assert.is_false(same(x + 5 * vocab, y + 5 * vocab, vocab))
    local listed = windowed("qwen2", { use_sliding_window = true, sliding_window = 5, layer_types = { "full_attention", "sliding_attention" } }, {})
    assert.is_true(same(x, listed, n))
    for _, off in ipairs { { max_window_layers = 2 }, { max_window_layers = 0, use_sliding_window = false } } do
      for k, v in pairs(off) do slides[k] = v end
      local full, none = windowed("qwen2", {}, slides)
      assert.is_true(same(full, none, n))
    end
  end)

  it("of Qwen3-MoE, Mixtral and Phi-3 are for every layer; without one all keys are seen", function()
    for _, name in ipairs { "qwen3_moe", "mixtral", "phi3" } do
      local x, y, _, vocab = windowed(name, { use_sliding_window = true, sliding_window = 5 }, {})
      -- How many later rows share a row's expert decides between the kernels of few and of many rows: equal within rounding.
      assert.is_true(difference(x, y, 5 * vocab) < 2e-5, name)
      assert.is_true(difference(x + 5 * vocab, y + 5 * vocab, vocab) > 1e-3, name)
    end
    local x, y, _, vocab = windowed("mistral", {}, { sliding_window = "none" })
    assert.is_true(same(x, y, 7 * vocab))
    assert.is_false(same(x + 7 * vocab, y + 7 * vocab, vocab))
  end)

  it("cost what the window costs, not what the context does", function()
    local function time(window, keys, rows)
      return core.scope(function()
        local shape = ffi.new("int64_t[4]", 1, rows, 8, 64)
        local q, kv = core.handle_type(), core.handle_type()
        core.check(C.wane_random(core.stream(), q, C.WANE_NORMAL, 0, 1, 1, 0, C.WANE_F32, 4, shape))
        shape[1], shape[2] = 8, keys
        core.check(C.wane_random(core.stream(), kv, C.WANE_NORMAL, 0, 1, 2, 0, C.WANE_F32, 4, shape))
        local Q, K = wane.Tensor.wrap(q), wane.Tensor.wrap(kv)
        local best = math.huge
        for _ = 1, 5 do
          core.check(core.wait())
          local start = C.wane_clock()
          for _ = 1, 3 do F.attention(Q, K, K, { q_start = keys - rows, kv_length = keys, window = window }) end
          core.check(core.wait())
          best = math.min(best, C.wane_clock() - start)
        end
        return best
      end)
    end
    local line = {}
    for _, rows in ipairs { 1, 256 } do
      local all, some = time(0, 16384, rows), time(256, 16384, rows)
      line[#line + 1] = ("%d row(s) %.1f times cheaper"):format(rows, all / some)
      assert.is_true(some < all / 4, line[#line])
    end
    print("  256 of 16384 keys: " .. table.concat(line, ", "))
  end)
end)

describe("a mixture", function()
  it("stands where Qwen3-MoE's config puts one", function()
    local function plain(changes)
      local tree = assert(wane.models.build(config("qwen3_moe", changes)))
      local list = {}
      for i = 0, tree.config.num_hidden_layers - 1 do if not tree:find(("model.layers.%d.mlp.experts"):format(i)) then list[#list + 1] = i end end
      return list
    end
    assert.same({ 1 }, plain {})
    assert.same({}, plain { mlp_only_layers = "none" })
    assert.same({ 0, 2, 4 }, plain { mlp_only_layers = {}, decoder_sparse_step = 2, num_hidden_layers = 5 })
    assert.same({ 0, 1, 2, 4 }, plain { mlp_only_layers = { 1 }, decoder_sparse_step = 2, num_hidden_layers = 5 })
    local tree = assert(wane.models.build(config("qwen3_moe", { num_experts = "none", num_local_experts = 3 })))
    assert.equal(3, #tree:find "model.layers.0.mlp.experts")
  end)

  it("adds up its chosen experts' results, weighed by the router", function()
    local width, inner, count, chosen = 16, 24, 5, 2
    for _, normalise in ipairs { true, false } do
      for _, rows in ipairs { 1, 19 } do
        local m = wane.nn.mixture(width, { experts = count, chosen = chosen, inner = inner, act = "silu", normalise = normalise, names = { "g", "u", "d" } })
        local seed = 1
        for _, linear in m:modules() do
          if linear.in_features then linear:reset(seed) end
          seed = seed + 1
        end
        local data = ffi.new("float[?]", rows * width)
        for i = 0, rows * width - 1 do data[i] = math.sin(i * 1.7) * 2 end
        local function matrix(linear) return F.read(linear.weight, "float") end
        local function product(w, x, n, k)
          local y = {}
          for i = 0, n - 1 do
            y[i] = 0
            for j = 0, k - 1 do y[i] = y[i] + w[i * k + j] * x[j] end
          end
          return y
        end
        local got = F.read(core.scope(function() return m(F.upload(data, C.WANE_F32, rows * width * 4, 1, rows, width)) end), "float")
        local worst = 0
        for r = 0, rows - 1 do
          local x, list, total = data + r * width, {}, 0
          local scores = product(matrix(m.gate), x, count, width)
          for e = 0, count - 1 do
            list[#list + 1] = { e, math.exp(scores[e]) }
            total = total + math.exp(scores[e])
          end
          table.sort(list, function(a, b) return a[2] > b[2] end)
          local divisor = normalise and list[1][2] + list[2][2] or total
          for i = 0, width - 1 do scores[i] = 0 end
          for j = 1, chosen do
            local expert = m.experts[list[j][1] + 1]
            local g, u = product(matrix(expert.g), x, inner, width), product(matrix(expert.u), x, inner, width)
            for i = 0, inner - 1 do g[i] = g[i] / (1 + math.exp(-g[i])) * u[i] end
            local y = product(matrix(expert.d), g, width, inner)
            for i = 0, width - 1 do scores[i] = scores[i] + y[i] * list[j][2] / divisor end
          end
          for i = 0, width - 1 do worst = math.max(worst, math.abs(scores[i] - got[r * width + i])) end
        end
        assert.is_true(worst < 1e-6, tostring(worst))
      end
    end
  end)
end)

describe("Gemma", function()
  it("3 is read out of a multimodal file, in both its spellings", function()
    local text = load(root .. "gemma3")
    local ids = ids_of "gemma3"
    local want, n = logits(text, ids)
    text:close()
    for _, prefix in ipairs { "language_model.model.", "model.language_model." } do
      local inner = config("gemma3", { architectures = "none", vocab_size = 211 })
      local outer = { architectures = { "Gemma3ForConditionalGeneration" }, model_type = "gemma3", text_config = inner, vision_config = { hidden_size = 7 } }
      local dir = folder("gemma3", outer, function(name) return prefix .. name:gsub("^model%.", "") end,
        function(tensors) return { ["vision_tower.embeddings.weight"] = tensors[prefix .. "norm.weight"] } end)
      local model = load(dir)
      assert.is_true(same(want, logits(model, ids), n), prefix)
      assert.equal("model.layers.0.mlp.up_proj.weight", wane.checkpoint.names.canonical("gemma3", prefix .. "layers.0.mlp.up_proj.weight", true))
      model:close()
    end
  end)

  it("3 out of a multimodal file is written as the text model that it is", function()
    local inner = config("gemma3", { architectures = { "Other" }, torch_dtype = "none", eos_token_id = "none", tie_word_embeddings = "none" })
    local outer = { architectures = { "Gemma3ForConditionalGeneration" }, model_type = "gemma3", text_config = inner, vision_config = { hidden_size = 7 },
                    torch_dtype = "float32", eos_token_id = { 1, 106 }, tie_word_embeddings = true, mm_tokens_per_image = 4 }
    local dir = folder("gemma3", outer, function(name) return "language_model.model." .. name:gsub("^model%.", "") end,
      function(tensors) return { ["vision_tower.embeddings.weight"] = tensors["language_model.model.norm.weight"] } end)
    local model, ids = load(dir), ids_of "gemma3"
    local want, n = logits(model, ids)
    assert(model:save(dir .. "/saved"))
    local ckpt = assert(wane.checkpoint.open(dir))
    local result = assert(wane.checkpoint.write_quantized(dir .. "/nf4", { checkpoint = ckpt, scheme = { type = "nf4" } }))
    ckpt:close()
    assert.equal(1, result.left_out)
    for _, name in ipairs { "saved", "nf4" } do
      local c = assert(json.read(dir .. "/" .. name .. "/config.json"))
      assert.same({ { "Gemma3ForCausalLM" }, "gemma3_text", "float32", { 1, 106 }, true, inner.hidden_size },
        { c.architectures, c.model_type, c.torch_dtype, c.eos_token_id, c.tie_word_embeddings, c.hidden_size }, name)
      assert.same({}, { c.text_config, c.vision_config, c.mm_tokens_per_image })
      assert.equal(name == "nf4", c.quantization_config ~= nil)
      local written = load(dir .. "/" .. name)
      assert.same({ missing = {}, unexpected = {} }, written.report, name)
      if name == "saved" then assert.is_true(same(want, logits(written, ids), n)) end
      written:close()
    end
    model:close()
  end)

  it("3 may leave its usual sizes unsaid", function()
    local tree = assert(wane.models.build { architectures = { "Gemma3ForConditionalGeneration" }, text_config = {
      hidden_size = 64, num_hidden_layers = 7, intermediate_size = 32, rope_scaling = { factor = 8, rope_type = "linear" } } })
    local c = tree.config
    assert.same({ 262208, 8, 4, 256, 4096 }, { c.vocab_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.sliding_window })
    assert.same({ "linear", 1e6, 8 }, { c.rotary.p.rope_type, c.rotary.p.theta, c.rotary.p.factor })
    assert.same({ "default", 1e4 }, { c.local_rotary.p.rope_type, c.local_rotary.p.theta })
    assert.same({ "sliding_attention", "full_attention", "sliding_attention" }, { c.layer_types[5], c.layer_types[6], c.layer_types[7] })
  end)

  it("rounds the embedding's scale to the weight's dtype where products are computed in 16 bits", function()
    for dtype, rounded in pairs { f16 = 55.4375, bf16 = 55.5, f32 = math.sqrt(3072) } do
      local embedding = wane.nn.Embedding(1, 3072, math.sqrt(3072))
      embedding.weight = wane.ones({ 1, 3072 }, dtype)
      for _, compute in ipairs { "BF16", "F32" } do
        embedding.compute = C["WANE_COMPUTE_" .. compute]
        local x = F.read(embedding(F.upload(ffi.new "int32_t[1]", C.WANE_I32, 4, 1, 1)), "float")
        assert.near(compute == "F32" and math.sqrt(3072) or rounded, x[0], 1e-5, dtype .. " " .. compute)
      end
    end
  end)
end)

describe("a tied model whose file has a head all the same", function()
  it("uses it", function()
    local ids = ids_of "qwen2"
    local tied = load(root .. "qwen2")
    local x, n = logits(tied, ids)
    local dir = folder("qwen2", config "qwen2", nil, function(tensors) return { ["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2 } end)
    local model = load(dir)
    local y = logits(model, ids)
    for i = 0, n - 1 do assert.near(2 * x[i], y[i], 1e-4) end
    model:close()
    tied:close()
  end)
end)
