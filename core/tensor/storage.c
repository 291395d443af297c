/* storage.c: where tensors live: pooled blocks, pages, heap and mapped files; descriptors; scopes.
 *
 * Memory is stream-ordered: a block freed by the owner goes to its stream's free list at once, because whatever uses it next is
 * enqueued later. A free block may still be written by ops in flight, so nothing is ever stored inside it. Memory that leaves the
 * process (munmap, free) does so through a release op, which runs when everything before it has.
 *
 * Descriptors come from slabs that are never unmapped: looking at a stale handle is always safe, and its generation tells. */
#include "stream.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { PAGES_FROM = 256 << 10, SHARED_FROM = 4 << 10, CLASSES_ABOVE = 8, POOL_SLACK = 32 << 20, DESCRIPTOR_SLAB = 128 };
extern _Atomic int64_t wane_live_tensors;

/* ---------------------------------------------------------------- size classes: eight an octave, at most 12.5 % lost */

static int size_class(size_t bytes, size_t *rounded) {
  size_t n = bytes < 64 ? 64 : bytes;
  int e = 63 - __builtin_clzll(n);
  size_t unit = (size_t)1 << (e - 3);
  n = (n + unit - 1) & ~(unit - 1);
  e = 63 - __builtin_clzll(n);
  *rounded = n;
  return (e - 6) * 8 + (int)(n >> (e - 3)) - 8;
}

static void *block_alloc(size_t bytes) {
  return bytes < PAGES_FROM ? wane_alloc(bytes, "a tensor") : wane_pages_dense(bytes, "a tensor");
}
static void block_free(void *p, size_t bytes) {
  if (bytes < PAGES_FROM) wane_release(p); else wane_pages_free(p, bytes);
}

static size_t class_bytes(int c) { int e = c / 8 + 6; return (size_t)(8 + c % 8) << (e - 3); }
static void enqueue_release(wane_stream *s, int kind, void *data, wane_mapping *mapping, size_t bytes);

/* Gives one free block of class c back to the system, once what is in flight has run. */
static void pool_drop(wane_stream *s, int c) {
  freelist *f = &s->pool[c];
  f->made--;
  s->pool_bytes -= class_bytes(c);
  s->pool_free -= class_bytes(c);
  enqueue_release(s, WANE_STORAGE_POOL, f->blocks[--f->count], NULL, class_bytes(c));
}

/* A pool that is about to hold much more than was ever used at once has met tensors of many sizes (batches of many lengths): free blocks that did
 * not fit go, the small classes first. The same sizes over and over never come here. */
static void pool_settle(wane_stream *s, size_t wanted) {
  size_t used = s->pool_bytes - s->pool_free + wanted;
  if (used > s->pool_peak) s->pool_peak = used;
  size_t most = s->pool_peak + s->pool_peak / 4 + POOL_SLACK;
  for (int c = 0; c < CLASSES && s->pool_bytes + wanted > most; c++)
    while (s->pool[c].count && s->pool_bytes + wanted > most) pool_drop(s, c);
}

static void *pool_take(wane_stream *s, size_t bytes, int32_t *class_out) {
  size_t rounded;
  if (bytes > (size_t)1 << 46) { wane_fail(WANE_E_MEMORY, "out of memory: %zu bytes for a tensor", bytes); return NULL; }
  int c = size_class(bytes, &rounded), last = c + (bytes < SHARED_FROM ? 0 : CLASSES_ABOVE);
  /* A free block of up to twice the size is better than a new one: batches of many lengths would leave blocks of every class behind. */
  for (int k = c; k <= last && k < CLASSES; k++)
    if (s->pool[k].count) {
      *class_out = k;
      s->pool_free -= class_bytes(k);
      return s->pool[k].blocks[--s->pool[k].count];
    }
  pool_settle(s, rounded);
  freelist *f = &s->pool[c];
  *class_out = c;
  if (f->made == f->capacity) {
    int32_t more = f->capacity ? f->capacity * 2 : 16;
    void **blocks = wane_regrow(f->blocks, sizeof(void *) * (size_t)f->count, sizeof(void *) * (size_t)more, "a free list");
    if (!blocks) return NULL;
    f->blocks = blocks;
    f->capacity = more;
  }
  void *p = block_alloc(rounded);
  if (p) { f->made++; s->pool_bytes += rounded; }
  return p;
}

/* ---------------------------------------------------------------- storages */

static wane_storage *storage_record(wane_stream *s) {
  if (!s->storage_free) {
    if (s->nslabs == s->slabs_capacity) {
      int32_t more = s->slabs_capacity ? s->slabs_capacity * 2 : 16;
      void **slabs = wane_regrow(s->slabs, sizeof(void *) * (size_t)s->nslabs, sizeof(void *) * (size_t)more, "storage slabs");
      if (!slabs) return NULL;
      s->slabs = slabs;
      s->slabs_capacity = more;
    }
    wane_storage *slab = wane_alloc_zero(sizeof(wane_storage) * STORAGE_SLAB, "storages");
    if (!slab) return NULL;
    s->slabs[s->nslabs++] = slab;
    for (int i = 0; i < STORAGE_SLAB; i++) { slab[i].next = s->storage_free; s->storage_free = &slab[i]; }
  }
  wane_storage *st = s->storage_free;
  s->storage_free = st->next;
  memset(st, 0, sizeof *st);
  st->refs = 1;
  st->stream = s;
  return st;
}

static void storage_recycle(wane_storage *st) {
  st->next = st->stream->storage_free;
  st->stream->storage_free = st;
}

wane_storage *wane_storage_new(wane_stream *s, int kind, size_t bytes) {
  wane_storage *st = storage_record(s);
  if (!st) return NULL;
  st->kind = kind;
  st->bytes = bytes;
  if (kind == WANE_STORAGE_POOL) st->data = pool_take(s, bytes, &st->size_class);
  else if (kind == WANE_STORAGE_PAGES) st->data = wane_pages_alloc(bytes, "a tensor");
  else if (kind == WANE_STORAGE_DENSE) st->data = wane_pages_dense(bytes, "a tensor");
  else st->data = wane_alloc(bytes ? bytes : 1, "a tensor");
  if (!st->data) { storage_recycle(st); return NULL; }
  return st;
}

wane_storage *wane_storage_mapped(wane_stream *s, wane_mapping *mapping, void *data, size_t bytes) {
  wane_storage *st = storage_record(s);
  if (!st) return NULL;
  __atomic_fetch_add(&mapping->refs, 1, __ATOMIC_RELAXED);
  st->kind = WANE_STORAGE_MAPPED;
  st->data = data;
  st->bytes = bytes;
  st->mapping = mapping;
  return st;
}

void wane_storage_drop(wane_storage *st) {
  switch (st->kind) {
    case WANE_STORAGE_POOL: break;                    /* the pool owns the block */
    case WANE_STORAGE_PAGES:
    case WANE_STORAGE_DENSE: wane_pages_free(st->data, st->bytes); break;
    case WANE_STORAGE_MAPPED: wane_mapping_unref(st->mapping); break;
    default: wane_release(st->data);
  }
}

/* Kernel of WANE_OP_RELEASE. p0 data, p1 mapping, n0 bytes, i0 storage kind (POOL: a trimmed block of n0 bytes). */
static void k_release(const wane_op *op, uint32_t chunk) {
  (void)chunk;
  wane_storage st = { .kind = op->i[0], .data = op->p[0], .mapping = op->p[1], .bytes = (size_t)op->n[0] };
  if (st.kind == WANE_STORAGE_POOL) block_free(st.data, st.bytes); else wane_storage_drop(&st);
}

static void enqueue_release(wane_stream *s, int kind, void *data, wane_mapping *mapping, size_t bytes) {
  wane_op *op = wane_op_new(s, WANE_OP_RELEASE);
  op->fn = k_release;
  op->always = 1;
  op->i[0] = kind;
  op->p[0] = data;
  op->p[1] = mapping;
  op->n[0] = (int64_t)bytes;
  wane_op_push(s, op, NULL, NULL);
}

void wane_storage_unref(wane_storage *st) {
  if (!st || --st->refs > 0) return;
  wane_stream *s = st->stream;
  if (st->kind == WANE_STORAGE_POOL) {
    freelist *f = &s->pool[st->size_class];
    f->blocks[f->count++] = st->data;
    s->pool_free += class_bytes(st->size_class);
  } else if (s->closed) {                             /* an op in flight may still read it: goes with the stream */
    st->next = s->dying;
    s->dying = st;
    return;
  } else if (atomic_load(&s->retired) == s->tail_local) {
    wane_storage_drop(st);                            /* idle: nothing can be using it */
  } else {
    enqueue_release(s, st->kind, st->data, st->mapping, st->bytes);
  }
  storage_recycle(st);
}

void wane_stream_trim(wane_stream *s, size_t bytes) {
  if (s->closed) return;
  for (int c = 0; c < CLASSES; c++) {
    if (class_bytes(c) < bytes) continue;
    while (s->pool[c].count) pool_drop(s, c);
  }
}

size_t wane_stream_pool_bytes(wane_stream *s) { return s->pool_bytes; }

void wane_stream_free_memory(wane_stream *s) {
  for (wane_storage *st = s->dying; st; st = st->next) wane_storage_drop(st);
  for (int c = 0; c < CLASSES; c++) {
    freelist *f = &s->pool[c];
    while (f->count) block_free(f->blocks[--f->count], class_bytes(c));
    wane_release(f->blocks);
  }
  for (int32_t i = 0; i < s->nslabs; i++) wane_release(s->slabs[i]);
  wane_release(s->slabs);
}

void *wane_workspace(wane_stream *s, size_t bytes, wane_storage **hold) {
  *hold = wane_storage_new(s, WANE_STORAGE_POOL, bytes);
  return *hold ? (*hold)->data : NULL;
}

/* ---------------------------------------------------------------- descriptors */

static pthread_mutex_t descriptor_lock = PTHREAD_MUTEX_INITIALIZER;
static wane_tensor *descriptors;

void wane_descriptors_lock(int on) {
  if (on) pthread_mutex_lock(&descriptor_lock); else pthread_mutex_unlock(&descriptor_lock);
}

static wane_tensor *descriptor_new(wane_stream *s) {
  pthread_mutex_lock(&descriptor_lock);
  if (!descriptors) {
    wane_tensor *slab = wane_alloc_zero(sizeof(wane_tensor) * DESCRIPTOR_SLAB, "tensor descriptors");
    for (int i = 0; slab && i < DESCRIPTOR_SLAB; i++) { slab[i].gen = 1; slab[i].next = descriptors; descriptors = &slab[i]; }
  }
  wane_tensor *t = descriptors;
  if (t) descriptors = t->next;
  pthread_mutex_unlock(&descriptor_lock);
  if (!t) return NULL;
  uint32_t gen = t->gen;
  memset(t, 0, sizeof *t);
  __atomic_store_n(&t->gen, gen, __ATOMIC_RELAXED);
  t->refs = 1;
  t->stream = s;
  atomic_fetch_add(&s->refs, 1);
  atomic_fetch_add_explicit(&wane_live_tensors, 1, memory_order_relaxed);
  return t;
}

static void scope_unlink(wane_tensor *t) {
  if (!t->scope) return;
  t->prev->next = t->next;
  t->next->prev = t->prev;
  t->scope = NULL;
}

static void scope_link(wane_scope *scope, wane_tensor *t) {
  t->scope = scope;
  if (!scope) return;
  t->next = &scope->list;
  t->prev = scope->list.prev;
  t->prev->next = t;
  scope->list.prev = t;
}

/* Drops one reference of a descriptor. */
static void tensor_unref(wane_tensor *t) {
  if (--t->refs > 0) return;
  wane_stream *s = t->stream;
  scope_unlink(t);
  if (t->parts) {
    for (int i = 0; i < WANE_PARTS; i++) if (t->parts->part[i]) tensor_unref(t->parts->part[i]);
    wane_release(t->parts);
  }
  wane_storage_unref(t->storage);
  pthread_mutex_lock(&descriptor_lock);
  __atomic_store_n(&t->gen, t->gen + 1, __ATOMIC_RELAXED);
  t->next = descriptors;
  descriptors = t;
  pthread_mutex_unlock(&descriptor_lock);
  atomic_fetch_sub_explicit(&wane_live_tensors, 1, memory_order_relaxed);
  wane_stream_unref(s);
}

static wane_tensor *live(const wane_handle *h) {
  wane_tensor *t = h ? h->t : NULL;
  return t && __atomic_load_n(&t->gen, __ATOMIC_RELAXED) == h->gen ? t : NULL;
}

void wane_tensor_free(wane_handle *h) {
  wane_tensor *t = live(h);
  if (h) h->t = NULL;
  if (t) tensor_unref(t);
}

int wane_tensor_sole(const wane_handle *h) {
  const wane_tensor *t = live(h);
  return t && t->refs == 1 && t->storage && t->storage->refs == 1;
}

int wane_tensor_retain(wane_stream *s, wane_handle *out, const wane_handle *h) {
  wane_tensor *t = wane_use(s, h, "tensor");
  if (!t) return WANE_E_STALE;
  wane_tensor *v = wane_make_view(s, out, t);         /* a descriptor of its own, so that each handle has its own scope */
  return v ? WANE_OK : WANE_E_MEMORY;
}

/* flags: 1 when a scope owns the tensor, so that Lua attaches a finalizer to the others only. */
static void handle_set(wane_handle *out, wane_tensor *t) {
  out->t = t;
  out->gen = t->gen;
  out->flags = t->scope != NULL;
}

static void set_contiguous(wane_tensor *t, int dtype, int ndim, const int64_t *shape) {
  t->dtype = dtype;
  t->ndim = ndim;
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; i--) {
    t->shape[i] = shape[i];
    t->stride[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
}

wane_tensor *wane_make_over(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape, wane_storage *storage, void *data) {
  wane_tensor *t = storage ? descriptor_new(s) : NULL;
  if (!t) { wane_storage_unref(storage); return NULL; }
  set_contiguous(t, dtype, ndim, shape);
  t->storage = storage;
  t->data = data;
  scope_link(s->scope, t);
  handle_set(out, t);
  return t;
}

/* Bytes of a shape; -1 with the error set when it is impossible. */
static int64_t shape_bytes(int dtype, int ndim, const int64_t *shape) {
  int64_t n = wane_size_of(dtype);
  if (n == 0) return wane_fail(WANE_E_DTYPE, "a plain tensor cannot have dtype %s: see wane_quantize", wane_dtype_name(dtype) ? wane_dtype_name(dtype) : "?");
  if (ndim < 0 || ndim > WANE_MAX_DIMS) return wane_fail(WANE_E_SHAPE, "%d dimensions: at most %d", ndim, WANE_MAX_DIMS);
  int empty = 0;                                      /* a size of 0 does not excuse the others: strides are their products */
  for (int i = 0; i < ndim; i++) {
    if (shape[i] < 0) return wane_fail(WANE_E_SHAPE, "size %lld of dimension %d is negative", (long long)shape[i], i + 1);
    empty |= shape[i] == 0;
    if (__builtin_mul_overflow(n, shape[i] ? shape[i] : 1, &n)) return wane_fail(WANE_E_SHAPE, "the sizes overflow: too many elements");
  }
  return empty ? 0 : n;
}

static wane_tensor *make_in(wane_stream *s, wane_handle *out, int kind, int dtype, int ndim, const int64_t *shape) {
  int64_t bytes = shape_bytes(dtype, ndim, shape);
  if (bytes < 0) return NULL;
  wane_storage *st = wane_storage_new(s, kind, (size_t)bytes);
  return st ? wane_make_over(s, out, dtype, ndim, shape, st, st->data) : NULL;
}

wane_tensor *wane_make(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape) {
  return make_in(s, out, WANE_STORAGE_POOL, dtype, ndim, shape);
}

wane_tensor *wane_make_view(wane_stream *s, wane_handle *out, wane_tensor *base) {
  wane_tensor *t = descriptor_new(s);
  if (!t) return NULL;
  t->dtype = base->dtype;
  t->ndim = base->ndim;
  memcpy(t->shape, base->shape, sizeof t->shape);
  memcpy(t->stride, base->stride, sizeof t->stride);
  t->data = base->data;
  if (base->parts) {
    t->parts = wane_alloc(sizeof *t->parts, "a quantized tensor");
    if (!t->parts) { tensor_unref(t); return NULL; }
    *t->parts = *base->parts;
    for (int i = 0; i < WANE_PARTS; i++) if (t->parts->part[i]) t->parts->part[i]->refs++;
  }
  t->storage = base->storage;
  if (t->storage) t->storage->refs++;
  scope_link(s->scope, t);
  handle_set(out, t);
  return t;
}

/* WANE_OK, or the status that belongs to the message already set by the maker. */
static int made(wane_tensor *t, int dtype, int ndim, const int64_t *shape) {
  if (t) return WANE_OK;
  int64_t bytes = shape_bytes(dtype, ndim, shape);
  return bytes < 0 ? (int)bytes : WANE_E_MEMORY;
}

int wane_tensor_new(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape) {
  int status = wane_enter(s);
  return status ? status : made(wane_make(s, out, dtype, ndim, shape), dtype, ndim, shape);
}

int wane_tensor_new_paged(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape) {
  int status = wane_enter(s);
  return status ? status : made(make_in(s, out, WANE_STORAGE_PAGES, dtype, ndim, shape), dtype, ndim, shape);
}

/* ---------------------------------------------------------------- scopes */

int wane_scope_open(wane_stream *s, wane_scope **out) {
  int status = wane_enter(s);
  if (status) return status;
  wane_scope *scope = wane_alloc_zero(sizeof *scope, "a scope");
  if (!scope) return WANE_E_MEMORY;
  scope->list.next = scope->list.prev = &scope->list;
  scope->parent = s->scope;
  scope->next = s->scopes;
  if (s->scopes) s->scopes->prev = scope;
  s->scopes = s->scope = scope;
  *out = scope;
  return WANE_OK;
}

wane_scope *wane_scope_swap(wane_stream *s, wane_scope *scope) {
  wane_scope *old = s->scope;
  s->scope = scope;
  return old;
}

void wane_scope_close(wane_stream *s, wane_scope *scope) {
  if (!scope || s->closed) return;                    /* a closed stream has closed its scopes */
  while (scope->list.next != &scope->list) tensor_unref(scope->list.next);
  if (s->scope == scope) s->scope = scope->parent;
  for (wane_scope *o = s->scopes; o; o = o->next) if (o->parent == scope) o->parent = scope->parent;
  if (scope->prev) scope->prev->next = scope->next; else s->scopes = scope->next;
  if (scope->next) scope->next->prev = scope->prev;
  wane_release(scope);
}

int wane_tensor_move(wane_stream *s, const wane_handle *h, wane_scope *scope) {
  wane_tensor *t = live(h);
  if (!t || t->stream != s) return wane_fail(WANE_E_STALE, "the tensor was freed, or belongs to another stream");
  scope_unlink(t);
  scope_link(scope, t);
  return WANE_OK;
}

/* ---------------------------------------------------------------- using handles */

/* Ticket of a storage's last write; 0 once an upload is through: a stop around it does not concern it. */
static uint64_t written_at(const wane_storage *st) {
  if (!st || (st->always && atomic_load(&st->stream->retired) >= st->ticket)) return 0;
  return st->ticket;
}

uint64_t wane_ticket_of(const wane_tensor *t) {
  uint64_t ticket = written_at(t->storage);
  for (int i = 0; t->parts && i < WANE_PARTS; i++) {
    const wane_tensor *p = t->parts->part[i];
    uint64_t at = p ? written_at(p->storage) : 0;
    if (at > ticket) ticket = at;
  }
  return ticket;
}

wane_tensor *wane_use(wane_stream *s, const wane_handle *h, const char *what) {
  wane_tensor *t = live(h);
  if (!t) { wane_fail(WANE_E_STALE, "%s: %s", what, h && h->t ? "this tensor was freed (its scope ended, or close() was called)" : "no tensor given"); return NULL; }
  if (t->stream != s) { wane_fail(WANE_E_STALE, "%s belongs to another stream (another Lua state?)", what); return NULL; }
  if (s->nbad) {
    int code, why = wane_stream_bad(s, wane_ticket_of(t), &code);
    if (why) {
      wane_fail(why, "%s was never computed: %s %s", what, wane_op_name(code),
                why == WANE_E_CANCELLED ? "was cancelled" : why == WANE_E_FORKED ? "was lost in a fork" : "failed before it");
      return NULL;
    }
  }
  return t;
}

int wane_tensor_info(const wane_handle *h, wane_info *out) {
  memset(out, 0, sizeof *out);
  wane_tensor *t = live(h);
  if (!t) return wane_fail(WANE_E_STALE, "this tensor was freed (its scope ended, or close() was called)");
  out->dtype = t->dtype;
  out->ndim = t->ndim;
  memcpy(out->shape, t->shape, sizeof out->shape);
  out->numel = wane_numel(t);
  out->ticket = wane_ticket_of(t);
  if (t->parts) {
    out->block_size = t->parts->block_size;
    out->contiguous = 1;
    for (int i = 0; i < WANE_PARTS; i++) {
      const wane_tensor *p = t->parts->part[i];
      if (p) out->nbytes += wane_numel(p) * wane_size_of(p->dtype);
    }
  } else {
    memcpy(out->stride, t->stride, sizeof out->stride);
    out->contiguous = wane_is_contiguous(t);
    out->nbytes = out->numel * wane_size_of(t->dtype);
  }
  return WANE_OK;
}

/* Adds a noop for the closing op and for hosts that only want a ticket. */
static void k_none(const wane_op *op, uint32_t chunk) { (void)op; (void)chunk; }

/* Kernel of WANE_OP_UPLOAD: p0 destination, p1 staging copy (released here), n0 bytes. */
static void k_upload(const wane_op *op, uint32_t chunk) {
  (void)chunk;
  memcpy(op->p[0], op->p[1], (size_t)op->n[0]);
  wane_release(op->p[1]);
}

void wane_register_generic_memory(wane_backend *b) {
  b->ops[WANE_OP_NONE] = k_none;
  b->ops[WANE_OP_RELEASE] = k_release;
  b->ops[WANE_OP_UPLOAD] = k_upload;
}
