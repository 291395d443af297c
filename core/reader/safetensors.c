/* safetensors.c: the header of a .safetensors file and the list of shards of a model, into an index.
 *
 * File: u64 little-endian header length N; N bytes of JSON; data. Rules and their order are those of the reference reader
 * (safetensors/src/tensor.rs): 8 bytes at least; N <= 100,000,000; 8 + N within the file; JSON that begins with '{', no key twice;
 * tensors lie end to end from 0 without hole or overlap; size = product of shape * bits; the last one ends the file.
 * Alignment is not demanded: the format never promised it. */
#include "reader.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yajl/yajl_parse.h>

/* Names of the format and bits a value; those that wane computes with have its dtype. */
static const struct { const char *name; int bits, dtype; } dtypes[] = {
  { "F32", 32, WANE_F32 }, { "F16", 16, WANE_F16 }, { "BF16", 16, WANE_BF16 }, { "I8", 8, WANE_I8 }, { "U8", 8, WANE_U8 },
  { "I32", 32, WANE_I32 }, { "I64", 64, WANE_I64 }, { "BOOL", 8, WANE_BOOL }, { "F64", 64, WANE_F64 }, { "I16", 16, WANE_I16 }, { "U16", 16, -1 },
  { "U32", 32, -1 }, { "U64", 64, -1 }, { "C64", 64, -1 }, { "F8_E4M3", 8, -1 }, { "F8_E5M2", 8, -1 }, { "F8_E8M0", 8, -1 },
  { "F8_E4M3FNUZ", 8, -1 }, { "F8_E5M2FNUZ", 8, -1 }, { "F6_E2M3", 6, -1 }, { "F6_E3M2", 6, -1 }, { "F4", 4, -1 },
};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

const char *wane_safetensors_dtype(const char *name, size_t length, int *dtype, int *bits) {
  for (int i = 0; i < DTYPES; i++) {
    if (strlen(dtypes[i].name) != length || memcmp(dtypes[i].name, name, length)) continue;
    *dtype = dtypes[i].dtype;
    *bits = dtypes[i].bits;
    return dtypes[i].name;
  }
  return NULL;
}

/* ---------------------------------------------------------------- the header's parser */

enum { IN_NOTHING, IN_HEADER, IN_TENSOR, IN_SHAPE, IN_OFFSETS, IN_METADATA };
enum { KEY_NONE, KEY_DTYPE, KEY_SHAPE, KEY_OFFSETS, KEY_OTHER };

typedef struct parse {
  int status;                                  /* set by the callback that stopped the parser */
  int where, key;
  int skipping;                                /* depth inside the value of a key that the format does not know */
  wane_index *ix;
  wane_file *file;
  int file_number;
  char *name;                                  /* of the tensor or metadata key being read: in the index's arena */
  size_t name_length;
  wane_entry entry;
  int have_dtype, have_shape, offsets, metadata_seen;
  int bits;
  uint64_t begin, end;
} parse;

/* Stops the parser. `what` completes "safetensors header of 'x': ". */
static int stop(parse *p, const char *what) {
  p->status = wane_fail(WANE_E_FORMAT, "safetensors header of '%s': %s%s%s%s", p->file->path, p->name ? "tensor '" : "", p->name ? p->name : "",
                        p->name ? "' " : "", what);
  return 0;
}

static int on_other(void *context) {           /* null, true, false */
  parse *p = context;
  if (p->skipping || (p->where == IN_TENSOR && p->key == KEY_OTHER)) return 1;
  return stop(p, "holds a value of the wrong kind");
}
static int on_boolean(void *context, int value) { (void)value; return on_other(context); }

/* A non-negative integer that fits int64; anything else stops. */
static int on_number(void *context, const char *text, size_t length) {
  parse *p = context;
  if (p->skipping || (p->where == IN_TENSOR && p->key == KEY_OTHER)) return 1;
  if (p->where != IN_SHAPE && p->where != IN_OFFSETS) return stop(p, "holds a number where none belongs");
  int64_t v = 0;
  for (size_t i = 0; i < length; i++)
    if (text[i] < '0' || text[i] > '9' || __builtin_mul_overflow(v, 10, &v) || __builtin_add_overflow(v, text[i] - '0', &v))
      return stop(p, "has a size that is no whole number below 2^63");
  if (p->where == IN_SHAPE) {
    if (p->entry.ndim == WANE_MAX_DIMS) return stop(p, "has more than 8 dimensions");
    p->entry.shape[p->entry.ndim++] = v;
  } else {
    if (p->offsets == 2) return stop(p, "has more than two data_offsets");
    if (p->offsets++ == 0) p->begin = (uint64_t)v; else p->end = (uint64_t)v;
  }
  return 1;
}

static int on_string(void *context, const unsigned char *text, size_t length) {
  parse *p = context;
  if (p->skipping) return 1;
  if (p->where == IN_METADATA) {
    wane_meta_entry m = { .value = { .kind = WANE_META_STRING, .count = 1, .length = length } };
    m.value.text = wane_arena_text(&p->ix->arena, (const char *)text, length);
    int added = m.value.text ? wane_index_add_meta(p->ix, p->name, p->name_length, &m) : WANE_E_MEMORY;
    if (added < 0) { p->status = added; return 0; }
    /* shards repeat their metadata: the first file's stays */
    if (added == 1 && p->file_number == 0) return stop(p, "is a metadata key that occurs twice");
    return 1;
  }
  if (p->where != IN_TENSOR) return stop(p, "holds a text where none belongs");
  if (p->key == KEY_OTHER) return 1;
  if (p->key != KEY_DTYPE) return stop(p, "holds a text where a list belongs");
  p->entry.dtype_name = wane_safetensors_dtype((const char *)text, length, &p->entry.dtype, &p->bits);
  if (p->entry.dtype_name) return 1;
  char what[80];
  snprintf(what, sizeof what, "has the unknown dtype '%.*s'", length < 32 ? (int)length : 32, (const char *)text);
  return stop(p, what);
}

static int on_start_map(void *context) {
  parse *p = context;
  if (p->skipping || (p->where == IN_TENSOR && p->key == KEY_OTHER)) { p->skipping++; return p->skipping < 64 ? 1 : stop(p, "is nested too deeply"); }
  if (p->where == IN_NOTHING) { p->where = IN_HEADER; return 1; }
  if (p->where != IN_HEADER) return stop(p, "holds an object where none belongs");
  if (p->name_length == 12 && !memcmp(p->name, "__metadata__", 12)) {
    if (p->metadata_seen++) return stop(p, "occurs twice");
    p->where = IN_METADATA;
    return 1;
  }
  p->where = IN_TENSOR;
  p->key = KEY_NONE;
  memset(&p->entry, 0, sizeof p->entry);
  p->have_dtype = p->have_shape = p->offsets = 0;
  return 1;
}

static int on_key(void *context, const unsigned char *key, size_t length) {
  parse *p = context;
  if (p->skipping) return 1;
  if (p->where != IN_TENSOR) {
    p->name = wane_arena_text(&p->ix->arena, (const char *)key, length);
    p->name_length = length;
    if (!p->name) { p->status = WANE_E_MEMORY; return 0; }
    return strlen(p->name) == length ? 1 : stop(p, "has a zero byte in its name");
  }
  if (length == 5 && !memcmp(key, "dtype", 5)) { p->key = KEY_DTYPE; return p->have_dtype++ ? stop(p, "has two dtypes") : 1; }
  if (length == 5 && !memcmp(key, "shape", 5)) { p->key = KEY_SHAPE; return p->have_shape++ ? stop(p, "has two shapes") : 1; }
  if (length == 12 && !memcmp(key, "data_offsets", 12)) { p->key = KEY_OFFSETS; return p->offsets ? stop(p, "has two data_offsets") : 1; }
  p->key = KEY_OTHER;
  return 1;
}

static int on_start_array(void *context) {
  parse *p = context;
  if (p->skipping || (p->where == IN_TENSOR && p->key == KEY_OTHER)) { p->skipping++; return p->skipping < 64 ? 1 : stop(p, "is nested too deeply"); }
  if (p->where != IN_TENSOR || (p->key != KEY_SHAPE && p->key != KEY_OFFSETS)) return stop(p, "holds a list where none belongs");
  p->where = p->key == KEY_SHAPE ? IN_SHAPE : IN_OFFSETS;
  return 1;
}

static int on_end_array(void *context) {
  parse *p = context;
  if (p->skipping) { p->skipping--; return 1; }
  p->where = IN_TENSOR;
  return 1;
}

/* The end of a tensor's object: all three fields, and a size that follows from dtype and shape. */
static int tensor_ends(parse *p) {
  wane_entry *e = &p->entry;
  if (!e->dtype_name) return stop(p, "has no dtype");
  if (!p->have_shape) return stop(p, "has no shape");
  if (p->offsets != 2) return stop(p, "has no data_offsets [begin, end]");
  int64_t n = wane_shape_numel(e->ndim, e->shape), bits;
  if (n < 0 || __builtin_mul_overflow(n, p->bits, &bits)) return stop(p, "has a shape whose size overflows");
  if (bits % 8) return stop(p, "does not fill whole bytes");
  if (p->end < p->begin) return stop(p, "ends before it begins");
  if ((uint64_t)(bits / 8) != p->end - p->begin) {
    char what[160];
    snprintf(what, sizeof what, "needs %lld bytes for its dtype and shape, but its data_offsets %llu..%llu hold %llu", (long long)(bits / 8),
             (unsigned long long)p->begin, (unsigned long long)p->end, (unsigned long long)(p->end - p->begin));
    return stop(p, what);
  }
  e->name = p->name;
  e->offset = p->begin;                        /* relative, until the whole header is known */
  e->bytes = p->end - p->begin;
  e->file = p->file_number;
  int added = wane_index_add(p->ix, e, p->name_length);
  if (added < 0) { p->status = added; return 0; }
  if (added == 0) return 1;
  if (p->ix->entries[wane_index_find(p->ix, p->name)].file == p->file_number) return stop(p, "occurs twice");
  p->status = wane_fail(WANE_E_FORMAT, "tensor '%s' is in '%s' and in '%s': one of the shards belongs to another model", p->name,
                        p->ix->files[p->ix->entries[wane_index_find(p->ix, p->name)].file].path, p->file->path);
  return 0;
}

static int on_end_map(void *context) {
  parse *p = context;
  if (p->skipping) { p->skipping--; return 1; }
  int ok = 1;
  if (p->where == IN_TENSOR) ok = tensor_ends(p);
  p->where = p->where == IN_HEADER ? IN_NOTHING : IN_HEADER;
  if (ok) p->name = NULL;
  return ok;
}

static const yajl_callbacks header_callbacks = {
  on_other, on_boolean, NULL, NULL, on_number, on_string, on_start_map, on_key, on_end_map, on_start_array, on_end_array
};

/* ---------------------------------------------------------------- the whole file */

static int by_offset(const void *a, const void *b) {
  const wane_entry *x = *(const wane_entry *const *)a, *y = *(const wane_entry *const *)b;
  if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
  return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;     /* an empty tensor before the one that begins at its place */
}

/* Tensors from entry `first` on lie end to end from 0 and fill the data. Makes their offsets absolute. */
static int check_places(wane_index *ix, int64_t first, const wane_file *f, uint64_t data) {
  int64_t n = ix->count - first;
  wane_entry **order = wane_alloc((size_t)(n ? n : 1) * sizeof *order, "an index");
  if (!order) return WANE_E_MEMORY;
  for (int64_t i = 0; i < n; i++) order[i] = &ix->entries[first + i];
  qsort(order, (size_t)n, sizeof *order, by_offset);
  uint64_t at = 0;
  int status = WANE_OK;
  for (int64_t i = 0; i < n && status == WANE_OK; i++) {
    wane_entry *e = order[i];
    if (e->offset != at)
      status = wane_fail(WANE_E_FORMAT, "'%s': tensor '%s' begins at data byte %llu, %s %llu: %s", f->path, e->name, (unsigned long long)e->offset,
                         e->offset > at ? "a hole after" : "inside the tensor that ends at", (unsigned long long)at,
                         "the header lies or the file was damaged");
    at += e->bytes;
    e->offset += data;
  }
  if (status == WANE_OK && at != f->size - data)
    status = wane_fail(WANE_E_FORMAT, "'%s' holds %llu bytes of data where its header promises %llu: %s", f->path, (unsigned long long)(f->size - data),
                       (unsigned long long)at, f->size - data < at ? "the download was cut short" : "something was appended to it");
  wane_release(order);
  return status;
}

int wane_safetensors_read(wane_index *ix, int file, wane_job *job) {
  wane_file *f = &ix->files[file];
  ix->format = WANE_FORMAT_SAFETENSORS;
  if (f->size < 8) return wane_fail(WANE_E_FORMAT, "'%s' has %llu bytes, too few for a safetensors file", f->path, (unsigned long long)f->size);
  unsigned char head[9] = { 0 };
  int status = wane_file_read(f, 0, head, f->size < 9 ? 8 : 9);
  if (status != WANE_OK) return status;
  uint64_t n = 0;
  for (int i = 7; i >= 0; i--) n = n << 8 | head[i];
  if (n > 100000000)
    return wane_fail(WANE_E_FORMAT, "'%s' is no safetensors file: its header would have %llu bytes (100,000,000 at most)", f->path, (unsigned long long)n);
  if (n > f->size - 8)
    return wane_fail(WANE_E_FORMAT, "'%s' is truncated: its header has %llu bytes, the file %llu", f->path, (unsigned long long)n, (unsigned long long)f->size);
  if (head[8] != '{') return wane_fail(WANE_E_FORMAT, "'%s' is no safetensors file: its header does not begin with '{'", f->path);
  parse p = { .ix = ix, .file = f, .file_number = file };
  wane_json_source source = { f, 8, n, "safetensors header", job };
  int64_t first = ix->count;
  status = wane_json_parse(&source, &header_callbacks, &p);
  if (p.status < 0) return p.status;
  return status == WANE_OK ? check_places(ix, first, f, 8 + n) : status;
}

/* ---------------------------------------------------------------- shards: *.safetensors.index.json */

typedef struct shards {
  int status, depth, in_map;
  wane_index *list;                            /* entries: tensor names; `file`: the shard's number in `names` */
  wane_file *file;
  wane_arena arena;
  wane_names by_name;                          /* shard file name -> number */
  const char **names;
  int64_t count, room;
  char *key;
  size_t key_length;
} shards;

static int shards_stop(shards *p, const char *what, const char *name) {
  p->status = wane_fail(WANE_E_FORMAT, "list of shards '%s': %s '%.200s'", p->file->path, what, name);
  return 0;
}

/* A shard is a file beside the list: its name has no '/' and is no "..". */
static int shard_string(void *context, const unsigned char *text, size_t length) {
  shards *p = context;
  if (!p->in_map || p->depth != 2) return 1;
  char *name = wane_arena_text(&p->arena, (const char *)text, length);
  if (!name) { p->status = WANE_E_MEMORY; return 0; }
  if (!length || strlen(name) != length || strchr(name, '/') || !strcmp(name, "..") || !strcmp(name, "."))
    return shards_stop(p, "shards must be files beside it, found", name);
  int64_t number = wane_names_find(&p->by_name, name, length);
  if (number < 0) {
    number = p->count;
    if (p->count == p->room) {
      int64_t room = p->room ? p->room * 2 : 16;
      const char **names = wane_regrow((void *)p->names, (size_t)p->count * sizeof *names, (size_t)room * sizeof *names, "names of shards");
      if (!names) { p->status = WANE_E_MEMORY; return 0; }
      p->names = names;
      p->room = room;
    }
    p->names[p->count] = name;
    int added = wane_names_add(&p->by_name, name, length, p->count++);
    if (added < 0) { p->status = added; return 0; }
  }
  wane_entry e = { .name = p->key, .file = (int32_t)number };
  int added = wane_index_add(p->list, &e, p->key_length);
  if (added < 0) p->status = added;
  return added == 0 ? 1 : added < 0 ? 0 : shards_stop(p, "it names twice the tensor", p->key);
}

static int shard_key(void *context, const unsigned char *key, size_t length) {
  shards *p = context;
  if (p->depth == 1) p->in_map = length == 10 && !memcmp(key, "weight_map", 10);
  else if (p->in_map && p->depth == 2) {
    p->key = wane_arena_text(&p->arena, (const char *)key, length);
    p->key_length = length;
    if (!p->key) p->status = WANE_E_MEMORY;
  }
  return p->status == 0;
}

static int shard_scalar(void *context) {
  shards *p = context;
  return p->in_map && p->depth == 2 ? shards_stop(p, "no file name stands for tensor", p->key) : 1;
}
static int shard_boolean(void *context, int value) { (void)value; return shard_scalar(context); }
static int shard_number(void *context, const char *text, size_t length) { (void)text; (void)length; return shard_scalar(context); }
static int shard_open(void *context) {
  shards *p = context;
  if (p->in_map && p->depth == 2) return shard_scalar(context);
  return ++p->depth < 64 ? 1 : shards_stop(p, "it is nested too deeply", "");
}
static int shard_close(void *context) { ((shards *)context)->depth--; return 1; }

static const yajl_callbacks shard_callbacks = {
  shard_scalar, shard_boolean, NULL, NULL, shard_number, shard_string, shard_open, shard_key, shard_close, shard_open, shard_close
};

/* Torch files are described by whoever reads their pickles: what the list says becomes the metadata. */
static int note_torch(const shards *p, wane_index *ix) {
  int status = WANE_OK;
  ix->format = WANE_FORMAT_TORCH;
  for (int64_t i = 0; i < p->list->count && status == WANE_OK; i++) {
    const wane_entry *want = &p->list->entries[i];
    wane_meta_entry m = { .value = { .kind = WANE_META_INT, .count = 1, .integer = want->file, .number = want->file } };
    status = wane_index_add_meta(ix, want->name, strlen(want->name), &m);
  }
  return status;
}

/* Opens and reads every shard, then demands each tensor of the list in the shard that the list names. */
static int read_shards(shards *p, wane_index *ix, wane_job *job, const char *path) {
  const char *slash = strrchr(path, '/');
  size_t folder = slash ? (size_t)(slash - path) + 1 : 0;
  int torch = 0;
  if (!p->count) return wane_fail(WANE_E_FORMAT, "list of shards '%s' has no weight_map", path);
  for (int64_t i = 0; i < p->count; i++) {
    size_t n = strlen(p->names[i]);
    char *full = wane_arena_alloc(&p->arena, folder + n + 1, "the path of a shard");
    if (!full) return WANE_E_MEMORY;
    memcpy(full, path, folder);
    memcpy(full + folder, p->names[i], n + 1);
    int status = wane_index_add_file(ix, full);
    if (status == WANE_OK && !i) torch = wane_is_torch(&ix->files[0]);
    if (status == WANE_OK && !torch) status = wane_safetensors_read(ix, (int)i, job);
    if (status != WANE_OK) return status;
    wane_job_set_progress(job, (uint64_t)i + 1, (uint64_t)p->count);
  }
  if (torch) return note_torch(p, ix);
  for (int64_t i = 0; i < p->list->count; i++) {
    const wane_entry *want = &p->list->entries[i];
    int64_t found = wane_index_find(ix, want->name);
    if (found < 0) return wane_fail(WANE_E_FORMAT, "tensor '%s' should be in '%s' (says '%s') but is in no shard: a file is of another model",
                                    want->name, p->names[want->file], path);
    if (ix->entries[found].file != want->file)
      return wane_fail(WANE_E_FORMAT, "tensor '%s' should be in '%s' (says '%s') but is in '%s': a file is of another model", want->name,
                       p->names[want->file], path, ix->files[ix->entries[found].file].path);
  }
  return WANE_OK;
}

/* The index already has the list as its only file; it is replaced by the shards. */
int wane_shards_read(wane_index *ix, wane_job *job, const char *path) {
  wane_file list_file = ix->files[0];
  ix->nfiles = 0;
  shards p = { .file = &list_file };
  p.list = wane_alloc_zero(sizeof *p.list, "a list of shards");
  int status = p.list ? WANE_OK : WANE_E_MEMORY;
  if (p.list) {
    p.list->refs = 1;
    wane_json_source source = { &list_file, 0, list_file.size, "list of shards", job };
    status = wane_json_parse(&source, &shard_callbacks, &p);
    if (p.status < 0) status = p.status;
    if (status == WANE_OK) status = read_shards(&p, ix, job, path);
  }
  wane_file_close(&list_file);
  wane_names_free(&p.by_name);
  wane_release((void *)p.names);
  wane_arena_free(&p.arena);
  wane_index_free(p.list);
  return status;
}
