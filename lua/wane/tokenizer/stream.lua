--- Text as it is generated: ids go in one by one, text comes out as soon as it is certain, and never half a character.
-- The ids since the last text are decoded with and without the newest; what is new is the difference. Source: tokenizers,
-- tokenizer/mod.rs `DecodeStream`, whose results this equals.
-- @module wane.tokenizer.stream
local Stream = {}
Stream.__index = Stream

local UNFINISHED = "\239\191\189"        -- U+FFFD at the end: bytes of a character are still missing

local function unfinished(text) return text:sub(-3) == UNFINISHED end

--- Takes the next id.
-- @param id integer
-- @return string|nil text that is certain now
function Stream:step(id)
  if self.skip and self.tok:is_special(id) then return nil end
  local ids = self.ids
  if self.prefix == "" and #ids > 0 then
    local prefix = self.tok:decode(ids, self.options)
    if not unfinished(prefix) then self.prefix, self.prefix_n = prefix, #ids end
  end
  ids[#ids + 1] = id
  local text, prefix = self.tok:decode(ids, self.options), self.prefix
  if #text <= #prefix or unfinished(text) then return nil end
  local piece
  if text:sub(1, #prefix) == prefix then
    piece = text:sub(#prefix + 1)
  else
    -- A decoder that rewrites what it has said already: only what lies behind it can be shown.
    piece = text:sub(#prefix + 1):gsub("^[\128-\191]+", "")
  end
  local kept = {}
  for i = self.prefix_n + 1, #ids do kept[#kept + 1] = ids[i] end
  self.prefix_n = #ids - self.prefix_n
  self.ids = kept
  self.prefix = self.tok:decode(kept, self.options)
  return piece
end

--- Ends the stream.
-- @return string|nil what was held back: bytes that never became a character show as U+FFFD
function Stream:finish()
  local text, prefix = self.tok:decode(self.ids, self.options), self.prefix
  self.ids, self.prefix, self.prefix_n = {}, "", 0
  if #text > #prefix then return text:sub(#prefix + 1) end
end

--- A new stream.
-- @param tok table the tokenizer
-- @param options table|nil {skip_special_tokens = true}
return function(tok, options)
  local skip = not (options and options.skip_special_tokens == false)
  return setmetatable({ tok = tok, ids = {}, prefix = "", prefix_n = 0, skip = skip, options = { skip_special_tokens = skip } }, Stream)
end
