--- One pass through a model: everything that a forward needs and a model file need not know: positions, masks, the key-value cache,
-- dtypes. Layers ask it for heads, rotation and attention.
-- @module wane.nn.pass
local autograd = require "wane.autograd"
local core = require "wane.core"
local F = require "wane.nn.functional"
local C = core.C

local M = {}

-- ---------------------------------------------------------------- cache

---@class wane.Cache
local Cache = {}
Cache.__index = Cache

--- A key-value cache: for each attention, in the order they run, k and v [batch, heads, capacity, head_dim]. Pages are reserved for
-- the whole capacity and touched as the sequence grows, so growing copies nothing and costs what is used. An attention over a source
-- holds as many keys as the source has rows, written once.
-- @param batch integer
-- @param capacity integer longest sequence
-- @param dtype integer WANE_F32, _BF16 or _F16
function M.cache(batch, capacity, dtype)
  return setmetatable({ batch = batch, capacity = capacity, dtype = dtype, length = 0 }, Cache)
end

-- Room for `capacity` keys of the shape of k [B, T, KV, D].
local function new_layer(cache, k, capacity)
  local shape = k:shape()
  local function room() return F.persistent(cache.dtype, cache.batch, shape[3], capacity, shape[4]) end
  return { k = room(), v = room() }
end

local function append(layer, k, v, start)
  F.kv_append(layer.k, k, start)
  F.kv_append(layer.v, v, start)
end

--- Frees the cache's memory.
function Cache:close()
  if self.alibi then self.alibi.bias:close() end
  self.alibi = nil
  for i = #self, 1, -1 do
    self[i].k:close()
    self[i].v:close()
    self[i] = nil
  end
end

-- ---------------------------------------------------------------- pass

---@class wane.Pass
---@field batch integer
---@field time integer rows of this pass
---@field start integer absolute time of the first row
---@field reach integer length of the sequence that this pass is a part of; default: up to its last row
---@field positions wane.Tensor|nil i32 [batch, time]; nil: start + t
---@field key_mask wane.Tensor|nil u8 [batch, >= start + time]; 0 hides a key
---@field tail_rows integer|nil only this many last rows are wanted from the head
---@field source wane.Pass|nil what an encoder-decoder's decoder attends to: the encoder's pass, finished, its result in `states`
---@field states wane.Tensor|nil [batch, time, C] of a finished encoder pass
---@field first wane.Tensor|nil i32 [batch, time]: the first key (absolute time) that each row may see: samples packed into a row
---@field checkpointing boolean|nil while recording, keep what enters each layer alone and run the layer again for its gradient
local Pass = {}
Pass.__index = Pass

--- @param fields table batch, time, start, reach, positions, key_mask, cache, dtype, source
function M.new(fields)
  fields.start = fields.start or 0
  fields.reach = fields.reach or fields.start + fields.time
  fields.dtype = fields.dtype or C.WANE_F32
  fields.attentions = 0
  return setmetatable(fields, Pass)
end

--- x [B, T, n*D] as heads [B, T, n, D].
function Pass:heads(n, x) return F.view(x, self.batch, self.time, n, -1) end

--- The parts of fused heads. Each of `groups` groups holds parts of n1, n2 … heads one after another: x [B, T, groups*(n1 + n2 + …)*D]
-- -> for each part [B, T, groups*n, D]. GPT-NeoX: H groups of 1, 1, 1; GPT-2: one group of H, H, H. Views, unless a part has several
-- heads in each of several groups (Falcon 40B's queries): that one is copied.
-- @param x wane.Tensor
-- @param width integer D
-- @param groups integer
-- @param ... integer heads of each part in a group
function Pass:split(x, width, groups, ...)
  local parts, heads = { ... }, 0
  for _, n in ipairs(parts) do heads = heads + n end
  if groups == 1 then return F.split(F.view(x, self.batch, self.time, heads, width), 2, parts) end
  local widths = {}
  for i, n in ipairs(parts) do widths[i] = n * width end
  local out = { F.split(F.view(x, self.batch, self.time, groups, heads * width), 3, widths) }
  for i, n in ipairs(parts) do
    if n > 1 then out[i] = F.view(F.cast(out[i], self.dtype), self.batch, self.time, groups * n, width) end
  end
  return unpack(out)
end

--- Positions of this pass's rows plus an offset, as ids for a table of learned positions: i32 [B, T], or [1, T] where all rows agree.
-- @param offset integer|nil
function Pass:position_ids(offset)
  offset = offset or 0
  if not self.positions then return F.arange(self.start + offset, self.time, C.WANE_I32) end
  return offset == 0 and self.positions or F.binary_scalar(self.positions, offset, C.WANE_ADD)
end

--- q and k turned to their positions.
function Pass:rotary(rotary, q, k) return rotary:rotate(q, self), rotary:rotate(k, self) end

-- What F.attention is told of a pass over `length` keys.
local function settings(self, length, key_mask, causal, o)
  o = o or {}
  return { q_start = self.start, kv_length = length, key_mask = key_mask, causal = causal,
    window = o.window, scale = o.scale, softcap = o.softcap, bias = o.bias }
end

-- The layer of the cache that belongs to the attention running now, or nil where it is the first pass; and its number.
local function next_layer(self)
  self.attentions = self.attentions + 1
  return self.cache[self.attentions], self.attentions
end

--- Attention of q [B, T, H, D] over all keys so far, k and v [B, T, KV, D] joining the cache first. Returns [B, T, H*D].
-- @param o table|nil { window, scale, softcap, bias, causal }
function Pass:attend(q, k, v, o)
  local how = settings(self, self.start + self.time, self.key_mask, o and o.causal, o)
  local y
  if self.cache then
    local layer, i = next_layer(self)
    layer = layer or new_layer(self.cache, k, self.cache.capacity)
    self.cache[i] = layer
    append(layer, k, v, self.start)
    y = F.attention(q, layer.k, layer.v, how)
  else
    how.first = self.first
    y = F.attend(q, k, v, how)
  end
  return F.view(y, self.batch, self.time, -1)
end

--- Attention of q [B, T, H, D] over every row of the source. Its keys and values are made once a sequence and stay in the cache.
-- @param project function(source) -> k, v [B, S, KV, D] from source.states [B, S, C]
-- @param o table|nil { scale, softcap, bias }
-- @return wane.Tensor [B, T, H*D]
function Pass:attend_source(q, project, o)
  local how = settings(self, self.source.time, self.source.key_mask, false, o)
  local y
  if self.cache then
    local layer, i = next_layer(self)
    if not layer then
      local k, v = project(self.source)
      layer = new_layer(self.cache, k, self.source.time)
      self.cache[i] = layer
      append(layer, k, v, 0)
    end
    y = F.attention(q, layer.k, layer.v, how)
  else
    local k, v = project(self.source)
    y = F.attend(q, k, v, how)
  end
  return F.view(y, self.batch, self.time, -1)
end

--- Runs a list of layers, x -> x, freeing each one's temporaries when it is done.
-- While recording they are the graph's; with `checkpointing`, a layer's are made again for its gradient.
-- @param ... what every layer is given behind the pass
function Pass:through(layers, x, ...)
  if autograd.recording then
    for i = 1, #layers do
      x = self.checkpointing and autograd.checkpoint(layers[i], x, self, ...) or layers[i](x, self, ...)
    end
    return x
  end
  for i = 1, #layers do
    local before = x
    x = core.scope(layers[i], x, self, ...)
    if i > 1 then before:close() end
  end
  return x
end

--- The rows that the head is asked for: all of x [B, T, C], or its last ones.
function Pass:tail(x)
  local rows = self.tail_rows
  if not rows or rows >= self.time then return x end
  return F.narrow(x, 1, self.time - rows, rows)
end

--- Frees what a finished encoder pass holds.
function Pass:close()
  for _, name in ipairs { "states", "key_mask" } do
    if self[name] then self[name]:close() end
    self[name] = nil
  end
end

return M
