/* avx512_linear.h: what the AVX-512, AVX512-BF16 and AMX product kernels share. Internal to those files of core/linear. */
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

/* ---- many rows and backward of any kind, decoded by quant.h (avx512_many.c, many.h) ---- */
void avx512_pack(const wane_op *op, uint32_t chunk);
void avx512_many(const wane_op *op, uint32_t chunk);
void avx512_back_pack(const wane_op *op, uint32_t chunk);
void avx512_back(const wane_op *op, uint32_t chunk);
/* Fills the four slots of a group with these. */
void avx512_register_many(wane_backend *b, int group);
/* Writes a panel's tiles to y: tokens [m, m + tokens), rows [n, n + count) of W; c [groups of 12][12][32]. */
void avx512_write_panel(const wane_linear_args *a, const float *c, int64_t m, int64_t tokens, int64_t n, int64_t count);

/* Fill slots of the op table. */
void avx512_register_4bit(wane_backend *b);
void avx512_register_many16(wane_backend *b);
#endif
