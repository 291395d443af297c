--- Mixed precision: a list of rules says which scheme each Linear gets, by its path. The first rule that matches decides; a path that
-- none matches gets what the rest of the quant table says.
--
--     quant = { type = "nf4", rules = {
--       { "*.layers.0.*", "none" },                                    -- left as stored
--       { "*.down_proj", { type = "nf4", block_size = 128 } },         -- what a scheme leaves out, it has from the table around the rules
--       { "lm_head", "int8" } } }
--
-- Patterns are globs over the whole canonical path: * any characters (dots too), ? one, [abc] and [0-9] one of a set, everything else
-- itself. In a file (--rules FILE) a rule is a line, # begins a comment:
--
--     *.layers.0.*     none
--     *.down_proj      nf4  block_size=128  double_quant=true
-- @module wane.quant.rules
local core = require "wane.core"

local M = {}

-- ---------------------------------------------------------------- globs

local escape = "[%^%$%(%)%%%.%[%]%*%+%-%?]"

-- A [set] of a glob as Lua's, from its position on; nil where it does not end.
local function set_at(glob, at)
  local close = glob:find("]", at + 2, true)
  if not close then return nil end
  local inner = glob:sub(at + 1, close - 1)
  local negated = inner:find "^[!^]" and "^" or ""
  if negated ~= "" then inner = inner:sub(2) end
  return "[" .. negated .. inner:gsub("[%%%]%^%[]", "%%%0") .. "]", close
end

--- A glob as a Lua pattern for the whole path.
-- @param glob string
-- @return string|nil, string|nil message
function M.pattern(glob)
  local out, at = {}, 1
  while at <= #glob do
    local c = glob:sub(at, at)
    if c == "*" then out[#out + 1] = ".*" elseif c == "?" then out[#out + 1] = "."
    elseif c == "[" then
      local set, close = set_at(glob, at)
      if not set then return nil, ("'[' in '%s' has no ']'"):format(glob) end
      out[#out + 1], at = set, close
    else out[#out + 1] = (c:gsub(escape, "%%%0")) end
    at = at + 1
  end
  return "^" .. table.concat(out) .. "$"
end

-- ---------------------------------------------------------------- lists

local known = { type = true, block_size = true, double_quant = true, threshold = true }
local four_bit = { nf4 = true, fp4 = true }

--- Completes a list of rules: patterns compiled, schemes in full. Raises for what does not exist.
-- @param rules table list of { pattern, scheme } or { pattern = , scheme = }
-- @param base table the quant table around them: block_size, double_quant, threshold and compute for schemes that leave them out
-- @param scheme_of function(table) -> scheme|nil as wane.load.scheme
-- @return table list of { glob, pattern, scheme = nil for none }
function M.compile(rules, base, scheme_of)
  if type(rules) ~= "table" then core.raise("quant.rules: a list of { pattern, scheme } was expected, found a %s", type(rules)) end
  local list = {}
  for i, rule in ipairs(rules) do
    local glob, scheme = rule[1] or rule.pattern, rule[2] or rule.scheme
    if type(glob) ~= "string" or scheme == nil then core.raise("quant.rules: rule %d: { pattern, scheme } was expected", i) end
    local pattern, message = M.pattern(glob)
    if not pattern then core.raise("quant.rules: rule %d: %s", i, message) end
    if type(scheme) == "string" then scheme = { type = scheme } end
    local full = {}
    for k, v in pairs(type(scheme) == "table" and scheme or {}) do
      if not known[k] then core.raise("quant.rules: rule %d: there is no option '%s': type, block_size, double_quant, threshold", i, tostring(k)) end
      full[k] = v
    end
    local alike = full.type == base.type or four_bit[full.type] and four_bit[base.type]
    if full.block_size == nil and alike then full.block_size = base.block_size end
    if full.double_quant == nil and four_bit[full.type] then full.double_quant = base.double_quant end
    if full.type == "int8" and full.threshold == nil then full.threshold = base.threshold end
    list[i] = { glob = glob, pattern = pattern, scheme = scheme_of(full) }
  end
  return list
end

--- What the rules say of a path.
-- @param rules table|nil from M.compile
-- @param path string
-- @return boolean whether a rule matches, table|nil its scheme (nil: leave it as it is)
function M.find(rules, path)
  for _, rule in ipairs(rules or {}) do
    if path:find(rule.pattern) then return true, rule.scheme end
  end
  return false, nil
end

--- Patterns that match none of some paths: most likely a mistake in writing.
-- @param rules table|nil from M.compile
-- @param paths table { path = anything }
-- @return string[]
function M.unused(rules, paths)
  local list = {}
  for _, rule in ipairs(rules or {}) do
    local hit = false
    for path in pairs(paths) do hit = hit or path:find(rule.pattern) ~= nil end
    if not hit then list[#list + 1] = rule.glob end
  end
  return list
end

-- ---------------------------------------------------------------- files

local options = { block_size = tonumber, threshold = tonumber, double_quant = function(text)
  if text == "true" then return true elseif text == "false" then return false end
end }

local types = { none = true, nf4 = true, fp4 = true, int8 = true, ["int8-blockwise"] = true }

-- "PATTERN SCHEME [name=value ...]"; nil and a message for anything else.
local function parse_line(line)
  local words = {}
  for word in line:gmatch "%S+" do words[#words + 1] = word end
  if #words < 2 then return nil, "expected: PATTERN SCHEME [name=value ...]" end
  local scheme = { type = words[2] }
  if not types[scheme.type] then return nil, ("'%s' is no scheme: none, nf4, fp4, int8, int8-blockwise"):format(scheme.type) end
  for i = 3, #words do
    local name, value = words[i]:match "^([%w_]+)=(.+)$"
    name = name and name:gsub("-", "_")
    if not options[name] then return nil, ("'%s' is no option: block_size=N, double_quant=true, threshold=X"):format(words[i]) end
    scheme[name] = options[name](value)
    if scheme[name] == nil then return nil, ("'%s' has no valid value"):format(words[i]) end
  end
  return { words[1], scheme }
end

--- Reads a rule file.
-- @param path string
-- @return table|nil list of { pattern, scheme }, string|nil message, string|nil code
function M.read(path)
  local f, message = io.open(path, "rb")
  if not f then return nil, ("cannot open '%s': %s"):format(path, (tostring(message):gsub("^.-: ", ""))), "WANE_E_IO" end
  local rules, number = {}, 0
  for line in f:lines() do
    number = number + 1
    line = line:gsub("#.*$", "")
    if line:find "%S" then
      local rule, problem = parse_line(line)
      if not rule then
        f:close()
        return nil, ("'%s' line %d: %s"):format(path, number, problem), "WANE_E_FORMAT"
      end
      rules[#rules + 1] = rule
    end
  end
  f:close()
  return rules
end

return M
