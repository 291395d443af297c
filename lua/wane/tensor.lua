--- Tensors: a table around a C handle, `{ h = wane_handle }`.
--
-- Positional arguments (dimensions, indices, starts) count from 1 as in Torch; tensors that HOLD indices (argmax, topk, token ids)
-- count from 0, because token ids do.
-- @module wane.tensor
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C

---@class wane.Tensor
---@field h ffi.cdata* wane_handle
local Tensor = {}
Tensor.__index = Tensor

-- ---------------------------------------------------------------- objects

--- A Tensor around a handle that a C function has filled. A tensor that no scope owns is freed by the collector at the latest.
-- @param h cdata wane_handle
-- @return wane.Tensor
function Tensor.wrap(h)
  if h.flags == 0 then ffi.gc(h, C.wane_tensor_free) end
  return setmetatable({ h = h }, Tensor)
end

--- Frees the tensor's memory now; using it afterwards is an error. Closing twice is not.
function Tensor:close()
  ffi.gc(self.h, nil)
  C.wane_tensor_free(self.h)
end

--- True for tensors.
function Tensor.is(x) return getmetatable(x) == Tensor end

-- A scope ends: what it returns moves into the scope around it, or to the collector.
local function keep(value, outer, seen)
  if getmetatable(value) == Tensor then
    core.check(C.wane_tensor_move(core.stream(), value.h, outer))
    value.h.flags = outer ~= nil and 1 or 0
    if outer == nil then ffi.gc(value.h, C.wane_tensor_free) end
  elseif type(value) == "table" and not seen[value] then
    seen[value] = true
    for _, v in pairs(value) do keep(v, outer, seen) end
  end
end
core.keep = function(value, outer) keep(value, outer, {}) end

local info = core.info_type()

--- Sizes as a Lua list.
-- @return integer[]
function Tensor:shape()
  core.check(C.wane_tensor_info(self.h, info))
  local shape = {}
  for i = 1, info.ndim do shape[i] = tonumber(info.shape[i - 1]) end
  return shape
end

--- Name of the dtype: "f32", "i32", "nf4" …
-- @return string
function Tensor:dtype()
  core.check(C.wane_tensor_info(self.h, info))
  return core.dtype_name(info.dtype)
end

return Tensor
