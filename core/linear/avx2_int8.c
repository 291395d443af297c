/* avx2_int8.c: LLM.int8() with AVX2. x's codes are kept as int16, weight bytes are sign-extended where they are used, and pmaddwd
 * sums pairs exactly: pmaddubsw would need a sign split per (row, weight) and, on 127 * 127 * 2, has only 509 to spare before it
 * saturates. Weights are read as they lie, so decode is one linear stream and prefill needs no panels; a tile of 4 rows of x by 2
 * rows of W keeps eight sums in registers. Same integers and same roundings as int8.c. */
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "int8.h"
#include "simd8.h"

/* ---------------------------------------------------------------- prepare */

/* x rounded to f16 and back; values beyond f16's range stay (int8.c's `rounded`). NaN stays NaN. */
static inline __m256 rounded8(__m256 x) {
  __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  __m256 half = _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  return _mm256_blendv_ps(half, x, _mm256_cmp_ps(size, _mm256_set1_ps(65520.0f), _CMP_GE_OQ));
}

static inline __m256 size8(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

/* Flags of the columns [lo, hi), like int8.c's find_columns. */
static void find_columns(const wane_linear_args *a, int64_t lo, int64_t hi, uint8_t *flags) {
  const __m256 limit = _mm256_set1_ps(a->threshold);
  for (int64_t k = lo; k < hi; k += 32) {
    __m256 any[4] = { _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps() };
    int parts = hi - k >= 32 ? 4 : (int)((hi - k + 7) / 8);
    for (int64_t m = 0; m < a->M; m++)
      for (int j = 0; j < parts; j++) {
        int64_t at = k + 8 * j;
        any[j] = _mm256_or_ps(any[j], _mm256_cmp_ps(size8(rounded8(wane_load8(a->x, a->dtype, m * a->K + at, a->K - at))), limit, _CMP_GE_OQ));
      }
    for (int j = 0; j < parts; j++) {
      int bits = _mm256_movemask_ps(any[j]);
      for (int i = 0; i < 8 && k + 8 * j + i < hi; i++) flags[k + 8 * j + i] = bits >> i & 1;
    }
  }
}

/* Largest |x| of row m that is no outlier; NaN if there is a NaN. *most never is. */
static float row_scale(const wane_linear_args *a, int64_t m, float *most) {
  const __m256 limit = _mm256_set1_ps(a->threshold > 0 ? a->threshold : NAN);  /* nothing is >= NaN */
  __m256 top = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
  for (int64_t k = 0; k < a->K; k += 8) {
    __m256 v = size8(rounded8(wane_load8(a->x, a->dtype, m * a->K + k, a->K - k)));
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    top = _mm256_max_ps(_mm256_andnot_ps(_mm256_cmp_ps(v, limit, _CMP_GE_OQ), v), top);  /* the second operand wins over NaN */
  }
  *most = wane_max8(top);
  return _mm256_movemask_ps(nan) ? NAN : *most;
}

/* Row m as codes; flags: columns to clear, or NULL. */
static void quantize_row(const wane_linear_args *a, int64_t m, int64_t stride, const uint8_t *flags, int16_t *codes, float *scale, int32_t *sum) {
  float most;
  *scale = row_scale(a, m, &most);
  const __m256 vtop = _mm256_set1_ps(most), vstep = _mm256_set1_ps(most > 0 ? 127.0f / most : 0), inf = _mm256_set1_ps(INFINITY);
  __m256i total = _mm256_setzero_si256();
  for (int64_t k = 0; k < stride; k += 8) {
    __m256i q = _mm256_setzero_si256();
    if (k < a->K) {
      __m256 v = rounded8(wane_load8(a->x, a->dtype, m * a->K + k, a->K - k)), size = size8(v);
      __m256 keep = _mm256_and_ps(_mm256_cmp_ps(size, vtop, _CMP_LE_OQ), _mm256_cmp_ps(size, inf, _CMP_LT_OQ));
      q = _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(v, vstep)), _mm256_castps_si256(keep));
      if (flags) {
        uint64_t eight = 0;
        memcpy(&eight, flags + k, (size_t)(a->K - k < 8 ? a->K - k : 8));
        q = _mm256_and_si256(q, _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)eight)), _mm256_setzero_si256()));
      }
    }
    total = _mm256_add_epi32(total, q);
    _mm_storeu_si128((__m128i *)(codes + k), _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
  }
  *sum = wane_sum8_i32(total);
}

static void scan(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_int8_layout l = wane_int8_plan(a.M, a.K);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.K, 64, &lo, &hi);
  if (a.threshold > 0 && lo < hi) find_columns(&a, lo, hi, (uint8_t *)a.work + l.flags);
}

void wane_int8_begin_avx2(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_int8_layout l = wane_int8_plan(a.M, a.K);
  char *work = a.work;
  int64_t none = 0;
  if (a.threshold > 0 && op->i[WANE_LINEAR_ALONE]) find_columns(&a, 0, a.K, (uint8_t *)work + l.flags);
  if (chunk) return;
  if (a.threshold > 0) wane_int8_columns((uint8_t *)work + l.flags, a.K, (int32_t *)(work + l.columns), (int64_t *)(work + l.count));
  else memcpy(work + l.count, &none, sizeof none);
}

static void quantize(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_int8_layout l = wane_int8_plan(a.M, a.K);
  char *work = a.work;
  const uint8_t *flags = a.threshold > 0 && !op->i[WANE_LINEAR_BY_ROW] ? (uint8_t *)work + l.flags : NULL;
  int64_t lo, hi;
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  wane_int8_begin_avx2(op, chunk);
  for (int64_t m = lo; m < hi; m++)
    quantize_row(&a, m, l.stride, flags, (int16_t *)(work + l.codes) + m * l.stride, (float *)(work + l.scale) + m, (int32_t *)(work + l.sum) + m);
}

/* ---------------------------------------------------------------- product */

static inline __m256i widen16(const int8_t *w) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)); }

/* A row's last K % 16 weights, zeros after them: the bytes beyond may belong to nobody. */
static inline __m256i widen_tail(const int8_t *w, int64_t left) {
  int8_t bytes[16] = { 0 };
  memcpy(bytes, w, (size_t)left);
  return widen16(bytes);
}

/* Sixteen values of k of a tile. */
static inline __attribute__((always_inline)) void step(const int MR, const int NR, const int16_t *x, int64_t stride, const __m256i *wv, __m256i (*sum)[2]) {
  for (int i = 0; i < MR; i++) {
    __m256i xv = _mm256_loadu_si256((const __m256i *)(x + i * stride));
    for (int j = 0; j < NR; j++) sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(wv[j], xv));
  }
}

/* Sums of MR rows of x with NR rows of W. c: [MR][WANE_INT8_ROWS]. */
static inline __attribute__((always_inline)) void tile(const int MR, const int NR, const int16_t *x, int64_t stride, const int8_t *w, int64_t K, int32_t *c) {
  __m256i sum[4][2];
  int64_t whole = K & ~(int64_t)15;
  for (int i = 0; i < MR; i++) for (int j = 0; j < NR; j++) sum[i][j] = _mm256_setzero_si256();
  for (int64_t k = 0; k < whole; k += 16) {
    __m256i wv[2];
    for (int j = 0; j < NR; j++) wv[j] = widen16(w + j * K + k);
    step(MR, NR, x + k, stride, wv, sum);
  }
  if (whole < K) {
    __m256i wv[2];
    for (int j = 0; j < NR; j++) wv[j] = widen_tail(w + j * K + whole, K - whole);
    step(MR, NR, x + whole, stride, wv, sum);
  }
  for (int i = 0; i < MR; i++) for (int j = 0; j < NR; j++) c[i * WANE_INT8_ROWS + j] = wane_sum8_i32(sum[i][j]);
}

/* One row of x with one row of W: decode. Four sums, and the next page asked for: a multiplying loop hides no page switch. */
static int32_t dot(const int16_t *x, const int8_t *w, int64_t K) {
  __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) {
    _mm_prefetch((const char *)(w + k + WANE_PREFETCH_AHEAD), _MM_HINT_T0);
    s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(widen16(w + k), _mm256_loadu_si256((const __m256i *)(x + k))));
    s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(widen16(w + k + 16), _mm256_loadu_si256((const __m256i *)(x + k + 16))));
    s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(widen16(w + k + 32), _mm256_loadu_si256((const __m256i *)(x + k + 32))));
    s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(widen16(w + k + 48), _mm256_loadu_si256((const __m256i *)(x + k + 48))));
  }
  for (; k < K; k += 16) {
    __m256i wv = K - k >= 16 ? widen16(w + k) : widen_tail(w + k, K - k);
    s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(wv, _mm256_loadu_si256((const __m256i *)(x + k))));
  }
  return wane_sum8_i32(_mm256_add_epi32(_mm256_add_epi32(s0, s1), _mm256_add_epi32(s2, s3)));
}

static void multiply(const wane_int8_layout *l, const char *work, int64_t m, int mr, const void *weight, int64_t K, int64_t nb, int32_t *c) {
  const int16_t *x = (const int16_t *)(work + l->codes) + m * l->stride;
  const int8_t *w = weight;
  int64_t S = l->stride, j = 0;
  if (mr == 1) {
    for (; j < nb; j++) c[j] = dot(x, w + j * K, K);
    return;
  }
  for (; j + 2 <= nb; j += 2) {
    if (mr == 4) tile(4, 2, x, S, w + j * K, K, c + j);
    else if (mr == 3) tile(3, 2, x, S, w + j * K, K, c + j);
    else tile(2, 2, x, S, w + j * K, K, c + j);
  }
  for (; j < nb; j++)
    for (int i = 0; i < mr; i++) tile(1, 1, x + i * S, S, w + j * K, K, c + i * WANE_INT8_ROWS + j);
}

void wane_int8_gather_avx2(const int8_t *w, int64_t K, int64_t nb, const int32_t *columns, int64_t count, float *out) {
  for (int64_t o = 0; o < count; o++) {
    const int8_t *column = w + columns[o];
    float *to = out + o * WANE_INT8_ROWS;
    for (int64_t j = 0; j < nb; j++) to[j] = column[j * K];
  }
}

/* Lanes run over weight rows, rounded up to eight: the buffers have room. */
static void outliers(const float *x, int64_t count, const float *wo, int64_t nb, float *acc) {
  for (int64_t j = 0; j < nb; j += 8) {
    __m256 sum = _mm256_loadu_ps(acc + j);
    for (int64_t o = 0; o < count; o++)
      sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_broadcast_ss(x + o), _mm256_loadu_ps(wo + o * WANE_INT8_ROWS + j)));
    _mm256_storeu_ps(acc + j, sum);
  }
}

static void finish(const int32_t *c, float sca, const float *acc, const float *scb, const void *bias, int bias_dtype, int64_t nb, void *y, int y_dtype) {
  const __m256 s = _mm256_set1_ps(sca);
  for (int64_t j = 0; j < nb; j += 8) {
    int64_t left = nb - j;
    __m256 scale = wane_load8(scb, WANE_F32, j, left);
    __m256 r = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(c + j))), s),
                             _mm256_mul_ps(scale, _mm256_set1_ps(1.0f / 16129.0f)));
    if (bias) r = _mm256_add_ps(r, wane_load8(bias, bias_dtype, j, left));
    if (acc) r = _mm256_add_ps(r, _mm256_mul_ps(_mm256_loadu_ps(acc + j), _mm256_mul_ps(scale, _mm256_set1_ps(1.0f / 127.0f))));
    wane_store8(y, y_dtype, j, left, r);
  }
}

static void product(const wane_op *op, uint32_t chunk) {
  static const wane_int8_kit kit = { 4, NULL, multiply, wane_int8_gather_avx2, outliers, finish };
  wane_int8_product(op, chunk, &kit);
}

void wane_int8_register_avx2(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_SCAN + WANE_GROUP_LLM_INT8] = scan;
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_LLM_INT8] = b->ops[WANE_OP_LINEAR_PACK + WANE_GROUP_LLM_INT8] = quantize;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_LLM_INT8] = b->ops[WANE_OP_LINEAR_MANY + WANE_GROUP_LLM_INT8] = product;
}
