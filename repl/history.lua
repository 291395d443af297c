--- Lines typed in earlier sessions: a text file, an entry a line (newlines written as \n), appended to at once so that a crash
-- loses nothing. WANE_HISTORY names another file; empty, none is kept.
local uv = require "luv"

local M = {}
local History = {}
History.__index = History

local KEPT = 2000

local function encode(text) return (text:gsub("\\", "\\\\"):gsub("\n", "\\n")) end
local function decode(line) return (line:gsub("\\(.)", function(c) return c == "n" and "\n" or c end)) end

-- Where the history lies: $WANE_HISTORY, or wane/history below the XDG state folder; nil for nowhere.
local function default_path()
  local given = os.getenv "WANE_HISTORY"
  if given then return given ~= "" and given or nil end
  local home = os.getenv "HOME"
  local state = os.getenv "XDG_STATE_HOME" or (home and home .. "/.local/state")
  return state and state .. "/wane/history"
end

-- Makes the folders above a file.
local function make_folders(path)
  local at = 1
  while true do
    at = path:find("/", at + 1, true)
    if not at then return end
    uv.fs_mkdir(path:sub(1, at - 1), 448)              -- 0700
  end
end

--- Opens the history.
-- @param path string|nil default: see above
-- @return table with entries (a list, the newest last) and :add(text)
function M.open(path)
  local self = setmetatable({ path = path or default_path(), entries = {} }, History)
  local file = self.path and io.open(self.path, "r")
  if not file then return self end
  for line in file:lines() do self.entries[#self.entries + 1] = decode(line) end
  file:close()
  if #self.entries > 2 * KEPT then self:shorten() end
  return self
end

-- Rewrites the file with the newest entries only.
function History:shorten()
  local kept = {}
  for i = #self.entries - KEPT + 1, #self.entries do kept[#kept + 1] = self.entries[i] end
  self.entries = kept
  local temporary = self.path .. ".new"
  local fd = uv.fs_open(temporary, "w", 384)           -- 0600
  if not fd then return end
  for _, entry in ipairs(kept) do uv.fs_write(fd, encode(entry) .. "\n", -1) end
  uv.fs_close(fd)
  uv.fs_rename(temporary, self.path)
end

--- Adds an entry, unless it repeats the last one, is empty or begins with a space.
-- @param text string
function History:add(text)
  if text:find "^%s" or text == "" or text == self.entries[#self.entries] then return end
  self.entries[#self.entries + 1] = text
  if not self.path then return end
  make_folders(self.path)
  local fd = uv.fs_open(self.path, "a", 384)
  if not fd then return end
  uv.fs_write(fd, encode(text) .. "\n", -1)
  uv.fs_close(fd)
end

return M
