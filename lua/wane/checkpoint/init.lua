--- Checkpoints: what is in a model's files, under the names users know, whatever the files call it.
--
--     local ckpt = assert(wane.checkpoint.open "SmolLM2-135M-Instruct")       -- a folder or a .gguf file
--     print(ckpt.config.hidden_size, #ckpt:names())
--     local entry = ckpt:find "model.layers.0.mlp.up_proj.weight"             -- dtype, shape, quant
--     local tensors = assert(wane.loader.load(ckpt, { { entry = entry, dtype = "f32" } }))
-- @module wane.checkpoint
local core = require "wane.core"
local C = core.C
local gguf = require "wane.checkpoint.gguf"
local index = require "wane.checkpoint.index"
local json = require "wane.checkpoint.json"
local names = require "wane.checkpoint.names"
local paths = require "wane.checkpoint.paths"
local quantized = require "wane.checkpoint.quantized"

local M = { names = names }

---@class wane.Checkpoint
---@field path string
---@field format string "safetensors", "torch" or "gguf"
---@field config table config.json's fields, nulls removed (made from the metadata for GGUF)
---@field generation_config table|nil
---@field quant table|nil the scheme that the files are quantized with: { type, block_size, double_quant, threshold, compute, skip }
---@field index wane.Index
local Checkpoint = {}
Checkpoint.__index = Checkpoint

-- ---------------------------------------------------------------- opening

local function is_file(path) return C.wane_path_kind(path) == C.WANE_PATH_FILE end

local weight_files = { "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json" }

-- The weights of a folder: what the config names, else in the order in which transformers looks for them. A variant stands before the
-- last ending: model.fp16.safetensors, model.safetensors.index.fp16.json.
local function weights_of(folder, config, variant)
  local stated = config.transformers_weights
  if type(stated) == "string" then
    if stated:find "[/\\]" or stated == ".." or stated == "." then
      return nil, ("'%s/config.json': transformers_weights must be a file beside it, found '%s'"):format(folder, stated), "WANE_E_FORMAT"
    end
    return folder .. "/" .. stated
  end
  local tried = {}
  for i, name in ipairs(weight_files) do
    tried[i] = variant and name:gsub("%.(%w+)$", "." .. variant:gsub("%%", "%%%%") .. ".%1") or name
    if is_file(folder .. "/" .. tried[i]) then return folder .. "/" .. tried[i] end
  end
  if is_file(folder .. "/adapter_config.json") then
    return nil, ("'%s' holds an adapter, not a model: wane.load takes it with its base"):format(folder), "WANE_E_UNSUPPORTED"
  end
  return nil, ("'%s' has none of %s"):format(folder, table.concat(tried, ", ")), "WANE_E_NOTFOUND"
end

-- Every file that the folder's weights are read from, links followed, is the folder's own (see paths.lua).
local function check_links(folder, ix)
  for _, file in ipairs(ix:files()) do
    local ok, message, code = paths.check(folder, file)
    if not ok then return nil, message, code end
  end
  return true
end

-- `weights`: a file of the folder, where the caller named one.
local function open_folder(path, weights, variant)
  local ok, message, code = paths.check(path, path .. "/config.json")
  if not ok then return nil, message, code end
  local config
  config, message, code = json.read(path .. "/config.json")
  if not config then
    if not is_file(path .. "/config.json") then
      local unfinished = require("wane.checkpoint.staging").complaint(path)
      if unfinished then return nil, unfinished, "WANE_E_FORMAT" end
      if is_file(path .. "/adapter_config.json") then
        return nil, ("'%s' holds an adapter, not a model: wane.load takes it, with its base model"):format(path), "WANE_E_UNSUPPORTED"
      end
      return nil, ("'%s' has no config.json: a model's folder has config.json and model.safetensors; a GGUF model is named by its .gguf file"):format(path),
        "WANE_E_NOTFOUND"
    end
    return nil, message, code
  end
  local self = { path = path, folder = path, config = config, config_text = message }
  self.quant, message = quantized.scheme(config)
  if message then return nil, ("'%s': %s"):format(path, message), "WANE_E_UNSUPPORTED" end
  if is_file(path .. "/generation_config.json") then
    self.generation_config, message, code = json.read(path .. "/generation_config.json")
    if not self.generation_config then return nil, message, code end
  end
  if not weights then weights, message, code = weights_of(path, config, variant) end
  if not weights then return nil, message, code end
  ok, message, code = paths.check(path, weights)
  if not ok then return nil, message, code end
  self.index, message, code = index.open(weights)
  if not self.index then return nil, message, code end
  ok, message, code = check_links(path, self.index)
  if not ok then
    self.index:close()
    return nil, message, code
  end
  return self
end

--- Opens a checkpoint: a model's name in the local Hugging Face cache (org/name, org/name@revision), a Hugging Face folder
-- (safetensors or pytorch_model.bin, single or sharded; quantized by bitsandbytes or wane, or not), one weight file or list of shards
-- with its config.json beside it, or a .gguf file. Reads headers only; waits as core.wait_job does.
-- @param path string
-- @param opts table|nil { variant = "fp16": of a folder that holds several, the files of that name }
-- @return wane.Checkpoint|nil, string|nil message, string|nil code
function M.open(path, opts)
  local variant = opts and opts.variant
  if variant ~= nil and (type(variant) ~= "string" or variant:find "[/\\]" or variant == "") then
    core.raise("checkpoint.open: variant is the middle of a file name such as 'fp16', found '%s'", tostring(variant))
  end
  if type(path) ~= "string" then core.raise("checkpoint.open: a path was expected, found a %s", type(path)) end
  local self, message, code
  path, message, code = require("wane.hub").resolve(path)
  if not path then return nil, message, code end
  if C.wane_path_kind(path) == C.WANE_PATH_FOLDER then
    self, message, code = open_folder((path:gsub("(.)/+$", "%1")), nil, variant)
    if not self then return nil, message, code end
  else
    local ix
    ix, message, code = index.open(path)
    if not ix then return nil, message, code end
    self = { path = path, index = ix }
    if ix:format() == "gguf" then
      self.config, message, code = gguf.config(ix)
      if not self.config then
        ix:close()
        return nil, message, code
      end
      self.generation_config = message
    else
      local folder = path:match "^(.*)/[^/]*$" or "."
      if not is_file(folder .. "/config.json") then
        ix:close()
        return nil, ("'%s' are weights without a config.json beside them: name the model's folder "
          .. "(wane.checkpoint.read_safetensors reads tensors alone)"):format(path), "WANE_E_NOTFOUND"
      end
      ix:close()
      self, message, code = open_folder(folder, path)
      if not self then return nil, message, code end
    end
  end
  self.format = self.index:format()
  self.model_type = self.config.model_type
  if self.format ~= "gguf" then self.missing = names.missing_prefix(self.model_type, self.index:each_name()) end
  return setmetatable(self, Checkpoint)
end

--- Does a folder hold a model's weights, in whatever format?
-- @param folder string
-- @return boolean
function M.has_weights(folder)
  for _, name in ipairs(weight_files) do
    if is_file(folder .. "/" .. name) then return true end
  end
  return false
end

-- ---------------------------------------------------------------- asking

-- The file's entry of a canonical name.
local function file_entry(self, name)
  if self.format == "gguf" then return gguf.find(self.config, self.index, name) end
  for _, spelling in ipairs(names.spellings(self.model_type, name)) do
    local e = self.index:find(spelling)
    if e then return e end
  end
end

--- The entry of a tensor by its canonical name, or nil. Fields: name, file_name, dtype (of the values as stored: "f32", "q4_1"; the
-- quantized type's name where it is quantized), file_dtype, shape (logical), bytes, quant (nil or { type, block_size, double_quant, … }),
-- invalid (a message, where its parts do not fit together: loading it fails with that), arrange (how its values are moved when they
-- are read: "transpose" for a matrix that the file holds the other way round than `shape` says). GGUF: see wane.checkpoint.gguf.find.
-- @param name string
-- @return table|nil
function Checkpoint:find(name)
  local e = file_entry(self, name)
  if not e or self.format == "gguf" then return e end
  e.file_name, e.name = e.name, name
  local q, message = quantized.recognise(self.index, e.file_name, e)
  if not q and names.is_transposed(self.model_type, name) and #e.shape == 2 then
    e.arrange, e.shape = "transpose", { e.shape[2], e.shape[1] }
  end
  if q then
    e.codes, e.quant, e.shape, e.dtype = e.shape, q, q.shape, q.type
    for _, part in pairs(q.parts) do e.bytes = e.bytes + part.bytes end
    if self.quant then q.compute = self.quant.compute end
    if q.type == "int8" then q.threshold = self.quant and self.quant.threshold or 6.0 end
  end
  e.invalid = message
  return e
end

--- Canonical names of all tensors, in the order of the files. Parts of quantized weights and buffers that no model needs are left out;
-- a tensor that the files hold under several names comes once.
-- @return string[]
function Checkpoint:names()
  if self.format == "gguf" then return gguf.names(self.config, self.index) end
  local list, there = {}, {}
  for i = 0, self.index:count() - 1 do
    local name = self.index:name(i)
    if not names.is_ignorable(name, self.model_type) and not self:is_part(name) then
      local canonical = self:canonical(name)
      if not there[canonical] then list[#list + 1] = canonical end
      there[canonical] = true
    end
  end
  return list
end

--- Is this file name a part of a quantized weight (scales, maps) of this checkpoint?
function Checkpoint:is_part(name)
  if not quantized.is_part(name) then return false end
  local stem = name:match "^(.*)%.weight%." or name:match "^(.*)%.[^.]+$"
  return self.index:has(stem .. ".weight")
end

--- The canonical name of a safetensors file's spelling.
function Checkpoint:canonical(name)
  return names.canonical(self.model_type, name, self.missing)
end

--- What a model wants and the files lack, and the other way round.
-- @param wanted string[] canonical names
-- @return table { missing = string[], unexpected = string[] }
function Checkpoint:report(wanted)
  local known, missing, unexpected = {}, {}, {}
  for _, name in ipairs(wanted) do
    known[name] = true
    if not file_entry(self, name) then missing[#missing + 1] = name end
  end
  for _, name in ipairs(self:names()) do if not known[name] then unexpected[#unexpected + 1] = name end end
  return { missing = missing, unexpected = unexpected }
end

--- Lets the files go; tensors that were loaded stay.
function Checkpoint:close() self.index:close() end

-- ---------------------------------------------------------------- tensors alone

local descriptions = { safetensors = "a safetensors file", torch = "a file of torch.save", gguf = "a GGUF file" }

-- All tensors of a file (or of a list of shards) of a format.
local function read_all(path, format, opts)
  local ix, message, code = index.open(path)
  if not ix then return nil, message, code end
  if ix:format() ~= format then
    message = ("'%s' is %s, %s was expected"):format(path, descriptions[ix:format()], descriptions[format])
    ix:close()
    return nil, message, "WANE_E_FORMAT"
  end
  local requests, metadata, tensors = {}, {}, {}
  for _, key in ipairs(format == "torch" and {} or ix:keys()) do metadata[key] = ix:meta(key) end
  for i = 0, ix:count() - 1 do requests[#requests + 1] = { entry = ix:entry(i) } end
  local list
  list, message, code = require("wane.loader").load({ path = path, index = ix }, requests, opts)
  ix:close()
  if not list then return nil, message, code end
  for i, request in ipairs(requests) do tensors[request.entry.name] = list[i] end
  return tensors, metadata
end

--- The tensors of a safetensors file (or of a list of shards), mapped: reading them costs nothing until they are used.
-- The file must not be truncated meanwhile; opts.io = "read" copies instead. F64 comes as f32, I16 as i32.
-- @param path string
-- @param opts table|nil { io = "mmap" | "read" }
-- @return table|nil { name = Tensor }, table|string metadata or message, string|nil code
function M.read_safetensors(path, opts) return read_all(path, "safetensors", opts) end

--- The tensors of a file of torch.save (pytorch_model.bin, adapter_model.bin; or of a list of shards): a dict from names to tensors. Nothing
-- in the file is run. Mapped where they lie in order and aligned, else copied; float64 comes as f32, int16 as i32.
-- @param path string
-- @param opts table|nil { io = "mmap" | "read" }
-- @return table|nil { name = Tensor }, string|nil message, string|nil code
function M.read_torch(path, opts)
  local tensors, message, code = read_all(path, "torch", opts)
  if not tensors then return nil, message, code end
  return tensors
end

--- Writes a safetensors file: whole or not at all (a temporary file is renamed; a full disk leaves the old file).
-- @param path string
-- @param tensors table { name = Tensor }, plain dtypes
-- @param metadata table|nil { string = string }
-- @return true|nil, string|nil message, string|nil code
function M.write_safetensors(path, tensors, metadata)
  return require("wane.checkpoint.writer").write(path, tensors, metadata)
end

--- Writes a quantized copy of a checkpoint as a folder in bitsandbytes' own layout; see wane.checkpoint.quantize.
-- @return table|nil, string|nil message, string|nil code
function M.write_quantized(dir, opts)
  return require("wane.checkpoint.quantize").write(dir, opts)
end

return M
