/* linear_ref.c: the products in portable C: every weight kind, both regimes and the backward, as plain loops over values that
 * quant.c decodes. The measure for all other kernels, and what runs where no instruction set offers more.
 *
 * Each sum is f32, in rising k (in rising n for the backward), one product and one addition at a time. */
#include "linear.h"
#include "int8.h"

enum { PIECE = 2048, BACK_COLUMNS = 64 };  /* values decoded at a time; columns of dx at a time */

/* Any of the preparing ops: x as f32 [M, width], whatever the dtype. */
static void widen(const wane_op *op, uint32_t chunk, int64_t width) {
  wane_linear_args a = wane_linear_load(op);
  float *out = a.work;
  int64_t lo, hi;
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  for (int64_t i = lo * width; i < hi * width; i++) out[i] = wane_float_at(a.x, a.dtype, i);
}

static void generic_prepare(const wane_op *op, uint32_t chunk) { widen(op, chunk, op->n[11]); }
static void generic_back_pack(const wane_op *op, uint32_t chunk) { widen(op, chunk, op->n[10]); }

/* y [M, N] for the chunk's rows of W; one row is decoded piece by piece and meets every row of x. */
static void generic_product(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  const float *x = a.work;
  float *piece = wane_scratch(), *sum = piece + PIECE;  // sum [M], M <= WANE_LINEAR_SLICE
  int64_t lo, hi;
  wane_op_range(op, chunk, a.N, 1, &lo, &hi);
  for (int64_t n = lo; n < hi; n++) {
    for (int64_t m = 0; m < a.M; m++) sum[m] = 0;
    for (int64_t k = 0; k < a.K; k += PIECE) {
      int64_t count = a.K - k < PIECE ? a.K - k : PIECE;
      wane_quant_generic.dequantize(&w, n * a.K + k, count, piece);
      for (int64_t m = 0; m < a.M; m++) {
        const float *row = x + m * a.K + k;
        for (int64_t i = 0; i < count; i++) sum[m] += piece[i] * row[i];
      }
    }
    for (int64_t m = 0; m < a.M; m++) wane_float_put(a.y, a.dtype, m * a.N + n, sum[m] + wane_linear_bias(&a, n));
  }
}

/* dx [M, K] for the chunk's columns: sum over n of dy[m][n] * W[n][k], a block of columns at a time. */
static void generic_back(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  const float *dy = a.work;
  float *piece = wane_scratch(), *sum = piece + BACK_COLUMNS;  // sum [M, columns]
  int64_t lo, hi;
  wane_op_range(op, chunk, a.K, BACK_COLUMNS, &lo, &hi);
  for (int64_t k = lo; k < hi; k += BACK_COLUMNS) {
    int64_t columns = hi - k < BACK_COLUMNS ? hi - k : BACK_COLUMNS;
    for (int64_t i = 0; i < a.M * columns; i++) sum[i] = 0;
    for (int64_t n = 0; n < a.N; n++) {
      wane_quant_generic.dequantize(&w, n * a.K + k, columns, piece);
      for (int64_t m = 0; m < a.M; m++)
        for (int64_t i = 0; i < columns; i++) sum[m * columns + i] += dy[m * a.N + n] * piece[i];
    }
    for (int64_t m = 0; m < a.M; m++)
      for (int64_t i = 0; i < columns; i++) wane_float_put(a.y, a.dtype, m * a.K + k + i, sum[m * columns + i]);
  }
}

void wane_register_generic_linear(wane_backend *b) {
  for (int g = 0; g < WANE_GROUPS; g++) {
    if (g == WANE_GROUP_LLM_INT8) continue;
    b->ops[WANE_OP_LINEAR_PREPARE + g] = generic_prepare;
    b->ops[WANE_OP_LINEAR_ROWS + g] = generic_product;
    b->ops[WANE_OP_LINEAR_PACK + g] = generic_prepare;
    b->ops[WANE_OP_LINEAR_MANY + g] = generic_product;
    b->ops[WANE_OP_LINEAR_BACK_PACK + g] = generic_back_pack;
    b->ops[WANE_OP_LINEAR_BACK + g] = generic_back;
  }
  wane_int8_register_generic(b);
  wane_register_experts(b);
}
