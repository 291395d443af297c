/* avx2_lora.c: the low-rank products with AVX2, FMA and F16C. */
#define WANE_VEC 256
#include "lora_kernels.h"

void wane_lora_register_avx2(wane_backend *b) { lora_register(b); }
