/* avx512bf16_nn.c: the neural network kernels with AVX-512, whose rounding to bf16 is an instruction (which takes subnormal numbers for zero). */
#define WANE_VEC 512
#define WANE_VEC_BF16
#include "nn_kernels.h"

void wane_nn_register_avx512bf16(wane_backend *b) { nn_kernels_register(b); }
