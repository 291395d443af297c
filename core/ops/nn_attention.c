/* nn_attention.c: what wane_attention takes, and how its work is cut. The arithmetic is in nn_attention_kernels.h. */
#include "nn.h"
#include <math.h>

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

/* Everything the kernels read; see nn_attention_kernels.h. */
static void fill(wane_op *op, const wane_tensor *out, const wane_tensor *q, const wane_tensor *k, const wane_tensor *v, const wane_tensor *mask,
                 const wane_tensor *bias, const int64_t bias_stride[4], const wane_attention_options *o, int64_t per, int64_t pieces, void *parts) {
  void *const p[7] = { out->data, q->data, k->data, v->data, mask ? mask->data : NULL, bias ? bias->data : NULL, parts };
  const int64_t n[11] = { q->shape[0], q->shape[2], k->shape[1], q->shape[1], q->shape[3], o->kv_length, o->q_start, o->window, per,
                          mask && mask->shape[0] > 1 ? mask->stride[0] : 0, pieces };
  for (int i = 0; i < 7; i++) op->p[i] = p[i];
  for (int i = 0; i < 11; i++) op->n[i] = n[i];
  for (int i = 0; i < 3; i++) { op->stride[0][i] = q->stride[i]; op->stride[1][i] = k->stride[i]; op->stride[2][i] = v->stride[i]; }
  for (int i = 0; i < 4; i++) op->stride[3][i] = bias_stride[i];
  op->f[0] = (float)(o->scale != 0.0 ? o->scale : 1.0 / sqrt((double)q->shape[3]));
  op->f[1] = (float)o->softcap;
  op->i[0] = q->dtype; op->i[1] = k->dtype; op->i[2] = v->dtype; op->i[3] = o->causal != 0;
}

int wane_attention(wane_stream *s, wane_handle *out, const wane_handle *hq, const wane_handle *hk, const wane_handle *hv,
                   const wane_handle *hmask, const wane_handle *hbias, const wane_attention_options *o) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *q = wane_use(s, hq, "q"), *k = q ? wane_use(s, hk, "k") : NULL, *v = k ? wane_use(s, hv, "v") : NULL;
  if (!v) return WANE_E_STALE;
  wane_tensor *mask, *bias;
  if ((status = wane_nn_optional(s, hmask, "key_mask", &mask)) || (status = wane_nn_optional(s, hbias, "bias", &bias))) return status;
  int64_t bias_stride[4] = { 0 };
  if ((status = check(q, k, v, o)) || (mask && (status = check_mask(mask, q, o->kv_length)))) return status;
  if (bias && !wane_is_float(bias->dtype)) return wane_fail(WANE_E_DTYPE, "attention: bias must be f32, f16 or bf16, found %s", wane_shape_text(bias));

  wane_handle tmp[5] = { { NULL, 0, 0 } };
  wane_storage *hold = NULL;
  q = wane_nn_dense_rows(s, q, &tmp[0]);
  k = q ? wane_nn_dense_rows(s, k, &tmp[1]) : NULL;
  v = k ? wane_nn_dense_rows(s, v, &tmp[2]) : NULL;
  if (v && mask) mask = wane_nn_dense_rows(s, mask, &tmp[3]);
  if (v && bias && bias->dtype != WANE_F32) bias = wane_as(s, bias, WANE_F32, &tmp[4]);
  if (!v || (hmask && !mask) || (hbias && !bias)) { status = WANE_E_MEMORY; goto done; }
  if (bias && (status = bias_strides(bias, q, o->kv_length, bias_stride))) goto done;
  wane_tensor *y = wane_make(s, out, q->dtype, 4, q->shape);
  if (!y) { status = WANE_E_MEMORY; goto done; }
  if (wane_numel(y) == 0) goto done;

  int64_t heads = k->shape[0] * k->shape[1], rows = q->shape[1] * (q->shape[2] / k->shape[1]), D = q->shape[3];
  int64_t pieces = (o->kv_length + WANE_ATTENTION_PIECE - 1) / WANE_ATTENTION_PIECE, per = block_rows(rows, heads, o->kv_length, D);
  void *parts = NULL;
  if (rows <= ROWS_SPLIT && rows <= per && pieces > 1) {
    size_t bytes = (size_t)(heads * pieces * rows) * (size_t)wane_attention_partial(D) * sizeof(float);
    if (!(parts = wane_workspace(s, bytes, &hold))) { wane_tensor_free(out); status = WANE_E_MEMORY; goto done; }
  }
  wane_op *op = wane_op_new(s, WANE_OP_ATTENTION);
  fill(op, y, q, k, v, mask, bias, bias_stride, o, per, parts ? pieces : 0, parts);
  if (!parts) {
    op->nchunks = (uint32_t)(heads * ((rows + per - 1) / per));
    wane_op_push(s, op, y, NULL);
  } else {
    op->nchunks = (uint32_t)(heads * pieces < CHUNKS_SPLIT ? heads * pieces : CHUNKS_SPLIT);
    wane_op_push(s, op, y, NULL);
    op = wane_op_new(s, WANE_OP_ATTENTION_MERGE);
    fill(op, y, q, k, v, mask, bias, bias_stride, o, per, pieces, parts);
    op->nchunks = wane_chunks(heads * rows, 1 + 20000 / (pieces * (D / 4 + 8)));
    wane_op_push(s, op, y, NULL);
  }
done:
  if (hold) wane_storage_unref(hold);
  for (int i = 0; i < 5; i++) wane_tensor_free(&tmp[i]);
  return status;
}
