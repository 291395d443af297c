/* avx2_elementwise.c: the elementwise kernels compiled for AVX2, FMA and F16C. */
#define WANE_VEC 256
#include "elementwise_kernels.h"
#include "ops.h"

void wane_elementwise_register_avx2(wane_backend *b) {
  register_elementwise(b, "avx2");
}
