--- The unfinished part of a folder that is being written: finished shards wait in DIR/.unfinished, beside the plan they belong to, until
-- all are there. Only then the old model goes and the new one takes its place.
--
--     DIR/.unfinished/plan.json        what is written, from what, how
--     DIR/.unfinished/NAME             finished shards, whole and flushed
--     DIR/.unfinished/complete         all shards are there: the rest is renaming, which the next run does if this one was killed
--
-- A killed run so leaves the old folder as it was, or (renaming, or in a new folder) one without config.json, which is refused by name.
-- The same command run again keeps the shards that fit the plan.
-- @module wane.checkpoint.staging
local index = require "wane.checkpoint.index"
local layout = require "wane.checkpoint.layout"
local paths = require "wane.checkpoint.paths"
local writer = require "wane.checkpoint.writer"
local C = require("wane.core").C

local M = {}

local FOLDER = "/.unfinished"

---@class wane.Staging
---@field dir string the folder being written
---@field path string dir .. "/.unfinished"
---@field resumed boolean a plan that equals this one was there
local Staging = {}
Staging.__index = Staging

local function read(path)
  local f = io.open(path, "rb")
  local text = f and f:read "*a"
  if f then f:close() end
  return text
end

--- What to say of a folder without config.json that a killed run left, or nil.
-- @param dir string
-- @return string|nil
function M.complaint(dir)
  if not paths.is_folder(dir .. FOLDER) then return nil end
  local plan = read(dir .. FOLDER .. "/plan.json")     -- nil: killed before it was down
  local what = plan and plan:match '"what": "([^"]*)"' or "a writer"
  return ("'%s' is the unfinished result of %s: run it again to resume"):format(dir, what)
end

-- Takes away what the staging folder holds; `only` restricts it to names for which it is true.
local function sweep(path, only)
  for _, name in ipairs(paths.list(path)) do
    if not only or only(name) then os.remove(path .. "/" .. name) end
  end
end

-- A temporary file of wane.checkpoint.writer whose process is gone.
local function is_stale(name)
  local pid = name:match "^%..*%.(%d+)%.%d+%.part$"
  return pid and not paths.is_folder("/proc/" .. pid)
end

--- Opens the staging folder, keeping its shards if they are of the same plan.
-- @param dir string made if it is not there
-- @param plan string JSON with a "what"; equal texts are equal plans
-- @return wane.Staging|nil, string|nil message, string|nil code
function M.open(dir, plan)
  local self = setmetatable({ dir = dir, path = dir .. FOLDER, resumed = false }, Staging)
  local status = C.wane_path_make(self.path)
  if status < 0 then return require("wane.core").failure(status) end
  if read(self.path .. "/plan.json") == plan then
    self.resumed = true
    sweep(self.path, is_stale)
    return self
  end
  os.remove(self.path .. "/complete")                  -- before the shards that it speaks of
  sweep(self.path)
  local ok, message, code = writer.write_text(self.path .. "/plan.json", plan)
  if not ok then return nil, message, code end
  return self
end

-- Keys of a finished shard as { key = { dtype, shape } } where it holds exactly what the items ask for; nil otherwise.
local function keys_in(path, items)
  local ix = index.open(path)
  if not ix then return nil end
  local keys, fits, wanted = {}, true, 0
  for _, item in ipairs(items) do
    for key, k in pairs(layout.keys(item)) do
      local e = ix:find(key)
      local shape = k.shape or (e and #e.shape == 1 and e.shape[1] <= k.longest and e.shape)
      fits = fits and e ~= nil and e.dtype == k.dtype and shape and table.concat(e.shape, ",") == table.concat(shape, ",")
      if not fits then break end
      keys[key], wanted = { dtype = k.dtype, shape = shape }, wanted + 1
    end
  end
  fits = fits and wanted == ix:count()
  ix:close()
  return fits and keys or nil
end

--- Where a shard lies that an earlier run finished, and its keys; nil if it has to be written.
-- @param name string
-- @param items table[]
-- @return string|nil path, table|nil keys
function Staging:finished(name, items)
  if not self.resumed then return nil end
  local places = { self.path .. "/" .. name }
  if paths.is_file(self.path .. "/complete") then places[2] = self.dir .. "/" .. name end
  for _, path in ipairs(places) do
    local keys = paths.is_file(path) and keys_in(path, items)
    if keys then return path, keys end
  end
  return nil
end

-- Weights that an earlier model left in the folder under other names would be read instead of the new ones.
local function drop_old_weights(dir, names)
  local new = {}
  for _, name in ipairs(names) do new[name] = true end
  for _, name in ipairs(paths.list(dir)) do
    local is_weights = name:find "^model%-%d+%-of%-%d+%.safetensors$" or name == "model.safetensors" or name == "model.safetensors.index.json"
    if is_weights and not new[name] then os.remove(dir .. "/" .. name) end
  end
end

--- All shards are there: the old model goes, they take its place. The caller then writes the small files, config.json last.
-- @param names string[] of the shards
-- @return true|nil, string|nil message, string|nil code
function Staging:commit(names)
  local ok, message, code = writer.write_text(self.path .. "/complete", "")
  if not ok then return nil, message, code end
  os.remove(self.dir .. "/config.json")                -- from here to the new one, an old one would lie about the weights
  for _, name in ipairs(names) do
    local from = self.path .. "/" .. name
    if paths.is_file(from) then
      ok, message = os.rename(from, self.dir .. "/" .. name)
      if not ok then return nil, ("cannot move the finished '%s' into its folder: %s"):format(from, message), "WANE_E_IO" end
    end
  end
  drop_old_weights(self.dir, names)
  return true
end

--- The folder is whole: the staging folder goes.
function Staging:close()
  os.remove(self.path .. "/complete")
  sweep(self.path)
  os.remove(self.path)
end

return M
