--- How the REPL prints values: what has a __tostring prints itself (tensors, models); other tables compactly, to a depth and a length.
local M = {}

local DEPTH, ITEMS, WIDTH = 3, 24, 100

local function quoted(s)
  if #s > 400 then s = s:sub(1, 400) .. "…" end
  return '"' .. s:gsub('[\\"]', "\\%0"):gsub("\n", "\\n"):gsub("\t", "\\t"):gsub("\r", "\\r")
    :gsub("[%z\1-\31\127]", function(c) return ("\\%d"):format(c:byte()) end) .. '"'
end

local function has_tostring(value)
  local meta = getmetatable(value)
  return type(meta) == "table" and rawget(meta, "__tostring") ~= nil
end

local function key_text(key, render)
  if type(key) == "string" and key:find "^[%a_][%w_]*$" then return key end
  return "[" .. render(key, DEPTH) .. "]"
end

-- Numbers first, then strings, each in order; the rest as it comes.
local function sorted_keys(t)
  local keys = {}
  for key in pairs(t) do
    local listed = type(key) == "number" and key >= 1 and key <= #t and key == math.floor(key)
    if not listed and not (type(key) == "string" and key:find "^__") then keys[#keys + 1] = key end
  end
  table.sort(keys, function(a, b)
    if type(a) == type(b) and (type(a) == "number" or type(a) == "string") then return a < b end
    return type(a) < type(b)
  end)
  return keys
end

local render

-- One table. Items that fit stand on one line, else one a line.
local function render_table(t, depth, seen, indent)
  if seen[t] then return "{ the same again }" end
  if next(t) == nil then return "{}" end
  if depth == 0 then return "{…}" end
  seen[t] = true
  local items, left_out, width = {}, 0, 0
  local function add(text)
    if #items >= ITEMS then left_out = left_out + 1 return end
    items[#items + 1] = text
    width = width + #text + 2
  end
  for i = 1, #t do
    if #items >= ITEMS then left_out = left_out + 1 else add(render(t[i], depth - 1, seen, indent .. "  ")) end
  end
  for _, key in ipairs(sorted_keys(t)) do
    if #items >= ITEMS then left_out = left_out + 1 else add(key_text(key, render) .. " = " .. render(t[key], depth - 1, seen, indent .. "  ")) end
  end
  seen[t] = nil
  if left_out > 0 then items[#items + 1] = ("… %d more"):format(left_out) end
  local one_line = "{ " .. table.concat(items, ", ") .. " }"
  if width + #indent < WIDTH and not one_line:find("\n", 1, true) then return one_line end
  return "{\n" .. indent .. "  " .. table.concat(items, ",\n" .. indent .. "  ") .. "\n" .. indent .. "}"
end

render = function(value, depth, seen, indent)
  local kind = type(value)
  if kind == "string" then return quoted(value) end
  if kind == "number" then return ("%.14g"):format(value) end
  if kind == "table" and has_tostring(value) then
    local ok, text = pcall(tostring, value)
    text = ok and text or "<" .. text .. ">"
    -- Inside another table a long description is reduced to its first line.
    if indent and indent ~= "" and text:find("\n", 1, true) then text = text:match "^[^\n]*" .. " …" end
    return text
  end
  if kind == "table" then return render_table(value, depth or DEPTH, seen or {}, indent or "") end
  if kind == "function" then
    local info = debug.getinfo(value, "S")
    return info.what == "C" and "function in C" or ("function at %s:%d"):format(info.short_src:match "[^/]*$", info.linedefined)
  end
  return tostring(value)
end

--- A value as text.
-- @param value any
-- @return string
function M.show(value)
  return render(value, DEPTH, {}, "")
end

return M
