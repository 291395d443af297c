/* reduce.c: sums, extremes and their like over one dimension or over everything; running sums. Results do not depend on how
 * the work is cut: see reduce_kernels.h. */
#include "reduce.h"
#include <string.h>

/* The result's dtype; -1 for an operation that does not exist. */
static int result_dtype(int op, int dtype) {
  int is_float = wane_is_float(dtype);
  switch (op) {
    case WANE_SUM: case WANE_PROD: return is_float ? dtype : WANE_I64;
    case WANE_MEAN: case WANE_NORM2: case WANE_VAR: return is_float ? dtype : WANE_F32;
    case WANE_AMAX: case WANE_AMIN: return dtype;
    case WANE_ARGMAX: case WANE_ARGMIN: return WANE_I64;
    case WANE_ANY: case WANE_ALL: return WANE_BOOL;
    default: return -1;
  }
}

/* t without dimension `dim` (a view, not counted). */
static wane_tensor without(const wane_tensor *t, int dim) {
  wane_tensor v = *t;
  v.ndim--;
  for (int d = dim; d < v.ndim; d++) v.shape[d] = t->shape[d + 1], v.stride[d] = t->stride[d + 1];
  return v;
}

/* A long reduction with few outputs: pieces in parallel, then one op that merges. rows of n elements, `row` apart. */
static int push_split(wane_stream *s, const wane_tensor *x, wane_tensor *y, const wane_op *model, int64_t rows, int64_t row) {
  int64_t n = model->n[7], pieces = (n + WANE_PIECE - 1) / WANE_PIECE;
  wane_storage *hold = NULL;
  void *states = wane_workspace(s, (size_t)(rows * pieces) * sizeof(wane_reduced), &hold);
  if (!states) return WANE_E_MEMORY;
  for (int stage = WANE_REDUCE_PIECES; stage <= WANE_REDUCE_MERGE; stage++) {
    wane_op *op = wane_op_new(s, WANE_OP_REDUCE);
    int last = stage == WANE_REDUCE_MERGE;
    op->i[0] = y->dtype;
    op->i[1] = x->dtype;
    op->i[4] = model->i[4];
    op->i[5] = model->i[5];
    op->i[6] = stage;
    op->n[0] = rows;
    op->n[1] = pieces;
    op->n[2] = row;
    op->n[7] = n;
    op->n[8] = model->n[8];
    op->p[0] = last ? (void *)y->data : states;
    op->p[1] = last ? states : (void *)x->data;
    op->nchunks = last ? 1 : wane_chunks(rows * n, 16384);
    wane_op_push(s, op, last ? y : NULL, NULL);
  }
  wane_storage_unref(hold);
  return WANE_OK;
}

/* Enqueues y = reduction of x over `dim` (x has one dimension when all of it is meant). */
static int push_reduce(wane_stream *s, const wane_tensor *x, wane_tensor *y, int op, int dim) {
  wane_tensor rest = without(x, dim), flat = *y;
  int64_t rows = wane_numel(&rest);
  wane_op model = { 0 };
  model.i[4] = op;
  model.i[5] = !wane_is_float(x->dtype) && op != WANE_NORM2 && op != WANE_VAR;
  model.n[7] = x->shape[dim];
  model.n[8] = x->stride[dim];
  /* One row, or rows at equal distance, can be shared by workers. */
  if (rows > 0 && rows < 16 && x->shape[dim] > 4 * WANE_PIECE && rest.ndim <= 1)
    return push_split(s, x, y, &model, rows, rest.ndim ? rest.stride[0] : 0);
  flat.ndim = rest.ndim;
  memcpy(flat.shape, rest.shape, sizeof flat.shape);
  int64_t step = 1;
  for (int d = flat.ndim - 1; d >= 0; d--) flat.stride[d] = step, step *= flat.shape[d];
  wane_strided g;
  wane_strided_begin(&g, rest.ndim, rest.shape);
  wane_strided_add(&g, &flat);
  wane_strided_add(&g, &rest);
  wane_strided_push(s, &g, WANE_OP_REDUCE, &model, x->shape[dim], y);
  return WANE_OK;
}

int wane_reduce(wane_stream *s, wane_handle *out, const wane_handle *x, int op, int dim, int keepdim) {
  int rc = wane_enter(s);
  wane_tensor *t = rc ? NULL : wane_use(s, x, "x"), all;
  wane_handle tmp = { 0 };
  if (!t) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(t, "reduce", "x"))) return rc;
  int dtype = result_dtype(op, t->dtype), everything = dim == -1;
  if (dtype < 0) return wane_fail(WANE_E_ARG, "reduce: there is no operation number %d", op);
  if (!everything && (dim < 0 || dim >= t->ndim))
    return wane_fail(WANE_E_ARG, "reduce: %s has no dimension %d", wane_shape_text(t), dim + 1);
  int64_t shape[WANE_MAX_DIMS], n = everything ? wane_numel(t) : t->shape[dim];
  if (n == 0 && op != WANE_SUM && op != WANE_PROD && op != WANE_MEAN && op != WANE_ANY && op != WANE_ALL && op != WANE_NORM2 && op != WANE_VAR)
    return wane_fail(WANE_E_SHAPE, "reduce: no largest or smallest of nothing: %s", wane_shape_text(t));
  int ndim = 0;
  for (int d = 0; d < t->ndim; d++) {
    if (everything || d == dim) {
      if (keepdim) shape[ndim++] = 1;
    } else shape[ndim++] = t->shape[d];
  }
  if (everything) {
    if (!(t = wane_contiguous(s, t, &tmp))) return WANE_E_MEMORY;
    all = *t;
    all.ndim = 1;
    all.shape[0] = n;
    all.stride[0] = 1;
    t = &all;
  }
  wane_tensor *y = wane_make(s, out, dtype, ndim, shape);
  rc = y ? push_reduce(s, t, y, op, everything ? 0 : dim) : WANE_E_MEMORY;
  if (rc && y) wane_tensor_free(out);
  wane_tensor_free(&tmp);
  return rc;
}

int wane_cumsum(wane_stream *s, wane_handle *out, const wane_handle *x, int dim) {
  int rc = wane_enter(s);
  wane_tensor *t = rc ? NULL : wane_use(s, x, "x");
  if (!t) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(t, "cumsum", "x"))) return rc;
  if (dim < 0 || dim >= t->ndim) return wane_fail(WANE_E_ARG, "cumsum: %s has no dimension %d", wane_shape_text(t), dim + 1);
  wane_tensor *y = wane_make(s, out, wane_is_float(t->dtype) ? t->dtype : WANE_I64, t->ndim, t->shape);
  if (!y) return WANE_E_MEMORY;
  wane_tensor from = without(t, dim), to = without(y, dim);
  wane_op model = { 0 };
  model.i[5] = !wane_is_float(t->dtype);
  model.n[7] = t->shape[dim];
  model.n[8] = t->stride[dim];
  model.n[9] = y->stride[dim];
  wane_strided g;
  wane_strided_begin(&g, to.ndim, to.shape);
  wane_strided_add(&g, &to);
  wane_strided_add(&g, &from);
  wane_strided_push(s, &g, WANE_OP_CUMSUM, &model, 2 * t->shape[dim], y);
  return WANE_OK;
}
