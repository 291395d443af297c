/* avx512bf16_attention.c: tiles_attention.h with vdpbf16ps. */
#include "tiles_attention.h"

void wane_attention_register_avx512bf16(wane_backend *b) { tiles_register(b); }
