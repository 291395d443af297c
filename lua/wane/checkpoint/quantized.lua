--- Quantized tensors inside Hugging Face checkpoints: recognising bitsandbytes' keys, and writing them.
--
-- 4-bit: X.weight U8 [ceil(n/2), 1], X.weight.absmax, X.weight.quant_map, X.weight.quant_state.bitsandbytes__nf4 (JSON as bytes), and
-- nested: X.weight.nested_absmax, X.weight.nested_quant_map. int8: X.weight I8 [N, K], X.SCB, X.weight_format. Blockwise 8-bit (the
-- GPT-J-6B-8bit layout): X.weight U8 [N, K], X.absmax, X.code. Sources: bitsandbytes nn/modules.py, functional.py (QuantState).
-- @module wane.checkpoint.quantized
local json = require "wane.checkpoint.json"

local M = {}

local long_name = { f32 = "float32", f16 = "float16", bf16 = "bfloat16" }
local short_name = { float32 = "f32", float16 = "f16", bfloat16 = "bf16", f32 = "f32", f16 = "f16", bf16 = "bf16" }

--- "float16" of "f16". GGUF kinds dequantize to float32.
function M.long_name(dtype) return long_name[dtype] or "float32" end
--- "f16" of "float16" (or of "torch.float16"), or nil.
function M.short_name(name) return short_name[(tostring(name):gsub("^torch%.", ""))] end

-- Endings of the tensors that belong to a quantized weight rather than to the model.
local sidecars = { "%.weight%.absmax$", "%.weight%.quant_map$", "%.weight%.nested_absmax$", "%.weight%.nested_quant_map$",
                   "%.weight%.quant_state%.bitsandbytes__%w+$", "%.SCB$", "%.weight_format$", "%.absmax$", "%.code$" }

--- Is this the name of a scale or another part of a quantized weight?
function M.is_part(name)
  for _, pattern in ipairs(sidecars) do if name:find(pattern) then return true end end
  return false
end

local function numel(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

local function is_shape(t, dims)
  if type(t) ~= "table" or #t < 1 or (dims and #t ~= dims) then return false end
  for _, v in ipairs(t) do if type(v) ~= "number" or v < 0 or v ~= math.floor(v) or v > 2 ^ 48 then return false end end
  return true
end

-- ---------------------------------------------------------------- recognising

-- A part must be there and have `count` values of one of `dtypes`.
local function demand(ix, name, count, dtypes)
  local e = ix:find(name)
  if not e then return nil, ("'%s' is missing: the checkpoint is incomplete"):format(name) end
  if not e.dtype or not (" " .. dtypes .. " "):find(" " .. e.dtype .. " ", 1, true) then
    return nil, ("'%s' is %s, expected one of: %s"):format(name, e.file_dtype, dtypes)
  end
  if count and numel(e.shape) ~= count then
    return nil, ("'%s' has %d values, the weight's shape asks for %d"):format(name, numel(e.shape), count)
  end
  return e
end

local function four_bit(ix, name, e, kind)
  local key = name .. ".quant_state.bitsandbytes__" .. kind
  local text, message = ix:bytes(ix:find(key), 65536)
  if not text then return nil, message end
  local state, reason = json.decode(text)
  if not state then return nil, ("'%s' is no valid JSON: %s"):format(key, reason) end
  if state.quant_type ~= kind or not is_shape(state.shape) then return nil, ("'%s' has no valid quant_type or shape"):format(key) end
  local bs = state.blocksize
  if type(bs) ~= "number" or bs < 32 or bs > 4096 or bs ~= math.floor(bs) then return nil, ("'%s' has the block size %s"):format(key, tostring(bs)) end
  local n = numel(state.shape)
  -- quant_storage of other dtypes holds the same bytes under another name
  if e.bytes ~= math.ceil(n / 2) then
    return nil, ("'%s' has %d bytes, shape [%s] needs %d"):format(name, e.bytes, table.concat(state.shape, ", "), math.ceil(n / 2))
  end
  local blocks = math.ceil(n / bs)
  local q = { type = kind, block_size = bs, double_quant = false, shape = state.shape, dtype = M.short_name(state.dtype) or "f32", parts = {} }
  local nested = ix:has(name .. ".nested_absmax")
  local parts = q.parts
  parts.absmax, message = demand(ix, name .. ".absmax", blocks, nested and "u8" or "f32 bf16 f16")
  if parts.absmax and nested then
    q.double_quant, q.offset = true, state.nested_offset
    if type(q.offset) ~= "number" or (state.nested_blocksize or 256) ~= 256 then
      return nil, ("'%s' has no nested_offset, or nested blocks other than 256"):format(key)
    end
    parts.nested_absmax, message = demand(ix, name .. ".nested_absmax", math.ceil(blocks / 256), "f32 bf16 f16")
    if parts.nested_absmax then parts.nested_code, message = demand(ix, name .. ".nested_quant_map", 256, "f32 bf16 f16") end
  end
  if message then return nil, message end
  -- Saved on a CPU with AVX512-BF16 after a forward pass, bitsandbytes leaves the scales transposed, [K/bs, N], in bf16.
  local scales = parts.absmax
  q.transposed = #scales.shape == 2 and #state.shape == 2 and scales.shape[2] == state.shape[1] and scales.shape[2] > 1 and scales.dtype ~= "u8"
  return q
end

local function int8(ix, e, stem)
  if e.dtype ~= "i8" or #e.shape ~= 2 then return nil, ("'%s.weight' is %s with %d dimensions, expected I8 [N, K]"):format(stem, e.file_dtype, #e.shape) end
  local scales, message = demand(ix, stem .. ".SCB", e.shape[1], "f32 f16 bf16")
  if not scales then return nil, message end
  local format = ix:find(stem .. ".weight_format")
  if format then
    local byte = ix:bytes(format, 1)
    if byte and byte ~= "\0" then
      return nil, ("'%s.weight' is stored in a tiled layout (weight_format %d) that only its GPU library can read: "
        .. "save it again with bitsandbytes 0.45 or newer"):format(stem, byte:byte() or -1)
    end
  end
  return { type = "int8", shape = e.shape, dtype = "f16", parts = { absmax = scales } }
end

local function blockwise(ix, e, stem)
  if e.dtype ~= "u8" then return nil, ("'%s.weight' is %s, expected U8 codes"):format(stem, e.file_dtype) end
  local code, message = demand(ix, stem .. ".code", 256, "f32 f16 bf16")
  local scales
  if code then scales, message = demand(ix, stem .. ".absmax", nil, "f32 f16 bf16") end
  if not scales then return nil, message end
  -- The block size is not stored: 4096 in every known file; else the power of two that gives this many scales.
  local n, count = numel(e.shape), numel(scales.shape)
  for _, bs in ipairs { 4096, 2048, 1024, 512, 256, 128, 64 } do
    if math.ceil(n / bs) == count then
      return { type = "int8-blockwise", block_size = bs, shape = e.shape, dtype = "f32", parts = { absmax = scales, code = code } }
    end
  end
  return nil, ("'%s.absmax' has %d scales for %d values: no block size fits"):format(stem, count, n)
end

--- How a weight's entry is quantized: nil for not at all; nil and a message for keys that do not fit together.
-- @param ix wane.Index
-- @param name string the weight's name in the file
-- @param e table its entry (dtype, file_dtype, shape, bytes)
-- @return table|nil { type, block_size, double_quant, offset, shape, dtype, parts, transposed }, string|nil message
function M.recognise(ix, name, e)
  local stem = name:match "^(.*)%.weight$"
  for _, kind in ipairs { "nf4", "fp4" } do
    if ix:has(name .. ".quant_state.bitsandbytes__" .. kind) then return four_bit(ix, name, e, kind) end
  end
  if ix:has(name .. ".absmax") then return nil, ("'%s.absmax' is there but no quant_state that says how it was quantized"):format(name) end
  if not stem then return nil end
  if ix:has(stem .. ".SCB") then return int8(ix, e, stem) end
  if ix:has(stem .. ".code") and ix:has(stem .. ".absmax") then return blockwise(ix, e, stem) end
  return nil
end

--- A scheme from config.json's quantization_config; nil where there is none; nil and a message for other methods.
-- @return table|nil { type, block_size, double_quant, threshold, compute, skip }, string|nil message
function M.scheme(config)
  local q = config.quantization_config
  if type(q) ~= "table" then return nil end
  if q.wane then return { type = q.wane, double_quant = q.double_quant, compute = M.short_name(q.compute), threshold = q.threshold, skip = q.skip } end
  if q.quant_method and q.quant_method ~= "bitsandbytes" then
    return nil, ("it is quantized by '%s'; wane reads bitsandbytes' nf4, fp4 and int8"):format(tostring(q.quant_method))
  end
  if q.load_in_4bit or q._load_in_4bit then
    return { type = q.bnb_4bit_quant_type or "fp4", block_size = 64, double_quant = q.bnb_4bit_use_double_quant or false,
             compute = M.short_name(q.bnb_4bit_compute_dtype) or "f32", skip = q.llm_int8_skip_modules }
  elseif q.load_in_8bit or q._load_in_8bit then
    return { type = "int8", threshold = q.llm_int8_threshold or 6.0, skip = q.llm_int8_skip_modules }
  end
  return nil
end

-- ---------------------------------------------------------------- writing

--- quant_state's JSON, in upstream's key order.
-- @param q table { type, block_size, dtype = "f32", shape, double_quant }
-- @param offset number|nil mean of the scales (double quantization)
function M.state_text(q, offset)
  local shape = {}
  for i, v in ipairs(q.shape) do shape[i] = ("%d"):format(v) end
  local text = ('{"quant_type": "%s", "blocksize": %d, "dtype": "%s", "shape": [%s]'):format(
    q.type, q.block_size, M.long_name(q.dtype), table.concat(shape, ", "))
  if q.double_quant then
    text = text .. (', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": %s'):format(json.number(offset, true))
  end
  return text .. "}"
end

--- quantization_config of a folder that wane alone reads: without a quant_method transformers refuses it, where it would take the codes for
-- weights otherwise. Each tensor says itself how it is quantized.
-- @param scheme table { type = of most layers, double_quant, compute, threshold }
-- @param skip string[]|nil
function M.foreign_config(scheme, skip)
  return { wane = scheme.type, double_quant = scheme.double_quant or false, compute = M.long_name(M.short_name(scheme.compute or "f32")),
           threshold = setmetatable({ scheme.threshold or 6.0 }, json.float), skip = setmetatable(skip or {}, json.list) }
end

--- config.json's quantization_config of a scheme.
-- @param scheme table { type, double_quant, compute, threshold }
-- @param skip string[]|nil
function M.config(scheme, skip)
  local four = scheme.type == "nf4" or scheme.type == "fp4"
  return {
    _load_in_4bit = four, _load_in_8bit = not four, load_in_4bit = four, load_in_8bit = not four,
    bnb_4bit_compute_dtype = M.long_name(M.short_name(scheme.compute or "f32")), bnb_4bit_quant_storage = "uint8",
    bnb_4bit_quant_type = four and scheme.type or "fp4", bnb_4bit_use_double_quant = scheme.double_quant or false,
    llm_int8_enable_fp32_cpu_offload = false, llm_int8_has_fp16_weight = false,
    llm_int8_skip_modules = skip and setmetatable(skip, json.list) or require("cjson").null,
    llm_int8_threshold = setmetatable({ scheme.threshold or 6.0 }, json.float), quant_method = "bitsandbytes",
  }
end

return M
