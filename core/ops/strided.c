/* strided.c: from tensors of any shape and stride to a loop nest of at most five dimensions. See strided.h. */
#include "strided.h"
#include <string.h>

void wane_strided_begin(wane_strided *g, int ndim, const int64_t *shape) {
  memset(g, 0, sizeof *g);
  g->ndim = ndim;
  for (int d = 0; d < ndim; d++) g->size[d] = shape[d];
}

void wane_strided_add(wane_strided *g, const wane_tensor *t) {
  int k = g->operands++, skip = g->ndim - t->ndim;
  g->data[k] = t->data;
  g->dtype[k] = t->dtype;
  for (int d = 0; d < g->ndim; d++) g->stride[k][d] = d < skip || t->shape[d - skip] == 1 ? 0 : t->stride[d - skip];
}

/* Moves dimension `from` to place `to`, the ones before it one up. */
static void move_dimension(wane_strided *g, int from, int to) {
  for (; from > to; from--) {
    int64_t t = g->size[from];
    g->size[from] = g->size[from - 1], g->size[from - 1] = t;
    for (int k = 0; k < g->operands; k++) {
      t = g->stride[k][from];
      g->stride[k][from] = g->stride[k][from - 1], g->stride[k][from - 1] = t;
    }
  }
}

/* Whether dimension d continues in d + 1 for every operand, so that both are one loop. */
static int mergeable(const wane_strided *g, int d) {
  for (int k = 0; k < g->operands; k++)
    if (g->stride[k][d] != g->stride[k][d + 1] * g->size[d + 1]) return 0;
  return 1;
}

/* Magnitude of operand 0's stride, by which the loops are ordered: the output is walked the way it lies in memory. */
static int64_t reach(const wane_strided *g, int d) { return g->stride[0][d] < 0 ? -g->stride[0][d] : g->stride[0][d]; }

/* Drops sizes of 1, orders by the output's strides, merges; at least one dimension stays. */
static void simplify(wane_strided *g) {
  int n = 0;
  for (int d = 0; d < g->ndim; d++) {
    if (g->size[d] == 1) continue;
    g->size[n] = g->size[d];
    for (int k = 0; k < g->operands; k++) g->stride[k][n] = g->stride[k][d];
    n++;
  }
  g->ndim = n;
  for (int d = 1; d < g->ndim; d++) {
    int to = d;
    while (to > 0 && reach(g, to - 1) < reach(g, d)) to--;
    move_dimension(g, d, to);
  }
  for (int d = g->ndim - 2; d >= 0; d--) {
    if (!mergeable(g, d)) continue;
    g->size[d] *= g->size[d + 1];
    for (int k = 0; k < g->operands; k++) g->stride[k][d] = g->stride[k][d + 1];
    for (int e = d + 1; e + 1 < g->ndim; e++) {
      g->size[e] = g->size[e + 1];
      for (int k = 0; k < g->operands; k++) g->stride[k][e] = g->stride[k][e + 1];
    }
    g->ndim--;
  }
  if (g->ndim == 0) {
    g->ndim = 1;
    g->size[0] = 1;
    for (int k = 0; k < g->operands; k++) g->stride[k][0] = 1;
  }
}

/* One op over the last (at most five) dimensions from `first` on. */
static void push_one(wane_stream *s, const wane_strided *g, int first, int code, const wane_op *model, int64_t work, wane_tensor *written) {
  wane_op *op = wane_op_new(s, code);
  int64_t total = 1;
  memcpy(op->i + 4, model->i + 4, sizeof op->i - 4 * sizeof op->i[0]);
  memcpy(op->n + 7, model->n + 7, sizeof op->n - 7 * sizeof op->n[0]);
  memcpy(op->d, model->d, sizeof op->d);
  memcpy(op->f, model->f, sizeof op->f);
  memcpy(op->spare, model->spare, sizeof op->spare);
  for (int d = first; d < g->ndim; d++) {
    op->n[d - first] = g->size[d];
    total *= g->size[d];
    for (int k = 0; k < g->operands; k++) op->stride[k][d - first] = g->stride[k][d];
  }
  for (int k = 0; k < g->operands; k++) {
    op->p[k] = g->data[k];
    op->i[k] = g->dtype[k];
  }
  op->n[5] = total;
  op->n[6] = g->ndim - first;
  op->nchunks = wane_chunks(total * work, 16384);
  wane_op_push(s, op, written, NULL);
}

void wane_strided_push(wane_stream *s, wane_strided *g, int code, const wane_op *model, int64_t work, wane_tensor *written) {
  for (int d = 0; d < g->ndim; d++)
    if (g->size[d] == 0) return;
  simplify(g);
  /* Peel the smallest loops first: fewest ops. Their order among themselves does not matter to the result. */
  int peeled = g->ndim > 5 ? g->ndim - 5 : 0;
  for (int d = 0; d < peeled; d++) {
    int least = d;
    for (int e = d + 1; e < g->ndim; e++)
      if (g->size[e] < g->size[least]) least = e;
    move_dimension(g, least, d);
  }
  int64_t index[WANE_MAX_DIMS] = { 0 };
  for (;;) {
    push_one(s, g, peeled, code, model, work, written);
    int d = peeled - 1;
    for (; d >= 0; d--) {
      index[d]++;
      for (int k = 0; k < g->operands; k++) g->data[k] += g->stride[k][d] * wane_element_size(g->dtype[k]);
      if (index[d] < g->size[d]) break;
      for (int k = 0; k < g->operands; k++) g->data[k] -= g->stride[k][d] * g->size[d] * wane_element_size(g->dtype[k]);
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

int wane_broadcast_shape(const wane_tensor *a, const wane_tensor *b, const char *what, int *ndim, int64_t *shape) {
  int n = a->ndim > b->ndim ? a->ndim : b->ndim;
  for (int d = 0; d < n; d++) {
    int da = d - (n - a->ndim), db = d - (n - b->ndim);
    int64_t sa = da < 0 ? 1 : a->shape[da], sb = db < 0 ? 1 : b->shape[db];
    if (sa != sb && sa != 1 && sb != 1)
      return wane_fail(WANE_E_SHAPE, "%s: shapes %s and %s do not broadcast: sizes %lld and %lld differ and neither is 1", what, wane_shape_text(a),
                       wane_shape_text(b), (long long)sa, (long long)sb);
    shape[d] = sa == 1 ? sb : sa;
  }
  *ndim = n;
  return WANE_OK;
}

int wane_promote(int a, int b) {
  /* By width; f16 and bf16 are equals. */
  static const int8_t rank[WANE_DTYPE_PLAIN] = {
    [WANE_BOOL] = 0, [WANE_U8] = 1, [WANE_I8] = 1, [WANE_I32] = 2, [WANE_I64] = 3, [WANE_F16] = 4, [WANE_BF16] = 4, [WANE_F32] = 5,
  };
  if (a == b) return a;
  if (rank[a] == rank[b]) return rank[a] == 1 ? WANE_I32 : WANE_F32;
  return rank[a] > rank[b] ? a : b;
}

int wane_need_plain(const wane_tensor *t, const char *op, const char *what) {
  if (t->dtype >= 0 && t->dtype < WANE_DTYPE_PLAIN) return WANE_OK;
  return wane_fail(WANE_E_DTYPE, "%s: %s is %s, a quantized kind; dequantize it first (wane_dequantize)", op, what, wane_shape_text(t));
}
