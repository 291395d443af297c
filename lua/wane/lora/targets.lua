--- Which modules an adapter changes: PEFT's rules for target_modules and its companions, on the paths that users know.
-- Source: peft tuners/tuners_utils.py check_target_module_exists, _maybe_include_all_linear_layers; utils/other.py get_pattern_key.
-- @module wane.lora.targets
local names = require "wane.checkpoint.names"
local pattern = require "wane.lora.pattern"

local M = {}

local qv, fused = { "q_proj", "v_proj" }, { "query_key_value" }

--- The Linears that an adapter changes when nobody says, by family (wane.models): PEFT's own defaults.
-- Source: peft utils/constants.py, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.
---@type table<string, string[]>
M.defaults = {
  bloom = fused, gpt_neox = fused, falcon = fused,
  gpt2 = { "c_attn" }, t5 = { "q", "v" }, phi = { "q_proj", "v_proj", "fc1", "fc2" }, phi3 = { "qkv_proj" },
  gptj = qv, gpt_neo = qv, opt = qv, llama = qv, mistral = qv, mixtral = qv, qwen2 = qv, qwen3 = qv, qwen3_moe = qv,
  gemma2 = qv, gemma3 = qv, gemma3_text = qv,
}

-- ---------------------------------------------------------------- spellings

--- The paths under which upstream's versions know a module, the canonical one first: GPT-NeoX's head is `embed_out` and `lm_head`,
-- a model without its head leaves out the prefix. What the tree has as another module's path is no spelling: files of a T5 may call the embedding
-- `lm_head`, but the model's own lm_head is meant by it.
-- @param tree wane.Module a model or a tree of wane.models.build
-- @param path string canonical
-- @return string[]
function M.spellings(tree, path)
  local list = {}
  if path == "" then return list end
  for _, name in ipairs(names.spellings(tree.family.name, path .. ".weight")) do
    local spelled = name:match "^(.*)%.weight$"
    if spelled and not spelled:find "^module%." and (spelled == path or not tree:find(spelled)) then list[#list + 1] = spelled end
  end
  return list
end

--- Every spelling of every module's path, to its canonical path.
-- @param tree wane.Module
-- @return table<string, string>
function M.paths(tree)
  local map = {}
  for path in tree:modules() do
    for i, spelled in ipairs(M.spellings(tree, path)) do
      if i == 1 or not map[spelled] then map[spelled] = path end
    end
  end
  return map
end

-- ---------------------------------------------------------------- matching

local function is_entry(path, entry) return path == entry or path:sub(-#entry - 1) == "." .. entry end

-- Adapters go on Linear and Embedding.
local function kind_of(module)
  return module.in_features and "linear" or module.type_name == "Embedding" and "embedding" or nil
end

-- The layer's number in a path: of the first "name.7." behind a dot, or behind one of the names given (regular expressions).
local function layer_index(path, layers)
  if not layers then return tonumber(path:match "%.[^.]*%.(%d+)%.") end
  for from, index in path:gmatch "()%.(%d+)%." do
    for _, p in ipairs(layers) do
      if p:matches(path:sub(1, from - 1)) then return tonumber(index) end
    end
  end
end

local function list_of(value) return type(value) == "table" and value or value ~= nil and { value } or nil end

-- Compiles what of a config is patterns. nil, message for a bad one.
local function compile(o)
  local compiled, message = {}
  for _, key in ipairs { "target_modules", "exclude_modules" } do
    if type(o[key]) == "string" and not (key == "target_modules" and o[key]:lower() == "all-linear") then
      compiled[key], message = pattern.compile(o[key])
      if not compiled[key] then return nil, key .. ": " .. message end
    end
  end
  if o.layers_pattern and #o.layers_pattern > 0 then
    compiled.layers = {}
    for i, text in ipairs(list_of(o.layers_pattern)) do
      compiled.layers[i], message = pattern.compile("(?:.*\\.)?(?:" .. text .. ")")
      if not compiled.layers[i] then return nil, "layers_pattern: " .. message end
    end
  end
  if o.layers_to_transform and #list_of(o.layers_to_transform) > 0 then
    compiled.wanted = {}
    for _, i in ipairs(list_of(o.layers_to_transform)) do compiled.wanted[i] = true end
  end
  return compiled
end

--- Is the module at `path` one of, or in one of, modules_to_save? An entry names every path that ends in it, within a name too ("norm" is
-- input_layernorm as well): peft utils/other.py _set_trainable.
-- @param path string
-- @param list string[]|nil
-- @return string|nil the entry
function M.is_saved(path, list)
  for _, entry in ipairs(list or {}) do
    if (path .. "."):find(entry .. ".", 1, true) then return entry end
  end
end

local function excluded(path, o, compiled)
  if compiled.exclude_modules and compiled.exclude_modules:matches(path) then return true end
  for _, entry in ipairs(type(o.exclude_modules) == "table" and o.exclude_modules or {}) do
    if is_entry(path, entry) then return true end
  end
  return M.is_saved(path, o.modules_to_save) ~= nil
end

-- Does a list of targets name this path? Notes in `used` which entry did.
local function named(path, o, compiled, used)
  for _, entry in ipairs(o.target_modules) do
    if is_entry(path, entry) then
      used[entry] = true
      if path == entry or not compiled.wanted or compiled.wanted[layer_index(path, compiled.layers)] then return true end
    end
  end
  return false
end

-- The spelling of `path` under which the targets name it, or nil.
local function spelling_named(tree, path, module, o, compiled, used)
  local hit, left_out
  for _, name in ipairs(M.spellings(tree, path)) do
    left_out = left_out or excluded(name, o, compiled)
    if compiled.target_modules then
      hit = hit or compiled.target_modules:matches(name) and name
    elseif type(o.target_modules) == "table" then
      hit = hit or named(name, o, compiled, used) and name
    else                                                                        -- all-linear
      hit = module.in_features and path ~= tree.family.head and path
    end
  end
  return hit and not left_out and hit or nil
end

local function match(tree, o)
  local wanted = o.target_modules
  if (type(wanted) ~= "string" and type(wanted) ~= "table") or #wanted == 0 then         -- not every Linear: an unset variable would train them all
    return nil, "target_modules names nothing: expected a list of names, a regular expression or 'all-linear'", "WANE_E_ARG"
  end
  local compiled, message = compile(o)
  if not compiled then return nil, message, "WANE_E_FORMAT" end
  local found, used = {}, {}
  for path, module in tree:modules() do
    local kind = kind_of(module)
    if kind or (type(o.target_modules) == "table" and module.type_name) then
      local spelled = spelling_named(tree, path, module, o, compiled, used)
      if spelled and not kind then
        return nil, ("target_modules: '%s' is a %s; LoRA goes on Linear and Embedding"):format(spelled, module.type_name), "WANE_E_ARG"
      end
      if spelled then found[#found + 1] = { path = path, spelled = spelled, module = module, kind = kind } end
    end
  end
  local unused = {}
  for _, entry in ipairs(type(o.target_modules) == "table" and o.target_modules or {}) do
    if not used[entry] then unused[#unused + 1] = entry end
  end
  if #found > 0 then return found, unused end
  local said = type(o.target_modules) == "table" and table.concat(o.target_modules, ", ") or o.target_modules
  return nil, ("target_modules: nothing in this %s model is called %s%s; print(model) draws the tree"):format(tree.family.name, said,
    (compiled.wanted or o.exclude_modules) and " once layers_to_transform and exclude_modules are heeded" or ""), "WANE_E_ARG"
end

--- The modules that a config's targets name, in the order of the tree.
-- @param tree wane.Module a model, or a tree of wane.models.build (values are not needed)
-- @param o table PEFT's target_modules (list, pattern or "all-linear"), exclude_modules, modules_to_save, layers_to_transform, layers_pattern
-- @return table[]|nil list of { path, spelled = as the targets call it, module, kind = "linear" | "embedding" }; string[]|string entries of a
--   list that named nothing, or the message; string|nil code. No targets, targets that name nothing at all, or another kind of module, are an error.
function M.match(tree, o) return pattern.guard(match, tree, o) end

-- ---------------------------------------------------------------- rank_pattern, alpha_pattern

--- What a rank_pattern or alpha_pattern says of paths: the value of the first key K, in their alphabetical order (peft writes its
-- files sorted), such that `(.*\.)?(K)` is all of the path.
-- @param map table<string, number>|nil
-- @return function(path, spelled)|nil -> number|nil; string|nil message for a bad pattern
function M.patterns(map)
  local list = {}
  for key, value in pairs(map or {}) do list[#list + 1] = { key = key, value = value } end
  table.sort(list, function(a, b) return a.key < b.key end)
  for _, entry in ipairs(list) do
    local message
    entry.pattern, message = pattern.compile("(?:.*\\.)?(?:" .. entry.key .. ")")
    if not entry.pattern then return nil, message end
  end
  return function(path, spelled)
    for _, entry in ipairs(list) do
      if entry.pattern:matches(path) or (spelled ~= path and entry.pattern:matches(spelled)) then return entry.value end
    end
  end
end

return M
