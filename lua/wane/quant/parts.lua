--- What every quantized tensor can be asked: its parts, and its values back.
--
-- q.codes, q.absmax, and where the kind has them q.nested_absmax, q.nested_code, q.offset (double quantization) and q.code (the map
-- of int8-blockwise) are tensors that share q's memory, made anew at each access: keep one in a local. A plain tensor, or a kind
-- without that part, gives nil. Bytes and meaning: section 6 of wane.h.
-- @module wane.quant.parts
local core = require "wane.core"
local C = core.C

local M = {}

local numbers = {
  codes = C.WANE_PART_CODES, absmax = C.WANE_PART_ABSMAX, nested_absmax = C.WANE_PART_NESTED_ABSMAX,
  nested_code = C.WANE_PART_NESTED_CODE, code = C.WANE_PART_CODE, offset = C.WANE_PART_OFFSET,
}

--- Adds the part fields and `dequantize` to the Tensor class.
-- @param Tensor table the class
function M.register(Tensor)
  local info = core.info_type()

  local function part(tensor, number)
    core.check(C.wane_tensor_info(rawget(tensor, "h"), info))
    if info.dtype < C.WANE_NF4 then return nil end
    local h = core.handle_type()
    local status = C.wane_quantized_part(core.stream(), h, tensor.h, number)
    if status == C.WANE_E_NOTFOUND then return nil end
    core.check(status)
    return Tensor.wrap(h)
  end

  for name, number in pairs(numbers) do
    Tensor.fields[name] = function(tensor) return part(tensor, number) end
  end

  --- The values of a quantized tensor as plain floats. f32 is exact; the 16-bit types are that, rounded once more.
  -- A plain float tensor is converted.
  -- @param dtype string|nil "f32" (default), "f16" or "bf16"
  -- @return wane.Tensor
  function Tensor:dequantize(dtype)
    local h = core.handle_type()
    core.check(C.wane_dequantize(core.stream(), h, self.h, core.dtype(dtype or "f32")))
    return Tensor.wrap(h)
  end
end

return M
