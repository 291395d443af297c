/* avx2_reduce.c: the reductions compiled for AVX2; the same additions in the same order. */
#include "reduce_kernels.h"
#include "ops.h"

void wane_reduce_register_avx2(wane_backend *b) { register_reduce(b, "avx2"); }
