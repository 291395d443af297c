/* map.c: tensors over memory that a mapping holds: a file's own pages, or the block that a load filled. */
#include "reader.h"
#include <string.h>

/* A plain tensor over `data`, which lies in the mapping. */
static int plain_over(wane_stream *s, wane_handle *out, wane_mapping *m, void *data, int dtype, int ndim, const int64_t *shape) {
  size_t bytes = (size_t)(wane_shape_numel(ndim, shape) * wane_size_of(dtype));
  wane_storage *st = wane_storage_mapped(s, m, data, bytes);
  if (!st) return WANE_E_MEMORY;
  return wane_make_over(s, out, dtype, ndim, shape, st, data) ? WANE_OK : WANE_E_MEMORY;
}

int wane_layout_of(wane_layout *l, int dtype, int ndim, const int64_t *shape, int block_size, int nested) {
  memset(l, 0, sizeof *l);
  l->dtype = dtype; l->ndim = ndim; l->block_size = block_size; l->nested = nested;
  memcpy(l->shape, shape, sizeof *shape * (size_t)ndim);
  l->n = wane_shape_numel(ndim, shape);
  if (l->n < 0) return wane_fail(WANE_E_SHAPE, "the sizes of a tensor overflow");
  l->cols = ndim ? shape[ndim - 1] : 1;
  l->rows = l->cols ? l->n / l->cols : 0;
  int64_t bytes[WANE_PARTS] = { 0 };
  if (wane_dtype_bytes(dtype, 0) == 0) {           /* one part */
    bytes[WANE_PART_CODES] = wane_dtype_bytes(dtype, l->n);
  } else {
    l->scales = wane_quant_absmax_count(dtype, l->n, l->cols, block_size);
    bytes[WANE_PART_CODES] = wane_quant_code_bytes(dtype, l->n);
    bytes[WANE_PART_ABSMAX] = nested ? l->scales : l->scales * 4;
    if (nested) {
      bytes[WANE_PART_NESTED_ABSMAX] = (l->scales + WANE_NESTED_BLOCK - 1) / WANE_NESTED_BLOCK * 4;
      bytes[WANE_PART_NESTED_CODE] = 256 * 4;
      bytes[WANE_PART_OFFSET] = 4;
    }
    if (dtype == WANE_BLOCK8 || dtype == WANE_BLOCK8U) bytes[WANE_PART_CODE] = 256 * 4;
  }
  for (int i = 0; i < WANE_PARTS; i++) {
    if (bytes[i] < 0) return wane_fail(WANE_E_SHAPE, "the sizes of a %s tensor overflow", wane_dtype_name(dtype));
    l->at[i] = l->bytes;
    l->part_bytes[i] = (size_t)bytes[i];
    l->bytes += ((size_t)bytes[i] + 63) & ~(size_t)63;
  }
  return WANE_OK;
}

/* Dtype and shape of a part of a quantized kind. */
static void part_shape(const wane_layout *l, int part, int *dtype, int *ndim, int64_t *shape) {
  *dtype = WANE_F32;
  *ndim = 1;
  shape[0] = (int64_t)(l->part_bytes[part] / 4);
  if (part == WANE_PART_CODES) {
    *dtype = l->dtype == WANE_INT8 ? WANE_I8 : WANE_U8;
    shape[0] = (int64_t)l->part_bytes[part];
    if (l->dtype == WANE_INT8 || l->dtype == WANE_BLOCK8 || l->dtype == WANE_BLOCK8U) {
      *ndim = l->ndim;
      memcpy(shape, l->shape, sizeof *shape * (size_t)l->ndim);
    } else if (l->dtype >= WANE_Q4_0) {
      *ndim = 2;
      shape[0] = l->rows;
      shape[1] = wane_dtype_bytes(l->dtype, l->cols);
    }
  } else if (part == WANE_PART_ABSMAX && l->nested) {
    *dtype = WANE_U8;
    shape[0] = (int64_t)l->part_bytes[part];
  }
}

int wane_tensor_over(wane_stream *s, wane_handle *out, wane_mapping *m, char *base, const wane_layout *l) {
  if (l->dtype < WANE_DTYPE_PLAIN) return plain_over(s, out, m, base, l->dtype, l->ndim, l->shape);
  wane_handle parts[WANE_PARTS];
  const wane_handle *given[WANE_PARTS] = { NULL };
  memset(parts, 0, sizeof parts);
  int status = WANE_OK;
  for (int i = 0; i < WANE_PARTS && status == WANE_OK; i++) {
    if (!l->part_bytes[i] && i != WANE_PART_CODES && !(i == WANE_PART_ABSMAX && l->dtype < WANE_Q4_0)
        && !(i == WANE_PART_NESTED_ABSMAX && l->nested)) continue;
    int dtype, ndim;
    int64_t shape[WANE_MAX_DIMS];
    part_shape(l, i, &dtype, &ndim, shape);
    status = plain_over(s, &parts[i], m, base + l->at[i], dtype, ndim, shape);
    given[i] = &parts[i];
  }
  if (status == WANE_OK) status = wane_quantized_new(s, out, l->dtype, l->ndim, l->shape, l->block_size, 0, given);
  for (int i = 0; i < WANE_PARTS; i++) wane_tensor_free(&parts[i]);
  return status;
}

int wane_tensor_new_file(wane_stream *s, wane_handle *out, const char *dir, int dtype, int ndim, const int64_t *shape) {
  memset(out, 0, sizeof *out);
  int status = wane_enter(s);
  if (status) return status;
  if (dtype < 0 || dtype >= WANE_DTYPE_PLAIN) return wane_fail(WANE_E_DTYPE, "tensor_new_file: the dtype must be a plain one");
  if (ndim < 0 || ndim > WANE_MAX_DIMS) return wane_fail(WANE_E_SHAPE, "%d dimensions: at most %d", ndim, WANE_MAX_DIMS);
  int64_t n = wane_shape_numel(ndim, shape);
  if (n < 0 || n > INT64_MAX / 8) return wane_fail(WANE_E_SHAPE, "the sizes of a tensor overflow");
  size_t bytes = n ? (size_t)(n * wane_size_of(dtype)) : 1;
  wane_mapping *m = wane_mapping_scratch(dir, bytes);
  if (!m) return WANE_E_IO;
  status = plain_over(s, out, m, m->base, dtype, ndim, shape);
  wane_mapping_unref(m);
  return status;
}

/* Bytes to which values of a dtype must be aligned to be used in place. GGUF blocks hold f16 scales. */
static size_t alignment_of(int dtype) { return dtype < WANE_DTYPE_PLAIN ? (size_t)wane_size_of(dtype) : 2; }

int wane_index_map(wane_stream *s, wane_handle *out, wane_index *ix, int64_t i, int piece, int pieces, int dtype, int ndim, const int64_t *shape) {
  memset(out, 0, sizeof *out);
  int status = wane_enter(s);
  if (status) return status;
  const wane_entry *e = wane_index_at(ix, i);
  if (!e) return WANE_E_ARG;
  wane_layout l;
  status = wane_layout_check(&l, ix, e, piece, pieces, dtype, ndim, shape);
  if (status != WANE_OK) return status;
  if (wane_is_stored(dtype))
    return wane_fail(WANE_E_UNSUPPORTED, "tensor '%s' of '%s' is %s, which no tensor holds: load it as f32", e->name, ix->files[e->file].path, e->dtype_name);
  wane_file *f = &ix->files[e->file];
  size_t bytes = l.part_bytes[WANE_PART_CODES];
  uint64_t offset = e->offset + (uint64_t)piece * bytes;
  if ((uintptr_t)offset % alignment_of(dtype) == 0) {
    status = wane_file_map(f);
    return status == WANE_OK ? wane_tensor_over(s, out, f->mapping, (char *)f->mapping->base + offset, &l) : status;
  }
  wane_mapping *copy = wane_mapping_block(bytes, e->name);
  if (!copy) return WANE_E_MEMORY;
  status = wane_file_read(f, offset, copy->base, bytes);
  if (status == WANE_OK) status = wane_tensor_over(s, out, copy, copy->base, &l);
  wane_mapping_unref(copy);
  return status;
}

int wane_layout_check(wane_layout *l, const wane_index *ix, const wane_entry *e, int piece, int pieces, int dtype, int ndim, const int64_t *shape) {
  const char *path = ix->files[e->file].path;
  if (dtype < 0 || !wane_dtype_name(dtype) || wane_dtype_bytes(dtype, 0) < 0)
    return wane_fail(WANE_E_UNSUPPORTED, "tensor '%s' of '%s' is %s, a dtype that wane does not compute with", e->name, path, e->dtype_name);
  if (ndim < 0 || ndim > WANE_MAX_DIMS) return wane_fail(WANE_E_SHAPE, "%d dimensions: at most %d", ndim, WANE_MAX_DIMS);
  int status = wane_layout_of(l, dtype, ndim, shape, 0, 0);
  if (status != WANE_OK) return status;
  if (wane_dtype_bytes(dtype, l->cols) < 0 && l->n) return wane_fail(WANE_E_SHAPE, "rows of %lld values do not fill whole %s blocks", (long long)l->cols, wane_dtype_name(dtype));
  if (pieces < 1 || piece < 0 || piece >= pieces) return wane_fail(WANE_E_ARG, "tensor '%s': there is no piece %d of %d", e->name, piece, pieces);
  if (e->bytes % (uint64_t)pieces || l->part_bytes[0] != e->bytes / (uint64_t)pieces)
    return wane_fail(WANE_E_SHAPE, "%s '%s' of '%s' has %llu bytes, the shape asked for needs %zu", pieces == 1 ? "tensor" : "a piece of tensor", e->name,
                     path, (unsigned long long)(e->bytes / (uint64_t)pieces), l->part_bytes[0]);
  return WANE_OK;
}
