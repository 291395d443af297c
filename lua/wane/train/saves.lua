--- Checkpoints of a training run: folders checkpoint-N that hold all that the next update depends on, and are never there in part, whether
-- the process is killed or the machine goes down.
--
--     checkpoint-N/adapter_config.json, adapter_model.safetensors     the adapter, as PEFT reads it (where one is trained; of several, NAME/… each)
--     checkpoint-N/parameters.safetensors                             every trained tensor, by its name
--     checkpoint-N/optimizer.safetensors                              moments and step counts
--     checkpoint-N/trainer_state.json                                 step, data position, best result, the run's options, checksums (XXH64) of
--                                                                     the two files above and of this one (taken with zeros in its own place)
--
-- and best/, the same without the optimizer's and the trainer's. A folder is written as .NAME.part and renamed when it is whole, and renamed to .NAME.old
-- before its files go; what a kill leaves behind is swept by the next run. One run at a time holds the folder, by the lock of DIR/.lock.
-- @module wane.train.saves
local cjson = require "cjson"
local ffi = require "ffi"
local core = require "wane.core"
local json = require "wane.checkpoint.json"
local paths = require "wane.checkpoint.paths"
local serialize = require "wane.serialize"
local writer = require "wane.checkpoint.writer"
local C = core.C

--- `patience` is how many seconds holding() waits for a folder: a run killed just now holds its own until the kernel has freed its memory.
local M = { patience = 3 }

-- ---------------------------------------------------------------- one run a folder

-- The folders of a path that are not there yet, the deepest first.
local function missing(dir)
  local list, at = {}, dir:gsub("(.)/+$", "%1")
  while at ~= "" and C.wane_path_kind(at) == C.WANE_PATH_NONE do
    list[#list + 1] = at
    at = at:match "^(.*[^/])/+[^/]*$" or ""
  end
  return list
end

--- Waits for a lock, `patience` seconds at most. The kernel lets it go when this process ends.
-- @param path string of the lock's file
-- @return cdata|nil to be given to unlock, string|nil message, integer|nil status (WANE_E_TIMEOUT: another process has it)
function M.lock(path)
  local job, box = ffi.new "wane_job *[1]", ffi.new "wane_lock *[1]"
  local status = C.wane_lock_open(job, path, M.patience * 1e9)
  if status >= 0 then
    local handle = ffi.gc(job[0], C.wane_job_free)
    status = core.wait_job(handle)
    if status >= 0 then status = C.wane_lock_take(handle, box) end
  end
  if status >= 0 then return ffi.gc(box[0], C.wane_lock_free) end
  return nil, ffi.string(C.wane_error()), status
end

--- Lets a lock go.
-- @param lock cdata from lock
function M.unlock(lock) C.wane_lock_free(ffi.gc(lock, nil)) end

-- Waits for the lock of dir/.lock: the lock, or nil, message, code.
local function take(dir)
  local lock, message, status
  if C.wane_path_make(dir) < 0 then message = ffi.string(C.wane_error()) else lock, message, status = M.lock(dir .. "/.lock") end
  if lock then return lock end
  if status ~= C.WANE_E_TIMEOUT then return nil, ("cannot write in the folder '%s': %s"):format(dir, message), "io" end
  return nil, ("another run is at work in '%s': %s. Wait for its end, or choose another folder"):format(dir, message), "busy"
end

--- Holds a run's folder while fn runs: no other run can until then, or until this process ends, however it does. The folder is made where it is not
-- there, and goes again where fn left nothing in it. Waits for `patience` seconds where another run has it.
-- @param dir string
-- @param fn function()
-- @return what fn returns; or nil, message, code: "busy" where another run has the folder, "io" where it cannot be written
function M.holding(dir, fn)
  local made = missing(dir)
  local lock, message, code = take(dir)
  local function finish(ok, ...)
    if lock then M.unlock(lock) end
    for _, path in ipairs(made) do if not os.remove(path) then break end end        -- refused where something is in it
    if not ok then error((...), 0) end
    return ...
  end
  if not lock then return finish(true, nil, message, code) end
  return finish(pcall(fn))
end

-- ---------------------------------------------------------------- folders

local function remove_folder(dir)
  for _, name in ipairs(paths.list(dir)) do
    local path = dir .. "/" .. name
    if not os.remove(path) and paths.is_folder(path) then remove_folder(path) end           -- an adapter's; a link goes, not what it leads to
  end
  return os.remove(dir)
end

-- Steps of the whole checkpoints in a folder, falling.
local function steps_in(dir)
  local steps = {}
  if not paths.is_folder(dir) then return steps end
  for _, name in ipairs(paths.list(dir)) do
    local step = tonumber(name:match "^checkpoint%-(%d+)$")
    if step and paths.is_file(("%s/%s/trainer_state.json"):format(dir, name)) then steps[#steps + 1] = step end
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

-- Removes dir/name without a moment in which it is there in part.
local function discard(dir, name)
  if not paths.is_folder(dir .. "/" .. name) then return end
  local old = ("%s/.%s.old"):format(dir, name)
  if os.rename(dir .. "/" .. name, old) then remove_folder(old) end
end

--- Sweeps what killed runs left in a folder.
function M.sweep(dir)
  if not paths.is_folder(dir) then return end
  if not paths.is_folder(dir .. "/best") then os.rename(dir .. "/.best.old", dir .. "/best") end    -- killed between the two renames
  for _, name in ipairs(paths.list(dir)) do
    if name:find "^%.checkpoint%-%d+%.%a+$" or name:find "^%.best%.%a+$" then remove_folder(dir .. "/" .. name) end
  end
end

local function by_name(params)
  local tensors = {}
  for _, p in ipairs(params) do tensors[p.name] = p end
  return tensors
end

-- What a run trains: the adapter as PEFT reads it, and every trained tensor by its name.
local function trained(run)
  return {
    function(dir) return require("wane.lora").save_trained(run.model, dir) end,
    function(dir) return serialize.save(dir .. "/parameters.safetensors", by_name(run.params)) end,
  }
end

-- dir/name with the files that `steps` write, in place of what stood there: its path, or nil and why.
local function write_folder(dir, name, steps)
  local part, whole = ("%s/.%s.part"):format(dir, name), dir .. "/" .. name
  if paths.is_folder(part) then remove_folder(part) end
  if C.wane_path_make(part) < 0 then return nil, ("cannot make the folder '%s'"):format(part) end
  for _, step in ipairs(steps) do
    local ok, message, code = step(part)
    if not ok then
      remove_folder(part)
      return nil, message, code
    end
  end
  local old = ("%s/.%s.old"):format(dir, name)
  local replaced = paths.is_folder(whole) and os.rename(whole, old)
  local ok, message = os.rename(part, whole)
  if not ok then
    if replaced then os.rename(old, whole) end
    return nil, message
  end
  paths.flush(dir)                                       -- before older ones go: a machine that goes down now has this one or those
  if replaced then remove_folder(old) end
  return whole
end

-- ---------------------------------------------------------------- checksums

local SUMMED = { "parameters.safetensors", "optimizer.safetensors" }            -- what a resumed run reads
local ZEROS = ("0"):rep(16)
local OWN = '("trainer_state.json": ")%x+'                                      -- no text of the run's options has such quotes in JSON

-- trainer_state.json, with the checksums of the files that are in `part` by now.
local function write_state(part, state)
  local sums = {}
  for _, name in ipairs(SUMMED) do
    local sum, message, code = paths.hash(part .. "/" .. name)
    if not sum then return nil, message, code end
    sums[name] = sum
  end
  sums["trainer_state.json"] = ZEROS
  state.xxh64 = sums
  local text = json.encode(state)
  return writer.write_text(part .. "/trainer_state.json", (text:gsub(OWN, "%1" .. paths.hash_text(text), 1)))
end

local function damaged(path, sum, expected)
  return nil, ("%s is damaged: its checksum is %s, expected %s"):format(path, sum, expected)
end

-- Whether the files beside a state are those that it was written with; one of an older wane knows no checksums.
local function check_files(path, state)
  for _, name in ipairs(state.xxh64 and SUMMED or {}) do
    local sum, message = paths.hash(path .. "/" .. name)
    if not sum then return nil, message end
    if sum ~= state.xxh64[name] then return damaged(path .. "/" .. name, sum, tostring(state.xxh64[name])) end
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
  local files = trained(run)
  files[#files + 1] = function(part) return run.opt:save(part .. "/optimizer.safetensors") end
  files[#files + 1] = function(part) return write_state(part, run.state) end
  local whole, message, code = write_folder(dir, "checkpoint-" .. step, files)
  if not whole then return nil, message, code end
  local steps = steps_in(dir)
  for i = (limit or math.huge) + 1, #steps do discard(dir, "checkpoint-" .. steps[i]) end
  return whole
end

--- Writes best/: what is trained, as it is now.
-- @param dir string the run's folder
-- @param run table { model, params }
-- @return string|nil its path, string|nil message
function M.write_best(dir, run) return write_folder(dir, "best", trained(run)) end

--- The state of a checkpoint, to be compared with a run's before anything is read into it.
-- @param path string of a checkpoint-N
-- @return table|nil trainer_state.json, string|nil message
function M.state(path)
  local f, message = io.open(path .. "/trainer_state.json")
  if not f then return nil, message end
  local text = f:read "*a"
  f:close()
  local ok, state = pcall(cjson.decode, text)
  if not ok then return nil, path .. "/trainer_state.json is no JSON" end
  if type(state) ~= "table" or type(state.settings) ~= "table" or type(state.feed) ~= "table" or type(state.step) ~= "number" then
    return nil, path .. "/trainer_state.json lacks step, feed or settings"
  end
  if type(state.xxh64) ~= "table" then return state end
  local sum = paths.hash_text((text:gsub(OWN, "%1" .. ZEROS, 1)))
  if sum ~= state.xxh64["trainer_state.json"] then return damaged(path .. "/trainer_state.json", sum, tostring(state.xxh64["trainer_state.json"])) end
  return state
end

--- The newest checkpoint before a step that is whole: its files have their checksums.
-- @param dir string the run's folder
-- @param step integer
-- @return string|nil path
function M.whole_before(dir, step)
  for _, older in ipairs(steps_in(dir)) do
    local path = ("%s/checkpoint-%d"):format(dir, older)
    local state = older < step and M.state(path)
    if state and check_files(path, state) then return path end
  end
end

--- Reads a checkpoint's tensors into a run that was set up as the one that wrote it, once their files have their checksums. Where something does not
-- fit, nothing is changed.
-- @param path string of a checkpoint-N
-- @param run table { params, opt }
-- @param state table of the checkpoint, from state()
-- @return true|nil, string|nil message
function M.read(path, run, state)
  local whole, saved, message
  whole, message = check_files(path, state)
  if not whole then return nil, message end
  saved, message = serialize.load(path .. "/parameters.safetensors")
  if not saved then return nil, message end
  for _, p in ipairs(run.params) do
    local from = saved[p.name]
    if not from then return nil, ("%s holds no '%s', which is trained here"):format(path, p.name) end
    if from:describe() ~= p:describe() then return nil, ("%s: '%s' is %s, expected %s"):format(path, p.name, from:describe(), p:describe()) end
  end
  local ok
  ok, message = run.opt:load(path .. "/optimizer.safetensors")
  if not ok then return nil, message end
  for _, p in ipairs(run.params) do p:copy(saved[p.name]) end
  return true
end

return M
