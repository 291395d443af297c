/* avx512bf16_tiles_lora.c: tiles_lora.h with vdpbf16ps. */
#include "tiles_lora.h"

void wane_lora_register_tiles_avx512bf16(wane_backend *b) { tiles_register(b); }
