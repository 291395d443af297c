--- Quantizes a model in memory, layer by layer; wane.quant.convert.
-- @module wane.convert
local core = require "wane.core"
local load = require "wane.load"

--- Quantizes every Linear of a model (or any module tree) in place. Without a filter, the scheme's rules and skip list decide (default:
-- the output head and what the family keeps stay); with one, the filter alone says which.
-- @param model wane.Module
-- @param scheme string|table "nf4" or { type, block_size, double_quant, threshold, compute, skip, rules }
-- @param filter function|nil filter(path, linear) -> true to quantize
-- @return integer how many layers were quantized
return function(model, scheme, filter)
  local s = load.scheme(scheme)
  if not s then core.raise "convert: expected nf4, fp4, int8 or int8-blockwise, found none" end
  local skip = model.family and load.skip_list(s, model.family) or s.skip or {}
  local uses = {}                                      -- a tied table stays for its other user
  for _, t in model:parameters() do uses[t] = (uses[t] or 0) + 1 end
  local count = 0
  for path, module in model:modules() do
    if module.in_features then
      local wanted
      if not filter then wanted = load.scheme_at(path, s, skip)
      elseif filter(path, module) then wanted = load.scheme_at(path, s, {}) end
      if wanted then
        local old = rawget(module, "weight")
        core.scope(function() module:quantize(wanted) end)
        if old and uses[old] == 1 then old:close() end
        count = count + 1
      end
    end
  end
  return count
end
