/* simd8.h: small pieces of eight f32 lanes that the 8-bit and GGUF kernels share (AVX2, FMA, F16C; the levels above include it too). */
#ifndef WANE_SIMD8_H
#define WANE_SIMD8_H
#include <string.h>
#include "../include/wane.h"
#include "../x86/simd.h"

/* How far a decoding loop asks ahead in its one linear stream: the L2 streamer of Intel's server cores stops at 4 KiB pages. */
enum { WANE_PREFETCH_AHEAD = 4096 };

/* All ones in the first `left` lanes. */
static inline __m256i wane_mask8(int64_t left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < 8 ? (int)left : 8), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline float wane_sum8(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

static inline float wane_max8(__m256 v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}

static inline int32_t wane_sum8_i32(__m256i v) {
  __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  a = _mm_add_epi32(a, _mm_unpackhi_epi64(a, a));
  return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 1)));
}

/* Values i … i + 7 of an array of f32, f16 or bf16 as f32; only `left` of them are read, the rest are zeros. */
static inline __m256 wane_load8(const void *x, int dtype, int64_t i, int64_t left) {
  if (dtype == WANE_F32) {
    const float *p = (const float *)x + i;
    return left >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, wane_mask8(left));
  }
  uint16_t part[8] = { 0 };
  const uint16_t *p = (const uint16_t *)x + i;
  if (left < 8) memcpy(part, p, (size_t)left * 2), p = part;
  __m128i h = _mm_loadu_si128((const __m128i *)p);
  return dtype == WANE_F16 ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* Rounds to bf16, ties to even; NaN stays NaN (float16.h). The low half of each lane is the result. */
static inline __m256i wane_bf16x8(__m256 v) {
  __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}

/* Stores the first `left` lanes as values i … of an array of f32, f16 or bf16. */
static inline void wane_store8(void *y, int dtype, int64_t i, int64_t left, __m256 v) {
  if (dtype == WANE_F32) {
    if (left >= 8) _mm256_storeu_ps((float *)y + i, v);
    else _mm256_maskstore_ps((float *)y + i, wane_mask8(left), v);
    return;
  }
  uint16_t part[8];
  __m128i h;
  if (dtype == WANE_F16) h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  else {
    __m256i w = wane_bf16x8(v);
    h = _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  }
  if (left >= 8) {
    _mm_storeu_si128((__m128i *)((uint16_t *)y + i), h);
    return;
  }
  _mm_storeu_si128((__m128i *)part, h);
  memcpy((uint16_t *)y + i, part, (size_t)left * 2);
}
#endif
