/* reduce_kernels.h: reductions and running sums. Included once by each instruction-set group.
 *
 * Sums are kept in eight f64 lanes, element i of a piece going to lane i % 8: accurate, vectorisable, and the same additions
 * in the same order on every instruction set, layout and thread count. Variances are two passes over each piece, merged by
 * Chan's formula (Chan, Golub & LeVeque 1979). */
#include "convert.h"
#include "reduce.h"
#include <math.h>

typedef wane_f32u f32u;
typedef wane_i64u i64u;

/* ---------------------------------------------------------------- a piece */

/* The eight lanes in fixed order. */
static double add_lanes(const double *v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

static double sum_piece(const f32u *x, int64_t n) {
  double lane[8] = { 0 };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) lane[j] += (double)x[i + j];
  for (; i < n; i++) lane[i % 8] += (double)x[i];
  return add_lanes(lane);
}

/* Sum of (x - mean)^2. */
static double squares_piece(const f32u *x, int64_t n, double mean) {
  double lane[8] = { 0 };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) lane[j] += ((double)x[i + j] - mean) * ((double)x[i + j] - mean);
  for (; i < n; i++) lane[i % 8] += ((double)x[i] - mean) * ((double)x[i] - mean);
  return add_lanes(lane);
}

static double product_piece(const f32u *x, int64_t n) {
  double lane[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };
  for (int64_t i = 0; i < n; i++) lane[i % 8] *= (double)x[i];
  return ((lane[0] * lane[4]) * (lane[2] * lane[6])) * ((lane[1] * lane[5]) * (lane[3] * lane[7]));
}

/* Largest (sign 1) or smallest (sign -1, as the largest of -x) value; NaN if there is one. n >= 1. */
static float extreme_piece(const f32u *x, int64_t n, float sign) {
  float lane[8];
  int nan = 0;
  for (int j = 0; j < 8; j++) lane[j] = -INFINITY;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) {
      float v = sign * x[i + j];
      lane[j] = v > lane[j] ? v : lane[j];
      nan |= v != v;
    }
  for (; i < n; i++) {
    float v = sign * x[i];
    lane[0] = v > lane[0] ? v : lane[0];
    nan |= v != v;
  }
  for (int j = 1; j < 8; j++) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
  return nan ? NAN : sign * lane[0];
}

/* First index holding v (NaN equals NaN). */
static int64_t find_piece(const f32u *x, int64_t n, float v) {
  for (int64_t i = 0; i < n; i++)
    if (x[i] == v || (v != v && x[i] != x[i])) return i;
  return n - 1;
}

static wane_reduced reduce_piece_f32(int op, const f32u *x, int64_t n) {
  wane_reduced r = { 0, 0, 0, -1, n };
  switch (op) {
    case WANE_SUM: case WANE_MEAN: r.a = sum_piece(x, n); break;
    case WANE_NORM2: r.a = squares_piece(x, n, 0); break;
    case WANE_PROD: r.a = product_piece(x, n); break;
    case WANE_VAR:
      r.a = n ? sum_piece(x, n) / (double)n : 0;
      r.b = squares_piece(x, n, r.a);
      break;
    case WANE_ANY:
      for (int64_t i = 0; i < n; i++) r.i |= x[i] != 0;
      break;
    case WANE_ALL:
      r.i = 1;
      for (int64_t i = 0; i < n; i++) r.i &= x[i] != 0;
      break;
    default:
      if (n == 0) break;
      r.a = extreme_piece(x, n, op == WANE_AMAX || op == WANE_ARGMAX ? 1.0f : -1.0f);
      r.at = op == WANE_ARGMAX || op == WANE_ARGMIN ? find_piece(x, n, (float)r.a) : 0;
  }
  return r;
}

static wane_reduced reduce_piece_i64(int op, const i64u *x, int64_t n) {
  wane_reduced r = { 0, 0, 0, -1, n };
  uint64_t u = op == WANE_PROD;
  switch (op) {
    case WANE_SUM: case WANE_MEAN:
      for (int64_t i = 0; i < n; i++) u += (uint64_t)x[i];
      r.i = (int64_t)u;
      break;
    case WANE_PROD:
      for (int64_t i = 0; i < n; i++) u *= (uint64_t)x[i];
      r.i = (int64_t)u;
      break;
    case WANE_ANY:
      for (int64_t i = 0; i < n; i++) r.i |= x[i] != 0;
      break;
    case WANE_ALL:
      r.i = 1;
      for (int64_t i = 0; i < n; i++) r.i &= x[i] != 0;
      break;
    default:
      for (int64_t i = 0; i < n; i++)
        if (r.at < 0 || (op == WANE_AMAX || op == WANE_ARGMAX ? x[i] > r.i : x[i] < r.i)) r.i = x[i], r.at = i;
  }
  return r;
}

/* ---------------------------------------------------------------- merging and finishing */

/* Whether y beats x: a NaN beats every number, equals do not (so that the lower index stays). */
static int beats(int op, int integers, const wane_reduced *y, const wane_reduced *x) {
  int most = op == WANE_AMAX || op == WANE_ARGMAX;
  if (x->at < 0 || y->at < 0) return y->at >= 0;
  if (integers) return most ? y->i > x->i : y->i < x->i;
  if (x->a != x->a || y->a != y->a) return x->a == x->a;
  return most ? y->a > x->a : y->a < x->a;
}

/* x = x and then y, whose elements follow. */
static void merge(int op, int integers, wane_reduced *x, const wane_reduced *y) {
  int64_t n = x->count + y->count;
  switch (op) {
    case WANE_SUM: case WANE_MEAN: case WANE_NORM2:
      x->a += y->a;
      x->i = (int64_t)((uint64_t)x->i + (uint64_t)y->i);
      break;
    case WANE_PROD:
      x->a *= y->a;
      x->i = (int64_t)((uint64_t)x->i * (uint64_t)y->i);
      break;
    case WANE_ANY: x->i |= y->i; break;
    case WANE_ALL: x->i &= y->i; break;
    case WANE_VAR:
      if (n > 0) {
        double delta = y->a - x->a, share = (double)y->count / (double)n;
        x->b += y->b + delta * delta * (double)x->count * share;
        x->a += delta * share;
      }
      break;
    default:
      if (beats(op, integers, y, x)) {
        x->a = y->a;
        x->i = y->i;
        x->at = x->count + y->at;
      }
  }
  x->count = n;
}

/* The result, stored as element `at` of an array of `dtype`. */
static void finish(int op, int integers, const wane_reduced *r, int dtype, char *out) {
  double v = r->a;
  int64_t i = r->i;
  switch (op) {
    case WANE_MEAN: v = (integers ? (double)r->i : r->a) / (double)r->count; break;
    case WANE_NORM2: v = sqrt(r->a); break;
    case WANE_VAR: v = r->b / (double)r->count; break;
    case WANE_ARGMAX: case WANE_ARGMIN: i = r->at; break;
    default: break;
  }
  float f = (float)v;
  if (wane_is_float_dtype(dtype)) wane_store_f32(dtype, out, 1, 1, &f);
  else wane_store_i64(dtype, out, 1, 1, &i);
}

/* ---------------------------------------------------------------- loading */

/* One piece of n elements `stride` apart. buffer: 8 * WANE_PIECE bytes. */
static wane_reduced piece_of(const wane_op *op, const char *x, int64_t stride, int64_t n, void *buffer) {
  int dtype = op->i[1];
  if (op->i[5]) return reduce_piece_i64(op->i[4], wane_load_i64(dtype, x, stride, n, buffer), n);
  return reduce_piece_f32(op->i[4], wane_load_f32(dtype, x, stride, n, buffer), n);
}

/* All n elements of one output. */
static wane_reduced whole_row(const wane_op *op, const char *x, int64_t stride, int64_t n, void *buffer) {
  int64_t size = wane_element_size(op->i[1]);
  wane_reduced r = piece_of(op, x, stride, n < WANE_PIECE ? n : WANE_PIECE, buffer);
  for (int64_t i = WANE_PIECE; i < n; i += WANE_PIECE) {
    wane_reduced next = piece_of(op, x + i * stride * size, stride, n - i < WANE_PIECE ? n - i : WANE_PIECE, buffer);
    merge(op->i[4], op->i[5], &r, &next);
  }
  return r;
}

/* Outputs that lie side by side while the reduced dimension strides: a tile of columns is turned, so that each line of
 * memory is read once. */
enum { TILE = 16 };
static void reduce_columns(const wane_op *op, char *out, int64_t out_stride, const char *x, int64_t column, int64_t columns, int64_t stride, int64_t n) {
  int64_t size = wane_element_size(op->i[1]);
  int integers = op->i[5];
  float *f = wane_scratch();                                 /* [TILE][WANE_PIECE] */
  int64_t *g = wane_scratch();
  wane_reduced state[TILE];
  for (int64_t i = 0; i < n; i += WANE_PIECE) {
    int64_t m = n - i < WANE_PIECE ? n - i : WANE_PIECE;
    for (int64_t r = 0; r < m; r++) {
      const char *row = x + (i + r) * stride * size;
      if (integers) {
        int64_t buffer[TILE];
        const i64u *v = wane_load_i64(op->i[1], row, column, columns, buffer);
        for (int64_t c = 0; c < columns; c++) g[c * WANE_PIECE + r] = v[c];
      } else {
        float buffer[TILE];
        const f32u *v = wane_load_f32(op->i[1], row, column, columns, buffer);
        for (int64_t c = 0; c < columns; c++) f[c * WANE_PIECE + r] = v[c];
      }
    }
    for (int64_t c = 0; c < columns; c++) {
      wane_reduced next = integers ? reduce_piece_i64(op->i[4], g + c * WANE_PIECE, m) : reduce_piece_f32(op->i[4], f + c * WANE_PIECE, m);
      if (i == 0) state[c] = next;
      else merge(op->i[4], integers, &state[c], &next);
    }
  }
  for (int64_t c = 0; c < columns; c++) finish(op->i[4], integers, &state[c], op->i[0], out + c * out_stride * wane_element_size(op->i[0]));
}

/* Sums (of squares) of a tile of columns without turning it: each row is added to one of eight lanes a column, so that the
 * additions are those of sum_piece and squares_piece, and nothing is turned. The case of bias gradients. */
static void sum_columns(const wane_op *op, char *out, int64_t out_stride, const char *x, int64_t column, int64_t columns, int64_t stride, int64_t n) {
  int64_t size = wane_element_size(op->i[1]);
  wane_reduced state[TILE];
  for (int64_t i = 0; i < n; i += WANE_PIECE) {
    int64_t m = n - i < WANE_PIECE ? n - i : WANE_PIECE;
    double lane[8][TILE] = { { 0 } };
    for (int64_t r = 0; r < m; r++) {
      float buffer[TILE];
      const f32u *v = wane_load_f32(op->i[1], x + (i + r) * stride * size, column, columns, buffer);
      double *to = lane[r % 8];
      if (op->i[4] == WANE_NORM2) for (int64_t c = 0; c < columns; c++) to[c] += (double)v[c] * (double)v[c];
      else if (columns == TILE) for (int64_t c = 0; c < TILE; c++) to[c] += (double)v[c];
      else for (int64_t c = 0; c < columns; c++) to[c] += (double)v[c];
    }
    for (int64_t c = 0; c < columns; c++) {
      double v[8];
      for (int j = 0; j < 8; j++) v[j] = lane[j][c];
      wane_reduced next = { add_lanes(v), 0, 0, -1, m };
      if (i == 0) state[c] = next;
      else merge(op->i[4], 0, &state[c], &next);
    }
  }
  for (int64_t c = 0; c < columns; c++) finish(op->i[4], 0, &state[c], op->i[0], out + c * out_stride * wane_element_size(op->i[0]));
}

/* ---------------------------------------------------------------- the kernels */

static void reduce_run(const wane_op *op, char *const p[], const int64_t st[], int64_t m) {
  int64_t n = op->n[7], stride = op->n[8], size = wane_element_size(op->i[1]), out_size = wane_element_size(op->i[0]);
  int64_t reach = stride < 0 ? -stride : stride, step = st[1] < 0 ? -st[1] : st[1];
  if (m > 1 && n > 1 && reach > step && step > 0) {
    int sums = !op->i[5] && (op->i[4] == WANE_SUM || op->i[4] == WANE_MEAN || op->i[4] == WANE_NORM2);
    for (int64_t i = 0; i < m; i += TILE)
      (sums ? sum_columns : reduce_columns)(op, p[0] + i * st[0] * out_size, st[0], p[1] + i * st[1] * size, st[1], m - i < TILE ? m - i : TILE, stride, n);
    return;
  }
  for (int64_t i = 0; i < m; i++) {
    wane_reduced r = whole_row(op, p[1] + i * st[1] * size, stride, n, wane_scratch());
    finish(op->i[4], op->i[5], &r, op->i[0], p[0] + i * st[0] * out_size);
  }
}

static void reduce_pieces(const wane_op *op, uint32_t chunk) {
  int64_t rows = op->n[0], pieces = op->n[1], n = op->n[7], size = wane_element_size(op->i[1]), lo, hi;
  wane_reduced *state = op->p[0];
  wane_op_range(op, chunk, rows * pieces, 1, &lo, &hi);
  for (int64_t u = lo; u < hi; u++) {
    int64_t at = u % pieces * WANE_PIECE, m = n - at < WANE_PIECE ? n - at : WANE_PIECE;
    const char *x = (const char *)op->p[1] + (u / pieces * op->n[2] + at * op->n[8]) * size;
    state[u] = piece_of(op, x, op->n[8], m, wane_scratch());
  }
}

static void reduce_merge(const wane_op *op) {
  int64_t pieces = op->n[1];
  for (int64_t row = 0; row < op->n[0]; row++) {
    const wane_reduced *state = (const wane_reduced *)op->p[1] + row * pieces;
    wane_reduced r = state[0];
    for (int64_t i = 1; i < pieces; i++) merge(op->i[4], op->i[5], &r, &state[i]);
    finish(op->i[4], op->i[5], &r, op->i[0], (char *)op->p[0] + row * wane_element_size(op->i[0]));
  }
}

static void kernel_reduce(const wane_op *op, uint32_t chunk) {
  if (op->i[6] == WANE_REDUCE_PIECES) reduce_pieces(op, chunk);
  else if (op->i[6] == WANE_REDUCE_MERGE) reduce_merge(op);
  else wane_walk(op, chunk, 2, 1, reduce_run);
}

/* Running sums of m rows side by side, f64 (or i64) inside, rounded as they are stored. */
static void cumsum_run(const wane_op *op, char *const p[], const int64_t st[], int64_t m) {
  int64_t size = wane_element_size(op->i[1]), out_size = wane_element_size(op->i[0]);
  enum { WIDE = 64 };
  for (int64_t i = 0; i < m; i += WIDE) {
    int64_t w = m - i < WIDE ? m - i : WIDE, sums[WIDE] = { 0 }, loaded[WIDE];
    double sum[WIDE] = { 0 };
    float in[WIDE], out[WIDE];
    for (int64_t r = 0; r < op->n[7]; r++) {
      const char *x = p[1] + (i * st[1] + r * op->n[8]) * size;
      char *y = p[0] + (i * st[0] + r * op->n[9]) * out_size;
      if (op->i[5]) {
        const i64u *v = wane_load_i64(op->i[1], x, st[1], w, loaded);
        for (int64_t c = 0; c < w; c++) sums[c] = (int64_t)((uint64_t)sums[c] + (uint64_t)v[c]);
        wane_store_i64(op->i[0], y, st[0], w, sums);
      } else {
        const f32u *v = wane_load_f32(op->i[1], x, st[1], w, in);
        for (int64_t c = 0; c < w; c++) sum[c] += (double)v[c], out[c] = (float)sum[c];
        wane_store_f32(op->i[0], y, st[0], w, out);
      }
    }
  }
}

static void kernel_cumsum(const wane_op *op, uint32_t chunk) { wane_walk(op, chunk, 2, 1, cumsum_run); }

static void register_reduce(wane_backend *b, const char *origin) {
  b->ops[WANE_OP_REDUCE] = kernel_reduce;
  b->ops[WANE_OP_CUMSUM] = kernel_cumsum;
  b->origin[WANE_OP_REDUCE] = b->origin[WANE_OP_CUMSUM] = origin;
}
