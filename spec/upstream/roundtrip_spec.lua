-- Folders to and from the real transformers and bitsandbytes: what wane writes they load with the same logits, what they write wane reads
-- with the same bytes. Needs .cache/upstream-venv (scripts/setup upstream), or WANE_UPSTREAM_PYTHON; skipped without.
local cjson = require "cjson"
local ffi = require "ffi"
local checkpoint = require "wane.checkpoint"
local F = require "wane.nn.functional"
local files = require "support.files"
local lists = require("spec.support.golden").lists
local paths = require "wane.checkpoint.paths"
local safetensors = require "spec.support.safetensors"
local wane = require "wane"

local models = "spec/fixtures/models/"
local BAR = 1e-5                       -- of the largest logit: two float32 evaluations differ by about 1e-6

local function python()
  local given = os.getenv "WANE_UPSTREAM_PYTHON"
  if given then return given end
  return paths.is_file ".cache/upstream-venv/ready" and ".cache/upstream-venv/bin/python" or nil
end

-- Models of the fixtures whose family wane has and whose logits are known (other layouts of the same weights have none): { name, config, ids, decoder_ids }.
local function fixtures()
  local list = {}
  for _, name in ipairs(paths.list(models)) do
    local path = models .. name
    if paths.is_file(path .. "/model.safetensors") and paths.is_file(path .. "/expected.safetensors") then
      local config = cjson.decode(files.read(path .. "/config.json"))
      local expected = safetensors.read(path .. "/expected.safetensors")
      if require("wane.models").find(config) then
        list[#list + 1] = { name = name, path = path, config = config, ids = expected.input_ids, decoder_ids = expected.decoder_input_ids }
      end
    end
  end
  return list
end

-- Logits of a folder in wane, products with the dequantized weights in f32; how many layers were quantized.
local function logits_of(folder, model)
  local m = assert(wane.load(folder, { tokenizer = false, compute = "f32" }))
  local count = 0
  for _, l in ipairs(m:linears()) do
    local dtype = l[2].weight:dtype()
    if dtype == "nf4" or dtype == "fp4" or dtype:find "^int8" then
      count = count + 1
      l[2].weight, l[2].threshold = F.outside_scopes(function() return l[2].weight:dequantize "f32" end), nil
    end
  end
  local values, n = F.read(m:forward(lists(model.ids), { decoder_input_ids = model.decoder_ids and lists(model.decoder_ids) }), "float")
  local copy = ffi.new("float[?]", n)
  ffi.copy(copy, values, n * 4)
  m:close()
  return copy, n, count
end

local function largest_difference(values, n, file)
  local text = files.read(file)
  assert.equal(n * 4, #text)
  local theirs, worst = ffi.cast("const float *", text), 0
  for i = 0, n - 1 do
    local d = math.abs(values[i] - theirs[i])
    if not (d <= worst) then worst = d end
  end
  return worst
end

local schemes = {
  { "nf4", { type = "nf4" }, { load_in_4bit = true, bnb_4bit_quant_type = "nf4", bnb_4bit_compute_dtype = "float32" } },
  { "nf4 nested", { type = "nf4", double_quant = true },
    { load_in_4bit = true, bnb_4bit_quant_type = "nf4", bnb_4bit_use_double_quant = true, bnb_4bit_compute_dtype = "float32" } },
  { "fp4", { type = "fp4" }, { load_in_4bit = true, bnb_4bit_quant_type = "fp4", bnb_4bit_compute_dtype = "float32" } },
  { "int8", { type = "int8" }, { load_in_8bit = true } },
}

-- Differing bytes of two folders' weights by what they are: codes (fp4's two zeros are one value), scales, and everything else.
local function compare(ours, theirs)
  local a, b = assert(checkpoint.read_safetensors(ours .. "/model.safetensors")), assert(checkpoint.read_safetensors(theirs .. "/model.safetensors"))
  local out = { codes = 0, nested = 0, offset = 0, other = 0, of = 0, missing = {} }
  for name, t in pairs(b) do
    local mine = a[name]
    if not mine then out.missing[#out.missing + 1] = name
    else
      if mine:dtype() ~= t:dtype() and mine:is_float() then mine, t = mine:to "f32", t:to "f32" end    -- upstream widens T5's wo in memory
      local x, y = files.bytes(mine), files.bytes(t)
      out.of = out.of + #y
      if name:find "quant_state" then
        local p, q = cjson.decode(x), cjson.decode(y)
        if p.nested_offset then out.offset = math.max(out.offset, math.abs(p.nested_offset - q.nested_offset) / q.nested_offset) end
        p.nested_offset, q.nested_offset = nil, nil
        assert.same(q, p)
      else
        local kind = t:dtype() == "u8" and (name:find "%.absmax$" and "nested" or "codes") or t:dtype() == "i8" and "codes" or "other"
        local fp4 = kind == "codes" and a[name .. ".quant_state.bitsandbytes__fp4"] ~= nil
        assert.equal(#y, #x, name)
        for i = 1, #y do
          local p, q = x:byte(i), y:byte(i)
          if fp4 then                                       -- 8 is -0
            p = (p % 16 == 8 and p - 8 or p); p = (p >= 128 and p < 144) and p - 128 or p
            q = (q % 16 == 8 and q - 8 or q); q = (q >= 128 and q < 144) and q - 128 or q
          end
          if p ~= q then out[kind] = out[kind] + 1 end
        end
      end
    end
  end
  for name in pairs(a) do if not b[name] then out.missing[#out.missing + 1] = name end end
  return out
end

describe("the round trip with transformers and bitsandbytes #upstream", function()
  local interpreter = python()
  if not interpreter then
    pending "needs the Python packages: scripts/setup upstream"
    return
  end
  local root, jobs, cases = nil, {}, {}

  -- A job for the other side; `write(folder)` makes what it needs.
  local function ask(model, title, folder, job, write)
    job.ids, job.decoder_ids = lists(model.ids), model.decoder_ids and lists(model.decoder_ids)
    jobs[#jobs + 1] = job
    cases[#cases + 1] = { model = model, title = model.name .. ", " .. title, folder = folder, job = job, number = #jobs, write = write }
    return cases[#cases]
  end

  -- transformers 5 holds a layer's experts as one tensor, which it neither quantizes nor reads quantized, nor their router; nor T5's wo.
  local function with_rules(scheme, ...)
    local copy = { rules = { { "*.experts.*", "none" }, { "*.gate", "none" }, ... } }
    for k, v in pairs(scheme) do copy[k] = v end
    return copy
  end

  for _, model in ipairs(fixtures()) do
    for _, s in ipairs(schemes) do
      local folder = model.name .. "-" .. s[1]:gsub(" ", "-")
      ask(model, s[1], folder, { op = "load" }, function(path)
        assert(checkpoint.write_quantized(path, { checkpoint = assert(checkpoint.open(model.path)), scheme = with_rules(s[2]) }))
      end)
      local case = ask(model, s[1] .. " by upstream", folder .. "-upstream", { op = "save", source = model.path, quant = s[3],
        dtype = model.config.dtype or model.config.torch_dtype or "float32" })
      case.ours, case.scheme = folder, s[2]
      model.own = case                                  -- what upstream itself makes of this family
    end
    local mixed = with_rules({ type = "nf4" }, { "*.wo", "none" }, { "*.0.*", "none" }, { "*.1.*", { type = "fp4", block_size = 128, double_quant = true } })
    ask(model, "rules", model.name .. "-rules", { op = "load" }, function(path)
      assert(checkpoint.write_quantized(path, { checkpoint = assert(checkpoint.open(model.path)), scheme = mixed }))
    end)
    ask(model, "int8 and nf4", model.name .. "-mixed", { op = "load" }, function(path)
      assert(checkpoint.write_quantized(path, { checkpoint = assert(checkpoint.open(model.path)),
                                                scheme = { type = "nf4", rules = { { "*.0.*", "int8" } } } }))
    end).refused = "no `quant_method` attribute"
    ask(model, "saved", model.name .. "-plain", { op = "load" }, function(path)
      local m = assert(wane.load(model.path, { tokenizer = false }))
      assert(m:save(path))
      m:close()
    end)
  end

  -- 1. everything is written and asked for at once: importing torch takes longer than all models
  local answer = { results = {}, versions = {} }
  lazy_setup(function()
    root = files.folder()
    for _, case in ipairs(cases) do
      case.job.folder = root .. "/" .. case.folder
      if case.write then
        local ok, message = pcall(case.write, case.job.folder)
        case.problem = not ok and tostring(message) or nil
      end
    end
    files.write(root .. "/jobs.json", cjson.encode(jobs))
    if os.execute(("%s spec/upstream/oracle.py %s/jobs.json >&2"):format(interpreter, root)) == 0 then
      answer = cjson.decode(files.read(root .. "/jobs.json.out"))
    end
    print(("  torch %s, transformers %s, bitsandbytes %s"):format(tostring(answer.versions.torch), tostring(answer.versions.transformers),
      tostring(answer.versions.bitsandbytes)))
  end)
  lazy_teardown(files.clean)

  -- 2. and compared
  local function result_of(case)
    assert.is_nil(case.problem)
    return answer.results[case.number] or { error = "the Python program did not get to this" }
  end

  -- transformers 5.24 takes Falcon's layers for no Linear: it neither quantizes them nor reads what was.
  local function unknown_to_upstream(case)
    local own = answer.results[case.model.own.number]
    return not case.title:find ", saved$" and own and own.quantized and #own.quantized == 0
  end

  local function check_logits(case)
    local result, folder = result_of(case), root .. "/" .. case.folder
    assert.is_nil(result.error, result.trace or result.error)
    if case.job.op == "load" then assert.same({ {}, {} }, { result.missing, result.unexpected }) end
    local values, n, count = logits_of(folder, case.model)
    local worst = largest_difference(values, n, folder .. "/logits.f32")
    local own = result.raw_difference and ("upstream's own kernels: %.2g"):format(result.raw_difference) or result.raw_error:sub(1, 60)
    print(("  %-28s %2d layers, logits differ by %.2g of %.3g (%s)"):format(case.title, count, worst, result.absmax, own))
    assert.equal(#result.quantized, count)
    assert.is_true(worst <= BAR * result.absmax)
  end

  local function check_bytes(case)
    local d = compare(root .. "/" .. case.ours, root .. "/" .. case.folder)
    print(("  %-28s bytes that differ: %d codes, %d nested scales, %d others of %d; offset by %.1g"):format(case.title, d.codes, d.nested, d.other,
      d.of, d.offset))
    assert.same({}, d.missing)
    assert.equal(0, d.other)
    assert.is_true(d.offset <= 1e-6)
    assert.is_true(d.nested <= 0.005 * d.of + 2)
    assert.is_true(d.codes <= (case.scheme.type == "nf4" and 0 or 1e-3 * d.of))
  end

  for _, case in ipairs(cases) do
    if case.refused then
      it(case.title .. ": upstream refuses it", function()
        assert.truthy((result_of(case).error or "it was loaded"):find(case.refused, 1, true))
      end)
    elseif case.job.op == "load" then
      it(case.title .. ": upstream loads wane's folder, logits equal", function()
        if unknown_to_upstream(case) then return pending "transformers quantizes no layer of this family" end
        check_logits(case)
      end)
    else
      it(case.title .. ": wane reads it, logits and bytes equal", function()
        if unknown_to_upstream(case) then return pending "transformers quantizes no layer of this family" end
        check_logits(case)
        check_bytes(case)
      end)
    end
  end
end)
