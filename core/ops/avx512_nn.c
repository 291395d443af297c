/* avx512_nn.c: the neural network kernels with AVX-512. */
#define WANE_VEC 512
#include "nn_kernels.h"

void wane_nn_register_avx512(wane_backend *b) { nn_kernels_register(b); }
