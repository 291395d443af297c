/* nn_place.c: what rotary embedding and the key-value cache take. The arithmetic is in nn_place_kernels.h. */
#include "nn.h"

static int check_rope(const wane_tensor *x, const wane_tensor *inv_freq, const wane_tensor *positions) {
  if (x->ndim != 4 || !wane_is_float(x->dtype)) return wane_fail(WANE_E_SHAPE, "rope: expected x [B, T, H, D] of f32, f16 or bf16, found %s", wane_shape_text(x));
  if (inv_freq->ndim != 1 || !wane_is_float(inv_freq->dtype) || inv_freq->shape[0] * 2 > x->shape[3])
    return wane_fail(WANE_E_SHAPE, "rope: expected inv_freq f32 [R] with 2 R <= %lld, the last dimension of x; found %s", (long long)x->shape[3], wane_shape_text(inv_freq));
  if (inv_freq->shape[0] > WANE_SCRATCH / 16) return wane_fail(WANE_E_UNSUPPORTED, "rope: %s is too long", wane_shape_text(inv_freq));
  if (!positions) return WANE_OK;
  if (positions->dtype != WANE_I32 && positions->dtype != WANE_I64) return wane_fail(WANE_E_DTYPE, "rope: positions must be i32, found %s", wane_shape_text(positions));
  if (positions->ndim != 2 || (positions->shape[0] != x->shape[0] && positions->shape[0] != 1) || positions->shape[1] != x->shape[1])
    return wane_fail(WANE_E_SHAPE, "rope: expected positions [%lld, %lld] (B, T), found %s", (long long)x->shape[0], (long long)x->shape[1], wane_shape_text(positions));
  return WANE_OK;
}

int wane_rope(wane_stream *s, wane_handle *out, const wane_handle *hx, const wane_handle *hfreq, const wane_handle *hpositions, int64_t start, double scale, int interleaved) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *x = wane_use(s, hx, "x"), *freq = x ? wane_use(s, hfreq, "inv_freq") : NULL, *positions;
  if (!freq) return WANE_E_STALE;
  if ((status = wane_nn_optional(s, hpositions, "positions", &positions)) || (status = check_rope(x, freq, positions))) return status;
  wane_handle tmp[3] = { { NULL, 0, 0 } };
  int given = positions != NULL;
  x = wane_nn_dense_rows(s, x, &tmp[0]);
  freq = x ? wane_as(s, freq, WANE_F32, &tmp[1]) : NULL;
  if (freq && given && positions->dtype != WANE_I32) positions = wane_as(s, positions, WANE_I32, &tmp[2]);
  wane_tensor *y = freq && (!given || positions) ? wane_make(s, out, x->dtype, 4, x->shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (wane_numel(y) > 0) {
    wane_op *op = wane_op_new(s, WANE_OP_ROPE);
    op->p[0] = y->data; op->p[1] = x->data; op->p[2] = freq->data; op->p[3] = given ? positions->data : NULL;
    for (int i = 0; i < 4; i++) op->n[i] = x->shape[i];
    op->n[4] = freq->shape[0]; op->n[5] = start;
    if (given) { op->n[6] = positions->shape[0] > 1 ? positions->stride[0] : 0; op->n[7] = positions->stride[1]; }
    for (int i = 0; i < 3; i++) op->stride[0][i] = x->stride[i];
    op->i[0] = x->dtype; op->i[1] = interleaved != 0;
    op->f[0] = (float)scale;
    op->nchunks = wane_chunks(x->shape[0] * x->shape[1], 1 + (48 << 10) / (x->shape[2] * x->shape[3] + 32 * freq->shape[0]));
    wane_op_push(s, op, y, NULL);
  }
  for (int i = 0; i < 3; i++) wane_tensor_free(&tmp[i]);
  return status;
}

int wane_kv_append(wane_stream *s, const wane_handle *hcache, const wane_handle *hx, int64_t start) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *cache = wane_use(s, hcache, "cache"), *x = cache ? wane_use(s, hx, "x") : NULL;
  if (!x) return WANE_E_STALE;
  if (!wane_is_float(cache->dtype) || !wane_is_float(x->dtype))
    return wane_fail(WANE_E_DTYPE, "kv_append: cache and x must be f32, f16 or bf16, found %s and %s", wane_shape_text(cache), wane_shape_text(x));
  if (cache->ndim != 4 || x->ndim != 4 || cache->shape[0] != x->shape[0] || cache->shape[1] != x->shape[2] || cache->shape[3] != x->shape[3])
    return wane_fail(WANE_E_SHAPE, "kv_append: expected cache [B, H, capacity, D] and x [B, T, H, D], found %s and %s", wane_shape_text(cache), wane_shape_text(x));
  if (cache->shape[3] > 1 && cache->stride[3] != 1) return wane_fail(WANE_E_SHAPE, "kv_append: the cache's last dimension must lie densely in memory");
  if (start < 0 || start > cache->shape[2] || x->shape[1] > cache->shape[2] - start)
    return wane_fail(WANE_E_SHAPE, "kv_append: %lld steps from time %lld do not fit a cache of capacity %lld", (long long)x->shape[1], (long long)start, (long long)cache->shape[2]);
  if (wane_numel(x) == 0) return WANE_OK;
  wane_handle tmp = { NULL, 0, 0 };
  x = wane_nn_dense_rows(s, x, &tmp);
  if (!x) return WANE_E_MEMORY;
  wane_op *op = wane_op_new(s, WANE_OP_KV_APPEND);
  op->p[0] = cache->data; op->p[1] = x->data;
  for (int i = 0; i < 4; i++) op->n[i] = x->shape[i];
  op->n[4] = start;
  for (int i = 0; i < 3; i++) { op->stride[0][i] = cache->stride[i]; op->stride[1][i] = x->stride[i]; }
  op->i[0] = cache->dtype; op->i[1] = x->dtype;
  op->nchunks = wane_chunks(wane_numel(x), 64 << 10);
  wane_op_push(s, op, cache, NULL);
  wane_tensor_free(&tmp);
  return WANE_OK;
}
