--- Saving tensors and tables of them: wane.save(path, value), wane.load_tensors(path).
--
--     wane.save("state.safetensors", { step = 10, weights = { w, b }, mask = m })
--     local state = assert(wane.load_tensors "state.safetensors")
--
-- The file is plain safetensors, which any reader of that format can open: a tensor's name there is its path ("weights.1"). How
-- the table was built, numbers and strings in it, and quantized tensors (stored as their parts) are told by JSON in the metadata
-- under "wane.structure"; a file without it gives { name = tensor }.
-- @module wane.serialize
local ffi = require "ffi"
local core = require "wane.core"
local json = require "wane.checkpoint.json"
local Tensor = require "wane.tensor"
local C, stream = core.C, core.stream

local M = {}

local STRUCTURE = "wane.structure"
local parts = { "codes", "absmax", "nested_absmax", "nested_code", "code", "offset" }
local numbers = { codes = C.WANE_PART_CODES, absmax = C.WANE_PART_ABSMAX, nested_absmax = C.WANE_PART_NESTED_ABSMAX,
  nested_code = C.WANE_PART_NESTED_CODE, code = C.WANE_PART_CODE, offset = C.WANE_PART_OFFSET }

-- ---------------------------------------------------------------- writing

--- Whether a table is a list: keys 1 to n and no others.
local function is_list(t)
  local n = 0
  for _ in pairs(t) do n = n + 1 end
  return n > 0 and n == #t
end

local describe

--- A quantized tensor: its kind, and its parts as tensors of their own.
local function describe_quantized(t, path, tensors)
  local node = { quantized = t:dtype(), shape = t:shape(), block_size = t:info().block_size, parts = {} }
  for _, name in ipairs(parts) do
    local part = t[name]
    if part then node.parts[name] = describe(part, path .. "." .. name, tensors).tensor end
  end
  return node
end

--- What stands at `path` of the value, for the metadata; its tensors are put into `tensors` under their names.
function describe(value, path, tensors)
  if Tensor.is(value) then
    if value:info().dtype >= C.WANE_DTYPE_PLAIN then return describe_quantized(value, path, tensors) end
    local name = path == "" and "tensor" or path
    if tensors[name] then core.raise("save: two tensors would have the name '%s' in the file", name) end
    tensors[name] = value
    return { tensor = name }
  end
  local kind = type(value)
  if kind == "string" or kind == "boolean" then return { value = value } end
  if kind == "number" then return { number = ("%.17g"):format(value) } end       -- inf and nan too
  if kind ~= "table" then core.raise("save: %s is a %s; expected tensors, tables, numbers, strings", path == "" and "the value" or "'" .. path .. "'", kind) end
  local list = is_list(value)
  local node = { [list and "list" or "map"] = {} }
  local into = node.list or node.map
  for key, v in pairs(value) do
    if not list and type(key) ~= "string" then core.raise("save: key %s of '%s': a table is a list, or has string keys", tostring(key), path) end
    into[key] = describe(v, (path == "" and "" or path .. ".") .. tostring(key), tensors)
  end
  return node
end

--- Writes a tensor, or a (nested) table of tensors, numbers, strings and booleans. The file appears whole or not at all.
-- @param path string
-- @param value wane.Tensor|table
-- @return true|nil, string|nil message, string|nil code
function M.save(path, value)
  if type(path) ~= "string" then core.raise("save: expected a path, found a %s", type(path)) end
  local tensors = {}
  local structure = describe(value, "", tensors)
  return require("wane.checkpoint").write_safetensors(path, tensors, { format = "wane", [STRUCTURE] = json.encode(structure) })
end

-- ---------------------------------------------------------------- reading

--- A quantized tensor from its parts, which it keeps alive.
local function quantized(node, tensors)
  local pointers = ffi.new("const wane_handle *[?]", C.WANE_PARTS)
  for name, stored in pairs(node.parts) do
    local part = tensors[stored]
    if not part or not numbers[name] then return nil end
    pointers[numbers[name]] = part.h
  end
  local h = core.handle_type()
  local shape, n = core.shape(node.shape)
  if C.wane_quantized_new(stream(), h, C.wane_dtype_from_name(node.quantized), n, shape, node.block_size, 0, pointers) < 0 then return nil end
  for _, stored in pairs(node.parts) do tensors[stored]:close() end
  return Tensor.wrap(h)
end

--- The value that a node of the structure tells of; nil, what is wrong.
local function rebuild(node, tensors)
  if type(node) ~= "table" then return nil, "a node is a " .. type(node) end
  if node.tensor then return tensors[node.tensor], "tensor '" .. tostring(node.tensor) .. "' is missing" end
  if node.quantized then return quantized(node, tensors), "the parts of a quantized tensor do not fit: " .. ffi.string(C.wane_error()) end
  if node.value ~= nil then return node.value end
  if node.number then return tonumber(node.number), "no number: " .. tostring(node.number) end
  local from, out = node.list or node.map, {}
  if type(from) ~= "table" then return nil, "a node without a kind" end
  for key, child in pairs(from) do
    local value, problem = rebuild(child, tensors)
    if value == nil then return nil, problem end
    out[key] = value
  end
  return out
end

--- Reads what save wrote; any other safetensors file as { name = tensor }. Tensors are mapped from the file (opts.io = "read"
-- copies them): nothing is read before it is used, and writing to them does not change the file.
-- @param path string
-- @param opts table|nil { io = "mmap" | "read" }
-- @return wane.Tensor|table|nil value, string|nil message, string|nil code
function M.load(path, opts)
  if type(path) ~= "string" then core.raise("load_tensors: expected a path, found a %s", type(path)) end
  local tensors, metadata, code = require("wane.checkpoint").read_safetensors(path, opts)
  if not tensors then return nil, metadata, code end
  local text = metadata[STRUCTURE]
  if not text then return tensors end
  local structure, problem = json.decode(text)
  local value
  if structure then value, problem = rebuild(structure, tensors) end
  if value == nil then return nil, ("'%s': the structure in its metadata is damaged: %s"):format(path, problem), "WANE_E_FORMAT" end
  return value
end

return M
