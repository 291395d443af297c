/* nn_norm.c: what the norms and their gradients take, and what the front functions of the neural network ops share. */
#include "nn.h"
#include <string.h>

/* ---------------------------------------------------------------- shared checks */

int wane_nn_optional(wane_stream *s, const wane_handle *h, const char *what, wane_tensor **t) {
  *t = NULL;
  if (!h || !h->t) return WANE_OK;
  *t = wane_use(s, h, what);
  return *t ? WANE_OK : WANE_E_STALE;
}

int wane_nn_check_vector(const char *op, const char *what, const wane_tensor *t, int64_t C) {
  if (!wane_is_float(t->dtype)) return wane_fail(WANE_E_DTYPE, "%s: %s must be f32, f16 or bf16, found %s", op, what, wane_shape_text(t));
  if (t->ndim != 1 || t->shape[0] != C)
    return wane_fail(WANE_E_SHAPE, "%s: expected %s [%lld], the last dimension of x; found %s", op, what, (long long)C, wane_shape_text(t));
  return WANE_OK;
}

wane_tensor *wane_nn_dense_rows(wane_stream *s, wane_tensor *t, wane_handle *tmp) {
  tmp->t = NULL;
  return t->stride[t->ndim - 1] == 1 || t->shape[t->ndim - 1] <= 1 ? t : wane_contiguous(s, t, tmp);
}

/* Elements a chunk of row work: about 30 us. */
enum { NORM_WORK = 64 << 10 };

static int check_x(const char *op, const wane_tensor *x) {
  if (!wane_is_float(x->dtype)) return wane_fail(WANE_E_DTYPE, "%s: x must be f32, f16 or bf16, found %s", op, wane_shape_text(x));
  if (x->ndim < 1 || x->shape[x->ndim - 1] < 1) return wane_fail(WANE_E_SHAPE, "%s: x needs a last dimension to normalise, found %s", op, wane_shape_text(x));
  return WANE_OK;
}

/* ---------------------------------------------------------------- forward */

/* Both norms; the record is described in nn_row_kernels.h. */
static int norm(wane_stream *s, wane_handle *out, const wane_handle *hx, const wane_handle *hw, const wane_handle *hb, double eps, double offset, int code) {
  const char *name = code == WANE_OP_RMS_NORM ? "rms_norm" : "layer_norm";
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *x = wane_use(s, hx, "x"), *w, *b;
  if (!x) return WANE_E_STALE;
  if ((status = wane_nn_optional(s, hw, "weight", &w)) || (status = wane_nn_optional(s, hb, "bias", &b)) || (status = check_x(name, x))) return status;
  int64_t C = x->shape[x->ndim - 1], rows = wane_numel(x) / C;
  if ((w && (status = wane_nn_check_vector(name, "weight", w, C))) || (b && (status = wane_nn_check_vector(name, "bias", b, C)))) return status;

  wane_handle tmp[3] = { { NULL, 0, 0 } };
  x = wane_contiguous(s, x, &tmp[0]);
  if (x && w) w = wane_contiguous(s, w, &tmp[1]);
  if (x && b) b = wane_contiguous(s, b, &tmp[2]);
  wane_tensor *y = x && (!hw || !hw->t || w) && (!hb || !hb->t || b) ? wane_make(s, out, x->dtype, x->ndim, x->shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (rows > 0) {
    wane_op *op = wane_op_new(s, code);
    op->p[0] = y->data; op->p[1] = x->data; op->p[2] = w ? w->data : NULL; op->p[3] = b ? b->data : NULL;
    op->n[0] = rows; op->n[1] = C;
    op->i[0] = x->dtype; op->i[1] = w ? w->dtype : 0; op->i[2] = b ? b->dtype : 0;
    op->f[0] = (float)offset;
    op->d[0] = eps;
    op->nchunks = wane_chunks(rows, 1 + NORM_WORK / C);
    wane_op_push(s, op, y, NULL);
  }
  for (int i = 0; i < 3; i++) wane_tensor_free(&tmp[i]);
  return status;
}

int wane_rms_norm(wane_stream *s, wane_handle *out, const wane_handle *x, const wane_handle *weight, double eps, double weight_offset) {
  return norm(s, out, x, weight, NULL, eps, weight_offset, WANE_OP_RMS_NORM);
}

int wane_layer_norm(wane_stream *s, wane_handle *out, const wane_handle *x, const wane_handle *weight, const wane_handle *bias, double eps) {
  return norm(s, out, x, weight, bias, eps, 0.0, WANE_OP_LAYER_NORM);
}

/* ---------------------------------------------------------------- backward */

/* Enqueues both phases over contiguous tensors. */
static int push_backward(wane_stream *s, int code, const wane_op *plan, wane_tensor *dx, wane_tensor *dw, wane_tensor *db) {
  wane_storage *hold = NULL;
  int64_t rows = plan->n[0], C = plan->n[1];
  float *statistics = wane_workspace(s, (size_t)rows * 2 * sizeof(float), &hold);
  if (!statistics) return WANE_E_MEMORY;
  for (int phase = 0; phase < (dw ? 2 : 1); phase++) {
    wane_op *op = wane_op_new(s, code);
    for (int i = 0; i < 4; i++) op->p[i] = plan->p[i];
    op->p[4] = dw ? dw->data : NULL; op->p[5] = statistics; op->p[6] = db ? db->data : NULL;
    op->n[0] = rows; op->n[1] = C;
    for (int i = 0; i < 6; i++) op->i[i] = plan->i[i];
    op->i[3] = phase;
    op->f[0] = plan->f[0];
    op->d[0] = plan->d[0];
    op->nchunks = phase ? wane_chunks(C, 16 + NORM_WORK / rows) : wane_chunks(rows, 1 + NORM_WORK / 2 / C);
    if (phase) wane_op_push(s, op, dw, db);
    else wane_op_push(s, op, dx, NULL);
  }
  wane_storage_unref(hold);
  return WANE_OK;
}

static int norm_backward(wane_stream *s, wane_handle *hdx, wane_handle *hdw, wane_handle *hdb, const wane_handle *hdy, const wane_handle *hx,
                         const wane_handle *hw, double eps, double offset, const wane_handle *honto, int code) {
  const char *name = code == WANE_OP_RMS_NORM_BACKWARD ? "rms_norm_backward" : "layer_norm_backward";
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *dy = wane_use(s, hdy, "dy"), *x = dy ? wane_use(s, hx, "x") : NULL, *w, *onto;
  if (!x) return WANE_E_STALE;
  if ((status = wane_nn_optional(s, hw, "weight", &w)) || (status = wane_nn_optional(s, honto, "onto", &onto)) || (status = check_x(name, x))) return status;
  int64_t C = x->shape[x->ndim - 1], rows = wane_numel(x) / C;
  if (!wane_is_float(dy->dtype) || wane_numel(dy) != rows * C || dy->ndim != x->ndim || dy->shape[dy->ndim - 1] != C)
    return wane_fail(WANE_E_SHAPE, "%s: dy %s must have the shape of x %s", name, wane_shape_text(dy), wane_shape_text(x));
  if (w && (status = wane_nn_check_vector(name, "weight", w, C))) return status;

  wane_handle tmp[3] = { { NULL, 0, 0 } }, made[3] = { { NULL, 0, 0 } };
  int has_w = w != NULL;
  x = wane_contiguous(s, x, &tmp[0]);
  dy = x ? wane_contiguous(s, dy, &tmp[1]) : NULL;
  if (dy && w) w = wane_contiguous(s, w, &tmp[2]);
  if (dy && onto && (onto->storage == x->storage || onto->storage == dy->storage || onto->dtype != x->dtype || !wane_is_contiguous(onto) || onto->ndim != x->ndim || memcmp(onto->shape, x->shape, (size_t)x->ndim * sizeof *x->shape)))
    onto = NULL;
  wane_tensor *dx = !dy || (has_w && !w) ? NULL : onto ? onto : wane_make(s, &made[0], x->dtype, x->ndim, x->shape);
  wane_tensor *dw = dx && hdw ? wane_make(s, &made[1], WANE_F32, 1, &C) : NULL, *db = dx && hdb ? wane_make(s, &made[2], WANE_F32, 1, &C) : NULL;
  if (!dx || (hdw && !dw) || (hdb && !db)) status = WANE_E_MEMORY;
  else if (rows == 0) {
    if (dw) status = wane_fill(s, &made[1], 0.0);
    if (db && !status) status = wane_fill(s, &made[2], 0.0);
  } else {
    wane_op plan = { .p = { dx->data, dy->data, x->data, w ? w->data : NULL }, .n = { rows, C } };
    plan.i[0] = x->dtype; plan.i[1] = w ? w->dtype : 0; plan.i[2] = dy->dtype; plan.i[4] = code == WANE_OP_LAYER_NORM_BACKWARD; plan.i[5] = onto != NULL;
    plan.f[0] = (float)offset;
    plan.d[0] = eps;
    status = push_backward(s, code, &plan, dx, dw, db);
  }
  for (int i = 0; i < 3; i++) wane_tensor_free(&tmp[i]);
  if (status) {
    for (int i = 0; i < 3; i++) wane_tensor_free(&made[i]);
    return status;
  }
  if (!onto) *hdx = made[0];
  if (hdw) *hdw = made[1];
  if (hdb) *hdb = made[2];
  return WANE_OK;
}

int wane_rms_norm_backward(wane_stream *s, wane_handle *dx, wane_handle *dweight, const wane_handle *dy, const wane_handle *x, const wane_handle *weight,
                           double eps, double weight_offset, const wane_handle *onto) {
  return norm_backward(s, dx, dweight, NULL, dy, x, weight, eps, weight_offset, onto, WANE_OP_RMS_NORM_BACKWARD);
}

int wane_layer_norm_backward(wane_stream *s, wane_handle *dx, wane_handle *dweight, wane_handle *dbias, const wane_handle *dy, const wane_handle *x,
                             const wane_handle *weight, double eps, const wane_handle *onto) {
  if (dbias && !dweight) return wane_fail(WANE_E_ARG, "layer_norm_backward: dbias is computed along with dweight: ask for both");
  return norm_backward(s, dx, dweight, dbias, dy, x, weight, eps, 0.0, onto, WANE_OP_LAYER_NORM_BACKWARD);
}
