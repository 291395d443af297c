--- Relative position bias: a learned number for each head and each distance between key and query, distances falling into buckets that
-- widen with their logarithm. It is added to the scores of attention and says all there is about positions.
-- Source: Raffel et al. 2020 (T5), section 2.1; transformers modeling_t5.py T5Attention.
-- @module wane.nn.relative
local ffi = require "ffi"
local C = require("wane.core").C
local F = require "wane.nn.functional"
local module = require "wane.nn.module"

---@class wane.RelativeBias : wane.Module
---@field weight wane.Tensor [buckets, heads]
local RelativeBias = module.class "RelativeBias"

local M = {}

--- A layer without values yet.
-- @param buckets integer
-- @param heads integer
-- @param max_distance integer this far and farther is one bucket
-- @param bidirectional boolean keys behind the query have half of the buckets; otherwise they share that of distance 0 (and are masked)
function M.new(buckets, heads, max_distance, bidirectional)
  return module.instance(RelativeBias, { buckets = buckets, heads = heads, max_distance = max_distance, bidirectional = bidirectional,
    params = { { name = "weight", shape = { buckets, heads } } } })
end

--- The bucket of a distance, from 0.
-- @param distance integer key's time - query's time
-- @return integer
function RelativeBias:bucket(distance)
  local n, base = self.buckets, 0
  if self.bidirectional then
    n = n / 2
    if distance > 0 then base = n end
    distance = math.abs(distance)
  else
    distance = math.max(-distance, 0)
  end
  local exact = math.floor(n / 2)                     -- one bucket a distance up to here, then as many for each power
  if distance < exact then return base + distance end
  return base + math.min(n - 1, exact + math.floor(math.log(distance / exact) / math.log(self.max_distance / exact) * (n - exact)))
end

--- The bias of the rows of a pass against all keys so far.
-- @param pass wane.Pass
-- @return wane.Tensor f32 [heads, time, start + time]
function RelativeBias:forward(pass)
  local rows, keys = pass.time, pass.start + pass.time
  local bucket = ffi.new("int32_t[?]", keys + rows - 1)
  for i = 0, keys + rows - 2 do bucket[i] = self:bucket(i - keys + 1) end       -- distances 1 - keys … rows - 1
  local index = ffi.new("int32_t[?]", rows * keys)
  for t = 0, rows - 1 do ffi.copy(index + t * keys, bucket + (rows - 1 - t), keys * 4) end
  local bias = F.rows(F.cast(self.weight, C.WANE_F32), F.upload(index, C.WANE_I32, rows * keys * 4, rows, keys))     -- [rows, keys, heads]
  return F.cast(F.permute(bias, 2, 0, 1), C.WANE_F32)
end

function RelativeBias:describe()
  return ("RelativeBias(%d buckets to %d, %d heads%s)"):format(self.buckets, self.max_distance, self.heads, self.bidirectional and ", both ways" or "")
end

return M
