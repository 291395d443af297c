/* reader.h: files, indexes and loads as the reader's own files see them. Internal. */
#ifndef WANE_READER_H
#define WANE_READER_H
#include "../base/base.h"
#include "../quant/quant.h"
#include "../tensor/tensor.h"

/* ---- files ---- */

/* One open file of an index. The descriptor stays open from the header's reading to the last load, so that a file replaced
 * meanwhile cannot be read by halves. */
typedef struct wane_file {
  char *path;
  int fd;
  uint64_t size;
  wane_mapping *mapping;     /* made on first use; one reference is the index's */
} wane_file;

/* Opens a regular file for reading; refuses directories, empty files and git-lfs pointers by name. */
int wane_file_open(wane_file *f, const char *path);
void wane_file_close(wane_file *f);
/* Reads exactly `bytes` bytes at `offset`, looping over short reads. */
int wane_file_read(const wane_file *f, uint64_t offset, void *data, size_t bytes);
/* Maps the whole file into f->mapping (once), after checking that it still has its size. */
int wane_file_map(wane_file *f);
/* A counted block of memory that is no file: pages when large, heap when small. One reference. */
/* Shared memory over a nameless file in `dir`, zeros, all of it allocated on the disk. NULL with the error set. */
wane_mapping *wane_mapping_scratch(const char *dir, size_t bytes);
wane_mapping *wane_mapping_block(size_t bytes, const char *what);
/* One more reference; any thread. */
wane_mapping *wane_mapping_ref(wane_mapping *m);

/* ---- an arena: many small things freed at once ---- */
typedef struct wane_arena { struct wane_arena_part *part; } wane_arena;
/* 8-byte aligned; NULL with the error set. */
void *wane_arena_alloc(wane_arena *a, size_t bytes, const char *what);
/* A NUL-terminated copy. */
char *wane_arena_text(wane_arena *a, const char *text, size_t length);
void wane_arena_free(wane_arena *a);

/* ---- a hash from names to numbers; names are owned by others ---- */
typedef struct wane_names { struct wane_names_slot *slot; uint64_t room, used; } wane_names;
/* 0 added, 1 the name was there already, or a negative status. */
int wane_names_add(wane_names *n, const char *name, size_t length, int64_t value);
/* -1 if absent. */
int64_t wane_names_find(const wane_names *n, const char *name, size_t length);
void wane_names_free(wane_names *n);

/* ---- metadata ---- */
typedef struct wane_meta_entry {
  const char *key;
  wane_meta value;
  /* arrays: items as they lie (strings: pointers to u64 length, bytes, NUL), `item_type` as GGUF numbers it */
  int32_t item_type;
  const void *items;
} wane_meta_entry;

/* ---- the index ---- */
struct wane_index {
  int32_t refs;              /* atomic: the caller's, and one a load */
  int32_t format;
  wane_file *files;
  int32_t nfiles;
  wane_entry *entries;
  int64_t count, room;
  wane_names by_name;
  wane_meta_entry *metas;
  int64_t nmetas, metas_room;
  wane_names by_key;
  wane_arena arena;
};
wane_index *wane_index_ref(wane_index *ix);
/* Opens a file as the index's last one. */
int wane_index_add_file(wane_index *ix, const char *path);
/* Appends an entry; its name is copied. 0, 1 if the name is taken, or a negative status. */
int wane_index_add(wane_index *ix, const wane_entry *e, size_t name_length);
/* Appends a metadata pair; the key is copied. 0, 1 if the key is taken, or a negative status. */
int wane_index_add_meta(wane_index *ix, const char *key, size_t key_length, const wane_meta_entry *m);
/* NULL with the error set if there is no such entry. */
const wane_entry *wane_index_at(const wane_index *ix, int64_t i);

/* The readers: fill an index from file number `file`, already open. `job` is asked for cancellation and told the progress. */
int wane_safetensors_read(wane_index *ix, int file, wane_job *job);
int wane_shards_read(wane_index *ix, wane_job *job, const char *path);
/* GGUF: file 0, and the further parts that it names. */
int wane_gguf_read(wane_index *ix, wane_job *job);
/* Is it a file of torch.save: a zip archive, or the older stream of pickles (whatever its name), or one called .bin or .pt? */
int wane_is_torch(const wane_file *f);
/* dtype and bits a value of a safetensors dtype name: its own spelling of the name, or NULL if the format has no such dtype. */
const char *wane_safetensors_dtype(const char *name, size_t length, int *dtype, int *bits);
/* Item i of an array of metadata; i has been checked. */
int wane_gguf_item(const wane_meta_entry *m, int64_t i, wane_meta *out);

/* f64, i16: kinds that only files hold */
static inline int wane_is_stored(int dtype) { return dtype == WANE_F64 || dtype == WANE_I16; }
/* product of shape, -1 on overflow or a negative size */
int64_t wane_shape_numel(int ndim, const int64_t *shape);

/* ---- tensors over a mapping ---- */

/* Where the parts of a tensor of any dtype lie in one block of memory, each aligned to 64. A plain tensor is all codes. */
typedef struct wane_layout {
  int32_t dtype, ndim, block_size, nested;
  int64_t shape[WANE_MAX_DIMS];
  int64_t n, rows, cols, scales;
  size_t at[WANE_PARTS], part_bytes[WANE_PARTS], bytes;
} wane_layout;
/* WANE_E_SHAPE on overflow. The dtype must exist. */
int wane_layout_of(wane_layout *l, int dtype, int ndim, const int64_t *shape, int block_size, int nested);
/* The layout of one of `pieces` equal pieces of an entry, read as dtype and shape: a plain dtype or a GGUF kind that fills it exactly. */
int wane_layout_check(wane_layout *l, const wane_index *ix, const wane_entry *e, int piece, int pieces, int dtype, int ndim, const int64_t *shape);
/* The tensor itself; `base` lies in the mapping, which gets references of its own. */
int wane_tensor_over(wane_stream *s, wane_handle *out, wane_mapping *m, char *base, const wane_layout *l);

/* ---- JSON through yajl, with an allocator that may fail ---- */
typedef struct wane_json_source {
  const wane_file *file;
  uint64_t offset, bytes;
  const char *what;          /* "safetensors header": for messages */
  wane_job *job;             /* asked for cancellation; may be NULL */
} wane_json_source;
/* Runs the parser over a part of a file. `callbacks` is a yajl_callbacks; a callback that returns 0 has set the error with wane_fail.
 * WANE_E_FORMAT with the place for bad JSON or bad UTF-8. */
int wane_json_parse(const wane_json_source *source, const void *callbacks, void *context);
#endif
