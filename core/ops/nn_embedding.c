/* nn_embedding.c: rows of a table by id, the table in any dtype: its rows are dequantized as they are fetched. */
#include "nn.h"
#include "../base/float16.h"
#include "../quant/quant.h"

enum { PIECE = 16 << 10 };                 /* values converted at a time where the output is 16-bit */

/* p 0 out [count, C], 1 ids, the table in wane_qview's fields; n 0 count; i 0 dtype of ids, 1 of out. Chunks: ids. */
void wane_nn_embedding(const wane_op *op, uint32_t chunk) {
  wane_qview table = wane_qview_load(op);
  int64_t C = table.cols, lo, hi, size = wane_size_of(op->i[1]);
  wane_op_range(op, chunk, op->n[0], 1, &lo, &hi);
  for (int64_t r = lo; r < hi; r++) {
    int64_t id = op->i[0] == WANE_I64 ? ((const int64_t *)op->p[1])[r] : ((const int32_t *)op->p[1])[r];
    char *out = (char *)op->p[0] + r * C * size;
    if (id < 0 || id >= table.rows) {
      wane_op_fail(op, "embedding: id %lld (number %lld of the input) is outside the table of %lld rows", (long long)id, (long long)r + 1, (long long)table.rows);
      return;
    }
    if (op->i[1] == WANE_F32) wane_dequantize_range(&table, id * C, C, (float *)out);
    else if (op->i[1] == table.dtype) memcpy(out, (const char *)table.codes + id * C * size, (size_t)(C * size));
    else
      for (int64_t j = 0; j < C; j += PIECE) {
        int64_t n = C - j < PIECE ? C - j : PIECE;
        float *values = wane_scratch();
        wane_dequantize_range(&table, id * C + j, n, values);
        for (int64_t k = 0; k < n; k++) wane_float_put(out, op->i[1], j + k, values[k]);
      }
  }
}

int wane_embedding(wane_stream *s, wane_handle *out, const wane_handle *htable, const wane_handle *hids, int dtype) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *table = wane_use(s, htable, "table"), *ids = table ? wane_use(s, hids, "ids") : NULL;
  if (!ids) return WANE_E_STALE;
  if (!wane_is_float(dtype)) return wane_fail(WANE_E_DTYPE, "embedding: the result must be f32, f16 or bf16, asked for %s", wane_dtype_name(dtype) ? wane_dtype_name(dtype) : "an unknown dtype");
  if (table->ndim != 2) return wane_fail(WANE_E_SHAPE, "embedding: expected a table [V, C], found %s", wane_shape_text(table));
  if (!wane_is_float(table->dtype) && table->dtype < WANE_DTYPE_PLAIN) return wane_fail(WANE_E_DTYPE, "embedding: the table must hold floats or a quantized kind, found %s", wane_shape_text(table));
  if (ids->dtype != WANE_I32 && ids->dtype != WANE_I64) return wane_fail(WANE_E_DTYPE, "embedding: ids must be i32 or i64, found %s", wane_shape_text(ids));
  if (ids->ndim + 1 > WANE_MAX_DIMS) return wane_fail(WANE_E_SHAPE, "embedding: ids %s have too many dimensions", wane_shape_text(ids));
  int64_t shape[WANE_MAX_DIMS], C = table->shape[1], count = wane_numel(ids);
  for (int i = 0; i < ids->ndim; i++) shape[i] = ids->shape[i];
  shape[ids->ndim] = C;
  wane_handle tmp[2] = { { NULL, 0, 0 } };
  table = wane_contiguous(s, table, &tmp[0]);
  ids = table ? wane_contiguous(s, ids, &tmp[1]) : NULL;
  wane_tensor *y = ids ? wane_make(s, out, dtype, ids->ndim + 1, shape) : NULL;
  if (!y) status = WANE_E_MEMORY;
  else if (count > 0 && C > 0) {
    wane_qview view;
    wane_qview_of(table, &view);
    wane_op *op = wane_op_new(s, WANE_OP_EMBEDDING);
    op->p[0] = y->data; op->p[1] = ids->data;
    op->n[0] = count;
    op->i[0] = ids->dtype; op->i[1] = dtype;
    wane_qview_store(op, &view);
    op->nchunks = wane_chunks(count, 1 + (32 << 10) / C);
    wane_op_push(s, op, y, NULL);
  }
  for (int i = 0; i < 2; i++) wane_tensor_free(&tmp[i]);
  return status;
}
