--- What a generation starts from: prompts, checked and padded to one length. An encoder-decoder reads them with its encoder, once, and
-- its decoder begins with the start token.
-- @module wane.generate.inputs
local core = require "wane.core"

local M = {}

--- Prompts as a list of lists of ids; raises for what is none.
-- @param prompts integer[]|integer[][]
-- @return integer[][]
function M.check(prompts)
  if type(prompts) ~= "table" then core.raise("generate: expected lists of token ids, found a %s", type(prompts)) end
  if type(prompts[1]) == "number" then prompts = { prompts } end
  if #prompts == 0 then core.raise "generate: no prompts" end
  for b, p in ipairs(prompts) do
    if type(p) ~= "table" or #p == 0 then core.raise("generate: prompt %d is empty; give at least one id (bos?)", b) end
    for t, id in ipairs(p) do
      if type(id) ~= "number" or id % 1 ~= 0 then core.raise("generate: id %d of prompt %d is %s; expected whole numbers", t, b, tostring(id)) end
    end
  end
  return prompts
end

local function longest_of(lists)
  local longest = 0
  for _, p in ipairs(lists) do longest = math.max(longest, #p) end
  return longest
end

--- How many ids of the running sequences the caller gave: those of the longest prompt, or the decoder's start token.
function M.length(model, prompts) return model.encode and 1 or longest_of(prompts) end

-- Lists of different lengths made one length, and their mask (nil where nothing was padded).
local function pad(lists, id, on_the_right)
  local longest = longest_of(lists)
  local rows, mask, any = {}, {}, false
  for b, p in ipairs(lists) do
    rows[b], mask[b] = {}, {}
    local shift = on_the_right and 0 or longest - #p
    any = any or #p < longest
    for t = 1, longest do
      rows[b][t] = p[t - shift] or id
      mask[b][t] = p[t - shift] and 1 or 0
    end
  end
  return rows, any and mask or nil
end

--- The ids that the running sequences begin with.
-- @param model wane.Model
-- @param prompts integer[][] from M.check
-- @param o table from generate.options
-- @return integer[][] ids, all of one length
-- @return table|nil mask of them, lists of 0 and 1
-- @return wane.Pass|nil the source of an encoder-decoder, enqueued; close() frees it
function M.prepare(model, prompts, o)
  if not model.encode then
    local rows, mask = pad(prompts, o.pad)
    return rows, o.attention_mask or mask
  end
  local start = o.decoder_start_token_id
  if type(start) ~= "number" then core.raise "generate: neither the model's config nor the call says decoder_start_token_id (T5: the pad token's id)" end
  local rows, mask = pad(prompts, o.pad, true)
  local starts = {}
  for b = 1, #rows do starts[b] = { start } end
  return starts, nil, model:source(rows, o.attention_mask or mask)
end

return M
