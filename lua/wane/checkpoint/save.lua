--- Saving a model that is in memory: model:save(dir). Names and layout are those of the format: tied tensors once, weights as the
-- family's files hold them, what is quantized in bitsandbytes' layout; transformers loads the folder.
-- @module wane.checkpoint.save
local core = require "wane.core"
local C = core.C
local folder = require "wane.checkpoint.folder"
local layout = require "wane.checkpoint.layout"
local names = require "wane.checkpoint.names"
local paths = require "wane.checkpoint.paths"
local quantize = require "wane.checkpoint.quantize"
local Tensor = require "wane.tensor"

local M = {}

-- ---------------------------------------------------------------- items

local floats = { f32 = true, f16 = true, bf16 = true }

-- How a quantized tensor is quantized, in the words of a scheme; nil for plain values and GGUF blocks.
local function scheme_of(t, module)
  local kind = t:dtype():gsub("%-unsigned$", "")
  if kind ~= "nf4" and kind ~= "fp4" and kind ~= "int8" and kind ~= "int8-blockwise" then return nil end
  local nested = t.nested_absmax
  if nested then nested:close() end
  return { type = kind, block_size = t:info().block_size, double_quant = nested ~= nil, threshold = module.threshold }
end

-- The values of a tensor as another plain dtype.
local function converted(t, dtype)
  if not floats[t:dtype()] then return t:dequantize(dtype) end
  local h = core.handle_type()
  core.check(C.wane_cast(core.stream(), h, t.h, core.dtype(dtype)))
  return Tensor.wrap(h)
end

-- A parameter as an item. transposed: the family's files hold it [in, out].
local function item_of(name, t, module, field, transposed, wanted)
  local item = { name = name, shape = t:shape(), bytes = t:nbytes(), scheme = scheme_of(t, module) }
  if item.scheme then
    item.dtype, item.borrowed = floats[module.origin] and module.origin or "f32", true
    item.load = function() return t end
    return item
  end
  local own = module.stored and module.stored[field] or t:dtype()
  item.dtype = floats[own] and (wanted or own) or layout.widths[own] and own or wanted or "f32"
  if transposed then item.shape = { item.shape[2], item.shape[1] } end
  item.load = function()
    return core.scope(function()
      local values = item.dtype == t:dtype() and t or converted(t, item.dtype)
      return transposed and converted(values:t(), item.dtype) or values
    end)
  end
  item.borrowed = item.dtype == t:dtype() and not transposed
  return item
end

-- Items of all parameters, tied ones under their first name; Linears with their scheme or false.
local function items_of(model, wanted)
  local items, linears, seen, kind = {}, {}, {}, model.config.model_type
  for path, module in model:modules() do
    for _, p in ipairs(module:own_parameters()) do
      local name, t = (path == "" and "" or path .. ".") .. p.name, p.value
      if not t then core.raise("save: '%s' has no values yet: load the model, or reset() the layer", name) end
      if not seen[t] then
        seen[t] = true
        items[#items + 1] = item_of(name, t, module, p.name, #p.shape == 2 and names.is_transposed(kind, name), wanted)
        if module.in_features and p.name == "weight" then linears[path] = items[#items].scheme or false end
      elseif module.in_features and p.name == "weight" then
        linears[path] = false                          -- tied
      end
    end
  end
  return items, linears
end

-- ---------------------------------------------------------------- config.json

-- A config's values that JSON has; what a family's build() added to it (frequencies, functions) is left out.
local function plain(value)
  if type(value) ~= "table" then return (type(value) == "string" or type(value) == "number" or type(value) == "boolean") and value or nil end
  if getmetatable(value) then return nil end
  local out = {}
  for k, v in pairs(value) do
    out[k] = plain(v)
    if out[k] == nil and v ~= nil then return nil end
  end
  return out
end

-- Was a tied pair parted by an adapter, so that the config has to say so?
local function is_parted(model)
  local head, table_ = model:find(model.family.head), model:find(model.family.embedding)
  if model.config.tie_word_embeddings == false or not head or not table_ or head.weight == table_.weight then return false end
  return rawget(model, "lora") ~= nil and head.weight:is_float()
end

-- The config to write, and its text where the source has one.
local function config_of(model)
  local out, text = model.source_config, model.config_text
  if not out then
    out = {}
    for k, v in pairs(model.config) do out[k] = plain(v) end
  end
  out, text = folder.text_part(out, text)
  if not is_parted(model) then return out, text end
  if not text then
    out.tie_word_embeddings = false
    return out
  end
  local said
  text, said = text:gsub('("tie_word_embeddings"%s*:%s*)true', "%1false", 1)
  return out, said > 0 and text or (text:gsub("%s*}%s*$", ',\n  "tie_word_embeddings": false\n}\n'))
end

-- What quantization_config is to say of the quantized items, if there are any.
local function quantization_of(model, items, linears)
  local schemes = {}
  for _, item in ipairs(items) do schemes[#schemes + 1] = item.scheme end
  if #schemes == 0 then return nil end
  local base = { type = schemes[1].type, double_quant = schemes[1].double_quant, compute = model.compute ~= "fast" and model.compute or "bf16" }
  for _, s in ipairs(schemes) do base.threshold = base.threshold or s.threshold end
  local skip = quantize.skip_list(linears, require("wane.load").skip_list(model.scheme or {}, model.family))
  return quantize.config(schemes, base, model.config, skip, linears)
end

-- ---------------------------------------------------------------- save

local known = { dtype = true, max_shard_bytes = true, progress = true }

--- Writes a model as a folder that transformers loads; see wane.Model:save.
-- @param model wane.Model
-- @param dir string
-- @param opts table|nil { dtype, max_shard_bytes, progress }
-- @return table|nil { bytes, tensors, shards, upstream, tokenizer_error }, string|nil message, string|nil code
function M.save(model, dir, opts)
  if type(dir) ~= "string" then core.raise("save: expected the path of a folder, found a %s", type(dir)) end
  opts = opts or {}
  for name in pairs(opts) do if not known[name] then core.raise("save: there is no option '%s': dtype, max_shard_bytes, progress", tostring(name)) end end
  if opts.dtype and not floats[opts.dtype] then core.raise("save: dtype: expected f32, f16 or bf16, found '%s'", tostring(opts.dtype)) end
  local adapters = rawget(model, "lora")
  if adapters then adapters:refuse_beside "save" end
  local items, linears = items_of(model, opts.dtype)
  local addition, reason = quantization_of(model, items, linears)
  local config, text = config_of(model)
  local source = model.path and require("wane.checkpoint").open(model.path)
  local result, message, code = folder.write(dir, {
    what = "model:save", items = items, max_shard_bytes = opts.max_shard_bytes, progress = opts.progress,
    config = folder.config_text(config, text, opts.dtype, addition),
    companions = { folder = source and source.folder or (model.path and paths.is_folder(model.path) and model.path) or nil,
                   generation_config = model.generation_config, gguf = source and source.format == "gguf" and source.index or nil },
  })
  if source then source:close() end
  if not result then return nil, message, code end
  result.upstream = reason
  return result
end

return M
