/* gather.c: selecting by index tensors and joining: index_select, gather, cat. The kernel is elementwise_kernels.h's index. */
#include "convert.h"
#include "strided.h"
#include <string.h>

/* Checks an index tensor's dtype. */
static int need_index(const wane_tensor *t, const char *op) {
  if (t->dtype == WANE_I32 || t->dtype == WANE_I64) return WANE_OK;
  return wane_fail(WANE_E_DTYPE, "%s: index is %s; expected i32 or i64", op, wane_shape_text(t));
}

static int need_dim(const wane_tensor *t, int dim, const char *op) {
  if (dim >= 0 && dim < t->ndim) return WANE_OK;
  return wane_fail(WANE_E_ARG, "%s: %s has no dimension %d", op, wane_shape_text(t), dim + 1);
}

int wane_index_select(wane_stream *s, wane_handle *out, const wane_handle *x, int dim, const wane_handle *index) {
  int rc = wane_enter(s);
  wane_tensor *t = rc ? NULL : wane_use(s, x, "x"), *at = t ? wane_use(s, index, "index") : NULL;
  if (!at) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(t, "index_select", "x")) || (rc = need_dim(t, dim, "index_select")) || (rc = need_index(at, "index_select"))) return rc;
  int ndim = t->ndim - 1 + at->ndim;
  if (ndim > WANE_MAX_DIMS)
    return wane_fail(WANE_E_SHAPE, "index_select: %s with index %s has %d dimensions; at most %d",
                     wane_shape_text(t), wane_shape_text(at), ndim, WANE_MAX_DIMS);
  /* x and index as views over the result's shape: each has stride 0 in the other's dimensions. */
  wane_tensor vx = *t, vi = *at;
  int64_t shape[WANE_MAX_DIMS];
  for (int d = 0; d < ndim; d++) {
    int in_index = d >= dim && d < dim + at->ndim, from = d < dim ? d : d - at->ndim + 1;
    shape[d] = in_index ? at->shape[d - dim] : t->shape[from];
    vi.stride[d] = in_index ? at->stride[d - dim] : 0;
    vx.stride[d] = in_index ? 0 : t->stride[from];
    vi.shape[d] = vx.shape[d] = shape[d];
  }
  vi.ndim = vx.ndim = ndim;
  wane_tensor *y = wane_make(s, out, t->dtype, ndim, shape);
  if (!y) return WANE_E_MEMORY;
  wane_strided g;
  wane_op model = { 0 };
  model.n[7] = t->shape[dim];
  model.n[8] = t->stride[dim];
  wane_strided_begin(&g, ndim, shape);
  wane_strided_add(&g, y);
  wane_strided_add(&g, &vx);
  wane_strided_add(&g, &vi);
  wane_strided_push(s, &g, WANE_OP_INDEX, &model, 1, y);
  return WANE_OK;
}

int wane_gather(wane_stream *s, wane_handle *out, const wane_handle *x, int dim, const wane_handle *index) {
  int rc = wane_enter(s);
  wane_tensor *t = rc ? NULL : wane_use(s, x, "x"), *at = t ? wane_use(s, index, "index") : NULL;
  if (!at) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(t, "gather", "x")) || (rc = need_dim(t, dim, "gather")) || (rc = need_index(at, "gather"))) return rc;
  if (at->ndim != t->ndim)
    return wane_fail(WANE_E_SHAPE, "gather: x %s and index %s need the same number of dimensions", wane_shape_text(t), wane_shape_text(at));
  int64_t shape[WANE_MAX_DIMS];
  wane_tensor vx = *t;
  for (int d = 0; d < t->ndim; d++) {
    shape[d] = d == dim || t->shape[d] == 1 ? at->shape[d] : t->shape[d];
    if (d != dim && at->shape[d] != 1 && at->shape[d] != shape[d])
      return wane_fail(WANE_E_SHAPE, "gather: x %s and index %s do not broadcast in dimension %d", wane_shape_text(t), wane_shape_text(at), d + 1);
  }
  vx.shape[dim] = shape[dim];
  vx.stride[dim] = 0;
  wane_tensor *y = wane_make(s, out, t->dtype, t->ndim, shape);
  if (!y) return WANE_E_MEMORY;
  wane_strided g;
  wane_op model = { 0 };
  model.n[7] = t->shape[dim];
  model.n[8] = t->stride[dim];
  wane_strided_begin(&g, t->ndim, shape);
  wane_strided_add(&g, y);
  wane_strided_add(&g, &vx);
  wane_strided_add(&g, at);
  wane_strided_push(s, &g, WANE_OP_INDEX, &model, 2, y);
  return WANE_OK;
}

/* The joined shape and dtype of `count` tensors. */
static int cat_shape(wane_stream *s, const wane_handle *const *tensors, int count, int dim, int *dtype, int64_t *shape, int *ndim) {
  int rc;
  if (count < 1) return wane_fail(WANE_E_ARG, "cat: nothing to join");
  const wane_tensor *first = wane_use(s, tensors[0], "tensors[0]");
  if (!first) return WANE_E_STALE;
  if ((rc = wane_need_plain(first, "cat", "tensors[0]")) || (rc = need_dim(first, dim, "cat"))) return rc;
  *dtype = first->dtype;
  *ndim = first->ndim;
  memcpy(shape, first->shape, sizeof first->shape);
  for (int i = 1; i < count; i++) {
    const wane_tensor *t = wane_use(s, tensors[i], "tensors[i]");
    if (!t) return WANE_E_STALE;
    if ((rc = wane_need_plain(t, "cat", "tensors[i]"))) return rc;
    int fits = t->ndim == first->ndim;
    for (int d = 0; fits && d < t->ndim; d++) fits = d == dim || t->shape[d] == first->shape[d];
    if (!fits)
      return wane_fail(WANE_E_SHAPE, "cat: %s (number %d) does not fit to %s along dimension %d", wane_shape_text(t), i + 1, wane_shape_text(first), dim + 1);
    shape[dim] += t->shape[dim];
    *dtype = wane_promote(*dtype, t->dtype);
  }
  return WANE_OK;
}

int wane_cat(wane_stream *s, wane_handle *out, const wane_handle *const *tensors, int count, int dim) {
  int64_t shape[WANE_MAX_DIMS], at = 0;
  int dtype = 0, ndim = 0, rc = wane_enter(s);
  if (rc || (rc = cat_shape(s, tensors, count, dim, &dtype, shape, &ndim))) return rc;
  wane_tensor *y = wane_make(s, out, dtype, ndim, shape);
  if (!y) return WANE_E_MEMORY;
  for (int i = 0; i < count; i++) {
    const wane_tensor *t = wane_use(s, tensors[i], "tensors[i]");
    wane_tensor part = *y;
    wane_strided g;
    wane_op model = { 0 };
    part.shape[dim] = t->shape[dim];
    part.data += at * y->stride[dim] * wane_element_size(dtype);
    at += t->shape[dim];
    wane_strided_begin(&g, ndim, part.shape);
    wane_strided_add(&g, &part);
    wane_strided_add(&g, t);
    wane_strided_push(s, &g, WANE_OP_COPY, &model, 1, y);
  }
  return WANE_OK;
}
