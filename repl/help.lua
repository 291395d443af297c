--- `?name` in the REPL: documentation of a value, found through where its function was defined, or of a name, searched everywhere.
local docstrings = require "wane.repl.docstrings"

local M = {}

local parsed = {}                                    -- path -> entries of docstrings.lua_file

local function entries_of(path)
  if parsed[path] == nil then parsed[path] = docstrings.lua_file(path) or {} end
  return parsed[path]
end

-- Where a function was written; wane.Tensor's methods have others standing in their place.
local function source_of(fn)
  local methods = package.loaded["wane.autograd.methods"]
  return debug.getinfo(methods and methods.written[fn] or fn, "S")
end

-- The documentation entry of a Lua function.
local function entry_of(fn)
  local info = source_of(fn)
  local path = info.source:match "^@(.*)$"
  if not path then return nil end
  for _, entry in ipairs(entries_of(path)) do
    if entry.line == info.linedefined then return entry end
  end
end

-- Text of one entry: signature, prose, parameters, results.
local function describe(entry, name)
  local lines = { (name or entry.name) .. (entry.parameters or "") }
  if entry.text ~= "" then lines[#lines + 1] = entry.text end
  for _, p in ipairs(entry.params) do lines[#lines + 1] = ("  %s: %s"):format(p.name, p.what) end
  for _, r in ipairs(entry.returns) do lines[#lines + 1] = "  returns " .. r.what end
  if not entry.documented then lines[#lines + 1] = "(no documentation)" end
  return table.concat(lines, "\n")
end

-- "name  first sentence" for the functions among a table's fields, its metatable's included.
local function list_functions(value)
  local found, seen = {}, {}
  while type(value) == "table" and not seen[value] do
    seen[value] = true
    for key, field in pairs(value) do
      if type(field) == "function" and type(key) == "string" and not key:find "^_" and not found[key] then
        local entry = entry_of(field)
        found[key] = entry and docstrings.summary(entry.text) or ""
        found[#found + 1] = key
      end
    end
    local meta = getmetatable(value)
    local index = type(meta) == "table" and rawget(meta, "__index") or nil
    value = type(index) == "function" and meta or index           -- a class whose __index is a function holds its methods itself
  end
  table.sort(found)
  local lines = {}
  for _, key in ipairs(found) do lines[#lines + 1] = ("  %-22s %s"):format(key, found[key]) end
  return lines
end

-- Header of the file that a module's functions come from.
local function module_header(value)
  local path
  for name, loaded in pairs(package.loaded) do
    if loaded == value and type(name) == "string" then path = package.searchpath and package.searchpath(name, package.path) end
  end
  local header = path and entries_of(path).header
  return header
end

local function describe_table(value, name)
  local lines = { name }
  local header = module_header(value)
  if header then lines[#lines + 1] = header end
  for _, line in ipairs(list_functions(value)) do lines[#lines + 1] = line end
  if #lines == 1 then lines[1] = ("%s: a table without documented functions"):format(name) end
  return table.concat(lines, "\n")
end

-- C functions whose name is `name`, with or without "wane_".
local function describe_c(home, name)
  for _, entry in ipairs(docstrings.c_header(home .. "/core/include/wane.h") or {}) do
    if entry.name == name or entry.name == "wane_" .. name then return entry.declaration .. "\n" .. entry.text end
  end
end

-- Functions of the library called `name`, wherever they are.
local function search(home, name)
  local uv = require "luv"
  local hits = {}
  local function visit(folder)
    local scan = uv.fs_scandir(folder)
    while scan do
      local file, kind = uv.fs_scandir_next(scan)
      if not file then return end
      local path = folder .. "/" .. file
      if kind == "directory" then visit(path)
      elseif file:find "%.lua$" then
        for _, entry in ipairs(entries_of(path)) do
          if not entry.is_local and entry.name:match "[%w_]+$" == name then
            local module = path:match "lua/(wane/.*)%.lua$" or path
            hits[#hits + 1] = module:gsub("/", "."):gsub("%.init$", "") .. ": " .. describe(entry)
          end
        end
      end
    end
  end
  visit(home .. "/lua/wane")
  return #hits > 0 and table.concat(hits, "\n\n") or nil
end

M.text = [[
An expression prints its value; a ; at the end keeps it quiet. The last value is _.
  ?name          documentation of a function, module or tensor method: ?wane.load, ?t.narrow, ?wane_linear
  Tab            completes names, fields, module names and file names; again: the next candidate
  Ctrl-R         searches the history; arrows recall it
  Alt-Enter      another line; Enter does it too while the text is not finished
  Ctrl-C         stops what is running and keeps the session; pressed twice more, it ends the program
  Ctrl-D         leaves
local variables live as long as their text: at the prompt, leave the word local out.]]

--- Documentation of an expression.
-- @param home string folder of the program
-- @param name string what stood behind the question mark
-- @param value any what it evaluates to, nil if nothing
-- @return string
function M.lookup(home, name, value)
  if name == "" then return M.text end
  if type(value) == "function" then
    local entry = entry_of(value)
    if entry then return describe(entry, name) end
    local info = source_of(value)
    return ("%s: a function%s, without documentation"):format(name, info.what == "C" and " written in C" or " of " .. info.short_src .. ":" .. info.linedefined)
  elseif type(value) == "table" then
    return describe_table(value, name)
  end
  local last = name:match "([%w_]+)$"
  local found = describe_c(home, last or name) or (last and search(home, last))
  if found then return found end
  if value ~= nil then return ("%s: a %s"):format(name, type(value)) end
  return ("nothing is known of '%s'; ? alone tells what can be asked"):format(name)
end

return M
