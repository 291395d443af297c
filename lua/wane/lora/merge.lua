--- Merging adapters into weights, and taking them out again.
--
-- A merge makes a new weight from the base's own: W + sum of the merged adapters' changes, in float32, then in the base's dtype; a
-- quantized base is dequantized, changed and quantized again by its own scheme, once for all adapters together. The base's own tensor is
-- kept, so unmerging restores its very bytes, quantized or not; `unload` lets it go. A weight that is tied to another's is merged into a
-- copy: the other keeps the base's values, and the model computes what it computed unmerged (PEFT changes both).
-- @module wane.lora.merge
local core = require "wane.core"
local F = require "wane.nn.functional"
local Tensor = require "wane.tensor"
local adapter_layer = require "wane.nn.adapter"
local quant = require "wane.quant"

local M = {}

local floats = { f32 = true, f16 = true, bf16 = true }
local quantized = { nf4 = true, fp4 = true, int8 = true, ["int8-blockwise"] = true, ["int8-blockwise-unsigned"] = true }

-- More than this share of the update lost to rounding is worth a warning.
local LOST = 0.5

-- The scheme by which a quantized tensor can be made again.
local function scheme_of(weight)
  local kind = weight:dtype()
  local scheme = { type = kind, block_size = weight:info().block_size, double_quant = weight.nested_absmax ~= nil or nil }
  if kind == "int8-blockwise-unsigned" then scheme.type, scheme.signed = "int8-blockwise", false end
  return scheme
end

local function norm(x) return x:norm():item() end

-- The sum of the parts' changes of a weight: f32.
local function change_of(module, parts, weight)
  local sum
  for _, part in ipairs(parts) do
    local change = adapter_layer.change(module, part, weight)
    sum = sum and sum + change or change
  end
  return sum
end

-- How far a merged weight is from what it should be, and how much of the update that is.
local function compare(path, own, target, change, made)
  local e = quant.error(target, made)
  local update, all = norm(change), norm(target)
  local lost = update > 0 and e.rel_frobenius * all / update or 0
  return { path = path, type = own:dtype(), rel_error = e.rel_frobenius, max_error = e.max_abs, update = all > 0 and update / all or 0, lost = lost,
           below_step = lost > LOST }
end

-- The merged weight of one module and its line of the report; nil, message, code.
local function merged_weight(module, path, parts, own)
  local kind = own:dtype()
  if not floats[kind] and not quantized[kind] then
    return nil, ("merge: '%s' is %s, which wane reads but does not write: load the model with quant, or keep the adapter"):format(path, kind),
      "WANE_E_UNSUPPORTED"
  end
  for _, part in ipairs(parts) do
    if part.bias and not rawget(module, "bias") then
      return nil, ("merge: '%s' of '%s' has a bias (lora_bias), the base's layer has none to merge it into"):format(part.name, path), "WANE_E_ARG"
    end
  end
  local made, line = core.scope(function()
    local change = change_of(module, parts, own)
    local target = own:dequantize "f32" + change
    if not target:isfinite():all():item() then return nil end
    local made = floats[kind] and target:to(kind) or quant.quantize(target, scheme_of(own))
    return made, compare(path, own, target, change, made)
  end)
  if not made then
    return nil, ("merge: the weight of '%s' would not be finite: the adapter is damaged; nothing was merged"):format(path), "WANE_E_FORMAT"
  end
  return made, line
end

-- The merged bias of a module whose parts carry one (lora_bias), or nil.
local function merged_bias(parts, own)
  local sum
  for _, part in ipairs(parts) do
    if part.bias then
      local change = part.bias * part.scale
      sum = sum and sum + change or change
    end
  end
  return sum and own + sum or nil
end

-- The parts of the adapters in a list, by path.
local function parts_by_path(state, names)
  local by_path = {}
  for _, name in ipairs(names) do
    for path, part in pairs(state.adapters[name].parts) do
      by_path[path] = by_path[path] or {}
      table.insert(by_path[path], part)
    end
  end
  return by_path
end

-- Parameters of every module that the adapters in `names` change: { path = { weight, bias } }, and the report. nil, message, code.
local function compute(model, state, names)
  local by_path, results = parts_by_path(state, names), {}
  local report = { layers = {}, warnings = {} }
  for path, module in model:modules() do
    local parts = by_path[path]
    if parts then
      local own = state:merge_base(module, path, "weight", names)
      local made, line, code = F.outside_scopes(merged_weight, module, path, parts, own)
      if not made then
        for _, result in pairs(results) do for _, tensor in pairs(result) do tensor:close() end end
        return nil, line, code
      end
      local own_bias = state:merge_base(module, path, "bias", names)
      results[path] = { weight = made, bias = own_bias and F.outside_scopes(core.scope, merged_bias, parts, own_bias) }
      report.layers[#report.layers + 1] = line
    end
  end
  return results, report
end

-- Warnings of a report: what rounding took, and weights that are no longer shared.
local function note(model, report)
  local weak, worst = 0, nil
  for _, line in ipairs(report.layers) do
    if line.below_step then
      weak = weak + 1
      if not worst or line.lost > worst.lost then worst = line end
    end
  end
  if worst then
    table.insert(report.warnings, ("the update is below the quantization step in %d of %d layers (worst: %s, %s, %.0f %% of it lost to rounding): keep the "
      .. "adapter beside the model, or merge into a float base"):format(weak, #report.layers, worst.path, worst.type, 100 * worst.lost))
  end
  local head, table_ = model:find(model.family.head), model:find(model.family.embedding)
  if head and table_ and model.config.tie_word_embeddings ~= false and rawget(head, "weight") ~= rawget(table_, "weight") then
    table.insert(report.warnings, ("%s and %s shared a weight; merged into one of them alone: the model is not tied any more"):format(
      model.family.embedding, model.family.head))
  end
end

local function close(results)
  for _, result in pairs(results) do for _, tensor in pairs(result) do tensor:close() end end
end

-- Makes `names` the merged adapters. nil, message, code leaves all as it was.
local function set(model, state, names)
  local results, report, code = compute(model, state, names)
  if not results then return nil, report, code end
  local old, before = state.results, state.merged
  state.results, state.merged = results, names
  local ok, message = pcall(state.refresh, state, model)
  if not ok then
    state.results, state.merged = old, before
    close(results)
    error(message, 0)
  end
  close(old)
  note(model, report)
  return report
end

--- Merges adapters into the weights.
-- @param model wane.Model
-- @param state wane.LoraState
-- @param names string[] adapters, merged ones among them are left out
-- @param unload boolean let the base's own weights and the adapters go
-- @return table|nil { layers = { { path, type, rel_error, max_error, update, lost, below_step } … }, warnings }, string|nil message, string|nil code
function M.merge(model, state, names, unload)
  local all = { unpack(state.merged) }
  for _, name in ipairs(names) do if not state:is_merged(name) then all[#all + 1] = name end end
  local report, message, code = set(model, state, all)
  if not report or not unload then return report, message, code end
  local uses, kept = {}, {}
  for _, tensor in model:parameters() do uses[tensor] = true end
  for _, own in pairs(state.base) do
    for _, tensor in pairs(own) do if not uses[tensor] and Tensor.is(tensor) then tensor:close() end end
  end
  for _, name in ipairs(all) do
    for path, replaced in pairs(state.adapters[name].replaced) do
      for _, field in ipairs { "weight", "bias" } do
        if replaced[field] and rawget(model:find(path), field) == replaced[field] then kept[replaced[field]] = true end
      end
    end
  end
  state.base, state.results, state.merged = {}, {}, {}
  for _, name in ipairs(all) do state:drop(name, kept) end
  state:refresh(model)
  return report
end

--- Takes merged adapters out again: the base's own bytes are back where none is left.
-- @param model wane.Model
-- @param state wane.LoraState
-- @param names string[]
-- @return true|nil, string|nil message, string|nil code
function M.unmerge(model, state, names)
  local out, left = {}, {}
  for _, name in ipairs(names) do
    if not state:is_merged(name) then core.raise("lora.unmerge: adapter '%s' is not merged", name) end
    out[name] = true
  end
  for _, name in ipairs(state.merged) do if not out[name] then left[#left + 1] = name end end
  local report, message, code = set(model, state, left)
  if not report then return nil, message, code end
  return true
end

return M
