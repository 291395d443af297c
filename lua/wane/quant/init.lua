--- Quantizers: one tensor, or (convert) the linear layers of a model.
--
--     local q = wane.quant.quantize(w, { type = "nf4", double_quant = true })
--     print(q, wane.quant.error(w, q).rel_frobenius)
--     local back = q:dequantize("f32")
--
-- Types: nf4 and fp4 (QLoRA, arXiv:2305.14314; block_size 64, double_quant), int8-blockwise (arXiv:2110.02861; block_size 4096,
-- signed), int8 (rows, arXiv:2208.07339). Codes and scales are bitsandbytes' own bytes; where upstream's CPU code rounds to
-- something else than the nearest value, the nearest is taken.
-- @module wane.quant
local core = require "wane.core"
local Tensor = require "wane.tensor"
local C = core.C

local M = {}

-- Options that belong to layers and loaders travel in the same table; they say nothing about one tensor.
local known = { type = true, block_size = true, double_quant = true, signed = true, threshold = true, compute = true, skip = true, rules = true }
local default_block = { nf4 = 64, fp4 = 64, ["int8-blockwise"] = 4096, ["int8-blockwise-unsigned"] = 4096, int8 = 0 }

--- Quantizes a float tensor (f32, f16, bf16) of any shape.
-- @param x wane.Tensor
-- @param options string|table "nf4", or { type = "nf4"|"fp4"|"int8"|"int8-blockwise", block_size = integer, double_quant = boolean,
--   signed = boolean } (signed = false: int8-blockwise with the map for values that are never negative)
-- @return wane.Tensor of a quantized dtype; its parts are fields (q.codes, q.absmax, …), q:dequantize("f32") gives the values
function M.quantize(x, options)
  if not Tensor.is(x) then core.raise("quantize: expected a tensor, found a %s", type(x)) end
  local autograd = require "wane.autograd"
  if autograd.recording and autograd.needs(x) then core.raise "quantize: no gradient passes it, and x leads to a leaf: detach() it" end
  if type(options) == "string" then options = { type = options } end
  if type(options) ~= "table" then core.raise("quantize: expected { type = 'nf4' … }, found a %s", type(options)) end
  for key in pairs(options) do
    if not known[key] then core.raise("quantize: there is no option '%s': type, block_size, double_quant, signed", tostring(key)) end
  end
  local kind = options.type
  if not default_block[kind] then core.raise("quantize: expected type nf4, fp4, int8 or int8-blockwise, found '%s'", tostring(kind)) end
  local block = kind ~= "int8" and options.block_size or default_block[kind]
  if type(block) ~= "number" or block % 1 ~= 0 or math.abs(block) >= 2 ^ 31 then
    core.raise("quantize: block_size must be an integer, found %s", tostring(block))
  end
  if options.signed == false then
    if kind ~= "int8-blockwise" then core.raise("quantize: signed = false is for int8-blockwise, not %s", kind) end
    kind = "int8-blockwise-unsigned"
  end
  local q = core.handle_type()
  core.check(C.wane_quantize(core.stream(), q, x.h, core.dtype(kind), block, options.double_quant and 1 or 0))
  return Tensor.wrap(q)
end

local function made(status, h)
  core.check(status)
  return Tensor.wrap(h)
end

--- One number: `op` reduced over the whole of a tensor.
local function total(x, op)
  local h = core.handle_type()
  return made(C.wane_reduce(core.stream(), h, x.h, op, -1, 0), h):item()
end

local function compare(x, q)
  local s, h = core.stream(), core.handle_type
  local exact, approximate, difference, magnitude = h(), h(), h(), h()
  exact = made(C.wane_cast(s, exact, x.h, C.WANE_F32), exact)
  approximate = made(C.wane_dequantize(s, approximate, q.h, C.WANE_F32), approximate)
  difference = made(C.wane_binary(s, difference, approximate.h, exact.h, C.WANE_SUB), difference)
  magnitude = made(C.wane_unary(s, magnitude, difference.h, C.WANE_ABS), magnitude)
  local norm = total(exact, C.WANE_NORM2)
  local lost = total(difference, C.WANE_NORM2)
  return {
    rel_frobenius = norm > 0 and lost / norm or lost > 0 and math.huge or 0,
    max_abs = total(magnitude, C.WANE_AMAX),
    mean_abs = total(magnitude, C.WANE_MEAN),
  }
end

--- How far a quantized tensor is from the original. Waits for the values.
-- @param x wane.Tensor the original, any float dtype
-- @param q wane.Tensor its quantized form (or any tensor of the same shape)
-- @return table { rel_frobenius = |q - x| / |x|, max_abs, mean_abs }; all zero for empty tensors
function M.error(x, q)
  local a, b = x:shape(), q:shape()
  local same, empty = #a == #b, false
  for i = 1, #a do same, empty = same and a[i] == b[i], empty or a[i] == 0 end
  if not same then core.raise("quant.error: the shapes differ: [%s] and [%s]", table.concat(a, ", "), table.concat(b, ", ")) end
  if empty then return { rel_frobenius = 0, max_abs = 0, mean_abs = 0 } end
  return core.scope(compare, x, q)
end

--- Quantizes the linear layers of a model in memory; see wane.convert.
-- @param model wane.Module
-- @param scheme string|table
-- @param filter function|nil filter(path, linear) -> true to quantize
-- @return integer how many layers were quantized
function M.convert(model, scheme, filter) return require "wane.convert"(model, scheme, filter) end

return M
