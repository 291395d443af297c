--- Do kernels on bf16 tiles (core/x86/tiles.h) serve the instruction-set level in force? They come with AMX, and with AVX512-BF16 where vdpbf16ps pays.
local wane = require "wane"
local core = require "wane.core"
local F = require "wane.nn.functional"
local C = core.C

return function()
  return core.scope(function() return F.linear_nll_fits(F.cast(wane.full({ 32, 32 }, 0), C.WANE_BF16), C.WANE_COMPUTE_BF16) end)
end
