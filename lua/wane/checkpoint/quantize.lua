--- Quantized copies of checkpoints: a Hugging Face folder in bitsandbytes' own layout, which transformers and wane both load. Tensors go
-- from the source's files to the copy one by one.
-- @module wane.checkpoint.quantize
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C
local folder = require "wane.checkpoint.folder"
local index = require "wane.checkpoint.index"
local json = require "wane.checkpoint.json"
local layout = require "wane.checkpoint.layout"
local loader = require "wane.loader"
local names = require "wane.checkpoint.names"
local paths = require "wane.checkpoint.paths"
local quantized = require "wane.checkpoint.quantized"
local Tensor = require "wane.tensor"

local M = {}

-- ---------------------------------------------------------------- what is quantized how

-- Without a caller's choice: the Linear layers of the family's module tree, as rules and skip list say. Returns function(name) -> scheme
-- or nil, and every Linear's path with its scheme (false: none).
local function schemes_of(ckpt, scheme)
  local load = require "wane.load"
  local tree, message, code = require("wane.models").build(ckpt.config)
  if not tree then return nil, message, code end
  local skip, linears = load.skip_list(scheme, tree.family), {}
  for path, module in tree:modules() do
    if module.in_features then linears[path] = ckpt:find(path .. ".weight") and load.scheme_at(path, scheme, skip) or false end
  end
  return function(name) return linears[name:match "^(.*)%.weight$"] or nil end, linears, skip
end

--- The skip list that tells transformers which Linears are not quantized: entries of the list in force where they say it, whole paths
-- where rules made exceptions.
-- @param linears table { path = scheme | false }
-- @param skip string[]
-- @return string[]
function M.skip_list(linears, skip)
  local skipped = require("wane.load").skipped
  local list, rest = {}, {}
  for _, entry in ipairs(skip) do
    local exceptions = false
    for path, scheme in pairs(linears) do exceptions = exceptions or (scheme and skipped(path, { entry })) end
    if not exceptions then list[#list + 1] = entry end
  end
  for path, scheme in pairs(linears) do
    if not scheme and not skipped(path, list) then rest[#rest + 1] = path end
  end
  table.sort(rest)
  for _, path in ipairs(rest) do list[#list + 1] = path end
  return list
end

-- Is this an expert of a mixture, or the router beside the experts?
local function in_mixture(path, linears)
  if path:find "%.experts%.%d+%." then return true end
  local router = path:match "^(.*%.)gate$"
  for other in pairs(router and linears or {}) do
    if other:sub(1, #router + 8) == router .. "experts." then return true end
  end
  return false
end

-- What transformers never quantizes (T5's wo; since version 5 mixtures, whose experts are one tensor a layer there) it cannot load
-- quantized either.
local function against_family(linears, config)
  local family = require("wane.models").find(config)
  for path, scheme in pairs(linears or {}) do
    if scheme and in_mixture(path, linears) then
      return "it quantizes experts or their router, as transformers up to version 4 does (the rules '*.experts.* none' and '*.gate none' leave them)"
    end
    for _, kept in ipairs(family and family.keep or {}) do
      if scheme and path:match "[^.]+$" == kept then return ("it quantizes '%s', which transformers never does in this family"):format(path) end
    end
  end
end

--- config.json's quantization_config for weights quantized in these ways.
-- @param schemes table[] of all quantized weights
-- @param base table the scheme asked for: compute, threshold, and what most weights have
-- @param config table config.json of the model
-- @param skip string[]|nil
-- @param linears table|nil { path = scheme | false }, where it is known
-- @return table|nil nil for none, string|nil why transformers cannot load such a folder
function M.config(schemes, base, config, skip, linears)
  local kinds, first = {}, {}
  for _, s in ipairs(schemes) do
    local kind = (s.type == "nf4" or s.type == "fp4") and "4-bit" or s.type
    kinds[kind], first[kind] = true, first[kind] or s
  end
  if not next(kinds) then return nil end
  local main = first["4-bit"] or first.int8 or first["int8-blockwise"]
  local described = { type = main.type, double_quant = main.double_quant, compute = kinds["4-bit"] and base.compute, threshold = base.threshold }
  if kinds["4-bit"] and (base.type == "nf4" or base.type == "fp4") then described.type, described.double_quant = base.type, base.double_quant end
  local list, found = names.skip_list(config.model_type, skip), {}
  for kind in pairs(kinds) do found[#found + 1] = kind end
  table.sort(found)
  if #found == 1 and not kinds["int8-blockwise"] then return quantized.config(described, list), against_family(linears, config) end
  return quantized.foreign_config(described, list), ("it holds %s layers, and transformers knows 4-bit or int8, one of them a model"):format(
    table.concat(found, " and "))
end

-- ---------------------------------------------------------------- items

-- dtype in which a tensor that is not quantized is written.
local function plain_dtype(entry, wanted)
  local dtype = entry.dtype
  if dtype == "f32" or dtype == "f16" or dtype == "bf16" then return wanted or dtype end
  if layout.widths[dtype] then return dtype end
  return dtype == "i16" and "i32" or wanted or "f32"   -- GGUF blocks: their exact values
end

local PIECE = 8 * 1024 * 1024

-- Rows of a stored matrix as tensors of `dtype`, a few at a time, read from the file and not through a mapping: mapped pages would count as
-- this process's memory. Returns the function that wane.checkpoint.writer's `pieces` takes.
local function rows_of(item)
  local e, s = item.entry, core.stream()
  local cols = e.shape[#e.shape]
  local rows = 1
  for i = 1, #e.shape - 1 do rows = rows * e.shape[i] end
  local row_bytes, out_bytes, from = e.bytes / rows, cols * layout.widths[item.dtype], (e.piece or 0) * e.bytes
  local most = math.max(1, math.floor(PIECE / math.max(row_bytes, out_bytes)))
  local buffer = ffi.new("char[?]", most * row_bytes)
  local blocks = core.dtype(e.dtype) >= C.WANE_DTYPE_PLAIN
  return function(at)
    local first = at / out_bytes
    local count = math.min(most, rows - first)
    local status = C.wane_index_read(e.index:live(), e.i, from + first * row_bytes, buffer, count * row_bytes)
    if status < 0 then return core.failure(status) end
    return core.scope(function()
      local raw, h = core.handle_type(), core.handle_type()
      local shape, ndim = core.shape(blocks and { count, row_bytes } or { count, cols })
      core.check(C.wane_tensor_new(s, raw, blocks and C.WANE_U8 or core.dtype(e.dtype), ndim, shape))
      core.check(C.wane_tensor_upload(s, raw, buffer, count * row_bytes))
      if not blocks and item.dtype == e.dtype then return Tensor.wrap(raw) end
      if blocks then
        local values = core.handle_type()
        local given = ffi.new("const wane_handle *[?]", C.WANE_PARTS)
        given[C.WANE_PART_CODES] = raw
        core.check(C.wane_quantized_new(s, values, core.dtype(e.dtype), 2, core.shape { count, cols }, 0, 0, given))
        core.check(C.wane_dequantize(s, h, values, core.dtype(item.dtype)))
      else
        core.check(C.wane_cast(s, h, raw, core.dtype(item.dtype)))
      end
      return Tensor.wrap(h)
    end)
  end
end

-- An item's `load`: its tensor as it is going to be written.
local function loader_of(ckpt, item, opts)
  return function()
    local list, message, code = loader.load(ckpt, { { entry = item.entry, scheme = item.scheme, dtype = not item.scheme and item.dtype or nil } },
      { io = opts.io, cancelled = opts.cancelled, started = opts.started })
    if not list then return nil, message, code end
    return list[1]
  end
end

local function item_of(ckpt, name, entry, scheme, opts)
  local item = { name = name, entry = entry, shape = entry.shape, bytes = entry.bytes, scheme = scheme }
  if scheme then
    if #entry.shape ~= 2 then return nil, ("tensor '%s' cannot be quantized: it is no matrix"):format(name), "WANE_E_SHAPE" end
    item.dtype = opts.dtype or (layout.widths[entry.dtype] and entry.dtype) or "f32"
    if opts.on_tensor then item.written = function(t) opts.on_tensor(name, t, entry) end end
  else
    item.dtype = plain_dtype(entry, #entry.shape > 0 and opts.dtype or nil)
    -- What stays plain stays as its format has it: a matrix that is turned when it is read from a folder, or was turned for GGUF.
    if #entry.shape == 2 and names.is_transposed(ckpt.model_type, name) then
      entry.arrange, item.shape = entry.arrange ~= "transpose" and "transpose" or nil, { entry.shape[2], entry.shape[1] }
      entry.shape = item.shape
    end
    local large = entry.bytes > PIECE and #entry.shape > 1 and entry.dtype and not entry.arrange and not entry.stride and not loader.read_as[entry.dtype]
    if large then item.pieces = function() return rows_of(item) end end
  end
  item.load = loader_of(ckpt, item, opts)
  return item
end

-- Names of the tensors to write, and the number of those that are left out: what a multimodal model has beside its text part.
local function names_to_write(ckpt, is_part)
  if not is_part then return ckpt:names(), 0 end
  local tree, message, code = require("wane.models").build(ckpt.config)
  if not tree then return nil, message, code end
  local own, list, left_out = {}, {}, 0
  for path, module in tree:modules() do
    for _, p in ipairs(module:own_parameters()) do own[path .. "." .. p.name] = true end
  end
  for _, name in ipairs(ckpt:names()) do
    if own[name] then list[#list + 1] = name else left_out = left_out + 1 end
  end
  return list, left_out
end

local function list_items(ckpt, list, opts, scheme_for)
  local items = {}
  for _, name in ipairs(list) do
    local entry = ckpt:find(name)
    if entry.invalid then return nil, ("'%s': %s"):format(ckpt.path, entry.invalid), "WANE_E_FORMAT" end
    if entry.quant then
      return nil, ("'%s' is quantized already ('%s' is %s): quantize the original checkpoint"):format(ckpt.path, name, entry.quant.type), "WANE_E_ARG"
    end
    local item, message, code = item_of(ckpt, name, entry, scheme_for(name, entry), opts)
    if not item then return nil, message, code end
    items[#items + 1] = item
  end
  return items
end

-- What the source is: its files with their sizes and times.
local function fingerprint(ckpt)
  local list = {}
  for i, path in ipairs(ckpt.index:files()) do
    local bytes, changed = paths.stat(path)
    list[i] = ("%s %d %s"):format(paths.real(path) or path, bytes or 0, changed)
  end
  return json.encode(list)
end

-- A shard of an earlier run is used: whoever wants to see the tensors sees those.
local function show_kept(ckpt, path, items)
  local ix = index.open(path)
  if not ix then return end
  for _, item in ipairs(items) do
    if item.written then
      local e = ix:find(item.name)
      local q = quantized.recognise(ix, item.name, e)
      e.quant, e.shape, e.dtype = q, q.shape, q.type
      local list = loader.load(ckpt, { { entry = e } }, { io = "read" })
      if list then
        item.written(list[1])
        list[1]:close()
      end
    end
  end
  ix:close()
end

--- Writes a quantized copy of a checkpoint. A run that was killed is resumed by the same call (wane.checkpoint.staging).
-- @param dir string made if it is not there
-- @param opts table { checkpoint = wane.Checkpoint, scheme = { type, block_size, double_quant, compute, threshold, skip, rules }, select = nil |
--   function(name, entry) -> boolean (default: the family's Linear layers, as rules and skip list say), skip = string[]|nil (written into
--   the config), dtype = nil | "f32" | "f16" | "bf16" (of what is not quantized; default: as stored, GGUF blocks as f32),
--   max_shard_bytes = 5e9, io, progress = function(bytes_done, bytes_total, tensors_done), on_tensor = function(name, tensor, entry) for
--   each quantized one, cancelled }
-- @return table|nil { bytes = of the input, tensors, shards, resumed = shards kept of a killed run, upstream = nil | why transformers cannot
--   load the folder, left_out = tensors of a multimodal model beside its text part, which are not written, quantized = number of
--   weights that were, unused = patterns of rules that match no layer, unused_skip = entries of the skip list that match none,
--   tokenizer_error = nil | why a GGUF's tokenizer could not be written }, string|nil message, string|nil code
function M.write(dir, opts)
  local ckpt = opts.checkpoint
  local scheme = require("wane.load").scheme(opts.scheme or core.raise "write_quantized: a scheme is needed")
  if not scheme then core.raise "write_quantized: a scheme is needed, found none" end
  local scheme_for, linears
  local skip = opts.skip or scheme.skip
  if opts.select then
    scheme_for = function(name, entry) return opts.select(name, entry) and scheme or nil end
  else
    local in_force
    scheme_for, linears, in_force = schemes_of(ckpt, scheme)
    if not scheme_for then return nil, linears, in_force end
    skip = M.skip_list(linears, in_force)
  end
  local config, config_text, is_part = folder.text_part(ckpt.config, ckpt.config_text)
  local written, left_out, failure = names_to_write(ckpt, is_part)
  if not written then return nil, left_out, failure end
  local items, message, code = list_items(ckpt, written, opts, scheme_for)
  if not items then return nil, message, code end
  local target = paths.real(dir)
  if target and target == paths.real(ckpt.folder or ckpt.path) then
    return nil, ("'%s' is the model's own folder: writing there would destroy the original; name another"):format(dir), "WANE_E_ARG"
  end
  local schemes = {}
  for _, item in ipairs(items) do schemes[#schemes + 1] = item.scheme end
  local addition, reason = M.config(schemes, scheme, ckpt.config, skip, linears)
  local result
  result, message, code = folder.write(dir, {
    what = "wane quantize", source = fingerprint(ckpt), items = items, max_shard_bytes = opts.max_shard_bytes, progress = opts.progress,
    config = folder.config_text(config, config_text, opts.dtype, addition),
    companions = { folder = ckpt.folder, generation_config = ckpt.generation_config, gguf = ckpt.format == "gguf" and ckpt.index or nil },
    kept = opts.on_tensor and function(path, list) show_kept(ckpt, path, list) end,
  })
  if not result then return nil, message, code end
  result.left_out = left_out
  result.upstream, result.quantized = reason, #schemes
  result.unused, result.unused_skip = {}, {}
  if linears then
    result.unused_skip, result.unused = require("wane.load").unused(scheme, require("wane.models").find(ckpt.config), linears)
  end
  return result
end

return M
