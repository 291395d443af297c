/* quant_ops.c: section 6 of wane.h on streams: quantized tensors, their parts, and the ops that quantize and dequantize. */
#include "../tensor/tensor.h"
#include "kernels.h"
#include "tables.h"

/* ================================================================ kernels */

void wane_quant_run_4bit(const wane_op *op, uint32_t chunk, const wane_quant_kit *kit) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], wane_quant_grain(op->i[0], op->i[2], 0), &lo, &hi);
  const char *x = (const char *)op->p[0] + lo * wane_size_of(op->i[1]);
  if (lo < hi) kit->quantize_4bit(op->i[0], x, op->i[1], lo, hi - lo, op->i[2], op->p[1], op->p[2]);
}

void wane_quant_run_8bit(const wane_op *op, uint32_t chunk, const wane_quant_kit *kit) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], op->i[2], &lo, &hi);
  const char *x = (const char *)op->p[0] + lo * wane_size_of(op->i[1]);
  if (lo < hi) kit->quantize_8bit(op->i[0], x, op->i[1], lo, hi - lo, op->i[2], op->p[1], op->p[2]);
}

void wane_quant_run_rows(const wane_op *op, uint32_t chunk, const wane_quant_kit *kit) {
  int64_t lo, hi, K = op->n[1];
  wane_op_range(op, chunk, op->n[0], 1, &lo, &hi);
  const char *x = (const char *)op->p[0] + lo * K * wane_size_of(op->i[1]);
  if (lo < hi) kit->quantize_rows(x, op->i[1], hi - lo, K, (int8_t *)op->p[1] + lo * K, (float *)op->p[2] + lo);
}

void wane_quant_run_nested(const wane_op *op, const wane_quant_kit *kit) {
  wane_quantize_nested_with(kit, op->p[0], op->n[0], op->p[1], op->p[2], NULL, op->p[4]);
}

void wane_quant_run_dequantize(const wane_op *op, uint32_t chunk, const wane_quant_kit *kit) {
  enum { PIECE = 4096 };
  wane_qview q = wane_qview_load(op);
  int64_t lo, hi, size = wane_size_of(op->i[0]);
  wane_op_range(op, chunk, op->n[0], PIECE, &lo, &hi);
  if (op->i[0] == WANE_F32) {
    if (lo < hi) kit->dequantize(&q, lo, hi - lo, (float *)op->p[0] + lo);
    return;
  }
  for (float *piece = wane_scratch(); lo < hi; lo += PIECE) {
    int64_t n = hi - lo < PIECE ? hi - lo : PIECE;
    kit->dequantize(&q, lo, n, piece);
    kit->narrow(piece, n, op->i[0], (char *)op->p[0] + lo * size);
  }
}

WANE_QUANT_KERNELS(generic, &wane_quant_generic)

void wane_register_generic_quant(wane_backend *b) {
  wane_quant_fill_buckets();
  wane_gguf_fill_grids();
  generic_register(b);
}

/* ================================================================ quantized tensors */

/* Rows and columns as a view sees them: everything but the last dimension is rows. */
static void matrix_of(int ndim, const int64_t *shape, int64_t *rows, int64_t *cols) {
  *rows = 1;
  *cols = ndim ? shape[ndim - 1] : 1;
  for (int d = 0; d + 1 < ndim; d++) *rows *= shape[d];
}

void wane_qview_of(const wane_tensor *t, wane_qview *q) {
  memset(q, 0, sizeof *q);
  q->dtype = t->dtype;
  matrix_of(t->ndim, t->shape, &q->rows, &q->cols);
  if (!t->parts) {
    q->codes = t->data;
    return;
  }
  const char *data[WANE_PARTS];
  for (int k = 0; k < WANE_PARTS; k++) data[k] = t->parts->part[k] ? t->parts->part[k]->data : NULL;
  q->block_size = t->parts->block_size;
  q->codes = data[WANE_PART_CODES];
  q->absmax = data[WANE_PART_ABSMAX];
  q->nested_absmax = (const float *)data[WANE_PART_NESTED_ABSMAX];
  q->nested_code = (const float *)data[WANE_PART_NESTED_CODE];
  q->offset = (const float *)data[WANE_PART_OFFSET];
  q->code = (const float *)data[WANE_PART_CODE];
}

static const char *name_of(int dtype) { return wane_dtype_name(dtype) ? wane_dtype_name(dtype) : "that number"; }
static int is_quantized(int dtype) { return (dtype >= WANE_NF4 && dtype <= WANE_BLOCK8U) || wane_gguf_block(dtype); }

/* Block sizes that the kinds take; INT8 and GGUF kinds have none. */
static int check_block_size(int dtype, int block_size) {
  if (wane_is_4bit(dtype) && (block_size < 32 || block_size > 4096))
    return wane_fail(WANE_E_ARG, "the block size of %s must lie in 32 to 4096, found %d", wane_dtype_name(dtype), block_size);
  if ((dtype == WANE_BLOCK8 || dtype == WANE_BLOCK8U) && block_size < 1)
    return wane_fail(WANE_E_ARG, "the block size of %s must be positive, found %d", wane_dtype_name(dtype), block_size);
  return WANE_OK;
}

/* Elements of a shape; negative with the error set. */
static int64_t count_of(int ndim, const int64_t *shape) {
  int64_t n = 1;
  if (ndim < 0 || ndim > WANE_MAX_DIMS) return wane_fail(WANE_E_SHAPE, "%d dimensions: at most %d", ndim, WANE_MAX_DIMS);
  for (int d = 0; d < ndim; d++)
    if (shape[d] < 0 || __builtin_mul_overflow(n, shape[d], &n))
      return wane_fail(WANE_E_SHAPE, "size %lld of dimension %d is impossible", (long long)shape[d], d + 1);
  return n;
}

/* Scales of a tensor: one a row (also of empty rows), or one a block. */
static int64_t scale_count(int kind, int64_t rows, int64_t cols, int block_size) {
  return kind == WANE_INT8 ? rows : wane_quant_absmax_count(kind, rows * cols, cols, block_size);
}

static const char *const part_names[WANE_PARTS] = { "codes", "absmax", "nested_absmax", "nested_code", "code", "offset" };

/* One part against the dtype and the number of values it must have. dtype < 0: any plain one, for codes; `count` is then bytes. */
static int check_part(int kind, int part, const wane_tensor *t, int dtype, int64_t count) {
  if (!t) return wane_fail(WANE_E_ARG, "%s needs the part %s", wane_dtype_name(kind), part_names[part]);
  int64_t found = wane_numel(t) * (dtype < 0 ? wane_size_of(t->dtype) : 1);
  int fits = dtype < 0 ? found >= count && found - count < 4 : found == count; /* quant_storage of 2 or 4 bytes may pad */
  if (t->parts || !wane_is_contiguous(t) || (dtype >= 0 && t->dtype != dtype) || !fits)
    return wane_fail(WANE_E_SHAPE, "the part %s of %s must be contiguous, %lld %s; found %s", part_names[part], wane_dtype_name(kind), (long long)count,
                     dtype < 0 ? "bytes" : wane_dtype_name(dtype), wane_shape_text(t));
  return WANE_OK;
}

/* All parts of a kind; *used gets a bit for each part that the kind has. */
static int check_parts(int kind, int64_t rows, int64_t cols, int block_size, wane_tensor *const *part, unsigned *used) {
  int64_t n = rows * cols, block = wane_gguf_block(kind), nb = scale_count(kind, rows, cols, block_size);
  int nested = wane_is_4bit(kind) && part[WANE_PART_NESTED_ABSMAX] != NULL, status;
  *used = 1u << WANE_PART_CODES;
  if (block) {
    if (cols % block)
      return wane_fail(WANE_E_SHAPE, "rows of %s must be a multiple of %lld values, found %lld", wane_dtype_name(kind), (long long)block, (long long)cols);
    return check_part(kind, WANE_PART_CODES, part[WANE_PART_CODES], WANE_U8, n / block * wane_gguf_block_bytes(kind));
  }
  *used |= 1u << WANE_PART_ABSMAX;
  status = check_part(kind, WANE_PART_CODES, part[WANE_PART_CODES], -1, wane_quant_code_bytes(kind, n));
  if (!status) status = check_part(kind, WANE_PART_ABSMAX, part[WANE_PART_ABSMAX], nested ? WANE_U8 : WANE_F32, nb);
  if (!status && (kind == WANE_BLOCK8 || kind == WANE_BLOCK8U)) {
    *used |= 1u << WANE_PART_CODE;
    status = check_part(kind, WANE_PART_CODE, part[WANE_PART_CODE], WANE_F32, 256);
  }
  if (!status && nested) {
    *used |= 1u << WANE_PART_NESTED_ABSMAX | 1u << WANE_PART_NESTED_CODE | 1u << WANE_PART_OFFSET;
    status = check_part(kind, WANE_PART_NESTED_ABSMAX, part[WANE_PART_NESTED_ABSMAX], WANE_F32, (nb + WANE_NESTED_BLOCK - 1) / WANE_NESTED_BLOCK);
    if (!status) status = check_part(kind, WANE_PART_NESTED_CODE, part[WANE_PART_NESTED_CODE], WANE_F32, 256);
    if (!status) status = check_part(kind, WANE_PART_OFFSET, part[WANE_PART_OFFSET], WANE_F32, 1);
  }
  return status;
}

/* The quantized tensor over checked parts. Each part gets a descriptor of its own, outside any scope, owned by the tensor. */
static int assemble(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape, int block_size, wane_tensor *const *part, unsigned used) {
  wane_tensor *t = wane_make_view(s, out, part[WANE_PART_CODES]);
  if (!t) return WANE_E_MEMORY;
  t->dtype = dtype;
  t->ndim = ndim;
  t->data = NULL;
  memset(t->stride, 0, sizeof t->stride);
  memset(t->shape, 0, sizeof t->shape);
  if (ndim) memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
  t->parts = wane_alloc_zero(sizeof *t->parts, "a quantized tensor");
  for (int k = 0; t->parts && k < WANE_PARTS; k++) {
    wane_handle own = { 0 };
    if (!(used >> k & 1)) continue;
    if (!(t->parts->part[k] = wane_make_view(s, &own, part[k]))) break;
    wane_tensor_move(s, &own, NULL);
    if (k == WANE_PARTS - 1 || !(used >> (k + 1))) {
      t->parts->block_size = block_size;
      return WANE_OK;
    }
  }
  wane_tensor_free(out);
  return WANE_E_MEMORY;
}

/* A contiguous tensor for a part, a vector of `count` or of a given shape. Large ones lie outside the stream's pool, in pages of
 * their own. */
static wane_tensor *make_shaped(wane_stream *s, wane_handle *out, int dtype, int64_t count, int ndim, const int64_t *shape) {
  int64_t bytes = count * wane_size_of(dtype);
  wane_storage *st = wane_storage_new(s, bytes >= 1 << 20 ? WANE_STORAGE_DENSE : WANE_STORAGE_POOL, (size_t)bytes);
  return st ? wane_make_over(s, out, dtype, ndim, shape, st, st->data) : NULL;
}
static wane_tensor *make_part(wane_stream *s, wane_handle *out, int dtype, int64_t count) {
  return make_shaped(s, out, dtype, count, 1, &count);
}

/* A new f32 part with the given values. Fresh heap memory: no op in flight can know it, so it is written here. */
static wane_tensor *make_constant(wane_stream *s, wane_handle *out, const float *value, int64_t count) {
  wane_storage *st = wane_storage_new(s, WANE_STORAGE_HEAP, (size_t)count * sizeof(float));
  if (st) memcpy(st->data, value, (size_t)count * sizeof(float));
  return st ? wane_make_over(s, out, WANE_F32, 1, &count, st, st->data) : NULL;
}

int wane_quantized_new(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape, int block_size, float nested_offset,
                       const wane_handle *const *parts) {
  wane_tensor *part[WANE_PARTS] = { 0 };
  wane_handle offset = { 0 };
  int64_t rows, cols;
  unsigned used;
  int status = wane_enter(s);
  if (!status && !is_quantized(dtype))
    status = wane_fail(WANE_E_DTYPE, "%s is no quantized kind", name_of(dtype));
  if (!status) status = check_block_size(dtype, block_size);
  if (!status && count_of(ndim, shape) < 0) status = WANE_E_SHAPE;
  for (int k = 0; !status && k < WANE_PARTS; k++)
    if (parts[k] && !(part[k] = wane_use(s, parts[k], part_names[k]))) status = WANE_E_STALE;
  if (!status && part[WANE_PART_NESTED_ABSMAX] && !part[WANE_PART_OFFSET] &&
      !(part[WANE_PART_OFFSET] = make_constant(s, &offset, &nested_offset, 1))) status = WANE_E_MEMORY;
  if (!status) {
    matrix_of(ndim, shape, &rows, &cols);
    status = check_parts(dtype, rows, cols, block_size, part, &used);
  }
  if (!status) status = assemble(s, out, dtype, ndim, shape, wane_gguf_block(dtype) ? wane_gguf_block(dtype) : block_size, part, used);
  wane_tensor_free(&offset);
  return status;
}

int wane_quantized_part(wane_stream *s, wane_handle *out, const wane_handle *h, int part) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *q = wane_use(s, h, "q");
  if (!q) return WANE_E_STALE;
  if (!q->parts) return wane_fail(WANE_E_DTYPE, "%s is not quantized: it has no parts", wane_shape_text(q));
  if (part < 0 || part >= WANE_PARTS) return wane_fail(WANE_E_ARG, "there is no part %d", part);
  if (!q->parts->part[part]) return wane_fail(WANE_E_NOTFOUND, "%s has no part %s", wane_shape_text(q), part_names[part]);
  return wane_make_view(s, out, q->parts->part[part]) ? WANE_OK : WANE_E_MEMORY;
}

int wane_quantized_offset(const wane_handle *h, float *offset) {
  wane_tensor *q = wane_use(h && h->t ? h->t->stream : NULL, h, "q");
  if (!q) return WANE_E_STALE;
  const wane_tensor *part = q->parts ? q->parts->part[WANE_PART_OFFSET] : NULL;
  if (!part) return wane_fail(WANE_E_NOTFOUND, "%s has no nested offset", wane_shape_text(q));
  int status = wane_stream_poll(q->stream, part->storage->ticket);
  if (status == WANE_OK) memcpy(offset, part->data, sizeof *offset);
  return status;
}

/* ================================================================ quantize */

/* Enqueues the op that fills codes and absmax from x (contiguous). */
static void push_quantize(wane_stream *s, int kind, int block_size, const wane_tensor *x, wane_tensor *codes, wane_tensor *absmax) {
  enum { GRAIN = 1 << 16 }; /* elements a chunk: some 20 us */
  int64_t rows, cols, n = wane_numel(x);
  wane_op *op = wane_op_new(s, wane_is_4bit(kind) ? WANE_OP_QUANTIZE_4BIT : kind == WANE_INT8 ? WANE_OP_QUANTIZE_ROWS : WANE_OP_QUANTIZE_8BIT);
  matrix_of(x->ndim, x->shape, &rows, &cols);
  op->nchunks = wane_chunks(n, GRAIN);
  op->p[0] = x->data;
  op->p[1] = codes->data;
  op->p[2] = absmax->data;
  op->n[0] = kind == WANE_INT8 ? rows : n;
  op->n[1] = cols;
  op->i[0] = kind;
  op->i[1] = x->dtype;
  op->i[2] = block_size;
  wane_op_push(s, op, codes, absmax);
}

/* Replaces the f32 scales of part[ABSMAX] by their nested form: four more parts into hold[0..3]. */
static int push_nested(wane_stream *s, wane_tensor **part, wane_handle *hold) {
  wane_tensor *scales = part[WANE_PART_ABSMAX];
  int64_t nb = wane_numel(scales);
  if (!(part[WANE_PART_ABSMAX] = make_part(s, &hold[0], WANE_U8, nb)) ||
      !(part[WANE_PART_NESTED_ABSMAX] = make_part(s, &hold[1], WANE_F32, (nb + WANE_NESTED_BLOCK - 1) / WANE_NESTED_BLOCK)) ||
      !(part[WANE_PART_NESTED_CODE] = make_constant(s, &hold[2], wane_dynamic_map(1), 256)) ||
      !(part[WANE_PART_OFFSET] = make_part(s, &hold[3], WANE_F32, 1))) return WANE_E_MEMORY;
  wane_op *op = wane_op_new(s, WANE_OP_QUANTIZE_NESTED);
  op->n[0] = nb;
  op->p[0] = scales->data;
  op->p[1] = part[WANE_PART_ABSMAX]->data;
  op->p[2] = part[WANE_PART_NESTED_ABSMAX]->data;
  op->p[4] = part[WANE_PART_OFFSET]->data;
  part[WANE_PART_NESTED_ABSMAX]->storage->ticket = wane_stream_tail(s) + 1; /* the op writes three parts; push marks two */
  wane_op_push(s, op, part[WANE_PART_ABSMAX], part[WANE_PART_OFFSET]);
  return WANE_OK;
}

static int check_quantize(const wane_tensor *x, int dtype, int block_size, int nested) {
  if (!wane_is_float(x->dtype)) return wane_fail(WANE_E_DTYPE, "x is %s; quantize takes f32, f16 or bf16 (dequantize first?)", wane_shape_text(x));
  if (!is_quantized(dtype)) return wane_fail(WANE_E_DTYPE, "%s is no quantized kind: nf4, fp4, int8, int8-blockwise", name_of(dtype));
  if (wane_gguf_block(dtype)) return wane_fail(WANE_E_UNSUPPORTED, "GGUF's %s is read, not made: use nf4, fp4, int8 or int8-blockwise", name_of(dtype));
  if (nested && !wane_is_4bit(dtype)) return wane_fail(WANE_E_ARG, "double quantization is for the scales of nf4 and fp4, not %s", wane_dtype_name(dtype));
  return check_block_size(dtype, block_size);
}

int wane_quantize(wane_stream *s, wane_handle *out, const wane_handle *h, int dtype, int block_size, int nested) {
  wane_tensor *x, *part[WANE_PARTS] = { 0 };
  wane_handle tmp = { 0 }, hold[7] = { 0 };
  int64_t rows, cols;
  int status = wane_enter(s);
  if (status) return status;
  if (!(x = wane_use(s, h, "x"))) return WANE_E_STALE;
  if ((status = check_quantize(x, dtype, block_size, nested))) return status;
  if (!(x = wane_contiguous(s, x, &tmp))) return WANE_E_MEMORY;
  matrix_of(x->ndim, x->shape, &rows, &cols);
  if (dtype == WANE_INT8) block_size = 0;
  unsigned used = 1u << WANE_PART_CODES | 1u << WANE_PART_ABSMAX;
  int64_t bytes = wane_quant_code_bytes(dtype, rows * cols), nb = scale_count(dtype, rows, cols, block_size);
  int flat = wane_is_4bit(dtype); /* 8-bit codes have x's own shape */
  if (!(part[WANE_PART_CODES] = make_shaped(s, &hold[0], dtype == WANE_INT8 ? WANE_I8 : WANE_U8, bytes, flat ? 1 : x->ndim, flat ? &bytes : x->shape)) ||
      !(part[WANE_PART_ABSMAX] = make_part(s, &hold[1], WANE_F32, nb))) status = WANE_E_MEMORY;
  if (!status && (dtype == WANE_BLOCK8 || dtype == WANE_BLOCK8U)) {
    used |= 1u << WANE_PART_CODE;
    if (!(part[WANE_PART_CODE] = make_constant(s, &hold[2], wane_dynamic_map(dtype == WANE_BLOCK8), 256))) status = WANE_E_MEMORY;
  }
  if (!status) {
    push_quantize(s, dtype, block_size, x, part[WANE_PART_CODES], part[WANE_PART_ABSMAX]);
    if (nested) status = push_nested(s, part, hold + 3);
    if (nested) used |= 1u << WANE_PART_NESTED_ABSMAX | 1u << WANE_PART_NESTED_CODE | 1u << WANE_PART_OFFSET;
  }
  if (!status) status = assemble(s, out, dtype, x->ndim, x->shape, block_size, part, used);
  for (int k = 0; k < 7; k++) wane_tensor_free(&hold[k]);
  wane_tensor_free(&tmp);
  return status;
}

/* ================================================================ dequantize */

int wane_dequantize(wane_stream *s, wane_handle *out, const wane_handle *h, int dtype) {
  enum { GRAIN = 1 << 16 };
  wane_qview q;
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *t = wane_use(s, h, "q");
  if (!t) return WANE_E_STALE;
  if (!wane_is_float(dtype)) return wane_fail(WANE_E_DTYPE, "dequantize gives f32, f16 or bf16, not %s", name_of(dtype));
  if (!t->parts) return wane_cast(s, out, h, dtype);
  wane_tensor *y = wane_make(s, out, dtype, t->ndim, t->shape);
  if (!y) return WANE_E_MEMORY;
  wane_op *op = wane_op_new(s, WANE_OP_DEQUANTIZE);
  wane_qview_of(t, &q);
  wane_qview_store(op, &q);
  op->n[0] = wane_numel(t);
  op->nchunks = wane_chunks(op->n[0], GRAIN);
  op->p[0] = y->data;
  op->i[0] = dtype;
  wane_op_push(s, op, y, NULL);
  return WANE_OK;
}
