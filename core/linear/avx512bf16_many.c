/* avx512bf16_many.c: tiles_many.h with vdpbf16ps. */
#include "tiles_many.h"

void wane_linear_register_avx512bf16(wane_backend *b) { tiles_register(b); }
