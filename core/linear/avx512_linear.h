/* avx512_linear.h: what the AVX-512 and AMX product kernels share. Internal to those files of core/linear. */
#ifndef WANE_AVX512_LINEAR_H
#define WANE_AVX512_LINEAR_H
#include "avx2_linear.h"
#include "../x86/simd.h"

/* Sum of the sixteen lanes, always in the same order. */
WANE_INLINE float avx512_sum(__m512 v) {
  __m512i u = _mm512_castps_si512(v);
  return avx2_sum(_mm256_add_ps(_mm256_castsi256_ps(_mm512_castsi512_si256(u)), _mm256_castsi256_ps(_mm512_extracti64x4_epi64(u, 1))));
}

/* The scales of W's row n, one per 64 values (per 32 when `halves`): where they lie, or expanded into `buffer`. avx512_4bit.c. */
const float *avx512_row_scales(const wane_qview *w, int64_t n, int halves, float *buffer);

/* Fill slots of the op table. */
void avx512_register_4bit(wane_backend *b);
void avx512_register_many16(wane_backend *b);
#endif
