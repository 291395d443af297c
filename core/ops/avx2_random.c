/* avx2_random.c: arange and random numbers compiled for AVX2: the same bits, sooner. */
#include "random_kernels.h"
#include "ops.h"

void wane_random_register_avx2(wane_backend *b) { register_random(b, "avx2"); }
