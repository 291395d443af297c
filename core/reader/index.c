/* index.c: the table of contents of a checkpoint: its store (arena, hash, entries, metadata), the job that fills it, and what
 * callers ask of it. The formats themselves are read by safetensors.c and gguf.c. */
#include "reader.h"
#include <stdatomic.h>
#include <string.h>

/* ---------------------------------------------------------------- arena */

typedef struct wane_arena_part {
  struct wane_arena_part *next;
  size_t used, room;
  char bytes[];
} part;
enum { PART = 64 << 10 };

void *wane_arena_alloc(wane_arena *a, size_t bytes, const char *what) {
  size_t whole = (bytes + 7) & ~(size_t)7;
  if (whole < bytes || whole > SIZE_MAX / 2) { wane_fail(WANE_E_MEMORY, "out of memory: %zu bytes for %s", bytes, what); return NULL; }
  part *p = a->part;
  if (!p || p->room - p->used < whole) {
    size_t room = whole > PART / 4 ? whole : PART;
    part *fresh = wane_alloc(sizeof *fresh + room, what);
    if (!fresh) return NULL;
    fresh->used = 0;
    fresh->room = room;
    if (p && room != PART) { fresh->next = p->next; p->next = fresh; }   /* a large one goes behind the part in use */
    else { fresh->next = p; a->part = fresh; }
    p = fresh;
  }
  void *at = p->bytes + p->used;
  p->used += whole;
  return at;
}

char *wane_arena_text(wane_arena *a, const char *text, size_t length) {
  char *copy = wane_arena_alloc(a, length + 1, "names of a checkpoint");
  if (!copy) return NULL;
  if (length) memcpy(copy, text, length);
  copy[length] = 0;
  return copy;
}

void wane_arena_free(wane_arena *a) {
  for (part *p = a->part, *next; p; p = next) { next = p->next; wane_release(p); }
  a->part = NULL;
}

/* ---------------------------------------------------------------- names */

typedef struct wane_names_slot { const char *name; uint64_t length; uint64_t hash; int64_t value; } slot;

/* FNV-1a with a final mix; names come from files, but a file that collides on purpose only slows its own opening. */
static uint64_t hash_of(const char *name, size_t length) {
  uint64_t h = 1469598103934665603u;
  for (size_t i = 0; i < length; i++) h = (h ^ (unsigned char)name[i]) * 1099511628211u;
  return h ^ h >> 32;
}

/* The slot that holds the name, or the free one where it belongs. */
static slot *place(const wane_names *n, const char *name, size_t length, uint64_t hash) {
  for (uint64_t i = hash & (n->room - 1);; i = (i + 1) & (n->room - 1)) {
    slot *s = &n->slot[i];
    if (!s->name || (s->hash == hash && s->length == length && !memcmp(s->name, name, length))) return s;
  }
}

static int names_grow(wane_names *n) {
  wane_names bigger = { NULL, n->room ? n->room * 2 : 64, n->used };
  bigger.slot = wane_alloc_zero(bigger.room * sizeof(slot), "names of a checkpoint");
  if (!bigger.slot) return WANE_E_MEMORY;
  for (uint64_t i = 0; i < n->room; i++)
    if (n->slot[i].name) *place(&bigger, n->slot[i].name, n->slot[i].length, n->slot[i].hash) = n->slot[i];
  wane_release(n->slot);
  *n = bigger;
  return WANE_OK;
}

int wane_names_add(wane_names *n, const char *name, size_t length, int64_t value) {
  if (n->used * 2 >= n->room && names_grow(n) != WANE_OK) return WANE_E_MEMORY;
  uint64_t hash = hash_of(name, length);
  slot *s = place(n, name, length, hash);
  if (s->name) return 1;
  *s = (slot){ name, length, hash, value };
  n->used++;
  return 0;
}

int64_t wane_names_find(const wane_names *n, const char *name, size_t length) {
  if (!n->room) return -1;
  slot *s = place(n, name, length, hash_of(name, length));
  return s->name ? s->value : -1;
}

void wane_names_free(wane_names *n) {
  wane_release(n->slot);
  memset(n, 0, sizeof *n);
}

/* ---------------------------------------------------------------- filling an index */

int64_t wane_shape_numel(int ndim, const int64_t *shape) {
  int64_t n = 1;
  for (int i = 0; i < ndim; i++)
    if (shape[i] < 0 || __builtin_mul_overflow(n, shape[i], &n)) return -1;
  return n;
}

wane_index *wane_index_ref(wane_index *ix) {
  atomic_fetch_add((_Atomic int32_t *)&ix->refs, 1);
  return ix;
}

void wane_index_free(wane_index *ix) {
  if (!ix || atomic_fetch_sub((_Atomic int32_t *)&ix->refs, 1) != 1) return;
  for (int i = 0; i < ix->nfiles; i++) wane_file_close(&ix->files[i]);
  wane_release(ix->files);
  wane_release(ix->entries);
  wane_release(ix->metas);
  wane_names_free(&ix->by_name);
  wane_names_free(&ix->by_key);
  wane_arena_free(&ix->arena);
  wane_release(ix);
}

int wane_index_add_file(wane_index *ix, const char *path) {
  if ((ix->nfiles & (ix->nfiles - 1)) == 0) {
    size_t room = ix->nfiles ? (size_t)ix->nfiles * 2 : 1;
    wane_file *files = wane_regrow(ix->files, (size_t)ix->nfiles * sizeof *files, room * sizeof *files, "files of a checkpoint");
    if (!files) return WANE_E_MEMORY;
    ix->files = files;
  }
  int status = wane_file_open(&ix->files[ix->nfiles], path);
  if (status == WANE_OK) ix->nfiles++;
  return status;
}

/* Makes room for one more item of `size` bytes in a growing array; NULL on failure. */
static void *grow(void *items, int64_t count, int64_t *room, size_t size) {
  if (count < *room) return items;
  int64_t more = *room ? *room * 2 : 64;
  void *bigger = wane_regrow(items, (size_t)count * size, (size_t)more * size, "an index");
  if (bigger) *room = more;
  return bigger;
}

int wane_index_add(wane_index *ix, const wane_entry *e, size_t name_length) {
  wane_entry *entries = grow(ix->entries, ix->count, &ix->room, sizeof *entries);
  if (!entries) return WANE_E_MEMORY;
  ix->entries = entries;
  wane_entry *to = &entries[ix->count];
  *to = *e;
  to->name = wane_arena_text(&ix->arena, e->name, name_length);
  if (!to->name) return WANE_E_MEMORY;
  int added = wane_names_add(&ix->by_name, to->name, name_length, ix->count);
  if (added == 0) ix->count++;
  return added;
}

int wane_index_add_meta(wane_index *ix, const char *key, size_t key_length, const wane_meta_entry *m) {
  wane_meta_entry *metas = grow(ix->metas, ix->nmetas, &ix->metas_room, sizeof *metas);
  if (!metas) return WANE_E_MEMORY;
  ix->metas = metas;
  wane_meta_entry *to = &metas[ix->nmetas];
  *to = *m;
  to->key = wane_arena_text(&ix->arena, key, key_length);
  if (!to->key) return WANE_E_MEMORY;
  int added = wane_names_add(&ix->by_key, to->key, key_length, ix->nmetas);
  if (added == 0) ix->nmetas++;
  return added;
}

/* ---------------------------------------------------------------- the job */

typedef struct opening { char *path; wane_index *index; } opening;

static int ends_in(const char *path, const char *suffix) {
  size_t n = strlen(path), m = strlen(suffix);
  return n > m && !strcmp(path + n - m, suffix);
}

/* A zip's first four bytes would be a safetensors header length too; its byte 8, a compression method, is no '{'. The older format
 * begins with the pickled number 0x1950a86a20f9469cfc6c: read as a header length, far too large. */
int wane_is_torch(const wane_file *f) {
  char head[9] = { 0 };
  if (wane_file_read(f, 0, head, f->size < 9 ? (size_t)f->size : 9) != WANE_OK) return 0;
  if ((!memcmp(head, "PK\3\4", 4) || !memcmp(head, "PK\5\6", 4)) && head[8] != '{') return 1;
  if (!memcmp(head, "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46", 8)) return 1;
  return ends_in(f->path, ".bin") || ends_in(f->path, ".pt") || ends_in(f->path, ".pth");
}

/* Tells the kind of the file from its first bytes: "GGUF"; '{' (a list of shards; in a safetensors file the upper half of the header
 * length, bytes 4 to 7, is 0); a torch file's; else a safetensors header length. */
static int open_run(wane_job *job, void *state) {
  opening *o = state;
  wane_index *ix = o->index;
  char head[8] = { 0 };
  int status = wane_index_add_file(ix, o->path);
  if (status == WANE_OK) status = wane_file_read(&ix->files[0], 0, head, ix->files[0].size < 8 ? (size_t)ix->files[0].size : 8);
  if (status != WANE_OK) return status;
  if (!memcmp(head, "GGUF", 4)) return wane_gguf_read(ix, job);
  if (ends_in(o->path, ".gguf"))
    return wane_fail(WANE_E_FORMAT, "'%s' is no GGUF file: it does not begin with \"GGUF\"", o->path);
  if ((head[0] == '{' && memcmp(head + 4, "\0\0\0", 4)) || ends_in(o->path, ".json")) return wane_shards_read(ix, job, o->path);
  if (wane_is_torch(&ix->files[0])) { ix->format = WANE_FORMAT_TORCH; return WANE_OK; }
  return wane_safetensors_read(ix, 0, job);
}

static void open_drop(void *state) {
  opening *o = state;
  wane_index_free(o->index);
  wane_release(o->path);
  wane_release(o);
}

static const wane_job_vtable open_vtable = { open_run, open_drop };

int wane_index_open(wane_job **out, const char *path) {
  *out = NULL;
  if (!path || !*path) return wane_fail(WANE_E_ARG, "the path of a checkpoint is empty");
  opening *o = wane_alloc_zero(sizeof *o, "an index");
  if (!o) return WANE_E_MEMORY;
  o->path = wane_copy_string(path);
  o->index = wane_alloc_zero(sizeof *o->index, "an index");
  if (!o->path || !o->index) { wane_release(o->index); wane_release(o->path); wane_release(o); return WANE_E_MEMORY; }
  o->index->refs = 1;
  return wane_job_start(out, &open_vtable, o);
}

int wane_index_take(wane_job *job, wane_index **out) {
  *out = NULL;
  int status = wane_job_poll(job);
  if (status != WANE_OK) return status;
  opening *o = wane_job_state(job);
  if (!o->index) return wane_fail(WANE_E_ARG, "this job's index was taken before");
  *out = o->index;
  o->index = NULL;
  return WANE_OK;
}

/* ---------------------------------------------------------------- asking */

int wane_index_format(const wane_index *ix) { return ix->format; }
int64_t wane_index_count(const wane_index *ix) { return ix->count; }
int64_t wane_index_find(const wane_index *ix, const char *name) { return name ? wane_names_find(&ix->by_name, name, strlen(name)) : -1; }
int wane_index_files(const wane_index *ix) { return ix->nfiles; }
const char *wane_index_path(const wane_index *ix, int file) { return file >= 0 && file < ix->nfiles ? ix->files[file].path : NULL; }

const wane_entry *wane_index_at(const wane_index *ix, int64_t i) {
  if (i >= 0 && i < ix->count) return &ix->entries[i];
  wane_fail(WANE_E_ARG, "entry %lld of an index of %lld tensors", (long long)i, (long long)ix->count);
  return NULL;
}

int wane_index_entry(const wane_index *ix, int64_t i, wane_entry *out) {
  const wane_entry *e = wane_index_at(ix, i);
  if (!e) return WANE_E_ARG;
  *out = *e;
  return WANE_OK;
}

int wane_index_read(const wane_index *ix, int64_t i, uint64_t from, void *data, size_t bytes) {
  const wane_entry *e = wane_index_at(ix, i);
  if (!e) return WANE_E_ARG;
  if (from > e->bytes || bytes > e->bytes - from)
    return wane_fail(WANE_E_ARG, "bytes %llu..%llu of tensor '%s', which has %llu", (unsigned long long)from, (unsigned long long)(from + bytes),
                     e->name, (unsigned long long)e->bytes);
  return wane_file_read(&ix->files[e->file], e->offset + from, data, bytes);
}

uint64_t wane_index_file_size(const wane_index *ix, int file) { return file >= 0 && file < ix->nfiles ? ix->files[file].size : 0; }

int wane_index_file_read(const wane_index *ix, int file, uint64_t offset, void *data, size_t bytes) {
  if (file < 0 || file >= ix->nfiles) return wane_fail(WANE_E_ARG, "file %d of an index of %d", file, ix->nfiles);
  const wane_file *f = &ix->files[file];
  if (offset > f->size || bytes > f->size - offset)
    return wane_fail(WANE_E_FORMAT, "'%s': bytes %llu..%llu lie past its end (%llu bytes): it is truncated or damaged", f->path,
                     (unsigned long long)offset, (unsigned long long)(offset + bytes), (unsigned long long)f->size);
  return wane_file_read(f, offset, data, bytes);
}

/* ---------------------------------------------------------------- describing */

static int describe_fail(const wane_index *ix, const wane_entry *e, const char *what) {
  return wane_fail(WANE_E_FORMAT, "'%s': tensor '%.200s' %s", ix->files[e->file].path, e->name, what);
}

/* Bytes that an entry's shape and strides reach; -1 on overflow. */
static int64_t bytes_wanted(const wane_entry *e, int bits) {
  int64_t n = e->strided ? wane_strided_span(e->ndim, e->shape, e->stride) : wane_shape_numel(e->ndim, e->shape), total;
  return n < 0 || __builtin_mul_overflow(n, bits / 8, &total) ? -1 : total;
}

int wane_index_describe(wane_index *ix, const wane_entry *entry) {
  wane_entry e = *entry;
  if (ix->format != WANE_FORMAT_TORCH) return wane_fail(WANE_E_ARG, "this index has read its own file: entries are added to torch files only");
  if (!e.name || !*e.name || !e.dtype_name) return wane_fail(WANE_E_ARG, "an entry needs a name and a dtype");
  if (e.file < 0 || e.file >= ix->nfiles) return wane_fail(WANE_E_ARG, "file %d of an index of %d", e.file, ix->nfiles);
  if (e.ndim < 0 || e.ndim > WANE_MAX_DIMS) return describe_fail(ix, &e, "has more than 8 dimensions");
  int bits = 0;
  size_t length = strlen(e.dtype_name);
  const char *known = wane_safetensors_dtype(e.dtype_name, length, &e.dtype, &bits);
  e.dtype_name = known ? known : wane_arena_text(&ix->arena, e.dtype_name, length);
  if (!e.dtype_name) return WANE_E_MEMORY;
  if (!known) e.dtype = -1;
  if (bytes_wanted(&e, 8) < 0) return describe_fail(ix, &e, "has sizes or strides that are negative or overflow");
  if (known && bytes_wanted(&e, bits) != (int64_t)e.bytes) return describe_fail(ix, &e, "does not have the bytes that its dtype and shape need");
  const wane_file *f = &ix->files[e.file];
  if (e.offset > f->size || e.bytes > f->size - e.offset) return describe_fail(ix, &e, "lies past the end of the file: it is truncated or damaged");
  int added = wane_index_add(ix, &e, strlen(e.name));
  return added == 1 ? describe_fail(ix, &e, "occurs twice") : added;
}

/* ---------------------------------------------------------------- metadata */

int64_t wane_index_meta_count(const wane_index *ix) { return ix->nmetas; }
const char *wane_index_meta_key(const wane_index *ix, int64_t i) { return i >= 0 && i < ix->nmetas ? ix->metas[i].key : NULL; }

static const wane_meta_entry *meta_find(const wane_index *ix, const char *key) {
  int64_t i = key ? wane_names_find(&ix->by_key, key, strlen(key)) : -1;
  if (i >= 0) return &ix->metas[i];
  wane_fail(WANE_E_NOTFOUND, "'%s' has no metadata key '%s'", ix->files[0].path, key ? key : "(nil)");
  return NULL;
}

int wane_index_meta(const wane_index *ix, const char *key, wane_meta *out) {
  const wane_meta_entry *m = meta_find(ix, key);
  if (!m) return WANE_E_NOTFOUND;
  *out = m->value;
  return WANE_OK;
}

int wane_index_meta_item(const wane_index *ix, const char *key, int64_t i, wane_meta *out) {
  const wane_meta_entry *m = meta_find(ix, key);
  if (!m) return WANE_E_NOTFOUND;
  if (m->value.kind != WANE_META_ARRAY) return wane_fail(WANE_E_ARG, "metadata key '%s' is no array", key);
  if (i < 0 || i >= m->value.count) return wane_fail(WANE_E_ARG, "item %lld of '%s', which has %lld", (long long)i, key, (long long)m->value.count);
  return wane_gguf_item(m, i, out);
}
