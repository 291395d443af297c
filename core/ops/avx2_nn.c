/* avx2_nn.c: the neural network kernels with AVX2, FMA and F16C. */
#define WANE_VEC 256
#include "nn_kernels.h"

void wane_nn_register_avx2(wane_backend *b) { nn_kernels_register(b); }
