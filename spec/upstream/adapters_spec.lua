-- Adapters that wane makes, trains and writes, loaded by the real peft: no key missing or unknown, the same logits. Needs .cache/upstream-venv
-- (scripts/setup upstream), or WANE_UPSTREAM_PYTHON; skipped without.
local cjson = require "cjson"
local ffi = require "ffi"
local F = require "wane.nn.functional"
local files = require "support.files"
local golden = require "spec.support.golden"
local paths = require "wane.checkpoint.paths"
local safetensors = require "spec.support.safetensors"
local wane = require "wane"
local lora = wane.lora

local BAR = 1e-5                       -- of the largest logit
local models = "spec/fixtures/models/"

local cases = {
  { "llama", { target_modules = "all-linear", r = 4, alpha = 12 } },
  { "llama", { target_modules = { "q_proj", "down_proj" }, use_dora = true, use_rslora = true } },
  { "llama", { target_modules = ".*\\.(q_proj|up_proj)", rank_pattern = { up_proj = 3 }, alpha_pattern = { ["layers\\.1\\..*"] = 5 } } },
  { "llama", { target_modules = { "v_proj" }, modules_to_save = { "embed_tokens", "norm", "lm_head" }, layers_to_transform = { 1 } } },
  { "gpt_neox", { target_modules = { "query_key_value" }, bias = "all" } },
  { "gpt_neox", { target_modules = { "query_key_value", "dense" }, bias = "lora_only", lora_bias = true } },
  { "gpt_neox", { target_modules = { "query_key_value", "lm_head" }, modules_to_save = { "final_layer_norm" } } },
  { "gptj", { target_modules = { "q_proj", "fc_in" } }, trained = "1-d" }, { "llama", {}, trained = "norm" },
  { "t5", {}, trained = "%.k%.weight$" }, { "flan_t5", {}, trained = "^lm_head" }, { "llama", { r = 300, alpha = 30 } },
  { "gptj", {} }, { "bloom", { target_modules = { "query_key_value", "word_embeddings" } } }, { "gpt2", { target_modules = { "c_attn", "c_proj" } } },
  { "gpt2", { use_dora = true } }, { "opt", {} }, { "t5", {} }, { "flan_t5", { target_modules = "all-linear" } }, { "phi", {} }, { "falcon", {} },
  { "gemma2", {} }, { "gemma3", { target_modules = { "q_proj", "embed_tokens" } } }, { "qwen3", {} }, { "phi3", {} }, { "mixtral", {} },
}

-- Logits as a copy of their own.
local function logits_of(model, ids, decoder_ids)
  local values, n = F.read(model:forward(ids, { decoder_input_ids = decoder_ids }), "float")
  local copy = ffi.new("float[?]", n)
  ffi.copy(copy, values, n * 4)
  return copy, n
end

local function largest_difference(values, n, text)
  assert.equal(n * 4, #text)
  local theirs, worst = ffi.cast("const float *", text), 0
  for i = 0, n - 1 do
    local d = math.abs(values[i] - theirs[i])
    if not (d <= worst) then worst = d end
  end
  return worst
end

describe("adapters for peft #upstream", function()
  local interpreter = os.getenv "WANE_UPSTREAM_PYTHON" or (paths.is_file ".cache/upstream-venv/ready" and ".cache/upstream-venv/bin/python")
  if not interpreter then
    pending "needs the Python packages: scripts/setup upstream"
    return
  end
  local answer = { results = {} }

  -- Attaches, gives the copies of whole modules other values too, saves; notes the logits.
  local function write(case, folder)
    local path = models .. case[1]
    local expected = safetensors.read(path .. "/expected.safetensors")
    local model = assert(wane.load(path, { tokenizer = false, compute = "f32" }))
    case.ids = golden.lists(expected.input_ids)
    case.decoder_ids = expected.decoder_input_ids and golden.lists(expected.decoder_input_ids)
    case.base = logits_of(model, case.ids, case.decoder_ids)
    local o = { init_lora_weights = false }
    for key, value in pairs(case[2]) do o[key] = value end
    if case.trained then assert.is_true(model:train_parameters(case.trained) > 0) end      -- attach takes them into the adapter
    lora.attach(model, o)
    for _, replaced in pairs(model.lora.adapters.default.replaced) do
      for _, field in ipairs { "weight", "bias" } do if replaced[field] then replaced[field]:add_(0.01) end end
    end
    local opt = wane.optim.AdamW(model:trainable_parameters(), { lr = 1e-2 })
    for _ = 1, 3 do                                       -- a trained one, not only one that was made
      wane.scope(function()
        model:loss(case.ids, case.decoder_ids or case.ids):backward()
        opt:step()
        opt:zero_grad()
      end)
    end
    case.logits, case.n = logits_of(model, case.ids, case.decoder_ids)
    assert(lora.save(model, folder))
    model:close()
  end

  lazy_setup(function()
    local root, jobs = files.folder(), {}
    for i, case in ipairs(cases) do
      local folder = root .. "/" .. i
      local ok, message = pcall(write, case, folder)
      case.problem = not ok and tostring(message) or nil
      jobs[i] = { op = "adapter", folder = folder, base = models .. case[1], ids = case.ids, decoder_ids = case.decoder_ids }
    end
    files.write(root .. "/jobs.json", cjson.encode(jobs))
    if os.execute(("%s spec/upstream/oracle.py %s/jobs.json >&2"):format(interpreter, root)) == 0 then
      answer = cjson.decode(files.read(root .. "/jobs.json.out"))
    end
    for i, case in ipairs(cases) do
      if paths.is_file(root .. "/" .. i .. "/logits.f32") then case.theirs = files.read(root .. "/" .. i .. "/logits.f32") end
    end
  end)
  lazy_teardown(files.clean)

  for i, case in ipairs(cases) do
    local said = {}
    for key, value in pairs(case[2]) do said[#said + 1] = key .. (type(value) == "string" and "=" .. value or "") end
    table.sort(said)
    local title = case[1] .. (#said > 0 and ": " .. table.concat(said, ", ") or "")
    it(title, function()
      assert.is_nil(case.problem)
      local result = answer.results[i] or { error = "the Python program did not get to this" }
      assert.is_nil(result.error, result.trace or result.error)
      assert.same({}, result.complaints)
      local worst, moved = largest_difference(case.logits, case.n, case.theirs), largest_difference(case.base, case.n, case.theirs)
      print(("  %-60s %6d values, logits differ by %.2g of %.3g (the adapter moves them by %.2g)"):format(title, result.parameters, worst, result.absmax,
        moved))
      assert.is_true(worst <= BAR * result.absmax)
      assert.is_true(moved > 100 * BAR * result.absmax)
    end)
  end
end)
