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
-- the whole capacity and touched as the sequence grows, so growing copies nothing and costs what is used.
-- @param batch integer
-- @param capacity integer longest sequence
-- @param dtype integer WANE_F32, _BF16 or _F16
function M.cache(batch, capacity, dtype)
  return setmetatable({ batch = batch, capacity = capacity, dtype = dtype, length = 0 }, Cache)
end

local function cache_layer(self, i, heads, width)
  local layer = self[i]
  if not layer then
    layer = { k = F.persistent(self.dtype, self.batch, heads, self.capacity, width), v = F.persistent(self.dtype, self.batch, heads, self.capacity, width) }
    self[i] = layer
  end
  return layer
end

--- Frees the cache's memory.
function Cache:close()
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
---@field positions wane.Tensor|nil i32 [batch, time]; nil: start + t
---@field key_mask wane.Tensor|nil u8 [batch, >= start + time]; 0 hides a key
---@field tail_rows integer|nil only this many last rows are wanted from the head
local Pass = {}
Pass.__index = Pass

--- @param fields table batch, time, start, positions, key_mask, cache, dtype
function M.new(fields)
  fields.start = fields.start or 0
  fields.dtype = fields.dtype or C.WANE_F32
  fields.attentions = 0
  return setmetatable(fields, Pass)
end

--- x [B, T, n*D] as heads [B, T, n, D].
function Pass:heads(n, x) return F.view(x, self.batch, self.time, n, -1) end

--- The parts of fused heads: x [B, T, H*parts*D], each head holding its parts side by side -> parts tensors [B, T, H, D].
function Pass:split_heads(n, x, parts, width)
  local whole = F.view(x, self.batch, self.time, n, parts * width)
  local out = {}
  for i = 1, parts do out[i] = F.narrow(whole, 3, (i - 1) * width, width) end
  return unpack(out)
end

--- q and k turned to their positions.
function Pass:rotary(rotary, q, k) return rotary:rotate(q, self), rotary:rotate(k, self) end

--- Attention of q [B, T, H, D] over all keys so far, k and v [B, T, KV, D] joining the cache first. Returns [B, T, H*D].
-- @param o table|nil { window, scale, softcap, bias, causal }
function Pass:attend(q, k, v, o)
  self.attentions = self.attentions + 1
  local shape = k:shape()
  local cache = self.cache or M.cache(self.batch, self.time, C.WANE_F32)
  local layer = cache_layer(cache, self.attentions, shape[3], shape[4])
  F.kv_append(layer.k, k, self.start)
  F.kv_append(layer.v, v, self.start)
  local y = F.attention(q, layer.k, layer.v, {
    q_start = self.start, kv_length = self.start + self.time, key_mask = self.key_mask,
    window = o and o.window, scale = o and o.scale, softcap = o and o.softcap, bias = o and o.bias, causal = o and o.causal,
  })
  if not self.cache then
    layer.k:close()
    layer.v:close()
  end
  return F.view(y, self.batch, self.time, -1)
end

--- Runs a list of layers, x -> x, freeing each one's temporaries when it is done.
function Pass:through(layers, x)
  for i = 1, #layers do
    local before = x
    x = core.scope(layers[i], x, self)
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

return M
