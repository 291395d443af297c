/* avx2_many.c: many rows of x times a weight of any kind, and the backward, with AVX2 and f32 products.
 *
 * One register tile does both: C [6][16] += A [6][k] (each value broadcast) times B [k][16] (two registers).
 *   forward   A = six decoded rows of W, B = sixteen tokens of x packed side by side: W's rows need no shuffling, C is y transposed
 *   backward  A = six rows of dy, B = sixteen columns of decoded rows of W: C is dx
 * The contraction is cut in steps of STEP, so that a B panel (16 KiB) stays in the first-level cache while all A rows of a block pass
 * by, and A and the C tiles wait in the second level. Each element of C is one chain of fused additions in rising k: it does not depend
 * on how many rows there are, nor on where a tile begins. */
#include "avx2_linear.h"

enum { TILE_M = 6, TILE_N = 16, TILE = TILE_M * TILE_N, STEP = 256, BLOCK_ROWS = 48, BLOCK_COLUMNS = 64 };

/* c [6][16] (+)= a [6][k], rows lda apart, times b [k][16]. */
static void multiply_tile(const float *a, int64_t lda, const float *b, int64_t k, float *c, int first) {
  __m256 s[TILE_M][2];
#pragma GCC unroll 6
  for (int i = 0; i < TILE_M; i++) {
    s[i][0] = first ? _mm256_setzero_ps() : _mm256_load_ps(c + i * TILE_N);
    s[i][1] = first ? _mm256_setzero_ps() : _mm256_load_ps(c + i * TILE_N + 8);
  }
#pragma GCC unroll 4
  for (; k > 0; k--, a++, b += TILE_N) {
    __m256 b0 = _mm256_load_ps(b), b1 = _mm256_load_ps(b + 8);
#pragma GCC unroll 6
    for (int i = 0; i < TILE_M; i++) {
      __m256 v = _mm256_broadcast_ss(a + i * lda);
      s[i][0] = _mm256_fmadd_ps(v, b0, s[i][0]);
      s[i][1] = _mm256_fmadd_ps(v, b1, s[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < TILE_M; i++) {
    _mm256_store_ps(c + i * TILE_N, s[i][0]);
    _mm256_store_ps(c + i * TILE_N + 8, s[i][1]);
  }
}

void avx2_transpose(__m256 *r) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  memcpy(r, t, sizeof t);
}

void avx2_store(void *y, int dtype, int64_t i, __m256 v) {
  if (dtype == WANE_F32) { _mm256_storeu_ps((float *)y + i, v); return; }
  __m128i *out = (__m128i *)(void *)((char *)y + 2 * i);
  if (dtype == WANE_F16) { _mm_storeu_si128(out, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); return; }
  __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(out, _mm256_castsi256_si128(packed));
}

/* ================================================================ forward */

/* x -> panels [ceil(M / 16)][K][16] of f32; tokens past the end are zero. */
void avx2_pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  int64_t lo, hi, size = a.dtype == WANE_F32 ? 4 : 2;
  wane_op_range(op, chunk, a.M, 32, &lo, &hi);
  for (int64_t m = lo; m < hi; m += 8) {
    float *out = (float *)a.work + m / TILE_N * a.K * TILE_N + m % TILE_N;
    int64_t rows = hi - m < 8 ? hi - m : 8, k = 0;
    const char *x = (const char *)a.x + m * a.K * size;
    for (; rows == 8 && k + 8 <= a.K; k += 8) {
      __m256 r[8];
      for (int i = 0; i < 8; i++) r[i] = avx2_load(x, a.dtype, i * a.K + k);
      avx2_transpose(r);
      for (int i = 0; i < 8; i++) _mm256_store_ps(out + (k + i) * TILE_N, r[i]);
    }
    for (; k < a.K; k++)
      for (int i = 0; i < 8; i++) out[k * TILE_N + i] = i < rows ? wane_float_at(x, a.dtype, i * a.K + k) : 0.0f;
  }
  if (lo < hi && hi == a.M && (hi + 7) / 8 % 2)                              /* the second half of the last panel */
    for (int64_t k = 0; k < a.K; k++) memset((float *)a.work + (hi / TILE_N * a.K + k) * TILE_N + 8, 0, 32);
}

/* Writes a panel's tiles to y: tokens [m, m + tokens), rows [n, n + count) of W. c [groups][6][16]. */
void avx2_write_panel(const wane_linear_args *a, const float *c, int64_t m, int64_t tokens, int64_t n, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    float bias[8];
    for (int j = 0; j < 8; j++) bias[j] = wane_linear_bias(a, n + i + j);
    for (int64_t half = 0; half < 2 && half * 8 < tokens; half++) {
      __m256 r[8];
      for (int j = 0; j < 8; j++) r[j] = _mm256_load_ps(c + (i + j) * TILE_N + half * 8);
      avx2_transpose(r);
      for (int64_t t = 0; t < 8 && half * 8 + t < tokens; t++)
        avx2_store(a->y, a->dtype, (m + half * 8 + t) * a->N + n + i, _mm256_add_ps(r[t], _mm256_loadu_ps(bias)));
    }
  }
  for (; i < count; i++)
    for (int64_t t = 0; t < tokens; t++) wane_float_put(a->y, a->dtype, (m + t) * a->N + n + i, c[i * TILE_N + t] + wane_linear_bias(a, n + i));
}

/* Rows [n, n + count) of W, count <= BLOCK_ROWS, against all tokens. */
static void many_block(const wane_linear_args *a, const wane_qview *w, int64_t n, int64_t count) {
  int64_t groups = (count + TILE_M - 1) / TILE_M, panels = (a->M + TILE_N - 1) / TILE_N;
  float *rows = wane_scratch(), *c = rows + BLOCK_ROWS * STEP;     // rows [count][STEP], c [panels][groups][6][16]
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  if (a->K == 0) memset(c, 0, (size_t)(panels * groups * TILE) * 4);
  for (int64_t k = 0; k < a->K; k += STEP) {
    int64_t step = a->K - k < STEP ? a->K - k : STEP;
    for (int64_t i = 0; i < count; i++) kit->dequantize(w, (n + i) * a->K + k, step, rows + i * STEP);
    for (int64_t i = count; i < groups * TILE_M; i++) memset(rows + i * STEP, 0, (size_t)step * 4);
    for (int64_t p = 0; p < panels; p++)
      for (int64_t g = 0; g < groups; g++)
        multiply_tile(rows + g * TILE_M * STEP, STEP, (const float *)a->work + (p * a->K + k) * TILE_N, step, c + (p * groups + g) * TILE, k == 0);
  }
  for (int64_t p = 0; p < panels; p++) {
    int64_t m = p * TILE_N;
    avx2_write_panel(a, c + p * groups * TILE, m, a->M - m < TILE_N ? a->M - m : TILE_N, n, count);
  }
}

void avx2_many(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.N, 12, &lo, &hi);
  for (int64_t n = lo; n < hi; n += BLOCK_ROWS) many_block(&a, &w, n, hi - n < BLOCK_ROWS ? hi - n : BLOCK_ROWS);
}

/* ================================================================ backward */

/* dy -> f32 [M rounded up to 6][N]; rows past the end are zero. */
void avx2_back_pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  float *out = a.work;
  int64_t lo, hi, end = (a.M + TILE_M - 1) / TILE_M * TILE_M;
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  avx2_widen((const char *)a.x + lo * a.N * (a.dtype == WANE_F32 ? 4 : 2), a.dtype, (hi - lo) * a.N, out + lo * a.N);
  if (lo < hi && hi == a.M) memset(out + hi * a.N, 0, (size_t)((end - hi) * a.N) * 4);
}

/* Columns [k, k + count) of dx, count <= BLOCK_COLUMNS. */
static void back_block(const wane_linear_args *a, const wane_qview *w, int64_t k, int64_t count) {
  enum { PANELS = BLOCK_COLUMNS / TILE_N };
  int64_t groups = (a->M + TILE_M - 1) / TILE_M, panels = (count + TILE_N - 1) / TILE_N;
  float *b = wane_scratch(), *c = b + PANELS * STEP * TILE_N;      // b [panels][STEP][16], c [groups][panels][6][16]
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  const float *dy = a->work;
  _Alignas(32) float row[BLOCK_COLUMNS] = { 0 };
  if (a->N == 0) memset(c, 0, (size_t)(panels * groups * TILE) * 4);
  for (int64_t n = 0; n < a->N; n += STEP) {
    int64_t step = a->N - n < STEP ? a->N - n : STEP;
    for (int64_t i = 0; i < step; i++) {
      kit->dequantize(w, (n + i) * a->K + k, count, row);
      for (int64_t p = 0; p < panels; p++) memcpy(b + (p * STEP + i) * TILE_N, row + p * TILE_N, TILE_N * 4);
    }
    for (int64_t g = 0; g < groups; g++)
      for (int64_t p = 0; p < panels; p++)
        multiply_tile(dy + g * TILE_M * a->N + n, a->N, b + p * STEP * TILE_N, step, c + (g * panels + p) * TILE, n == 0);
  }
  for (int64_t m = 0; m < a->M; m++)
    for (int64_t p = 0; p < panels; p++) {
      const float *from = c + (m / TILE_M * panels + p) * TILE + m % TILE_M * TILE_N;
      int64_t at = m * a->K + k + p * TILE_N, left = count - p * TILE_N, i = 0;
      if (left > TILE_N) left = TILE_N;
      for (; i + 8 <= left; i += 8) avx2_store(a->y, a->dtype, at + i, _mm256_load_ps(from + i));
      for (; i < left; i++) wane_float_put(a->y, a->dtype, at + i, from[i]);
    }
}

void avx2_back(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.K, BLOCK_COLUMNS, &lo, &hi);
  for (int64_t k = lo; k < hi; k += BLOCK_COLUMNS) back_block(&a, &w, k, hi - k < BLOCK_COLUMNS ? hi - k : BLOCK_COLUMNS);
}

void avx2_register_many(wane_backend *b, int group) {
  b->ops[WANE_OP_LINEAR_PACK + group] = avx2_pack;
  b->ops[WANE_OP_LINEAR_MANY + group] = avx2_many;
  b->ops[WANE_OP_LINEAR_BACK_PACK + group] = avx2_back_pack;
  b->ops[WANE_OP_LINEAR_BACK + group] = avx2_back;
}
