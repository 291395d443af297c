/* elementwise.c: casts, copies, fills, unary and binary ops, where: arguments are checked and results made here, the work is
 * one strided op (strided.h) each. Section 8 of wane.h is the manual. */
#include "convert.h"
#include "strided.h"
#include <math.h>

static int is_comparison(int op) { return op >= WANE_EQ && op <= WANE_XOR; }

/* Enqueues dst = src, broadcast and converted. */
static void push_copy(wane_stream *s, wane_tensor *dst, const wane_tensor *src) {
  wane_strided g;
  wane_op model = { 0 };
  wane_strided_begin(&g, dst->ndim, dst->shape);
  wane_strided_add(&g, dst);
  wane_strided_add(&g, src);
  wane_strided_push(s, &g, WANE_OP_COPY, &model, 1, dst);
}

int wane_cast(wane_stream *s, wane_handle *out, const wane_handle *t, int dtype) {
  int rc = wane_enter(s);
  wane_tensor *x = rc ? NULL : wane_use(s, t, "t");
  if (!x) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(x, "cast", "t"))) return rc;
  if (dtype < 0 || dtype >= WANE_DTYPE_PLAIN)
    return wane_fail(WANE_E_DTYPE, "cast: %s is not a plain dtype; quantize with wane_quantize",
                     wane_dtype_name(dtype) ? wane_dtype_name(dtype) : "that number");
  wane_tensor *y = wane_make(s, out, dtype, x->ndim, x->shape);
  if (!y) return WANE_E_MEMORY;
  push_copy(s, y, x);
  return WANE_OK;
}

/* First and last byte of a non-empty tensor's elements. */
static void extent(const wane_tensor *t, const char **lo, const char **hi) {
  int64_t below = 0, above = 0;
  for (int d = 0; d < t->ndim; d++) {
    int64_t span = (t->shape[d] - 1) * t->stride[d];
    if (span < 0) below += span;
    else above += span;
  }
  *lo = t->data + below * wane_element_size(t->dtype);
  *hi = t->data + (above + 1) * wane_element_size(t->dtype) - 1;
}

/* Whether a copy from b to a could read what it has already written. */
static int overlap(const wane_tensor *a, const wane_tensor *b) {
  const char *alo, *ahi, *blo, *bhi;
  if (a->storage != b->storage || wane_numel(a) == 0 || wane_numel(b) == 0) return 0;
  extent(a, &alo, &ahi);
  extent(b, &blo, &bhi);
  return alo <= bhi && blo <= ahi;
}

/* A view that repeats memory cannot be written: which of the values would stay? */
static int need_writable(const wane_tensor *t, const char *op) {
  for (int d = 0; d < t->ndim; d++)
    if (t->stride[d] == 0 && t->shape[d] > 1)
      return wane_fail(WANE_E_ARG, "%s: the destination %s is an expanded view: dimension %d repeats the same memory; write to a contiguous copy", op,
                       wane_shape_text(t), d + 1);
  return WANE_OK;
}

int wane_copy(wane_stream *s, const wane_handle *dst, const wane_handle *src) {
  int64_t shape[WANE_MAX_DIMS];
  int ndim, rc = wane_enter(s);
  wane_tensor *d = rc ? NULL : wane_use(s, dst, "dst"), *x = d ? wane_use(s, src, "src") : NULL;
  if (!x) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(d, "copy", "dst")) || (rc = wane_need_plain(x, "copy", "src")) || (rc = need_writable(d, "copy"))) return rc;
  /* As in Torch, sizes of 1 in front of the source do not count. */
  wane_tensor view = *x;
  while (view.ndim > d->ndim && view.shape[0] == 1) {
    view.ndim--;
    for (int i = 0; i < view.ndim; i++) view.shape[i] = view.shape[i + 1], view.stride[i] = view.stride[i + 1];
  }
  rc = wane_broadcast_shape(d, &view, "copy", &ndim, shape);
  if (rc) return rc;
  for (int i = 0; i < ndim; i++)
    if (ndim != d->ndim || shape[i] != d->shape[i])
      return wane_fail(WANE_E_SHAPE, "copy: source %s does not fit into destination %s", wane_shape_text(x), wane_shape_text(d));
  if (!overlap(d, x)) {
    push_copy(s, d, &view);
    return WANE_OK;
  }
  wane_handle tmp = { 0 };
  wane_tensor *copy = wane_make(s, &tmp, view.dtype, view.ndim, view.shape);
  if (!copy) return WANE_E_MEMORY;
  push_copy(s, copy, &view);
  push_copy(s, d, copy);
  wane_tensor_free(&tmp);
  return WANE_OK;
}

int wane_fill(wane_stream *s, const wane_handle *t, double value) {
  int rc = wane_enter(s);
  wane_tensor *x = rc ? NULL : wane_use(s, t, "t");
  if (!x) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(x, "fill", "t")) || (rc = need_writable(x, "fill"))) return rc;
  wane_strided g;
  wane_op model = { 0 };
  model.n[7] = (int64_t)wane_value_bits(x->dtype, value);
  wane_strided_begin(&g, x->ndim, x->shape);
  wane_strided_add(&g, x);
  wane_strided_push(s, &g, WANE_OP_FILL, &model, 1, x);
  return WANE_OK;
}

/* Rough cost of an element against an addition's, for cutting work into chunks. */
static int64_t unary_work(int op) {
  switch (op) {
    case WANE_EXP: case WANE_LOG: case WANE_SIN: case WANE_COS: case WANE_TANH: case WANE_SIGMOID: case WANE_SILU: case WANE_GELU:
    case WANE_GELU_TANH: case WANE_QUICK_GELU: case WANE_ERF: return 8;
    default: return 1;
  }
}

int wane_unary(wane_stream *s, wane_handle *out, const wane_handle *x, int op) {
  int rc = wane_enter(s);
  wane_tensor *t = rc ? NULL : wane_use(s, x, "x");
  if (!t) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(t, "unary", "x"))) return rc;
  if (op < 0 || op >= WANE_UNARY_END) return wane_fail(WANE_E_ARG, "unary: there is no operation number %d", op);
  int truth = op == WANE_NOT || op == WANE_ISNAN || op == WANE_ISFINITE;
  int whole = truth || op == WANE_NEG || op == WANE_ABS || op == WANE_SIGN || op == WANE_SQUARE || op == WANE_RELU;
  int is_float = wane_is_float(t->dtype);
  wane_tensor *y = wane_make(s, out, truth ? WANE_BOOL : is_float || whole ? t->dtype : WANE_F32, t->ndim, t->shape);
  if (!y) return WANE_E_MEMORY;
  wane_strided g;
  wane_op model = { 0 };
  model.i[4] = op;
  model.i[5] = !is_float && whole;
  wane_strided_begin(&g, y->ndim, y->shape);
  wane_strided_add(&g, y);
  wane_strided_add(&g, t);
  wane_strided_push(s, &g, WANE_OP_UNARY, &model, unary_work(op), y);
  return WANE_OK;
}

int wane_binary(wane_stream *s, wane_handle *out, const wane_handle *a, const wane_handle *b, int op) {
  int64_t shape[WANE_MAX_DIMS];
  int ndim, rc = wane_enter(s);
  wane_tensor *x = rc ? NULL : wane_use(s, a, "a"), *y = x ? wane_use(s, b, "b") : NULL;
  if (!y) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(x, "binary", "a")) || (rc = wane_need_plain(y, "binary", "b"))) return rc;
  if (op < 0 || op >= WANE_BINARY_END) return wane_fail(WANE_E_ARG, "binary: there is no operation number %d", op);
  if ((rc = wane_broadcast_shape(x, y, "binary", &ndim, shape))) return rc;
  int wide = wane_promote(x->dtype, y->dtype), integers = !wane_is_float(wide) && op != WANE_DIV && op != WANE_ATAN2;
  int dtype = is_comparison(op) ? WANE_BOOL : !integers && !wane_is_float(wide) ? WANE_F32 : wide;
  wane_tensor *r = wane_make(s, out, dtype, ndim, shape);
  if (!r) return WANE_E_MEMORY;
  wane_strided g;
  wane_op model = { 0 };
  model.i[4] = op;
  model.i[5] = integers;
  wane_strided_begin(&g, ndim, shape);
  wane_strided_add(&g, r);
  wane_strided_add(&g, x);
  wane_strided_add(&g, y);
  wane_strided_push(s, &g, WANE_OP_BINARY, &model, op == WANE_POW || op == WANE_MOD || op == WANE_ATAN2 ? 16 : 1, r);
  return WANE_OK;
}

int wane_binary_scalar(wane_stream *s, wane_handle *out, const wane_handle *a, double value, int op, int reversed) {
  int rc = wane_enter(s);
  wane_tensor *x = rc ? NULL : wane_use(s, a, "a");
  if (!x) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(x, "binary", "a"))) return rc;
  if (op < 0 || op >= WANE_BINARY_END) return wane_fail(WANE_E_ARG, "binary: there is no operation number %d", op);
  int whole = value == floor(value) && fabs(value) < 0x1p63;
  int integers = !wane_is_float(x->dtype) && whole && op != WANE_DIV && op != WANE_ATAN2;
  if (op == WANE_POW && (reversed || value < 0)) integers = integers && reversed;   /* 2^-1 is a half */
  int wide = x->dtype == WANE_BOOL ? WANE_I64 : x->dtype;                           /* true + 1 is 2 */
  int dtype = is_comparison(op) ? WANE_BOOL : integers ? wide : wane_is_float(x->dtype) ? x->dtype : WANE_F32;
  wane_tensor *r = wane_make(s, out, dtype, x->ndim, x->shape);
  if (!r) return WANE_E_MEMORY;
  wane_strided g;
  wane_op model = { 0 };
  model.i[4] = op;
  model.i[5] = integers;
  model.i[6] = 1;
  model.i[7] = reversed != 0;
  model.d[0] = value;
  wane_strided_begin(&g, x->ndim, x->shape);
  wane_strided_add(&g, r);
  wane_strided_add(&g, x);
  wane_strided_push(s, &g, WANE_OP_BINARY, &model, op == WANE_POW || op == WANE_MOD || op == WANE_ATAN2 ? 16 : 1, r);
  return WANE_OK;
}

/* The shape all three broadcast to. */
static int shape_of_three(const wane_tensor *c, const wane_tensor *x, const wane_tensor *y, int *ndim, int64_t *shape) {
  wane_tensor pair = { 0 };
  int rc = wane_broadcast_shape(x, y, "where", &pair.ndim, pair.shape);
  pair.dtype = x->dtype;
  return rc ? rc : wane_broadcast_shape(c, &pair, "where", ndim, shape);
}

int wane_where(wane_stream *s, wane_handle *out, const wane_handle *cond, const wane_handle *a, const wane_handle *b) {
  int64_t shape[WANE_MAX_DIMS];
  int ndim, rc = wane_enter(s);
  wane_tensor *c = rc ? NULL : wane_use(s, cond, "cond"), *x = c ? wane_use(s, a, "a") : NULL, *y = x ? wane_use(s, b, "b") : NULL;
  if (!y) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(c, "where", "cond")) || (rc = wane_need_plain(x, "where", "a")) || (rc = wane_need_plain(y, "where", "b"))) return rc;
  if ((rc = shape_of_three(c, x, y, &ndim, shape))) return rc;
  int dtype = wane_promote(x->dtype, y->dtype);
  wane_tensor *r = wane_make(s, out, dtype, ndim, shape);
  if (!r) return WANE_E_MEMORY;
  wane_strided g;
  wane_op model = { 0 };
  model.i[5] = !wane_is_float(dtype);
  wane_strided_begin(&g, ndim, shape);
  wane_strided_add(&g, r);
  wane_strided_add(&g, c);
  wane_strided_add(&g, x);
  wane_strided_add(&g, y);
  wane_strided_push(s, &g, WANE_OP_WHERE, &model, 2, r);
  return WANE_OK;
}
