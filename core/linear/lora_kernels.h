/* lora_kernels.h: the low-rank products on the vectors of the including file (lora.h has the formulas and the record).
 *
 * The outputs of rank size are the register tile: TILE of them, r padded with zeros. Memory traffic is the limit at small ranks, so
 * ROWS reads x once, COLUMNS reads x and reads and writes y once; whatever is repeated (parts of W, sums) stays in the caches. */
#include "../ops/philox_vec.h"
#include "lora.h"

enum {
  TILE = VEC_REGISTERS / 4,                /* of r: a quarter of the registers for W, a quarter or three for sums */
  ROWS = 3,                                /* rows of x that share a register of W in ROWS */
  PIECE = 512,                             /* values of a row that ROWS takes at once, at most, */
  W_FLOATS = 16384,                        /* … and their part of W */
  SUM_FLOATS = 131072,                     /* sums of the rows that ROWS takes at once */
  STRIP = 256,                             /* columns that COLUMNS takes at once */
  BLOCK = 8                                /* rows that it takes at once: the next ones are fetched meanwhile, and rows may lie badly in a cache */
};
_Static_assert((W_FLOATS + SUM_FLOATS + ROWS * PIECE) * 4 <= WANE_SCRATCH, "ROWS fits into the scratch memory");
_Static_assert((2 * STRIP * WANE_LORA_MAX_RANK + BLOCK * (STRIP + VW + WANE_LORA_MAX_RANK)) * 4 <= WANE_SCRATCH, "COLUMNS fits into the scratch memory");

static int64_t padded(int64_t r) { return (r + TILE - 1) / TILE * TILE; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ================================================================ along rows */

/* Columns [c, c + n) of W [r, C] as [r / TILE][n / VW][TILE][VW], zeros past the end of both. */
static void pack_piece(float *to, const float *w, int64_t r, int64_t C, int64_t c, int64_t n) {
  for (int64_t j = 0; j < padded(r); j += TILE)
    for (int64_t k = 0; k < n; k += VW)
      for (int64_t i = j; i < j + TILE; i++, to += VW) vf_store(to, i < r ? vf_load_n(w + i * C + c + k, vec_left(k, n)) : vf_zero());
}

/* One register of each of `rows` rows times a tile of W. */
VEC void rows_step(vf s[ROWS][TILE], const void *x, int64_t at, int64_t stride, int left, const float *w, const int rows, const int dtype) {
  vf v[ROWS];
  for (int i = 0; i < rows; i++) v[i] = vf_get_n(x, dtype, at + i * stride, left);
#pragma GCC unroll 8
  for (int j = 0; j < TILE; j++) {
    vf wj = vf_load(w + j * VW);
#pragma GCC unroll 3
    for (int i = 0; i < rows; i++) s[i][j] = vf_fma(v[i], wj, s[i][j]);
  }
}

/* sums [rows][TILE][VW], rows `step` floats apart, (+)= n values of `rows` rows of x, `stride` apart, times a packed tile of W. */
VEC void rows_tile(float *sums, int64_t step, const void *x, int64_t at, int64_t stride, const float *w, int64_t n, int first, const int rows,
                   const int dtype) {
  vf s[ROWS][TILE];
  for (int i = 0; i < rows; i++) for (int j = 0; j < TILE; j++) s[i][j] = first ? vf_zero() : vf_load(sums + i * step + j * VW);
  int64_t k = 0;
  for (; k + VW <= n; k += VW, w += TILE * VW) rows_step(s, x, at + k, stride, VW, w, rows, dtype);
  if (k < n) rows_step(s, x, at + k, stride, (int)(n - k), w, rows, dtype);
  for (int i = 0; i < rows; i++) for (int j = 0; j < TILE; j++) vf_store(sums + i * step + j * VW, s[i][j]);
}

/* rows_tile for the whole rank, with constant dtype and number of rows (ROWS or 1). */
static void rows_tiles(float *sums, int64_t r, const void *x, int dtype, int64_t at, int64_t stride, const float *w, int64_t n, int first,
                       int64_t rows) {
  int64_t wide = padded(r), tile = (n + VW - 1) / VW * VW * TILE;
  for (int64_t i = 0, some; i < rows; i += some, sums += some * wide * VW, at += some * stride) {
    some = rows - i < ROWS ? 1 : ROWS;
    for (int64_t j = 0; j < wide; j += TILE) {
      float *s = sums + j * VW;
      const float *part = w + j / TILE * tile;
      if (some == ROWS && dtype == WANE_F32) rows_tile(s, wide * VW, x, at, stride, part, n, first, ROWS, WANE_F32);
      else if (some == ROWS && dtype == WANE_BF16) rows_tile(s, wide * VW, x, at, stride, part, n, first, ROWS, WANE_BF16);
      else if (some == ROWS) rows_tile(s, wide * VW, x, at, stride, part, n, first, ROWS, WANE_F16);
      else if (dtype == WANE_F32) rows_tile(s, wide * VW, x, at, stride, part, n, first, 1, WANE_F32);
      else if (dtype == WANE_BF16) rows_tile(s, wide * VW, x, at, stride, part, n, first, 1, WANE_BF16);
      else rows_tile(s, wide * VW, x, at, stride, part, n, first, 1, WANE_F16);
    }
  }
}

/* u [rows, r] = scale times the lanes of each of the sums [rows][padded r][VW], added up in a fixed tree. */
static void rows_finish(float *u, const float *sums, int64_t rows, int64_t r, float scale) {
  int64_t wide = padded(r), total = rows * wide;
  for (int64_t i = 0; i < total; i += VW, sums += VW * VW) {
    int left = vec_left(i, total);
    float lanes[VW];
    vf s[VW];
    for (int k = 0; k < VW; k++) s[k] = k < left ? vf_load(sums + k * VW) : vf_zero();
    vec_transpose(s);
    for (int half = VW / 2; half > 0; half /= 2) for (int k = 0; k < half; k++) s[k] = vf_add(s[k], s[k + half]);
    s[0] = vf_mul(s[0], vf_set1(scale));
    if (wide == r) { vf_put_n(u, WANE_F32, i, s[0], left); continue; }
    vf_store(lanes, s[0]);
    for (int k = 0; k < left; k++) if ((i + k) % wide < r) u[(i + k) / wide * r + (i + k) % wide] = lanes[k];
  }
}

/* Factors of the n elements of x from `at` on. */
static void factors_of(const wane_op *op, int64_t at, int64_t n, float *factors) {
  uint64_t e = (uint64_t)op->n[WANE_LORA_OFFSET] + (uint64_t)at;
  dropout_factors((uint64_t)op->n[WANE_LORA_SEED], e, n, op->f[WANE_LORA_THRESHOLD], op->f[WANE_LORA_KEPT], factors);
}

/* drop(x) of `rows` rows as f32, rows PIECE apart: n values of each from element `at` on, rows C apart. */
static void drop_rows(const wane_op *op, float *out, int64_t at, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; i++, at += op->n[WANE_LORA_C], out += PIECE) {
    factors_of(op, at, n, out);
    for (int64_t k = 0; k < n; k += VW) {
      int left = vec_left(k, n);
      vf_store(out + k, vf_mul(vf_load(out + k), vf_get_n(op->p[WANE_LORA_X], op->i[WANE_LORA_DTYPE], at + k, left)));
    }
  }
}

/* Rows [m, m + rows) of u, piece by piece of the columns. */
static void rows_block(const wane_op *op, int64_t m, int64_t rows) {
  int64_t C = op->n[WANE_LORA_C], r = op->n[WANE_LORA_R], wide = padded(r), piece = smaller(PIECE, W_FLOATS / wide / VW * VW);
  float *w = wane_scratch(), *sums = w + W_FLOATS, *dropped = sums + SUM_FLOATS;
  if (C == 0) memset(sums, 0, (size_t)(rows * wide * VW) * sizeof *sums);
  for (int64_t c = 0; c < C; c += piece) {
    int64_t n = smaller(piece, C - c), at = m * C + c;
    pack_piece(w, op->p[WANE_LORA_W], r, C, c, n);
    if (op->f[WANE_LORA_THRESHOLD] == 0) {
      rows_tiles(sums, r, op->p[WANE_LORA_X], op->i[WANE_LORA_DTYPE], at, C, w, n, c == 0, rows);
    } else {
      for (int64_t i = 0; i < rows; i += ROWS) {
        int64_t some = smaller(ROWS, rows - i);
        drop_rows(op, dropped, at + i * C, some, n);
        rows_tiles(sums + i * wide * VW, r, dropped, WANE_F32, 0, PIECE, w, n, c == 0, some);
      }
    }
  }
  rows_finish((float *)op->p[WANE_LORA_U] + m * r, sums, rows, r, op->f[WANE_LORA_SCALE]);
}

static void VEC_NAME(lora_rows)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi, step = SUM_FLOATS / VW / padded(op->n[WANE_LORA_R]);
  wane_op_range(op, chunk, op->n[WANE_LORA_M], ROWS, &lo, &hi);
  if (step > 96) step = 96;
  step = step / ROWS * ROWS;
  for (int64_t m = lo; m < hi; m += step) rows_block(op, m, smaller(step, hi - m));
}

/* ================================================================ down columns */

/* What a strip of columns [c, c + width) keeps in the scratch memory. w and g: [r / TILE][width / VW][TILE][VW]. */
typedef struct strip {
  int64_t c, width, vectors;
  float *w, *g, *factors, *partial, *padded_u;
} strip;

/* Columns of W into the strip, and into the copy where one is wanted. */
static void strip_load(const wane_op *op, const strip *t) {
  int64_t C = op->n[WANE_LORA_C], r = op->n[WANE_LORA_R], turned = op->i[WANE_LORA_TURNED];
  const float *w = op->p[WANE_LORA_W];
  float *copy = op->p[WANE_LORA_COPY], *to = t->w;
  for (int64_t j0 = 0; j0 < padded(r); j0 += TILE)
    for (int64_t v = 0; v < t->vectors; v++)
      for (int64_t j = j0; j < j0 + TILE; j++, to += VW) {
        int left = vec_left(v * VW, t->width);
        int64_t c = t->c + v * VW;
        for (int i = 0; i < VW; i++) to[i] = j >= r || i >= left ? 0.0f : turned ? w[(c + i) * r + j] : w[j * C + c + i];
        if (copy && j < r) memcpy(copy + j * C + c, to, (size_t)left * sizeof *to);
      }
}

/* The strip's sums to dW, which is laid out as W. */
static void strip_store(const wane_op *op, const strip *t) {
  int64_t C = op->n[WANE_LORA_C], r = op->n[WANE_LORA_R], turned = op->i[WANE_LORA_TURNED];
  float *dw = op->p[WANE_LORA_DW];
  const float *from = t->g;
  for (int64_t j0 = 0; j0 < padded(r); j0 += TILE)
    for (int64_t v = 0; v < t->vectors; v++)
      for (int64_t j = j0; j < j0 + TILE; j++, from += VW) {
        int left = j < r ? vec_left(v * VW, t->width) : 0;
        int64_t c = t->c + v * VW;
        for (int i = 0; i < left; i++) dw[turned ? (c + i) * r + j : j * C + c + i] = from[i];
      }
}

/* One register of columns, a tile of the rank, `rows` rows from element `at` on. u: rows `step` floats apart. first, last: the tile is the first,
 * the last of the rank, whose sums for y wait in `partial` between tiles. */
VEC void columns_tile(const wane_op *op, const float *w, float *g, const float *u, int64_t step, const float *factors, float *partial, int64_t at,
                      int64_t rows, const int left, int first, int last, const int to_y, const int to_dw, const int drop, const int dtype) {
  int64_t C = op->n[WANE_LORA_C], ahead = (at + BLOCK * C) * (dtype == WANE_F32 ? 4 : 2), row = C * (dtype == WANE_F32 ? 4 : 2);
  vf wj[TILE], gj[TILE];
  for (int j = 0; j < TILE; j++) {
    wj[j] = to_y ? vf_load(w + j * VW) : vf_zero();
    gj[j] = to_dw ? vf_load(g + j * VW) : vf_zero();
  }
  for (int64_t m = 0; m < rows; m++, at += C, u += step, ahead += row) {
    if (to_dw && first) __builtin_prefetch((const char *)op->p[WANE_LORA_X] + ahead);
    if (to_y && first) __builtin_prefetch((const char *)op->p[WANE_LORA_Y] + ahead, 1);
    vf d = to_y && !first ? vf_load(partial + m * VW) : vf_zero(), x = to_dw ? vf_get_n(op->p[WANE_LORA_X], dtype, at, left) : d;
    vf factor = drop ? vf_load(factors + m * STRIP) : d;
    if (drop && to_dw) x = vf_mul(x, factor);
#pragma GCC unroll 8
    for (int j = 0; j < TILE; j++) {
      vf uj = vf_set1(u[j]);
      if (to_y) d = vf_fma(uj, wj[j], d);
      if (to_dw) gj[j] = vf_fma(uj, x, gj[j]);
    }
    if (to_y && !last) vf_store(partial + m * VW, d);
    if (to_y && last) {
      if (drop) d = vf_mul(d, factor);
      vf_put_n(op->p[WANE_LORA_Y], dtype, at, vf_add(vf_get_n(op->p[WANE_LORA_Y], dtype, at, left), d), left);
    }
  }
  if (to_dw) for (int j = 0; j < TILE; j++) vf_store(g + j * VW, gj[j]);
}

/* Rows [m, m + rows) of the strip. */
VEC void columns_rows(const wane_op *op, const strip *t, int64_t m, int64_t rows, const int to_y, const int to_dw, const int drop, const int dtype) {
  int64_t C = op->n[WANE_LORA_C], r = op->n[WANE_LORA_R], wide = padded(r), tile = t->vectors * TILE * VW;
  const float *u = (const float *)op->p[WANE_LORA_U] + m * r;
  if (wide != r) {
    memset(t->padded_u, 0, (size_t)(rows * wide) * sizeof *u);
    for (int64_t i = 0; i < rows; i++) memcpy(t->padded_u + i * wide, u + i * r, (size_t)r * sizeof *u);
    u = t->padded_u;
  }
  for (int64_t v = 0; v < t->vectors; v++)
    for (int64_t j = 0; j < wide; j += TILE) {
      int64_t at = j / TILE * tile + v * TILE * VW, x = m * C + t->c + v * VW;
      int left = vec_left(v * VW, t->width), first = j == 0, last = j + TILE == wide;
      const float *factors = t->factors + v * VW;
      if (left == VW) columns_tile(op, t->w + at, t->g + at, u + j, wide, factors, t->partial, x, rows, VW, first, last, to_y, to_dw, drop, dtype);
      else columns_tile(op, t->w + at, t->g + at, u + j, wide, factors, t->partial, x, rows, left, first, last, to_y, to_dw, drop, dtype);
    }
}

/* columns_rows with constant parts: what is wanted, and whether elements are dropped. */
VEC void columns_parts(const wane_op *op, const strip *t, int64_t m, int64_t rows, const int dtype) {
  int drop = op->f[WANE_LORA_THRESHOLD] != 0;
  if (!op->p[WANE_LORA_DW]) columns_rows(op, t, m, rows, 1, 0, 0, dtype);
  else if (!op->p[WANE_LORA_Y]) {
    if (drop) columns_rows(op, t, m, rows, 0, 1, 1, dtype);
    else columns_rows(op, t, m, rows, 0, 1, 0, dtype);
  } else {
    if (drop) columns_rows(op, t, m, rows, 1, 1, 1, dtype);
    else columns_rows(op, t, m, rows, 1, 1, 0, dtype);
  }
}

/* A strip from its first row to its last. */
static void columns_strip(const wane_op *op, const strip *t) {
  int64_t C = op->n[WANE_LORA_C], M = op->n[WANE_LORA_M];
  int dtype = op->i[WANE_LORA_DTYPE];
  strip_load(op, t);
  if (op->p[WANE_LORA_DW]) memset(t->g, 0, (size_t)(t->vectors * VW * padded(op->n[WANE_LORA_R])) * sizeof *t->g);
  if (!op->p[WANE_LORA_DW] && !op->p[WANE_LORA_Y]) return;
  for (int64_t m = 0; m < M; m += BLOCK) {
    int64_t rows = smaller(BLOCK, M - m);
    if (op->f[WANE_LORA_THRESHOLD] != 0)
      for (int64_t i = 0; i < rows; i++) factors_of(op, (m + i) * C + t->c, t->width, t->factors + i * STRIP);
    if (dtype == WANE_F32) columns_parts(op, t, m, rows, WANE_F32);
    else if (dtype == WANE_BF16) columns_parts(op, t, m, rows, WANE_BF16);
    else columns_parts(op, t, m, rows, WANE_F16);
  }
  if (op->p[WANE_LORA_DW]) strip_store(op, t);
}

static void VEC_NAME(lora_columns)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi, wide = padded(op->n[WANE_LORA_R]);
  strip t;
  t.w = wane_scratch();
  t.g = t.w + STRIP * wide;
  t.factors = t.g + STRIP * wide;
  t.partial = t.factors + BLOCK * STRIP;
  t.padded_u = t.partial + BLOCK * VW;
  wane_op_range(op, chunk, op->n[WANE_LORA_C], 64, &lo, &hi);
  for (t.c = lo; t.c < hi; t.c += STRIP) {
    t.width = smaller(STRIP, hi - t.c);
    t.vectors = (t.width + VW - 1) / VW;
    columns_strip(op, &t);
  }
}

static void lora_register(wane_backend *b) {
  b->ops[WANE_OP_LORA_ROWS] = VEC_NAME(lora_rows);
  b->ops[WANE_OP_LORA_COLUMNS] = VEC_NAME(lora_columns);
}
