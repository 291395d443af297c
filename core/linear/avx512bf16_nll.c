/* avx512bf16_nll.c: tiles_nll.h with vdpbf16ps. */
#include "tiles_nll.h"

void wane_linear_nll_register_avx512bf16(wane_backend *b) { tiles_register(b); }
