--- Checkpoints of a training run: folders checkpoint-N that hold all that the next update depends on, and are never there in part.
--
--     checkpoint-N/adapter_config.json, adapter_model.safetensors     the adapter, as PEFT reads it (where one is trained)
--     checkpoint-N/parameters.safetensors                             every trained tensor, by its name
--     checkpoint-N/optimizer.safetensors                              moments and step counts
--     checkpoint-N/trainer_state.json                                 step, data position, best result, the run's options
--
-- A checkpoint is written as .checkpoint-N.part and renamed when it is whole; what a kill leaves behind is swept by the next run.
-- @module wane.train.saves
local cjson = require "cjson"
local json = require "wane.checkpoint.json"
local paths = require "wane.checkpoint.paths"
local serialize = require "wane.serialize"
local writer = require "wane.checkpoint.writer"
local C = require("wane.core").C

local M = {}

local function remove_folder(dir)
  for _, name in ipairs(paths.list(dir)) do os.remove(dir .. "/" .. name) end
  return os.remove(dir)
end

-- Steps of the whole checkpoints in a folder, falling.
local function steps_in(dir)
  local steps = {}
  if not paths.is_folder(dir) then return steps end
  for _, name in ipairs(paths.list(dir)) do
    local step = tonumber(name:match "^checkpoint%-(%d+)$")
    if step then steps[#steps + 1] = step end
  end
  table.sort(steps, function(a, b) return a > b end)
  return steps
end

--- The newest checkpoint of a run.
-- @param dir string the run's folder
-- @return string|nil path, integer|nil step
function M.latest(dir)
  local step = steps_in(dir)[1]
  if step then return ("%s/checkpoint-%d"):format(dir, step), step end
end

--- Sweeps what killed runs left in a folder.
function M.sweep(dir)
  if not paths.is_folder(dir) then return end
  for _, name in ipairs(paths.list(dir)) do if name:find "^%.checkpoint%-%d+%.part$" then remove_folder(dir .. "/" .. name) end end
end

local function by_name(params)
  local tensors = {}
  for _, p in ipairs(params) do tensors[p.name] = p end
  return tensors
end

-- The files of a checkpoint, one after the other; nil and why where one fails.
local function write_files(dir, run)
  local model, lora = run.model, require "wane.lora"
  local steps = {
    function() return not rawget(model, "lora") or #model.lora.active == 0 or lora.save(model, dir) end,
    function() return serialize.save(dir .. "/parameters.safetensors", by_name(run.params)) end,
    function() return run.opt:save(dir .. "/optimizer.safetensors") end,
    function() return writer.write_text(dir .. "/trainer_state.json", json.encode(run.state)) end,
  }
  for _, step in ipairs(steps) do
    local ok, message, code = step()
    if not ok then return nil, message, code end
  end
  return true
end

--- Writes checkpoint-STEP, then removes the oldest beyond `limit`.
-- @param dir string the run's folder
-- @param step integer
-- @param run table { model, params = trained tensors, opt, state = table for trainer_state.json }
-- @param limit integer|nil whole checkpoints to keep
-- @return string|nil its path, string|nil message
function M.write(dir, step, run, limit)
  local part, whole = ("%s/.checkpoint-%d.part"):format(dir, step), ("%s/checkpoint-%d"):format(dir, step)
  if paths.is_folder(part) then remove_folder(part) end
  if C.wane_path_make(part) < 0 then return nil, ("cannot make the folder '%s'"):format(part) end
  local ok, message, code = write_files(part, run)
  if not ok then
    remove_folder(part)
    return nil, message, code
  end
  if paths.is_folder(whole) then remove_folder(whole) end
  ok, message = os.rename(part, whole)
  if not ok then return nil, message end
  local steps = steps_in(dir)
  for i = (limit or math.huge) + 1, #steps do remove_folder(("%s/checkpoint-%d"):format(dir, steps[i])) end
  return whole
end

--- Reads a checkpoint into a run that was set up as the one that wrote it.
-- @param path string of a checkpoint-N
-- @param run table { params, opt }
-- @return table|nil the state of trainer_state.json, string|nil message
function M.read(path, run)
  local f, message = io.open(path .. "/trainer_state.json")
  if not f then return nil, message end
  local ok, state = pcall(cjson.decode, f:read "*a")
  f:close()
  if not ok then return nil, path .. "/trainer_state.json is no JSON" end
  local saved
  saved, message = serialize.load(path .. "/parameters.safetensors")
  if not saved then return nil, message end
  for _, p in ipairs(run.params) do
    local from = saved[p.name]
    if not from then return nil, ("%s holds no '%s', which is trained here"):format(path, p.name) end
    if from:describe() ~= p:describe() then return nil, ("%s: '%s' is %s, expected %s"):format(path, p.name, from:describe(), p:describe()) end
  end
  for _, p in ipairs(run.params) do p:copy(saved[p.name]) end
  ok, message = run.opt:load(path .. "/optimizer.safetensors")
  if not ok then return nil, message end
  return state
end

return M
