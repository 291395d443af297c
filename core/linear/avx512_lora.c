/* avx512_lora.c: the low-rank products with AVX-512. */
#define WANE_VEC 512
#include "lora_kernels.h"

void wane_lora_register_avx512(wane_backend *b) { lora_register(b); }
