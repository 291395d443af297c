--- Attention with linear biases (Press et al. 2022): a head adds slope * position of the key to its scores, which a softmax cannot
-- tell from slope * distance. Source: transformers modeling_bloom.py, build_alibi_tensor.
-- @module wane.nn.alibi
local ffi = require "ffi"
local core = require "wane.core"
local F = require "wane.nn.functional"
local C = core.C

local M = {}

--- The slopes of n heads. A power of two: a geometric sequence that begins with its own factor, 2^(-8/n). Otherwise the largest
-- power of two below, then every other slope of twice as many heads.
-- @param n integer
-- @return number[]
function M.slopes(n)
  local power = 1
  while power * 2 <= n do power = power * 2 end
  local slopes, base, between = {}, 2 ^ (-8 / power), 2 ^ (-4 / power)
  for i = 1, power do slopes[i] = base ^ i end
  for i = 1, math.min(power, n - power) do slopes[power + i] = between ^ (2 * i - 1) end
  return slopes
end

---@class wane.Alibi
local Alibi = {}
Alibi.__index = Alibi

--- The biases of n heads.
-- @param n integer
-- @param options table|nil { scale = what the biases are multiplied by (default 1), dtype = "bf16" where upstream rounds them to it }
function M.new(n, options)
  options = options or {}
  return setmetatable({ heads = n, scale = options.scale or 1, dtype = core.dtype(options.dtype or "f32") }, Alibi)
end

-- f32 [B or 1, heads, 1, length]. A key's position is the number of visible keys before it, so left padding shifts it away.
local function table_of(self, mask, length)
  local positions
  if mask then
    positions = F.binary_scalar(F.cumsum(F.cast(mask, C.WANE_F32), 1), 1, C.WANE_SUB)
  else
    positions = F.arange(0, length, C.WANE_F32)
  end
  local slopes = F.upload(ffi.new("float[?]", self.heads, M.slopes(self.heads)), C.WANE_F32, self.heads * 4, 1, self.heads, 1, 1)
  positions = F.view(positions, -1, 1, 1, length)
  if self.dtype ~= C.WANE_F32 then slopes, positions = F.cast(slopes, self.dtype), F.cast(positions, self.dtype) end
  local bias = F.binary(slopes, positions, C.WANE_MUL)
  if self.dtype ~= C.WANE_F32 then bias = F.cast(bias, C.WANE_F32) end
  return self.scale == 1 and bias or F.binary_scalar(bias, self.scale, C.WANE_MUL)
end

--- The bias of a pass, for pass:attend's `bias`: f32, broadcastable to [B, heads, T, keys]. With a cache it is made once for the whole
-- capacity, so that a generated token costs a view. Call it outside the layers: they free what they make.
-- @param pass wane.Pass
function Alibi:bias(pass)
  local keys, mask, cache = pass.start + pass.time, pass.key_mask, pass.cache
  local width = mask and mask:shape()[2] or cache and cache.capacity or keys
  if not cache then return F.narrow(table_of(self, mask, width), 3, 0, keys) end
  local kept = cache.alibi
  if not kept or kept.mask ~= mask then
    if kept then kept.bias:close() end
    kept = { mask = mask, bias = F.outside_scopes(core.scope, table_of, self, mask, width) }
    cache.alibi = kept
  end
  return F.narrow(kept.bias, 3, 0, keys)
end

return M
