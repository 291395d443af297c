--- Short tracebacks: the frames a user wrote, not the library's, the REPL's or C's.
local M = {}

local home = debug.getinfo(1, "S").source:match "^@(.*)repl/trace%.lua$" or ""

-- Frames of these folders say nothing to a user.
local function ours(source)
  local path = source:match "^@(.*)$"
  if not path or path:sub(1, #home) ~= home then return false end
  path = path:sub(#home + 1)
  return path:find "^lua/wane/" ~= nil or path:find "^repl/" ~= nil
end

-- "in function 'name'" of a frame, where Lua knows it.
local function where(info)
  if info.what == "main" then return "" end
  if info.name then return (" in '%s'"):format(info.name) end
  return ""
end

--- Message handler for xpcall: the message and, below it, the user's frames. WANE_TRACE=1 gives all frames.
-- @param message any
-- @return string|nil
function M.handler(message)
  if message == nil then return nil end                -- error(): some programs end themselves this way, without a word
  if type(message) ~= "string" then
    local meta = getmetatable(message)
    message = meta and meta.__tostring and tostring(message) or ("error of type %s: %s"):format(type(message), tostring(message))
  end
  if os.getenv "WANE_TRACE" == "1" then return debug.traceback(message, 2) end
  local lines = { message }
  local level = 2
  while true do
    local info = debug.getinfo(level, "Sln")
    if not info or #lines > 12 then break end
    if info.what ~= "C" and info.currentline > 0 and not ours(info.source) then
      local place = ("%s:%d"):format(info.short_src, info.currentline)
      -- The message often begins with the place itself: saying it twice helps nobody.
      if not (#lines == 1 and where(info) == "" and message:find(place .. ":", 1, true)) then lines[#lines + 1] = "  at " .. place .. where(info) end
    end
    level = level + 1
  end
  return table.concat(lines, "\n")
end

return M
