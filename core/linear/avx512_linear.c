/* avx512_linear.c: the AVX-512 level's slots of matrix products; what it does not fill stays with the AVX2 level's kernels. */
#include "avx512_linear.h"

void wane_linear_register_avx512(wane_backend *b) {
  avx512_register_4bit(b);
  avx512_register_many16(b);
}
