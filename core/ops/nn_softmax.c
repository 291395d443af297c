/* nn_softmax.c: what softmax, the loss and gated activations take. The arithmetic is in nn_row_kernels.h. */
#include "nn.h"

enum { EXP_WORK = 32 << 10 };              /* exponentials a chunk: about 40 us */

int wane_softmax(wane_stream *s, wane_handle *out, const wane_handle *hx, int dim, int log) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *x = wane_use(s, hx, "x");
  if (!x) return WANE_E_STALE;
  if (!wane_is_float(x->dtype)) return wane_fail(WANE_E_DTYPE, "softmax: x must be f32, f16 or bf16, found %s", wane_shape_text(x));
  if (dim < 0 || dim >= x->ndim) return wane_fail(WANE_E_SHAPE, "softmax: %s has no dimension %d", wane_shape_text(x), dim + 1);
  wane_handle tmp = { NULL, 0, 0 };
  x = wane_contiguous(s, x, &tmp);
  wane_tensor *y = x ? wane_make(s, out, x->dtype, x->ndim, x->shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (wane_numel(x) > 0) {
    int64_t outer = 1, inner = 1, n = x->shape[dim];
    for (int i = 0; i < dim; i++) outer *= x->shape[i];
    for (int i = dim + 1; i < x->ndim; i++) inner *= x->shape[i];
    wane_op *op = wane_op_new(s, WANE_OP_SOFTMAX);
    op->p[0] = y->data; op->p[1] = x->data;
    op->n[0] = outer; op->n[1] = n; op->n[2] = inner;
    op->i[0] = x->dtype; op->i[1] = log != 0;
    op->nchunks = wane_chunks(inner == 1 ? outer : outer * ((inner + 15) / 16), 1 + EXP_WORK / (inner == 1 ? n : 16 * n));
    wane_op_push(s, op, y, NULL);
  }
  wane_tensor_free(&tmp);
  return status;
}

/* ---------------------------------------------------------------- loss */

static int check_nll(const wane_tensor *logits, const wane_tensor *labels) {
  if (!wane_is_float(logits->dtype) || logits->ndim != 2 || logits->shape[1] < 1)
    return wane_fail(WANE_E_SHAPE, "nll: expected logits [M, V] of f32, f16 or bf16, found %s", wane_shape_text(logits));
  if (labels->dtype != WANE_I32 && labels->dtype != WANE_I64) return wane_fail(WANE_E_DTYPE, "nll: labels must be i32 or i64, found %s", wane_shape_text(labels));
  if (labels->ndim != 1 || labels->shape[0] != logits->shape[0])
    return wane_fail(WANE_E_SHAPE, "nll: expected labels [%lld] for logits %s, found %s", (long long)logits->shape[0], wane_shape_text(logits), wane_shape_text(labels));
  return WANE_OK;
}

/* What one call wants: values of nll, their gradient, or both. */
typedef struct nll_call {
  wane_handle *nll, *dlogits;
  const wane_handle *scale;                /* [M], or NULL: `factor` for all rows */
  double factor;
  int dtype;                               /* of dlogits; -1: that of the logits */
} nll_call;

/* The record is described in nn_row_kernels.h. */
static int nll(wane_stream *s, const nll_call *call, const wane_handle *hlogits, const wane_handle *hlabels, int64_t ignore) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *logits = wane_use(s, hlogits, "logits"), *labels = logits ? wane_use(s, hlabels, "labels") : NULL, *scale = NULL;
  if (!labels || (call->scale && !(scale = wane_use(s, call->scale, "scale")))) return WANE_E_STALE;
  if ((status = check_nll(logits, labels))) return status;
  int64_t M = logits->shape[0], V = logits->shape[1];
  if (scale && (scale->ndim != 1 || scale->shape[0] != M || !wane_is_float(scale->dtype)))
    return wane_fail(WANE_E_SHAPE, "nll_backward: expected scale [%lld] of floats, found %s", (long long)M, wane_shape_text(scale));
  wane_handle tmp[3] = { { NULL, 0, 0 } };
  int dtype = call->dtype < 0 ? logits->dtype : call->dtype;
  logits = wane_contiguous(s, logits, &tmp[0]);
  labels = logits ? wane_contiguous(s, labels, &tmp[1]) : NULL;
  if (labels && scale) scale = wane_as(s, scale, WANE_F32, &tmp[2]);
  wane_tensor *y = NULL, *dx = NULL;
  status = labels && (!call->scale || scale) ? WANE_OK : WANE_E_MEMORY;
  if (!status && call->nll && !(y = wane_make(s, call->nll, WANE_F32, 1, &M))) status = WANE_E_MEMORY;
  if (!status && call->dlogits && !(dx = wane_make(s, call->dlogits, dtype, 2, logits->shape))) {
    status = WANE_E_MEMORY;
    if (y) wane_tensor_free(call->nll);
  }
  if (!status && M > 0) {
    wane_op *op = wane_op_new(s, dx ? WANE_OP_NLL_BACKWARD : WANE_OP_NLL);
    op->p[0] = dx ? dx->data : y->data; op->p[1] = logits->data; op->p[2] = labels->data; op->p[3] = scale ? scale->data : NULL;
    op->p[4] = dx && y ? y->data : NULL;
    op->n[0] = M; op->n[1] = V; op->n[2] = ignore;
    op->f[0] = (float)call->factor;
    op->i[0] = logits->dtype; op->i[1] = labels->dtype; op->i[2] = dtype;
    op->nchunks = wane_chunks(M, 1 + EXP_WORK / V);
    wane_op_push(s, op, dx ? dx : y, dx ? y : NULL);
  }
  for (int i = 0; i < 3; i++) wane_tensor_free(&tmp[i]);
  return status;
}

int wane_nll(wane_stream *s, wane_handle *out, const wane_handle *logits, const wane_handle *labels, int64_t ignore_index) {
  return nll(s, &(nll_call){ .nll = out, .dtype = -1 }, logits, labels, ignore_index);
}

int wane_nll_backward(wane_stream *s, wane_handle *dlogits, const wane_handle *logits, const wane_handle *labels, const wane_handle *scale, int64_t ignore_index) {
  if (!scale) return wane_fail(WANE_E_ARG, "nll_backward: scale is missing (one factor a row, such as 1 / number of labels)");
  return nll(s, &(nll_call){ .dlogits = dlogits, .scale = scale, .dtype = -1 }, logits, labels, ignore_index);
}

int wane_nll_with_gradient(wane_stream *s, wane_handle *out, wane_handle *dlogits, const wane_handle *logits, const wane_handle *labels, double factor,
                           int64_t ignore_index, int dtype) {
  if (dtype != WANE_F32 && dtype != WANE_F16 && dtype != WANE_BF16)
    return wane_fail(WANE_E_DTYPE, "nll_with_gradient: the gradient must be f32, f16 or bf16, found dtype number %d", dtype);
  return nll(s, &(nll_call){ .nll = out, .dlogits = dlogits, .factor = factor, .dtype = dtype }, logits, labels, ignore_index);
}

/* ---------------------------------------------------------------- gated activations */

int wane_glu(wane_stream *s, wane_handle *out, const wane_handle *hgate, const wane_handle *hup, int act) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *gate = wane_use(s, hgate, "gate"), *up = gate ? wane_use(s, hup, "up") : NULL;
  if (!up) return WANE_E_STALE;
  if (act != WANE_RELU && act != WANE_SILU && act != WANE_GELU && act != WANE_GELU_TANH && act != WANE_QUICK_GELU && act != WANE_SIGMOID && act != WANE_TANH)
    return wane_fail(WANE_E_ARG, "glu: op code %d is no activation (relu, silu, gelu, gelu_tanh, quick_gelu, sigmoid, tanh)", act);
  if (!wane_is_float(gate->dtype) || !wane_is_float(up->dtype))
    return wane_fail(WANE_E_DTYPE, "glu: gate and up must be f32, f16 or bf16, found %s and %s", wane_shape_text(gate), wane_shape_text(up));
  int same = gate->ndim == up->ndim;
  for (int i = 0; same && i < gate->ndim; i++) same = gate->shape[i] == up->shape[i];
  if (!same) return wane_fail(WANE_E_SHAPE, "glu: gate %s and up %s must have one shape", wane_shape_text(gate), wane_shape_text(up));
  wane_handle tmp[2] = { { NULL, 0, 0 } };
  gate = wane_contiguous(s, gate, &tmp[0]);
  up = gate ? wane_as(s, up, gate->dtype, &tmp[1]) : NULL;
  wane_tensor *y = up ? wane_make(s, out, gate->dtype, gate->ndim, gate->shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (wane_numel(y) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_GLU);
    op->p[0] = y->data; op->p[1] = gate->data; op->p[2] = up->data;
    op->n[0] = wane_numel(y);
    op->i[0] = gate->dtype; op->i[1] = act;
    op->nchunks = wane_chunks(op->n[0], 24 << 10);
    wane_op_push(s, op, y, NULL);
  }
  for (int i = 0; i < 2; i++) wane_tensor_free(&tmp[i]);
  return status;
}
