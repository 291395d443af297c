--- Adapter folders: adapter_config.json and adapter_model.safetensors (or the older adapter_model.bin), read onto a model's modules and
-- written as PEFT writes them. Key names: docs/formats.md.
-- Source: peft utils/save_and_load.py.
-- @module wane.lora.files
local core = require "wane.core"
local config_file = require "wane.lora.config"
local count = require "wane.lora.count"
local hub = require "wane.hub"
local index = require "wane.checkpoint.index"
local paths = require "wane.checkpoint.paths"
local pattern = require "wane.lora.pattern"
local targets = require "wane.lora.targets"
local C = core.C

local M = {}

local PREFIX = "base_model.model."
local WEIGHTS = { "adapter_model.safetensors", "adapter_model.bin" }

--- Is this the folder of an adapter?
-- @param path string
-- @return boolean
function M.is_adapter(path)
  return paths.is_file(path .. "/adapter_config.json")
end

--- Where the base model of an adapter is: the path that its config gives, from the adapter's folder or from here, else a model of that
-- name in the Hugging Face cache.
-- @param dir string
-- @param config table
-- @return string|nil path, string|nil message, string|nil code
function M.base_path(dir, config)
  local name = config.base_model_name_or_path
  if not name or name == "" then
    return nil, ("'%s/adapter_config.json' does not name its base model: load that, with lora = '%s'"):format(dir, dir), "WANE_E_NOTFOUND"
  end
  local places = name:sub(1, 1) == "/" and { name } or { dir .. "/" .. name, name }
  for _, place in ipairs(places) do
    if C.wane_path_kind(place) ~= C.WANE_PATH_NONE and place ~= dir then return place end
  end
  local revision = config.revision and "@" .. config.revision or ""
  local cached = hub.find(name .. revision)
  if cached then return cached end
  return nil, ("'%s' is an adapter of '%s', which is at none of %s%s: load the base model, with lora = '%s'"):format(dir, name, table.concat(places, ", "),
    hub.parse(name) and (" and not in the cache (`wane pull %s%s` fetches it)"):format(name, revision) or "", dir), "WANE_E_NOTFOUND"
end

-- A folder's config and its weights' index; nil, message, code. Links out of the folder are refused as a model's are.
local function open(dir)
  for _, name in ipairs { "adapter_config.json", unpack(WEIGHTS) } do
    if paths.is_file(dir .. "/" .. name) then
      local ok, message, code = paths.check(dir, dir .. "/" .. name)
      if not ok then return nil, message, code end
    end
  end
  local config, message, code = config_file.read(dir)
  if not config then return nil, message, code end
  for _, name in ipairs(WEIGHTS) do
    if paths.is_file(dir .. "/" .. name) then
      local ix
      ix, message, code = index.open(dir .. "/" .. name)
      return ix and config, ix or message, code
    end
  end
  return nil, ("'%s' has no %s"):format(dir, table.concat(WEIGHTS, " and no ")), "WANE_E_NOTFOUND"
end

-- ---------------------------------------------------------------- keys

-- Tensors of a part, and how a key that is not a part's may wrap the module's own parameter.
local part_keys = { lora_A = "A", lora_B = "B", lora_embedding_A = "A", lora_embedding_B = "B", lora_magnitude_vector = "magnitude" }

--- What a key of a file means: its module's path as the file spells it, the part's field or the parameter's name, whether it is of a
-- part. A name between ("lora_A.default.weight", of dumps from memory) falls away; `original_module` gives nothing.
local function parse(key)
  local name = key:gsub("^" .. PREFIX:gsub("%.", "%%."), "")
  local path, kind, rest = name:match "^(.*)%.(lora_[%w_]+)(.*)$"
  if path then
    local field, suffix = part_keys[kind], rest:match "%.(%a+)$"
    if kind == "lora_B" and suffix == "bias" then field = "bias" end
    return path, field, true, kind
  end
  if name:find(".original_module.", 1, true) then return nil end
  name = name:gsub("%.modules_to_save%.[^.]+%.([^.]+)$", ".%1"):gsub("%.base_layer%.([^.]+)$", ".%1")
  path, kind = name:match "^(.*)%.([^.]+)$"
  return path, kind, false, kind
end

local function shape_text(shape) return "[" .. table.concat(shape, ", ") .. "]" end

-- Collects what a file holds by module: { parts = { path = { spelled, entries } }, replaced = { path = { spelled, entries } } }.
local function sort_keys(tree, ix, where)
  local canonical, sorted = targets.paths(tree), { parts = {}, replaced = {} }
  for i = 0, ix:count() - 1 do
    local entry = ix:entry(i)
    local spelled, field, is_part, kind = parse(entry.name)
    if spelled then
      local path = canonical[spelled]
      if not path then
        return nil, ("'%s': '%s' belongs to a module that this %s model has not: is it the adapter's base?"):format(where, entry.name, tree.family.name)
      end
      if not field then return nil, ("'%s': '%s': a '%s' is not built in wane"):format(where, entry.name, kind) end
      local into = is_part and sorted.parts or sorted.replaced
      into[path] = into[path] or { spelled = spelled, entries = {} }
      if into[path].entries[field] then return nil, ("'%s': '%s' comes twice"):format(where, entry.name) end
      into[path].entries[field] = entry
    end
  end
  return sorted
end

-- ---------------------------------------------------------------- reading

-- Shapes that a part's tensors must have.
local function shapes_of(target, r)
  local module = target.module
  local inputs, outputs = module.in_features or module.count, module.out_features or module.width
  return { A = { r, inputs }, B = { outputs, r }, bias = { outputs }, magnitude = { outputs } }
end

local function same_shape(a, b)
  if #a ~= #b then return false end
  for i = 1, #a do if a[i] ~= b[i] then return false end end
  return true
end

-- Is what the file holds for a target the whole of a part, in shapes that fit? nil, or what is wrong.
local function check_part(config, target, held, r)
  local wanted = shapes_of(target, r)
  for field, entry in pairs(held.entries) do
    if not same_shape(entry.shape, wanted[field]) then
      return ("'%s' has shape %s, the model and the adapter's config ask for %s"):format(entry.name, shape_text(entry.shape), shape_text(wanted[field]))
    end
    if entry.name:find("lora_embedding", 1, true) and target.kind ~= "embedding" then
      return ("'%s' is of an Embedding, the model has a Linear there"):format(entry.name)
    end
  end
  for _, field in ipairs { "A", "B", config.use_dora and "magnitude" or nil } do
    if not held.entries[field] then return ("module '%s' has no lora %s"):format(held.spelled, field) end
  end
  if held.entries.magnitude and not config.use_dora then return ("'%s' is there although use_dora is false"):format(held.entries.magnitude.name) end
  if held.entries.bias and target.kind == "embedding" then return ("'%s': an Embedding takes no bias"):format(held.entries.bias.name) end
end

-- A mixture's experts run together: an adapter has one rank and one scale for the same matrix of all of them. true, or nil, message.
local function check_experts(config, found)
  local first = {}
  for _, target in ipairs(found) do
    if target.module.is_expert then
      if config.use_dora or config.lora_bias then
        return nil, ("%s on experts of a mixture ('%s') is not built in wane"):format(config.use_dora and "DoRA" or "lora_bias", target.path)
      end
      local matrix = target.path:gsub("%.%d+(%.[^.]+)$", ".*%1")
      local other = first[matrix] or target
      first[matrix] = other
      if other.r ~= target.r or other.scale ~= target.scale then
        return nil, ("experts of one mixture need one rank and one scale: '%s' has r = %d, scale %g, '%s' has r = %d, scale %g"):format(other.path, other.r,
          other.scale, target.path, target.r, target.scale)
      end
    end
  end
  return true
end

local function rank(config, found)
  local of, message = targets.patterns(config.rank_pattern)
  if not of then return nil, "rank_pattern: " .. message end
  local alpha
  alpha, message = targets.patterns(config.alpha_pattern)
  if not alpha then return nil, "alpha_pattern: " .. message end
  for _, target in ipairs(found) do
    target.r = of(target.path, target.spelled) or config.r
    target.scale = (alpha(target.path, target.spelled) or config.lora_alpha) / (config.use_rslora and math.sqrt(target.r) or target.r)
  end
  return check_experts(config, found)
end

--- Rank and scale of every target, by its path.
-- @param config table of wane.lora.config
-- @param found table[] of wane.lora.targets' match; each gets r and scale
-- @return true|nil, string|nil message
function M.rank(config, found) return pattern.guard(rank, config, found) end

-- May an adapter of this config bring this parameter of the module at `path`?
local function may_replace(config, tree, path, spelled, field)
  if targets.is_saved(path, config.modules_to_save) or targets.is_saved(spelled, config.modules_to_save) then return true end
  if field == "bias" and config.bias ~= "none" then return true end
  return field == "weight" and (path == tree.family.head or path == tree.family.embedding)        -- save_embedding_layers
end

-- Requests for the parts of the file, each with the place that its tensor goes to.
local function plan_parts(config, found, sorted, requests, report)
  local parts = {}
  for _, target in ipairs(found) do
    local held = sorted.parts[target.path]
    sorted.parts[target.path] = nil
    if held then
      local message = check_part(config, target, held, target.r)
      if message then return nil, message end
      local part = { r = target.r, scale = target.scale, dropout = config.lora_dropout, path = target.path, spelled = held.spelled }
      parts[target.path] = part
      for field, entry in pairs(held.entries) do requests[#requests + 1] = { entry = entry, dtype = "f32", into = part, field = field } end
    else
      report.missing[#report.missing + 1] = target.spelled
    end
  end
  for _, held in pairs(sorted.parts) do report.unexpected[#report.unexpected + 1] = held.spelled end
  return parts
end

local function plan_replaced(config, tree, sorted, requests, report)
  local replaced = {}
  for path, held in pairs(sorted.replaced) do
    local shapes = {}
    for _, p in ipairs(tree:find(path):own_parameters()) do shapes[p.name] = p.shape end
    for field, entry in pairs(held.entries) do
      if not may_replace(config, tree, path, held.spelled, field) then
        report.unexpected[#report.unexpected + 1] = held.spelled .. "." .. field
      elseif not shapes[field] then
        return nil, ("'%s': the model's module has no '%s'"):format(entry.name, field)
      elseif not same_shape(entry.shape, shapes[field]) then
        return nil, ("'%s' has shape %s, the model's is %s"):format(entry.name, shape_text(entry.shape), shape_text(shapes[field]))
      else
        replaced[path] = replaced[path] or { spelled = held.spelled }
        requests[#requests + 1] = { entry = entry, dtype = #entry.shape == 1 and "f32" or nil, into = replaced[path], field = field }
      end
    end
  end
  for _, entry in ipairs(config.modules_to_save or {}) do
    local there = false
    for path, r in pairs(replaced) do there = there or targets.is_saved(path, { entry }) ~= nil or targets.is_saved(r.spelled, { entry }) ~= nil end
    if not there then report.missing[#report.missing + 1] = entry end
  end
  return replaced
end

-- Everything of an open weights file that its config asks for.
local function read_weights(tree, ix, config, where)
  config.target_modules = config.target_modules or targets.defaults[tree.family.name]
  if not config.target_modules then return nil, ("'%s': its config has no target_modules"):format(where), "WANE_E_FORMAT" end
  local found, unused, code = targets.match(tree, config)
  if not found then return nil, ("'%s': %s"):format(where, unused), code end
  local report = { missing = {}, unexpected = {}, unused = unused }
  local ok, message = M.rank(config, found)
  local sorted, parts, replaced
  local requests = {}
  if ok then sorted, message = sort_keys(tree, ix, where) end
  if sorted then parts, message = plan_parts(config, found, sorted, requests, report) end
  if parts then replaced, message = plan_replaced(config, tree, sorted, requests, report) end
  if not replaced then return nil, message:find(where, 1, true) and message or ("'%s': %s"):format(where, message), "WANE_E_FORMAT" end
  if next(parts) == nil and next(replaced) == nil then return nil, ("'%s' holds nothing of what its config targets"):format(where), "WANE_E_FORMAT" end
  local tensors
  tensors, message, code = require("wane.loader").load({ path = where, index = ix }, requests, { io = "read" })
  if not tensors then return nil, message, code end
  for i, request in ipairs(requests) do request.into[request.field] = tensors[i] end
  table.sort(report.missing)
  table.sort(report.unexpected)
  return { config = config, parts = parts, replaced = replaced, report = report }
end

--- Reads an adapter's folder for a model.
-- @param model wane.Model
-- @param dir string
-- @return table|nil { config, parts = { path = part }, replaced = { path = { weight, bias, spelled } }, report = { missing, unexpected,
--   unused } }: modules that the file lacks, what it holds beyond its config, entries of target_modules that name nothing;
--   string|nil message, string|nil code
function M.read(model, dir)
  local config, ix, code = open(dir)
  if not config then return nil, ix, code end
  local adapter, message
  adapter, message, code = read_weights(model, ix, config, ix.path)
  ix:close()
  return adapter, message, code
end

--- What a folder's files say of its adapter, without its base model.
-- @param dir string
-- @return table|nil { config, tensors = { { name, dtype, shape, bytes } … }, parameters, bytes, file }, string|nil message, string|nil code
function M.describe(dir)
  local config, ix, code = open(dir)
  if not config then return nil, ix, code end
  local out = { config = config, tensors = {}, parameters = 0, bytes = 0, file = ix.path:match "[^/]*$" }
  for i = 0, ix:count() - 1 do
    local e = ix:entry(i)
    out.tensors[#out.tensors + 1] = { name = e.name, dtype = e.dtype or e.file_dtype, shape = e.shape, bytes = e.bytes }
    out.parameters, out.bytes = out.parameters + count.numel(e.shape), out.bytes + e.bytes
  end
  ix:close()
  return out
end

-- ---------------------------------------------------------------- writing

-- Names of a part's tensors in a file.
local function part_names(part, embedding)
  local stem = PREFIX .. part.spelled
  local names = { magnitude = stem .. ".lora_magnitude_vector", bias = stem .. ".lora_B.bias" }
  names.A = stem .. (embedding and ".lora_embedding_A" or ".lora_A.weight")
  names.B = stem .. (embedding and ".lora_embedding_B" or ".lora_B.weight")
  return names
end

--- Writes an adapter as PEFT does. The config is written last.
-- @param model wane.Model
-- @param adapter table config, parts, replaced
-- @param dir string made if it is not there
-- @return true|nil, string|nil message, string|nil code
function M.write(model, adapter, dir)
  local tensors = {}
  for path, part in pairs(adapter.parts) do
    for field, name in pairs(part_names(part, model:find(path).in_features == nil)) do tensors[name] = part[field] end
  end
  for path, replaced in pairs(adapter.replaced) do
    local wrapped = adapter.parts[path] and ".base_layer" or ""
    for _, field in ipairs { "weight", "bias" } do
      if replaced[field] then tensors[PREFIX .. replaced.spelled .. wrapped .. "." .. field] = replaced[field] end
    end
  end
  local status = C.wane_path_make(dir)
  if status < 0 then return core.failure(status) end
  local ok, message, code = require("wane.checkpoint").write_safetensors(dir .. "/" .. WEIGHTS[1], tensors, { format = "pt" })
  if not ok then return nil, message, code end
  return require("wane.checkpoint.writer").write_text(dir .. "/adapter_config.json", config_file.text(adapter.config))
end

return M
