/* avx2_linear.h: what the AVX2 product kernels share. Internal to the avx2_* files of core/linear. */
#ifndef WANE_AVX2_LINEAR_H
#define WANE_AVX2_LINEAR_H
#include "linear.h"
#include <immintrin.h>

#define WANE_INLINE static inline __attribute__((always_inline))

/* Sum of the eight lanes, always in the same order: halves, quarters, pairs. */
WANE_INLINE float avx2_sum(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

/* Eight values of an f32, f16 or bf16 array, widened. `dtype` is a constant where it matters. */
WANE_INLINE __m256 avx2_load(const void *p, int dtype, int64_t i) {
  if (dtype == WANE_F32) return _mm256_loadu_ps((const float *)p + i);
  __m128i h = _mm_loadu_si128((const __m128i *)(const void *)((const char *)p + 2 * i));
  if (dtype == WANE_F16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* Sixty-four values as whole numbers of at most `most` in magnitude: d[i] holds values 8i to 8i + 7. Returns the factor that turns
 * them back. A block holding NaN or infinity gives zeros and a NaN factor: it must show in the product, and cannot be a whole number. */
WANE_INLINE float avx2_quantize64(const void *x, int dtype, int64_t at, int most, __m256i *d) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  __m256 v[8];
  for (int i = 0; i < 8; i++) {
    v[i] = avx2_load(x, dtype, at + 8 * i);
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
  }
  top = _mm256_max_epi32(top, _mm256_permute4x64_epi64(top, 0x4e));
  top = _mm256_max_epi32(top, _mm256_shuffle_epi32(top, 0x4e));
  top = _mm256_max_epi32(top, _mm256_shuffle_epi32(top, 0xb1));
  uint32_t bits = (uint32_t)_mm256_cvtsi256_si32(top);
  float largest = wane_bits_float(bits);
  if (bits >= 0x7f800000u || largest < 1e-35f) {                  /* the reciprocal below must stay finite */
    for (int i = 0; i < 8; i++) d[i] = _mm256_setzero_si256();
    return bits >= 0x7f800000u ? wane_bits_float(0x7fc00000u) : 0.0f;
  }
  __m256 scale = _mm256_set1_ps((float)most / largest);
  for (int i = 0; i < 8; i++) d[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], scale));
  return largest / (float)most;
}

/* out[i] = x[i] as f32, i < n. */
void avx2_widen(const void *x, int dtype, int64_t n, float *out);

/* ---- few rows: any kind, by decoding W a row at a time (avx2_float.c); x prepared as f32 [M][K] ---- */
void avx2_decoded_prepare(const wane_op *op, uint32_t chunk);
void avx2_decoded_rows(const wane_op *op, uint32_t chunk);
/* Fill slots of the op table. */
void avx2_register_decoded(wane_backend *b, int group);
void avx2_register_float(wane_backend *b);
void avx2_register_4bit(wane_backend *b);

/* r[i] = row i of an 8 x 8 block -> r[j] = column j. */
void avx2_transpose(__m256 *r);
/* Stores eight values as f32, f16 or bf16 at element i, rounded once. */
void avx2_store(void *y, int dtype, int64_t i, __m256 v);

/* ---- many rows and backward of any kind, decoded by quant.h (avx2_many.c) ---- */
void avx2_pack(const wane_op *op, uint32_t chunk);
void avx2_many(const wane_op *op, uint32_t chunk);
void avx2_back_pack(const wane_op *op, uint32_t chunk);
void avx2_back(const wane_op *op, uint32_t chunk);
/* 4-bit weights with int16 products where the compute mode allows them (avx2_many16.c), else the same. */
void avx2_pack_4bit(const wane_op *op, uint32_t chunk);
void avx2_many_4bit(const wane_op *op, uint32_t chunk);
/* Fills the four slots of a group with the f32 ones. */
void avx2_register_many(wane_backend *b, int group);
/* Writes a panel's tiles to y: tokens [m, m + tokens), rows [n, n + count) of W; c [groups of 6][6][16]. */
void avx2_write_panel(const wane_linear_args *a, const float *c, int64_t m, int64_t tokens, int64_t n, int64_t count);
#endif
