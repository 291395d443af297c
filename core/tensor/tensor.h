/* tensor.h: tensors, storages, streams as the rest of the core sees them. Internal. */
#ifndef WANE_TENSOR_H
#define WANE_TENSOR_H
#include "../base/base.h"
#include "../include/wane_backend.h"

/* Memory of one or more tensors. Counted by the thread that owns the stream; never touched by kernels. */
typedef struct wane_storage wane_storage;
enum { WANE_STORAGE_POOL, WANE_STORAGE_HEAP, WANE_STORAGE_PAGES, WANE_STORAGE_DENSE, WANE_STORAGE_MAPPED };
struct wane_storage {
  int32_t refs;
  int32_t kind;
  void *data;
  size_t bytes;
  uint64_t ticket;                 /* of the op that wrote it last: views share it */
  int32_t always;                  /* that op ran even if its stream was stopped (an upload) */
  int32_t size_class;              /* pool */
  struct wane_mapping *mapping;    /* mapped: a counted file mapping, see core/reader */
  wane_stream *stream;
  wane_storage *next;              /* free list */
};

/* Parts of a quantized kind: see section 6 of wane.h. */
typedef struct wane_parts {
  wane_tensor *part[WANE_PARTS];   /* each retained; the nested offset is one too: it is computed on the stream */
  int32_t block_size;
} wane_parts;

struct wane_tensor {
  uint32_t gen;                    /* changes when the descriptor is recycled: stale handles are found out */
  int32_t refs;
  int32_t dtype, ndim;
  int64_t shape[WANE_MAX_DIMS], stride[WANE_MAX_DIMS];
  char *data;                      /* element 0; NULL in kinds with several parts */
  wane_storage *storage;
  wane_parts *parts;               /* quantized kinds only */
  wane_stream *stream;
  wane_scope *scope;               /* or NULL */
  wane_tensor *next, *prev;        /* in the scope's list; next also in the free list */
};

/* ---- checking arguments ---- */
/* Looks a handle up: NULL with the error set if it is stale, of another stream, or written by an op that did not run.
 * `what` names the argument in messages ("x", "weight"). */
wane_tensor *wane_use(wane_stream *s, const wane_handle *h, const char *what);
/* Ticket that must have run before t can be read. */
uint64_t wane_ticket_of(const wane_tensor *t);
/* Enters an op: reports a stop (cancel, failure, fork) once. */
int wane_enter(wane_stream *s);

/* ---- shapes ---- */
int64_t wane_numel(const wane_tensor *t);
int wane_is_contiguous(const wane_tensor *t);
int wane_is_float(int dtype);                          /* f32, f16, bf16 */
int64_t wane_size_of(int dtype);                       /* bytes of a plain dtype's element; 0 for other kinds */
/* Values from the first to the last that shape and strides reach (0 if there are none); -1 for negative sizes and overflow. */
int64_t wane_strided_span(int ndim, const int64_t *shape, const int64_t *stride);
/* "[2, 3] f32" into a per-thread ring of buffers: for messages. */
const char *wane_shape_text(const wane_tensor *t);

/* ---- making tensors ---- */
/* A new pooled tensor in the current scope; *out filled. */
wane_tensor *wane_make(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape);
/* A view of `base` (same storage); the caller sets shape, stride, data. */
wane_tensor *wane_make_view(wane_stream *s, wane_handle *out, wane_tensor *base);
/* A contiguous tensor over a storage (takes one reference over, also on failure). */
wane_tensor *wane_make_over(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape, wane_storage *storage, void *data);
/* A contiguous version of t (t itself, or a pooled copy in `tmp`, to be given to wane_tensor_free after the enqueue). */
wane_tensor *wane_contiguous(wane_stream *s, wane_tensor *t, wane_handle *tmp);
/* The same as f32 / as `dtype`, contiguous. */
wane_tensor *wane_as(wane_stream *s, wane_tensor *t, int dtype, wane_handle *tmp);
wane_storage *wane_storage_new(wane_stream *s, int kind, size_t bytes);
wane_storage *wane_storage_mapped(wane_stream *s, struct wane_mapping *mapping, void *data, size_t bytes);
void wane_storage_unref(wane_storage *st);

/* ---- enqueuing ---- */
/* The next free record, cleared, with code set and nchunks = 1. Never NULL (blocks when the ring is full). Between here and
 * wane_op_push nothing may be allocated or enqueued. */
wane_op *wane_op_new(wane_stream *s, int code);
/* Publishes it; notes the ticket in the storage of each of the (up to two) tensors it writes. Takes op->fn from the table unless set. */
void wane_op_push(wane_stream *s, wane_op *op, wane_tensor *written, wane_tensor *written2);
/* Chunks for `work` units of about `grain_work` each (>= ~20 us of work a chunk), at most 64. */
uint32_t wane_chunks(int64_t work, int64_t grain_work);
/* Workspace from the pool for ops enqueued next: freed (stream-ordered) right after they are enqueued. NULL with the error. */
void *wane_workspace(wane_stream *s, size_t bytes, wane_storage **hold);

/* A counted file mapping (private, copy-on-write) or a block of memory that a load filled (core/reader makes both). */
enum { WANE_MAPPING_FILE, WANE_MAPPING_PAGES, WANE_MAPPING_HEAP };
typedef struct wane_mapping { int32_t refs; int32_t kind; void *base; size_t bytes; } wane_mapping;
void wane_mapping_unref(wane_mapping *m);              /* munmap with the last reference; atomic */

/* ---- backends ---- */
/* The table in force for the CPU at the level in force. */
const wane_backend *wane_cpu_backend(void);
/* Each file group fills its part; called from backend.c. */
void wane_register_generic_memory(wane_backend *b);
void wane_register_generic_elementwise(wane_backend *b);
void wane_register_generic_nn(wane_backend *b);
void wane_register_generic_quant(wane_backend *b);
void wane_register_generic_linear(wane_backend *b);
void wane_register_avx2(wane_backend *b);              /* kernels_avx2: core/x86/avx2.c calls its file groups */
void wane_register_avx512(wane_backend *b);
void wane_register_avx512bf16(wane_backend *b);
void wane_register_amx(wane_backend *b);
#endif
