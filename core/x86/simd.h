/* simd.h: the intrinsics. Normally <immintrin.h>; under WANE_EMULATE (tests on a CPU without AVX-512 or AMX) SIMDe's portable
 * versions, so that the same kernel sources can be compiled and checked there. Kernels of the avx512, avx512bf16 and amx
 * groups include this and nothing else. */
#ifndef WANE_SIMD_H
#define WANE_SIMD_H
#ifdef WANE_EMULATE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

/* ---- what SIMDe 0.7.4 lacks, out of native 256-bit halves (functions, so that a later SIMDe's macros win) ---- */
static inline __attribute__((unused)) __m512i wane_join(__m256i lo, __m256i hi) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}
#define WANE_LOW(v) _mm512_extracti64x4_epi64(v, 0)
#define WANE_HIGH(v) _mm512_extracti64x4_epi64(v, 1)
#ifndef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(v) wane_cvtepi32_ps(v)
static inline __attribute__((unused)) __m512 wane_cvtepi32_ps(__m512i v) {
  __m256 lo = _mm256_cvtepi32_ps(WANE_LOW(v)), hi = _mm256_cvtepi32_ps(WANE_HIGH(v));
  return _mm512_castsi512_ps(wane_join(_mm256_castps_si256(lo), _mm256_castps_si256(hi)));
}
#endif
#ifndef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32(v) wane_cvtps_epi32(v)
static inline __attribute__((unused)) __m512i wane_cvtps_epi32(__m512 v) {
  __m512i u = _mm512_castps_si512(v);
  return wane_join(_mm256_cvtps_epi32(_mm256_castsi256_ps(WANE_LOW(u))), _mm256_cvtps_epi32(_mm256_castsi256_ps(WANE_HIGH(u))));
}
#endif
#ifndef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, imm8) simde_mm512_shuffle_f32x4(a, b, imm8)
#endif
#ifndef _mm512_srai_epi32
#define _mm512_srai_epi32(v, k) wane_join(_mm256_srai_epi32(WANE_LOW(v), k), _mm256_srai_epi32(WANE_HIGH(v), k))
#endif
#ifndef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32(v, order) wane_join(_mm256_shuffle_epi32(WANE_LOW(v), order), _mm256_shuffle_epi32(WANE_HIGH(v), order))
#endif
#ifndef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(v) wane_cvtepu16_epi32(v)
static inline __attribute__((unused)) __m512i wane_cvtepu16_epi32(__m256i v) {
  return wane_join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
#endif
#ifndef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(v) wane_cvtepi32_epi16(v)
static inline __attribute__((unused)) __m256i wane_cvtepi32_epi16(__m512i v) {
  __m256i mask = _mm256_set1_epi32(0xffff);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(WANE_LOW(v), mask), _mm256_and_si256(WANE_HIGH(v), mask)), 0xd8);
}
#endif
#ifndef _mm512_cvtph_ps
#define _mm512_cvtph_ps(v) wane_cvtph_ps(v)
static inline __attribute__((unused)) __m512 wane_cvtph_ps(__m256i v) {
  __m256 lo = _mm256_cvtph_ps(_mm256_castsi256_si128(v)), hi = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
  return _mm512_castsi512_ps(wane_join(_mm256_castps_si256(lo), _mm256_castps_si256(hi)));
}
#endif
#ifndef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) wane_cvtps_ph(v)
static inline __attribute__((unused)) __m256i wane_cvtps_ph(__m512 v) {
  __m512i u = _mm512_castps_si512(v);
  __m128i lo = _mm256_cvtps_ph(_mm256_castsi256_ps(WANE_LOW(u)), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lo), _mm256_cvtps_ph(_mm256_castsi256_ps(WANE_HIGH(u)), _MM_FROUND_TO_NEAREST_INT), 1);
}
#endif
#ifndef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(k, p) wane_maskz_loadu_ps(k, p)
static inline __attribute__((unused)) __m512 wane_maskz_loadu_ps(__mmask16 k, const void *p) {
  float x[16] = { 0 };
  for (int i = 0; i < 16; i++) if (k >> i & 1) __builtin_memcpy(&x[i], (const char *)p + 4 * i, 4);
  return _mm512_loadu_ps(x);
}
#endif
#ifndef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps(p, k, v) wane_mask_storeu_ps(p, k, v)
static inline __attribute__((unused)) void wane_mask_storeu_ps(void *p, __mmask16 k, __m512 v) {
  float x[16];
  _mm512_storeu_ps(x, v);
  for (int i = 0; i < 16; i++) if (k >> i & 1) __builtin_memcpy((char *)p + 4 * i, &x[i], 4);
}
#endif
#ifndef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32(v) wane_cvtepu8_epi32(v)
static inline __attribute__((unused)) __m512i wane_cvtepu8_epi32(__m128i v) {
  return wane_join(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
#endif
#ifndef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8(v) wane_cvtepi32_epi8(v)
static inline __attribute__((unused)) __m128i wane_cvtepi32_epi8(__m512i v) {
  __m256i w = _mm256_and_si256(_mm512_cvtepi32_epi16(v), _mm256_set1_epi16(255));
  return _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}
#endif
#ifndef _mm512_i32gather_epi32
#define _mm512_i32gather_epi32(i, p, scale) \
  wane_join(_mm256_i32gather_epi32((const int *)(p), WANE_LOW(i), scale), _mm256_i32gather_epi32((const int *)(p), WANE_HIGH(i), scale))
#endif
#ifndef _mm512_i32gather_ps
#define _mm512_i32gather_ps(i, p, scale) _mm512_castsi512_ps(_mm512_i32gather_epi32(i, p, scale))
#endif
#ifndef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32(v) wane_reduce_max_epu32(v)
static inline __attribute__((unused)) uint32_t wane_reduce_max_epu32(__m512i v) {
  __m256i h = _mm256_max_epu32(WANE_LOW(v), WANE_HIGH(v));
  uint32_t x[8], most = 0;
  _mm256_storeu_si256((__m256i *)x, h);
  for (int i = 0; i < 8; i++) if (x[i] > most) most = x[i];
  return most;
}
#endif
#else
#include <immintrin.h>
#endif
#endif
