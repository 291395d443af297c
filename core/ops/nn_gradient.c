/* nn_gradient.c: what the gradients of element-wise and row-wise ops, dropout and scattering take. Arithmetic: nn_gradient_kernels.h. */
#include "nn.h"
#include "philox.h"

enum { ELEMENTS = 24 << 10 };              /* elements a chunk: about 30 us */

static int same_shape(const wane_tensor *a, const wane_tensor *b) {
  int same = a->ndim == b->ndim;
  for (int i = 0; same && i < a->ndim; i++) same = a->shape[i] == b->shape[i];
  return same;
}

static int need_float(const char *op, const char *what, const wane_tensor *t) {
  return wane_is_float(t->dtype) ? WANE_OK : wane_fail(WANE_E_DTYPE, "%s: %s must be f32, f16 or bf16, found %s", op, what, wane_shape_text(t));
}

/* Checks that dy and x are floats of one shape and makes both contiguous in x's dtype. */
static int pair(wane_stream *s, const char *op, const char *names[2], wane_tensor **dy, wane_tensor **x, wane_handle tmp[2]) {
  int status = need_float(op, names[1], *x);
  if (status || (status = need_float(op, names[0], *dy))) return status;
  if (!same_shape(*dy, *x)) return wane_fail(WANE_E_SHAPE, "%s: %s %s must have the shape of %s %s", op, names[0], wane_shape_text(*dy), names[1], wane_shape_text(*x));
  *x = wane_contiguous(s, *x, &tmp[0]);
  if (*x) *dy = wane_as(s, *dy, (*x)->dtype, &tmp[1]);
  return *x && *dy ? WANE_OK : WANE_E_MEMORY;
}

int wane_unary_backward(wane_stream *s, wane_handle *dx, const wane_handle *hdy, const wane_handle *hx, int code) {
  static const char *names[2] = { "dy", "x" };
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *dy = wane_use(s, hdy, "dy"), *x = dy ? wane_use(s, hx, "x") : NULL;
  if (!x) return WANE_E_STALE;
  if (code < 0 || code >= WANE_UNARY_END || code == WANE_NOT || code == WANE_ISNAN || code == WANE_ISFINITE)
    return wane_fail(WANE_E_ARG, "unary_backward: op code %d has no derivative", code);
  wane_handle tmp[2] = { { NULL, 0, 0 } };
  status = pair(s, "unary_backward", names, &dy, &x, tmp);
  wane_tensor *y = status ? NULL : wane_make(s, dx, x->dtype, x->ndim, x->shape);
  if (!status && !y) status = WANE_E_MEMORY;
  if (y && wane_numel(y) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_UNARY_BACKWARD);
    op->p[0] = y->data; op->p[1] = dy->data; op->p[2] = x->data;
    op->n[0] = wane_numel(y);
    op->i[0] = x->dtype; op->i[1] = code;
    op->nchunks = wane_chunks(op->n[0], ELEMENTS);
    wane_op_push(s, op, y, NULL);
  }
  for (int i = 0; i < 2; i++) wane_tensor_free(&tmp[i]);
  return status;
}

int wane_glu_backward(wane_stream *s, wane_handle *hdgate, wane_handle *hdup, const wane_handle *hdy, const wane_handle *hgate, const wane_handle *hup, int act) {
  static const char *names[2] = { "up", "gate" }, *dnames[2] = { "dy", "gate" };
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *dy = wane_use(s, hdy, "dy"), *gate = dy ? wane_use(s, hgate, "gate") : NULL, *up = gate ? wane_use(s, hup, "up") : NULL;
  if (!up) return WANE_E_STALE;
  if (act != WANE_RELU && act != WANE_SILU && act != WANE_GELU && act != WANE_GELU_TANH && act != WANE_QUICK_GELU && act != WANE_SIGMOID && act != WANE_TANH)
    return wane_fail(WANE_E_ARG, "glu_backward: op code %d is no activation (relu, silu, gelu, gelu_tanh, quick_gelu, sigmoid, tanh)", act);
  wane_handle tmp[4] = { { NULL, 0, 0 } };
  wane_tensor *dgate = NULL, *dup = NULL;
  status = pair(s, "glu_backward", names, &up, &gate, tmp);
  if (!status) status = pair(s, "glu_backward", dnames, &dy, &gate, tmp + 2);
  if (!status) {
    dgate = wane_make(s, hdgate, gate->dtype, gate->ndim, gate->shape);
    dup = dgate ? wane_make(s, hdup, gate->dtype, gate->ndim, gate->shape) : NULL;
    if (dgate && !dup) wane_tensor_free(hdgate);
    if (!dup) status = WANE_E_MEMORY;
  }
  if (dup && wane_numel(dup) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_GLU_BACKWARD);
    op->p[0] = dgate->data; op->p[1] = dup->data; op->p[2] = dy->data; op->p[3] = gate->data; op->p[4] = up->data;
    op->n[0] = wane_numel(gate);
    op->i[0] = gate->dtype; op->i[1] = act;
    op->nchunks = wane_chunks(op->n[0], ELEMENTS / 2);
    wane_op_push(s, op, dgate, dup);
  }
  for (int i = 0; i < 4; i++) wane_tensor_free(&tmp[i]);
  return status;
}

int wane_softmax_backward(wane_stream *s, wane_handle *dx, const wane_handle *hdy, const wane_handle *hy, int dim) {
  static const char *names[2] = { "dy", "y" };
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *dy = wane_use(s, hdy, "dy"), *y = dy ? wane_use(s, hy, "y") : NULL;
  if (!y) return WANE_E_STALE;
  if (dim < 0 || dim >= y->ndim) return wane_fail(WANE_E_SHAPE, "softmax_backward: %s has no dimension %d", wane_shape_text(y), dim + 1);
  wane_handle tmp[2] = { { NULL, 0, 0 } };
  status = pair(s, "softmax_backward", names, &dy, &y, tmp);
  wane_tensor *out = status ? NULL : wane_make(s, dx, y->dtype, y->ndim, y->shape);
  if (!status && !out) status = WANE_E_MEMORY;
  if (out && wane_numel(out) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_SOFTMAX_BACKWARD);
    int64_t outer = 1, inner = 1;
    for (int i = 0; i < dim; i++) outer *= y->shape[i];
    for (int i = dim + 1; i < y->ndim; i++) inner *= y->shape[i];
    op->p[0] = out->data; op->p[1] = dy->data; op->p[2] = y->data;
    op->n[0] = outer; op->n[1] = y->shape[dim]; op->n[2] = inner;
    op->i[0] = y->dtype;
    op->nchunks = wane_chunks(outer * inner, 1 + ELEMENTS / 2 / y->shape[dim]);
    wane_op_push(s, op, out, NULL);
  }
  for (int i = 0; i < 2; i++) wane_tensor_free(&tmp[i]);
  return status;
}

int wane_scatter_add(wane_stream *s, wane_handle *out, const wane_handle *hsrc, const wane_handle *hindex, int64_t n) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *src = wane_use(s, hsrc, "src"), *index = src ? wane_use(s, hindex, "index") : NULL;
  if (!index) return WANE_E_STALE;
  if ((status = need_float("scatter_add", "src", src))) return status;
  if (index->dtype != WANE_I32 && index->dtype != WANE_I64) return wane_fail(WANE_E_DTYPE, "scatter_add: index must be i32 or i64, found %s", wane_shape_text(index));
  int fits = src->ndim == index->ndim + 1 && n >= 0;
  for (int i = 0; fits && i < index->ndim; i++) fits = src->shape[i] == index->shape[i];
  if (!fits) return wane_fail(WANE_E_SHAPE, "scatter_add: expected src [index's shape, C] and n >= 0, found src %s, index %s, n %lld", wane_shape_text(src), wane_shape_text(index), (long long)n);
  int64_t shape[2] = { n, src->shape[src->ndim - 1] }, rows = wane_numel(index);
  wane_handle tmp[2] = { { NULL, 0, 0 } };
  src = wane_contiguous(s, src, &tmp[0]);
  index = src ? wane_contiguous(s, index, &tmp[1]) : NULL;
  wane_tensor *y = index ? wane_make(s, out, WANE_F32, 2, shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (wane_numel(y) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_SCATTER_ADD);
    op->p[0] = y->data; op->p[1] = src->data; op->p[2] = index->data;
    op->n[0] = rows; op->n[1] = shape[1]; op->n[2] = n;
    op->i[0] = src->dtype; op->i[1] = index->dtype;
    op->nchunks = wane_chunks(shape[1], 16 + 16 * ELEMENTS / (rows + n / 4 + 1));
    wane_op_push(s, op, y, NULL);
  }
  for (int i = 0; i < 2; i++) wane_tensor_free(&tmp[i]);
  return status;
}

int wane_topk_backward(wane_stream *s, wane_handle *dx, const wane_handle *hdvalues, const wane_handle *hindices, int64_t n) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *dvalues = wane_use(s, hdvalues, "dvalues"), *indices = dvalues ? wane_use(s, hindices, "indices") : NULL;
  if (!indices) return WANE_E_STALE;
  if ((status = need_float("topk_backward", "dvalues", dvalues))) return status;
  if (indices->dtype != WANE_I64) return wane_fail(WANE_E_DTYPE, "topk_backward: indices must be i64, as wane_topk gives them, found %s", wane_shape_text(indices));
  if (dvalues->ndim != 2 || !same_shape(dvalues, indices) || n < dvalues->shape[1])
    return wane_fail(WANE_E_SHAPE, "topk_backward: expected dvalues and indices [M, k] and n >= k, found %s, %s, %lld", wane_shape_text(dvalues), wane_shape_text(indices), (long long)n);
  int64_t shape[2] = { dvalues->shape[0], n }, k = dvalues->shape[1];
  wane_handle tmp[2] = { { NULL, 0, 0 } };
  dvalues = wane_contiguous(s, dvalues, &tmp[0]);
  indices = dvalues ? wane_contiguous(s, indices, &tmp[1]) : NULL;
  wane_tensor *y = indices ? wane_make(s, dx, dvalues->dtype, 2, shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (wane_numel(y) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_TOPK_BACKWARD);
    op->p[0] = y->data; op->p[1] = dvalues->data; op->p[2] = indices->data;
    op->n[0] = shape[0]; op->n[1] = k; op->n[2] = n;
    op->i[0] = dvalues->dtype;
    op->nchunks = wane_chunks(shape[0], 1 + ELEMENTS / n);
    wane_op_push(s, op, y, NULL);
  }
  for (int i = 0; i < 2; i++) wane_tensor_free(&tmp[i]);
  return status;
}

int wane_dropout(wane_stream *s, wane_handle *out, const wane_handle *hx, double p, uint64_t seed, uint64_t offset) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *x = wane_use(s, hx, "x");
  if (!x) return WANE_E_STALE;
  if ((status = need_float("dropout", "x", x))) return status;
  if (!(p >= 0.0 && p < 1.0)) return wane_fail(WANE_E_ARG, "dropout: p is %g; expected a share of values to drop in [0, 1)", p);
  wane_handle tmp = { NULL, 0, 0 };
  x = wane_contiguous(s, x, &tmp);
  wane_tensor *y = x ? wane_make(s, out, x->dtype, x->ndim, x->shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (wane_numel(y) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_DROPOUT);
    op->p[0] = y->data; op->p[1] = x->data;
    op->n[0] = wane_numel(y); op->n[1] = (int64_t)seed; op->n[2] = (int64_t)offset;
    op->f[0] = wane_dropout_threshold(p); op->f[1] = (float)(1.0 / (1.0 - p));
    op->i[0] = x->dtype;
    op->nchunks = wane_chunks(op->n[0], ELEMENTS / 4);
    wane_op_push(s, op, y, NULL);
  }
  wane_tensor_free(&tmp);
  return status;
}

int wane_add_into(wane_stream *s, const wane_handle *hdst, const wane_handle *hsrc, double factor) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *dst = wane_use(s, hdst, "dst"), *src = dst ? wane_use(s, hsrc, "src") : NULL;
  if (!src) return WANE_E_STALE;
  if ((status = need_float("add_into", "src", src))) return status;
  if (dst->dtype != WANE_F32 || !wane_is_contiguous(dst)) return wane_fail(WANE_E_DTYPE, "add_into: dst must be a contiguous f32 tensor, found %s", wane_shape_text(dst));
  if (!same_shape(dst, src)) return wane_fail(WANE_E_SHAPE, "add_into: dst %s and src %s must have one shape", wane_shape_text(dst), wane_shape_text(src));
  wane_handle tmp = { NULL, 0, 0 };
  src = wane_contiguous(s, src, &tmp);
  if (!src) status = WANE_E_MEMORY;
  else if (wane_numel(dst) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_ADD_INTO);
    op->p[0] = dst->data; op->p[1] = src->data;
    op->n[0] = wane_numel(dst);
    op->f[0] = (float)factor;
    op->i[0] = src->dtype;
    op->nchunks = wane_chunks(op->n[0], 2 * ELEMENTS);
    wane_op_push(s, op, dst, NULL);
  }
  wane_tensor_free(&tmp);
  return status;
}

int wane_experts_weight_backward(wane_stream *s, wane_handle *dw, const wane_handle *hdy, const wane_handle *hx, const wane_handle *hbounds, int64_t experts) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *dy = wane_use(s, hdy, "dy"), *x = dy ? wane_use(s, hx, "x") : NULL, *bounds = x ? wane_use(s, hbounds, "bounds") : NULL;
  if (!bounds) return WANE_E_STALE;
  if ((status = need_float("experts_weight_backward", "dy", dy)) || (status = need_float("experts_weight_backward", "x", x))) return status;
  if (dy->ndim != 2 || x->ndim != 2 || dy->shape[0] != x->shape[0])
    return wane_fail(WANE_E_SHAPE, "experts_weight_backward: expected dy [P, N] and x [P, K], found %s and %s", wane_shape_text(dy), wane_shape_text(x));
  if (experts < 1 || bounds->dtype != WANE_I32 || bounds->ndim != 1 || bounds->shape[0] != experts + 1 || !wane_is_contiguous(bounds))
    return wane_fail(WANE_E_SHAPE, "experts_weight_backward: expected bounds [%lld] i32 of wane_route, found %s", (long long)experts + 1, wane_shape_text(bounds));
  int64_t shape[3] = { experts, dy->shape[1], x->shape[1] }, rows = x->shape[0];
  wane_handle tmp[2] = { { NULL, 0, 0 } };
  dy = wane_contiguous(s, dy, &tmp[0]);
  x = dy ? wane_contiguous(s, x, &tmp[1]) : NULL;
  wane_tensor *y = x ? wane_make(s, dw, WANE_F32, 3, shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (wane_numel(y) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_EXPERTS_WEIGHT);
    op->p[0] = y->data; op->p[1] = dy->data; op->p[2] = x->data; op->p[3] = bounds->data;
    op->n[0] = experts; op->n[1] = shape[1]; op->n[2] = shape[2];
    op->i[0] = dy->dtype; op->i[1] = x->dtype;
    op->nchunks = wane_chunks(experts * shape[1], 1 + 8 * ELEMENTS / (shape[2] * (rows / experts + 1) + 1));
    wane_op_push(s, op, y, NULL);
  }
  for (int i = 0; i < 2; i++) wane_tensor_free(&tmp[i]);
  return status;
}
