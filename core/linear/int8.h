/* int8.h: LLM.int8(), the product of row-quantized activations with row-quantized int8 weights. Internal.
 *
 *   y[m][n] = (sum_k CA[m][k] W[n][k]) * SCA[m] * SCB[n] / 127^2 + bias[n]
 *           + (sum over outlier columns o of x[m][o] * W[n][o]) * SCB[n] / 127
 *
 * CA[m] is the row m of x, rounded to f16 and quantized to int8 by SCA[m], its absolute maximum over the elements below the
 * threshold. A column that holds an element of |x| >= threshold is an outlier column: it is cleared in CA and multiplied in
 * float with x's own values. (Dettmers et al. 2022; bitsandbytes autograd/_functions.py MatMul8bitLt, csrc/kernels.cu.)
 * Upstream's constant 1/127^2 and its f16 results are not copied: here everything after the exact integer sum is f32.
 *
 * Two steps, each an op: prepare (outlier columns, CA, SCA into a workspace) and product. Every instruction set computes the same
 * integers and the same sequence of f32 roundings, so all levels give the same bits. With the columns taken a row at a time
 * (WANE_COMPUTE_INVARIANT) a row's result does not depend on the other rows. */
#ifndef WANE_INT8_H
#define WANE_INT8_H
#include "linear.h"

/* |sum| <= 127 * 127 * K must fit in int32. */
enum { WANE_INT8_MAX_K = 131072 };

/* ---- the workspace: where prepare puts things, for M rows of K ---- */
typedef struct wane_int8_layout {
  int64_t stride;                /* values of a row of codes: K rounded up to 64; the rest are zeros */
  int64_t count;                 /* offsets in bytes: int64 number of outlier columns */
  int64_t columns;               /* i32 [K]: their numbers, rising */
  int64_t flags;                 /* u8 [K]: 1 in outlier columns */
  int64_t scale;                 /* f32 [M]: SCA */
  int64_t sum;                   /* i32 [M]: sum of the row's codes, for kernels that shift W to unsigned */
  int64_t codes;                 /* CA: i16 [M][stride] (generic, AVX2), i8 [M][stride] (VNNI), or tiles (AMX) */
  int64_t bytes;                 /* of the whole */
} wane_int8_layout;

static inline wane_int8_layout wane_int8_plan(int64_t M, int64_t K) {
  wane_int8_layout l;
  int64_t rows = (M + 31) / 32 * 32 > 2 * M ? (M <= 4 ? 2 * M : (M + 31) / 32 * 32) : 2 * M;
  l.stride = (K + 63) / 64 * 64;
  l.count = 0;
  l.columns = 64;
  l.flags = l.columns + l.stride * 4;
  l.scale = l.flags + l.stride;
  l.sum = l.scale + (M * 4 + 63) / 64 * 64;
  l.codes = l.sum + (M * 4 + 63) / 64 * 64;
  l.bytes = l.codes + rows * l.stride;
  return l;
}

/* ---- the ops: linear.h's record, group LLM_INT8 ----
 * SCAN: flags of the columns, chunks of columns. PREPARE and PACK: codes, chunks of rows; with i[WANE_LINEAR_ALONE] they scan first
 * themselves, in one chunk, which is cheaper for a small x. ROWS and MANY: the product, chunks of N,
 * or of blocks of N and slices of M. */
enum { WANE_INT8_ROWS = 64 };    /* weight rows a step of the product, at most */

/* One instruction set's pieces of the product; the loops around them are wane_int8_product. */
typedef struct wane_int8_kit {
  int rows;                      /* rows of x a call of multiply takes at most */
  /* Weight rows for the next calls: returns what multiply gets as `w`. NULL: the raw rows. `scratch` holds WANE_INT8_TILES bytes. */
  const void *(*load)(const int8_t *w, int64_t K, int64_t rows, void *scratch);
  /* c[i][j] = sum_k CA[m+i][k] W[j][k] for i < mr, j < nb; c has rows of WANE_INT8_ROWS. */
  void (*multiply)(const wane_int8_layout *l, const char *work, int64_t m, int mr, const void *w, int64_t K, int64_t nb, int32_t *c);
  /* out[o][j] = W[j][columns[o]] as f32, o < count, j < nb; rows of WANE_INT8_ROWS. */
  void (*gather)(const int8_t *w, int64_t K, int64_t nb, const int32_t *columns, int64_t count, float *out);
  /* acc[j] += x[o] * wo[o][j], in rising o, a product and a sum rounded each. */
  void (*outliers)(const float *x, int64_t count, const float *wo, int64_t nb, float *acc);
  /* y[j] from the integer and outlier sums (acc may be NULL), scb and bias at the block's first row. */
  void (*finish)(const int32_t *c, float sca, const float *acc, const float *scb, const void *bias, int bias_dtype, int64_t nb, void *y, int y_dtype);
} wane_int8_kit;
enum { WANE_INT8_TILES = 928 << 10 };
/* Rows long enough to leave no room for 32 of W in tiles. */
static inline int wane_int8_too_long(int64_t stride) { return stride * 32 > WANE_INT8_TILES; }

/* The product of one chunk with a kit's pieces. */
void wane_int8_product(const wane_op *op, uint32_t chunk, const wane_int8_kit *kit);
/* Numbers of the flagged columns, rising; their count goes to *count. */
void wane_int8_columns(const uint8_t *flags, int64_t K, int32_t *columns, int64_t *count);

/* ---- pieces that other levels use too ---- */
/* What PREPARE does before its rows: scans if told to, lists the columns (chunk 0). */
void wane_int8_begin_avx2(const wane_op *op, uint32_t chunk);
void wane_int8_gather_avx2(const int8_t *w, int64_t K, int64_t nb, const int32_t *columns, int64_t count, float *out);
/* Rows [lo, hi) of the op's x into codes, the layout's stride apart; scales and sums into the workspace. */
void wane_int8_quantize_avx512(const wane_op *op, int64_t lo, int64_t hi, int8_t *codes);
void wane_int8_outliers_avx512(const float *x, int64_t count, const float *wo, int64_t nb, float *acc);
void wane_int8_finish_avx512(const int32_t *c, float sca, const float *acc, const float *scb, const void *bias, int bias_dtype,
                             int64_t nb, void *y, int y_dtype);
void wane_int8_multiply_avx512(const wane_int8_layout *l, const char *work, int64_t m, int mr, const void *w, int64_t K, int64_t nb, int32_t *c);

/* ---- slots ---- */
void wane_int8_register_generic(wane_backend *b);
void wane_int8_register_avx2(wane_backend *b);
void wane_int8_register_avx512(wane_backend *b);
void wane_int8_register_amx(wane_backend *b);
#endif
