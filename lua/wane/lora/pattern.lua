--- Python's `re` as adapter configs use it, run by PCRE2: patterns that must match the whole of a module's path (re.fullmatch).
-- The two dialects agree on what such patterns are made of; what they read differently is translated, what only PCRE2 knows
-- (recursion, \K, callouts, verbs) is refused, as Python refuses it.
-- Sources: Python's library reference, "Regular Expression Syntax"; PCRE2 pcre2pattern(3).
-- @module wane.lora.pattern
local ffi = require "ffi"
local C = require("wane.core").C

local M = {}

---@class wane.Pattern
local Pattern = {}
Pattern.__index = Pattern

-- Escapes of a letter: the same in both, or what PCRE2 calls it. Python knows no others.
local same = "AbBdDsSwWafnrtx0123456789"
local renamed = { Z = "\\z", z = "\\z", v = "\\x{b}" }
local groups = { "%(%?:", "%(%?=", "%(%?!", "%(%?<=", "%(%?<!", "%(%?>", "%(%?P<[%a_][%w_]*>", "%(%?P=[%a_][%w_]*%)", "%(%?#", "%(%?[imsx]+[:)]",
                 "%(%?[imsx]*%-[imsx]+:", "%(%?%([%w_]+%)", "%([^?*]" }

local function refuse(what, at) error({ message = ("%s at byte %d is not understood"):format(what, at) }, 0) end

-- The escape at p[i] and where it ends.
local function escape(p, i)
  local c = p:sub(i + 1, i + 1)
  local hex, last = p:match("^\\u(%x%x%x%x)()", i)
  if not hex then hex, last = p:match("^\\U(%x%x%x%x%x%x%x%x)()", i) end
  if hex then return "\\x{" .. hex .. "}", last end
  if renamed[c] then return renamed[c], i + 2 end
  if c == "" or (c:find "%a" and not same:find(c, 1, true)) then refuse("\\" .. c, i) end
  return "\\" .. c, i + 2
end

local function translate(p)
  local out, i, class = {}, 1, nil
  while i <= #p do
    local c = p:sub(i, i)
    local text, last = c, i + 1
    if c == "\\" then text, last = escape(p, i)
    elseif class then
      if c == "]" and i > class then class = nil
      elseif c == "[" then text = "\\[" end                    -- PCRE2 would look for a POSIX class
    elseif c == "[" then
      class = p:sub(i + 1, i + 1) == "^" and i + 2 or i + 1    -- a "]" that stands first is a member
    elseif c == "(" then
      local known = p:sub(i, i + 1) == "("
      for _, opening in ipairs(groups) do known = known or p:find("^" .. opening, i) ~= nil end
      if not known then refuse(p:sub(i, i + 2), i) end
    end
    out[#out + 1], i = text, last
  end
  return table.concat(out)
end

--- Compiles a pattern.
-- @param text string
-- @return wane.Pattern|nil, string|nil message
function M.compile(text)
  local ok, translated = pcall(translate, text)
  if not ok then return nil, ("pattern '%s': %s"):format(text, type(translated) == "table" and translated.message or tostring(translated)) end
  local box = ffi.new "wane_pattern *[1]"
  if C.wane_pattern_new(box, translated, #translated) < 0 then return nil, ffi.string(C.wane_error()) end
  return setmetatable({ text = text, handle = ffi.gc(box[0], C.wane_pattern_free) }, Pattern)
end

local Endless = { __tostring = function(e) return e.message end }

--- Does the whole of `text` match? Raises what M.guard catches for a pattern that would run for ages on it.
-- @param text string ASCII
-- @return boolean
function Pattern:matches(text)
  local status = C.wane_pattern_match(self.handle, text, #text)
  if status < 0 then
    error(setmetatable({ message = ("pattern '%s' on '%s': %s"):format(self.text, text, ffi.string(C.wane_error())) }, Endless), 0)
  end
  return status == 1
end

local function finish(ok, first, ...)
  if ok then return first, ... end
  if getmetatable(first) == Endless then return nil, first.message, "WANE_E_FORMAT" end
  error(first, 0)
end

--- Runs fn; where one of its patterns runs for ages: nil, message, code.
-- @param fn function
-- @return what fn returns
function M.guard(fn, ...) return finish(pcall(fn, ...)) end

return M
