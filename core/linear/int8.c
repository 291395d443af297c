/* int8.c: LLM.int8() in portable C: the reference that the other levels equal bit for bit, and the loops that all levels share.
 * What is computed is said in int8.h. */
#include <math.h>
#include <string.h>
#include "int8.h"

/* ---------------------------------------------------------------- prepare */

/* x as the quantizer sees it: rounded to f16 like upstream's copy, except beyond f16's range, where upstream would give infinity. */
static float rounded(float x) { return fabsf(x) < 65520.0f ? wane_f16_to_f32(wane_f32_to_f16(x)) : x; }

void wane_int8_columns(const uint8_t *flags, int64_t K, int32_t *columns, int64_t *count) {
  int64_t found = 0, k = 0;
  for (; k + 8 <= K; k += 8) {
    uint64_t eight;
    memcpy(&eight, flags + k, 8);
    if (!eight) continue;
    for (int j = 0; j < 8; j++) if (flags[k + j]) columns[found++] = (int32_t)(k + j);
  }
  for (; k < K; k++) if (flags[k]) columns[found++] = (int32_t)k;
  *count = found;
}

/* Flags of the columns [lo, hi): any |x| >= threshold among all rows. */
static void find_columns(const wane_linear_args *a, int64_t lo, int64_t hi, uint8_t *flags) {
  memset(flags + lo, 0, (size_t)(hi - lo));
  for (int64_t m = 0; m < a->M; m++)
    for (int64_t k = lo; k < hi; k++) flags[k] |= fabsf(rounded(wane_float_at(a->x, a->dtype, m * a->K + k))) >= a->threshold;
}

/* Row m as codes. flags: columns to clear, or NULL (only the outlier elements themselves are). A NaN makes the scale NaN. */
static void quantize_row(const wane_linear_args *a, int64_t m, int64_t stride, const uint8_t *flags, int16_t *codes, float *scale, int32_t *sum) {
  float top = 0, nan = 0;
  for (int64_t k = 0; k < a->K; k++) {
    float v = fabsf(rounded(wane_float_at(a->x, a->dtype, m * a->K + k)));
    if (v != v) nan = v;
    if (v > top && !(a->threshold > 0 && v >= a->threshold)) top = v;
  }
  float step = top > 0 ? 127.0f / top : 0;
  int32_t total = 0;
  for (int64_t k = 0; k < a->K; k++) {
    float v = rounded(wane_float_at(a->x, a->dtype, m * a->K + k));
    int keep = fabsf(v) <= top && fabsf(v) < INFINITY && !(flags && flags[k]);
    codes[k] = keep ? (int16_t)lrintf(v * step) : 0;
    total += codes[k];
  }
  memset(codes + a->K, 0, (size_t)(stride - a->K) * sizeof *codes);
  *scale = nan != nan ? nan : top;
  *sum = total;
}

static void generic_scan(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_int8_layout l = wane_int8_plan(a.M, a.K);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.K, 64, &lo, &hi);
  if (a.threshold > 0 && lo < hi) find_columns(&a, lo, hi, (uint8_t *)a.work + l.flags);
}

static void generic_quantize(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_int8_layout l = wane_int8_plan(a.M, a.K);
  char *work = a.work;
  uint8_t *flags = (uint8_t *)work + l.flags;
  int64_t lo, hi, none = 0;
  if (a.threshold > 0 && op->i[WANE_LINEAR_ALONE]) find_columns(&a, 0, a.K, flags);
  if (chunk == 0 && a.threshold > 0) wane_int8_columns(flags, a.K, (int32_t *)(work + l.columns), (int64_t *)(work + l.count));
  else if (chunk == 0) memcpy(work + l.count, &none, sizeof none);
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  for (int64_t m = lo; m < hi; m++)
    quantize_row(&a, m, l.stride, a.threshold > 0 && !op->i[WANE_LINEAR_BY_ROW] ? flags : NULL, (int16_t *)(work + l.codes) + m * l.stride,
                 (float *)(work + l.scale) + m, (int32_t *)(work + l.sum) + m);
}

/* ---------------------------------------------------------------- product */

/* Outlier columns gathered at once. */
enum { OUTLIERS = 1024 };

/* How a product is cut, by the shapes alone: blocks of `rows` weight rows, as many as stay in half of a small L2 cache, few when they are used only once;
 * and, where a block is loaded, slices of x, so that there are some units to share. Chunks take units, or else weight rows. */
typedef struct cut { int64_t rows, blocks, slices, slice; } cut;
enum { UNITS_WANTED = 16, UNIT_ROWS = 128 };

static cut cut_of(const wane_int8_kit *kit, int64_t M, int64_t N, int64_t K) {
  int64_t most = M <= 4 ? 16 : WANE_INT8_ROWS, cache = (kit->load ? WANE_INT8_TILES : 192 << 10) / ((K + 63) / 64 * 64), least = kit->load ? 32 : 8;
  cut c = { .rows = cache / least * least, .slices = 1 };
  if (c.rows < least) c.rows = least;
  if (c.rows > most) c.rows = most;
  c.blocks = (N + c.rows - 1) / c.rows;
  if (kit->load) c.slices = (UNITS_WANTED + c.blocks - 1) / c.blocks;
  if (c.slices > M / UNIT_ROWS) c.slices = M < UNIT_ROWS ? 1 : M / UNIT_ROWS;
  c.slice = ((M + c.slices - 1) / c.slices + 31) / 32 * 32;
  c.slices = (M + c.slice - 1) / c.slice;
  return c;
}

/* Row m of x in `count` outlier columns; taken a row at a time, ordinary elements there are zero. */
static void outlier_values(const wane_linear_args *a, int by_row, int64_t m, const int32_t *columns, int64_t count, float *out) {
  for (int64_t o = 0; o < count; o++) {
    float v = wane_float_at(a->x, a->dtype, m * a->K + columns[o]);
    out[o] = by_row && !(fabsf(rounded(v)) >= a->threshold) ? 0 : v;
  }
}

/* The float part of row m for the nb weight rows at w: acc[j] = sum over outlier columns, in rising order. *gathered says which group
 * of columns of these rows is in wo. */
static void outlier_sums(const wane_op *op, const wane_linear_args *a, const wane_int8_kit *kit, const int32_t *columns, int64_t count, int64_t m,
                         const int8_t *w, int64_t nb, int64_t *gathered, float *xo, float *wo, float *acc) {
  memset(acc, 0, WANE_INT8_ROWS * sizeof *acc);
  for (int64_t o = 0; o < count; o += OUTLIERS) {
    int64_t some = count - o < OUTLIERS ? count - o : OUTLIERS;
    if (*gathered != o) kit->gather(w, a->K, nb, columns + o, some, wo);
    *gathered = o;
    outlier_values(a, op->i[WANE_LINEAR_BY_ROW], m, columns + o, some, xo);
    kit->outliers(xo, some, wo, nb, acc);
  }
}

/* Weight rows [n, n + nb) times rows [m0, m1) of x. */
static void product_block(const wane_op *op, const wane_linear_args *a, const wane_int8_kit *kit, int64_t n, int64_t nb, int64_t m0, int64_t m1) {
  wane_int8_layout l = wane_int8_plan(a->M, a->K);
  const char *work = a->work;
  const int32_t *columns = (const int32_t *)(work + l.columns);
  const float *sca = (const float *)(work + l.scale), *scb = op->p[5];
  char *scratch = wane_scratch();
  int32_t *c = (int32_t *)scratch;                                             /* [kit->rows <= 32][WANE_INT8_ROWS] */
  float *acc = (float *)(scratch + (32 << 10)), *xo = (float *)(scratch + (48 << 10)), *wo = (float *)(scratch + (64 << 10));
  void *tiles = scratch + (64 << 10) + (size_t)OUTLIERS * WANE_INT8_ROWS * 4;
  int64_t size = a->dtype == WANE_F32 ? 4 : 2, bias_size = a->bias_dtype == WANE_F32 ? 4 : 2, count, gathered = -1;
  const int8_t *w = (const int8_t *)op->p[4] + n * a->K;
  const void *rows = kit->load ? kit->load(w, a->K, nb, tiles) : w, *bias = a->bias ? (const char *)a->bias + n * bias_size : NULL;
  memcpy(&count, work + l.count, sizeof count);
  for (int64_t m = m0; m < m1; m += kit->rows) {
    int mr = m1 - m < kit->rows ? (int)(m1 - m) : kit->rows;
    kit->multiply(&l, work, m, mr, rows, a->K, nb, c);
    for (int i = 0; i < mr; i++) {
      if (count) outlier_sums(op, a, kit, columns, count, m + i, w, nb, &gathered, xo, wo, acc);
      kit->finish(c + i * WANE_INT8_ROWS, sca[m + i], count ? acc : NULL, scb + n, bias, a->bias_dtype, nb, (char *)a->y + ((m + i) * a->N + n) * size, a->dtype);
    }
  }
}

void wane_int8_product(const wane_op *op, uint32_t chunk, const wane_int8_kit *kit) {
  wane_linear_args a = wane_linear_load(op);
  cut c = cut_of(kit, a.M, a.N, a.K);
  int64_t lo, hi;
  wane_op_range(op, chunk, kit->load ? c.blocks * c.slices : a.N, kit->load ? 1 : 16, &lo, &hi);
  for (int64_t n = lo; n < hi && !kit->load; n += c.rows) product_block(op, &a, kit, n, hi - n < c.rows ? hi - n : c.rows, 0, a.M);
  for (int64_t u = lo; u < hi && kit->load; u++) {
    int64_t n = u / c.slices * c.rows, m = u % c.slices * c.slice, nb = a.N - n < c.rows ? a.N - n : c.rows;
    product_block(op, &a, kit, n, nb, m, a.M - m < c.slice ? a.M : m + c.slice);
  }
}

/* ---------------------------------------------------------------- the plain pieces */

static void multiply(const wane_int8_layout *l, const char *work, int64_t m, int mr, const void *w, int64_t K, int64_t nb, int32_t *c) {
  for (int i = 0; i < mr; i++)
    for (int64_t j = 0; j < nb; j++) {
      const int16_t *x = (const int16_t *)(work + l->codes) + (m + i) * l->stride;
      const int8_t *row = (const int8_t *)w + j * K;
      int32_t sum = 0;
      for (int64_t k = 0; k < K; k++) sum += x[k] * row[k];
      c[i * WANE_INT8_ROWS + j] = sum;
    }
}

static void gather(const int8_t *w, int64_t K, int64_t nb, const int32_t *columns, int64_t count, float *out) {
  for (int64_t j = 0; j < nb; j++)
    for (int64_t o = 0; o < count; o++) out[o * WANE_INT8_ROWS + j] = w[j * K + columns[o]];
}

static void outliers(const float *x, int64_t count, const float *wo, int64_t nb, float *acc) {
  for (int64_t o = 0; o < count; o++)
    for (int64_t j = 0; j < nb; j++) acc[j] += x[o] * wo[o * WANE_INT8_ROWS + j];
}

static void finish(const int32_t *c, float sca, const float *acc, const float *scb, const void *bias, int bias_dtype, int64_t nb, void *y, int y_dtype) {
  for (int64_t j = 0; j < nb; j++) {
    float r = (float)c[j] * sca * (scb[j] * (1.0f / 16129.0f));
    if (bias) r += wane_float_at(bias, bias_dtype, j);
    if (acc) r += acc[j] * (scb[j] * (1.0f / 127.0f));
    wane_float_put(y, y_dtype, j, r);
  }
}

static void generic_product(const wane_op *op, uint32_t chunk) {
  static const wane_int8_kit kit = { 4, NULL, multiply, gather, outliers, finish };
  wane_int8_product(op, chunk, &kit);
}

void wane_int8_register_generic(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_SCAN + WANE_GROUP_LLM_INT8] = generic_scan;
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_LLM_INT8] = b->ops[WANE_OP_LINEAR_PACK + WANE_GROUP_LLM_INT8] = generic_quantize;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_LLM_INT8] = b->ops[WANE_OP_LINEAR_MANY + WANE_GROUP_LLM_INT8] = generic_product;
}
