--- wane inspect: what a model's files hold, from their headers; with --check, whether its values are finite; with --plan, what memory
-- the model will need, from its config alone.
local cli = require "wane.cli"

local parser = cli.parser("inspect", "Shows what a model's files hold: family, tensors, dtypes, bytes, quantization.")
parser:argument("path", "A Hugging Face folder (a model's or an adapter's) or a .gguf file; for --plan a config.json is enough."):args "?"
parser:option("--model", "The same as the argument.")
parser:flag("--check", "Read every value and report NaN and infinity.")
parser:flag("--tensors", "A line for every tensor instead of one for equal layers.")
parser:flag("--plan", "Parameters and memory of the model under every scheme, or under --quant: to load, to generate, to train adapters.")
parser:option("--quant", "--plan: this scheme alone."):choices { "none", "nf4", "fp4", "int8", "int8-blockwise" }
parser:option("--block-size", "--plan: values that share a scale (64; int8-blockwise 4096)."):convert(cli.count)
parser:flag("--double-quant", "--plan: quantize the scales too.")
parser:option("--skip", "--plan: module left as it is; may be given several times."):count "*"
parser:option("--dtype", "--plan: of what is not quantized (default: the config's, else f16)."):choices { "f32", "f16", "bf16" }
parser:option("--context", "--plan: tokens of a sequence (2048)."):convert(cli.count)
parser:option("--batch-size", "--plan: sequences at once (1)."):convert(cli.count)
parser:option("--lora-r", "--plan: rank of the adapters that are trained (8)."):convert(cli.count)
parser:option("--target-modules", "--plan: Linears that get an adapter, comma-separated (default: PEFT's for the family).")
parser:option("--max-memory", "--plan: say which schemes fit into this much, such as 16GiB."):convert(cli.size)

-- ---------------------------------------------------------------- gathering

local function numel(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

local function describe(q)
  if not q then return nil end
  local text = q.type
  if q.block_size then text = text .. (", blocks of %d"):format(q.block_size) end
  if q.double_quant then text = text .. ", double" end
  return text
end

-- One row a tensor: name, dtype, shape, bytes, quant, entry.
local function gather(ckpt)
  local rows = {}
  for _, name in ipairs(ckpt:names()) do
    local e = ckpt:find(name)
    rows[#rows + 1] = { name = name, dtype = e.dtype or e.file_dtype, shape = e.shape, bytes = e.bytes, quant = describe(e.quant), entry = e,
                        invalid = e.invalid }
  end
  return rows
end

-- What the family's model wants and the files lack, and the other way round; nil where the family is not known.
local function compare(ckpt)
  local tree = require("wane.models").build(ckpt.config)
  if not tree then return nil end
  local wanted, tied = {}, tree.config.tie_word_embeddings ~= false
  for path, module in tree:modules() do
    for _, p in ipairs(module:own_parameters()) do
      if not (tied and path == tree.family.head) then wanted[#wanted + 1] = path .. "." .. p.name end
    end
  end
  local report = ckpt:report(wanted)
  for i = #report.unexpected, 1, -1 do           -- a head that is there although it is tied
    if tied and report.unexpected[i] == tree.family.head .. ".weight" then table.remove(report.unexpected, i) end
  end
  return report
end

-- ---------------------------------------------------------------- --check

-- Number of NaNs and infinities of an entry; nil and a message where it cannot be read.
local function count_bad(ckpt, entry)
  local core, ffi = require "wane.core", require "ffi"
  local C = core.C
  local Tensor = require "wane.tensor"
  local list, message = require("wane.loader").load(ckpt, { { entry = entry, dtype = "f32" } }, { io = "read" })
  if not list then return nil, message end
  local n = numel(entry.shape)
  local function total(op)
    local flags, sum = core.handle_type(), core.handle_type()
    core.check(C.wane_unary(core.stream(), flags, list[1].h, op))
    core.check(C.wane_reduce(core.stream(), sum, flags, C.WANE_SUM, -1, 0))
    flags, sum = Tensor.wrap(flags), Tensor.wrap(sum)
    local info, value = core.info_type(), ffi.new "int64_t[1]"
    core.check(core.wait())
    core.check(C.wane_tensor_info(sum.h, info))
    core.check(C.wane_tensor_read(core.stream(), sum.h, value, info.nbytes))
    flags:close()
    sum:close()
    return tonumber(value[0])
  end
  local nan, infinite = 0, 0
  if n > 0 then
    infinite = n - total(C.WANE_ISFINITE)
    if infinite > 0 then
      nan = total(C.WANE_ISNAN)
      infinite = infinite - nan
    end
  end
  list[1]:close()
  return nan, infinite
end

local floats = { f32 = true, f16 = true, bf16 = true, f64 = true }

local function check_values(ckpt, rows)
  local progress, done = cli.progress("checking", "tensors"), 0
  local problems = {}
  for _, row in ipairs(rows) do
    local e = row.entry
    if not row.invalid and (e.quant or floats[e.dtype] or (e.dtype and e.dtype:find "^q%d")) then
      local nan, infinite = count_bad(ckpt, e)
      if nan == nil then problems[#problems + 1] = { name = row.name, error = infinite }
      elseif nan + infinite > 0 then problems[#problems + 1] = { name = row.name, nan = nan, inf = infinite } end
    end
    done = done + 1
    progress:update(done, #rows)
  end
  progress:finish()
  return problems
end

-- ---------------------------------------------------------------- --plan

local schemes = { { "none" }, { "int8" }, { "int8-blockwise" }, { "nf4" }, { "nf4", true }, { "fp4" }, { "fp4", true } }

-- The config of a folder (weights need not be there), of a config.json or of a .gguf file.
local function config_of(path)
  local json, C = require "wane.checkpoint.json", require("wane.core").C
  if path:find "%.json$" then return cli.check(json.read(path)) end
  if C.wane_path_kind(path) == C.WANE_PATH_FOLDER then return cli.check(json.read(path .. "/config.json")) end
  local ckpt = cli.check(require("wane.checkpoint").open(path))
  ckpt:close()
  return ckpt.config
end

local function plans_of(args, config)
  local wanted, list = args.quant and { { args.quant, args.double_quant } } or schemes, {}
  local targets
  for name in (args.target_modules or ""):gmatch "[^,%s]+" do
    targets = targets or {}
    targets[#targets + 1] = name
  end
  for _, scheme in ipairs(wanted) do
    local kind, double = scheme[1], scheme[2]
    if double and kind ~= "nf4" and kind ~= "fp4" then cli.usage("--double-quant is for nf4 and fp4, not %s", kind) end
    local plan = cli.check(require("wane.plan").of(config, {
      quant = kind ~= "none" and { type = kind, block_size = args.block_size, double_quant = double, skip = #args.skip > 0 and args.skip or nil } or nil,
      dtype = args.dtype, context = args.context, batch = args.batch_size, lora = { r = args.lora_r, target_modules = targets },
    }))
    plan.scheme = kind .. (double and ", double" or "")
    if args.max_memory then
      plan.fits = { load = plan.load_bytes <= args.max_memory, generate = plan.generate_bytes <= args.max_memory,
                    train = plan.train_bytes and plan.train_bytes <= args.max_memory }
    end
    list[#list + 1] = plan
  end
  return list
end

local function plan_command(args, path)
  local commas = require("wane.lora.count").commas
  local config = config_of(path)
  local plans = plans_of(args, config)
  if args.json then
    cli.json { path = path, family = plans[1].family, parameters = plans[1].parameters, plans = plans, max_memory = args.max_memory }
    return
  end
  local first = plans[1]
  print(("%s: %s, %s parameters"):format(path, first.family, commas(first.parameters)))
  local function cell(bytes, fits)
    return bytes and cli.bytes(bytes) .. (fits == true and " fits" or fits == false and " too much" or "") or "?"
  end
  local rows = { { "scheme", "weights", "to load", ("to generate (%d x %d tokens)"):format(first.batch, first.context), "to train adapters", "trainable" } }
  for _, p in ipairs(plans) do
    local fits = p.fits or {}
    rows[#rows + 1] = { p.scheme, cli.bytes(p.weights_bytes), cell(p.load_bytes, fits.load), cell(p.generate_bytes, fits.generate),
                        cell(p.train_bytes, fits.train), p.all and ("%s of %s"):format(commas(p.trainable), commas(p.all)) or "" }
  end
  print(cli.columns(rows))
  if first.target_modules then print(("adapters: LoRA of rank %d on %s, 8-bit moments, a checkpoint a block"):format(args.lora_r or 8,
    table.concat(first.target_modules, ", "))) end
end

-- ---------------------------------------------------------------- printing

local function shape_text(shape) return "[" .. table.concat(shape, ", ") .. "]" end

-- Rows whose names differ in one layer number and that are alike otherwise become one row, "model.layers.(0-29).mlp.up_proj.weight".
local function folded(rows)
  local groups, by_key = {}, {}
  for _, row in ipairs(rows) do
    local before, layer, after = row.name:match "^(.-%.)(%d+)(%..*)$"
    local key = before and table.concat({ before, after, row.dtype, shape_text(row.shape), row.quant or "" }, "|")
    local g = key and by_key[key]
    if g then
      g.count, g.bytes = g.count + 1, g.bytes + row.bytes
      g.layers[#g.layers + 1] = tonumber(layer)
    else
      g = { name = row.name, before = before, after = after, layers = { tonumber(layer) }, dtype = row.dtype, shape = row.shape, bytes = row.bytes,
            quant = row.quant, count = 1 }
      groups[#groups + 1] = g
      if key then by_key[key] = g end
    end
  end
  for _, g in ipairs(groups) do
    if g.count > 1 then
      table.sort(g.layers)
      local first, last = g.layers[1], g.layers[#g.layers]
      local which = last - first + 1 == g.count and ("%d-%d"):format(first, last) or ("%d of %d-%d"):format(g.count, first, last)
      g.name = ("%s(%s)%s"):format(g.before, which, g.after)
    end
  end
  return groups
end

local function print_table(rows, all)
  local out = { { "tensor", "dtype", "shape", "bytes", "quantization" } }
  for _, r in ipairs(all and rows or folded(rows)) do
    out[#out + 1] = { r.name, r.dtype, shape_text(r.shape), cli.bytes(r.bytes), r.quant or "" }
  end
  print(cli.columns(out))
end

local function print_list(title, names)
  if #names == 0 then return end
  print(("%s (%d): %s%s"):format(title, #names, table.concat(names, ", ", 1, math.min(#names, 8)), #names > 8 and ", ..." or ""))
end

-- ---------------------------------------------------------------- adapters

local function listed(value) return type(value) == "table" and table.concat(value, ", ") or value end

local function print_adapter(path, adapter)
  local c, commas = adapter.config, require("wane.lora.count").commas
  print(("%s: LoRA adapter%s of %s"):format(path, c.use_dora and " (DoRA)" or "", c.base_model_name_or_path or "a model that it does not name"))
  print(("rank        %d, alpha %g%s, dropout %g, bias %s"):format(c.r, c.lora_alpha, c.use_rslora and " (rank-stabilised)" or "", c.lora_dropout, c.bias))
  for _, key in ipairs { "rank_pattern", "alpha_pattern" } do
    local parts = {}
    for name, value in pairs(c[key] or {}) do parts[#parts + 1] = ("%s = %g"):format(name, value) end
    table.sort(parts)
    if #parts > 0 then print(("%-11s %s"):format((key:gsub("_pattern", "s")), table.concat(parts, ", "))) end
  end
  print("targets     " .. tostring(listed(c.target_modules)))
  if c.modules_to_save then print("whole       " .. listed(c.modules_to_save)) end
  print(("parameters  %s in %d tensors, %s"):format(commas(adapter.parameters), #adapter.tensors, cli.bytes(adapter.bytes)))
end

local function adapter_command(args, path)
  local adapter = cli.check(require("wane.lora").describe(path))
  table.sort(adapter.tensors, function(a, b) return a.name < b.name end)
  if args.json then
    local c = adapter.config
    cli.json { path = path, adapter = "LORA", base = c.base_model_name_or_path, r = c.r, alpha = c.lora_alpha, dropout = c.lora_dropout, bias = c.bias,
               use_dora = c.use_dora, use_rslora = c.use_rslora, target_modules = c.target_modules, modules_to_save = c.modules_to_save,
               rank_pattern = c.rank_pattern, alpha_pattern = c.alpha_pattern, parameters = adapter.parameters, bytes = adapter.bytes,
               tensors = adapter.tensors, files = { path .. "/" .. adapter.file } }
    return
  end
  print_adapter(path, adapter)
  print_table(adapter.tensors, args.tensors)
end

cli.run(parser, function(args)
  local path = args.path or args.model
  if not path then cli.usage "a path is missing: a folder or a .gguf file" end
  if args.plan then return plan_command(args, path) end
  for _, name in ipairs { "quant", "block_size", "double_quant", "dtype", "context", "batch_size", "lora_r", "target_modules", "max_memory" } do
    if args[name] then cli.usage("--%s goes with --plan", (name:gsub("_", "-"))) end
  end
  local folder = require("wane.hub").resolve(path)
  if folder and require("wane.lora").is_adapter(folder) and not require("wane.checkpoint").has_weights(folder) then return adapter_command(args, folder) end
  local ckpt = cli.check(require("wane.checkpoint").open(path))
  local rows = gather(ckpt)
  local parameters, bytes, by_dtype, invalid = 0, 0, {}, {}
  for _, row in ipairs(rows) do
    parameters, bytes = parameters + numel(row.shape), bytes + row.bytes
    by_dtype[row.dtype] = (by_dtype[row.dtype] or 0) + row.bytes
    if row.invalid then invalid[#invalid + 1] = row.name .. ": " .. row.invalid end
  end
  local report = compare(ckpt)
  local problems = args.check and check_values(ckpt, rows) or nil
  local quant = ckpt.quant
  for _, row in ipairs(rows) do if not quant and row.entry.quant then quant = row.entry.quant end end
  if args.json then
    local tensors = {}
    for i, row in ipairs(rows) do
      tensors[i] = { name = row.name, file_name = row.entry.file_name, dtype = row.dtype, shape = row.shape, bytes = row.bytes, quant = row.quant }
    end
    cli.json { path = path, format = ckpt.format, model_type = ckpt.model_type, architectures = ckpt.config.architectures, files = ckpt.index:files(),
               parameters = parameters, bytes = bytes, bytes_by_dtype = by_dtype, quantization = describe(quant), tensors = tensors, invalid = invalid,
               missing = report and report.missing, unexpected = report and report.unexpected, known_family = report ~= nil, not_finite = problems }
    return
  end
  print(("%s: %s%s"):format(path, ckpt.format, #ckpt.index:files() > 1 and (", %d files"):format(#ckpt.index:files()) or ""))
  print(("family      %s%s"):format(tostring(ckpt.model_type), report and "" or " (no family of that name: wane cannot run it)"))
  print(("parameters  %.4g million in %d tensors, %s"):format(parameters / 1e6, #rows, cli.bytes(bytes)))
  if quant then print("quantized   " .. describe(quant)) end
  print_table(rows, args.tensors)
  if report then
    print_list("missing", report.missing)
    print_list("not used", report.unexpected)
  end
  for _, message in ipairs(invalid) do print("broken: " .. message) end
  for _, p in ipairs(problems or {}) do
    print(p.error and ("not checked: %s (%s)"):format(p.name, p.error) or ("not finite: %s has %d NaN and %d infinite values"):format(p.name, p.nan, p.inf))
  end
  if problems and #problems == 0 then print("all values are finite") end
end)
