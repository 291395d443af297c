--- Loading a model: config -> family -> module tree -> which tensor goes where and how -> values, read while they are quantized.
-- @module wane.load
local core = require "wane.core"
local models = require "wane.models"
local Model = require "wane.model"
local rules = require "wane.quant.rules"

local M = {}

-- ---------------------------------------------------------------- quantization schemes

local types = { nf4 = true, fp4 = true, int8 = true, ["int8-blockwise"] = true, none = true }

--- A scheme as users write it ("nf4" or a table) in full, or nil for none. Raises for what does not exist.
-- @param quant string|table|nil
-- @return table|nil { type ("none" where only rules quantize), block_size, double_quant, threshold, compute, skip, rules }
function M.scheme(quant)
  if quant == nil or quant == "none" then return nil end
  if type(quant) == "string" then quant = { type = quant } end
  local s = {}
  for k, v in pairs(type(quant) == "table" and quant or {}) do s[k] = v end
  if s.rules then s.type = s.type or "none" end
  if not types[s.type] then
    core.raise("quant: expected none, nf4, fp4, int8 or int8-blockwise, found '%s'", tostring(type(quant) == "table" and quant.type or quant))
  end
  if s.type == "none" and not s.rules then return nil end
  if s.rules then s.rules = rules.compile(s.rules, s, M.scheme) end
  if s.type == "none" then return s end
  if s.double_quant and s.type ~= "nf4" and s.type ~= "fp4" then core.raise("double_quant is for nf4 and fp4, not %s", s.type) end
  s.block_size = s.block_size or (s.type == "int8-blockwise" and 4096 or 64)
  if s.type == "int8" then s.threshold = s.threshold or 6.0 end
  return s
end

--- Is the module at `path` on a skip list? An entry names a module by its whole path, its last part, or a path within it.
-- Source: transformers quantizers_utils.should_convert_module, the rule of version 4; see docs/formats.md.
function M.skipped(path, skip)
  local last = path:match "[^.]+$"
  for _, s in ipairs(skip) do
    if s == path or s == last or (path .. "."):find(s .. ".", 1, true) then return true end
  end
  return false
end

--- The skip list in force: what the caller says, else the output head and what the family keeps.
function M.skip_list(scheme, family)
  return require("wane.checkpoint.names").skip_list(family.name, scheme.skip) or { family.head, unpack(family.keep or {}) }
end

--- What a caller's skip list and rules say of no layer: most likely mistakes in writing.
-- @param scheme table|nil of M.scheme
-- @param family table
-- @param linears table { path = anything }
-- @return string[] entries of the skip list, string[] patterns of rules
function M.unused(scheme, family, linears)
  local list, names = {}, require "wane.checkpoint.names"
  for _, entry in ipairs(scheme and scheme.skip or {}) do
    local hit, spellings = false, names.skip_list(family.name, { entry })
    for path in pairs(linears) do hit = hit or M.skipped(path, spellings) end
    if not hit then list[#list + 1] = entry end
  end
  return list, rules.unused(scheme and scheme.rules, linears)
end

-- ---------------------------------------------------------------- one request a parameter

--- How the weight of the Linear at `path` is to be held: what the first rule that matches says, else the scheme unless the path is on
-- the skip list.
-- @param path string
-- @param scheme table|nil of M.scheme
-- @param skip string[] of M.skip_list
-- @return table|nil nil: as it is stored
function M.scheme_at(path, scheme, skip)
  if not scheme then return nil end
  local ruled, own = rules.find(scheme.rules, path)
  if ruled then return own end
  if scheme.type == "none" or M.skipped(path, skip) then return nil end
  return scheme
end

--- Checks an entry's shape against the module's.
local function fits(entry, shape)
  if #entry.shape ~= #shape then return false end
  for i = 1, #shape do if entry.shape[i] ~= shape[i] then return false end end
  return true
end

-- "a, b, …"
local function some(list)
  return table.concat(list, ", ", 1, math.min(#list, 5)) .. (#list > 5 and ", …" or "")
end

local function names_of(missing)
  local names = {}
  for i, m in ipairs(missing) do names[i] = m.name end
  return names
end

local function plan(tree, ckpt, scheme, allow_missing)
  local family, config = tree.family, tree.config
  local skip = scheme and M.skip_list(scheme, family)
  local requests, missing, tied = {}, {}, false
  for path, module in tree:modules() do
    for _, p in ipairs(module:own_parameters()) do
      local name = path .. "." .. p.name
      local entry = ckpt:find(name)
      local wanted = p.name == "weight" and module.in_features and M.scheme_at(path, scheme, skip) or nil
      if entry then
        if not fits(entry, p.shape) then
          return nil, ("%s: '%s' has shape [%s], the config asks for [%s]"):format(ckpt.path, entry.name, table.concat(entry.shape, ", "),
            table.concat(p.shape, ", ")), "WANE_E_FORMAT"
        end
        if entry.quant and wanted and entry.quant.type ~= wanted.type then
          return nil, ("%s: '%s' is already quantized (%s); load it without quant, or quantize the original checkpoint"):format(
            ckpt.path, entry.name, entry.quant.type), "WANE_E_ARG"
        end
        local request = { entry = entry, module = module, field = p.name, path = path }
        if not entry.quant then
          request.scheme = wanted
          -- Norms and biases are small and read by every token: they are kept as f32. Matrices stay as they are stored.
          if #p.shape == 1 then request.dtype = "f32" end
        end
        requests[#requests + 1] = request
      elseif path == family.head and p.name == "weight" and config.tie_word_embeddings ~= false then
        local table_ = wanted and ckpt:find(family.embedding .. ".weight")
        if table_ and not table_.quant then             -- the skip list leaves the head out, so it is quantized: the pair is split
          requests[#requests + 1] = { entry = table_, module = module, field = p.name, path = path, scheme = wanted, split = true }
        else
          tied = true
        end
      else
        missing[#missing + 1] = { name = name, module = module, field = p.name, shape = p.shape, scheme = wanted }
      end
    end
  end
  if #missing > 0 and not allow_missing then
    return nil, ('%s: %d tensor(s) of the model are missing: %s (missing = "allow" fills them as a new model\'s)'):format(ckpt.path, #missing,
      some(names_of(missing))), "WANE_E_FORMAT"
  end
  return requests, tied, missing
end

--- Sets a Linear up for the weight that it got. `origin`, the dtype before quantization, is for whoever saves it.
local function dress(module, r)
  local quant = r.scheme or r.entry.quant
  if quant and quant.type == "int8" then module.threshold = quant.threshold or 6.0 end
  if quant and r.field == "weight" then module.origin = r.entry.quant and r.entry.quant.dtype or r.entry.dtype end
end

-- Values of weights that the files lack, as transformers' _init_weights gives them: matrices normal with the config's
-- initializer_range, norms 1 (as they act: a Gemma norm adds 1 to what it stores), biases 0.
local function fill(missing, config)
  local create, s = require "wane.tensor.create", core.stream()
  local scope = core.C.wane_scope_swap(s, nil)         -- they are weights: no scope owns them
  local ok, message = pcall(function()
    for i, m in ipairs(missing) do
      local t
      if #m.shape > 1 then
        local how = { seed = i, std = config.initializer_range or 0.02 }
        for d, size in ipairs(m.shape) do how[d] = size end
        t = create.randn(how)
      else
        t = create.full(m.shape, m.field == "weight" and 1 - (m.module.offset or 0) or 0)
      end
      m.module[m.field] = m.scheme and require("wane.quant").quantize(t, m.scheme) or t
      if m.module.in_features then dress(m.module, { scheme = m.scheme, field = m.field, entry = { dtype = "f32" } }) end
    end
  end)
  core.C.wane_scope_swap(s, scope)
  if not ok then error(message, 0) end
end

-- What the model wanted and the files lack, and the other way round, by name; what both mean is told in the warnings.
local function report_of(tree, ckpt, missing, warnings)
  local wanted = {}
  for path, module in tree:modules() do
    for _, p in ipairs(module:own_parameters()) do wanted[#wanted + 1] = path .. "." .. p.name end
  end
  local report = { missing = names_of(missing), unexpected = ckpt:report(wanted).unexpected }
  if #missing > 0 then
    warnings[#warnings + 1] = ("%s lacks %d tensor(s) of the model, which got new values: %s"):format(ckpt.path, #missing, some(report.missing))
  end
  if #report.unexpected > 0 then
    warnings[#warnings + 1] = ("%s holds %d tensor(s) that the model has no use for: %s"):format(ckpt.path, #report.unexpected, some(report.unexpected))
  end
  return report
end

-- Warnings about a scheme that names layers which the model does not have.
local function warn_of_unused(scheme, tree, warnings)
  local linears = {}
  for path, module in tree:modules() do if module.in_features then linears[path] = true end end
  local skip, patterns = M.unused(scheme, tree.family, linears)
  for _, entry in ipairs(skip) do warnings[#warnings + 1] = ("quant.skip: '%s' matches no layer"):format(entry) end
  for _, pattern in ipairs(patterns) do warnings[#warnings + 1] = ("quant.rules: '%s' matches no layer"):format(pattern) end
end

-- ---------------------------------------------------------------- load

local known = { quant = true, compute = true, progress = true, io = true, tokenizer = true, cancelled = true, started = true, device_map = true,
                missing = true, variant = true, lora = true }
local known_scheme = { type = true, block_size = true, double_quant = true, compute = true, skip = true, threshold = true, rules = true }

--- Raises for a name that is not in `names`: a misspelt option would load another model than was asked for.
local function check_names(what, given, names)
  for name in pairs(given) do
    if name == "max_memory" then core.raise("%s: '%s' comes with a later version of wane", what, name) end
    if not names[name] then core.raise("%s: there is no option '%s'", what, tostring(name)) end
  end
end

-- Config, tree, values: the part of a load that has the checkpoint open.
local function read(path, scheme, opts, ckpt)
  local tree, message, code = models.build(ckpt.config)
  if not tree then return nil, path .. ": " .. message, code end
  local requests, tied, missing = plan(tree, ckpt, scheme, opts.missing == "allow")
  if not requests then return nil, tied, missing end
  local tensors
  tensors, message, code = require("wane.loader").load(ckpt, requests, {
    progress = opts.progress, io = opts.io, cancelled = opts.cancelled, started = opts.started,
  })
  if not tensors then return nil, message, code end
  local warnings = {}
  warn_of_unused(scheme, tree, warnings)
  for i, r in ipairs(requests) do
    r.module[r.field] = tensors[i]
    if r.split then
      warnings[#warnings + 1] = ("%s shares its weight with %s; quantizing it makes a copy of %.1f MB (name it in skip to keep one table)"):format(
        r.path, tree.family.embedding, tonumber(tensors[i]:info().nbytes) / 1e6)
    end
    if r.dtype then                                     -- held wider than stored: transformers' footprint wants to know
      r.module.stored = r.module.stored or {}
      r.module.stored[r.field] = r.entry.dtype
    end
    if r.module.in_features then dress(r.module, r) end
  end
  fill(missing, tree.config)
  local family = tree.family
  if tied then tree:find(family.head).weight = tree:find(family.embedding).weight end
  local model = Model.new(tree)
  model.report = report_of(tree, ckpt, missing, warnings)
  model.path, model.scheme, model.generation_config, model.warnings = path, scheme or ckpt.quant, ckpt.generation_config or {}, warnings
  model.source_config, model.config_text = ckpt.config, ckpt.config_text      -- what save() writes, rather than the completed one
  model.default_compute = M.default_compute(model, ckpt)
  return model:set_compute(opts.compute or (scheme and scheme.compute) or model.default_compute)
end

-- A folder's own name as an adapter's.
local function adapter_name(dir) return (tostring(dir):match "([^/]*)/*$":gsub("[^%w_-]", "_")) end

-- Adapter folders as { { name, dir } … }: the list's get their folder's name (a single one "default"), the rest the key's.
local function adapter_list(given)
  if given == nil then return {} end
  if type(given) == "string" then given = { given } end
  if type(given) ~= "table" then core.raise("load: lora: expected an adapter's folder or a list of them, found a %s", type(given)) end
  local list, named = {}, {}
  for name, dir in pairs(given) do if type(name) == "string" then named[#named + 1] = { name, dir } end end
  for i, dir in ipairs(given) do list[i] = { #given + #named == 1 and "default" or adapter_name(dir), dir } end
  table.sort(named, function(a, b) return a[1] < b[1] end)
  for _, item in ipairs(named) do list[#list + 1] = item end
  return list
end

local complaints = { { "missing", "has no values for" }, { "unexpected", "holds values that its config does not ask for:" },
                     { "unused", "targets what is not there:" } }

-- Loads adapters onto a model and makes all of them active.
local function add_adapters(model, list)
  local lora, names = require "wane.lora", {}
  for i, item in ipairs(list) do
    local report, message, code = lora.load(model, item[2], { name = item[1] })
    if not report then return nil, message, code end
    names[i] = report.name
    for _, complaint in ipairs(complaints) do
      local entries = report[complaint[1]]
      if #entries > 0 then
        table.insert(model.warnings, ("adapter '%s' %s %s%s"):format(item[2], complaint[2], table.concat(entries, ", ", 1, math.min(#entries, 5)),
          #entries > 5 and (" and %d more"):format(#entries - 5) or ""))
      end
    end
  end
  if #names > 0 then lora.set_adapter(model, names) end
  return true
end

-- A folder that holds an adapter alone stands for its base model with it: the base's path, and the adapter in front of the list.
local function base_of(path, list)
  local files = require "wane.lora.files"
  local dir, message, code = require("wane.hub").resolve(path)
  if not dir then return nil, message, code end
  if not files.is_adapter(dir) or require("wane.checkpoint").has_weights(dir) then return path end
  local config
  config, message, code = require("wane.lora.config").read(dir)
  if not config then return nil, message, code end
  table.insert(list, 1, { "default", dir })
  return files.base_path(dir, config)
end

-- The tokenizer of the first place that has one.
local function load_tokenizer(places)
  local message, code
  for _, place in ipairs(places) do
    local tok
    tok, message, code = require("wane.tokenizer").load(place)
    if tok then return tok end
  end
  return nil, message, code
end

--- See wane.load.
function M.load(path, opts)
  if type(path) ~= "string" then core.raise("load: expected a path, found a %s", type(path)) end
  if opts ~= nil and type(opts) ~= "table" then core.raise("load: expected a table of options, found a %s", type(opts)) end
  opts = opts or {}
  check_names("load", opts, known)
  if type(opts.quant) == "table" then check_names("quant", opts.quant, known_scheme) end
  if opts.missing ~= nil and opts.missing ~= "error" and opts.missing ~= "allow" then
    core.raise("load: missing is 'error' or 'allow', found '%s'", tostring(opts.missing))
  end
  local scheme = M.scheme(opts.quant)
  if opts.device_map and opts.device_map ~= "cpu" then core.raise "load: device maps come with a later version of wane" end
  local adapters, asked = adapter_list(opts.lora), path
  local ckpt, model, message, code
  path, message, code = base_of(path, adapters)
  if not path then return nil, message, code end
  ckpt, message, code = require("wane.checkpoint").open(path, { variant = opts.variant })
  if not ckpt then return nil, message, code end
  model, message, code = read(path, scheme, opts, ckpt)
  ckpt:close()                                          -- mapped tensors keep their files; nothing else needs them
  if not model then return nil, message, code end
  local ok
  ok, message, code = add_adapters(model, adapters)
  if not ok then
    model:close()
    return nil, message, code
  end
  local tok
  if opts.tokenizer ~= false then
    tok, message, code = load_tokenizer(asked ~= path and { asked, path } or { path })
    if not tok then
      if opts.tokenizer == true then
        model:close()
        return nil, message, code
      end
      model.tokenizer_error = message
    end
  end
  model.tokenizer = tok
  return model, tok
end

--- f32 where every Linear is f32 as stored; the quantized folder's own compute dtype; bf16 otherwise.
function M.default_compute(model, ckpt)
  local stated = ckpt.quant and ckpt.quant.compute
  if stated then return stated end
  for _, l in ipairs(model:linears()) do if l[2].weight:dtype() ~= "f32" then return "bf16" end end
  return "f32"
end

return M
