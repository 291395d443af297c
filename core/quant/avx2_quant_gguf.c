/* avx2_quant_gguf.c: the decoder of GGUF blocks, vectorized by the compiler. */
#include "gguf_blocks.h"
#include "kernels.h"

void wane_gguf_range_avx2(int dtype, const uint8_t *blocks, int64_t first, int64_t count, float *out) {
  switch (dtype) { /* a constant kind in each call, so that each gets loops of its own */
#define KIND(K) case K: gguf_decode_range(K, blocks, first, count, out); break;
    KIND(WANE_Q4_0) KIND(WANE_Q4_1) KIND(WANE_Q5_0) KIND(WANE_Q5_1) KIND(WANE_Q8_0)
    KIND(WANE_Q2_K) KIND(WANE_Q3_K) KIND(WANE_Q4_K) KIND(WANE_Q5_K) KIND(WANE_Q6_K)
    KIND(WANE_IQ4_NL) KIND(WANE_IQ4_XS) KIND(WANE_MXFP4) KIND(WANE_NVFP4) KIND(WANE_TQ1_0) KIND(WANE_TQ2_0)
    KIND(WANE_IQ1_S) KIND(WANE_IQ1_M) KIND(WANE_IQ2_XXS) KIND(WANE_IQ2_XS) KIND(WANE_IQ2_S) KIND(WANE_IQ3_XXS) KIND(WANE_IQ3_S)
#undef KIND
  }
}
