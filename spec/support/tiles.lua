--- Do kernels on bf16 tiles (core/x86/tiles.h) serve the instruction-set level in force? They come with AMX, and with AVX512-BF16 where vdpbf16ps pays.
local core = require "wane.core"
local F = require "wane.nn.functional"

return function()
  local has
  core.scope(function()
    local wane = require "wane"
    has = F.linear_nll_fits(F.cast(wane.full({ 32, 32 }, 0), core.C.WANE_BF16), core.C.WANE_COMPUTE_BF16)
  end)
  return has
end
