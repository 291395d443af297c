--- Reads documentation out of the sources: the `---` blocks of Lua files and the comments above the functions of wane.h.
-- Serves `?name` in the REPL and scripts/docs.lua, so there is one reading of what counts as documented.
local M = {}

local function read_lines(path)
  local file = io.open(path, "r")
  if not file then return nil end
  local lines = {}
  for line in file:lines() do lines[#lines + 1] = line end
  file:close()
  return lines
end

-- What a line of code defines: its name as written ("M.load", "Tensor:sum"), its parameters (nil for a value) and whether it is local.
local function definition(line)
  local name, parameters = line:match "^function%s+([%w_.:]+)%s*(%b())"
  if name then return name, parameters end
  name, parameters = line:match "^local%s+function%s+([%w_]+)%s*(%b())"
  if name then return name, parameters, true end
  name, parameters = line:match "^([%w_.]+)%s*=%s*function%s*(%b())"
  if name then return name, parameters end
  name = line:match "^([%w_.]+)%s*=[^=]"
  if name then return name, nil, not name:find(".", 1, true) end
end

-- Splits a block into prose and tags: { text, params = { { name, what } }, returns = { what } }.
local function parse_block(block)
  local doc = { params = {}, returns = {} }
  local prose, last = {}, nil
  for _, line in ipairs(block) do
    local tag, rest = line:match "^%s*@(%a+)%s*(.*)$"
    if tag == "param" then
      local name, what = rest:match "^(%S+)%s*(.*)$"
      last = { name = name or "?", what = what or "" }
      doc.params[#doc.params + 1] = last
    elseif tag == "return" then
      last = { what = rest }
      doc.returns[#doc.returns + 1] = last
    elseif tag then
      last = { what = "" }                           -- @module, @class and their kind carry no prose
    elseif last and line:find "^%s%s+%S" then
      last.what = last.what .. " " .. line:match "^%s*(.-)%s*$"
    elseif not last then
      prose[#prose + 1] = line
    end
  end
  doc.text = table.concat(prose, "\n"):gsub("^%s+", ""):gsub("%s+$", "")
  return doc
end

--- First sentence of a text.
-- @param text string
-- @return string
function M.summary(text)
  local flat = text:gsub("%s+", " ")
  return flat:match "^(.-[^%u.]%.)%s%u" or flat:match "^(.-%.)$" or flat
end

--- Everything documented (and every public function that is not) in a Lua file.
-- @param path string
-- @return table|nil list of { name, parameters, line, text, params, returns, documented, is_local } with fields `header`,
--   the file's own text, and `returned`, the name of what the file returns
function M.lua_file(path)
  local lines = read_lines(path)
  if not lines then return nil end
  local entries, block = {}, nil
  local first_code = true
  for number, line in ipairs(lines) do
    local opening = line:match "^%-%-%-%s?(.*)$"
    if line:find "^%-%-%-%-" then opening = nil end
    if opening and not block then
      block = { opening }
    elseif block and line:find "^%-%-" then
      block[#block + 1] = line:match "^%-%-%-?%s?(.*)$"
    else
      local name, parameters, is_local = definition(line)
      local doc = block and parse_block(block) or nil
      if first_code and doc and not (name and number == 1) then
        entries.header = doc.text
        doc = nil
      end
      if block or line:find "%S" then first_code = false end
      if name and (doc or (parameters and not is_local)) then
        doc = doc or { params = {}, returns = {}, text = "" }
        doc.name, doc.parameters, doc.line, doc.is_local, doc.path = name, parameters, number, is_local or false, path
        doc.documented = doc.text ~= "" or #doc.returns > 0
        entries[#entries + 1] = doc
      end
      block = nil
    end
    entries.returned = line:match "^return ([%w_]+)$" or entries.returned
  end
  return entries
end

-- The text of a C comment without its stars.
local function comment_text(raw)
  local text = raw:gsub("^/%*+", ""):gsub("%*/%s*$", "")
  return (text:gsub("\n%s*%* ?", "\n"):gsub("^%s+", ""):gsub("%s+$", ""))
end

--- The functions of a C header with the comment above (or behind) each. A comment above a group without blank lines serves the group.
-- @param path string
-- @return table|nil list of { name, declaration, text, section, line, documented }
function M.c_header(path)
  local lines = read_lines(path)
  if not lines then return nil end
  local entries, comment, section = {}, nil, ""
  local i = 1
  while i <= #lines do
    local line = lines[i]
    local title = line:match "^/%* =+ (.-)%s*%*?/?$"
    if title then section = title end
    if line:find "^%s*/%*" then
      local raw = line
      while not lines[i]:find "%*/" and i < #lines do
        i = i + 1
        raw = raw .. "\n" .. lines[i]
      end
      comment = not title and comment_text(raw) or nil
    elseif line:find "^WANE_API" then
      local start, declaration = i, line
      while not lines[i]:find ";" and i < #lines do
        i = i + 1
        declaration = declaration .. " " .. lines[i]:match "^%s*(.*)$"
      end
      local trailing = declaration:match ";%s*(/%*.*%*/)%s*$"
      local text = trailing and comment_text(trailing) or comment or ""
      declaration = declaration:match "^WANE_API%s+(.-;)"
      entries[#entries + 1] = { name = declaration:match "([%w_]+)%(", declaration = declaration, text = text, section = section, line = start,
                                documented = text ~= "" }
    elseif not line:find "%S" then
      comment = nil
    end
    i = i + 1
  end
  return entries
end

return M
