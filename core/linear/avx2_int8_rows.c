/* avx2_int8_rows.c: few rows of x times row-quantized int8 weights without quantizing x (weight-only): the exact dequantized product
 * with WANE_COMPUTE_F32, x as int16 otherwise. The row's scale is applied once, at the end. */
#include "rows8.h"
#include "simd8.h"

#define INLINE static inline __attribute__((always_inline))

/* acc[i] += 256 weights times MR rows of x. A lane's sum of 32 products fits: 32 * 127 * 32767 < 2^31. */
INLINE void group_i16(const int MR, const int8_t *w, const int16_t *x, int64_t stride, const float *factor, int64_t groups, __m256 *acc) {
  __m256i sum[4];
  for (int i = 0; i < MR; i++) sum[i] = _mm256_setzero_si256();
  for (int k = 0; k < 256; k += 16) {
    __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + k)));
    for (int i = 0; i < MR; i++) sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(v, _mm256_load_si256((const __m256i *)(x + i * stride + k))));
  }
  for (int i = 0; i < MR; i++) acc[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i]), _mm256_broadcast_ss(factor + i * groups), acc[i]);
}

/* Two sums a row of x: one chain of additions would be the limit. */
INLINE void group_f32(const int MR, const int8_t *w, const float *x, int64_t stride, __m256 *acc, __m256 *odd) {
  for (int k = 0; k < 256; k += 16) {
    __m256 a = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + k))));
    __m256 b = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + k + 8))));
    for (int i = 0; i < MR; i++) {
      acc[i] = _mm256_fmadd_ps(a, _mm256_load_ps(x + i * stride + k), acc[i]);
      odd[i] = _mm256_fmadd_ps(b, _mm256_load_ps(x + i * stride + k + 8), odd[i]);
    }
  }
}

INLINE void row_dots(const int WIDE, const int MR, const int8_t *w, int64_t K, float scale, const wane_rows8 *r, const char *work, int64_t m, float *out) {
  __m256 acc[4], odd[4];
  int8_t last[256];
  for (int i = 0; i < MR; i++) acc[i] = odd[i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < r->groups; g++, w += 256, K -= 256) {
    for (int ahead = 0; ahead < 256; ahead += 64) _mm_prefetch((const char *)w + WANE_PREFETCH_AHEAD + ahead, _MM_HINT_T0);
    const int8_t *group = w;
    if (K < 256) {                                     /* what follows the row may belong to nobody */
      memset(last, 0, sizeof last);
      group = memcpy(last, w, (size_t)K);
    }
    int64_t at = m * r->stride + g * 256;
    const float *factor = (const float *)(work + r->scales) + m * r->groups + g;
    if (WIDE) group_f32(MR, group, (const float *)work + at, r->stride, acc, odd);
    else group_i16(MR, group, (const int16_t *)work + at, r->stride, factor, r->groups, acc);
  }
  for (int i = 0; i < MR; i++) out[i] = wane_sum8(_mm256_add_ps(acc[i], odd[i])) * scale;
}

static void int8_dots(const wane_qview *w, int64_t n, const wane_rows8 *r, const char *work, int64_t m, int rows, float *out) {
  float scale = ((const float *)w->absmax)[n] * (1.0f / 127.0f);
  const int8_t *row = (const int8_t *)w->codes + n * w->cols;
  if (r->wide && rows == 4) row_dots(1, 4, row, w->cols, scale, r, work, m, out);
  else if (r->wide) row_dots(1, 1, row, w->cols, scale, r, work, m, out);
  else if (rows == 4) row_dots(0, 4, row, w->cols, scale, r, work, m, out);
  else row_dots(0, 1, row, w->cols, scale, r, work, m, out);
}

static void product(const wane_op *op, uint32_t chunk) { wane_rows8_product(op, chunk, int8_dots); }

void wane_int8_rows_register_avx2(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_INT8] = wane_rows8_prepare_avx2;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_INT8] = product;
}
