/* tensor.c: dtypes, shapes, moving bytes in and out, views. Nothing here computes. */
#include "tensor.h"
#include <stdio.h>
#include <string.h>

/* ---------------------------------------------------------------- dtypes */

typedef struct dtype_row { const char *name; int32_t block, bytes; } dtype_row;   /* values a block, bytes a block; 0: several parts */
static const dtype_row dtypes[WANE_DTYPE_END] = {
  [WANE_F32] = { "f32", 1, 4 }, [WANE_F16] = { "f16", 1, 2 }, [WANE_BF16] = { "bf16", 1, 2 }, [WANE_I8] = { "i8", 1, 1 },
  [WANE_U8] = { "u8", 1, 1 }, [WANE_I32] = { "i32", 1, 4 }, [WANE_I64] = { "i64", 1, 8 }, [WANE_BOOL] = { "bool", 1, 1 },
  [WANE_F64] = { "f64", 1, 8 }, [WANE_I16] = { "i16", 1, 2 },
  [WANE_NF4] = { "nf4", 0, 0 }, [WANE_FP4] = { "fp4", 0, 0 }, [WANE_INT8] = { "int8", 0, 0 },
  [WANE_BLOCK8] = { "int8-blockwise", 0, 0 }, [WANE_BLOCK8U] = { "int8-blockwise-unsigned", 0, 0 },
  [WANE_Q4_0] = { "q4_0", 32, 18 }, [WANE_Q4_1] = { "q4_1", 32, 20 }, [WANE_Q5_0] = { "q5_0", 32, 22 }, [WANE_Q5_1] = { "q5_1", 32, 24 },
  [WANE_Q8_0] = { "q8_0", 32, 34 }, [WANE_Q2_K] = { "q2_k", 256, 84 }, [WANE_Q3_K] = { "q3_k", 256, 110 }, [WANE_Q4_K] = { "q4_k", 256, 144 },
  [WANE_Q5_K] = { "q5_k", 256, 176 }, [WANE_Q6_K] = { "q6_k", 256, 210 }, [WANE_IQ4_NL] = { "iq4_nl", 32, 18 }, [WANE_IQ4_XS] = { "iq4_xs", 256, 136 },
  [WANE_MXFP4] = { "mxfp4", 32, 17 }, [WANE_NVFP4] = { "nvfp4", 64, 36 }, [WANE_TQ1_0] = { "tq1_0", 256, 54 }, [WANE_TQ2_0] = { "tq2_0", 256, 66 },
  [WANE_IQ1_S] = { "iq1_s", 256, 50 }, [WANE_IQ1_M] = { "iq1_m", 256, 56 }, [WANE_IQ2_XXS] = { "iq2_xxs", 256, 66 },
  [WANE_IQ2_XS] = { "iq2_xs", 256, 74 }, [WANE_IQ2_S] = { "iq2_s", 256, 82 }, [WANE_IQ3_XXS] = { "iq3_xxs", 256, 98 },
  [WANE_IQ3_S] = { "iq3_s", 256, 110 },
};

const char *wane_dtype_name(int dtype) { return dtype >= 0 && dtype < WANE_DTYPE_END ? dtypes[dtype].name : NULL; }

int wane_dtype_from_name(const char *name) {
  for (int i = 0; i < WANE_DTYPE_END; i++) if (dtypes[i].name && !strcmp(dtypes[i].name, name)) return i;
  return -1;
}

int64_t wane_dtype_bytes(int dtype, int64_t n) {
  if (!wane_dtype_name(dtype) || !dtypes[dtype].block || n < 0 || n % dtypes[dtype].block) return -1;
  return n / dtypes[dtype].block * dtypes[dtype].bytes;
}

int64_t wane_size_of(int dtype) { return dtype >= 0 && dtype < WANE_DTYPE_PLAIN ? dtypes[dtype].bytes : 0; }
int wane_is_float(int dtype) { return dtype == WANE_F32 || dtype == WANE_F16 || dtype == WANE_BF16; }

/* ---------------------------------------------------------------- shapes */

int64_t wane_numel(const wane_tensor *t) {
  int64_t n = 1;
  for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
  return n;
}

int wane_is_contiguous(const wane_tensor *t) {
  if (t->parts) return 1;
  int64_t stride = 1;
  for (int i = t->ndim - 1; i >= 0; i--) {
    if (t->shape[i] == 0) return 1;
    if (t->shape[i] != 1 && t->stride[i] != stride) return 0;
    stride *= t->shape[i];
  }
  return 1;
}

const char *wane_shape_text(const wane_tensor *t) {
  static _Thread_local char ring[4][160];
  static _Thread_local int next;
  char *out = ring[next++ & 3];
  int n = snprintf(out, 160, "[");
  for (int i = 0; i < t->ndim && n < 130; i++) n += snprintf(out + n, 160 - (size_t)n, i ? ", %lld" : "%lld", (long long)t->shape[i]);
  snprintf(out + n, 160 - (size_t)n, "] %s", wane_dtype_name(t->dtype));
  return out;
}

int64_t wane_strided_span(int ndim, const int64_t *shape, const int64_t *stride) {
  int64_t last = 0, values = 1, step;
  int empty = 0;
  for (int i = 0; i < ndim; i++) {
    if (shape[i] < 0 || stride[i] < 0) return -1;
    if (shape[i] == 0) { empty = 1; continue; }
    if (__builtin_mul_overflow(values, shape[i], &values)) return -1;
    if (__builtin_mul_overflow(shape[i] - 1, stride[i], &step) || __builtin_add_overflow(last, step, &last)) return -1;
  }
  return empty ? 0 : last == INT64_MAX ? -1 : last + 1;
}

/* ---------------------------------------------------------------- bytes in and out */

int wane_tensor_upload(wane_stream *s, const wane_handle *h, const void *data, size_t bytes) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *t = wane_use(s, h, "tensor");
  if (!t) return WANE_E_STALE;
  if (t->parts || !wane_is_contiguous(t)) return wane_fail(WANE_E_SHAPE, "upload needs a plain contiguous tensor, found a view or quantized %s", wane_shape_text(t));
  int64_t want = wane_numel(t) * wane_size_of(t->dtype);
  if (bytes != (size_t)want) return wane_fail(WANE_E_SHAPE, "upload into %s: expected %lld bytes, found %zu", wane_shape_text(t), (long long)want, bytes);
  if (!bytes) return WANE_OK;
  void *staging = wane_alloc(bytes, "a staging copy");
  if (!staging) return WANE_E_MEMORY;
  memcpy(staging, data, bytes);
  wane_op *op = wane_op_new(s, WANE_OP_UPLOAD);
  op->always = 1;                                     /* it owns the staging copy */
  op->p[0] = t->data;
  op->p[1] = staging;
  op->n[0] = (int64_t)bytes;
  wane_op_push(s, op, t, NULL);
  return WANE_OK;
}

void *wane_tensor_data(wane_stream *s, const wane_handle *h) {
  wane_tensor *t = wane_use(s, h, "tensor");
  if (!t) return NULL;
  if (t->parts) { wane_fail(WANE_E_DTYPE, "a quantized tensor has several parts: see wane_quantized_part"); return NULL; }
  return t->data;
}

int wane_tensor_read(wane_stream *s, const wane_handle *h, void *data, size_t bytes) {
  wane_tensor *t = wane_use(s, h, "tensor");
  if (!t) return WANE_E_STALE;
  if (t->parts || !wane_is_contiguous(t)) return wane_fail(WANE_E_SHAPE, "reading needs a plain contiguous tensor, found a view or quantized %s", wane_shape_text(t));
  int64_t want = wane_numel(t) * wane_size_of(t->dtype);
  if (bytes != (size_t)want) return wane_fail(WANE_E_SHAPE, "reading %s: expected room for %lld bytes, found %zu", wane_shape_text(t), (long long)want, bytes);
  int status = wane_stream_poll(s, wane_ticket_of(t));
  if (status == WANE_OK && bytes) memcpy(data, t->data, bytes);
  return status;
}

/* ---------------------------------------------------------------- contiguous and converted inputs */

wane_tensor *wane_as(wane_stream *s, wane_tensor *t, int dtype, wane_handle *tmp) {
  tmp->t = NULL;
  if (!t->parts && t->dtype == dtype && wane_is_contiguous(t)) return t;
  wane_handle h = { t, t->gen, 0 };
  int status = t->parts ? wane_dequantize(s, tmp, &h, dtype) : wane_cast(s, tmp, &h, dtype);
  return status == WANE_OK ? tmp->t : NULL;
}

wane_tensor *wane_contiguous(wane_stream *s, wane_tensor *t, wane_handle *tmp) {
  tmp->t = NULL;
  return t->parts ? t : wane_as(s, t, t->dtype, tmp);
}

/* ---------------------------------------------------------------- views */

/* Common start of a view: checks the stream and the tensor, makes the descriptor. */
static int view_of(wane_stream *s, wane_handle *out, const wane_handle *h, wane_tensor **base, wane_tensor **view) {
  int status = wane_enter(s);
  if (status) return status;
  *base = wane_use(s, h, "tensor");
  if (!*base) return WANE_E_STALE;
  if ((*base)->parts) return wane_fail(WANE_E_DTYPE, "a quantized tensor %s has no views: dequantize it first", wane_shape_text(*base));
  *view = wane_make_view(s, out, *base);
  return *view ? WANE_OK : WANE_E_MEMORY;
}

static int drop(wane_handle *out, int status) { wane_tensor_free(out); return status; }

int wane_view_narrow(wane_stream *s, wane_handle *out, const wane_handle *h, int dim, int64_t start, int64_t length, int64_t step) {
  wane_tensor *t = NULL, *v = NULL;
  int status = view_of(s, out, h, &t, &v);
  if (status) return status;
  if (dim < 0 || dim >= t->ndim) return drop(out, wane_fail(WANE_E_SHAPE, "narrow: %s has no dimension %d", wane_shape_text(t), dim + 1));
  if (step < 1 || length < 0 || start < 0 || (length > 0 && (start >= t->shape[dim] || (length - 1) > (t->shape[dim] - 1 - start) / step)) || start > t->shape[dim])
    return drop(out, wane_fail(WANE_E_SHAPE, "narrow: %lld elements from %lld (step %lld) do not lie in dimension %d of %s", (long long)length, (long long)start + 1,
                               (long long)step, dim + 1, wane_shape_text(t)));
  v->shape[dim] = length;
  v->data = t->data + start * t->stride[dim] * wane_size_of(t->dtype);
  v->stride[dim] = t->stride[dim] * step;
  return WANE_OK;
}

int wane_view_select(wane_stream *s, wane_handle *out, const wane_handle *h, int dim, int64_t index) {
  wane_tensor *t = NULL, *v = NULL;
  int status = view_of(s, out, h, &t, &v);
  if (status) return status;
  if (dim < 0 || dim >= t->ndim) return drop(out, wane_fail(WANE_E_SHAPE, "select: %s has no dimension %d", wane_shape_text(t), dim + 1));
  if (index < 0 || index >= t->shape[dim]) return drop(out, wane_fail(WANE_E_SHAPE, "select: index %lld is outside dimension %d of %s", (long long)index + 1, dim + 1, wane_shape_text(t)));
  v->data = t->data + index * t->stride[dim] * wane_size_of(t->dtype);
  v->ndim = t->ndim - 1;
  for (int i = dim; i < v->ndim; i++) { v->shape[i] = t->shape[i + 1]; v->stride[i] = t->stride[i + 1]; }
  return WANE_OK;
}

int wane_view_permute(wane_stream *s, wane_handle *out, const wane_handle *h, const int32_t *order) {
  wane_tensor *t = NULL, *v = NULL;
  int status = view_of(s, out, h, &t, &v);
  if (status) return status;
  uint32_t seen = 0;
  for (int i = 0; i < t->ndim; i++) {
    if (order[i] < 0 || order[i] >= t->ndim || seen >> order[i] & 1) return drop(out, wane_fail(WANE_E_SHAPE, "permute: the order must name each of the %d dimensions of %s once", t->ndim, wane_shape_text(t)));
    seen |= 1u << order[i];
    v->shape[i] = t->shape[order[i]];
    v->stride[i] = t->stride[order[i]];
  }
  return WANE_OK;
}

/* Finds strides for `shape` over t's memory; 0 when that takes a copy. Runs of dimensions that lie densely are regrouped. */
static int regroup(const wane_tensor *t, int ndim, const int64_t *shape, int64_t *stride) {
  int i = 0, j = 0;
  while (i < t->ndim || j < ndim) {
    int i0 = i, j0 = j;
    int64_t a = i < t->ndim ? t->shape[i++] : 1, b = j < ndim ? shape[j++] : 1;
    while (a != b) {
      if (a < b) { if (i >= t->ndim) return 0; a *= t->shape[i++]; } else { if (j >= ndim) return 0; b *= shape[j++]; }
    }
    int64_t step = 0;                                 /* of the group's innermost element */
    for (int k = i - 1, seen = 0; k >= i0; k--) {
      if (t->shape[k] == 1) continue;
      if (!seen) { step = t->stride[k]; seen = 1; }
      int inner = k - 1;
      while (inner >= i0 && t->shape[inner] == 1) inner--;
      if (inner >= i0 && t->stride[inner] != t->stride[k] * t->shape[k]) return 0;
    }
    for (int k = j - 1; k >= j0; k--) { stride[k] = step; step *= shape[k]; }
  }
  return 1;
}

int wane_view_reshape(wane_stream *s, wane_handle *out, const wane_handle *h, int ndim, const int64_t *shape) {
  wane_tensor *t = NULL, *v = NULL;
  int status = view_of(s, out, h, &t, &v);
  if (status) return status;
  if (ndim < 0 || ndim > WANE_MAX_DIMS) return drop(out, wane_fail(WANE_E_SHAPE, "reshape: %d dimensions: at most %d", ndim, WANE_MAX_DIMS));
  int64_t n = wane_numel(t), known = 1, sizes[WANE_MAX_DIMS] = { 0 };
  int open = -1;
  for (int i = 0; i < ndim; i++) {
    sizes[i] = shape[i];
    if (shape[i] == -1 && open < 0) open = i;
    else if (shape[i] < 0 || __builtin_mul_overflow(known, shape[i], &known)) return drop(out, wane_fail(WANE_E_SHAPE, "reshape: size %lld of dimension %d is not possible", (long long)shape[i], i + 1));
  }
  if (open >= 0) { sizes[open] = known > 0 ? n / known : 0; known *= sizes[open]; }
  if (known != n) return drop(out, wane_fail(WANE_E_SHAPE, "reshape: %s has %lld elements, the new shape %lld", wane_shape_text(t), (long long)n, (long long)known));
  int64_t stride[WANE_MAX_DIMS] = { 0 };
  if (n == 0 || wane_is_contiguous(t)) {
    int64_t step = 1;
    for (int i = ndim - 1; i >= 0; i--) { stride[i] = step; step *= sizes[i] > 0 ? sizes[i] : 1; }
  } else if (!regroup(t, ndim, sizes, stride)) {
    return drop(out, wane_fail(WANE_E_SHAPE, "reshape: %s does not lie in memory in that order: make it contiguous first", wane_shape_text(t)));
  }
  v->ndim = ndim;
  memcpy(v->shape, sizes, sizeof v->shape);
  memcpy(v->stride, stride, sizeof v->stride);
  return WANE_OK;
}

int wane_view_expand(wane_stream *s, wane_handle *out, const wane_handle *h, int ndim, const int64_t *shape) {
  wane_tensor *t = NULL, *v = NULL;
  int status = view_of(s, out, h, &t, &v);
  if (status) return status;
  if (ndim < t->ndim || ndim > WANE_MAX_DIMS) return drop(out, wane_fail(WANE_E_SHAPE, "expand: %s to %d dimensions", wane_shape_text(t), ndim));
  int front = ndim - t->ndim;
  for (int i = 0; i < ndim; i++) {
    int64_t size = i < front ? 1 : t->shape[i - front], stride = i < front ? 0 : t->stride[i - front];
    if (shape[i] != size && size != 1) return drop(out, wane_fail(WANE_E_SHAPE, "expand: dimension %d of %s cannot become %lld (only sizes of 1 repeat)", i - front + 1, wane_shape_text(t), (long long)shape[i]));
    v->shape[i] = shape[i];
    v->stride[i] = shape[i] == size ? stride : 0;
  }
  v->ndim = ndim;
  return WANE_OK;
}

int wane_view_strided(wane_stream *s, wane_handle *out, const wane_handle *h, int ndim, const int64_t *shape, const int64_t *stride) {
  wane_tensor *t = NULL, *v = NULL;
  int status = view_of(s, out, h, &t, &v);
  if (status) return status;
  if (ndim < 0 || ndim > WANE_MAX_DIMS) return drop(out, wane_fail(WANE_E_SHAPE, "strided view: %d dimensions: at most %d", ndim, WANE_MAX_DIMS));
  if (!wane_is_contiguous(t)) return drop(out, wane_fail(WANE_E_SHAPE, "strided view: %s is a view itself: make it contiguous first", wane_shape_text(t)));
  int64_t span = wane_strided_span(ndim, shape, stride), n = wane_numel(t);
  if (span < 0 || span > n) return drop(out, wane_fail(WANE_E_SHAPE, "strided view: sizes and strides reach past the %lld values of %s", (long long)n, wane_shape_text(t)));
  v->ndim = ndim;
  memcpy(v->shape, shape, sizeof *shape * (size_t)ndim);
  memcpy(v->stride, stride, sizeof *stride * (size_t)ndim);
  return WANE_OK;
}
