/* tiles_attention.h: attention in training, and its gradient, with bf16 tiles: what nn_attention_kernels.h and nn_attention_back_kernels.h do, read
 * their records, formulas and phases there.
 *
 * Scores lie turned, a row of a tile for a key and a lane for a row of q (times are lanes): sums over keys then run down a register, and every
 * product finds its operands as they come. With [x] for what is packed, pairs for two rows of it interleaved:
 *
 *   forward    Sᵀ = K [Qᵀ]      Oᵀ = [Vᵀ] Pᵀ pairs
 *   backward   Sᵀ = K [Qᵀ]      dPᵀ = V [dOᵀ]      dV = Pᵀ [dO pairs]      dK = dSᵀ [Q pairs]      dQᵀ = [Kᵀ] dSᵀ pairs
 *
 * A block of rows meets a block of keys in squares of 32 by 32, of which those that no row sees cost nothing; sums stay in tiles across the squares that
 * meet in them. P and dS are rounded to bf16 on their way into products, as q, k, v and dout are given; sums are f32. Other dtypes, biases, softcaps and wide heads,
 * and generation (no lse is wanted: a row must not depend on how many are computed at once) go to the kernels with vectors. */
#ifndef WANE_TILES_ATTENTION_H
#define WANE_TILES_ATTENTION_H
#define WANE_VEC 512
#define WANE_VEC_BF16
#include "../x86/tiles.h"
#include "../x86/transpose16.h"
#include "../x86/vec_math.h"
#include "nn.h"
#include <string.h>

enum { KEYS = 128, ROWS = 128, FORWARD_ROWS = 96, SQUARE = 32, WIDEST = 256 };   /* a block of keys, of rows */
enum { ROW_TILES = ROWS / 16, ROW_STEPS = ROWS / SQUARE, KEY_TILES = KEYS / 16, KEY_STEPS = KEYS / SQUARE };
enum { FIXED_ROOM = 576 << 10 };                       /* of the scratch in the backward: all but the keys' tiles */
enum { UNITS_WANTED = 8 };

/* The kernels that do what tiles do not. */
static void (*vectors_forward)(const wane_op *, uint32_t), (*vectors_backward)(const wane_op *, uint32_t);

static int fits(const wane_op *op) {
  return op->i[0] == WANE_BF16 && op->i[1] == WANE_BF16 && op->i[2] == WANE_BF16 && !op->p[5] && op->f[0] >= 0.0f && op->f[1] == 0.0f && op->n[4] <= WIDEST &&
         op->n[5] < INT32_MAX;
}

/* ================================================================ numbers */

/* 2^x for x <= 0 to 3e-6: enough for what is rounded to bf16. Below 2^-126 it stays about there. NaN gives NaN. */
VEC vf exp2_short(vf x) {
  vf z = vf_max(vf_set1(-126.0f), x);
  vi n = vi_from_float(z);
  vf r = vf_sub(z, vf_from_int(n));
  vf p = vf_fma(r, vf_set1(9.570102207e-03f), vf_set1(5.591785908e-02f));
  p = vf_fma(p, r, vf_set1(2.402474433e-01f));
  p = vf_fma(p, r, vf_set1(6.931217909e-01f));
  p = vf_fma(p, r, vf_set1(9.999992847e-01f));
  return vf_bits(vi_add(vi_bits(p), vi_sll(n, 23)));
}

/* Words of two registers of 32 values, interleaved: [0] the first halves, [1] the second; pair: the halves of one register. */
typedef struct orders { vi halves[2], pair; } orders;
static orders orders_of(void) {
  return (orders){ { wane_interleave(0, 32), wane_interleave(1, 32) }, wane_interleave(0, 16) };
}

/* ================================================================ tiles */

static char *tile_at(char *base, int64_t i) { return base + i * TILE_BYTES; }

/* Tiles of a first operand: where the first begins, and bytes between its rows, to the tile below, to the next along the contraction. */
typedef struct operand { const char *p; int64_t row, down, step; } operand;
static operand tiles_of(const char *base, int64_t first, int64_t down) { return (operand){ base + first * TILE_BYTES, 64, down * TILE_BYTES, TILE_BYTES }; }

/* Four tiles c (down: the second tile of a, right: of b), rows `c_row` bytes apart, (+)= `steps` products. b's steps in tiles, c's in floats. */
VEC void product4(operand a, const char *b, int64_t b_right, int64_t b_step, int64_t steps, float *c, int64_t c_down, int64_t c_right, int64_t c_row, const int add) {
  tile_product t = { .a0 = a.p, .a1 = a.p + a.down, .a_row = a.row, .a_step = a.step, .b0 = b, .b1 = b + b_right * TILE_BYTES, .b_step = b_step * TILE_BYTES,
                     .steps = steps, .c = c, .c_down = c_down, .c_right = c_right, .c_row = c_row };
  tiles_multiply(t, add, 2, 2, TILES_KEEP);
}

/* Rows of a bf16 matrix: at[i] is row i's first element; beyond `count`, zeros. */
typedef struct rows { const uint16_t *x; int64_t at[ROWS], count, D; } rows;

VEC __m512i row_part(const rows *m, int64_t i, int64_t d) {
  return i < m->count ? load_bf16(m->x, WANE_BF16, m->at[i] + d, m->D - d) : _mm512_setzero_si512();
}

/* 16 rows from i on as tiles of 32 columns, row-major; turned into [pair of columns][row][2] where wanted. */
static void pack_rows(const rows *m, int64_t i, int64_t DP, int turned, char *out) {
  for (int64_t d = 0; d < DP; d += 32, out += TILE_BYTES) {
    for (int64_t r = 0; r < 16; r++) _mm512_storeu_si512(out + 64 * r, row_part(m, i + r, d));
    if (turned) wane_transpose16(out, 64, out, 64);
  }
}

/* 32 rows from i on as tiles [pair of rows][16 columns][2], a tile for every 16 columns, `step` bytes apart; turned into [column][32 rows]. */
static void pack_pairs(const rows *m, int64_t i, int64_t DP, const orders *o, int turned, char *out, int64_t step) {
  for (int64_t d = 0; d < DP; d += 32, out += 2 * step) {
    for (int64_t r = 0; r < 16; r++) {
      __m512i a = row_part(m, i + 2 * r, d), b = row_part(m, i + 2 * r + 1, d);
      for (int t = 0; t < 2; t++) _mm512_storeu_si512(out + t * step + 64 * r, _mm512_permutex2var_epi16(a, o->halves[t], b));
    }
    if (turned) for (int t = 0; t < 2; t++) wane_transpose16(out + t * step, 64, out + t * step, 64);
  }
}

/* Two tiles side by side of a turned result, [16 columns each][16 rows], to a row of bf16 each, times its factor: columns [d, d + 32) of D. */
static void put_turned(const float *c, int64_t right, const float *factor, uint16_t *y, const int64_t *at, int64_t count, int64_t d, int64_t D) {
  _Alignas(64) float t[2][16][16];
  for (int h = 0; h < 2; h++) wane_transpose16(c + h * right, 64, t[h], 64);
  for (int64_t i = 0; i < count; i++) {
    vf f = vf_set1(factor[i]);
    __m512i v = to_bf16(vf_mul(vf_load(t[0][i]), f), vf_mul(vf_load(t[1][i]), f));
    if (D - d >= 32) { _mm512_storeu_si512(y + at[i] + d, v); continue; }
    uint16_t h[32];
    _mm512_storeu_si512(h, v);
    memcpy(y + at[i] + d, h, (size_t)(D - d) * 2);
  }
}

/* ================================================================ what rows see */

/* Keys [lo, hi) of each row, the key mask aside; rows beyond the count see none. And the bounds of both over each SQUARE rows that there are. */
typedef struct sight {
  int32_t lo[ROWS], hi[ROWS];
  int32_t lo_least[ROW_STEPS], lo_most[ROW_STEPS], hi_least[ROW_STEPS], hi_most[ROW_STEPS];
} sight;

static void look(const wane_op *op, int64_t b, const int32_t *times, int64_t count, int64_t padded, sight *s) {
  const int32_t *first = op->p[8] ? (const int32_t *)op->p[8] + b * op->n[3] : NULL;
  int64_t keys = op->n[5], window = op->n[7];
  for (int64_t x = 0; x < padded / SQUARE; x++) {
    int32_t lo_least = INT32_MAX, lo_most = 0, hi_least = INT32_MAX, hi_most = 0;
    for (int64_t i = x * SQUARE; i < (x + 1) * SQUARE; i++) {
      int64_t time = op->n[6] + (i < count ? times[i] : 0), lo = window > 0 && time - window + 1 > 0 ? time - window + 1 : 0;
      int64_t hi = op->i[3] && time + 1 < keys ? time + 1 : keys;
      if (i >= count) { s->lo[i] = INT32_MAX; s->hi[i] = 0; continue; }
      if (first && first[times[i]] > lo) lo = first[times[i]];
      if (lo > keys) lo = keys;
      s->lo[i] = (int32_t)lo; s->hi[i] = (int32_t)hi;
      if (lo < lo_least) lo_least = (int32_t)lo;
      if (lo > lo_most) lo_most = (int32_t)lo;
      if (hi < hi_least) hi_least = (int32_t)hi;
      if (hi > hi_most) hi_most = (int32_t)hi;
    }
    s->lo_least[x] = lo_least; s->lo_most[x] = lo_most; s->hi_least[x] = hi_least; s->hi_most[x] = hi_most;
  }
}

/* May some row of square x see some of the SQUARE keys from j on? Do all see all? */
static int sees_some(const sight *s, int64_t x, int64_t j) { return s->lo_least[x] < j + SQUARE && s->hi_most[x] > j; }
static int sees_all(const sight *s, int64_t x, int64_t j) { return s->lo_most[x] <= j && s->hi_least[x] >= j + SQUARE; }

/* The lanes that see key j. */
VEC vm seen(vi lo, vi hi, int64_t j, const uint8_t *mask, int64_t keys) {
  vi key = vi_set1((int32_t)j);
  if (mask && (j >= keys || !mask[j])) return 0;
  return _mm512_cmpgt_epi32_mask(hi, key) & (vm)~_mm512_cmpgt_epi32_mask(lo, key);
}

static const uint8_t *mask_of(const wane_op *op, int64_t b) { return op->p[4] ? (const uint8_t *)op->p[4] + b * op->n[9] : NULL; }

/* Rows of k (x = 1) or v (x = 2) of a kv head, from key j on. */
static void keys_of(const wane_op *op, int x, int64_t b, int64_t kv, int64_t j, rows *m) {
  const int64_t *st = op->stride[x];
  m->x = op->p[x + 1]; m->D = op->n[4]; m->count = op->n[5] - j < KEYS ? op->n[5] - j : KEYS;
  for (int64_t i = 0; i < m->count; i++) m->at[i] = b * st[0] + kv * st[1] + (j + i) * st[2];
}

/* Can tiles be loaded from where k and v lie? */
static int in_place(const wane_op *op, int64_t j) { return op->n[4] % 32 == 0 && j + KEYS <= op->n[5]; }

/* k or v, row-major, in place, or from their tiles at `packed`; y: which SQUARE of the keys. */
static operand keys_operand(const wane_op *op, int x, int64_t b, int64_t kv, int64_t j, int64_t y, const char *packed) {
  const int64_t *st = op->stride[x], steps = (op->n[4] + 31) / 32;
  if (!in_place(op, j)) return tiles_of(packed, 2 * y * steps, steps);
  return (operand){ (const char *)((const uint16_t *)op->p[x + 1] + b * st[0] + kv * st[1] + (j + SQUARE * y) * st[2]), st[2] * 2, st[2] * 32, 64 };
}

/* ================================================================ forward */

/* A chunk: rows of one (b, kv head), and its scratch memory. Tiles: q [row tiles][DP / 32], k [8][DP / 32], vt [DP / 16][4]; for each two of the row
 * tiles p [4][2], s [8][2], o [DP / 16][2]. */
typedef struct forward_chunk {
  const wane_op *op;
  int64_t b, kv, DP, count, padded;
  int64_t out[FORWARD_ROWS], lse[FORWARD_ROWS];
  int32_t times[FORWARD_ROWS];
  rows q, keys;
  sight sight;
  orders orders;
  char *kt, *qt, *vt, *p;
  float *s, *o, *max, *sum;
} forward_chunk;

static void forward_open(forward_chunk *z, const wane_op *op, uint32_t chunk) {
  int64_t H = op->n[1], KV = op->n[2], T = op->n[3], G = H / KV, all = T * G, per = op->n[8], blocks = (all + per - 1) / per, heads = op->n[0] * KV;
  int64_t unit = (int64_t)op->nchunks - 1 - chunk, row0 = unit / heads * per, D = op->n[4], t = row0 / G, g = row0 % G;
  const int64_t *st = op->stride[0];
  z->op = op;
  z->b = unit % heads / KV; z->kv = unit % heads % KV;
  z->count = unit / heads + 1 < blocks ? per : all - row0;
  z->padded = (z->count + SQUARE - 1) / SQUARE * SQUARE;
  z->DP = (D + 31) / 32 * 32;
  z->orders = orders_of();
  z->q.x = op->p[1]; z->q.D = D; z->q.count = z->count;
  for (int64_t i = 0; i < z->count; i++) {
    int64_t h = z->kv * G + g;
    z->times[i] = (int32_t)t;
    z->q.at[i] = z->b * st[0] + t * st[1] + h * st[2];
    z->out[i] = ((z->b * T + t) * H + h) * D;
    z->lse[i] = (z->b * H + h) * T + t;
    if (++g == G) g = 0, t++;
  }
  look(op, z->b, z->times, z->count, z->padded, &z->sight);
  char *at = wane_scratch();
  z->qt = at; at += z->padded / 16 * z->DP / 32 * TILE_BYTES;
  z->kt = at; at += KEY_TILES * z->DP / 32 * TILE_BYTES;
  z->vt = at; at += KEY_STEPS * z->DP / 16 * TILE_BYTES;
  z->p = at; at += z->padded / SQUARE * 2 * KEY_STEPS * TILE_BYTES;
  z->s = (float *)(void *)at; at += z->padded / SQUARE * 2 * KEY_TILES * TILE_BYTES;
  z->o = (float *)(void *)at; at += z->padded / 16 * z->DP / 16 * TILE_BYTES;
  z->max = (float *)(void *)at;
  z->sum = z->max + FORWARD_ROWS;
  for (int64_t i = 0; i < z->padded; i += 16) pack_rows(&z->q, i, z->DP, 1, tile_at(z->qt, i / 16 * z->DP / 32));
  for (int64_t i = 0; i < z->padded; i++) z->max[i] = -__builtin_inff(), z->sum[i] = 0.0f;
  memset(z->o, 0, (size_t)(z->padded * z->DP) * sizeof(float));
}

/* Scores of row tile i + x and squares [first, last) of keys to weights, and the rows' sums to their new maximum. */
VEC void weigh(forward_chunk *z, int64_t i, int x, int64_t j, int first, int last, const int dress) {
  const wane_op *op = z->op;
  const uint8_t *mask = dress ? mask_of(op, z->b) : NULL;
  const float *scores = z->s + (i / 2 * 2 * KEY_TILES + x) * TILE_FLOATS;
  float *most = z->max + (i + x) * 16, *sums = z->sum + (i + x) * 16;
  vf scale = vf_set1(op->f[0] * 1.44269504f), hidden = vf_set1(-__builtin_inff());
  vf old = vf_load(most), m[4] = { hidden, hidden, hidden, hidden }, sum = vf_load(sums);
  vi lo = vi_load(z->sight.lo + (i + x) * 16), hi = vi_load(z->sight.hi + (i + x) * 16);
  for (int key = SQUARE * first; key < SQUARE * last; key += 4)
    for (int k = 0; k < 4; k++) {
      vf v = vf_load(scores + key / 16 * 2 * TILE_FLOATS + (key % 16 + k) * 16);
      if (dress) v = vf_select(seen(lo, hi, j + key + k, mask, op->n[5]), v, hidden);
      m[k] = vf_max(m[k], v);
    }
  vf now = vf_max(old, vf_mul(vf_max(vf_max(m[0], m[1]), vf_max(m[2], m[3])), scale));
  vf level = vf_select(vf_eq(now, hidden), vf_zero(), now), shrink = vec_exp2_negative(vf_sub(old, level)), down = vf_neg(level), more = vf_zero();
  for (int key = SQUARE * first; key < SQUARE * last; key += 2) {
    const float *s = scores + key / 16 * 2 * TILE_FLOATS + key % 16 * 16;
    vf a = exp2_short(vf_fma(vf_load(s), scale, down)), b = exp2_short(vf_fma(vf_load(s + 16), scale, down));
    if (dress) {
      a = vf_select(seen(lo, hi, j + key, mask, op->n[5]), a, vf_zero());
      b = vf_select(seen(lo, hi, j + key + 1, mask, op->n[5]), b, vf_zero());
    }
    sum = vf_add(key == SQUARE * first ? vf_mul(sum, shrink) : sum, a);
    more = vf_add(more, b);
    _mm512_storeu_si512(tile_at(z->p, i / 2 * 2 * KEY_STEPS + key / 32 * 2 + x) + key % 32 / 2 * 64, _mm512_permutexvar_epi16(z->orders.pair, to_bf16(a, b)));
  }
  vf_store(most, now);
  vf_store(sums, vf_add(sum, more));
  if (vm_bits(vf_eq(old, now)) == 0xffff) return;
  for (int64_t d = 0; d < z->DP / 16; d++) {
    float *o = z->o + ((i / 2 * z->DP / 16 + d) * 2 + x) * TILE_FLOATS;
    for (int r = 0; r < TILE_FLOATS; r += 16) vf_store(o + r, vf_mul(vf_load(o + r), shrink));
  }
}

/* All rows against the keys from j on. Products come before all of what reads them: a tile's store is not forwarded to loads. */
static void forward_keys(forward_chunk *z, int64_t j) {
  int64_t steps = z->DP / 32, columns = z->DP / 16, squares = z->padded / SQUARE;
  int first[FORWARD_ROWS / SQUARE], last[FORWARD_ROWS / SQUARE], dress[FORWARD_ROWS / SQUARE], any = 0;
  for (int64_t i = 0; i < squares; i++) {
    first[i] = last[i] = 0;
    dress[i] = z->op->p[4] != NULL || (i + 1) * SQUARE > z->count;
    for (int y = 0; y < KEY_STEPS; y++)
      if (sees_some(&z->sight, i, j + SQUARE * y)) {
        if (last[i] == 0) first[i] = y;
        last[i] = y + 1;
        dress[i] |= !sees_all(&z->sight, i, j + SQUARE * y);
      }
    any |= last[i];
  }
  if (!any) return;
  if (!in_place(z->op, j)) {
    keys_of(z->op, 1, z->b, z->kv, j, &z->keys);
    for (int t = 0; t < KEY_TILES; t++) pack_rows(&z->keys, 16 * t, z->DP, 0, tile_at(z->kt, t * steps));
  }
  keys_of(z->op, 2, z->b, z->kv, j, &z->keys);
  for (int t = 0; t < KEY_STEPS; t++) pack_pairs(&z->keys, SQUARE * t, z->DP, &z->orders, 1, tile_at(z->vt, t), KEY_STEPS * TILE_BYTES);
  for (int64_t i = 0; i < squares; i++)
    for (int y = first[i]; y < last[i]; y++)
      product4(keys_operand(z->op, 1, z->b, z->kv, j, y, z->kt), tile_at(z->qt, 2 * i * steps), steps, 1, steps, z->s + (i * 2 * KEY_TILES + y * 4) * TILE_FLOATS, 2 * TILE_FLOATS,
               TILE_FLOATS, 64, 0);
  for (int64_t i = 0; i < squares; i++)
    for (int x = 0; last[i] && x < 2; x++)
      if (dress[i]) weigh(z, 2 * i, x, j, first[i], last[i], 1); else weigh(z, 2 * i, x, j, first[i], last[i], 0);
  for (int64_t i = 0; i < squares; i++)
    for (int64_t d = 0; last[i] && d < columns; d += 2)
      product4(tiles_of(z->vt, d * KEY_STEPS + first[i], KEY_STEPS), tile_at(z->p, i * 2 * KEY_STEPS + first[i] * 2), 1, 2, last[i] - first[i],
               z->o + (i * columns + d) * 2 * TILE_FLOATS, 2 * TILE_FLOATS, TILE_FLOATS, 64, 1);
}

static void forward_finish(forward_chunk *z) {
  float *lse = z->op->p[7];
  for (int64_t i = 0; i < z->count; i += 16) {
    int64_t count = z->count - i < 16 ? z->count - i : 16;
    vf sum = vf_load(z->sum + i);
    vm empty = vf_eq(sum, vf_zero());
    _Alignas(64) float value[16], factor[16];
    vf_store(value, vf_select(empty, vf_set1(__builtin_inff()), vf_fma(vec_log(sum), vf_set1(1.44269504f), vf_load(z->max + i))));
    vf_store(factor, vf_select(empty, vf_zero(), vf_div(vf_set1(1.0f), sum)));
    for (int64_t r = 0; r < count; r++) lse[z->lse[i + r]] = value[r];
    for (int64_t d = 0; d < z->op->n[4]; d += 32)
      put_turned(z->o + ((i / SQUARE * z->DP / 16 + d / 16) * 2 + i / 16 % 2) * TILE_FLOATS, 2 * TILE_FLOATS, factor, z->op->p[0], z->out + i, count, d, z->op->n[4]);
  }
}

static void forward(const wane_op *op, uint32_t chunk) {
  if (!fits(op) || !op->p[7] || op->p[6] || op->n[8] > FORWARD_ROWS) {
    vectors_forward(op, chunk);
    return;
  }
  forward_chunk z;
  forward_open(&z, op, chunk);
  wane_tiles_on();
  for (int64_t j = 0; j < op->n[5]; j += KEYS) forward_keys(&z, j);
  wane_tiles_off();
  forward_finish(&z);
}

/* ================================================================ backward */

/* The heads that share a kv head are a unit, whose dk and dv are summed as they come, where that leaves enough units; else each is one. */
static int64_t shared(const wane_op *op) { return op->n[0] * op->n[2] >= UNITS_WANTED ? op->n[1] / op->n[2] : 1; }

/* One unit's head, and its scratch memory. Tiles of rows: q and dout, turned [8][DP / 32] and in pairs [4][DP / 16]. Tiles of a block of keys, in a
 * slot: k and v [8][DP / 32], kt [DP / 16][4]. Of 32 keys (two tiles) and the rows: s and dp [2][8], p and ds as first operands [2][4]. Of all keys: ds
 * as the second operand [4][8]. dq [DP / 16][8]. */
typedef struct backward_state {
  const wane_op *op;
  int64_t b, head, kv, DP, row0, count, slots;
  int32_t times[ROWS];
  float lse[ROWS], delta[ROWS];
  rows q, dout, packed;
  sight sight;
  orders orders;
  char *qt, *qp, *dt, *dop, *p, *ds, *dsp, *keys;
  float *s, *dp, *dq, *dk, *dv;
} backward_state;
_Static_assert(4 * ROWS * WIDEST * 2 + (4 * ROW_TILES + 4 * ROW_STEPS + KEY_STEPS * ROW_TILES + WIDEST / 16 * ROW_TILES) * TILE_BYTES <= FIXED_ROOM &&
               FIXED_ROOM + 6 * KEYS * WIDEST <= WANE_SCRATCH, "a block of rows and a block of keys fit into the scratch memory");

static int64_t slot_bytes(const backward_state *z) { return 3 * KEYS * z->DP * 2; }

static wane_attention_places places(const wane_op *op) { return wane_attention_place(op->n[0] * op->n[1], op->n[3], op->n[5], op->n[4]); }

static void backward_open(backward_state *z, const wane_op *op, int64_t unit) {
  wane_attention_places l = places(op);
  z->op = op;
  z->DP = l.wide;
  z->orders = orders_of();
  z->dk = (float *)op->p[6] + l.dk + unit * l.keys * l.wide;
  z->dv = (float *)op->p[6] + l.dv + unit * l.keys * l.wide;
  char *at = wane_scratch();
  int64_t rows = ROWS * z->DP * 2;
  z->qt = at; at += rows;
  z->qp = at; at += rows;
  z->dt = at; at += rows;
  z->dop = at; at += rows;
  z->p = at; at += 2 * ROW_STEPS * TILE_BYTES;
  z->ds = at; at += 2 * ROW_STEPS * TILE_BYTES;
  z->dsp = at; at += KEY_STEPS * ROW_TILES * TILE_BYTES;
  z->s = (float *)(void *)at; at += 2 * ROW_TILES * TILE_BYTES;
  z->dp = (float *)(void *)at; at += 2 * ROW_TILES * TILE_BYTES;
  z->dq = (float *)(void *)at; at += z->DP / 16 * ROW_TILES * TILE_BYTES;
  z->keys = at;
  z->slots = (WANE_SCRATCH - FIXED_ROOM) / slot_bytes(z);
}

/* The next rows: what they see, and their tiles. */
static void backward_rows(backward_state *z, int64_t row0) {
  const wane_op *op = z->op;
  int64_t H = op->n[1], T = op->n[3], D = op->n[4], unit = z->b * H + z->head, DP = z->DP;
  const int64_t *st = op->stride[0];
  const float *lse = (const float *)op->p[7] + unit * T, *delta = (const float *)op->p[6] + unit * T;   /* delta lies first in the workspace */
  z->row0 = row0;
  z->count = T - row0 < ROWS ? T - row0 : ROWS;
  z->q.x = op->p[1]; z->dout.x = op->p[9];
  z->q.D = z->dout.D = D;
  z->q.count = z->dout.count = z->count;
  for (int64_t i = 0; i < ROWS; i++) {
    int there = i < z->count;
    z->lse[i] = there ? lse[row0 + i] : __builtin_inff();
    z->delta[i] = there ? delta[row0 + i] * op->f[0] : 0.0f;
    z->times[i] = (int32_t)(row0 + i);
    z->q.at[i] = z->b * st[0] + (row0 + i) * st[1] + z->head * st[2];
    z->dout.at[i] = ((z->b * T + row0 + i) * H + z->head) * D;
  }
  look(op, z->b, z->times, z->count, ROWS, &z->sight);
  for (int64_t t = 0; t * SQUARE < z->count; t++) {
    for (int64_t h = 2 * t; h < 2 * t + 2; h++) {
      pack_rows(&z->q, 16 * h, DP, 1, tile_at(z->qt, h * DP / 32));
      pack_rows(&z->dout, 16 * h, DP, 1, tile_at(z->dt, h * DP / 32));
    }
    pack_pairs(&z->q, SQUARE * t, DP, &z->orders, 0, tile_at(z->qp, t * DP / 16), TILE_BYTES);
    pack_pairs(&z->dout, SQUARE * t, DP, &z->orders, 0, tile_at(z->dop, t * DP / 16), TILE_BYTES);
  }
  memset(z->dq, 0, (size_t)(ROWS * DP) * sizeof(float));
}

/* The tiles of the keys from j on. */
static void backward_pack(backward_state *z, int64_t j, char *slot) {
  int64_t steps = z->DP / 32;
  rows *m = &z->packed;
  if (!in_place(z->op, j)) {
    keys_of(z->op, 2, z->b, z->kv, j, m);
    for (int t = 0; t < KEY_TILES; t++) pack_rows(m, 16 * t, z->DP, 0, tile_at(slot, (KEY_TILES + t) * steps));
  }
  keys_of(z->op, 1, z->b, z->kv, j, m);
  if (!in_place(z->op, j)) for (int t = 0; t < KEY_TILES; t++) pack_rows(m, 16 * t, z->DP, 0, tile_at(slot, t * steps));
  for (int t = 0; t < KEY_STEPS; t++) pack_pairs(m, SQUARE * t, z->DP, &z->orders, 1, tile_at(slot, 2 * KEY_TILES * steps + t), KEY_STEPS * TILE_BYTES);
}

/* A block's dk and dv begin as zeros; its tiles go into the slot if there is one to stay in. */
static void backward_keys(backward_state *z, int64_t j, char *slot) {
  int64_t count = (z->op->n[5] - j + WANE_ATTENTION_KEYS - 1) / WANE_ATTENTION_KEYS * WANE_ATTENTION_KEYS;
  if (count > KEYS) count = KEYS;
  memset(z->dk + j * z->DP, 0, (size_t)(count * z->DP) * sizeof(float));
  memset(z->dv + j * z->DP, 0, (size_t)(count * z->DP) * sizeof(float));
  if (slot) backward_pack(z, j, slot);
}

/* Two keys (of tile t of two, of its 16 the one numbered `key` and the next; the first of all is j) and two row tiles from x on: weights and their
 * gradients, as operands; y: which 32 of the block's keys they belong to. delta: times the scale. */
VEC void slopes(const backward_state *z, int64_t j, int y, int t, int key, int x, const vf lse[2], const vf delta[2], const vi lo[2], const vi hi[2], const int dress) {
  const wane_op *op = z->op;
  vf base = vf_set1(op->f[0] * 1.44269504f), scale = vf_set1(op->f[0]), p[2][2], ds[2][2];
  const uint8_t *mask = dress ? mask_of(op, z->b) : NULL;
  for (int k = 0; k < 2; k++)
    for (int h = 0; h < 2; h++) {
      int64_t at = (t * ROW_TILES + x + h) * TILE_FLOATS + (key + k) * 16;
      vf w = exp2_short(vf_fma(vf_load(z->s + at), base, lse[h]));
      if (dress) w = vf_select(seen(lo[h], hi[h], j + t * 16 + key + k, mask, op->n[5]), w, vf_zero());
      p[k][h] = w;
      ds[k][h] = vf_mul(w, vf_fma(vf_load(z->dp + at), scale, delta[h]));
    }
  int64_t first = (t * ROW_STEPS + x / 2) * TILE_BYTES + key * 64, second = (y * ROW_TILES + x) * TILE_BYTES + (t * 8 + key / 2) * 64;
  for (int k = 0; k < 2; k++) {
    _mm512_storeu_si512(z->p + first + 64 * k, to_bf16(p[k][0], p[k][1]));
    _mm512_storeu_si512(z->ds + first + 64 * k, to_bf16(ds[k][0], ds[k][1]));
  }
  for (int h = 0; h < 2; h++)
    _mm512_storeu_si512(z->dsp + second + h * TILE_BYTES, _mm512_permutexvar_epi16(z->orders.pair, to_bf16(ds[0][h], ds[1][h])));
}

/* p and ds of 32 keys from j on, y of the block, and of row tiles x and x + 1. */
static void backward_square(backward_state *z, int64_t j, int y, int x, int all) {
  vf lse[2], delta[2];
  vi lo[2], hi[2];
  for (int h = 0; h < 2; h++) {
    lse[h] = vf_neg(vf_load(z->lse + (x + h) * 16)); delta[h] = vf_neg(vf_load(z->delta + (x + h) * 16));
    lo[h] = vi_load(z->sight.lo + (x + h) * 16); hi[h] = vi_load(z->sight.hi + (x + h) * 16);
  }
  if (!all || z->op->p[4])
    for (int t = 0; t < SQUARE; t += 2) slopes(z, j, y, t / 16, t % 16, x, lse, delta, lo, hi, 1);
  else
    for (int t = 0; t < SQUARE; t += 2) slopes(z, j, y, t / 16, t % 16, x, lse, delta, lo, hi, 0);
}

/* The rows against 32 keys, y of the block at j whose tiles are in `slot`: squares [x0, x1) of rows, from the first to the last that sees some. */
static void backward_meet(backward_state *z, const char *slot, int64_t j, int y, int x0, int x1) {
  int64_t steps = z->DP / 32, columns = z->DP / 16, wide = z->DP, key = j + SQUARE * y;
  operand k = keys_operand(z->op, 1, z->b, z->kv, j, y, slot), v = keys_operand(z->op, 2, z->b, z->kv, j, y, slot + KEY_TILES * steps * TILE_BYTES);
  for (int x = x0; x < x1; x++) {                          /* all products before what reads them: a tile's store is not forwarded to loads */
    product4(k, tile_at(z->qt, 2 * x * steps), steps, 1, steps, z->s + 2 * x * TILE_FLOATS, ROW_TILES * TILE_FLOATS, TILE_FLOATS, 64, 0);
    product4(v, tile_at(z->dt, 2 * x * steps), steps, 1, steps, z->dp + 2 * x * TILE_FLOATS, ROW_TILES * TILE_FLOATS, TILE_FLOATS, 64, 0);
  }
  for (int x = x0; x < x1; x++) backward_square(z, key, y, 2 * x, sees_all(&z->sight, x, key) && (x + 1) * SQUARE <= z->count);
  for (int64_t d = 0; d < columns; d += 2) {
    int64_t at = key * wide + 16 * d;
    product4(tiles_of(z->p, x0, ROW_STEPS), tile_at(z->dop, x0 * columns + d), 1, columns, x1 - x0, z->dv + at, 16 * wide, 16, wide * 4, 1);
    product4(tiles_of(z->ds, x0, ROW_STEPS), tile_at(z->qp, x0 * columns + d), 1, columns, x1 - x0, z->dk + at, 16 * wide, 16, wide * 4, 1);
  }
}

/* The rows against the block of keys from j on. */
static void backward_block(backward_state *z, const char *slot, int64_t j) {
  int64_t steps = z->DP / 32;
  int first[ROW_STEPS] = { 0 }, last[ROW_STEPS] = { 0 };
  for (int y = 0; y < KEY_STEPS; y++) {
    int x0 = 0, x1 = 0;
    for (int x = 0; x < ROW_STEPS; x++)
      if (sees_some(&z->sight, x, j + SQUARE * y)) {
        if (x1 == 0) x0 = x;
        x1 = x + 1;
      }
    if (x0 < x1) backward_meet(z, slot, j, y, x0, x1);
    for (int x = x0; x < x1; x++) {
      for (int i = last[x]; last[x] > 0 && i < y; i++) memset(tile_at(z->dsp, i * ROW_TILES + 2 * x), 0, 2 * TILE_BYTES);   /* a gap in what is seen */
      if (last[x] == 0) first[x] = y;
      last[x] = y + 1;
    }
  }
  for (int x = 0; x < ROW_STEPS; x++)
    for (int64_t d = 0; last[x] && d < z->DP / 16; d += 2)
      product4(tiles_of(slot, 2 * KEY_TILES * steps + KEY_STEPS * d + first[x], KEY_STEPS), tile_at(z->dsp, first[x] * ROW_TILES + 2 * x), 1, ROW_TILES, last[x] - first[x],
               z->dq + (d * ROW_TILES + 2 * x) * TILE_FLOATS, ROW_TILES * TILE_FLOATS, TILE_FLOATS, 64, 1);
}

/* dq of the rows. */
static void backward_put(const backward_state *z) {
  const wane_op *op = z->op;
  static const float one[16] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
  for (int64_t x = 0; x * 16 < z->count; x++)                /* dq lies as dout does */
    for (int64_t d = 0; d < op->n[4]; d += 32)
      put_turned(z->dq + (d / 16 * ROW_TILES + x) * TILE_FLOATS, ROW_TILES * TILE_FLOATS, one, op->p[0], z->dout.at + x * 16, z->count - x * 16 < 16 ? z->count - x * 16 : 16,
                 d, op->n[4]);
}

static void backward_unit(const wane_op *op, int64_t unit) {
  backward_state z;
  int64_t T = op->n[3], keys = op->n[5], H = op->n[1], heads = shared(op), ready = 0;     /* ready: blocks of keys begun so far */
  backward_open(&z, op, unit);
  int stay = (keys + KEYS - 1) / KEYS <= z.slots;           /* all of the keys' tiles stay from the first rows that see them */
  for (int64_t h = unit * heads; h < (unit + 1) * heads; h++) {
    z.b = h / H; z.head = h % H; z.kv = z.head / (H / op->n[2]);
    for (int64_t r = 0; r < T; r += ROWS) {
      backward_rows(&z, r);
      for (int64_t j = 0; j < keys; j += KEYS) {
        char *slot = z.keys + (stay ? j / KEYS * slot_bytes(&z) : 0);
        int any = 0;
        for (int i = 0; i < ROW_STEPS * KEY_STEPS; i++) any |= sees_some(&z.sight, i / KEY_STEPS, j + i % KEY_STEPS * SQUARE);
        if (!any) continue;
        for (; ready <= j / KEYS; ready++) backward_keys(&z, ready * KEYS, stay ? z.keys + ready * slot_bytes(&z) : NULL);
        if (!stay) backward_pack(&z, j, slot);
        backward_block(&z, slot, j);
      }
      backward_put(&z);
    }
  }
  for (; ready * KEYS < keys; ready++) backward_keys(&z, ready * KEYS, NULL);
}

/* dk and dv of some keys: sums over the units of a kv head. */
static void backward_sum(const wane_op *op, uint32_t chunk) {
  wane_attention_places l = places(op);
  int64_t KV = op->n[2], units = op->n[1] / KV / shared(op), D = op->n[4], keys = op->n[5], lo, hi;
  wane_op_range(op, chunk, op->n[0] * keys, 1, &lo, &hi);
  for (int which = 0; which < 2; which++)
    for (int64_t row = lo; row < hi; row++)
      for (int64_t kv = 0; kv < KV; kv++) {
        const float *from = (const float *)op->p[6] + (which ? l.dv : l.dk) + ((row / keys * KV + kv) * units * l.keys + row % keys) * l.wide;
        for (int64_t d = 0; d < D; d += VW) {
          vf sum = vf_load(from + d);
          for (int64_t u = 1; u < units; u++) sum = vf_add(sum, vf_load(from + u * l.keys * l.wide + d));
          vf_put_n(op->p[which], WANE_BF16, (row * KV + kv) * D + d, sum, vec_left(d, D));
        }
      }
}

static void backward(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  if (!fits(op) || op->i[5] || (op->i[4] != 1 && op->i[4] != 2)) {
    vectors_backward(op, chunk);
    return;
  }
  if (op->i[4] == 2) { backward_sum(op, chunk); return; }
  wane_op_range(op, chunk, op->n[0] * op->n[1] / shared(op), 1, &lo, &hi);
  if (lo == hi) return;
  wane_tiles_on();
  for (int64_t unit = lo; unit < hi; unit++) backward_unit(op, unit);
  wane_tiles_off();
}

static void tiles_register(wane_backend *b) {
  vectors_forward = b->ops[WANE_OP_ATTENTION];
  vectors_backward = b->ops[WANE_OP_ATTENTION_BACKWARD];
  b->ops[WANE_OP_ATTENTION] = forward;
  b->ops[WANE_OP_ATTENTION_BACKWARD] = backward;
}
#endif
