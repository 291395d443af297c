/* avx2_rows8.c: laying out x for few-row products of 8-bit and GGUF weights (rows8.h), and the loop around their dot products. */
#include <immintrin.h>
#include <math.h>
#include "rows8.h"
#include "simd8.h"

/* ---------------------------------------------------------------- x */

/* One group of 256 (`left` of them exist) as int16; returns the factor of the integers. A group below 2^-100 becomes zeros. */
static float group_i16(const void *x, int dtype, int64_t at, int64_t left, int16_t *out) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 top = _mm256_setzero_ps(), nan = top;
  for (int64_t i = 0; i < 256 && i < left; i += 8) {
    __m256 v = _mm256_andnot_ps(sign, wane_load8(x, dtype, at + i, left - i));
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    top = _mm256_max_ps(v, top);
  }
  float most = wane_max8(top);
  const __m256 step = _mm256_set1_ps(most > 0x1p-100f ? 32767.0f / most : 0);
  for (int64_t i = 0; i < 256; i += 16) {
    __m256i a = _mm256_setzero_si256(), b = a;
    if (i < left) a = _mm256_cvtps_epi32(_mm256_mul_ps(wane_load8(x, dtype, at + i, left - i), step));
    if (i + 8 < left) b = _mm256_cvtps_epi32(_mm256_mul_ps(wane_load8(x, dtype, at + i + 8, left - i - 8), step));
    _mm256_store_si256((__m256i *)(out + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
  }
  return _mm256_movemask_ps(nan) ? NAN : most > 0x1p-100f ? most / 32767.0f : 0;
}

static void group_f32(const void *x, int dtype, int64_t at, int64_t left, float *out) {
  for (int64_t i = 0; i < 256; i += 8)
    _mm256_store_ps(out + i, i < left ? wane_load8(x, dtype, at + i, left - i) : _mm256_setzero_ps());
}

/* A group into GGUF's order (rows8.h), in place: values 0 2 4 … 30, then 1 3 5 … 31 of each 32. */
static void mix_i16(int16_t *x) {
  const __m256i split = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  for (__m256i *p = (__m256i *)x; p < (__m256i *)(x + 256); p += 2) {
    __m256i a = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(p[0], split), 0xd8), b = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(p[1], split), 0xd8);
    p[0] = _mm256_permute2x128_si256(a, b, 0x20);
    p[1] = _mm256_permute2x128_si256(a, b, 0x31);
  }
}

/* The same for f32: values 0 4 … 28, then 1 5 … 29, 2 6 … 30, 3 7 … 31. */
static void mix_f32(float *x) {
  for (__m256 *p = (__m256 *)x; p < (__m256 *)(x + 256); p += 4) {
    __m256 a = _mm256_permute2f128_ps(p[0], p[2], 0x20), b = _mm256_permute2f128_ps(p[0], p[2], 0x31);
    __m256 c = _mm256_permute2f128_ps(p[1], p[3], 0x20), d = _mm256_permute2f128_ps(p[1], p[3], 0x31);
    __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d), ab2 = _mm256_unpackhi_ps(a, b), cd2 = _mm256_unpackhi_ps(c, d);
    p[0] = _mm256_shuffle_ps(ab, cd, 0x44);
    p[1] = _mm256_shuffle_ps(ab, cd, 0xee);
    p[2] = _mm256_shuffle_ps(ab2, cd2, 0x44);
    p[3] = _mm256_shuffle_ps(ab2, cd2, 0xee);
  }
}

/* Sums over the runs of a group: of f32 values, or of integers times their factor. */
static void group_sums(const void *x, int wide, float factor, int run, float *out) {
  for (int i = 0; i < 256; i += run) {
    if (wide) {
      __m256 sum = _mm256_setzero_ps();
      for (int j = i; j < i + run; j += 8) sum = _mm256_add_ps(sum, _mm256_load_ps((const float *)x + j));
      *out++ = wane_sum8(sum);
    } else {
      __m256i sum = _mm256_setzero_si256();
      for (int j = i; j < i + run; j += 16)
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_load_si256((const __m256i *)((const int16_t *)x + j)), _mm256_set1_epi16(1)));
      *out++ = (float)wane_sum8_i32(sum) * factor;
    }
  }
}

/* Group g of row m. */
static void prepare_group(const wane_linear_args *a, const wane_rows8 *r, int64_t m, int64_t g) {
  int64_t at = m * a->K + g * 256, left = a->K - g * 256, to = m * r->stride + g * 256;
  char *work = a->work;
  void *x = work + to * (r->wide ? 4 : 2);
  float factor = 1;
  if (r->wide) group_f32(a->x, a->dtype, at, left, x);
  else ((float *)(work + r->scales))[m * r->groups + g] = factor = group_i16(a->x, a->dtype, at, left, x);
  if (r->run) group_sums(x, r->wide, factor, r->run, (float *)(work + r->sums) + to / r->run);
  if (r->mixed && r->wide) mix_f32(x);
  else if (r->mixed) mix_i16(x);
}

void wane_rows8_prepare_avx2(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_rows8 r = wane_rows8_plan(op->i[14], a.compute, a.M, a.K);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  for (int64_t m = lo; m < hi; m++)
    for (int64_t g = 0; g < r.groups; g++) prepare_group(&a, &r, m, g);
}

/* ---------------------------------------------------------------- the loop */

void wane_rows8_product(const wane_op *op, uint32_t chunk, wane_rows8_dots dots) {
  enum { BLOCK = 16 };
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  wane_rows8 r = wane_rows8_plan(w.dtype, a.compute, a.M, a.K);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.N, 1, &lo, &hi);
  for (int64_t n0 = lo; n0 < hi; n0 += BLOCK)
    for (int64_t m = 0; m < a.M;) {
      int rows = a.M - m >= 4 ? 4 : 1;
      for (int64_t n = n0; n < hi && n < n0 + BLOCK; n++) {
        float y[4], bias = wane_linear_bias(&a, n);
        dots(&w, n, &r, a.work, m, rows, y);
        for (int i = 0; i < rows; i++) wane_float_put(a.y, a.dtype, (m + i) * a.N + n, y[i] + bias);
      }
      m += rows;
    }
}
