/* gguf.c: the headers of a GGUF file (versions 2 and 3, little-endian) and of its further parts into an index: key-value pairs and
 * tensor infos.
 *
 * Source: ggml docs/gguf.md; block sizes ggml-common.h. Every count and length is compared with what is left of the file before
 * anything is allocated for it, so a lying header costs no more memory than its file has bytes. */
#include "reader.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ggml's tensor types: name, values and bytes a block, our dtype or -1. */
static const struct { int32_t type; const char *name; int32_t block, bytes, dtype; } types[] = {
  { 0, "F32", 1, 4, WANE_F32 }, { 1, "F16", 1, 2, WANE_F16 }, { 2, "Q4_0", 32, 18, WANE_Q4_0 }, { 3, "Q4_1", 32, 20, WANE_Q4_1 },
  { 6, "Q5_0", 32, 22, WANE_Q5_0 }, { 7, "Q5_1", 32, 24, WANE_Q5_1 }, { 8, "Q8_0", 32, 34, WANE_Q8_0 }, { 9, "Q8_1", 32, 36, -1 },
  { 10, "Q2_K", 256, 84, WANE_Q2_K }, { 11, "Q3_K", 256, 110, WANE_Q3_K }, { 12, "Q4_K", 256, 144, WANE_Q4_K },
  { 13, "Q5_K", 256, 176, WANE_Q5_K }, { 14, "Q6_K", 256, 210, WANE_Q6_K }, { 15, "Q8_K", 256, 292, -1 }, { 16, "IQ2_XXS", 256, 66, WANE_IQ2_XXS },
  { 17, "IQ2_XS", 256, 74, WANE_IQ2_XS }, { 18, "IQ3_XXS", 256, 98, WANE_IQ3_XXS }, { 19, "IQ1_S", 256, 50, WANE_IQ1_S },
  { 20, "IQ4_NL", 32, 18, WANE_IQ4_NL }, { 21, "IQ3_S", 256, 110, WANE_IQ3_S }, { 22, "IQ2_S", 256, 82, WANE_IQ2_S },
  { 23, "IQ4_XS", 256, 136, WANE_IQ4_XS }, { 24, "I8", 1, 1, WANE_I8 }, { 25, "I16", 1, 2, -1 }, { 26, "I32", 1, 4, WANE_I32 },
  { 27, "I64", 1, 8, WANE_I64 }, { 28, "F64", 1, 8, -1 }, { 29, "IQ1_M", 256, 56, WANE_IQ1_M }, { 30, "BF16", 1, 2, WANE_BF16 },
  { 34, "TQ1_0", 256, 54, WANE_TQ1_0 }, { 35, "TQ2_0", 256, 66, WANE_TQ2_0 }, { 39, "MXFP4", 32, 17, WANE_MXFP4 }, { 40, "NVFP4", 64, 36, WANE_NVFP4 },
};
enum { TYPES = sizeof types / sizeof *types };

/* Metadata value types. */
enum { T_U8, T_I8, T_U16, T_I16, T_U32, T_I32, T_F32, T_BOOL, T_STRING, T_ARRAY, T_U64, T_I64, T_F64, T_END };
static const int type_bytes[T_END] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };

/* ---------------------------------------------------------------- a bounded reader with a buffer */

enum { BUFFER = 256 << 10 };
typedef struct reader {
  wane_index *ix;
  wane_index *meta;                            /* who gets the key-value pairs: the index, or for a further part a scratch one */
  int file;
  const wane_file *f;
  wane_job *job;
  unsigned char *buffer;
  uint64_t at, begin, end;                     /* place in the file; part of it in the buffer */
} reader;

static uint64_t left(const reader *r) { return r->f->size - r->at; }

/* The header asks for more bytes than the file has. */
static int truncated(const reader *r, const char *what) {
  return wane_fail(WANE_E_FORMAT, "'%s': %s at byte %llu reaches beyond the end of the file (%llu bytes): truncated or damaged", r->f->path, what,
                   (unsigned long long)r->at, (unsigned long long)r->f->size);
}

static int take(reader *r, void *to, uint64_t bytes, const char *what) {
  if (bytes > left(r)) return truncated(r, what);
  char *out = to;
  while (bytes) {
    if (r->at >= r->begin && r->at < r->end) {
      uint64_t n = r->end - r->at < bytes ? r->end - r->at : bytes;
      memcpy(out, r->buffer + (r->at - r->begin), n);
      out += n; r->at += n; bytes -= n;
      continue;
    }
    if (wane_job_cancelled(r->job)) return wane_fail(WANE_E_CANCELLED, "opening '%s' was cancelled", r->f->path);
    uint64_t n = left(r) < BUFFER ? left(r) : BUFFER;
    int status = wane_file_read(r->f, r->at, r->buffer, (size_t)n);
    if (status != WANE_OK) return status;
    r->begin = r->at;
    r->end = r->at + n;
    wane_job_set_progress(r->job, r->end, 0);
  }
  return WANE_OK;
}

static int take_u32(reader *r, uint32_t *v, const char *what) { return take(r, v, 4, what); }
static int take_u64(reader *r, uint64_t *v, const char *what) { return take(r, v, 8, what); }

/* A string into the arena as u64 length, bytes, NUL; *out points at the length. */
static int take_string(reader *r, uint64_t longest, const char *what, const char **out) {
  uint64_t n = 0;
  int status = take_u64(r, &n, what);
  if (status != WANE_OK) return status;
  if (n > left(r)) return truncated(r, what);
  if (n > longest) return wane_fail(WANE_E_FORMAT, "'%s': %s at byte %llu has %llu bytes, %llu at most are valid", r->f->path, what,
                                    (unsigned long long)r->at, (unsigned long long)n, (unsigned long long)longest);
  char *p = wane_arena_alloc(&r->meta->arena, (size_t)n + 9, "GGUF metadata");
  if (!p) return WANE_E_MEMORY;
  memcpy(p, &n, 8);
  p[8 + n] = 0;
  *out = p;
  return take(r, p + 8, n, what);
}

/* A name: a string without zero bytes. */
static int take_name(reader *r, uint64_t longest, const char *what, const char **out, size_t *length) {
  const char *p;
  int status = take_string(r, longest, what, &p);
  if (status != WANE_OK) return status;
  uint64_t n;
  memcpy(&n, p, 8);
  *out = p + 8;
  *length = (size_t)n;
  if (memchr(p + 8, 0, (size_t)n)) return wane_fail(WANE_E_FORMAT, "'%s': %s at byte %llu holds a zero byte", r->f->path, what, (unsigned long long)r->at);
  return WANE_OK;
}

/* ---------------------------------------------------------------- key-value pairs */

static int kind_of(int type) {
  if (type == T_STRING) return WANE_META_STRING;
  if (type == T_ARRAY) return WANE_META_ARRAY;
  if (type == T_BOOL) return WANE_META_BOOL;
  return type == T_F32 || type == T_F64 ? WANE_META_FLOAT : WANE_META_INT;
}

/* A scalar from its bytes as they lie in the file. */
static void decode(int type, const void *p, wane_meta *out) {
  memset(out, 0, sizeof *out);
  out->kind = kind_of(type);
  out->count = 1;
  union { uint8_t u8; int8_t i8; uint16_t u16; int16_t i16; uint32_t u32; int32_t i32; float f32; uint64_t u64; int64_t i64; double f64; } v;
  memcpy(&v, p, (size_t)type_bytes[type]);
  switch (type) {
    case T_U8: out->integer = v.u8; break;
    case T_BOOL: out->integer = v.u8 != 0; break;
    case T_I8: out->integer = v.i8; break;
    case T_U16: out->integer = v.u16; break;
    case T_I16: out->integer = v.i16; break;
    case T_U32: out->integer = v.u32; break;
    case T_I32: out->integer = v.i32; break;
    case T_F32: out->number = v.f32; return;
    case T_F64: out->number = v.f64; return;
    case T_U64: out->integer = v.i64; out->number = (double)v.u64; return;
    default: out->integer = v.i64; break;
  }
  out->number = (double)out->integer;
}

static void decode_string(const char *p, wane_meta *out) {
  memset(out, 0, sizeof *out);
  out->kind = WANE_META_STRING;
  out->count = 1;
  memcpy(&out->length, p, 8);
  out->text = p + 8;
}

int wane_gguf_item(const wane_meta_entry *m, int64_t i, wane_meta *out) {
  if (m->item_type == T_STRING) decode_string(((const char *const *)m->items)[i], out);
  else decode(m->item_type, (const char *)m->items + i * type_bytes[m->item_type], out);
  return WANE_OK;
}

static int bad_type(const reader *r, const char *key, uint32_t type) {
  return wane_fail(WANE_E_FORMAT, "'%s': metadata key '%s' has the unknown type %u", r->f->path, key, type);
}

static int take_array(reader *r, const char *key, wane_meta_entry *m) {
  uint32_t type = 0;
  uint64_t n = 0;
  int status = take_u32(r, &type, key);
  if (status == WANE_OK) status = take_u64(r, &n, key);
  if (status != WANE_OK) return status;
  if (type == T_ARRAY) return wane_fail(WANE_E_UNSUPPORTED, "'%s': metadata key '%s' is an array of arrays, which wane does not read", r->f->path, key);
  if (type >= T_END) return bad_type(r, key, type);
  uint64_t least = type == T_STRING ? 8 : (uint64_t)type_bytes[type];
  if (n > left(r) / least) return truncated(r, key);
  m->value.kind = WANE_META_ARRAY;
  m->value.item_kind = kind_of((int)type);
  m->value.count = (int64_t)n;
  m->item_type = (int32_t)type;
  void *items = wane_arena_alloc(&r->meta->arena, (size_t)(n * least), "GGUF metadata");
  if (!items) return WANE_E_MEMORY;
  m->items = items;
  if (type != T_STRING) return take(r, items, n * least, key);
  for (uint64_t i = 0; i < n && status == WANE_OK; i++) status = take_string(r, left(r), key, (const char **)items + i);
  return status;
}

static int take_pair(reader *r) {
  const char *key, *text;
  size_t length;
  uint32_t type = 0;
  wane_meta_entry m = { 0 };
  int status = take_name(r, 65535, "a metadata key", &key, &length);
  if (status == WANE_OK) status = take_u32(r, &type, key);
  if (status != WANE_OK) return status;
  if (type >= T_END) return bad_type(r, key, type);
  if (type == T_STRING) {
    status = take_string(r, left(r), key, &text);
    if (status == WANE_OK) decode_string(text, &m.value);
  } else if (type == T_ARRAY) {
    status = take_array(r, key, &m);
  } else {
    char bytes[8];
    status = take(r, bytes, (uint64_t)type_bytes[type], key);
    if (status == WANE_OK) decode((int)type, bytes, &m.value);
  }
  if (status != WANE_OK) return status;
  status = wane_index_add_meta(r->meta, key, length, &m);
  return status == 1 ? wane_fail(WANE_E_FORMAT, "'%s': metadata key '%s' occurs twice", r->f->path, key) : status;
}

/* ---------------------------------------------------------------- tensors */

/* Fills dtype and bytes from ggml's type number; unknown types keep dtype -1 and no size. */
static int size_tensor(const reader *r, wane_entry *e, uint32_t type) {
  e->dtype = -1;
  e->dtype_name = "unknown";
  int64_t n = wane_shape_numel(e->ndim, e->shape);
  if (n < 0) return wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' has a shape whose size overflows", r->f->path, e->name);
  for (int i = 0; i < TYPES; i++) {
    if (types[i].type != (int32_t)type) continue;
    e->dtype = types[i].dtype;
    e->dtype_name = types[i].name;
    int64_t row = e->ndim ? e->shape[e->ndim - 1] : 1, bytes;
    if (row % types[i].block)
      return wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' has rows of %lld values, no multiple of the %d of a %s block", r->f->path, e->name, (long long)row,
                       types[i].block, types[i].name);
    if (__builtin_mul_overflow(n / types[i].block, types[i].bytes, &bytes))
      return wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' has a shape whose size overflows", r->f->path, e->name);
    e->bytes = (uint64_t)bytes;
  }
  return WANE_OK;
}

static int take_tensor(reader *r) {
  wane_entry e = { .file = r->file };
  size_t length;
  uint32_t dims = 0, type = 0;
  uint64_t size = 0;
  int status = take_name(r, 1024, "a tensor's name", &e.name, &length);
  if (status == WANE_OK) status = take_u32(r, &dims, e.name);
  if (status != WANE_OK) return status;
  if (dims > 4) return wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' has %u dimensions, 4 at most are valid", r->f->path, e.name, dims);
  e.ndim = (int32_t)dims;
  for (uint32_t i = 0; i < dims && status == WANE_OK; i++) {
    status = take_u64(r, &size, e.name);
    if (status == WANE_OK && size > INT64_MAX) status = wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' has a shape whose size overflows", r->f->path, e.name);
    e.shape[dims - 1 - i] = (int64_t)size;
  }
  if (status == WANE_OK) status = take_u32(r, &type, e.name);
  if (status == WANE_OK) status = take_u64(r, &e.offset, e.name);
  if (status == WANE_OK) status = size_tensor(r, &e, type);
  if (status != WANE_OK) return status;
  status = wane_index_add(r->ix, &e, length);
  return status == 1 ? wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' occurs twice", r->f->path, e.name) : status;
}

static int by_offset(const void *a, const void *b) {
  const wane_entry *x = *(const wane_entry *const *)a, *y = *(const wane_entry *const *)b;
  if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
  return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* The data begins at the next multiple of the alignment. Tensors (from number `first` of the index on) must lie inside the file,
 * aligned, and not on each other. */
static int check_places(reader *r, int64_t first, uint64_t alignment) {
  wane_index *ix = r->ix;
  int64_t n = ix->count - first;
  uint64_t data = (r->at + alignment - 1) & ~(alignment - 1), at = 0;
  if (data > r->f->size) {
    if (n) return truncated(r, "the tensors' data");
    data = r->f->size;
  }
  wane_entry **order = wane_alloc((size_t)(n ? n : 1) * sizeof *order, "an index");
  if (!order) return WANE_E_MEMORY;
  for (int64_t i = 0; i < n; i++) order[i] = &ix->entries[first + i];
  qsort(order, (size_t)n, sizeof *order, by_offset);
  int status = WANE_OK;
  for (int64_t i = 0; i < n && status == WANE_OK; i++) {
    wane_entry *e = order[i];
    if (e->offset & (alignment - 1))
      status = wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' begins at data byte %llu, no multiple of the alignment %llu", r->f->path, e->name,
                         (unsigned long long)e->offset, (unsigned long long)alignment);
    else if (e->offset > r->f->size - data || e->bytes > r->f->size - data - e->offset)
      status = wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' needs data bytes %llu..%llu, the file ends at %llu: truncated or damaged", r->f->path, e->name,
                         (unsigned long long)e->offset, (unsigned long long)(e->offset + e->bytes), (unsigned long long)(r->f->size - data));
    else if (e->offset < at)
      status = wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' begins at data byte %llu, inside the tensor that ends at %llu", r->f->path, e->name,
                         (unsigned long long)e->offset, (unsigned long long)at);
    at = e->offset + e->bytes;
    e->offset += data;
  }
  wane_release(order);
  return status;
}

/* general.alignment, 32 where it is absent; 0 with the error set if it is no power of two. */
static uint64_t alignment_of(const reader *r) {
  int64_t i = wane_names_find(&r->meta->by_key, "general.alignment", 17);
  if (i < 0) return 32;
  const wane_meta *m = &r->meta->metas[i].value;
  if (m->kind == WANE_META_INT && m->integer > 0 && m->integer <= 1 << 20 && (m->integer & (m->integer - 1)) == 0) return (uint64_t)m->integer;
  wane_fail(WANE_E_FORMAT, "'%s': general.alignment must be a power of two up to 2^20", r->f->path);
  return 0;
}

static int read_all(reader *r) {
  uint32_t version = 0;
  uint64_t tensors = 0, pairs = 0;
  int64_t first = r->ix->count;
  r->at = 4;
  int status = take_u32(r, &version, "the version");
  if (status != WANE_OK) return status;
  if (version == 0x02000000 || version == 0x03000000) return wane_fail(WANE_E_UNSUPPORTED, "'%s' is a big-endian GGUF file", r->f->path);
  if (version != 2 && version != 3) return wane_fail(WANE_E_UNSUPPORTED, "'%s' is GGUF version %u; wane reads 2 and 3", r->f->path, version);
  status = take_u64(r, &tensors, "the number of tensors");
  if (status == WANE_OK) status = take_u64(r, &pairs, "the number of metadata pairs");
  if (status != WANE_OK) return status;
  /* the least bytes: a tensor has a length, 1 letter, dims, type, offset; a pair a length, 1 letter, type, 1 byte */
  if (tensors > left(r) / 24 || pairs > left(r) / 13)
    return wane_fail(WANE_E_FORMAT, "'%s' promises %llu tensors and %llu metadata pairs, more than its %llu bytes can hold: damaged", r->f->path,
                     (unsigned long long)tensors, (unsigned long long)pairs, (unsigned long long)r->f->size);
  for (uint64_t i = 0; i < pairs && status == WANE_OK; i++) status = take_pair(r);
  for (uint64_t i = 0; i < tensors && status == WANE_OK; i++) status = take_tensor(r);
  if (status != WANE_OK) return status;
  uint64_t alignment = alignment_of(r);
  return alignment ? check_places(r, first, alignment) : WANE_E_FORMAT;
}

static int read_file(wane_index *ix, wane_index *meta, int file, wane_job *job) {
  reader r = { .ix = ix, .meta = meta, .file = file, .f = &ix->files[file], .job = job };
  r.buffer = wane_alloc(BUFFER, "a GGUF header");
  if (!r.buffer) return WANE_E_MEMORY;
  int status = read_all(&r);
  wane_release(r.buffer);
  return status;
}

/* ---------------------------------------------------------------- a model in several files: NAME-00001-of-00003.gguf */

enum { PART_NAME = 5 + 4 + 5 + 5 };            /* 00001-of-00003.gguf */

/* A whole number of the metadata, or -1. */
static int64_t number(const wane_index *meta, const char *key) {
  int64_t i = wane_names_find(&meta->by_key, key, strlen(key));
  return i >= 0 && meta->metas[i].value.kind == WANE_META_INT ? meta->metas[i].value.integer : -1;
}

/* Reads part number i (from 1; the index's file i) and checks that it is that part of as many. */
static int read_part(wane_index *ix, int64_t i, int64_t count, const char *path, wane_job *job) {
  int status = wane_index_add_file(ix, path);
  if (status != WANE_OK) return status;
  char magic[4] = { 0 };
  const wane_file *f = &ix->files[i];
  status = wane_file_read(f, 0, magic, f->size < 4 ? (size_t)f->size : 4);
  if (status == WANE_OK && memcmp(magic, "GGUF", 4)) status = wane_fail(WANE_E_FORMAT, "'%s' is no GGUF file: it does not begin with \"GGUF\"", path);
  if (status != WANE_OK) return status;
  wane_index *scratch = wane_alloc_zero(sizeof *scratch, "an index");
  if (!scratch) return WANE_E_MEMORY;
  scratch->refs = 1;
  status = read_file(ix, scratch, (int)i, job);
  int64_t no = number(scratch, "split.no"), of = number(scratch, "split.count");
  wane_index_free(scratch);
  if (status == WANE_OK && (no != i || of != count))
    status = wane_fail(WANE_E_FORMAT, "'%s' says that it is part %lld of %lld (split.no + 1, split.count); part %lld of %lld was expected", path,
                       (long long)no + 1, (long long)of, (long long)i + 1, (long long)count);
  return status;
}

/* The other parts of a model whose first part has been read. */
static int read_parts(wane_index *ix, int64_t count, wane_job *job) {
  const char *first = ix->files[0].path;
  size_t n = strlen(first);
  char want[PART_NAME + 8];
  snprintf(want, sizeof want, "-00001-of-%05lld.gguf", (long long)(count % 100000));
  if (number(ix, "split.no") != 0)
    return wane_fail(WANE_E_ARG, "'%s' is part %lld of %lld of a model: name its first part (…-00001-of-%05lld.gguf)", first,
                     (long long)number(ix, "split.no") + 1, (long long)count, (long long)count);
  if (count > 99999 || n < strlen(want) || strcmp(first + n - strlen(want), want))
    return wane_fail(WANE_E_FORMAT, "'%s' is the first of %lld parts (split.count): its name must end in '%s'", first, (long long)count, want);
  char *path = wane_arena_text(&ix->arena, first, n);
  int status = path ? WANE_OK : WANE_E_MEMORY;
  for (int64_t i = 1; i < count && status == WANE_OK; i++) {
    snprintf(path + n - PART_NAME, PART_NAME + 1, "%05lld-of-%05lld.gguf", (long long)i + 1, (long long)count);
    status = read_part(ix, i, count, path, job);
  }
  int64_t promised = number(ix, "split.tensors.count");
  if (status == WANE_OK && promised >= 0 && promised != ix->count)
    status = wane_fail(WANE_E_FORMAT, "'%s' promises %lld tensors in %lld parts (split.tensors.count), they hold %lld", first, (long long)promised,
                       (long long)count, (long long)ix->count);
  return status;
}

int wane_gguf_read(wane_index *ix, wane_job *job) {
  ix->format = WANE_FORMAT_GGUF;
  int status = read_file(ix, ix, 0, job);
  int64_t count = number(ix, "split.count");
  return status == WANE_OK && count > 1 ? read_parts(ix, count, job) : status;
}
