--- One pass through a model: everything that a forward needs and a model file need not know: positions, masks, the key-value cache,
-- dtypes. Layers ask it for heads, rotation and attention.
-- @module wane.nn.pass
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
  local parts, heads, out, from = { ... }, 0, {}, 0
  for _, n in ipairs(parts) do heads = heads + n end
  local whole = groups == 1 and F.view(x, self.batch, self.time, heads, width) or F.view(x, self.batch, self.time, groups, heads * width)
  for i, n in ipairs(parts) do
    if groups == 1 then
      out[i] = F.narrow(whole, 2, from, n)
    else
      out[i] = F.narrow(whole, 3, from * width, n * width)
      if n > 1 then out[i] = F.view(F.cast(out[i], self.dtype), self.batch, self.time, groups * n, width) end
    end
    from = from + n
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

-- The cache of this pass, or one for this attention alone.
local function cache_of(self)
  self.attentions = self.attentions + 1
  return self.cache or M.cache(self.batch, self.time, C.WANE_F32)
end

-- Attention over what a layer of the cache holds; [B, T, H*D].
local function over(self, layer, q, length, key_mask, causal, o)
  local y = F.attention(q, layer.k, layer.v, {
    q_start = self.start, kv_length = length, key_mask = key_mask, causal = causal,
    window = o and o.window, scale = o and o.scale, softcap = o and o.softcap, bias = o and o.bias,
  })
  if not self.cache then
    layer.k:close()
    layer.v:close()
  end
  return F.view(y, self.batch, self.time, -1)
end

--- Attention of q [B, T, H, D] over all keys so far, k and v [B, T, KV, D] joining the cache first. Returns [B, T, H*D].
-- @param o table|nil { window, scale, softcap, bias, causal }
function Pass:attend(q, k, v, o)
  local cache, i = cache_of(self), self.attentions
  local layer = cache[i] or new_layer(cache, k, cache.capacity)
  cache[i] = layer
  append(layer, k, v, self.start)
  return over(self, layer, q, self.start + self.time, self.key_mask, o and o.causal, o)
end

--- Attention of q [B, T, H, D] over every row of the source. Its keys and values are made once a sequence and stay in the cache.
-- @param project function(source) -> k, v [B, S, KV, D] from source.states [B, S, C]
-- @param o table|nil { scale, softcap, bias }
-- @return wane.Tensor [B, T, H*D]
function Pass:attend_source(q, project, o)
  local cache, i = cache_of(self), self.attentions
  local layer = cache[i]
  if not layer then
    local k, v = project(self.source)
    layer = new_layer(cache, k, self.source.time)
    cache[i] = layer
    append(layer, k, v, 0)
  end
  return over(self, layer, q, self.source.time, self.source.key_mask, false, o)
end

--- Runs a list of layers, x -> x, freeing each one's temporaries when it is done.
-- @param ... what every layer is given behind the pass
function Pass:through(layers, x, ...)
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
