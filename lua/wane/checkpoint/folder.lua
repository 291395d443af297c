--- Writing a quantized copy of a checkpoint: a Hugging Face folder in bitsandbytes' own layout, which transformers and wane both load.
--
-- Tensors are loaded, quantized, written and freed one by one, so a model larger than memory can be quantized. Files above the shard
-- size are split as transformers splits them.
-- @module wane.checkpoint.folder
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C
local json = require "wane.checkpoint.json"
local loader = require "wane.loader"
local names = require "wane.checkpoint.names"
local quantized = require "wane.checkpoint.quantized"
local writer = require "wane.checkpoint.writer"
local Tensor = require "wane.tensor"

local M = {}

local widths = { f32 = 4, f16 = 2, bf16 = 2, i8 = 1, u8 = 1, i32 = 4, i64 = 8, bool = 1 }

local function numel(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

-- ---------------------------------------------------------------- the plan: which keys a tensor gives

-- dtype in which a tensor that is not quantized is written.
local function plain_dtype(entry, wanted)
  local dtype = entry.dtype
  if dtype == "f32" or dtype == "f16" or dtype == "bf16" then return wanted or dtype end
  if widths[dtype] then return dtype end
  return wanted or "f32"                         -- GGUF blocks: their exact values
end

-- Keys of one weight as { key = { dtype, shape, part | text | levels } }. The text of quant_state ends in a number that is only known
-- once the weight is quantized, and its length depends on it; so 4-bit keys are planned from the quantized tensor's offset.
local function keys_of(name, entry, scheme, offset, dtype)
  local n, shape = numel(entry.shape), entry.shape
  local stem = name:match "^(.*)%.weight$"
  if scheme.type == "int8" then
    return { [name] = { dtype = "i8", shape = shape, part = C.WANE_PART_CODES },
             [stem .. ".SCB"] = { dtype = "f32", shape = { shape[1] }, part = C.WANE_PART_ABSMAX },
             [stem .. ".weight_format"] = { dtype = "u8", shape = {}, text = "\0" } }
  end
  local blocks = math.ceil(n / scheme.block_size)
  if scheme.type == "int8-blockwise" then
    return { [name] = { dtype = "u8", shape = shape, part = C.WANE_PART_CODES },
             [stem .. ".absmax"] = { dtype = "f32", shape = { blocks }, part = C.WANE_PART_ABSMAX },
             [stem .. ".code"] = { dtype = "f32", shape = { 256 }, part = C.WANE_PART_CODE } }
  end
  local state = quantized.state_text({ type = scheme.type, block_size = scheme.block_size, dtype = dtype, shape = shape,
                                       double_quant = scheme.double_quant }, offset)
  local keys = {
    [name] = { dtype = "u8", shape = { math.ceil(n / 2), 1 }, part = C.WANE_PART_CODES },
    [name .. ".absmax"] = { dtype = scheme.double_quant and "u8" or "f32", shape = { blocks }, part = C.WANE_PART_ABSMAX },
    [name .. ".quant_map"] = { dtype = "f32", shape = { 16 }, levels = true },
    [name .. ".quant_state.bitsandbytes__" .. scheme.type] = { dtype = "u8", shape = { #state }, text = state },
  }
  if scheme.double_quant then
    keys[name .. ".nested_absmax"] = { dtype = "f32", shape = { math.ceil(blocks / 256) }, part = C.WANE_PART_NESTED_ABSMAX }
    keys[name .. ".nested_quant_map"] = { dtype = "f32", shape = { 256 }, part = C.WANE_PART_NESTED_CODE }
  end
  return keys
end

-- ---------------------------------------------------------------- tensors

-- The 16 values of a 4-bit kind as f32 bytes: a tensor of all codes, dequantized.
local levels_cache = {}
local function levels(kind)
  if levels_cache[kind] then return levels_cache[kind] end
  local s, codes = core.stream(), ffi.new("uint8_t[8]", 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef)
  local out = ffi.new "float[16]"
  core.scope(function()
    local h = { core.handle_type(), core.handle_type(), core.handle_type(), core.handle_type() }
    local given = ffi.new("const wane_handle *[?]", C.WANE_PARTS)
    core.check(C.wane_tensor_new(s, h[1], C.WANE_U8, 1, ffi.new("int64_t[1]", 8)))
    core.check(C.wane_tensor_upload(s, h[1], codes, 8))
    core.check(C.wane_tensor_new(s, h[2], C.WANE_F32, 1, ffi.new("int64_t[1]", 1)))
    core.check(C.wane_fill(s, h[2], 1))
    given[C.WANE_PART_CODES], given[C.WANE_PART_ABSMAX] = h[1], h[2]
    core.check(C.wane_quantized_new(s, h[3], core.dtype(kind), 1, ffi.new("int64_t[1]", 16), 64, 0, given))
    core.check(C.wane_dequantize(s, h[4], h[3], C.WANE_F32))
    core.check(core.wait())
    core.check(C.wane_tensor_read(s, h[4], out, 64))
  end)
  levels_cache[kind] = ffi.string(out, 64)
  return levels_cache[kind]
end

local function part_of(q, number)
  local h = core.handle_type()
  core.check(C.wane_quantized_part(core.stream(), h, q.h, number))
  return Tensor.wrap(h)
end

local function offset_of(q)
  core.check(core.wait())
  local offset = ffi.new "float[1]"
  core.check(C.wane_quantized_offset(q.h, offset))
  return offset[0]
end

-- Loads one entry as it is going to be written.
local function load_one(ckpt, item)
  local list, message, code = loader.load(ckpt, { { entry = item.entry, scheme = item.scheme, dtype = not item.scheme and item.dtype or nil } }, item.opts)
  if not list then return nil, message, code end
  return list[1]
end

-- ---------------------------------------------------------------- which tensors

-- Without a caller's choice: the Linear layers of the family's module tree, but for the skip list.
local function select_linears(ckpt, scheme)
  local load = require "wane.load"
  local tree, message, code = require("wane.models").build(ckpt.config)
  if not tree then return nil, message, code end
  local skip, linears = load.skip_list(scheme, tree.family), {}
  for path, module in tree:modules() do
    if module.in_features and not load.skipped(path, skip) then linears[path .. ".weight"] = true end
  end
  return function(name) return linears[name] end, skip
end

local function list_items(ckpt, opts, select)
  local items = {}
  for _, name in ipairs(ckpt:names()) do
    local entry = ckpt:find(name)
    if entry.invalid then return nil, ("'%s': %s"):format(ckpt.path, entry.invalid), "WANE_E_FORMAT" end
    if entry.quant then
      return nil, ("'%s' is quantized already ('%s' is %s): quantize the original checkpoint"):format(ckpt.path, name, entry.quant.type), "WANE_E_ARG"
    end
    local item = { name = name, entry = entry, opts = { io = opts.io, cancelled = opts.cancelled, started = opts.started } }
    if select(name, entry) then
      if #entry.shape ~= 2 then return nil, ("tensor '%s' cannot be quantized: it is no matrix"):format(name), "WANE_E_SHAPE" end
      item.scheme = opts.scheme
      item.dtype = opts.dtype or (widths[entry.dtype] and entry.dtype) or "f32"
    else
      item.dtype = plain_dtype(entry, #entry.shape > 0 and opts.dtype or nil)
      if entry.arrange == "transpose" then                -- what stays plain stays as its format has it
        entry.arrange, entry.shape = nil, { entry.shape[2], entry.shape[1] }
      end
    end
    items[#items + 1] = item
  end
  return items
end

-- ---------------------------------------------------------------- shards

-- Bytes of an item in the output, near enough to cut shards.
local function size_of(item)
  local n = numel(item.entry.shape)
  if not item.scheme then return n * widths[item.dtype] end
  local scheme = item.scheme
  if scheme.type == "int8" then return n + item.entry.shape[1] * 4 end
  local blocks = math.ceil(n / scheme.block_size)
  if scheme.type == "int8-blockwise" then return n + blocks * 4 + 1024 end
  return math.ceil(n / 2) + blocks * (scheme.double_quant and 1 or 4) + 2048
end

local function cut(items, most)
  local shards, bytes = { {} }, 0
  for _, item in ipairs(items) do
    local size = size_of(item)
    if bytes > 0 and bytes + size > most then
      shards[#shards + 1] = {}
      bytes = 0
    end
    table.insert(shards[#shards], item)
    bytes = bytes + size
  end
  return shards
end

local HOLD = 2 ^ 30

-- The double-quantized scales' mean is printed in quant_state, so its text, and with it the header, cannot be planned before the weight
-- is quantized. Results are held up to 1 GiB; what does not fit is quantized again when it is written.
local function note_offsets(ckpt, items)
  local held = 0
  for _, item in ipairs(items) do
    if item.scheme and item.scheme.double_quant then
      local t, message, code = load_one(ckpt, item)
      if not t then return nil, message, code end
      item.offset = offset_of(t)
      held = held + size_of(item)
      if held <= HOLD then item.tensor = t else t:close() end
    end
  end
  return true
end

local function write_item(w, ckpt, item, keys, opts)
  local t, message, code = item.tensor, nil, nil
  if not t then t, message, code = load_one(ckpt, item) end
  if not t then return nil, message, code end
  item.tensor = nil
  local ok = true
  if not item.scheme then
    ok, message, code = w:tensor(item.name, t)
  else
    for key, k in pairs(keys) do
      if k.text then ok, message, code = w:bytes(key, k.text)
      elseif k.levels then ok, message, code = w:bytes(key, levels(item.scheme.type))
      else
        local part = part_of(t, k.part)
        ok, message, code = w:tensor(key, part)
        part:close()
      end
      if not ok then break end
    end
  end
  if ok and opts.on_tensor then opts.on_tensor(item.name, t, item.entry) end
  t:close()
  return ok, message, code
end

-- Writes one shard; returns its keys.
local function write_shard(path, ckpt, items, opts, done)
  local ok, message, code = note_offsets(ckpt, items)
  if not ok then return nil, message, code end
  local plan, keys = {}, {}
  for _, item in ipairs(items) do
    keys[item] = item.scheme and keys_of(item.name, item.entry, item.scheme, item.offset, item.dtype)
      or { [item.name] = { dtype = item.dtype, shape = item.entry.shape } }
    for key, k in pairs(keys[item]) do plan[key] = k end
  end
  local w
  w, message, code = writer.open(path, plan, { format = "pt" })
  if not w then return nil, message, code end
  for _, item in ipairs(items) do
    local fine, wrote = pcall(function()
      ok, message, code = write_item(w, ckpt, item, keys[item], opts)
      return ok
    end)
    if not fine or not wrote then
      w:close()
      if not fine then return nil, tostring(wrote), "WANE_E_FAILED" end
      return nil, message, code
    end
    done.bytes, done.tensors = done.bytes + item.entry.bytes, done.tensors + 1
    if opts.progress then opts.progress(done.bytes, done.total, done.tensors) end
  end
  -- The bytes are down: from here to the new config.json an old one would lie about this file, so it goes first.
  os.remove((path:match "^.*/" or "") .. "config.json")
  ok, message, code = w:finish()
  if not ok then return nil, message, code end
  return plan
end

-- ---------------------------------------------------------------- the other files

-- config.json: the source's own text with quantization_config added, so that nothing in it changes; a GGUF's is written anew.
local function config_text(ckpt, scheme, skip, dtype)
  local addition
  if scheme.type ~= "int8-blockwise" then addition = quantized.config(scheme, names.skip_list(ckpt.config.model_type, skip)) end
  if not ckpt.config_text then
    local c = {}
    for k, v in pairs(ckpt.config) do if k ~= "gguf_architecture" then c[k] = v end end
    c.torch_dtype, c.quantization_config = quantized.long_name(dtype or "f32"), addition
    return json.encode(c) .. "\n"
  end
  local text = ckpt.config_text
  if dtype then
    text = text:gsub('("torch_dtype"%s*:%s*)"[%w_]+"', '%1"' .. quantized.long_name(dtype) .. '"', 1)
    text = text:gsub('("dtype"%s*:%s*)"[%w_]+"', '%1"' .. quantized.long_name(dtype) .. '"', 1)
  end
  if not addition then return text end
  return (text:gsub("%s*}%s*$", function() return ',\n  "quantization_config": ' .. json.encode(addition, "  ") .. "\n}\n" end))
end

-- What a model needs beside its weights, copied as it is where the source has it.
local companions = { "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
                     "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json", "LICENSE" }

local function copy_companions(folder, dir)
  for _, name in ipairs(companions) do
    local f = io.open(folder .. "/" .. name, "rb")
    if f then
      local text = f:read "*a"
      f:close()
      local ok, message, code = writer.write_text(dir .. "/" .. name, text or "")
      if not ok then return nil, message, code end
    end
  end
  return true
end

ffi.cdef "char *realpath(const char *, char *);"
local path_buffer = ffi.new "char[4096]"                -- PATH_MAX

-- The path without links and dots, or nil where nothing is there.
local function real_path(path)
  return ffi.C.realpath(path, path_buffer) ~= nil and ffi.string(path_buffer) or nil
end

--- Writes a quantized copy of a checkpoint. config.json is written last: a folder without it was not finished.
-- @param dir string made if it is not there
-- @param opts table { checkpoint = wane.Checkpoint, scheme = { type, block_size, double_quant, compute, threshold }, select = nil |
--   function(name, entry) -> boolean (default: the family's Linear layers outside the skip list), skip = string[]|nil (written into the
--   config), dtype = nil | "f32" | "f16" | "bf16" (of what is not quantized; default: as stored), max_shard_bytes = 5e9, io,
--   progress = function(bytes_done, bytes_total, tensors_done), on_tensor = function(name, tensor, entry), cancelled }
-- @return table|nil { bytes = of the input, tensors, tokenizer_error = nil | why a GGUF's tokenizer could not be written }, string|nil message, string|nil code
function M.write_quantized(dir, opts)
  local ckpt, scheme = opts.checkpoint, {}
  for k, v in pairs(opts.scheme or core.raise "write_quantized: a scheme is needed") do scheme[k] = v end
  scheme.block_size = scheme.block_size or (scheme.type == "int8-blockwise" and 4096 or 64)
  opts = setmetatable({ scheme = scheme }, { __index = opts })
  local choose, skip = opts.select, opts.skip or scheme.skip
  if not choose then
    local reason
    choose, skip, reason = select_linears(ckpt, scheme)
    if not choose then return nil, skip, reason end
  end
  local items, message, code = list_items(ckpt, opts, choose)
  if not items then return nil, message, code end
  local target, source = real_path(dir), real_path(ckpt.folder or ckpt.path)
  if target and target == source then
    return nil, ("'%s' is the model's own folder: writing there would destroy the original; name another"):format(dir), "WANE_E_ARG"
  end
  local status = C.wane_path_make(dir)
  if status < 0 then return core.failure(status) end
  local done = { bytes = 0, tensors = 0, total = 0 }
  for _, item in ipairs(items) do done.total = done.total + item.entry.bytes end
  local shards, map, total = cut(items, opts.max_shard_bytes or 5e9), {}, 0
  for i, list in ipairs(shards) do
    local name = #shards == 1 and "model.safetensors" or ("model-%05d-of-%05d.safetensors"):format(i, #shards)
    local plan
    plan, message, code = write_shard(dir .. "/" .. name, ckpt, list, opts, done)
    if not plan then return nil, message, code end
    for key, k in pairs(plan) do
      map[key] = name
      total = total + numel(k.shape) * widths[k.dtype]
    end
  end
  -- What an earlier run left under the other name would be read instead of this one's files.
  os.remove(dir .. (#shards > 1 and "/model.safetensors" or "/model.safetensors.index.json"))
  local ok = true
  if #shards > 1 then
    ok, message, code = writer.write_text(dir .. "/model.safetensors.index.json", json.encode { metadata = { total_size = total }, weight_map = map } .. "\n")
  end
  if ok and ckpt.folder then
    ok, message, code = copy_companions(ckpt.folder, dir)
  elseif ok and next(ckpt.generation_config) then
    ok, message, code = writer.write_text(dir .. "/generation_config.json", json.encode(ckpt.generation_config) .. "\n")
  end
  local tokenizer_written, tokenizer_error = true, nil
  if ok and ckpt.format == "gguf" then tokenizer_written, tokenizer_error = require("wane.checkpoint.tokenizer").write(ckpt.index, dir) end
  if ok then ok, message, code = writer.write_text(dir .. "/config.json", config_text(ckpt, scheme, skip, opts.dtype)) end
  if not ok then return nil, message, code end
  return { bytes = done.bytes, tensors = done.tensors, tokenizer_error = not tokenizer_written and tokenizer_error or nil }
end

return M
