/* avx2_matmul.c: the matrix product with AVX2 and FMA. */
#define WANE_VEC 256
#include "matmul_kernels.h"
#include "ops.h"

void wane_matmul_register_avx2(wane_backend *b) { register_matmul(b, "avx2"); }
