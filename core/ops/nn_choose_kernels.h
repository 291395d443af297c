/* nn_choose_kernels.h: from logits to the next token: penalties, the filter of top-k, top-p and min-p, the draw.
 *
 * Nothing here sorts a vocabulary. The filter finds the one value below which everything is removed: a bound that certainly lies
 * below it is found in a vector pass (the maxima of groups for top-k, a histogram of masses for top-p), the few logits beyond it are
 * gathered, and a quickselect by weight finds the value among them. Where more pass than the scratch memory holds, bisection over
 * the row takes over.
 * Definitions and order: transformers logits_process.py. A chunk is one row. */
#ifndef WANE_NN_CHOOSE_KERNELS_H
#define WANE_NN_CHOOSE_KERNELS_H
#include "nn_row_kernels.h"
#include "philox.h"

enum { GATHER_MAX = 136 << 10, GROUPS_MAX = 16384, BLOCKS_MAX = 4096 };

/* ---------------------------------------------------------------- penalties
 * PENALTY: i 0 kind; p 0 logits, 1 ids i32; n 0 B, 1 V, 2 logits' row stride, 3 ids' row stride, 4 length, 5 n-gram length; f 0 penalty.
 * kind 0: repetition, 1: no repeated n-gram. kind 2: logits of the ids [length] of p 1 become f 0, in every row. */

/* False, and the op failed, for an id outside the vocabulary. */
static int id_fits(const wane_op *op, int64_t id, uint32_t row) {
  if (id >= 0 && id < op->n[1]) return 1;
  wane_op_fail(op, "token id %lld of sequence %u is outside the vocabulary of %lld", (long long)id, row + 1, (long long)op->n[1]);
  return 0;
}

static void VEC_NAME(wane_nn_penalty)(const wane_op *op, uint32_t row) {
  float *logits = (float *)op->p[0] + row * op->n[2], value = op->f[0];
  const int32_t *ids = (const int32_t *)op->p[1] + row * op->n[3];
  int64_t length = op->n[4], n = op->n[5];
  if (op->i[0] == 0) {                                /* once an id: a bit each says which were met */
    uint32_t *met = wane_scratch();
    memset(met, 0, (size_t)((op->n[1] + 31) / 32) * 4);
    for (int64_t i = 0; i < length; i++) {
      if (!id_fits(op, ids[i], row)) return;
      uint32_t *word = met + ids[i] / 32, bit = 1u << ids[i] % 32;
      if (*word & bit) continue;
      *word |= bit;
      float *x = logits + ids[i];
      *x = *x < 0.0f ? *x * value : *x / value;
    }
  } else if (op->i[0] == 1) {
    for (int64_t i = 0; i + n <= length; i++) {
      if (memcmp(ids + i, ids + length - (n - 1), (size_t)(n - 1) * sizeof *ids)) continue;
      if (!id_fits(op, ids[i + n - 1], row)) return;
      logits[ids[i + n - 1]] = -__builtin_inff();
    }
  } else {
    for (int64_t i = 0; i < length; i++) {
      if (!id_fits(op, ids[i], row)) return;
      logits[ids[i]] = value;
    }
  }
}

/* ---------------------------------------------------------------- selection */

/* Values above a bound, with weights; both arrays of GATHER_MAX in scratch memory. */
typedef struct gathered { float *value, *weight; int64_t n; } gathered;

static void exchange(gathered *g, int64_t i, int64_t j) {
  float v = g->value[i], w = g->weight[i];
  g->value[i] = g->value[j]; g->weight[i] = g->weight[j];
  g->value[j] = v; g->weight[j] = w;
}

/* The largest value t whose weight and that of everything above it reach `target`; *above: the weight of what is above t, *equal: how
 * many are t. The smallest value where the target is out of reach. Reorders g. */
static float select_by_weight(gathered *g, double target, double *above, int64_t *equal) {
  int64_t lo = 0, hi = g->n;
  double sum = 0.0;
  for (;;) {
    float a = g->value[lo], b = g->value[lo + (hi - lo) / 2], c = g->value[hi - 1];
    float pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    int64_t greater = lo, i = lo, less = hi;          /* [lo, greater) > pivot, [greater, i) equal, [less, hi) smaller */
    double over = 0.0, at = 0.0;
    while (i < less) {
      float v = g->value[i];
      if (v > pivot) { over += (double)g->weight[i]; exchange(g, i++, greater++); }
      else if (v < pivot) exchange(g, i, --less);
      else at += (double)g->weight[i++];
    }
    if (greater > lo && target <= sum + over) { hi = greater; continue; }
    if (target <= sum + over + at || less == hi) {
      *above = sum + over;
      *equal = less - greater;
      return pivot;
    }
    sum += over + at;
    lo = less;
  }
}

/* Gathers the values >= bound of a row; -1 if there are more than GATHER_MAX. */
static int64_t gather_above(const float *x, int64_t V, float bound, gathered *g) {
  vf b = vf_set1(bound);
  int64_t n = 0;
  for (int64_t i = 0; i < V; i += VW) {
    int lanes = vec_left(i, V);
    uint32_t hits = vm_bits(vf_le(b, vf_get_n(x, WANE_F32, i, lanes))) & ((1u << lanes) - 1);
    if (!hits) continue;
    if (n + VW > GATHER_MAX) return -1;
    for (; hits; hits &= hits - 1) g->value[n++] = x[i + __builtin_ctz(hits)];
  }
  return g->n = n;
}

/* Weight of the values >= bound of a row: their number, or with `mass` the sum of e^(value - max). */
static double weight_above(const float *x, int64_t V, float bound, int mass, float max) {
  vf b = vf_set1(bound), m = vf_set1(max), one = vf_set1(1.0f);
  double sum = 0.0;
  for (int64_t j = 0; j < V; j += EXP_BLOCK) {
    vf s = vf_zero();
    for (int64_t i = j; i < V && i < j + EXP_BLOCK; i += VW) {
      int lanes = vec_left(i, V);
      vf v = vf_get_n(x, WANE_F32, i, lanes);
      if (lanes < VW) {                               /* lanes beyond the row count for nothing */
        float padded[VW];
        vf_store(padded, v);
        for (int k = lanes; k < VW; k++) padded[k] = -__builtin_inff();
        v = vf_load(padded);
      }
      s = vf_add(s, vf_select(vf_le(b, v), mass ? vec_exp(vf_sub(v, m)) : one, vf_zero()));
    }
    sum += (double)vf_sum(s);
  }
  return sum;
}

/* Order of floats as integers, and back. */
static int32_t float_order(float x) { int32_t u = (int32_t)wane_float_bits(x); return u < 0 ? (int32_t)(0x80000000u - (uint32_t)u) : u; }
static float order_float(int32_t k) { return wane_bits_float(k < 0 ? 0x80000000u - (uint32_t)k : (uint32_t)k); }

/* The largest value t of the row such that everything >= t weighs at least `target`: bisection over the floats in (-inf, max]. */
static float bisect(const float *x, int64_t V, double target, int mass, float max) {
  int64_t lo = float_order(-__builtin_inff()), hi = (int64_t)float_order(max) + 1;   /* lo reaches the target, hi does not */
  while (hi - lo > 1) {
    int64_t mid = lo + (hi - lo) / 2;
    if (weight_above(x, V, order_float((int32_t)mid), mass, max) >= target) lo = mid; else hi = mid;
  }
  return order_float((int32_t)lo);
}

/* A value that at least k values of the row reach: the k-th largest of the maxima of groups, if there are enough groups. */
static float top_k_bound(const float *x, int64_t V, int64_t k, gathered *g) {
  int64_t vectors = V / VW, groups = 4 * k < 1024 ? 1024 : 4 * k;
  if (groups > GROUPS_MAX) groups = GROUPS_MAX;
  int64_t per = vectors * VW / groups, segments = per ? vectors / per : 0;
  if (segments * VW < k) return -__builtin_inff();
  g->n = 0;
  for (int64_t s = 0; s < segments; s++) {
    vf m = vf_load(x + s * per * VW);
    for (int64_t i = 1; i < per; i++) m = vf_max(m, vf_load(x + (s * per + i) * VW));
    vf_store(g->value + g->n, m);
    for (int i = 0; i < VW; i++) g->weight[g->n++] = 1.0f;
  }
  double above;
  int64_t equal;
  return select_by_weight(g, (double)k, &above, &equal);
}

/* The k-th largest value of the row. Leaves the values from there on in g (none if they do not fit). */
static float top_k_value(const float *x, int64_t V, int64_t k, float max, gathered *g) {
  float bound = top_k_bound(x, V, k, g);
  if (gather_above(x, V, bound, g) < 0) {
    g->n = 0;
    return bisect(x, V, (double)k, 0, max);
  }
  for (int64_t i = 0; i < g->n; i++) g->weight[i] = 1.0f;
  double above;
  int64_t equal, n = 0;
  float value = select_by_weight(g, (double)k, &above, &equal);
  for (int64_t i = 0; i < g->n; i++) if (g->value[i] >= value) g->value[n++] = g->value[i];
  g->n = n;
  return value;
}

/* weight = e^(value - max) for all of g; returns the sum. */
static double weigh_gathered(gathered *g, float max) {
  double mass = 0.0;
  for (int64_t j = 0; j < g->n; j += VW) {
    int lanes = vec_left(j, g->n);
    vf_put_n(g->weight, WANE_F32, j, vec_exp(vf_sub(vf_get_n(g->value, WANE_F32, j, lanes), vf_set1(max))), lanes);
    for (int k = 0; k < lanes; k++) mass += (double)g->weight[j + k];
  }
  return mass;
}

/* Masses by distance from the maximum: bin i holds the values x with BINS / DEPTH * (max - x) in [i, i + 1). What lies deeper than
 * DEPTH goes to `rest`; most of a vocabulary does, in whole vectors. Two histograms in turn keep one bin's sums apart. */
enum { BINS = 1024, DEPTH = 16 };
typedef struct histogram { double mass[2][BINS], rest, total; } histogram;

VEC vi bin_of(vf x, vf max) { return vi_from_float(vf_mul(vf_sub(max, x), vf_set1((float)(BINS / DEPTH)))); }

static void fill_histogram(histogram *h, const float *x, int64_t V, float max) {
  vf m = vf_set1(max), edge = vf_set1(max - (float)DEPTH);
  int32_t bin[VW];
  float w[VW];
  memset(h, 0, sizeof *h);
  for (int64_t j = 0; j < V; j += EXP_BLOCK) {
    vf deep = vf_zero();
    for (int64_t i = j; i < V && i < j + EXP_BLOCK; i += VW) {
      int lanes = vec_left(i, V);
      vf v = vf_get_n(x, WANE_F32, i, lanes), e = vec_exp(vf_sub(v, m));
      vm is_near = vf_lt(edge, v);
      uint32_t hits = vm_bits(is_near) & ((1u << lanes) - 1);
      if (lanes == VW) deep = vf_add(deep, vf_select(is_near, vf_zero(), e));
      else {
        vf_store(w, e);
        for (int k = 0; k < lanes; k++) if (!(hits >> k & 1)) h->rest += (double)w[k];
      }
      if (!hits) continue;
      vi_store(bin, bin_of(v, m));
      vf_store(w, e);
      for (; hits; hits &= hits - 1) {
        int k = __builtin_ctz(hits);
        h->mass[k & 1][bin[k] < BINS ? bin[k] : BINS - 1] += (double)w[k];
      }
    }
    h->rest += (double)vf_sum(deep);
  }
  h->total = h->rest;
  for (int i = 0; i < BINS; i++) h->total += h->mass[0][i] + h->mass[1][i];
}

/* Gathers the values of one bin; -1 if there are too many. */
static int64_t gather_bin(const float *x, int64_t V, float max, int32_t wanted, gathered *g) {
  vf m = vf_set1(max), edge = vf_set1(max - (float)DEPTH), w = vf_set1((float)wanted);
  int64_t n = 0;
  for (int64_t i = 0; i < V; i += VW) {
    int lanes = vec_left(i, V);
    vf v = vf_get_n(x, WANE_F32, i, lanes), bin = vf_min(vf_set1((float)(BINS - 1)), vf_from_int(bin_of(v, m)));
    uint32_t hits = vm_bits(vf_eq(bin, w)) & vm_bits(vf_lt(edge, v)) & ((1u << lanes) - 1);
    if (!hits) continue;
    if (n + VW > GATHER_MAX) return -1;
    for (; hits; hits &= hits - 1) g->value[n++] = x[i + __builtin_ctz(hits)];
  }
  return g->n = n;
}

/* top-p: the smallest set of largest values whose mass reaches p of the whole mass. Returns its smallest value; of the values equal to
 * that, *drop are to be removed, the earlier ones first (as a stable ascending sort would). g holds the row's values that are left
 * (after top-k), or nothing: then those >= floor are meant. */
static float top_p_value(const float *x, int64_t V, double p, float floor, float max, gathered *g, int64_t *drop) {
  double target, above = 0.0, before = 0.0;
  int64_t equal = 0;
  float value;
  if (g->n > 0) {
    target = p * weigh_gathered(g, max);
    value = select_by_weight(g, target, &above, &equal);
  } else {
    histogram *h = (histogram *)(void *)(g->weight + GATHER_MAX);
    fill_histogram(h, x, V, max);
    target = p * (floor == -__builtin_inff() ? h->total : weight_above(x, V, floor, 1, max));
    int bin = 0;
    for (; bin < BINS && before + h->mass[0][bin] + h->mass[1][bin] < target; bin++) before += h->mass[0][bin] + h->mass[1][bin];
    if (bin < BINS && gather_bin(x, V, max, bin, g) > 0) {
      weigh_gathered(g, max);
      value = select_by_weight(g, target - before, &above, &equal);
      above += before;
    } else {
      value = bisect(x, V, target, 1, max);
      float next = order_float(float_order(value) + 1);
      above = weight_above(x, V, next, 1, max);
      equal = (int64_t)(weight_above(x, V, value, 0, max) - weight_above(x, V, next, 0, max) + 0.5);
    }
    if (value < floor) { *drop = 0; return floor; }
  }
  double weight = exp((double)value - (double)max), wanted = weight > 0.0 ? ceil((target - above) / weight - 1e-9) : (double)equal;
  int64_t keep = wanted < 1.0 ? 1 : wanted > (double)equal ? equal : (int64_t)wanted;
  *drop = equal - keep;
  return value;
}

/* ---------------------------------------------------------------- filter
 * SAMPLE_FILTER: p 0 logits; n 0 B, 1 V, 2 row stride, 3 top_k; f 0 temperature; d 0 top_p, 1 min_p. Chunks: rows. A row that holds
 * NaN or +inf is left alone: the draw reports it. */
static void VEC_NAME(wane_nn_filter)(const wane_op *op, uint32_t row) {
  int64_t V = op->n[1], k = op->n[3], drop = 0;
  float *x = (float *)op->p[0] + row * op->n[2], limit = -__builtin_inff();
  gathered g = { wane_scratch(), NULL, 0 };
  g.weight = g.value + GATHER_MAX;
  vf t = vf_set1(op->f[0]), infinity = vf_set1(__builtin_inff()), m = vf_set1(-__builtin_inff());
  uint32_t all = (1u << VW) - 1, fine = all;
  for (int64_t i = 0; i < V; i += VW) {
    int lanes = vec_left(i, V);
    vf v = vf_get_n(x, WANE_F32, i, lanes);
    fine &= vm_bits(vf_lt(v, infinity));
    if (op->f[0] != 1.0f) vf_put_n(x, WANE_F32, i, v = vf_div(v, t), lanes);
    if (lanes == VW) m = vf_max(m, v);
  }
  float max = vf_hmax(m), end = row_max(x, V - V % VW, V % VW, WANE_F32);
  if (end > max) max = end;
  if (fine != all || max == -__builtin_inff()) return;
  if (k > 0 && k < V) limit = top_k_value(x, V, k, max, &g);
  if (op->d[0] < 1.0) limit = top_p_value(x, V, op->d[0], limit, max, &g, &drop);
  if (op->d[1] > 0.0) {
    float least = (float)((double)max + log(op->d[1]));
    if (least > limit) { limit = least; drop = 0; }
  }
  if (limit == -__builtin_inff()) return;
  vf l = vf_set1(limit), removed = vf_set1(-__builtin_inff());
  for (int64_t i = 0; i < V; i += VW) {
    int lanes = vec_left(i, V);
    vf v = vf_get_n(x, WANE_F32, i, lanes);
    vf_put_n(x, WANE_F32, i, vf_select(vf_le(l, v), v, removed), lanes);
  }
  for (int64_t i = 0; drop > 0 && i < V; i++) if (x[i] == limit) { x[i] = -__builtin_inff(); drop--; }
}

/* ---------------------------------------------------------------- the draw
 * SAMPLE: p 0 out i32 [B], 1 logits; n 0 B, 1 V, 2 row stride; spare 0 seed, 1 offset. Chunks: rows. The first id, in index order, at
 * which the sum of e^(logit - max) exceeds u times the whole sum; sums of blocks are kept in double. */

/* Whether all values are -inf: filtered out. */
static int all_removed(const float *x, int64_t n) {
  vf removed = vf_set1(-__builtin_inff());
  for (int64_t i = 0; i < n; i += VW) {
    int lanes = vec_left(i, n);
    uint32_t part = (1u << lanes) - 1;
    if ((vm_bits(vf_eq(vf_get_n(x, WANE_F32, i, lanes), removed)) & part) != part) return 0;
  }
  return 1;
}

static void VEC_NAME(wane_nn_sample)(const wane_op *op, uint32_t row) {
  int64_t V = op->n[1], width = EXP_BLOCK, blocks;
  const float *x = (const float *)op->p[1] + row * op->n[2];
  double *sums = wane_scratch(), total = 0.0;
  while ((V + width - 1) / width > BLOCKS_MAX) width *= 2;
  blocks = (V + width - 1) / width;
  float max = row_max(x, 0, V, WANE_F32);
  for (int64_t b = 0; b < blocks; b++) {
    int64_t n = V - b * width < width ? V - b * width : width;
    sums[b] = all_removed(x + b * width, n) ? 0.0 : row_exp_sum(x, b * width, n, max, WANE_F32);
    total += sums[b];
  }
  if (!(total > 0.0) || total > 1e300) {
    wane_op_fail(op, "sampling: the logits of sequence %u hold NaN or infinity, or everything is filtered out", row + 1);
    return;
  }
  uint32_t word[4];
  wane_philox(op->spare[0], op->spare[1] + row, word);
  double target = wane_uniform53(word[0], word[1]) * total, sum = 0.0;
  int64_t b = 0, id = -1;
  while (b + 1 < blocks && sum + sums[b] <= target) sum += sums[b++];
  while (sums[b] == 0.0) b--;                         /* rounding pushed the target past the last weight */
  for (int64_t i = b * width; i < V && i < (b + 1) * width; i += VW) {
    int lanes = vec_left(i, V);
    float w[VW];
    vf_store(w, vec_exp(vf_sub(vf_get_n(x, WANE_F32, i, lanes), vf_set1(max))));
    for (int k = 0; k < lanes; k++) {
      if (w[k] == 0.0f) continue;
      id = i + k;
      sum += (double)w[k];
      if (sum > target) goto found;
    }
  }
found:
  ((int32_t *)op->p[0])[row] = (int32_t)id;
}
#endif
