/* nn_choose.c: what the ops between logits and the next token take. The work is in nn_choose_kernels.h. */
#include "nn.h"

/* logits [B, V] f32 whose rows are dense, and ids [B, >= length] i32 where the op reads them. */
static int check_logits(const char *op, const wane_tensor *logits) {
  if (logits->dtype != WANE_F32 || logits->ndim != 2) return wane_fail(WANE_E_SHAPE, "%s: expected logits [B, V] f32, found %s", op, wane_shape_text(logits));
  if (logits->shape[1] > 1 && logits->stride[1] != 1) return wane_fail(WANE_E_SHAPE, "%s: the rows of the logits must lie densely in memory", op);
  if (logits->shape[1] < 1) return wane_fail(WANE_E_SHAPE, "%s: the vocabulary is empty: %s", op, wane_shape_text(logits));
  if (logits->shape[1] > (int64_t)WANE_SCRATCH * 8) return wane_fail(WANE_E_UNSUPPORTED, "%s: a vocabulary of %lld is too large", op, (long long)logits->shape[1]);
  return WANE_OK;
}

static int check_ids(const char *op, const wane_tensor *ids, const wane_tensor *logits, int64_t length) {
  if (ids->dtype != WANE_I32 || ids->ndim != 2 || ids->shape[0] != logits->shape[0])
    return wane_fail(WANE_E_SHAPE, "%s: expected ids [%lld, capacity] i32, found %s", op, (long long)logits->shape[0], wane_shape_text(ids));
  if (ids->shape[1] > 1 && ids->stride[1] != 1) return wane_fail(WANE_E_SHAPE, "%s: the rows of the ids must lie densely in memory", op);
  if (length < 0 || length > ids->shape[1]) return wane_fail(WANE_E_ARG, "%s: length %lld does not fit ids %s", op, (long long)length, wane_shape_text(ids));
  return WANE_OK;
}

/* Enqueues a PENALTY op: kind 0 repetition, 1 n-grams, 2 set. */
static int penalty(wane_stream *s, wane_tensor *logits, const wane_tensor *ids, int kind, int64_t length, int64_t n, double value) {
  if (logits->shape[0] == 0 || length == 0) return WANE_OK;
  wane_op *op = wane_op_new(s, WANE_OP_PENALTY);
  op->i[0] = kind;
  op->p[0] = logits->data; op->p[1] = ids->data;
  op->n[0] = logits->shape[0]; op->n[1] = logits->shape[1]; op->n[2] = logits->stride[0];
  op->n[3] = kind == 2 ? 0 : ids->stride[0]; op->n[4] = length; op->n[5] = n;
  op->f[0] = (float)value;
  op->nchunks = (uint32_t)logits->shape[0];
  wane_op_push(s, op, logits, NULL);
  return WANE_OK;
}

int wane_repetition_penalty(wane_stream *s, const wane_handle *hlogits, const wane_handle *hids, int64_t length, double value) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *logits = wane_use(s, hlogits, "logits"), *ids = logits ? wane_use(s, hids, "ids") : NULL;
  if (!ids) return WANE_E_STALE;
  if ((status = check_logits("repetition_penalty", logits)) || (status = check_ids("repetition_penalty", ids, logits, length))) return status;
  if (!(value > 0.0)) return wane_fail(WANE_E_ARG, "repetition_penalty: the penalty must be above 0 (1 is none), found %g", value);
  return penalty(s, logits, ids, 0, length, 0, value);
}

int wane_no_repeat_ngram(wane_stream *s, const wane_handle *hlogits, const wane_handle *hids, int64_t length, int64_t n) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *logits = wane_use(s, hlogits, "logits"), *ids = logits ? wane_use(s, hids, "ids") : NULL;
  if (!ids) return WANE_E_STALE;
  if ((status = check_logits("no_repeat_ngram", logits)) || (status = check_ids("no_repeat_ngram", ids, logits, length))) return status;
  if (n < 1) return wane_fail(WANE_E_ARG, "no_repeat_ngram: n must be at least 1, found %lld", (long long)n);
  return n > length ? WANE_OK : penalty(s, logits, ids, 1, length, n, 0.0);
}

int wane_logits_set(wane_stream *s, const wane_handle *hlogits, const wane_handle *hwhich, double value) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *logits = wane_use(s, hlogits, "logits"), *which = logits ? wane_use(s, hwhich, "which") : NULL;
  if (!which) return WANE_E_STALE;
  if ((status = check_logits("logits_set", logits))) return status;
  if (which->dtype != WANE_I32 || which->ndim != 1) return wane_fail(WANE_E_SHAPE, "logits_set: expected ids [n] i32, found %s", wane_shape_text(which));
  wane_handle tmp = { NULL, 0, 0 };
  which = wane_contiguous(s, which, &tmp);
  if (!which) return WANE_E_MEMORY;
  status = penalty(s, logits, which, 2, which->shape[0], 0, value);
  wane_tensor_free(&tmp);
  return status;
}

int wane_logits_filter(wane_stream *s, const wane_handle *hlogits, double temperature, int64_t top_k, double top_p, double min_p) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *logits = wane_use(s, hlogits, "logits");
  if (!logits) return WANE_E_STALE;
  if ((status = check_logits("logits_filter", logits))) return status;
  if (!(temperature > 0.0) || !((float)temperature > 0.0f)) return wane_fail(WANE_E_ARG, "logits_filter: temperature must be above 0, found %g (for 0, choose greedily: argmax)", temperature);
  if (top_k < 0) return wane_fail(WANE_E_ARG, "logits_filter: top_k must be 0 (off) or more, found %lld", (long long)top_k);
  if (!(top_p >= 0.0 && top_p <= 1.0)) return wane_fail(WANE_E_ARG, "logits_filter: top_p must lie in 0 .. 1 (1 is off), found %g", top_p);
  if (!(min_p >= 0.0 && min_p <= 1.0)) return wane_fail(WANE_E_ARG, "logits_filter: min_p must lie in 0 .. 1 (0 is off), found %g", min_p);
  if (logits->shape[0] == 0) return WANE_OK;
  wane_op *op = wane_op_new(s, WANE_OP_SAMPLE_FILTER);
  op->p[0] = logits->data;
  op->n[0] = logits->shape[0]; op->n[1] = logits->shape[1]; op->n[2] = logits->stride[0]; op->n[3] = top_k;
  op->f[0] = (float)temperature;
  op->d[0] = top_p; op->d[1] = min_p;
  op->nchunks = (uint32_t)logits->shape[0];
  wane_op_push(s, op, logits, NULL);
  return WANE_OK;
}

int wane_sample(wane_stream *s, wane_handle *out, const wane_handle *hlogits, uint64_t seed, uint64_t offset) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *logits = wane_use(s, hlogits, "logits");
  if (!logits) return WANE_E_STALE;
  if ((status = check_logits("sample", logits))) return status;
  wane_tensor *y = wane_make(s, out, WANE_I32, 1, logits->shape);
  if (!y) return WANE_E_MEMORY;
  if (logits->shape[0] == 0) return WANE_OK;
  wane_op *op = wane_op_new(s, WANE_OP_SAMPLE);
  op->p[0] = y->data; op->p[1] = logits->data;
  op->n[0] = logits->shape[0]; op->n[1] = logits->shape[1]; op->n[2] = logits->stride[0];
  op->spare[0] = seed; op->spare[1] = offset;
  op->nchunks = (uint32_t)logits->shape[0];
  wane_op_push(s, op, y, NULL);
  return WANE_OK;
}
