--- adapter_config.json: read, checked, completed and written. What changes an adapter's arithmetic and is not built here is refused by
-- its name; what does not (training settings, other methods' nulls) is carried along.
-- Source: peft tuners/lora/config.py.
-- @module wane.lora.config
local json = require "wane.checkpoint.json"

local M = {}

-- Fields that wane obeys: PEFT's default, and the Lua type (or types) that a value must have.
local fields = {
  { "r", 8, "number" }, { "lora_alpha", 8, "number" }, { "lora_dropout", 0, "number" }, { "bias", "none", "string" },
  { "target_modules", nil, "table", "string" }, { "exclude_modules", nil, "table", "string" }, { "modules_to_save", nil, "table" },
  { "rank_pattern", nil, "table" }, { "alpha_pattern", nil, "table" }, { "layers_to_transform", nil, "table", "number" },
  { "layers_pattern", nil, "table", "string" }, { "use_rslora", false, "boolean" }, { "use_dora", false, "boolean" },
  { "lora_bias", false, "boolean" }, { "fan_in_fan_out", false, "boolean" }, { "init_lora_weights", true, "boolean", "string" },
  { "base_model_name_or_path", nil, "string" }, { "task_type", nil, "string" }, { "revision", nil, "string" },
}

-- Fields that change what an adapter computes in ways that wane does not.
local refused = { "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "use_qalora",
                  "use_bdlora", "monteclora_config", "kasa_config", "velora_config" }

-- Beginnings of the names of initialisations that change the base model's own weights: such an adapter does not fit the base that it names.
local changes_base = { "pissa", "olora", "corda", "loftq", "lora_ga" }

local function is_set(value) return value ~= nil and value ~= false and not (type(value) == "table" and next(value) == nil) end

local function positive(value) return type(value) == "number" and value > 0 and value % 1 == 0 and value < 2 ^ 31 end

local function finite(value) return type(value) == "number" and value == value and math.abs(value) ~= math.huge end

local function check_types(config)
  for _, f in ipairs(fields) do
    local value = config[f[1]]
    if value ~= nil and type(value) ~= f[3] and type(value) ~= f[4] then
      return ("'%s': expected a %s%s, found a %s"):format(f[1], f[3], f[4] and " or a " .. f[4] or "", type(value))
    end
  end
  for _, key in ipairs { "target_modules", "exclude_modules", "modules_to_save", "layers_pattern" } do
    for i, entry in pairs(type(config[key]) == "table" and config[key] or {}) do
      if type(i) ~= "number" or type(entry) ~= "string" or entry == "" then return ("'%s': expected a list of names"):format(key) end
    end
  end
  for _, i in pairs(type(config.layers_to_transform) == "table" and config.layers_to_transform or {}) do
    if type(i) ~= "number" then return "'layers_to_transform': expected a list of numbers" end
  end
end

local function check_values(config)
  if not positive(config.r) then return ("'r': expected a whole number above 0, found %s"):format(tostring(config.r)) end
  if not finite(config.lora_alpha) then return "'lora_alpha': expected a finite number" end
  if not finite(config.lora_dropout) or config.lora_dropout < 0 or config.lora_dropout >= 1 then return "'lora_dropout': expected a number in [0, 1)" end
  if config.bias ~= "none" and config.bias ~= "all" and config.bias ~= "lora_only" then
    return ("'bias': expected none, all or lora_only, found '%s'"):format(config.bias)
  end
  if config.use_dora and config.lora_bias then return "'lora_bias' does not go with 'use_dora'" end
  for key, r in pairs(config.rank_pattern or {}) do
    if type(key) ~= "string" or not positive(r) then
      return ("'rank_pattern': expected names and whole numbers above 0, found %s = %s"):format(tostring(key), tostring(r))
    end
  end
  for key, alpha in pairs(config.alpha_pattern or {}) do
    if type(key) ~= "string" or not finite(alpha) then
      return ("'alpha_pattern': expected names and numbers, found %s = %s"):format(tostring(key), tostring(alpha))
    end
  end
end

--- Checks a config and fills in PEFT's defaults.
-- @param given table adapter_config.json's fields, nulls removed
-- @return table|nil the fields that wane obeys, the others in `others`; string|nil message, string|nil code
function M.complete(given)
  local kind = given.peft_type
  if kind ~= nil and kind ~= "LORA" then
    return nil, ("peft_type '%s' is not built in wane: LORA is"):format(tostring(kind)), "WANE_E_UNSUPPORTED"
  end
  for _, key in ipairs(refused) do
    if is_set(given[key]) then return nil, ("'%s' changes what the adapter computes and is not built in wane"):format(key), "WANE_E_UNSUPPORTED" end
  end
  local config, own = { others = {} }, { peft_type = true, inference_mode = true }
  for _, f in ipairs(fields) do
    local key, value = f[1], given[f[1]]
    own[key] = true
    local empty = type(value) == "table" and next(value) == nil and key ~= "target_modules"       -- which says no module; wane.lora.targets refuses it
    if value == nil or empty then value = f[2] end
    config[key] = value
  end
  local message = check_types(config) or check_values(config)
  if message then return nil, message, "WANE_E_FORMAT" end
  for key, value in pairs(given) do
    if not own[key] and is_set(value) then config.others[key] = value end
  end
  return config
end

--- Reads a folder's adapter_config.json.
-- @param dir string
-- @return table|nil config of M.complete, string|nil message, string|nil code
function M.read(dir)
  local path = dir .. "/adapter_config.json"
  local given, message, code = json.read(path)
  if not given then return nil, message, code end
  if given.peft_type == nil then return nil, ("'%s': there is no 'peft_type': this is no adapter's config"):format(path), "WANE_E_FORMAT" end
  local config
  config, message, code = M.complete(given)
  if not config then return nil, ("'%s': %s"):format(path, message), code end
  local init = tostring(config.init_lora_weights)
  for _, name in ipairs(changes_base) do
    if init:sub(1, #name) == name then
      return nil, ("'%s': init_lora_weights '%s' changed the weights of the base model, which this folder does not hold; convert the adapter with peft's "
        .. "save_pretrained(path_initial_model_for_weight_conversion = …)"):format(path, init), "WANE_E_UNSUPPORTED"
    end
  end
  return config
end

-- A list stays one when it is empty.
local function listed(value) return type(value) == "table" and #value > 0 and setmetatable(value, json.list) or value end

--- The text of adapter_config.json, keys sorted as PEFT writes them.
-- @param config table of M.complete
-- @return string
function M.text(config)
  local out = { peft_type = "LORA", inference_mode = true }
  for key, value in pairs(config.others) do out[key] = value end
  for _, f in ipairs(fields) do out[f[1]] = listed(config[f[1]]) end
  out.rank_pattern, out.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
  return json.encode(out) .. "\n"
end

return M
