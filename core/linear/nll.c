/* nll.c: wane_linear_nll: checks, memory, and the ops of nll.h. */
#include "nll.h"
#include "../tensor/tensor.h"

enum { LARGEST = 1 << 20 };                /* rows of x; their workspace must stay far below what an int64 holds */

/* Can the kernels of this level do it? */
static int fits(const wane_tensor *w, int compute, int64_t M) {
  int group = wane_linear_group(w->dtype);
  return wane_cpu_backend()->ops[WANE_OP_LINEAR_NLL_SHARES] && group >= 0 && compute > WANE_COMPUTE_F32 && compute <= WANE_COMPUTE_FAST && w->ndim == 2 && w->shape[0] > 0 && w->shape[1] > 0 &&
         (group != WANE_GROUP_FLOAT || wane_is_contiguous(w)) && M > 0 && M <= LARGEST && wane_nll_cut(M, w->shape[1], w->shape[0]).block > 0;
}

int wane_linear_nll_fits(const wane_handle *w, int compute) {
  wane_tensor *t = w ? w->t : NULL;
  return t && t->gen == w->gen && fits(t, compute & ~WANE_COMPUTE_INVARIANT, 1);
}

/* One of the ops. */
static wane_op *nll_op(wane_stream *s, int code, const wane_qview *w, const wane_tensor *x, const wane_tensor *labels, void *work, int compute) {
  wane_op *op = wane_op_new(s, code);
  wane_qview_store(op, w);
  op->p[WANE_LINEAR_X] = x->data;
  op->p[WANE_LINEAR_BIAS] = labels->data;
  op->p[WANE_LINEAR_WORK] = work;
  op->n[WANE_LINEAR_M] = labels->shape[0];
  op->i[WANE_LINEAR_DTYPE] = x->dtype;
  op->i[WANE_LINEAR_COMPUTE] = compute;
  op->i[WANE_NLL_LABELS] = labels->dtype;
  return op;
}

static int check(const wane_tensor *x, const wane_tensor *w, const wane_tensor *labels) {
  if (!wane_is_float(x->dtype) || x->ndim != 2 || w->ndim != 2 || x->shape[1] != w->shape[1])
    return wane_fail(WANE_E_SHAPE, "linear_nll: expected x [M, K] of floats and a weight [V, K], found %s and %s", wane_shape_text(x), wane_shape_text(w));
  if ((labels->dtype != WANE_I32 && labels->dtype != WANE_I64) || labels->ndim != 1 || labels->shape[0] != x->shape[0])
    return wane_fail(WANE_E_SHAPE, "linear_nll: expected labels [%lld] of i32 or i64 for x %s, found %s", (long long)x->shape[0], wane_shape_text(x), wane_shape_text(labels));
  return WANE_OK;
}

int wane_linear_nll(wane_stream *s, wane_handle *hnll, wane_handle *hdx, const wane_handle *hx, const wane_handle *hw, const wane_handle *hlabels, double factor,
                    int64_t ignore_index, int compute) {
  int status = wane_enter(s);
  if (status) return status;
  compute &= ~WANE_COMPUTE_INVARIANT;
  wane_tensor *x = wane_use(s, hx, "x"), *w = x ? wane_use(s, hw, "weight") : NULL, *labels = w ? wane_use(s, hlabels, "labels") : NULL;
  if (!labels) return WANE_E_STALE;
  if ((status = check(x, w, labels))) return status;
  if (x->shape[0] > 0 && !fits(w, compute, x->shape[0]))
    return wane_fail(WANE_E_UNSUPPORTED, "linear_nll: no kernel takes %s with %s: ask wane_linear_nll_fits first", wane_shape_text(x), wane_shape_text(w));
  wane_handle tmp[2] = { { NULL, 0, 0 } };
  wane_storage *hold = NULL;
  wane_nll_plan plan = { 0 };
  if (x->shape[0] > 0) plan = wane_nll_cut(x->shape[0], w->shape[1], w->shape[0]);
  x = wane_contiguous(s, x, &tmp[0]);
  labels = x ? wane_contiguous(s, labels, &tmp[1]) : NULL;
  char *work = labels && x->shape[0] > 0 ? wane_workspace(s, (size_t)plan.bytes, &hold) : NULL;
  wane_tensor *nll = labels && (work || x->shape[0] == 0) ? wane_make(s, hnll, WANE_F32, 1, labels->shape) : NULL;
  wane_tensor *dx = nll ? wane_make(s, hdx, x->dtype, 2, x->shape) : NULL;
  if (nll && !dx) wane_tensor_free(hnll);
  if (dx && x->shape[0] > 0) {
    wane_qview view;
    wane_qview_of(w, &view);
    const int codes[4] = { WANE_OP_LINEAR_NLL_PACK, WANE_OP_LINEAR_NLL_SHARES, WANE_OP_LINEAR_NLL_MERGE, WANE_OP_LINEAR_NLL_DX };
    const int64_t chunks[4] = { plan.padded / 32, plan.groups, 1, plan.padded / 32 };
    for (int i = 0; i < 4; i++) {
      wane_op *op = nll_op(s, codes[i], &view, x, labels, work, compute);
      op->p[WANE_LINEAR_Y] = i == 2 ? nll->data : i == 3 ? dx->data : NULL;
      op->n[WANE_NLL_IGNORED] = ignore_index;
      op->f[WANE_NLL_FACTOR] = (float)factor;
      op->nchunks = (uint32_t)chunks[i];
      wane_op_push(s, op, i == 2 ? nll : i == 3 ? dx : NULL, NULL);
    }
  }
  if (hold) wane_storage_unref(hold);
  for (int i = 0; i < 2; i++) wane_tensor_free(&tmp[i]);
  return dx ? WANE_OK : WANE_E_MEMORY;
}
