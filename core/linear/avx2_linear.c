/* avx2_linear.c: the AVX2 level's slots of matrix products. Every group gets many rows and backward through quant.h's decoders, and few
 * rows through decoded rows; what has a faster way replaces its slots. */
#include "avx2_linear.h"

void wane_linear_register_avx2(wane_backend *b) {
  for (int group = 0; group < WANE_GROUPS; group++) {
    if (!b->ops[WANE_OP_LINEAR_MANY + group] || group == WANE_GROUP_LLM_INT8) continue;
    avx2_register_many(b, group);
    avx2_register_decoded(b, group);
  }
  avx2_register_float(b);
  avx2_register_4bit(b);
}
