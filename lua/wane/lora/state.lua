--- The adapters of one model and what is in force: kept in model.lora. Modules are told by `refresh` alone: which parts add to their
-- results, and which of their parameters stand replaced (by modules_to_save, trained biases, or a merge).
-- @module wane.lora.state
local core = require "wane.core"
local adapter_layer = require "wane.nn.adapter"
local F = require "wane.nn.functional"

local M = {}

---@class wane.LoraState
---@field order string[] names in the order in which they came
---@field adapters table<string, table> by name: { name, config, parts, replaced, factor, report }
---@field active string[]
---@field merged string[] names, in the order of merging
---@field results table<string, table> by path: parameters that merging made
---@field base table<string, table> by path: the model's own parameters where others stand in their place
local State = {}
State.__index = State

--- The state of a model; made at the first call.
-- @param model wane.Model
-- @return wane.LoraState
function M.of(model)
  if type(model) ~= "table" or not model.family then core.raise("lora: expected a model, found a %s", type(model)) end
  local state = rawget(model, "lora")
  if not state then
    state = setmetatable({ order = {}, adapters = {}, active = {}, merged = {}, results = {}, base = {}, disabled = false }, State)
    model.lora = state
  end
  return state
end

local function position(list, name)
  for i, entry in ipairs(list) do if entry == name then return i end end
end

--- Is this adapter merged?
-- @param name string
-- @return boolean
function State:is_merged(name) return position(self.merged, name) ~= nil end

--- The adapter of a name; raises with the names there are.
-- @param name string
function State:find(name)
  local adapter = self.adapters[name]
  if not adapter then
    core.raise("lora: there is no adapter '%s'%s", tostring(name), #self.order > 0 and "; there are: " .. table.concat(self.order, ", ") or " and no other")
  end
  return adapter
end

--- A name, a list of names, or nil (for `default`) as a checked list.
-- @return string[]
function State:names(given, default)
  local list = type(given) == "string" and { given } or given or default
  if type(list) ~= "table" then core.raise("lora: expected an adapter's name or a list of names, found a %s", type(given)) end
  local seen, names = {}, {}
  for i, name in ipairs(list) do
    self:find(name)
    if seen[name] then core.raise("lora: adapter '%s' is named twice", name) end
    seen[name], names[i] = true, name
  end
  return names
end

--- Adds an adapter under a new name. The first one becomes active.
function State:add(name, adapter)
  adapter.name, adapter.factor = name, 1
  for _, part in pairs(adapter.parts) do part.name, part.plain_scale = name, part.scale end
  self.adapters[name] = adapter
  self.order[#self.order + 1] = name
  if #self.order == 1 then self.active = { name } end
end

-- ---------------------------------------------------------------- what is in force

-- The adapters that replace parameters now, checked for disputes: names of the active and of the merged.
local function in_force(self)
  local list = {}
  for _, name in ipairs(self.disabled and {} or self.merged) do list[#list + 1] = name end
  for _, name in ipairs(self.disabled and {} or self.active) do if not self:is_merged(name) then list[#list + 1] = name end end
  return list
end

-- What stands where a parameter of its own stood: { path = { field = tensor } }. Raises where two adapters bring the same one.
local function wanted_parameters(self)
  local wanted, owner = {}, {}
  for _, name in ipairs(in_force(self)) do
    for path, replaced in pairs(self.adapters[name].replaced) do
      wanted[path], owner[path] = wanted[path] or {}, owner[path] or {}
      for _, field in ipairs { "weight", "bias" } do
        if replaced[field] then
          if owner[path][field] then
            core.raise("lora: '%s' and '%s' both bring a %s of '%s'; only one of them can be active", owner[path][field], name, field, path)
          end
          wanted[path][field], owner[path][field] = replaced[field], name
        end
      end
    end
  end
  for path, result in pairs(self.disabled and {} or self.results) do
    wanted[path] = wanted[path] or {}
    for field, tensor in pairs(result) do
      if wanted[path][field] and not self:is_merged(owner[path][field]) then
        core.raise("lora: '%s' brings a %s of '%s', which another adapter was merged into: unmerge that first", owner[path][field], field, path)
      end
      wanted[path][field] = tensor
    end
  end
  return wanted
end

-- Active parts by path, in the order of the active names. Raises for a DoRA part on a weight that a merge changed.
local function wanted_parts(self)
  local wanted = {}
  for _, name in ipairs(self.disabled and {} or self.active) do
    for path, part in pairs(self:is_merged(name) and {} or self.adapters[name].parts) do
      if part.magnitude and self.results[path] then
        core.raise("lora: '%s' uses DoRA, whose norm is that of the unmerged weight of '%s': unmerge the others first, or merge it too", name, path)
      end
      wanted[path] = wanted[path] or {}
      table.insert(wanted[path], part)
    end
  end
  return wanted
end

--- The model's own parameter, whatever stands in its place now.
-- @param module wane.Module
-- @param path string
-- @param field string
-- @return wane.Tensor|nil
function State:own(module, path, field)
  local kept = self.base[path]
  if kept and kept[field] then return kept[field] end
  return rawget(module, field)
end

--- The parameter that adapters are merged into: what one of them brings, else the model's own.
-- @param names string[]
function State:merge_base(module, path, field, names)
  for _, name in ipairs(names) do
    local replaced = self.adapters[name].replaced[path]
    if replaced and replaced[field] then return replaced[field] end
  end
  return self:own(module, path, field)
end

--- Raises where an adapter is in force beside the weights: whoever writes weights alone would leave it out.
-- @param what string the caller's name for messages
function State:refuse_beside(what)
  for _, name in ipairs(self.disabled and {} or self.active) do
    if not self:is_merged(name) then
      core.raise("%s: adapter '%s' is active beside the weights: lora.merge writes it into them, lora.disable leaves it out, lora.save writes it alone",
        what, name)
    end
  end
end

-- Puts the parameters in force into a module; its own ones are kept aside meanwhile.
local function place(self, module, path, wanted)
  local kept = self.base[path] or {}
  for field, tensor in pairs(wanted or {}) do
    if not kept[field] then kept[field] = rawget(module, field) end
    module[field] = tensor
  end
  for field, own in pairs(kept) do
    if not (wanted and wanted[field]) then module[field], kept[field] = own, nil end
  end
  self.base[path] = next(kept) and kept or nil
end

--- Tells every module what is in force. Raises, changing nothing, where the adapters cannot be in force together.
-- @param model wane.Model
function State:refresh(model)
  local parameters, parts = wanted_parameters(self), wanted_parts(self)
  for path, module in model:modules() do
    if parameters[path] or self.base[path] then place(self, module, path, parameters[path]) end
    module.adapters = parts[path]
  end
end

--- Sets the active adapters.
-- @param model wane.Model
-- @param names string[]
function State:activate(model, names)
  local before = self.active
  self.active = names
  local ok, message = pcall(self.refresh, self, model)
  if not ok then
    self.active = before
    core.raise("%s", (tostring(message):gsub("^.-: lora: ", "lora: ")))
  end
end

-- ---------------------------------------------------------------- letting go

local fields = { "A", "B", "bias", "magnitude" }

--- Every tensor of an adapter: fn(tensor, path of its module, field, is_part).
function M.each_tensor(adapter, fn)
  for path, part in pairs(adapter.parts) do
    for _, field in ipairs(fields) do if part[field] then fn(part[field], path, field, true) end end
  end
  for path, replaced in pairs(adapter.replaced) do
    for _, field in ipairs { "weight", "bias" } do if replaced[field] then fn(replaced[field], path, field, false) end end
  end
end

--- Makes an adapter's tensors leaves (wane.autograd), or no longer so. All of them are f32 from then on: trained weights are.
-- @param name string
-- @param on boolean
function State:train(model, name, on)
  local adapter = self:find(name)
  M.each_tensor(adapter, function(tensor, path, field, is_part)
    if on and tensor:dtype() ~= "f32" then
      local holder = is_part and adapter.parts[path] or adapter.replaced[path]
      holder[field] = F.outside_scopes(F.cast, tensor, core.C.WANE_F32)
      tensor:close()
      tensor = holder[field]
    end
    tensor.requires_grad, tensor.grad = on or nil, nil
  end)
  self:refresh(model)
end

--- Removes an adapter that is not in force and frees its tensors, but for those in `kept` (a set).
function State:drop(name, kept)
  local adapter = self:find(name)
  for _, part in pairs(adapter.parts) do adapter_layer.forget(part) end
  M.each_tensor(adapter, function(tensor) if not (kept and kept[tensor]) then tensor:close() end end)
  self.adapters[name] = nil
  for _, list in ipairs { self.order, self.active, self.merged } do
    local i = position(list, name)
    if i then table.remove(list, i) end
  end
end

--- Frees all adapters; the model is its base again.
-- @param model wane.Model
function State:close(model)
  self.disabled = true
  self:refresh(model)
  for _, result in pairs(self.results) do for _, tensor in pairs(result) do tensor:close() end end
  for i = #self.order, 1, -1 do self:drop(self.order[i]) end
  model.lora = nil
end

return M
