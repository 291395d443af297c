--- Translates the patterns of tokenizer.json from Oniguruma's syntax (Ruby's, which Hugging Face's tokenizers uses) to PCRE2's.
-- What differs and occurs in tokenizers: classes nest ([a[bc]&&[^d]]), \s is Unicode's White_Space, \w and \h mean other things,
-- {n,m}+ is no possessive quantifier, (?m) lets the dot match a newline. What is not understood is refused, never passed on.
-- Sources: Oniguruma doc/RE; PCRE2 pcre2pattern(3).
-- @module wane.tokenizer.regex
local M = {}

local SPACE = [[\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]]
local NOT_SPACE = [[\x{0}-\x{8}\x{e}-\x{1f}\x{21}-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027}]] ..
  [[\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{10ffff}]]
-- Alphabetic, M, Nd, Pc: what of Alphabetic is neither L, M nor Nl are circled and squared letters.
local ALPHABETIC_WORD = [[\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{24b6}-\x{24e9}\x{1f130}-\x{1f149}\x{1f150}-\x{1f169}\x{1f170}-\x{1f189}]]
-- Oniguruma's \w counts Latin-1's superscripts and fractions too.
local WORD = ALPHABETIC_WORD .. [[\x{b2}\x{b3}\x{b9}\x{bc}-\x{be}]]
local HEX = "0-9A-Fa-f"
local BOUNDARY = ("(?:(?<=[%s])(?![%s])|(?<![%s])(?=[%s]))"):format(WORD, WORD, WORD, WORD)

-- Escapes that stand for a set: inside a class, and outside. W and H have no list of their own inside a class.
local sets = {
  s = SPACE, S = NOT_SPACE, d = [[\p{Nd}]], D = [[\P{Nd}]], w = WORD, h = HEX,
}
local posix = {
  space = SPACE, punct = [[\p{P}\p{S}]], word = WORD, digit = [[\p{Nd}]], xdigit = HEX, cntrl = [[\p{Cc}]], ascii = [[\x{0}-\x{7f}]],
  alpha = [[\p{Alphabetic}]], alnum = [[\p{Alphabetic}\p{Nd}]], upper = [[\p{Uppercase}]], lower = [[\p{Lowercase}]],
}
local negated = { S = "[^" .. SPACE .. "]", W = "[^" .. WORD .. "]", H = "[^" .. HEX .. "]" }
local same = { n = "\\n", r = "\\r", t = "\\t", f = "\\f", a = "\\a", e = "\\e", v = "\\x{b}" }
local long_names = { Letter = "L", Number = "N", Punctuation = "P", Symbol = "S", Mark = "M", Separator = "Z", Alpha = "Alphabetic", Space = "White_Space" }

local function refuse(pattern, at, what)
  error({ message = ("pattern '%s': %s at byte %d is not understood"):format(pattern, what, at) }, 0)
end

--- The code point escape at p[i] ("\x41", "\x{2581}", "\u2581"), or nil.
local function code_escape(p, i)
  local hex, last = p:match("^\\x{(%x+)}()", i)
  if not hex then hex, last = p:match("^\\x(%x%x?)()", i) end
  if not hex then hex, last = p:match("^\\u(%x%x%x%x)()", i) end
  if hex then return "\\x{" .. hex .. "}", last end
end

--- A property escape: \p{L}, \p{^L}, \P{Han}, \pL.
local function property(p, i)
  local kind, not_, name, last = p:match("^\\([pP]){(%^?)([%w_ -]+)}()", i)
  if not kind then
    kind, name, last = p:match("^\\([pP])(%u)()", i)
    not_ = ""
  end
  if kind then return ("\\%s{%s%s}"):format(kind, not_, long_names[name] or name), last end
end

--- What both places have in common: a code point, a property, a plain escape. nil where the place decides.
local function escape(p, i)
  local out, last = code_escape(p, i)
  if out then return out, last end
  out, last = property(p, i)
  if out then return out, last end
  local c = p:sub(i + 1, i + 1)
  if same[c] then return same[c], i + 2 end
  if c:find "%p" then return "\\" .. c, i + 2 end
  if c:find "[\128-\255]" then return c, i + 2 end      -- an escaped character beyond ASCII: its other bytes follow
end

local parse_class

--- One member of a class at p[i]: text for inside PCRE2's brackets, or (second case) an expression of its own.
local function member(p, i, first)
  local c = p:sub(i, i)
  if c == "[" then
    local name, last = p:match("^%[:(%^?%a+):%]()", i)
    if name == "^space" then return NOT_SPACE, nil, last end
    if name and not posix[name] then refuse(p, i, "[:" .. name .. ":]") end
    if name then return posix[name], nil, last end
    local flat, whole, stop = parse_class(p, i)
    return flat, whole, stop
  end
  if c == "\\" then
    local e = p:sub(i + 1, i + 1)
    if sets[e] then return sets[e], nil, i + 2 end
    if negated[e] then return nil, negated[e], i + 2 end
    if e == "b" then return "\\x{8}", nil, i + 2 end
    local out, last = escape(p, i)
    if not out then refuse(p, i, "\\" .. e) end
    return out, nil, last
  end
  if c == "-" and (first or p:sub(i + 1, i + 1) == "]") then return "\\-", nil, i + 1 end
  if c == "^" or c == "]" then return "\\" .. c, nil, i + 1 end
  local char, last = p:match("^([%z\1-\127\194-\244][\128-\191]*)()", i)
  if not char then refuse(p, i, "a byte that is no UTF-8") end
  return char, nil, last
end

--- A union as an expression: a plain class where all members fit into one.
local function union(items, wholes)
  local class = #items > 0 and "[" .. table.concat(items) .. "]"
  if #wholes == 0 then return class end
  local all = { class or nil }
  for _, w in ipairs(wholes) do all[#all + 1] = w end
  return #all == 1 and all[1] or "(?:" .. table.concat(all, "|") .. ")"
end

--- The class at p[i] == "[". Returns its members as text when it is a plain positive list, else nil and the whole as an expression;
-- and where it ends.
function parse_class(p, i)
  local start, not_ = i, false
  i = i + 1
  if p:sub(i, i) == "^" then not_, i = true, i + 1 end
  local operands, items, wholes, first = {}, {}, {}, true
  while true do
    if i > #p then refuse(p, start, "a class without an end") end
    if p:sub(i, i) == "]" and not first then break end
    if p:sub(i, i + 1) == "&&" then
      operands[#operands + 1] = union(items, wholes) or "(?!)"
      items, wholes, first, i = {}, {}, true, i + 2
    else
      local flat, whole, stop = member(p, i, first)
      if flat then items[#items + 1] = flat else wholes[#wholes + 1] = whole end
      first, i = false, stop
    end
  end
  local last = union(items, wholes) or "(?!)"
  if #operands == 0 and #wholes == 0 then
    if not_ then return nil, "[^" .. table.concat(items) .. "]", i + 1 end
    return table.concat(items), last, i + 1
  end
  -- An intersection: all but the last look ahead.
  local out = {}
  for _, o in ipairs(operands) do out[#out + 1] = "(?=" .. o .. ")" end
  out[#out + 1] = last
  local whole = "(?:" .. table.concat(out) .. ")"
  if not_ then whole = "(?:(?!" .. whole .. ")(?s:.))" end
  return nil, whole, i + 1
end

--- The opening of a group at p[i] == "(".
local function group(p, i)
  if p:sub(i + 1, i + 1) == "*" then refuse(p, i, "(*") end
  if p:sub(i + 1, i + 1) ~= "?" then return "(", i + 1 end
  for _, head in ipairs { "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>" } do
    if p:sub(i, i + #head - 1) == head then return head, i + #head end
  end
  local name, last = p:match("^(%(%?<[%a_][%w_]*>)()", i)
  if name then return name, last end
  local on, off, stop
  on, off, stop, last = p:match("^%(%?([imx]*)(%-?[imx]*)([:)])()", i)
  if on and #on + #off > 0 then return "(?" .. on:gsub("m", "s") .. off:gsub("m", "s") .. stop, last end
  refuse(p, i, p:sub(i, i + 2))
end

--- The quantifier {n,m} at p[i]; nil if these braces are plain characters.
local function braces(p, i)
  local low, comma, high, last = p:match("^{(%d*)(,?)(%d*)}()", i)
  if not low or (low == "" and high == "") or #low > 5 or #high > 5 then return nil end
  return "{" .. (low == "" and "0" or low) .. comma .. high .. "}", last, comma == ""
end

--- An escape outside classes.
local function outside(p, i)
  local c = p:sub(i + 1, i + 1)
  if negated[c] then return negated[c], i + 2 end
  if c == "d" or c == "D" then return sets[c], i + 2 end
  if sets[c] then return "[" .. sets[c] .. "]", i + 2 end
  if c == "b" then return BOUNDARY, i + 2 end
  if c == "B" then return "(?!" .. BOUNDARY .. ")", i + 2 end
  if c:find "[AzZGRXK1-9]" then return "\\" .. c, i + 2 end
  local out, last = escape(p, i)
  if not out then refuse(p, i, "\\" .. c) end
  return out, last
end

local function translate(p)
  local out, opened, atom = {}, {}, nil      -- atom: where in `out` the last atom begins
  local i = 1
  local function put(text, last) atom = #out + 1 out[atom] = text i = last end
  while i <= #p do
    local c = p:sub(i, i)
    if c == "\\" then put(outside(p, i))
    elseif c == "[" then
      local flat, whole, last = parse_class(p, i)
      put(flat and "[" .. flat .. "]" or whole, last)
    elseif c == "(" then
      local head, last = group(p, i)
      out[#out + 1], i = head, last
      if head:sub(-1) ~= ")" then opened[#opened + 1] = #out end
    elseif c == ")" then
      out[#out + 1], i = ")", i + 1
      if #opened == 0 then refuse(p, i - 1, ")") end
      atom = table.remove(opened)
    elseif c == "{" then
      local text, last, exact = braces(p, i)
      local after = last and p:sub(last, last)
      if not text then put("\\{", i + 1)
      elseif not atom then refuse(p, i, "a quantifier of nothing")
      elseif after == "+" or (after == "?" and exact) then     -- Ruby: a quantifier of the quantified
        out[atom] = "(?:" .. out[atom]
        out[#out + 1], i = text .. ")", last
      else
        out[#out + 1], i = text, last
      end
    else
      local char, last = p:match("^([%z\1-\127\194-\244][\128-\191]*)()", i)
      if not char then refuse(p, i, "a byte that is no UTF-8") end
      if c:find "[?*+|]" then out[#out + 1], i = char, last else put(char, last) end
    end
  end
  return table.concat(out)
end

--- The pattern of the pre-tokenizer Whitespace, for PCRE2: upstream runs it in Rust's regex crate, whose \w has Join_Control and
-- no superscripts.
M.WHITESPACE = ("[%s\\x{200c}\\x{200d}]+|[^%s\\x{200c}\\x{200d}%s]+"):format(ALPHABETIC_WORD, ALPHABETIC_WORD, SPACE)

--- Translates a pattern.
-- @param pattern string in Oniguruma's syntax
-- @return string|nil for PCRE2, or nil and a message
function M.translate(pattern)
  local ok, result = pcall(translate, pattern)
  if ok then return result end
  if type(result) == "table" then return nil, result.message end
  return nil, ("pattern '%s' could not be read: %s"):format(pattern, tostring(result))
end

return M
