--- Perplexity of a text, by the two conventions people quote. They are not comparable with each other.
--
--   hf         windows of ctx ids every `stride` ids (transformers docs, "Perplexity of fixed-length models"); each window scores the
--              ids that no earlier window scored, except the very first id of the text. The mean is over scored ids. (The loop in
--              those docs weights windows slightly differently when stride < ctx; its figure is given too.)
--   llama.cpp  windows of ctx ids side by side; a bos stands in for each window's first id where the tokenizer adds one; the second
--              half of each window is scored (tools/perplexity).
-- @module wane.evaluate
local ffi = require "ffi"
local core = require "wane.core"
local F = require "wane.nn.functional"
local passes = require "wane.nn.pass"
local C = core.C

local M = {}

local HEAD_ROWS = 128               -- rows of logits at a time: a whole window of a large vocabulary would be hundreds of megabytes

--- -log p of ids[first + 1 .. n] given everything before, for rows `first` .. n - 1 (counting from 1) of one window.
-- @param model wane.Model
-- @param ids integer[] the window
-- @param first integer the first id that predicts a scored one
-- @return number[] one figure for each of ids[first + 1] .. ids[n]
function M.window_nll(model, ids, first)
  local n = #ids
  local rows = n - first
  local out = {}
  if rows <= 0 then return out end
  core.scope(function()
    local data = ffi.new("int32_t[?]", n)
    for i = 1, n do data[i - 1] = ids[i] end
    local tensor = F.upload(data, C.WANE_I32, n * 4, 1, n)
    local hidden = model:backbone(tensor, passes.new { batch = 1, time = n, tail_rows = n - first + 1 })   -- [1, rows + 1, C]
    local labels = F.narrow(F.view(tensor, n), 0, first, rows)
    local pieces = {}
    for from = 0, rows - 1, HEAD_ROWS do
      local count = math.min(HEAD_ROWS, rows - from)
      pieces[#pieces + 1] = core.scope(function()
        local logits = model:head(F.narrow(hidden, 1, from, count))
        return F.nll(F.view(logits, count, -1), F.narrow(labels, 0, from, count))
      end)
    end
    for _, piece in ipairs(pieces) do
      local values, count = F.read(piece, "float")
      for i = 0, count - 1 do out[#out + 1] = values[i] end
    end
  end)
  return out
end

local function sum(list)
  local s = 0
  for _, v in ipairs(list) do s = s + v end
  return s
end

-- Each convention: (model, ids, options, visit); visit(figures, new_labels) a window; visit returns true to stop.
local conventions = {}

function conventions.hf(model, ids, o, visit)
  local before = 0                                    -- ids scored (or passed over) so far
  for start = 0, #ids - 1, o.stride do
    local stop = math.min(start + o.ctx, #ids)
    local window = {}
    for i = start + 1, stop do window[#window + 1] = ids[i] end
    local new = stop - before
    -- The window's first id has no predecessor in sight, so it is never scored.
    local figures = M.window_nll(model, window, math.max(#window - new, 1))
    if visit(figures, new) or stop == #ids then return end
    before = stop
  end
end

conventions["llama.cpp"] = function(model, ids, o, visit)
  local half = math.floor(o.ctx / 2)
  for start = 0, #ids - o.ctx, o.ctx do
    local window = {}
    for i = 1, o.ctx do window[i] = ids[start + i] end
    if o.bos then window[1] = o.bos end
    if visit(M.window_nll(model, window, half + 1), o.ctx - half - 1) then return end
  end
end

--- Perplexity of a list of ids.
-- @param model wane.Model
-- @param ids integer[]
-- @param o table { convention = "hf" | "llama.cpp", ctx, stride (hf; default ctx), max_windows, bos (llama.cpp), progress(windows, tokens, ppl) }
-- @return table { convention, perplexity, nll, tokens, windows, stderr, documentation (hf: the docs' figure) }
function M.perplexity(model, ids, o)
  o = o or {}
  if model.encode then core.raise("perplexity: %s is an encoder-decoder, which scores an answer to a text: model:loss(ids, labels)", model.family.name) end
  local convention = o.convention or "hf"
  local run = conventions[convention]
  if not run then core.raise("convention: expected hf or llama.cpp, found '%s'", tostring(convention)) end
  local limit = model.config.max_position_embeddings or 2048
  local ctx = o.ctx or (convention == "hf" and math.min(limit, 2048) or 512)
  local stride = o.stride or ctx
  if ctx < 2 then core.raise("ctx: expected 2 or more, found %s", tostring(ctx)) end
  if stride < 1 or stride > ctx then core.raise("stride: expected 1 to ctx (%d), found %s", ctx, tostring(stride)) end
  if convention == "llama.cpp" and #ids < 2 * ctx then core.raise("llama.cpp's convention needs at least 2 * ctx = %d ids, the text has %d", 2 * ctx, #ids) end
  if #ids < 2 then core.raise "perplexity: the text has fewer than 2 ids" end
  local total, squares, tokens, windows, weighted, weights = 0, 0, 0, 0, 0, 0
  run(model, ids, { ctx = ctx, stride = stride, bos = o.bos }, function(figures, new)
    local s = sum(figures)
    total, tokens, windows = total + s, tokens + #figures, windows + 1
    for _, v in ipairs(figures) do squares = squares + v * v end
    if #figures > 0 and new > 1 then weighted, weights = weighted + s / #figures * (new - 1), weights + (new - 1) end
    if o.progress then o.progress(windows, tokens, math.exp(total / math.max(tokens, 1))) end
    return o.max_windows and windows >= o.max_windows
  end)
  local nll = total / tokens
  local variance = tokens > 1 and math.max(squares / tokens - nll * nll, 0) / (tokens - 1) or 0
  return {
    convention = convention, ctx = ctx, stride = convention == "hf" and stride or nil, perplexity = math.exp(nll), nll = nll, tokens = tokens,
    windows = windows, stderr = math.exp(nll) * math.sqrt(variance), documentation = convention == "hf" and math.exp(weighted / weights) or nil,
  }
end

return M
