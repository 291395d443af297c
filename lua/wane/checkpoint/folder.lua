--- Writing a model's folder: shards with an index, config.json, and what lies beside them. What goes in is a list of items
-- (wane.checkpoint.layout), from a checkpoint (wane.checkpoint.quantize) or from a model in memory (wane.checkpoint.save).
--
-- Items are loaded, written and let go one by one, so a model larger than memory can be written. Files above the shard size are split
-- as transformers splits them. What a killed run leaves is told in wane.checkpoint.staging.
-- @module wane.checkpoint.folder
local json = require "wane.checkpoint.json"
local layout = require "wane.checkpoint.layout"
local paths = require "wane.checkpoint.paths"
local quantized = require "wane.checkpoint.quantized"
local staging = require "wane.checkpoint.staging"
local writer = require "wane.checkpoint.writer"

local M = {}

-- ---------------------------------------------------------------- shards

-- Lists of items for each file, in the given order.
local function cut(items, most)
  local shards, bytes = { {} }, 0
  for _, item in ipairs(items) do
    local size = layout.bytes(item)
    if bytes > 0 and bytes + size > most then
      shards[#shards + 1] = {}
      bytes = 0
    end
    table.insert(shards[#shards], item)
    bytes = bytes + size
  end
  for i, shard in ipairs(shards) do
    shard.name = #shards == 1 and "model.safetensors" or ("model-%05d-of-%05d.safetensors"):format(i, #shards)
    layout.sort(shard)
  end
  return shards
end

-- What decides whether shards that lie there are these ones: the source, and every tensor with its scheme.
local function plan_text(spec, shards)
  local files = {}
  for i, shard in ipairs(shards) do
    local lines = {}
    for k, item in ipairs(shard) do
      local s = item.scheme
      local how = s and { s.type, s.block_size or 0, s.double_quant and "double" or nil } or {}
      lines[k] = ("%s %s %s %s"):format(item.name, item.dtype, table.concat(item.shape, "x"), table.concat(how, " "))
    end
    files[i] = { name = shard.name, tensors = lines }
  end
  return json.encode { what = spec.what, source = spec.source, files = files } .. "\n"
end

local function write_items(w, shard, keys, report)
  for _, item in ipairs(shard) do
    local fine, ok, message, code = pcall(layout.write, w, item, keys[item])
    if not fine then return nil, tostring(ok), "WANE_E_FAILED" end
    if not ok then return nil, message, code end
    report(item)
  end
  return true
end

-- Writes one shard; returns its keys with their shapes.
local function write_shard(path, shard, report)
  local plan, keys = {}, {}
  for _, item in ipairs(shard) do
    keys[item] = layout.keys(item)
    for key, k in pairs(keys[item]) do plan[key] = k end
  end
  local w, message, code = writer.open(path, plan, { format = "pt" })
  if not w then return nil, message, code end
  local ok
  ok, message, code = write_items(w, shard, keys, report)
  if not ok then
    w:close()
    return nil, message, code
  end
  ok, message, code = w:finish()
  if not ok then return nil, message, code end
  return w.plan
end

-- Every shard written or found; the index' weight map, and the bytes of all tensors.
local function write_shards(stage, shards, spec, result)
  local map, total = {}, 0
  local function report(item)
    result.bytes, result.tensors = result.bytes + item.bytes, result.tensors + 1
    if spec.progress then spec.progress(result.bytes, result.total, result.tensors) end
  end
  for _, shard in ipairs(shards) do
    local path, keys = stage:finished(shard.name, shard)
    if path then
      result.resumed = result.resumed + 1
      if spec.kept then spec.kept(path, shard) end
      for _, item in ipairs(shard) do report(item) end
    else
      local message, code
      keys, message, code = write_shard(stage.path .. "/" .. shard.name, shard, report)
      if not keys then return nil, message, code end
    end
    for key, k in pairs(keys) do
      local bytes = layout.widths[k.dtype]
      for _, size in ipairs(k.shape) do bytes = bytes * size end
      map[key], total = shard.name, total + bytes
    end
  end
  return map, total
end

-- ---------------------------------------------------------------- the small files

-- What a model needs beside its weights.
local companions = { "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
                     "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json", "LICENSE" }

local function copy(from, to)
  local f = io.open(from, "rb")
  if not f then return true end
  local text = f:read "*a"
  f:close()
  return writer.write_text(to, text or "")
end

--- Writes what lies beside the weights: generation_config.json, and the tokenizer of the source, copied or (GGUF) written anew.
-- @param dir string
-- @param from table { folder = nil | string, generation_config = nil | table, gguf = nil | wane.Index }
-- @return true|nil, string message or nil | why a GGUF's tokenizer could not be written, string|nil code
function M.write_companions(dir, from)
  local ok, message, code = true
  if from.folder and paths.real(from.folder) ~= paths.real(dir) then
    for _, name in ipairs(companions) do
      ok, message, code = copy(from.folder .. "/" .. name, dir .. "/" .. name)
      if not ok then return nil, message, code end
    end
  end
  if from.folder and paths.is_file(from.folder .. "/generation_config.json") then
    ok, message, code = copy(from.folder .. "/generation_config.json", dir .. "/generation_config.json")
  elseif from.generation_config and next(from.generation_config) then
    ok, message, code = writer.write_text(dir .. "/generation_config.json", json.encode(from.generation_config) .. "\n")
  end
  if not ok then return nil, message, code end
  if not from.gguf then return true end
  local written, reason = require("wane.checkpoint.tokenizer").write(from.gguf, dir)
  return true, not written and reason or nil
end

-- A config's text without its quantization_config, and without the comma that stood before or behind it.
local function without_quantization(text)
  local from, to = text:find '"quantization_config"%s*:%s*%b{}'
  if not from then return text end
  local before, behind = text:sub(1, from - 1), text:sub(to + 1)
  if behind:find "^%s*," then return before .. behind:gsub("^%s*,%s*", "", 1) end
  return (before:gsub(",%s*$", "", 1)) .. behind
end

-- Keys beside a multimodal config's text_config that are the text model's too; of those in a row one is enough.
local shared = { { "torch_dtype", "dtype" }, { "bos_token_id" }, { "eos_token_id" }, { "pad_token_id" }, { "tie_word_embeddings" },
                 { "transformers_version" } }

--- The config under which the text part of a multimodal model is a model of its own: its text_config, with what it shares with the
-- parts that stay behind. Numbers keep their spelling. Any other config comes back as it is.
-- @param config table
-- @param text string|nil its config.json
-- @return table config, string|nil text, boolean is it a part?
function M.text_part(config, text)
  local architecture, model_type = require("wane.models").text_part(config)
  if not architecture then return config, text, false end
  local inner = config.text_config
  local own = text and text:match '"text_config"%s*:%s*(%b{})'
  if not own or not json.decode(own) then own = json.encode(inner) end
  for _, key in ipairs { "model_type", "architectures" } do            -- null, "…" or [ … ]
    own = own:gsub('%s*"' .. key .. '"%s*:%s*%b[]%s*,?', "", 1):gsub('%s*"' .. key .. '"%s*:%s*[%w_"]+%s*,?', "", 1)
  end
  local fields = { '"architectures": ' .. json.encode({ architecture }, "  "), '"model_type": ' .. json.string(model_type) }
  for _, keys in ipairs(shared) do
    local said = false
    for _, key in ipairs(keys) do said = said or inner[key] ~= nil end
    for _, key in ipairs(said and {} or keys) do
      if config[key] ~= nil then
        own = own:gsub('%s*"' .. key .. '"%s*:%s*null%s*,?', "", 1)
        fields[#fields + 1] = json.string(key) .. ": " .. json.encode(config[key], "  ")
      end
    end
  end
  local rest = own:match "^{%s*(.-)%s*}$":gsub(",$", ""):gsub("\n    ", "\n  ")
  if rest ~= "" then fields[#fields + 1] = rest end
  own = "{\n  " .. table.concat(fields, ",\n  ") .. "\n}\n"
  return json.decode(own), own, true
end

--- config.json of a folder: the source's own text with its dtype and quantization_config replaced, so that nothing else in it changes;
-- without such a text it is written anew.
-- @param config table|nil used where there is no text
-- @param text string|nil the source's config.json
-- @param dtype string|nil of what is not quantized ("bf16"); nil: as it says
-- @param addition table|nil the quantization_config
-- @return string
function M.config_text(config, text, dtype, addition)
  if not text then
    local c = {}
    for k, v in pairs(config) do if not k:find "^gguf_" then c[k] = v end end
    c.torch_dtype, c.quantization_config = quantized.long_name(dtype or "f32"), addition
    return json.encode(c) .. "\n"
  end
  text = without_quantization(text)
  if dtype then
    text = text:gsub('("torch_dtype"%s*:%s*)"[%w_]+"', '%1"' .. quantized.long_name(dtype) .. '"', 1)
    text = text:gsub('("dtype"%s*:%s*)"[%w_]+"', '%1"' .. quantized.long_name(dtype) .. '"', 1)
  end
  if not addition then return text end
  return (text:gsub("%s*}%s*$", function() return ',\n  "quantization_config": ' .. json.encode(addition, "  ") .. "\n}\n" end))
end

-- ---------------------------------------------------------------- the whole

-- Index, companions and config of shards that are in their places.
local function write_small(dir, shards, map, total, spec)
  if #shards > 1 then
    local ok, message, code = writer.write_text(dir .. "/model.safetensors.index.json",
      json.encode { metadata = { total_size = total }, weight_map = map } .. "\n")
    if not ok then return nil, message, code end
  end
  local ok, tokenizer_error, code = M.write_companions(dir, spec.companions)
  if not ok then return nil, tokenizer_error, code end
  local written, message, number = writer.write_text(dir .. "/config.json", spec.config)
  if not written then return nil, message, number end
  return true, tokenizer_error
end

--- Writes a folder. It appears whole: until all weights are down an old model there stays as it is, and config.json comes last.
-- @param dir string made if it is not there
-- @param spec table { what = "wane quantize" (for the message about a folder that a killed run left), source = string | nil (of what the
--   weights are made: text that changes when it does; nil: nothing of an earlier run is ever kept), items (each with `bytes`: of the
--   input), config = string, companions = see write_companions, max_shard_bytes = 5e9, progress = function(bytes, of, tensors),
--   kept = function(path, items): a shard of an earlier run is used }
-- @return table|nil { bytes = of the input, tensors, shards, resumed = shards of an earlier run, tokenizer_error }, string|nil message, string|nil code
function M.write(dir, spec)
  local shards, names = cut(spec.items, spec.max_shard_bytes or 5e9), {}
  for i, shard in ipairs(shards) do names[i] = shard.name end
  local stage, message, code = staging.open(dir, plan_text(spec, shards))
  if not stage then return nil, message, code end
  if not spec.source then stage.resumed = false end
  local result = { bytes = 0, tensors = 0, total = 0, resumed = 0, shards = #shards }
  for _, item in ipairs(spec.items) do result.total = result.total + item.bytes end
  local map, total, reason = write_shards(stage, shards, spec, result)
  if not map then return nil, total, reason end
  local ok
  ok, message, code = stage:commit(names)
  if not ok then return nil, message, code end
  ok, message, code = write_small(dir, shards, map, total, spec)
  if not ok then return nil, message, code end
  stage:close()
  result.tokenizer_error = message
  return result
end

return M
