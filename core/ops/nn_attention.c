/* nn_attention.c: what wane_attention takes, and how its work is cut. The arithmetic is in nn_attention_kernels.h. */
#include "nn.h"
#include <math.h>
#include <string.h>

enum { ROWS_MAX = 96, ROWS_SPLIT = 24, UNITS_WANTED = 16, CHUNKS_SPLIT = 256 };

/* Rows a chunk: many share the packed keys, few keep a chunk of a long context near 2 ms and every worker busy. Multiples of the
 * register tile. The choice cannot change a row's result. */
static int64_t block_rows(int64_t rows, int64_t heads, int64_t keys, int64_t D) {
  double work = 60e6 / (2.0 * (double)(D + 8) * (double)(keys + 64));       /* products in about 2 ms */
  int64_t tile = WANE_ATTENTION_TILE, n = work > ROWS_MAX ? ROWS_MAX : (int64_t)work;
  int64_t room = ((int64_t)(WANE_SCRATCH / 4) - (2 * WANE_ATTENTION_KEYS + tile) * (D + 64)) / (3 * (D + 16) + 4);
  int64_t share = (rows * heads + UNITS_WANTED - 1) / UNITS_WANTED;
  if (n > room) n = room;
  if (n > share) n = share;
  n = (n + tile - 1) / tile * tile;
  if (n > room) n = room / tile * tile;
  return n < 2 * tile ? (room < 2 * tile ? tile : 2 * tile) : n;
}

/* Checks shapes; B, T, H, D of q and KV of k. */
static int check(const wane_tensor *q, const wane_tensor *k, const wane_tensor *v, const wane_attention_options *o) {
  if (!wane_is_float(q->dtype) || !wane_is_float(k->dtype) || !wane_is_float(v->dtype))
    return wane_fail(WANE_E_DTYPE, "attention: q, k and v must be f32, f16 or bf16; found %s, %s, %s", wane_shape_text(q), wane_shape_text(k), wane_shape_text(v));
  if (q->ndim != 4 || k->ndim != 4 || v->ndim != 4)
    return wane_fail(WANE_E_SHAPE, "attention: expected q [B, T, H, D] and k, v [B, KV, capacity, D]; found %s, %s, %s", wane_shape_text(q), wane_shape_text(k), wane_shape_text(v));
  for (int i = 0; i < 4; i++) if (k->shape[i] != v->shape[i])
    return wane_fail(WANE_E_SHAPE, "attention: k %s and v %s must have one shape", wane_shape_text(k), wane_shape_text(v));
  if (k->shape[0] != q->shape[0] || k->shape[3] != q->shape[3])
    return wane_fail(WANE_E_SHAPE, "attention: q %s [B, T, H, D] and k %s [B, KV, capacity, D] differ in B or D", wane_shape_text(q), wane_shape_text(k));
  if (k->shape[1] < 1 || q->shape[2] % k->shape[1])
    return wane_fail(WANE_E_SHAPE, "attention: %lld query heads cannot share %lld kv heads: expected a multiple", (long long)q->shape[2], (long long)k->shape[1]);
  if (q->shape[3] > WANE_ATTENTION_MAX_DIM)
    return wane_fail(WANE_E_UNSUPPORTED, "attention: heads of %lld dimensions; at most %d", (long long)q->shape[3], WANE_ATTENTION_MAX_DIM);
  if (o->kv_length < 0 || o->kv_length > k->shape[2])
    return wane_fail(WANE_E_ARG, "attention: kv_length %lld does not fit a cache %s of capacity %lld", (long long)o->kv_length, wane_shape_text(k), (long long)k->shape[2]);
  if (o->q_start < 0 || o->window < 0)
    return wane_fail(WANE_E_ARG, "attention: q_start %lld and window %lld must not be negative", (long long)o->q_start, (long long)o->window);
  return WANE_OK;
}

static int check_mask(const wane_tensor *mask, const wane_tensor *q, int64_t keys) {
  if (mask->dtype != WANE_U8 && mask->dtype != WANE_BOOL) return wane_fail(WANE_E_DTYPE, "attention: the key mask must be u8 or bool, found %s", wane_shape_text(mask));
  if (mask->ndim != 2 || (mask->shape[0] != q->shape[0] && mask->shape[0] != 1) || mask->shape[1] < keys)
    return wane_fail(WANE_E_SHAPE, "attention: expected a key mask [%lld, >= %lld], found %s", (long long)q->shape[0], (long long)keys, wane_shape_text(mask));
  return WANE_OK;
}

/* Strides of bias over [B, H, T, keys], 0 where it repeats. */
static int bias_strides(const wane_tensor *bias, const wane_tensor *q, int64_t keys, int64_t stride[4]) {
  const int64_t full[4] = { q->shape[0], q->shape[2], q->shape[1], keys };
  int bad = bias->ndim > 4;
  for (int i = 3, j = bias->ndim - 1; i >= 0 && !bad; i--, j--) {
    int64_t size = j >= 0 ? bias->shape[j] : 1;
    bad = size != 1 && size != full[i];
    stride[i] = size == 1 || j < 0 ? 0 : bias->stride[j];
  }
  if (bad) return wane_fail(WANE_E_SHAPE, "attention: bias %s does not broadcast to [%lld, %lld, %lld, %lld] (B, H, T, kv_length)", wane_shape_text(bias),
                            (long long)full[0], (long long)full[1], (long long)full[2], (long long)full[3]);
  return WANE_OK;
}

/* What forward and backward are given, looked up, checked, and dense in the last dimension. */
typedef struct operands {
  wane_tensor *q, *k, *v, *mask, *bias, *first;
  int64_t bias_stride[4];
  wane_handle tmp[6];
} operands;

static int check_first(const wane_tensor *first, const wane_tensor *q) {
  if (first->dtype != WANE_I32 || first->ndim != 2 || first->shape[0] != q->shape[0] || first->shape[1] != q->shape[1])
    return wane_fail(WANE_E_SHAPE, "attention: expected first [%lld, %lld] i32, found %s", (long long)q->shape[0], (long long)q->shape[1], wane_shape_text(first));
  return WANE_OK;
}

/* Call operands_close after it, whatever it returned. */
static int operands_open(wane_stream *s, operands *a, const wane_handle *q, const wane_handle *k, const wane_handle *v, const wane_handle *mask,
                         const wane_handle *bias, const wane_handle *first, const wane_attention_options *o) {
  int status;
  memset(a, 0, sizeof *a);
  if (!(a->q = wane_use(s, q, "q")) || !(a->k = wane_use(s, k, "k")) || !(a->v = wane_use(s, v, "v"))) return WANE_E_STALE;
  if ((status = wane_nn_optional(s, mask, "key_mask", &a->mask)) || (status = wane_nn_optional(s, bias, "bias", &a->bias)) ||
      (status = wane_nn_optional(s, first, "first", &a->first))) return status;
  if ((status = check(a->q, a->k, a->v, o)) || (a->mask && (status = check_mask(a->mask, a->q, o->kv_length))) ||
      (a->first && (status = check_first(a->first, a->q)))) return status;
  if (a->bias && !wane_is_float(a->bias->dtype)) return wane_fail(WANE_E_DTYPE, "attention: bias must be f32, f16 or bf16, found %s", wane_shape_text(a->bias));
  wane_tensor **dense[4] = { &a->q, &a->k, &a->v, &a->mask };
  for (int i = 0; i < 4; i++) if (*dense[i] && !(*dense[i] = wane_nn_dense_rows(s, *dense[i], &a->tmp[i]))) return WANE_E_MEMORY;
  if (a->bias && a->bias->dtype != WANE_F32 && !(a->bias = wane_as(s, a->bias, WANE_F32, &a->tmp[4]))) return WANE_E_MEMORY;
  if (a->first && !(a->first = wane_contiguous(s, a->first, &a->tmp[5]))) return WANE_E_MEMORY;
  return a->bias ? bias_strides(a->bias, a->q, o->kv_length, a->bias_stride) : WANE_OK;
}

static void operands_close(operands *a) { for (int i = 0; i < 6; i++) wane_tensor_free(&a->tmp[i]); }

/* Everything the kernels read; see nn_attention_kernels.h. out, parts, lse: where they are wanted, or NULL. */
static void fill(wane_op *op, const operands *a, const wane_attention_options *o, const wane_tensor *out, int64_t per, int64_t pieces, void *parts, const wane_tensor *lse) {
  const wane_tensor *q = a->q, *k = a->k, *v = a->v, *mask = a->mask;
  void *const p[9] = { out ? out->data : NULL, q->data, k->data, v->data, mask ? mask->data : NULL, a->bias ? a->bias->data : NULL, parts,
                       lse ? lse->data : NULL, a->first ? a->first->data : NULL };
  const int64_t n[11] = { q->shape[0], q->shape[2], k->shape[1], q->shape[1], q->shape[3], o->kv_length, o->q_start, o->window, per,
                          mask && mask->shape[0] > 1 ? mask->stride[0] : 0, pieces };
  for (int i = 0; i < 9; i++) op->p[i] = p[i];
  for (int i = 0; i < 11; i++) op->n[i] = n[i];
  for (int i = 0; i < 3; i++) { op->stride[0][i] = q->stride[i]; op->stride[1][i] = k->stride[i]; op->stride[2][i] = v->stride[i]; }
  for (int i = 0; i < 4; i++) op->stride[3][i] = a->bias_stride[i];
  op->f[0] = (float)(o->scale != 0.0 ? o->scale : 1.0 / sqrt((double)q->shape[3]));
  op->f[1] = (float)o->softcap;
  op->i[0] = q->dtype; op->i[1] = k->dtype; op->i[2] = v->dtype; op->i[3] = o->causal != 0;
}

/* Enqueues the forward: whole, or in pieces of the keys that a second op merges. */
static int forward(wane_stream *s, const operands *a, const wane_attention_options *o, wane_tensor *y, wane_tensor *lse) {
  const wane_tensor *q = a->q, *k = a->k;
  int64_t heads = k->shape[0] * k->shape[1], rows = q->shape[1] * (q->shape[2] / k->shape[1]), D = q->shape[3];
  int64_t pieces = (o->kv_length + WANE_ATTENTION_PIECE - 1) / WANE_ATTENTION_PIECE, per = block_rows(rows, heads, o->kv_length, D);
  wane_storage *hold = NULL;
  void *parts = NULL;
  if (rows <= ROWS_SPLIT && rows <= per && pieces > 1) {
    size_t bytes = (size_t)(heads * pieces * rows) * (size_t)wane_attention_partial(D) * sizeof(float);
    if (!(parts = wane_workspace(s, bytes, &hold))) return WANE_E_MEMORY;
  }
  wane_op *op = wane_op_new(s, WANE_OP_ATTENTION);
  fill(op, a, o, y, per, parts ? pieces : 0, parts, lse);
  if (!parts) {
    op->nchunks = (uint32_t)(heads * ((rows + per - 1) / per));
    wane_op_push(s, op, y, lse);
  } else {
    op->nchunks = (uint32_t)(heads * pieces < CHUNKS_SPLIT ? heads * pieces : CHUNKS_SPLIT);
    wane_op_push(s, op, y, lse);
    op = wane_op_new(s, WANE_OP_ATTENTION_MERGE);
    fill(op, a, o, y, per, pieces, parts, lse);
    op->nchunks = wane_chunks(heads * rows, 1 + 20000 / (pieces * (D / 4 + 8)));
    wane_op_push(s, op, y, lse);
  }
  if (hold) wane_storage_unref(hold);
  return WANE_OK;
}

/* Both forward functions; hlse NULL: not wanted. */
static int attend(wane_stream *s, wane_handle *out, wane_handle *hlse, const wane_handle *q, const wane_handle *k, const wane_handle *v,
                  const wane_handle *mask, const wane_handle *bias, const wane_handle *first, const wane_attention_options *o) {
  int status = wane_enter(s);
  if (status) return status;
  operands a;
  status = operands_open(s, &a, q, k, v, mask, bias, first, o);
  if (status == WANE_OK) {
    int64_t shape[3] = { a.q->shape[0], a.q->shape[2], a.q->shape[1] };
    wane_tensor *y = wane_make(s, out, a.q->dtype, 4, a.q->shape), *lse = y && hlse ? wane_make(s, hlse, WANE_F32, 3, shape) : NULL;
    if (!y || (hlse && !lse)) status = WANE_E_MEMORY;
    else if (wane_numel(y) > 0) status = forward(s, &a, o, y, lse);
    if (status && lse) wane_tensor_free(hlse);
    if (status && y) wane_tensor_free(out);
  }
  operands_close(&a);
  return status;
}

int wane_attention(wane_stream *s, wane_handle *out, const wane_handle *q, const wane_handle *k, const wane_handle *v, const wane_handle *key_mask,
                   const wane_handle *bias, const wane_attention_options *o) {
  return attend(s, out, NULL, q, k, v, key_mask, bias, NULL, o);
}

int wane_attention_train(wane_stream *s, wane_handle *out, wane_handle *lse, const wane_handle *q, const wane_handle *k, const wane_handle *v,
                         const wane_handle *key_mask, const wane_handle *bias, const wane_handle *first, const wane_attention_options *o) {
  return attend(s, out, lse, q, k, v, key_mask, bias, first, o);
}

/* ---------------------------------------------------------------- gradient */

/* Floats of the workspace. -1 on overflow. */
static int64_t back_floats(const operands *a, int64_t keys) {
  int64_t heads = a->q->shape[0] * a->q->shape[2], T = a->q->shape[1], D = a->q->shape[3], rows, all;
  if (__builtin_mul_overflow(heads, T + 2 * (keys + WANE_ATTENTION_KEYS), &rows) || __builtin_mul_overflow(rows, D + 64, &all)) return -1;
  return wane_attention_place(heads, T, keys, D).floats;
}

/* Lets phase 1 add up dbias, which holds zeros. */
static void add_bias(wane_op *op, const wane_tensor *dbias) {
  op->p[10] = dbias->data;
  op->i[5] = 1;
  for (int i = 3, j = dbias->ndim - 1; i >= 0; i--, j--) op->stride[i][4] = j < 0 || dbias->shape[j] == 1 ? 0 : dbias->stride[j];
}

/* Enqueues the phases. made: dq, dk, dv, dbias. */
static int backward(wane_stream *s, const operands *a, const wane_attention_options *o, const wane_tensor *dout, wane_tensor *out, const wane_tensor *lse,
                    wane_tensor *const made[4]) {
  int64_t B = a->q->shape[0], T = a->q->shape[1], H = a->q->shape[2], D = a->q->shape[3], keys = o->kv_length, floats = back_floats(a, keys);
  wane_storage *hold = NULL;
  if (floats < 0 || floats > INT64_MAX / 8) return wane_fail(WANE_E_SHAPE, "attention_backward: q %s and k %s are too large", wane_shape_text(a->q), wane_shape_text(a->k));
  void *work = wane_workspace(s, (size_t)floats * sizeof(float), &hold);
  if (!work) return WANE_E_MEMORY;
  wane_tensor *const target[3] = { out, made[0], made[1] };
  for (int phase = 0; phase < 3; phase++) {
    wane_op *op = wane_op_new(s, WANE_OP_ATTENTION_BACKWARD);
    fill(op, a, o, target[phase], 0, 0, work, lse);
    op->p[9] = dout->data;
    op->i[4] = phase;
    if (made[3]) add_bias(op, made[3]);
    if (phase == 2) op->p[1] = made[2]->data;
    int64_t units = made[3] ? op->stride[1][4] ? H : 1 : B * H;
    op->nchunks = phase == 0 ? wane_chunks(B * T * H, 1 + (64 << 10) / (D + 1)) : phase == 1 ? (uint32_t)(units < CHUNKS_SPLIT ? units : CHUNKS_SPLIT)
                : wane_chunks(B * keys, 1 + (32 << 10) / (H * D + 1));
    wane_op_push(s, op, phase ? target[phase] : NULL, phase == 1 ? made[3] : phase == 2 ? made[2] : NULL);
  }
  wane_storage_unref(hold);
  return WANE_OK;
}

/* dout, out and lse as the kernels want them: dense, in q's dtype. */
static int results(wane_stream *s, const operands *a, wane_tensor **dout, wane_tensor **out, wane_tensor **lse, wane_handle tmp[3]) {
  const wane_tensor *q = a->q;
  int fits = (*dout)->ndim == 4 && (*out)->ndim == 4 && (*lse)->ndim == 3 && (*lse)->dtype == WANE_F32 && wane_is_float((*dout)->dtype) && wane_is_float((*out)->dtype);
  for (int i = 0; fits && i < 4; i++) fits = (*dout)->shape[i] == q->shape[i] && (*out)->shape[i] == q->shape[i];
  if (!fits || (*lse)->shape[0] != q->shape[0] || (*lse)->shape[1] != q->shape[2] || (*lse)->shape[2] != q->shape[1])
    return wane_fail(WANE_E_SHAPE, "attention_backward: dout %s, out %s and lse %s do not belong to q %s", wane_shape_text(*dout), wane_shape_text(*out),
                     wane_shape_text(*lse), wane_shape_text(q));
  *dout = wane_as(s, *dout, q->dtype, &tmp[0]);
  *out = *dout ? wane_as(s, *out, q->dtype, &tmp[1]) : NULL;
  *lse = *out ? wane_contiguous(s, *lse, &tmp[2]) : NULL;
  return *lse ? WANE_OK : WANE_E_MEMORY;
}

int wane_attention_backward(wane_stream *s, wane_handle *dq, wane_handle *dk, wane_handle *dv, wane_handle *dbias, const wane_handle *hdout, const wane_handle *hout,
                            const wane_handle *hlse, const wane_handle *q, const wane_handle *k, const wane_handle *v, const wane_handle *key_mask,
                            const wane_handle *bias, const wane_handle *first, const wane_attention_options *o) {
  int status = wane_enter(s);
  if (status) return status;
  if (dbias && !(bias && bias->t)) return wane_fail(WANE_E_ARG, "attention_backward: dbias is asked for, and there is no bias");
  operands a;
  wane_handle made[4] = { { NULL, 0, 0 } }, tmp[3] = { { NULL, 0, 0 } };
  status = operands_open(s, &a, q, k, v, key_mask, bias, first, o);
  wane_tensor *dout = status ? NULL : wane_use(s, hdout, "dout"), *out = dout ? wane_use(s, hout, "out") : NULL, *lse = out ? wane_use(s, hlse, "lse") : NULL;
  if (!status && !lse) status = WANE_E_STALE;
  if (!status) status = results(s, &a, &dout, &out, &lse, tmp);
  if (!status) {
    int64_t shape[4] = { a.k->shape[0], o->kv_length, a.k->shape[1], a.k->shape[3] };
    wane_tensor *t[4] = { wane_make(s, &made[0], a.q->dtype, 4, a.q->shape) };
    t[1] = t[0] ? wane_make(s, &made[1], a.k->dtype, 4, shape) : NULL;
    t[2] = t[1] ? wane_make(s, &made[2], a.v->dtype, 4, shape) : NULL;
    if (t[2] && dbias) t[3] = wane_make(s, &made[3], WANE_F32, a.bias->ndim, a.bias->shape);
    if (!t[2] || (dbias && !t[3])) status = WANE_E_MEMORY;
    int some = wane_numel(a.q) > 0 && o->kv_length > 0;
    for (int i = some ? 3 : 0; i < 4 && !status; i++) if (t[i]) status = wane_fill(s, &made[i], 0.0);
    if (!status && some) status = backward(s, &a, o, dout, out, lse, t);
  }
  for (int i = 0; i < 3; i++) wane_tensor_free(&tmp[i]);
  operands_close(&a);
  if (status) {
    for (int i = 0; i < 4; i++) wane_tensor_free(&made[i]);
    return status;
  }
  *dq = made[0]; *dk = made[1]; *dv = made[2];
  if (dbias) *dbias = made[3];
  return WANE_OK;
}
