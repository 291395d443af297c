/* nn_attention_kernels.h: blockwise attention with an online softmax (Milakov & Gimelshein 2018; Dao 2022).
 *
 * The query heads that share a kv head are rows of one matrix: row r of (batch b, kv head g) is time r / G, head g * G + r % G,
 * where G = H / KV. A chunk takes a block of rows through the keys, KEYS at a time: scores = Q K^T, weights = 2^(score - max),
 * sums += weights V. Both products run on one register tile of up to six rows whose sums go over the inner index in order, lane by
 * lane, and the keys are cut at fixed places: a row's result does not depend on which rows are computed with it.
 *
 * Scores live in the base-2 domain: log2(e) is folded into q.
 *
 * Record of WANE_OP_ATTENTION
 *   p  0 out [B, T, H, D] contiguous   1 q   2 k   3 v   4 key mask u8 or NULL   5 bias f32 or NULL   6 partial sums or NULL
 *      7 lse f32 [B, H, T] or NULL     8 first keys i32 [B, T] or NULL
 *   n  0 B   1 H   2 KV   3 T   4 D   5 keys   6 time of q's first row   7 window (0: none)   8 rows a block   9 key mask's row stride
 *  10 pieces when split, else 0
 *   stride  0 q (b, t, h)   1 k (b, kv head, t)   2 v   3 bias (b, h, t, key)
 *   f  0 scale   1 softcap (0: none)      i  0 q's dtype   1 k's   2 v's   3 causal
 * Not split: chunk = (b, kv head, row block), the last row blocks first, since causal ones are the longest. Split: units
 * (b, kv head, piece) dealt to chunks; partial sums [B, KV, pieces, rows, wane_attention_partial(D)] go to p[6] and
 * WANE_OP_ATTENTION_MERGE (same record) makes rows of them. */
#ifndef WANE_NN_ATTENTION_KERNELS_H
#define WANE_NN_ATTENTION_KERNELS_H
#include "../x86/vec_math.h"
#include "nn.h"
#include <math.h>

enum { KEYS = WANE_ATTENTION_KEYS, TILE = WANE_ATTENTION_TILE };

/* One chunk's place in the work and its scratch memory. DP: D padded to whole vectors. */
typedef struct attention_block {
  const wane_op *op;
  int64_t b, head, kv, row0, rows;     /* batch, first query head / G, kv head, first row and number of rows */
  int64_t D, DP, G;
  float *q, *kt, *v, *scores;          /* [rows, D], [D, KEYS], [KEYS, DP], [TILE, KEYS] */
  float *sum, *max, *weight;           /* of the piece: [rows, DP], [rows], [rows] */
  float *total, *total_max, *total_weight;
  float mask[KEYS];                    /* of the current keys: 1 where the key mask lets one through */
} attention_block;

/* ---------------------------------------------------------------- the register tile */

/* c[R, NV vectors] (+)= a[R, k] * b[k, NV vectors]. R and NV are constants: the sums stay in registers. Meanwhile the memory from
 * `next` on is asked for, LINES cache lines a step, so that few rows (decode) are not held up by the next keys; a hint only. */
VEC void product_tile(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t k, const int R, const int NV, int add,
                      const char *next, const int LINES) {
  vf sum[TILE][8];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) sum[r][n] = add ? vf_load(c + r * ldc + n * VW) : vf_zero();
  for (int64_t i = 0; i < k; i++, b += ldb, next += 64 * LINES) {
#pragma GCC unroll 4
    for (int n = 0; n < LINES; n++) __builtin_prefetch(next + 64 * n);
    if (NV > R) {                                     /* hold the shorter side of the tile in registers */
      vf x[TILE];
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) x[r] = vf_set1(a[r * lda + i]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) {
        vf w = vf_load(b + n * VW);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) sum[r][n] = vf_fma(x[r], w, sum[r][n]);
      }
    } else {
      vf w[8];
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) w[n] = vf_load(b + n * VW);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        vf x = vf_set1(a[r * lda + i]);
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) sum[r][n] = vf_fma(x, w[n], sum[r][n]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) vf_store(c + r * ldc + n * VW, sum[r][n]);
}

/* The same for any number of vectors, as wide as the registers allow: enough independent sums to hide the FMA's latency. */
VEC void product_rows(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t k, int vectors, const int R, int add,
                      const char *next) {
  const int wide = VEC_REGISTERS == 32 ? 4 : R == 1 ? 8 : R <= 3 ? 4 : 2, lines = R <= 3 ? wide / 2 : 0;
  int whole = vectors / wide * wide;
  for (int n = 0; n < whole; n += wide, next += 64 * lines * k) product_tile(a, lda, b + n * VW, ldb, c + n * VW, ldc, k, R, wide, add, next, lines);
  for (int n = whole; n < vectors; n++) product_tile(a, lda, b + n * VW, ldb, c + n * VW, ldc, k, R, 1, add, next, 0);
}

static void product(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t k, int vectors, int rows, int add,
                    const char *next) {
  switch (rows) {
  case 1: product_rows(a, lda, b, ldb, c, ldc, k, vectors, 1, add, next); break;
  case 2: product_rows(a, lda, b, ldb, c, ldc, k, vectors, 2, add, next); break;
  case 3: product_rows(a, lda, b, ldb, c, ldc, k, vectors, 3, add, next); break;
  case 4: product_rows(a, lda, b, ldb, c, ldc, k, vectors, 4, add, next); break;
  case 5: product_rows(a, lda, b, ldb, c, ldc, k, vectors, 5, add, next); break;
  default: product_rows(a, lda, b, ldb, c, ldc, k, vectors, 6, add, next); break;
  }
}

/* ---------------------------------------------------------------- packing */

/* The block's rows of q, times the scale, as f32 [rows, D]. */
static void pack_q(const attention_block *a) {
  const wane_op *op = a->op;
  const int64_t *st = op->stride[0];
  vf scale = vf_set1(op->f[1] != 0.0f ? op->f[0] : op->f[0] * 1.44269504f);
  for (int64_t r = 0; r < a->rows; r++) {
    int64_t t = (a->row0 + r) / a->G, h = a->head * a->G + (a->row0 + r) % a->G, at = a->b * st[0] + t * st[1] + h * st[2];
    for (int64_t d = 0; d < a->D; d += VW) {
      int n = vec_left(d, a->D);
      vf_put_n(a->q + r * a->D, WANE_F32, d, vf_mul(vf_get_n(op->p[1], op->i[0], at + d, n), scale), n);
    }
  }
}

/* kt [D, KEYS] = transposed k rows j0 .. j0 + n - 1; columns beyond n are 0. A constant dtype leaves one kind of load. */
VEC void pack_k_as(const attention_block *a, int64_t j0, int n, const int dtype) {
  const int64_t *st = a->op->stride[1], size = dtype == WANE_F32 ? 4 : 2;
  const char *base = (const char *)a->op->p[2] + (a->b * st[0] + a->kv * st[1] + j0 * st[2]) * size;
  int64_t row = st[2] * size, whole = a->D / VW * VW;
  for (int j = 0; j < KEYS; j += VW) {
    const char *from = base + j * row;
    float *out = a->kt + j;
    vf r[VW];
    if (j + VW <= n) {
      for (int64_t d = 0; d < whole; d += VW, out += VW * KEYS) {
        vec_load_transposed(r, from + d * size, row, dtype);
#pragma GCC unroll 16
        for (int i = 0; i < VW; i++) vf_store(out + i * KEYS, r[i]);
      }
      if (whole == a->D) continue;
    }
    for (int64_t d = j + VW <= n ? whole : 0; d < a->D; d += VW, out += VW * KEYS) {
      int left = vec_left(d, a->D);
      for (int i = 0; i < VW; i++) r[i] = j + i < n ? vf_get_n(from + i * row, dtype, d, left) : vf_zero();
      vec_transpose(r);
      for (int i = 0; i < left; i++) vf_store(out + i * KEYS, r[i]);
    }
  }
}

static void pack_k(const attention_block *a, int64_t j0, int n) {
  if (a->op->i[1] == WANE_F32) pack_k_as(a, j0, n, WANE_F32);
  else if (a->op->i[1] == WANE_BF16) pack_k_as(a, j0, n, WANE_BF16);
  else pack_k_as(a, j0, n, WANE_F16);
}

VEC void pack_v_as(const attention_block *a, const void *v, int64_t base, int64_t stride, int n, const int dtype) {
  const int64_t D = a->D, DP = a->DP, whole = D / VW * VW;
  float *out = a->v;
  for (int j = 0; j < n; j++, out += DP, base += stride) {
    for (int64_t d = 0; d < whole; d += VW) vf_store(out + d, vf_get(v, dtype, base + d));
    if (whole < D) vf_store(out + whole, vf_get_n(v, dtype, base + whole, (int)(D - whole)));
  }
}

/* v rows j0 .. j0 + n - 1 as f32 with a stride: where they lie if they are f32 and fill whole vectors, else a copy. */
static const float *pack_v(const attention_block *a, int64_t j0, int n, int64_t *stride) {
  const int64_t *st = a->op->stride[2];
  int64_t base = a->b * st[0] + a->kv * st[1] + j0 * st[2];
  if (a->op->i[2] == WANE_F32 && a->D == a->DP) {
    *stride = st[2];
    return (const float *)a->op->p[3] + base;
  }
  *stride = a->DP;
  if (a->op->i[2] == WANE_F32) pack_v_as(a, a->op->p[3], base, st[2], n, WANE_F32);
  else if (a->op->i[2] == WANE_BF16) pack_v_as(a, a->op->p[3], base, st[2], n, WANE_BF16);
  else pack_v_as(a, a->op->p[3], base, st[2], n, WANE_F16);
  return a->v;
}

/* ---------------------------------------------------------------- softmax */

/* Keys [*lo, *hi) that row r (of the block) may see, the key mask aside. */
static void visible_keys(const attention_block *a, int64_t r, int64_t *lo, int64_t *hi) {
  const wane_op *op = a->op;
  int64_t row = (a->row0 + r) / a->G, time = op->n[6] + row, keys = op->n[5], window = op->n[7];
  *lo = window > 0 && time - window + 1 > 0 ? time - window + 1 : 0;
  if (op->p[8]) {
    int64_t first = ((const int32_t *)op->p[8])[a->b * op->n[3] + row];
    if (first > *lo) *lo = first;
  }
  *hi = op->i[3] && time + 1 < keys ? time + 1 : keys;
}

/* Softcap on one row of scores. */
static void cap_scores(const attention_block *a, float *s) {
  vf inverse = vf_set1(1.0f / a->op->f[1]), cap = vf_set1(a->op->f[1] * 1.44269504f);
  for (int j = 0; j < KEYS; j += VW) vf_store(s + j, vf_mul(cap, vec_tanh(vf_mul(vf_load(s + j), inverse))));
}

/* Bias and masks on one row of scores for keys j0 .. j0 + n - 1: what is not seen becomes -inf. */
static void dress_scores(const attention_block *a, float *s, int64_t r, int64_t j0, int n, int masked) {
  const wane_op *op = a->op;
  static const float ramp[KEYS] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63 };
  if (op->p[5]) {
    const int64_t *st = op->stride[3];
    int64_t t = (a->row0 + r) / a->G, h = a->head * a->G + (a->row0 + r) % a->G;
    const float *bias = (const float *)op->p[5] + a->b * st[0] + h * st[1] + t * st[2];
    if (st[3] == 1 && n == KEYS) {
      for (int j = 0; j < KEYS; j += VW) vf_store(s + j, vf_fma(vf_load(bias + j0 + j), vf_set1(1.44269504f), vf_load(s + j)));
    } else {
      for (int j = 0; j < n; j += VW) {                 /* the same arithmetic for the ends and for strides */
        float x[VW] = { 0 };
        for (int i = 0; i < VW && j + i < n; i++) x[i] = bias[(j0 + j + i) * st[3]];
        vf_store(s + j, vf_fma(vf_load(x), vf_set1(1.44269504f), vf_load(s + j)));
      }
    }
  }
  int64_t lo, hi;
  visible_keys(a, r, &lo, &hi);
  if (lo <= j0 && hi >= j0 + KEYS && !masked) return;
  lo -= j0; hi -= j0;
  vf first = vf_set1((float)(lo < 0 ? 0 : lo > KEYS ? KEYS : lo)), last = vf_set1((float)(hi < 0 ? 0 : hi > n ? n : hi));
  vf hidden = vf_set1(-__builtin_inff());
  for (int j = 0; j < KEYS; j += VW) {
    vf i = vf_load(ramp + j), x = vf_load(s + j);
    x = vf_select(vf_le(first, i), x, hidden);
    x = vf_select(vf_lt(i, last), x, hidden);
    if (masked) x = vf_select(vf_lt(vf_zero(), vf_load(a->mask + j)), x, hidden);
    vf_store(s + j, x);
  }
}

/* 2^x of one number by the vectors' own formula. */
static float exp2_negative(float x) {
  float out[VW];
  vf_store(out, vec_exp2_negative(vf_set1(x)));
  return out[0];
}

/* Turns one row of scores into weights and brings the row's running sums to the new maximum. */
static void weigh_row(const attention_block *a, float *s, int64_t r) {
  vf m = vf_set1(-__builtin_inff());
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; j += VW) m = vf_max(m, vf_load(s + j));
  float old = a->max[r], now = vf_hmax(m);
  if (!(now > old)) now = old;
  if (now == -__builtin_inff()) {                     /* nothing seen yet, or NaN alone, which no maximum shows */
    int unknown = 0;
    for (int j = 0; j < KEYS; j++) unknown |= s[j] != s[j];
    if (!unknown) {
      memset(s, 0, KEYS * sizeof *s);
      return;
    }
    now = 0.0f;
  }
  m = vf_set1(now);
  vf total = vf_zero();
#pragma GCC unroll 2
  for (int j = 0; j < KEYS; j += VW) {
    vf w = vec_exp2_negative(vf_sub(vf_load(s + j), m));
    total = vf_add(total, w);
    vf_store(s + j, w);
  }
  float weight = vf_sum(total);
  if (now != old) {
    float shrink = exp2_negative(old - now);
    float *sum = a->sum + r * a->DP;
    for (int64_t d = 0; d < a->DP; d += VW) vf_store(sum + d, vf_mul(vf_load(sum + d), vf_set1(shrink)));
    a->weight[r] *= shrink;
    a->max[r] = now;
  }
  a->weight[r] += weight;
}

/* ---------------------------------------------------------------- blocks and pieces */

/* Whether some row of [r, r + rows) sees a key of [j0, j1), and whether all of them see all. */
static int sees(const attention_block *a, int64_t r, int64_t rows, int64_t j0, int64_t j1, int *all) {
  int64_t lo0, hi0, lo1, hi1;
  visible_keys(a, r, &lo0, &hi0);
  visible_keys(a, r + rows - 1, &lo1, &hi1);
  for (int64_t i = 0; a->op->p[8] && i < rows; i++) {     /* first keys may go up and down; all else rises along the rows */
    int64_t lo, hi;
    visible_keys(a, r + i, &lo, &hi);
    if (lo < lo0) lo0 = lo;
    if (lo > lo1) lo1 = lo;
  }
  *all = j0 >= lo1 && j1 <= hi0;
  return lo0 < j1 && hi1 > j0;
}

/* Where the keys after the block at j0 begin in k or v. */
static const char *next_keys(const void *x, int dtype, const int64_t *st, const attention_block *a, int64_t j0) {
  return (const char *)x + (a->b * st[0] + a->kv * st[1] + (j0 + KEYS) * st[2]) * (dtype == WANE_F32 ? 4 : 2);
}

/* All rows of the block against keys j0 .. j0 + n - 1. */
static void attend_keys(attention_block *a, int64_t j0, int n) {
  const wane_op *op = a->op;
  int masked = op->p[4] != NULL, all;
  if (!sees(a, 0, a->rows, j0, j0 + n, &all)) return;
  if (masked) {
    const uint8_t *mask = (const uint8_t *)op->p[4] + a->b * op->n[9] + j0;
    for (int j = 0; j < KEYS; j++) a->mask[j] = j < n && mask[j] ? 1.0f : 0.0f;
  }
  int64_t v_stride;
  pack_k(a, j0, n);
  const float *v = pack_v(a, j0, n, &v_stride);
  const char *next_k = next_keys(op->p[2], op->i[1], op->stride[1], a, j0), *next_v = next_keys(op->p[3], op->i[2], op->stride[2], a, j0);
  for (int64_t r = 0; r < a->rows; r += TILE) {
    int rows = a->rows - r < TILE ? (int)(a->rows - r) : TILE;
    if (!sees(a, r, rows, j0, j0 + KEYS, &all)) continue;
    product(a->q + r * a->D, a->D, a->kt, KEYS, a->scores, KEYS, a->D, KEYS / VW, rows, 0, next_k);
    int dress = masked || !all || op->p[5];
    for (int i = 0; i < rows; i++) {
      if (op->f[1] != 0.0f) cap_scores(a, a->scores + i * KEYS);
      if (dress) dress_scores(a, a->scores + i * KEYS, r + i, j0, n, masked);
      weigh_row(a, a->scores + i * KEYS, r + i);
    }
    product(a->scores, KEYS, v, v_stride, a->sum + r * a->DP, a->DP, n, (int)(a->DP / VW), rows, 1, next_v);
  }
}

/* Sums over the keys of one piece, from nothing. */
static void attend_piece(attention_block *a, int64_t piece) {
  int64_t j = piece * WANE_ATTENTION_PIECE, end = j + WANE_ATTENTION_PIECE < a->op->n[5] ? j + WANE_ATTENTION_PIECE : a->op->n[5];
  memset(a->sum, 0, (size_t)(a->rows * a->DP) * sizeof(float));
  for (int64_t r = 0; r < a->rows; r++) { a->max[r] = -__builtin_inff(); a->weight[r] = 0.0f; }
  for (; j < end; j += KEYS) attend_keys(a, j, end - j < KEYS ? (int)(end - j) : KEYS);
}

/* total (+)= a piece's sums of one row. Both lie as [DP] with a maximum and a weight. */
static void merge_row(float *total, float *total_max, float *total_weight, const float *sum, float max, float weight, int64_t DP) {
  if (max == -__builtin_inff()) return;
  float now = max > *total_max ? max : *total_max;
  float keep = exp2_negative(*total_max - now), take = exp2_negative(max - now);
  vf k = vf_set1(keep), t = vf_set1(take);
  for (int64_t d = 0; d < DP; d += VW) vf_store(total + d, vf_fma(vf_load(total + d), k, vf_mul(vf_load(sum + d), t)));
  *total_weight = *total_weight * keep + weight * take;
  *total_max = now;
}

/* Row r of the block's (b, kv head): total / weight into the output; the logarithm (of base 2) of its scores' sum where it is wanted. */
static void write_row(const wane_op *op, int64_t b, int64_t head, int64_t row, const float *total, float max, float weight) {
  int64_t H = op->n[1], T = op->n[3], D = op->n[4], G = H / op->n[2];
  int64_t at = ((b * T + row / G) * H + head * G + row % G) * D;
  if (op->p[7]) ((float *)op->p[7])[(b * H + head * G + row % G) * T + row / G] = weight == 0.0f ? __builtin_inff() : max + log2f(weight);
  vf scale = vf_set1(weight == 0.0f ? 0.0f : 1.0f / weight);
  for (int64_t d = 0; d < D; d += VW) vf_put_n(op->p[0], op->i[0], at + d, vf_mul(vf_load(total + d), scale), vec_left(d, D));
}

/* Carves the scratch memory; the largest D with the smallest row block still fits (nn_attention.c sees to that). */
static void block_open(attention_block *a, const wane_op *op, int64_t b, int64_t head, int64_t row0, int64_t rows) {
  float *p = wane_scratch();
  a->op = op; a->b = b; a->head = a->kv = head; a->row0 = row0; a->rows = rows;
  a->D = op->n[4]; a->DP = (a->D + VW - 1) / VW * VW; a->G = op->n[1] / op->n[2];
  a->kt = p; p += a->D * KEYS;
  a->v = p; p += a->DP * KEYS;
  a->scores = p; p += TILE * KEYS;
  a->sum = p; p += rows * a->DP;
  a->total = p; p += rows * a->DP;
  a->max = p; p += rows;
  a->weight = p; p += rows;
  a->total_max = p; p += rows;
  a->total_weight = p; p += rows;
  a->q = p;
  pack_q(a);
}

static void attention_whole(const wane_op *op, uint32_t chunk) {
  int64_t KV = op->n[2], all_rows = op->n[3] * (op->n[1] / KV), per = op->n[8], blocks = (all_rows + per - 1) / per;
  int64_t heads = op->n[0] * KV, unit = (int64_t)op->nchunks - 1 - chunk, block = unit / heads, head = unit % heads;
  attention_block a;
  block_open(&a, op, head / KV, head % KV, block * per, block + 1 < blocks ? per : all_rows - block * per);
  memset(a.total, 0, (size_t)(a.rows * a.DP) * sizeof(float));
  for (int64_t r = 0; r < a.rows; r++) { a.total_max[r] = -__builtin_inff(); a.total_weight[r] = 0.0f; }
  int all;
  for (int64_t j = 0; j < op->n[5]; j += WANE_ATTENTION_PIECE) {
    if (!sees(&a, 0, a.rows, j, j + WANE_ATTENTION_PIECE, &all)) continue;
    attend_piece(&a, j / WANE_ATTENTION_PIECE);
    for (int64_t r = 0; r < a.rows; r++)
      merge_row(a.total + r * a.DP, &a.total_max[r], &a.total_weight[r], a.sum + r * a.DP, a.max[r], a.weight[r], a.DP);
  }
  for (int64_t r = 0; r < a.rows; r++) write_row(op, a.b, a.head, a.row0 + r, a.total + r * a.DP, a.total_max[r], a.total_weight[r]);
}

static void attention_split(const wane_op *op, uint32_t chunk) {
  int64_t KV = op->n[2], pieces = op->n[10], rows = op->n[3] * (op->n[1] / KV), part = wane_attention_partial(op->n[4]), lo, hi;
  wane_op_range(op, chunk, op->n[0] * KV * pieces, 1, &lo, &hi);
  for (int64_t unit = lo; unit < hi; unit++) {
    attention_block a;
    int64_t head = unit / pieces;
    block_open(&a, op, head / KV, head % KV, 0, rows);
    attend_piece(&a, unit % pieces);
    for (int64_t r = 0; r < rows; r++) {
      float *out = (float *)op->p[6] + (unit * rows + r) * part;
      memcpy(out, a.sum + r * a.DP, (size_t)a.DP * sizeof(float));
      out[part - 16] = a.max[r];
      out[part - 15] = a.weight[r];
    }
  }
}

static void VEC_NAME(wane_nn_attention)(const wane_op *op, uint32_t chunk) {
  if (op->p[6]) attention_split(op, chunk);
  else attention_whole(op, chunk);
}

static void VEC_NAME(wane_nn_attention_merge)(const wane_op *op, uint32_t chunk) {
  int64_t KV = op->n[2], pieces = op->n[10], rows = op->n[3] * (op->n[1] / KV), D = op->n[4], part = wane_attention_partial(D), lo, hi;
  int64_t DP = (D + VW - 1) / VW * VW;
  float *total = wane_scratch();
  wane_op_range(op, chunk, op->n[0] * KV * rows, 1, &lo, &hi);
  for (int64_t unit = lo; unit < hi; unit++) {
    int64_t head = unit / rows, r = unit % rows;
    float max = -__builtin_inff(), weight = 0.0f;
    memset(total, 0, (size_t)DP * sizeof(float));
    for (int64_t k = 0; k < pieces; k++) {
      const float *from = (const float *)op->p[6] + ((head * pieces + k) * rows + r) * part;
      merge_row(total, &max, &weight, from, from[part - 16], from[part - 15], DP);
    }
    write_row(op, head / KV, head % KV, r, total, max, weight);
  }
}
#endif
