/* tiles_nll.h: the loss of a head (nll.h) with bf16 tiles. Scores lie turned: a row of a tile for a row of W, a lane for a row of x, so that sums over the
 * vocabulary run down a register, and the scores' gradient is at once the second operand of W transposed. */
#ifndef WANE_TILES_NLL_H
#define WANE_TILES_NLL_H
#define WANE_VEC 512
#include "tiles_linear.h"
#include "../x86/vec_math.h"
#include "nll.h"
#include <math.h>

#define LOG2E 1.44269504f

/* A block of W's rows, and the scratch memory: W's tiles [block / 16][tiles + 1], turned [wide / 16][block / 32 + 1], a panel's scores
 * [block / 32][2][2] tiles (row of W, row of x), their gradient in pairs [2][block / 32], a row's scales. */
typedef struct head {
  const wane_op *op;
  wane_nll_plan plan;
  wane_qview w;
  int64_t M, K, V, tiles, stride, turned_stride, first, count;
  char *rows, *turned, *slopes, *work;
  float *scores, *scales;
} head;
_Static_assert((WANE_NLL_TILES + 32 + 16 + 64) * TILE_BYTES <= WANE_SCRATCH, "a block of W, a panel's scores, their gradient and scales fit into the scratch memory");
_Static_assert(WANE_NLL_TILES * 16 / 3 * 32 * sizeof(float) <= WANE_SCRATCH, "32 rows of W fit too (16 columns of a block of 32 are three tiles)");

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void open_head(head *h, const wane_op *op) {
  h->op = op;
  h->w = wane_qview_load(op);
  h->M = op->n[WANE_LINEAR_M]; h->K = op->n[11]; h->V = op->n[10];
  h->plan = wane_nll_cut(h->M, h->K, h->V);
  h->tiles = tiles_of_row(h->K);
  h->stride = (h->tiles + 1) * TILE_BYTES;
  h->turned_stride = (h->plan.block / 32 + 1) * TILE_BYTES;
  h->work = op->p[WANE_LINEAR_WORK];
  char *at = wane_scratch();
  h->rows = at; at += h->plan.block / 16 * h->stride;
  h->turned = at; at += h->plan.wide / 16 * h->turned_stride;
  h->scores = (float *)(void *)at; at += h->plan.block / 8 * TILE_BYTES;
  h->slopes = at; at += h->plan.block / 16 * TILE_BYTES;
  h->scales = (float *)(void *)at;
}

/* Label of row m; -1 for one to be ignored or out of range. */
static int64_t label_of(const wane_op *op, int64_t m) {
  const void *labels = op->p[WANE_LINEAR_BIAS];
  int64_t label = op->i[WANE_NLL_LABELS] == WANE_I64 ? ((const int64_t *)labels)[m] : ((const int32_t *)labels)[m];
  return label == op->n[WANE_NLL_IGNORED] || label < 0 || label >= op->n[10] ? -1 : label;
}

/* Takes block b of W's rows. */
static void take_block(head *h, int64_t b) {
  h->first = b * h->plan.block;
  h->count = least(h->plan.block, h->V - h->first);
  TILED(decode_rows)(&h->w, h->first, h->count, 0, h->tiles * 32, h->rows, h->stride, h->scales);
  int64_t steps = (h->count + 31) / 32;
  TILED(decode_columns)(&h->w, 0, h->plan.wide, h->first, steps * 32, h->turned, h->turned_stride);
  for (int64_t k = 0; k < h->plan.wide / 16; k++)
    for (int64_t s = 0; s < steps; s++) {
      char *tile = h->turned + k * h->turned_stride + s * TILE_BYTES;
      wane_transpose16(tile, 64, tile, 64);
    }
}

/* Scores of the block's rows and of rows [m, m + 32) of x. */
static void score(head *h, int64_t m) {
  int64_t run = tiles_of_run(h->tiles);
  for (int64_t k = 0; k < h->tiles; k += run) {
    const char *x0 = h->work + (m / 16 * h->tiles + k) * TILE_BYTES, *x1 = x0 + h->tiles * TILE_BYTES;
    for (int64_t v = 0; v < h->count; v += 32) {
      const char *w0 = h->rows + v / 16 * h->stride + k * TILE_BYTES;
      multiply(packed(w0, w0 + h->stride, x0, x1, TILE_BYTES, least(run, h->tiles - k), h->scores + v * 32), k == 0, 1, 1);
    }
  }
}

/* Row v's scores of the panel's lanes 16 half to 16 half + 15. */
VEC float *score_at(const head *h, int64_t v, int half) { return h->scores + v / 32 * 4 * TILE_FLOATS + v % 32 / 16 * 2 * TILE_FLOATS + half * TILE_FLOATS + v % 16 * 16; }

/* A lane's part of its row's sum, by the row's largest score so far; -inf: none yet, or none above it. */
VEC vf level_of(vf most) { return vf_select(vf_eq(most, vf_set1(-__builtin_inff())), vf_zero(), most); }

/* Takes the panel's scores into its rows' largest, `most`, and sums; their e^(score - largest) become bf16 pairs of rows of W. What `share` holds of the blocks
 * before, if there are any, shrinks with the sums. */
static void fold(head *h, int64_t m, float *most, float *sum, float *share) {
  int64_t steps = (h->count + 31) / 32;
  vi order = wane_interleave(0, 16);
  vf log2e = vf_set1(LOG2E);
  for (int half = 0; half < 2; half++) {
    vf old = vf_load(most + m + 16 * half), largest[2] = { old, old }, sums[2] = { vf_zero(), vf_zero() };
    for (int64_t v = 0; v < h->count; v++) largest[v % 2] = vf_max(vf_load(score_at(h, v, half)), largest[v % 2]);
    vf now = vf_max(largest[0], largest[1]), level = level_of(now);
    for (int64_t v = 0; v < steps * 32; v += 2) {
      vf p[2];
      for (int k = 0; k < 2; k++) {
        p[k] = v + k < h->count ? vec_exp2_negative(vf_mul(vf_sub(vf_load(score_at(h, v + k, half)), level), log2e)) : vf_zero();   /* exactly 1 at the largest */
        sums[k] = vf_add(sums[k], p[k]);
      }
      _mm512_storeu_si512(h->slopes + (half * steps + v / 32) * TILE_BYTES + v % 32 / 2 * 64, _mm512_permutexvar_epi16(order, to_bf16(p[0], p[1])));
    }
    vf shrink = vec_exp2_negative(vf_mul(vf_sub(old, level), log2e));
    vf_store(most + m + 16 * half, now);
    vf_store(sum + m + 16 * half, vf_fma(vf_load(sum + m + 16 * half), shrink, vf_add(sums[0], sums[1])));
    if (!share || vm_bits(vf_eq(old, now)) == 0xffff) continue;
    for (int64_t k = 0; k < h->plan.wide; k += 16) {
      float *tile = share + m * h->plan.wide + k / 16 * 2 * TILE_FLOATS + half * TILE_FLOATS;
      for (int r = 0; r < TILE_FLOATS; r += VW) vf_store(tile + r, vf_mul(vf_load(tile + r), shrink));
    }
  }
}

/* The labels of the panel that are in the block: their scores are kept, and they leave the product, whose rounding would bury a small p - 1. */
static void take_labels(head *h, int64_t m) {
  float *own = (float *)(void *)(h->work + h->plan.own);
  int64_t steps = (h->count + 31) / 32;
  for (int64_t i = m; i < least(m + 32, h->M); i++) {
    int64_t v = label_of(h->op, i) - h->first, half = i % 32 / 16;
    if (v < 0 || v >= h->count) continue;
    own[i] = score_at(h, v, (int)half)[i % 16];
    ((uint16_t *)(void *)(h->slopes + (half * steps + v / 32) * TILE_BYTES))[v % 32 / 2 * 32 + i % 16 * 2 + v % 2] = 0;
  }
}

/* NLL_SHARES: a group's blocks. Its share of dx lies turned: [rows of x / 32][wide / 32][2][2] tiles. */
static void shares(const wane_op *op, uint32_t group) {
  head h;
  open_head(&h, op);
  float *share = (float *)(void *)(h.work + h.plan.shares) + (int64_t)group * h.plan.padded * h.plan.wide;
  float *most = (float *)(void *)(h.work + h.plan.sums) + (int64_t)group * 2 * h.plan.padded, *sum = most + h.plan.padded;
  int64_t first = group * h.plan.per, last = least(h.plan.blocks, first + h.plan.per);
  for (int64_t m = 0; m < h.plan.padded; m++) most[m] = -__builtin_inff(), sum[m] = 0.0f;
  wane_tiles_on();
  for (int64_t b = first; b < last; b++) {
    take_block(&h, b);
    int64_t steps = (h.count + 31) / 32;
    for (int64_t m = 0; m < h.plan.padded; m += 32) {
      score(&h, m);
      fold(&h, m, most, sum, b > first ? share : NULL);
      take_labels(&h, m);
      for (int64_t k = 0; k < h.plan.wide; k += 32) {
        const char *w = h.turned + k / 16 * h.turned_stride;
        multiply(packed(w, w + h.turned_stride, h.slopes, h.slopes + steps * TILE_BYTES, TILE_BYTES, steps, share + m * h.plan.wide + k * 32), b == first, 1, 1);
      }
    }
  }
  wane_tiles_off();
}

/* NLL_MERGE. */
static void merge(const wane_op *op, uint32_t chunk) {
  (void)chunk;
  int64_t M = op->n[WANE_LINEAR_M], V = op->n[10];
  wane_nll_plan plan = wane_nll_cut(M, op->n[11], V);
  char *work = op->p[WANE_LINEAR_WORK];
  const float *sums = (const float *)(void *)(work + plan.sums);
  float *lse = (float *)(void *)(work + plan.lse), *own = (float *)(void *)(work + plan.own), *nll = op->p[WANE_LINEAR_Y];
  for (int64_t m = 0; m < plan.padded; m += 16) {
    _Alignas(64) float max[16], sum[16];
    vf most = vf_set1(-__builtin_inff()), total = vf_zero();
    for (int64_t g = 0; g < plan.groups; g++) most = vf_max(vf_load(sums + g * 2 * plan.padded + m), most);
    for (int64_t g = 0; g < plan.groups; g++) {
      const float *s = sums + g * 2 * plan.padded + m;
      total = vf_fma(vf_load(s + plan.padded), vec_exp2_negative(vf_mul(vf_sub(vf_load(s), most), vf_set1(LOG2E))), total);
    }
    vf_store(max, most);
    vf_store(sum, total);
    for (int64_t i = m; i < m + 16; i++) {
      int64_t label = i < M ? label_of(op, i) : -1;
      lse[i] = __builtin_inff();                                             /* no gradient */
      if (label >= 0) {
        double log_sum = log((double)sum[i - m]) + (double)max[i - m];
        lse[i] = (float)(log((double)sum[i - m]) * 1.4426950408889634);
        own[i] = nll[i] = (float)(log_sum - (double)own[i]);
      } else if (i < M) {
        const void *labels = op->p[WANE_LINEAR_BIAS];
        int64_t found = op->i[WANE_NLL_LABELS] == WANE_I64 ? ((const int64_t *)labels)[i] : ((const int32_t *)labels)[i];
        nll[i] = 0.0f;
        if (found != op->n[WANE_NLL_IGNORED])
          wane_op_fail(op, "nll: label %lld of row %lld is outside the %lld classes (and is not the ignored label %lld)", (long long)found, (long long)i + 1,
                       (long long)V, (long long)op->n[WANE_NLL_IGNORED]);
      }
    }
  }
}

/* Rows [m, m + 32) of dx: their labels' part, in f32, is (p - 1) factor W[label]. rows: [32][wide] of the scratch. */
static void label_rows(const wane_op *op, const wane_nll_plan *plan, int64_t m, float *rows) {
  const float *nll = (const float *)(const void *)((const char *)op->p[WANE_LINEAR_WORK] + plan->own);
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  wane_qview w = wane_qview_load(op);
  for (int64_t i = 0; i < 32; i++, rows += plan->wide) {
    int64_t label = m + i < op->n[WANE_LINEAR_M] ? label_of(op, m + i) : -1;
    memset(rows, 0, (size_t)plan->wide * sizeof *rows);
    if (label < 0) continue;
    kit->dequantize(&w, label * w.cols, w.cols, rows);
    float slope = expm1f(-nll[m + i]) * op->f[WANE_NLL_FACTOR];
    for (int64_t k = 0; k < w.cols; k++) rows[k] = slope * wane_bf16_to_f32(wane_f32_to_bf16(rows[k]));
  }
}

/* NLL_DX. */
static void dx(const wane_op *op, uint32_t chunk) {
  int64_t M = op->n[WANE_LINEAR_M], K = op->n[11], lo, hi;
  wane_nll_plan plan = wane_nll_cut(M, K, op->n[10]);
  const char *work = op->p[WANE_LINEAR_WORK];
  const float *sums = (const float *)(const void *)(work + plan.sums), *lse = (const float *)(const void *)(work + plan.lse), *shares = (const float *)(const void *)(work + plan.shares);
  float *own = wane_scratch();
  _Alignas(64) float c[4 * TILE_FLOATS];
  vf factors[2][WANE_NLL_GROUPS], log2e = vf_set1(LOG2E);
  wane_op_range(op, chunk, plan.padded, 32, &lo, &hi);
  for (int64_t m = lo; m < hi; m += 32) {
    label_rows(op, &plan, m, own);
    for (int half = 0; half < 2; half++) {
      const float *most = sums + m + 16 * half;
      vf all = vf_load(most), total = vf_load(lse + m + 16 * half);
      for (int64_t g = 1; g < plan.groups; g++) all = vf_max(vf_load(most + g * 2 * plan.padded), all);
      for (int64_t g = 0; g < plan.groups; g++) {                           /* differences first: they are small where it matters */
        vf down = vf_mul(vf_sub(vf_load(most + g * 2 * plan.padded), level_of(all)), log2e);
        factors[half][g] = vf_mul(vec_exp2_negative(vf_sub(down, total)), vf_set1(op->f[WANE_NLL_FACTOR]));
      }
    }
    for (int64_t k = 0; k < K; k += 32) {
      for (int i = 0; i < 4 * TILE_FLOATS; i += VW) {
        const float *from = shares + m * plan.wide + k * 32 + i;
        int half = i / TILE_FLOATS % 2;
        vf sum = vf_zero(), total = vf_load(lse + m + 16 * half);
        for (int64_t g = 0; g < plan.groups; g++) sum = vf_fma(vf_load(from + g * plan.padded * plan.wide), factors[half][g], sum);
        vf_store(c + i, vf_select(vf_eq(total, vf_set1(__builtin_inff())), vf_zero(), sum));    /* an ignored row's is zero whatever its scores are */
      }
      for (int half = 0; half < 2; half++)
        for (int d = 0; d < 2; d++) wane_transpose16(c + (2 * d + half) * TILE_FLOATS, 64, c + (2 * d + half) * TILE_FLOATS, 64);
      for (int64_t i = 0; i < least(32, M - m); i++) {
        const float *row = c + i / 16 * TILE_FLOATS + i % 16 * 16, *more = own + i * plan.wide + k;
        put_row(op->p[WANE_LINEAR_Y], op->i[WANE_LINEAR_DTYPE], (m + i) * K + k, vf_add(vf_load(row), vf_load(more)), vf_add(vf_load(row + 2 * TILE_FLOATS), vf_load(more + 16)),
                least(32, K - k));
      }
    }
  }
}

static void tiles_register(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_NLL_SHARES] = shares;
  b->ops[WANE_OP_LINEAR_NLL_MERGE] = merge;
  b->ops[WANE_OP_LINEAR_NLL_DX] = dx;
}
#endif
