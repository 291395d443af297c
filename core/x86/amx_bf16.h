/* amx_bf16.h: values on their way into AMX bf16 tiles. A tile is 1 KiB: 16 rows of 32 values. */
#ifndef WANE_AMX_BF16_H
#define WANE_AMX_BF16_H
#include "amx.h"
#include "../base/float16.h"

enum { TILE_BYTES = 1024 };

/* The order that interleaves the words of two registers of 32 values: their halves `half` (0 or 1), a word of each in turn; and, with `second` = 16, of the two
 * halves of one register. For permutex2var_epi16 and permutexvar_epi16. */
static inline __attribute__((always_inline, unused)) __m512i wane_interleave(int half, int second) {
  static const int32_t ramp[16] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
  __m512i i = _mm512_loadu_si512(ramp);
  return _mm512_add_epi32(_mm512_or_si512(i, _mm512_slli_epi32(i, 16)), _mm512_set1_epi32((second + 16 * half) << 16 | 16 * half));
}

/* 32 floats as bf16, rounded to nearest even. */
static inline __attribute__((always_inline, unused)) __m512i to_bf16(__m512 lo, __m512 hi) {
#ifdef WANE_EMULATE
  float f[32];
  uint16_t h[32];
  _mm512_storeu_ps(f, lo);
  _mm512_storeu_ps(f + 16, hi);
  for (int i = 0; i < 32; i++) h[i] = wane_f32_to_bf16(f[i]);
  return _mm512_loadu_si512(h);
#else
  return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
#endif
}

/* 32 values from element `at` on as bf16; zeros beyond the first `left`. */
static inline __attribute__((always_inline, unused)) __m512i load_bf16(const void *x, int dtype, int64_t at, int64_t left) {
  if (left < 32) {
    uint16_t h[32] = { 0 };
    for (int64_t i = 0; i < left; i++) h[i] = dtype == WANE_BF16 ? ((const uint16_t *)x)[at + i] : wane_f32_to_bf16(wane_float_at(x, dtype, at + i));
    return _mm512_loadu_si512(h);
  }
  if (dtype == WANE_BF16) return _mm512_loadu_si512((const uint16_t *)x + at);
  if (dtype == WANE_F32) return to_bf16(_mm512_loadu_ps((const float *)x + at), _mm512_loadu_ps((const float *)x + at + 16));
  const __m256i *h = (const __m256i *)(const void *)((const uint16_t *)x + at);
  return to_bf16(_mm512_cvtph_ps(_mm256_loadu_si256(h)), _mm512_cvtph_ps(_mm256_loadu_si256(h + 1)));
}
#endif
