--- Completion: fields by walking tables and their __index, module names inside require, file names inside other strings.
local uv = require "luv"

local M = {}

local keywords = { "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "if", "in", "local", "nil", "not", "or", "repeat",
                   "return", "then", "true", "until", "while" }

-- Adds the string keys of a table and of what its metatable's __index reaches.
local function collect(value, into)
  local seen = {}
  while type(value) == "table" and not seen[value] do
    seen[value] = true
    for key, field in pairs(value) do
      if type(key) == "string" and key:find "^[%a_][%w_]*$" and into[key] == nil then into[key] = type(field) end
    end
    local meta = getmetatable(value)
    local index = type(meta) == "table" and rawget(meta, "__index") or nil
    value = type(index) == "function" and meta or index           -- a class whose __index is a function holds its methods itself
  end
  if type(value) == "string" then collect(string, into) end
end

-- Evaluates a path such as `model.layers[3].mlp`: field accesses only, never a call.
local function resolve(env, path)
  local value = env
  local rest = path
  local first = true
  while rest ~= "" do
    local name, after = rest:match(first and "^([%a_][%w_]*)(.*)$" or "^[.:]([%a_][%w_]*)(.*)$")
    local key = name
    if not key then
      local number, behind = rest:match "^%[%s*(%d+)%s*%](.*)$"
      key, after = tonumber(number), behind
    end
    if not key then
      local quoted, behind = rest:match "^%[%s*[\"']([^\"']*)[\"']%s*%](.*)$"
      key, after = quoted, behind
    end
    if key == nil then return nil end
    local ok, field = pcall(function() return value[key] end)
    if not ok or field == nil then return nil end
    value, rest, first = field, after, false
  end
  return value
end

-- Candidates, sorted; a name that begins with _ only shows when asked for.
local function candidates(names, prefix, functions_only)
  local items = {}
  for name, kind in pairs(names) do
    if name:sub(1, #prefix) == prefix and (prefix ~= "" or name:sub(1, 1) ~= "_") and (not functions_only or kind == "function") then
      items[#items + 1] = { text = name, label = name }
    end
  end
  table.sort(items, function(a, b) return a.text < b.text end)
  return items
end

-- Names of modules below package.path that begin with `prefix`.
local function modules(prefix)
  local found = {}
  local folder = prefix:match "^(.*)%." or ""
  local dotted = folder ~= "" and folder .. "." or ""
  for template in package.path:gmatch "[^;]+" do
    local root = template:match "^(.*)/%?%.lua$"
    local scan = root and uv.fs_scandir(root .. "/" .. folder:gsub("%.", "/"))
    while scan do
      local file, kind = uv.fs_scandir_next(scan)
      if not file then break end
      if kind == "directory" then found[dotted .. file] = "module"
      elseif file:find "%.lua$" and file ~= "init.lua" then found[dotted .. file:sub(1, -5)] = "module" end
    end
  end
  return candidates(found, prefix)
end

-- File names that begin with `prefix`; folders end in a slash. ~ is the home folder.
local function files(prefix)
  local folder, partial = prefix:match "^(.*/)([^/]*)$"
  folder, partial = folder or "", partial or prefix
  local real = folder:gsub("^~/", (os.getenv "HOME" or "~") .. "/")
  local items = {}
  local scan = uv.fs_scandir(real ~= "" and real or ".")
  while scan do
    local file, kind = uv.fs_scandir_next(scan)
    if not file then break end
    if file:sub(1, #partial) == partial and (partial ~= "" or file:sub(1, 1) ~= ".") then
      local slash = kind == "directory" and "/" or ""
      items[#items + 1] = { text = folder .. file .. slash, label = file .. slash }
    end
  end
  table.sort(items, function(a, b) return a.text < b.text end)
  return items
end

-- Start of the string that the text before the cursor leaves open, or nil.
local function open_string(before)
  local quote, start
  local i = 1
  while i <= #before do
    local c = before:sub(i, i)
    if quote then
      if c == "\\" then i = i + 1 elseif c == quote or c == "\n" then quote = nil end
    elseif c == '"' or c == "'" then
      quote, start = c, i + 1
    elseif c == "-" and before:sub(i, i + 1) == "--" then
      i = (before:find("\n", i, true) or #before)
    end
    i = i + 1
  end
  return quote and start
end

--- Candidates for what stands before the cursor.
-- @param env table where names are looked up
-- @param text string
-- @param cursor integer byte position, 1-based
-- @return table, integer list of { text, label }; position where the text to be replaced begins
function M.complete(env, text, cursor)
  local before = text:sub(1, cursor - 1)
  local string_start = open_string(before)
  if string_start then
    local inside = before:sub(string_start)
    if before:sub(1, string_start - 2):find "require%s*%(?%s*$" then return modules(inside), string_start end
    return files(inside), string_start
  end
  local path = before:match "[%w_.:%[%]\"']*$"
  local base, separator, prefix = path:match "^(.*)([.:])([%w_]*)$"
  local names = {}
  if not base then
    prefix = before:match "[%w_]*$"
    collect(env, names)
    if prefix ~= "" then
      for _, word in ipairs(keywords) do names[word] = "keyword" end
    end
  else
    base = base:match "^%[*(.*)$"                     -- t[a.b: the bracket belongs to the expression around it
    local value = resolve(env, base)
    if type(value) == "string" then collect(string, names) else collect(value, names) end
  end
  return candidates(names, prefix, separator == ":"), cursor - #prefix
end

return M
