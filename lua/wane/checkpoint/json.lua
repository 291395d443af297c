--- Small JSON: configs read without nulls, and written with sorted keys and numbers as Python prints them.
-- Large JSON (vocabularies, headers) is read in C.
-- @module wane.checkpoint.json
local cjson = require "cjson"

local M = {}

local LARGEST = 64 * 1024 * 1024

-- A key whose value is null counts as absent.
local function without_nulls(t)
  for k, v in pairs(t) do
    if v == cjson.null and type(k) == "string" then t[k] = nil
    elseif type(v) == "table" then without_nulls(v) end
  end
  return t
end

--- Decodes a JSON object.
-- @param text string
-- @return table|nil, string|nil message
function M.decode(text)
  local ok, value = pcall(cjson.decode, text)
  if not ok then return nil, tostring(value) end
  if type(value) ~= "table" then return nil, "an object was expected, found a " .. type(value) end
  return without_nulls(value)
end

--- Reads a JSON file.
-- @param path string
-- @return table|nil value, string text or message, string|nil code
function M.read(path)
  local f, message = io.open(path, "rb")
  if not f then return nil, ("cannot open '%s': %s"):format(path, (tostring(message):gsub("^.-: ", ""))), "WANE_E_IO" end
  local text = f:read(LARGEST + 1)
  f:close()
  if not text then return nil, ("'%s' is empty or cannot be read"):format(path), "WANE_E_FORMAT" end
  if #text > LARGEST then return nil, ("'%s' is larger than 64 MiB, too large for a config"):format(path), "WANE_E_FORMAT" end
  if text:find "^version https://git%-lfs" then
    return nil, ("'%s' is a git-lfs pointer, not the file: run `git lfs pull` in its folder"):format(path), "WANE_E_FORMAT"
  end
  local value, reason = M.decode(text)
  if not value then return nil, ("'%s' is no valid JSON: %s"):format(path, reason), "WANE_E_FORMAT" end
  return value, text
end

--- A number as Python's repr prints it: the shortest text that reads back as the same double; `float` keeps a ".0" on whole ones.
-- @param x number
-- @param float boolean|nil
-- @return string
function M.number(x, float)
  if x ~= x then return "NaN" end
  if x == math.huge then return "Infinity" elseif x == -math.huge then return "-Infinity" end
  local text
  for digits = 15, 17 do
    text = ("%." .. digits .. "g"):format(x)
    if tonumber(text) == x then break end
  end
  if float and not text:find "[%.e]" then text = text .. ".0" end
  return text
end

local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }

--- A string as JSON, quotes included. Bytes above 127 stay as they are (UTF-8).
-- @param s string
-- @return string
function M.string(s)
  return '"' .. s:gsub('[%c"\\\127]', function(c) return escapes[c] or ("\\u%04x"):format(c:byte()) end) .. '"'
end

--- Metatable that makes an empty table a list.
M.list = {}
--- Metatable of { x }: a number that keeps its ".0" (transformers insists that a threshold is a float).
M.float = {}

local function is_list(t)
  return #t > 0 or getmetatable(t) == M.list
end


--- JSON with sorted keys and two spaces of indent, as transformers writes configs.
-- @param value any
-- @param indent string|nil
-- @return string
function M.encode(value, indent)
  indent = indent or ""
  local kind = type(value)
  if kind == "string" then return M.string(value) end
  if kind == "number" then return M.number(value) end
  if kind ~= "table" then return value == cjson.null and "null" or tostring(value) end
  if getmetatable(value) == M.float then return M.number(value[1], true) end
  local deeper, out = indent .. "  ", {}
  if is_list(value) then
    for i, v in ipairs(value) do out[i] = deeper .. M.encode(v, deeper) end
    return #out == 0 and "[]" or "[\n" .. table.concat(out, ",\n") .. "\n" .. indent .. "]"
  end
  local keys = {}
  for k in pairs(value) do keys[#keys + 1] = tostring(k) end
  table.sort(keys)
  for i, k in ipairs(keys) do out[i] = deeper .. M.string(k) .. ": " .. M.encode(value[k], deeper) end
  return #out == 0 and "{}" or "{\n" .. table.concat(out, ",\n") .. "\n" .. indent .. "}"
end

return M
