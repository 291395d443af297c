--- How a tensor prints: shape, dtype, device, statistics and a corner of the values; never a wall of digits.
--
--     tensor [2, 3] f32 cpu   min -1.2  max 3  mean 0.41  std 1.3
--     [[ 1.0000 -1.2000  0.5000]
--      [ 3.0000  0.2500 -1.0000]]
-- @module wane.tensor.print
local core = require "wane.core"
local Tensor = require "wane.tensor.object"
local C = core.C

local EDGE = 3                          -- values shown at either end of a long dimension
local LONGEST = { [1] = 8, [2] = 6 }    -- sizes printed whole: of the last dimension, of the last but one; 4 in front of those
local STATISTICS = 2 ^ 27               -- more elements than this are not all read just to be printed
local new = Tensor.constructors

--- min, max, mean, std over the finite values, and how many are NaN or infinite. Waits.
-- @return table|nil { min, max, mean, std, nan, inf }; nil for a tensor without values
function Tensor:stats()
  local n = self:numel()
  if n == 0 then return nil end
  local parts = core.scope(function()
    local x = self:to "f32"
    local finite, nan = x:isfinite(), x:isnan():sum()
    local count = finite:sum()
    local zeroed = finite:where(x, 0)
    local mean = zeroed:sum() / count
    return {
      count = count, nan = nan, mean = mean, min = finite:where(x, math.huge):amin(), max = finite:where(x, -math.huge):amax(),
      std = ((zeroed - mean):square() * finite:to "f32"):mean() * (n / count),
    }
  end)
  local out = {}
  for name, t in pairs(parts) do
    out[name] = t:item()
    t:close()
  end
  local count = out.count
  out.std, out.inf, out.count = math.sqrt(out.std), n - count - out.nan, nil
  if count == 0 then out.min, out.max, out.mean, out.std = nil, nil, nil, nil end
  return out
end

-- ---------------------------------------------------------------- the corner

--- Positions of a dimension that are shown, and where the gap is (nil: none).
local function shown(size, from_last)
  local whole = LONGEST[from_last] or 4
  if size <= whole then return nil end
  local edge = from_last > 2 and 1 or EDGE
  local list = {}
  for i = 0, edge - 1 do list[#list + 1] = i end
  for i = size - edge, size - 1 do list[#list + 1] = i end
  return list, edge
end

--- The shown values as nested lists, and the gap of each dimension.
local function corner(t)
  local shape, gaps = t:shape(), {}
  local small = core.scope(function()
    local x = t
    for d = 1, #shape do
      local list, gap = shown(shape[d], #shape - d + 1)
      gaps[d] = gap
      if list then x = x:index_select(d, new.tensor(list, "i64")) end
    end
    return x ~= t and x or x:clone()
  end)
  local values = small:totable()
  small:close()
  return values, gaps
end

--- A function that writes one value, all of them equally precise: whole numbers plainly, else four decimals or an exponent.
local function writer(values)
  local whole, large, tiny, any = true, 0, math.huge, false
  local function look(v)
    if type(v) == "table" then
      for _, w in ipairs(v) do look(w) end
    elseif type(v) == "number" and v == v and math.abs(v) ~= math.huge then
      any = true
      if v % 1 ~= 0 then whole = false end
      if v ~= 0 then large, tiny = math.max(large, math.abs(v)), math.min(tiny, math.abs(v)) end
    end
  end
  look(values)
  local format = (whole and large < 1e15 and any) and "%.0f" or (large >= 1e5 or (tiny < 1e-4 and large < 1e-1)) and "%.3e" or "%.4f"
  return function(v)
    if type(v) == "boolean" then return tostring(v) end
    if v ~= v then return "nan" end
    if v == math.huge or v == -math.huge then return v > 0 and "inf" or "-inf" end
    return (format:format(v):gsub("^%-(0%.?0*)$", "%1"))
  end
end

--- Nested lists as rows in brackets, aligned.
local function rows(values, gaps)
  local write, width = writer(values), 0
  local function measure(v)
    if type(v) == "table" then
      for _, w in ipairs(v) do measure(w) end
    else
      width = math.max(width, #write(v))
    end
  end
  measure(values)
  local function level(v, depth)
    if type(v) ~= "table" then return (" "):rep(width - #write(v)) .. write(v) end
    local leaf = type(v[1]) ~= "table"
    local parts = {}
    for i, w in ipairs(v) do
      parts[#parts + 1] = level(w, depth + 1)
      if gaps[depth] == i then parts[#parts + 1] = leaf and "..." or "..." end
    end
    return "[" .. table.concat(parts, leaf and " " or "\n" .. (" "):rep(depth)) .. "]"
  end
  return level(values, 1)
end

local function number(v) return ("%.4g"):format(v) end

--- "min … max … mean … std …" with counts of NaN and infinities.
local function summary(t)
  if t:dtype() == "bool" then
    local trues = t:sum()
    local n = trues:item()
    trues:close()
    return ("true %d  false %d"):format(n, t:numel() - n)
  end
  local s = t:stats()
  local text = s.min and ("min %s  max %s  mean %s  std %s"):format(number(s.min), number(s.max), number(s.mean), number(s.std)) or "no finite value"
  if s.nan > 0 then text = text .. ("  NaN %d"):format(s.nan) end
  if s.inf > 0 then text = text .. ("  Inf %d"):format(s.inf) end
  return text
end

--- The text print() shows. Waits for the values.
-- @return string
function Tensor.__tostring(t)
  local h = t.h
  if h == nil then return "tensor (class)" end
  if C.wane_tensor_info(h, core.info_type()) < 0 then return "tensor (closed)" end
  local i = t:info()
  local n, quantized = tonumber(i.numel), i.dtype >= C.WANE_DTYPE_PLAIN
  local head = ("tensor [%s] %s %s"):format(table.concat(t:shape(), ", "), t:dtype(), t:device())
  if quantized then head = head .. ("  %d bytes, block size %d"):format(tonumber(i.nbytes), i.block_size) end
  if n == 0 then return head .. "  no values" end
  if n > STATISTICS then return head .. "  (large: stats() reads all of it)" .. (quantized and "" or "\n" .. rows(corner(t))) end
  local values = quantized and t:to "f32" or t
  local text = n > 1 and head .. "  " .. summary(values) or head
  text = text .. "\n" .. rows(corner(values))
  if quantized then values:close() end
  return text
end

return Tensor
