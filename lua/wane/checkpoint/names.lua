--- Names of tensors. The canonical ones are transformers 4's ("model.layers.0.mlp.up_proj.weight", "embed_out.weight"); what files
-- call them instead is resolved here: no prefix, transformers 5's `lm_head` for GPT-NeoX, a wrapper's `module.`. GGUF's: gguf_names.lua.
-- @module wane.checkpoint.names
local M = {}

local registered = {}

--- Tells how a family's tensors are called. Families without an entry are read under their files' own names.
-- @param model_type string
-- @param rules table { prefix = "model" (may have several parts: "model.decoder"), head = "lm_head", heads = nil | other spellings of
--   the head, spellings = nil | of other modules: { path = { other paths } }, buffers = nil | patterns of buffers in its files,
--   transposed = nil | patterns of weights that its files hold [in, out], nested = nil | { { "model.", "language_model.model." } }: canonical
--   beginnings and what files say instead }; wane.models.register passes its families here
function M.register(model_type, rules)
  local canonical = {}                                     -- the path of each of `spellings`
  for path, others in pairs(rules.spellings or {}) do
    for _, other in ipairs(others) do canonical[other] = path end
  end
  registered[model_type] = { prefix = rules.prefix, head = rules.head, heads = rules.heads or {}, spellings = rules.spellings or {},
                             canonical = canonical, buffers = rules.buffers or {}, transposed = rules.transposed or {},
                             nested = rules.nested or {} }
end

-- The rules of a model_type, or nil. The families tell theirs when they are loaded.
local function rules_of(model_type)
  require "wane.models"
  return registered[model_type]
end

local function any(patterns, name)
  for _, pattern in ipairs(patterns) do if name:find(pattern) then return true end end
  return false
end

-- Buffers that checkpoints of any family may carry and that models make themselves.
local ignorable = { "%.rotary_emb%.inv_freq$", "%.masked_bias$" }

--- Is this a buffer that no model needs?
-- @param name string a file's
-- @param model_type string|nil whose own buffers count too (a causal mask called `attn.bias` is one family's buffer, another's bias)
function M.is_ignorable(name, model_type)
  name = "." .. name
  local family = model_type and rules_of(model_type)
  return any(ignorable, name) or (family and any(family.buffers, name)) or false
end

--- Do files of this family hold the weight [in, out] (GPT-2's Conv1D), the other way round than a Linear's? Quantized weights never
-- are: bitsandbytes transposes before it quantizes.
-- @param name string canonical
function M.is_transposed(model_type, name)
  local family = rules_of(model_type)
  return family ~= nil and any(family.transposed, name)
end

-- ---------------------------------------------------------------- files of transformers

--- Spellings under which a file may hold a canonical name, the likeliest first.
-- @param model_type string
-- @return string[]
function M.spellings(model_type, name)
  local list, family = { name }, rules_of(model_type)
  if family then
    local head = family.head .. "."
    if name:sub(1, #head) == head then
      for _, other in ipairs(family.heads) do list[#list + 1] = other .. "." .. name:sub(#head + 1) end
    end
    local prefix = (family.prefix or "") .. "."
    if #prefix > 1 and name:sub(1, #prefix) == prefix then
      local rest = name
      for part in prefix:gmatch "[^.]+%." do                -- "model.decoder.x": "decoder.x", "x"
        rest = rest:sub(#part + 1)
        list[#list + 1] = rest
      end
    end
    local path, suffix = name:match "^(.*)(%.[^.]+)$"
    for _, other in ipairs(family.spellings[path] or {}) do list[#list + 1] = other .. suffix end
    for _, n in ipairs(family.nested) do
      if name:sub(1, #n[1]) == n[1] then list[#list + 1] = n[2] .. name:sub(#n[1] + 1) end
    end
  end
  for i = 1, #list do list[#list + 1] = "module." .. list[i] end
  return list
end

--- What a file leaves out of its names' prefix: "" for nothing, "model." where it says "layers.0…" instead of "model.layers.0…".
-- @param model_type string
-- @param each function() -> string|nil an iterator over the file's names
function M.missing_prefix(model_type, each)
  local prefix = (M.prefix(model_type) or "") .. "."
  if prefix == "." then return "" end
  local shortest = prefix
  for name in each do
    name = name:gsub("^module%.", "")
    local left_out, rest = "", prefix
    while #rest > 0 and #left_out < #shortest do
      if name:sub(1, #rest) == rest then shortest = left_out end
      local part = rest:match "^[^.]+%."
      left_out, rest = left_out .. part, rest:sub(#part + 1)
    end
    if shortest == "" then break end
  end
  return shortest
end

--- The canonical name of a file's spelling.
-- @param model_type string
-- @param name string
-- @param missing string what the file leaves out of the prefix (see missing_prefix)
function M.canonical(model_type, name, missing)
  name = name:gsub("^module%.", "")
  local family = rules_of(model_type)
  if not family then return name end
  for _, n in ipairs(family.nested) do
    if name:sub(1, #n[2]) == n[2] then return n[1] .. name:sub(#n[2] + 1) end
  end
  local first, rest = name:match "^([^.]+)%.(.*)$"
  if not first or first == family.head then return name end
  local path, suffix = name:match "^(.*)(%.[^.]+)$"
  if family.canonical[path] then return family.canonical[path] .. suffix end
  for _, other in ipairs(family.heads) do if first == other then return family.head .. "." .. rest end end
  return missing .. name
end

--- A skip list for a file's config: where it names the output head, under every name that upstream's versions know it by.
-- @param model_type string
-- @param skip string[]|nil
-- @return string[]|nil
function M.skip_list(model_type, skip)
  local family = rules_of(model_type)
  if not skip or not family then return skip end
  local list, there = {}, {}
  for i, name in ipairs(skip) do list[i], there[name] = name, true end
  local heads, named = { family.head }, there[family.head]
  for _, other in ipairs(family.heads) do heads[#heads + 1], named = other, named or there[other] end
  for _, name in ipairs(named and heads or {}) do
    if not there[name] then list[#list + 1] = name end
  end
  return list
end

--- The base model's prefix of a family, or nil.
function M.prefix(model_type)
  local family = rules_of(model_type)
  return family and family.prefix
end

return M
