/* avx512bf16_lora.c: the low-rank products with AVX-512, whose rounding to bf16 is an instruction. */
#define WANE_VEC 512
#define WANE_VEC_BF16
#include "lora_kernels.h"

void wane_lora_register_avx512bf16(wane_backend *b) { lora_register(b); }
