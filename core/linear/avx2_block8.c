/* avx2_block8.c: few rows of x times blockwise 8-bit weights, f32.
 *
 * A gather from the 256 values costs a cycle a weight. bitsandbytes' dynamic maps are seven straight lines over ranges that double
 * (functional.py create_dynamic_map), so the exponent of the code picks a line and eleven instructions give eight values. The lines are
 * made from the stored map itself and used only if they reproduce all of it to 2^-22 of each value (code 0 excepted: old CPU builds
 * stored -1 there); any other map is gathered. */
#include <math.h>
#include "rows8.h"
#include "simd8.h"

#define INLINE static inline __attribute__((always_inline))

/* ---------------------------------------------------------------- the map */

/* Values of eight codes (as int32) by the lines. */
INLINE __m256 line_values(__m256i codes, __m256 step, __m256 base, __m256i offset) {
  __m256 d = _mm256_cvtepi32_ps(_mm256_add_epi32(codes, offset));
  __m256i line = _mm256_srli_epi32(_mm256_castps_si256(d), 23);
  __m256 p = _mm256_and_ps(d, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xff800000)));
  return _mm256_fmadd_ps(_mm256_permutevar8x32_ps(step, line), _mm256_sub_ps(d, p), _mm256_mul_ps(p, _mm256_permutevar8x32_ps(base, line)));
}

/* Lines through the first and the last value of each range of d, on the positive side. */
static void make_lines(const float *code, int is_signed, wane_block8_map *map) {
  map->offset = is_signed ? -127 : 1;
  for (int e = is_signed ? 0 : 1; e <= (is_signed ? 7 : 8); e++) {
    int first = 1 << e, last = 2 * first - 1, top = 255 + map->offset, i = (e + 127) & 7;
    if (last > top) last = top;
    double low = code[first - map->offset], high = code[last - map->offset];
    map->base[i] = (float)(low / first);
    map->step[i] = last > first ? (float)((high - low) / (last - first)) : 0;
  }
}

static void fit_map(const float *code, int is_signed, wane_block8_map *map) {
  memset(map, 0, sizeof *map);
  make_lines(code, is_signed, map);
  __m256 step = _mm256_loadu_ps(map->step), base = _mm256_loadu_ps(map->base);
  __m256i offset = _mm256_set1_epi32(map->offset);
  map->fits = 1;
  for (int c = 0; c < 256; c += 8) {
    float v[8];
    _mm256_storeu_ps(v, line_values(_mm256_add_epi32(_mm256_set1_epi32(c), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), step, base, offset));
    for (int i = 0; i < 8; i++) {
      if (c + i == 0) map->zero = code[0] - v[0];
      else if (!(fabsf(v[i] - code[c + i]) <= fabsf(code[c + i]) * 0x1p-22f)) map->fits = 0;
    }
  }
  if (fabsf(map->zero) <= fabsf(code[0]) * 0x1p-22f) map->zero = 0;
}

void wane_block8_prepare_avx2(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_rows8 r = wane_rows8_plan(op->i[14], a.compute, a.M, a.K);
  if (chunk == 0) fit_map(op->p[9], op->i[14] == WANE_BLOCK8, (wane_block8_map *)((char *)a.work + r.map));
  wane_rows8_prepare_avx2(op, chunk);
}

/* ---------------------------------------------------------------- products */

/* What a row needs besides its codes. */
typedef struct block8_row {
  const float *code;
  const wane_block8_map *map;
  const float *scales;                       /* of 256 values one by one, or NULL: the caller multiplies */
} block8_row;

/* sum[i] and odd[i] += 256 values at q times MR rows of x. */
INLINE void group_dots(const int LINES, const int SCALED, const int MR, const uint8_t *q, const block8_row *w, const float *x, int64_t stride,
                       __m256 *sum, __m256 *odd) {
  __m256 step = _mm256_loadu_ps(w->map->step), base = _mm256_loadu_ps(w->map->base);
  __m256i offset = _mm256_set1_epi32(w->map->offset);
  for (int k = 0; k < 256; k += 16) {
    __m256i c0 = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(q + k))), c1 = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(q + k + 8)));
    __m256 v0 = LINES ? line_values(c0, step, base, offset) : _mm256_i32gather_ps(w->code, c0, 4);
    __m256 v1 = LINES ? line_values(c1, step, base, offset) : _mm256_i32gather_ps(w->code, c1, 4);
    if (SCALED) v0 = _mm256_mul_ps(v0, _mm256_loadu_ps(w->scales + k)), v1 = _mm256_mul_ps(v1, _mm256_loadu_ps(w->scales + k + 8));
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) {
      sum[i] = _mm256_fmadd_ps(v0, _mm256_load_ps(x + i * stride + k), sum[i]);
      odd[i] = _mm256_fmadd_ps(v1, _mm256_load_ps(x + i * stride + k + 8), odd[i]);
    }
  }
}

/* Adds what code 0 is worth beyond its line: rare, so in scalars. */
static void add_zeros(const uint8_t *q, const block8_row *w, int rows, const float *x, int64_t stride, __m256 *sum) {
  for (int k = 0; k < 256; k += 32) {
    __m256i v = _mm256_loadu_si256((const __m256i *)(q + k));
    uint32_t zeros = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256()));
    for (; zeros; zeros &= zeros - 1) {
      int at = k + __builtin_ctz(zeros);
      float more = w->map->zero * (w->scales ? w->scales[at] : 1);
      for (int i = 0; i < rows; i++) sum[i] = _mm256_add_ps(sum[i], _mm256_set_ps(0, 0, 0, 0, 0, 0, 0, more * x[i * stride + at]));
    }
  }
}

/* The scale of each of 256 values from element `first` of the flat tensor on, `left` of which exist. */
static void spread_scales(const float *absmax, int64_t block_size, int64_t first, int64_t left, float *out) {
  int64_t count = left < 256 ? left : 256;
  for (int64_t k = 0; k < count;) {
    int64_t block = (first + k) / block_size, end = (block + 1) * block_size - first;
    for (; k < count && k < end; k++) out[k] = absmax[block];
  }
  for (int64_t k = count; k < 256; k++) out[k] = 0;
}

INLINE void row_dots(const int LINES, const int MR, const wane_qview *w, int64_t n, const wane_rows8 *r, const char *work, int64_t m, float *out) {
  const uint8_t *q = (const uint8_t *)w->codes + n * w->cols;
  const float *absmax = w->absmax;
  float scales[256];
  uint8_t last[256];
  block8_row row = { w->code, (const wane_block8_map *)(work + r->map), NULL };
  __m256 acc[4];
  for (int i = 0; i < MR; i++) acc[i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < r->groups; g++, q += 256) {
    int64_t first = n * w->cols + g * 256, left = w->cols - g * 256, block = first / w->block_size;
    const float *x = (const float *)work + m * r->stride + g * 256;
    const uint8_t *group = q;
    __m256 sum[4], odd[4], scale = _mm256_set1_ps(1);
    for (int ahead = 0; ahead < 256; ahead += 64) _mm_prefetch((const char *)q + WANE_PREFETCH_AHEAD + ahead, _MM_HINT_T0);
    if (left < 256) {
      memset(last, 255, sizeof last);
      group = memcpy(last, q, (size_t)left);
    }
    for (int i = 0; i < MR; i++) sum[i] = odd[i] = _mm256_setzero_ps();
    if ((first + (left < 256 ? left : 256) - 1) / w->block_size == block) {
      row.scales = NULL;
      scale = _mm256_broadcast_ss(absmax + block);
      group_dots(LINES, 0, MR, group, &row, x, r->stride, sum, odd);
    } else {
      spread_scales(absmax, w->block_size, first, left, scales);
      row.scales = scales;
      group_dots(LINES, 1, MR, group, &row, x, r->stride, sum, odd);
    }
    if (LINES && row.map->zero != 0) add_zeros(group, &row, MR, x, r->stride, sum);
    for (int i = 0; i < MR; i++) acc[i] = _mm256_fmadd_ps(_mm256_add_ps(sum[i], odd[i]), scale, acc[i]);
  }
  for (int i = 0; i < MR; i++) out[i] = wane_sum8(acc[i]);
}

static void block8_dots(const wane_qview *w, int64_t n, const wane_rows8 *r, const char *work, int64_t m, int rows, float *out) {
  int fits = ((const wane_block8_map *)(work + r->map))->fits;
  if (fits && rows == 4) row_dots(1, 4, w, n, r, work, m, out);
  else if (fits) row_dots(1, 1, w, n, r, work, m, out);
  else if (rows == 4) row_dots(0, 4, w, n, r, work, m, out);
  else row_dots(0, 1, w, n, r, work, m, out);
}

void wane_block8_product_avx2(const wane_op *op, uint32_t chunk) { wane_rows8_product(op, chunk, block8_dots); }

void wane_block8_register_avx2(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_BLOCK8] = wane_block8_prepare_avx2;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_BLOCK8] = wane_block8_product_avx2;
}
