/* avx512_linear.c: the AVX-512 level's slots of matrix products; what it does not fill stays with the AVX2 level's kernels. */
#include "avx512_linear.h"

void wane_linear_register_avx512(wane_backend *b) {
  for (int group = 0; group < WANE_GROUPS; group++)
    if (b->ops[WANE_OP_LINEAR_BACK + group]) avx512_register_many(b, group);  /* LLM_INT8 has products of its own, and no backward */
  avx512_register_4bit(b);
  avx512_register_many16(b);
}
