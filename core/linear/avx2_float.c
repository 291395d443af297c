/* avx2_float.c: few rows of x times f32, f16 or bf16 weights with AVX2: one stream of weights a thread, f32 products and sums.
 * Any other kind goes the same way once quant.h has decoded a row to f32; its own kernel may be faster. */
#include "avx2_linear.h"

void avx2_widen(const void *x, int dtype, int64_t n, float *out) {
  int64_t i = 0;
  if (dtype == WANE_F32) { memcpy(out, x, (size_t)n * 4); return; }
  if (dtype == WANE_F16) for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, avx2_load(x, WANE_F16, i));
  else for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, avx2_load(x, WANE_BF16, i));
  for (; i < n; i++) out[i] = wane_float_at(x, dtype, i);
}

/* One row of weights against R rows of x. Two sums a row of x hide half of the latency of an addition, and four rows the rest. */
WANE_INLINE void dot(const void *w, const int dtype, const float *x, int64_t stride, const int R, int64_t n, float *out) {
  enum { AHEAD = 1024 };                                  /* values of prefetch: see avx2_4bit.c */
  __m256 even[4], odd[4];
  int64_t i = 0;
  for (int m = 0; m < R; m++) even[m] = odd[m] = _mm256_setzero_ps();
  for (; i + 16 <= n; i += 16) {
    __m256 a = avx2_load(w, dtype, i), b = avx2_load(w, dtype, i + 8);
    _mm_prefetch((const char *)w + (i + AHEAD) * (dtype == WANE_F32 ? 4 : 2), _MM_HINT_T0);
    for (int m = 0; m < R; m++) {
      even[m] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + m * stride + i), even[m]);
      odd[m] = _mm256_fmadd_ps(b, _mm256_loadu_ps(x + m * stride + i + 8), odd[m]);
    }
  }
  if (i + 8 <= n) {
    __m256 a = avx2_load(w, dtype, i);
    for (int m = 0; m < R; m++) even[m] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + m * stride + i), even[m]);
    i += 8;
  }
  for (int m = 0; m < R; m++) {
    float sum = avx2_sum(_mm256_add_ps(even[m], odd[m]));
    for (int64_t k = i; k < n; k++) sum += wane_float_at(w, dtype, k) * x[m * stride + k];
    out[m] = sum;
  }
}

/* Any number of rows of x, four at a time. */
WANE_INLINE void dots(const void *w, const int dtype, const float *x, int64_t stride, int64_t rows, int64_t n, float *out) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) dot(w, dtype, x + m * stride, stride, 4, n, out + m);
  switch (rows - m) {
    case 3: dot(w, dtype, x + m * stride, stride, 3, n, out + m); break;
    case 2: dot(w, dtype, x + m * stride, stride, 2, n, out + m); break;
    case 1: dot(w, dtype, x + m * stride, stride, 1, n, out + m); break;
    default: break;
  }
}

/* x as f32 [M, K]. */
void avx2_decoded_prepare(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  avx2_widen((const char *)a.x + lo * a.K * (a.dtype == WANE_F32 ? 4 : 2), a.dtype, (hi - lo) * a.K, (float *)a.work + lo * a.K);
}

WANE_INLINE void all_rows(const wane_linear_args *a, const void *codes, const int dtype, int64_t lo, int64_t hi) {
  float *sum = wane_scratch();                            // [M]
  for (int64_t n = lo; n < hi; n++) {
    dots((const char *)codes + n * a->K * (dtype == WANE_F32 ? 4 : 2), dtype, a->work, a->K, a->M, a->K, sum);
    for (int64_t m = 0; m < a->M; m++) wane_float_put(a->y, a->dtype, m * a->N + n, sum[m] + wane_linear_bias(a, n));
  }
}

static void rows(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.N, 1, &lo, &hi);
  if (w.dtype == WANE_F32) all_rows(&a, w.codes, WANE_F32, lo, hi);
  else if (w.dtype == WANE_F16) all_rows(&a, w.codes, WANE_F16, lo, hi);
  else all_rows(&a, w.codes, WANE_BF16, lo, hi);
}

void avx2_decoded_rows(const wane_op *op, uint32_t chunk) {
  enum { PIECE = 8192 };
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  float *row = wane_scratch(), *sum = row + PIECE, *part = sum + WANE_LINEAR_SLICE;
  const float *x = a.work;
  int64_t lo, hi;
  wane_op_range(op, chunk, a.N, 1, &lo, &hi);
  for (int64_t n = lo; n < hi; n++) {
    memset(sum, 0, (size_t)a.M * 4);
    for (int64_t k = 0; k < a.K; k += PIECE) {
      int64_t count = a.K - k < PIECE ? a.K - k : PIECE;
      kit->dequantize(&w, n * a.K + k, count, row);
      dots(row, WANE_F32, x + k, a.K, a.M, count, part);
      for (int64_t m = 0; m < a.M; m++) sum[m] += part[m];
    }
    for (int64_t m = 0; m < a.M; m++) wane_float_put(a.y, a.dtype, m * a.N + n, sum[m] + wane_linear_bias(&a, n));
  }
}

void avx2_register_decoded(wane_backend *b, int group) {
  b->ops[WANE_OP_LINEAR_PREPARE + group] = avx2_decoded_prepare;
  b->ops[WANE_OP_LINEAR_ROWS + group] = avx2_decoded_rows;
}

void avx2_register_float(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_FLOAT] = avx2_decoded_prepare;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_FLOAT] = rows;
}
