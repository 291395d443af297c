--- Families of models. One file each: a table { name, architectures, embedding, head, build(config) } and what docs/adding-a-family.md lists.
-- `wane.models.register(family or path)` adds one from outside the tree; docs/adding-a-family.md walks through it.
-- @module wane.models
local core = require "wane.core"
local check = require "wane.models.check"

local M = {}

local families, by_architecture = {}, {}

--- Adds a family: its table, or the path of a Lua file that returns one. A later registration of the same name replaces the earlier.
-- @param family table|string
-- @return table the family
function M.register(family)
  if type(family) == "string" then
    local chunk, message = loadfile(family)
    if not chunk then core.raise("models.register: %s", message) end
    family = chunk()
  end
  for _, key in ipairs { "name", "architectures", "embedding", "head", "build" } do
    if type(family) ~= "table" or family[key] == nil then core.raise("models.register: the family needs a field '%s' (docs/adding-a-family.md)", key) end
  end
  for _, name in ipairs { family.name, unpack(family.model_types or {}) } do
    families[name] = family
    require("wane.checkpoint.names").register(name, family)           -- so that files may spell its tensors without prefix
  end
  for _, architecture in ipairs(family.architectures) do by_architecture[architecture] = family end
  return family
end

--- Names of the families there are, sorted.
-- @return string[]
function M.list()
  local names = {}
  for name in pairs(families) do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- The family of a config.json: by its architectures, else by its model_type.
-- @param config table
-- @return table|nil family, string|nil message, string|nil code
function M.find(config)
  local architectures = type(config.architectures) == "table" and config.architectures or { config.architectures }
  for _, architecture in ipairs(architectures) do
    if by_architecture[architecture] then return by_architecture[architecture] end
  end
  if config.model_type and families[config.model_type] then return families[config.model_type] end
  return nil, ("no family for architecture '%s' (model_type '%s'); there are: %s. " ..
    "To add one: wane.models.register(\"family.lua\"), see docs/adding-a-family.md"):format(
    tostring(architectures[1]), tostring(config.model_type), table.concat(M.list(), ", ")), "WANE_E_UNSUPPORTED"
end

--- The architecture under which a multimodal config's text part is a model of its own; nil for configs that are no such thing.
-- @param config table
-- @return string|nil architecture, string|nil model_type
function M.text_part(config)
  local family = type(config.text_config) == "table" and M.find(config)
  if family and family.text_architecture then return family.text_architecture, family.name end
end

--- Builds the module tree of a config, without values. The config is copied; what it leaves unsaid is filled in.
-- @param config table
-- @return wane.Module|nil tree, string|nil message, string|nil code
function M.build(config)
  local family, message, code = M.find(config)
  if not family then return nil, message, code end
  local c, null = {}, require("cjson").null
  for k, v in pairs(config) do if v ~= null then c[k] = v end end
  for k, v in pairs(type(c.text_config) == "table" and c.text_config or {}) do if v ~= null then c[k] = v end end
  for theirs, ours in pairs(family.aliases or {}) do                   -- GPT-2's n_embd is hidden_size …
    if c[theirs] ~= nil then c[ours] = c[theirs] end
  end
  for k, v in pairs(family.sizes or {}) do if c[k] == nil then c[k] = v end end
  message = check.values(c)
  if message then return nil, message, "WANE_E_FORMAT" end
  for _, key in ipairs { "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads" } do
    if family.required ~= false and type(c[key]) ~= "number" then
      return nil, ("config: '%s' is missing or no number (family %s)"):format(key, family.name), "WANE_E_FORMAT"
    end
  end
  local ok, tree, wrong = pcall(function()
    if family.defaults then family.defaults(c) end
    local reason = check.relations(c)
    if reason then return nil, reason end
    return family.build(c)
  end)
  if not ok then
    local reason = tostring(tree):gsub("^[^\n]-%.lua:%d+: ", "")
    return nil, ("config: the %s model could not be built from it: %s"):format(family.name, reason), "WANE_E_FORMAT"
  end
  if not tree then return nil, wrong, "WANE_E_FORMAT" end
  tree.config, tree.family = c, family
  return tree
end

for _, name in ipairs {
  "llama", "gpt_neox", "t5",
  "bloom", "gptj", "opt", "gpt2", "gpt_neo", "falcon", "phi",
  "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe",
} do M.register(require("wane.models." .. name)) end

return M
