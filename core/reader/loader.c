/* loader.c: reads the tensors of a checkpoint and converts them on the way.
 *
 * A job's thread runs a libuv loop of its own. Chunks are read by libuv's pool (which has four threads by default and is the
 * process's: one is left to the host), either straight into their result or
 * into one of a few reusable buffers, from which the compute workers convert them (through a stream of the loader's own) while the
 * next chunks are read. Memory: the results, the buffers, and for double quantization the scales of the tensors in work.
 *
 *   slot:  free -> reading (uv_fs_read, as often as it takes) -> converting (an op of the stream) -> free
 *   item:  waiting -> chunks issued one after another -> all converted (and nested) -> done
 *
 * Whatever ends the job early, reads in flight are waited for (they cannot be stopped), ops in flight are cancelled, and the job's
 * state frees every block that was not taken. */
#include "convert.h"
#include <stdatomic.h>
#include <fcntl.h>
#include <string.h>
#include <uv.h>

enum { SLOTS = 8, READS = 3, CHUNK = 2 << 20, BUFFERS = 16 << 20, OP_VALUES = 32 << 10 };

typedef struct item {
  wane_index *ix;
  const char *name;
  const wane_file *file;
  uint64_t offset, bytes;
  wane_conversion c;
  wane_mapping *block;                         /* the result; the job's until it is taken */
  float *scales;                               /* nested only */
  int64_t left;                                /* values not yet converted (or not yet handed to the workers) */
  uint64_t ticket;                             /* of the last op of this item */
  int taken;
} item;

enum { FREE, READING, READY, CONVERTING };
typedef struct slot {
  uv_fs_t request;
  struct wane_load *load;
  item *it;
  char *buffer, *to;                           /* `to`: where this chunk's bytes go */
  int64_t first, count;                        /* values */
  uint64_t at, end;                            /* bytes of the entry: next to read, end of the chunk */
  uint64_t begin;
  uint64_t ticket;
  int state;
  uv_work_t gather;                            /* TRANSPOSE: a read in many pieces */
  int status;
  char message[256];
} slot;

struct wane_load {
  item *items;
  int64_t count, room;
  _Atomic int64_t finished;
  uint64_t total, done;
  /* the job's thread */
  wane_job *job;
  wane_stream *stream;
  uv_loop_t loop;
  slot slots[SLOTS];
  int slots_used, reading;
  size_t buffer_bytes;                         /* of each slot */
  int64_t next;                                /* item whose chunks are being issued */
  int64_t next_value;
  int64_t oldest;                              /* first item that is not done */
  int status;
};

/* ---------------------------------------------------------------- the list */

int wane_load_new(wane_load **out) {
  *out = wane_alloc_zero(sizeof **out, "a load");
  return *out ? WANE_OK : WANE_E_MEMORY;
}

void wane_load_free(wane_load *l) {
  if (!l) return;
  for (int64_t i = 0; i < l->count; i++) {
    item *it = &l->items[i];
    wane_mapping_unref(it->block);
    wane_release(it->scales);
    wane_index_free(it->ix);
  }
  wane_release(l->items);
  wane_release(l);
}

static int check_target(const wane_load_item *spec, const wane_entry *e, const char *path) {
  int t = spec->target;
  int four_bit = t == WANE_NF4 || t == WANE_FP4;
  if (!wane_dtype_name(t)) return wane_fail(WANE_E_DTYPE, "tensor '%s' of '%s': there is no dtype number %d", e->name, path, t);
  if (four_bit && (spec->block_size < 32 || spec->block_size > 4096 || (spec->block_size & (spec->block_size - 1))))
    return wane_fail(WANE_E_ARG, "tensor '%s': block size %d; 4-bit kinds take 32, 64, 128, ... 4096", e->name, spec->block_size);
  if ((t == WANE_BLOCK8 || t == WANE_BLOCK8U) && spec->block_size < 1)
    return wane_fail(WANE_E_ARG, "tensor '%s': block size %d; a positive number was expected", e->name, spec->block_size);
  if (spec->nested && !four_bit) return wane_fail(WANE_E_ARG, "tensor '%s': double quantization is for nf4 and fp4, not %s", e->name, wane_dtype_name(t));
  return WANE_OK;
}

int wane_load_add(wane_load *l, wane_index *ix, const wane_load_item *spec) {
  const wane_entry *e = wane_index_at(ix, spec->entry);
  if (!e) return WANE_E_ARG;
  wane_layout from;
  int pieces = spec->pieces ? spec->pieces : 1;
  int status = wane_layout_check(&from, ix, e, spec->piece, pieces, spec->source, spec->ndim, spec->shape);
  if (status == WANE_OK) status = check_target(spec, e, ix->files[e->file].path);
  if (status != WANE_OK) return status;
  item it = { .name = e->name, .file = &ix->files[e->file], .bytes = e->bytes / (uint64_t)pieces, .left = from.n };
  it.offset = e->offset + (uint64_t)spec->piece * it.bytes;
  it.c.source = spec->source;
  it.c.arrange = spec->arrange;
  it.c.heads = spec->heads;
  it.c.kv_heads = spec->kv_heads ? spec->kv_heads : spec->heads;
  int has_blocks = spec->target >= WANE_NF4 && spec->target <= WANE_BLOCK8U && spec->target != WANE_INT8;
  status = wane_layout_of(&it.c.to, spec->target, spec->ndim, spec->shape, has_blocks ? spec->block_size : 0, spec->nested != 0);
  if (status == WANE_OK) status = wane_conversion_plan(&it.c, e->name);
  if (status != WANE_OK) return status;
  if (l->count == l->room) {
    int64_t room = l->room ? l->room * 2 : 32;
    item *items = wane_regrow(l->items, (size_t)l->count * sizeof *items, (size_t)room * sizeof *items, "a load");
    if (!items) return WANE_E_MEMORY;
    l->items = items;
    l->room = room;
  }
  it.ix = wane_index_ref(ix);
  l->items[l->count++] = it;
  l->total += it.bytes;
  return WANE_OK;
}

/* ---------------------------------------------------------------- chunks */

static int64_t bytes_of(const item *it, int64_t values) { return it->c.to.n ? (int64_t)((__int128)values * (int64_t)it->bytes / it->c.to.n) : 0; }

/* Makes the result's block when the first chunk of an item is issued. */
static int begin_item(item *it) {
  const wane_layout *to = &it->c.to;
  it->block = wane_mapping_block(to->bytes, it->name);
  if (!it->block) return WANE_E_MEMORY;
  /* A tile's pieces lie all over the entry: let the system read it once, in order, ahead of them. */
  if (it->c.arrange == WANE_ARRANGE_TRANSPOSE) posix_fadvise(it->file->fd, (off_t)it->offset, (off_t)it->bytes, POSIX_FADV_WILLNEED);
  it->c.base = it->block->base;
  it->c.scales = (float *)(void *)(it->c.base + to->at[WANE_PART_ABSMAX]);
  if (to->part_bytes[WANE_PART_CODE]) memcpy(it->c.base + to->at[WANE_PART_CODE], wane_dynamic_map(to->dtype == WANE_BLOCK8), 256 * 4);
  if (!to->nested) return WANE_OK;
  it->scales = it->c.scales = wane_alloc((size_t)(to->scales ? to->scales : 1) * 4, "scales");
  return it->scales ? WANE_OK : WANE_E_MEMORY;
}

static void end_item(wane_load *l, item *it) {
  wane_release(it->scales);
  it->scales = NULL;
  atomic_fetch_add(&l->finished, 1);
}

static void read_on(slot *s);

/* Called on the job's thread when a read has ended. */
static void on_read(uv_fs_t *request) {
  slot *s = request->data;
  wane_load *l = s->load;
  int64_t n = (int64_t)request->result;
  uv_fs_req_cleanup(request);
  l->reading--;
  if (n > 0) {
    s->at += (uint64_t)n;
    l->done += (uint64_t)n;
    wane_job_set_progress(l->job, l->done, l->total);
    if (s->at < s->end && l->status == WANE_OK && !wane_job_cancelled(l->job)) read_on(s);
    else s->state = READY;
    return;
  }
  s->state = READY;
  if (l->status != WANE_OK) return;
  const char *path = s->it->file->path;
  if (n == 0)
    l->status = wane_fail(WANE_E_IO, "'%s' ended inside tensor '%s', %llu bytes early: it was truncated after it was opened", path, s->it->name,
                          (unsigned long long)(s->end - s->at));
  else l->status = wane_fail(WANE_E_IO, "cannot read tensor '%s' of '%s': %s", s->it->name, path, uv_strerror((int)n));
}

/* Issues the next read of a chunk: up to its end or to where its bytes lie elsewhere. */
static void read_on(slot *s) {
  uint64_t run, from = wane_conversion_place(&s->it->c, s->at, &run);
  if (run > s->end - s->at) run = s->end - s->at;
  if (run > 1u << 30) run = 1u << 30;                 /* short reads go on from where they ended */
  uv_buf_t buffer = uv_buf_init(s->to + (s->at - s->begin), (unsigned)run);
  s->request.data = s;
  int e = uv_fs_read(&s->load->loop, &s->request, s->it->file->fd, &buffer, 1, (int64_t)(s->it->offset + from), on_read);
  if (e == 0) { s->load->reading++; s->state = READING; return; }
  uv_fs_req_cleanup(&s->request);
  s->state = READY;
  if (s->load->status == WANE_OK) s->load->status = wane_fail(WANE_E_IO, "cannot read '%s': %s", s->it->file->path, uv_strerror(e));
}

/* On a thread of libuv's pool: a chunk's tile [cols, rows of the chunk] out of the entry [cols, rows]. Thousands of short pieces, so
 * they are read in one go here rather than as an event each. */
static void gather_tile(uv_work_t *work) {
  slot *s = work->data;
  const item *it = s->it;
  uint64_t size = (uint64_t)wane_size_of(it->c.source), cols = (uint64_t)it->c.to.cols, width = (uint64_t)s->count / cols * size;
  uint64_t row = (uint64_t)it->c.to.rows * size, from = it->offset + (uint64_t)s->first / cols * size;
  for (uint64_t k = 0; k < cols && s->status == WANE_OK; k++) {
    if (wane_job_cancelled(s->load->job)) return;
    s->status = wane_file_read(it->file, from + k * row, s->to + k * width, (size_t)width);
  }
  if (s->status != WANE_OK) wane_error_save(s->message, sizeof s->message);
}

/* On the job's thread, when a tile is there. */
static void on_gathered(uv_work_t *work, int e) {
  slot *s = work->data;
  wane_load *l = s->load;
  l->reading--;
  s->state = READY;
  if (s->status == WANE_OK && e == 0) {
    l->done += s->end - s->begin;
    wane_job_set_progress(l->job, l->done, l->total);
  } else if (l->status == WANE_OK) {
    l->status = e ? wane_fail(WANE_E_IO, "cannot read '%s': %s", s->it->file->path, uv_strerror(e)) : s->status;
    if (!e) wane_error_restore(s->message);
  }
}

static void gather_on(slot *s) {
  s->gather.data = s;
  s->status = WANE_OK;
  int e = uv_queue_work(&s->load->loop, &s->gather, gather_tile, on_gathered);
  if (e == 0) { s->load->reading++; s->state = READING; return; }
  s->state = READY;
  if (s->load->status == WANE_OK) s->load->status = wane_fail(WANE_E_IO, "cannot read '%s': %s", s->it->file->path, uv_strerror(e));
}

/* Values of a chunk: whole units that fit the buffer. */
static int64_t chunk_values(const item *it) {
  int64_t unit_bytes = bytes_of(it, it->c.unit);
  return unit_bytes >= CHUNK || unit_bytes <= 0 ? it->c.unit : CHUNK / unit_bytes * it->c.unit;
}

/* Starts reading the next chunk into a free slot. Returns 0 when nothing is left to issue. */
static int issue(wane_load *l, slot *s) {
  while (l->next < l->count) {
    item *it = &l->items[l->next];
    if (l->next_value == 0 && (l->status = begin_item(it)) != WANE_OK) return 0;
    if (l->next_value < it->c.to.n) {
      s->it = it;
      s->first = l->next_value;
      s->count = chunk_values(it);
      if (s->count > it->c.to.n - s->first) s->count = it->c.to.n - s->first;
      s->begin = s->at = (uint64_t)bytes_of(it, s->first);
      s->end = (uint64_t)bytes_of(it, s->first + s->count);
      s->to = wane_conversion_is_copy(&it->c) ? it->c.base + s->begin : s->buffer;
      l->next_value += s->count;
      if (it->c.arrange == WANE_ARRANGE_TRANSPOSE) gather_on(s); else read_on(s);
      return 1;
    }
    if (it->c.to.n == 0) end_item(l, it);
    l->next++;
    l->next_value = 0;
  }
  return 0;
}

/* ---------------------------------------------------------------- conversion */

/* A chunk has been read: done if it lies in its result already, else handed to the workers. */
static void hand_over(wane_load *l, slot *s) {
  item *it = s->it;
  it->left -= s->count;
  if (s->to != s->buffer) {
    s->state = FREE;
    if (it->left == 0) end_item(l, it);
    return;
  }
  wane_op *op = wane_op_new(l->stream, WANE_OP_COPY);
  op->fn = wane_conversion_chunk;
  op->nchunks = wane_chunks(s->count, it->c.grain > OP_VALUES ? it->c.grain : OP_VALUES);
  op->p[0] = &it->c;
  op->p[1] = s->buffer;
  op->n[0] = s->first;
  op->n[1] = s->count;
  wane_op_push(l->stream, op, NULL, NULL);
  s->ticket = it->ticket = wane_stream_tail(l->stream);
  s->state = CONVERTING;
  if (it->left || !it->c.to.nested) return;
  op = wane_op_new(l->stream, WANE_OP_QUANTIZE_NESTED);
  op->fn = wane_conversion_nest;
  op->p[0] = &it->c;
  wane_op_push(l->stream, op, NULL, NULL);
  it->ticket = wane_stream_tail(l->stream);
}

/* Frees the slots whose ops have run, and ends the items whose last op has. */
static void reclaim(wane_load *l) {
  for (int i = 0; i < l->slots_used && l->status == WANE_OK; i++) {
    slot *s = &l->slots[i];
    if (s->state != CONVERTING) continue;
    int status = wane_stream_poll(l->stream, s->ticket);
    if (status == WANE_OK) s->state = FREE;
    else if (status < 0) l->status = status;
  }
  while (l->oldest < l->count && l->status == WANE_OK) {
    item *it = &l->items[l->oldest];
    if (!it->block || it->left) return;
    if (it->ticket) {
      int status = wane_stream_poll(l->stream, it->ticket);
      if (status == WANE_PENDING) return;
      if (status < 0) { l->status = status; return; }
      end_item(l, it);
    }
    l->oldest++;
  }
}

/* ---------------------------------------------------------------- the job */

/* Buffers large enough for every item's units, and as many as fit the budget (two at least). Copies need none. */
static int make_slots(wane_load *l) {
  size_t largest = 0;
  for (int64_t i = 0; i < l->count; i++) {
    const item *it = &l->items[i];
    if (wane_conversion_is_copy(&it->c)) continue;
    int64_t bytes = bytes_of(it, chunk_values(it) < it->c.to.n ? chunk_values(it) : it->c.to.n);
    if ((size_t)bytes > largest) largest = (size_t)bytes;
  }
  l->buffer_bytes = largest;
  l->slots_used = largest <= CHUNK ? SLOTS : BUFFERS / largest > 2 ? (int)(BUFFERS / largest) : 2;
  for (int i = 0; i < l->slots_used; i++) {
    l->slots[i].load = l;
    if (largest && !(l->slots[i].buffer = wane_pages_alloc(largest, "chunks of a load"))) return WANE_E_MEMORY;
  }
  return largest ? wane_stream_open(&l->stream, "cpu") : WANE_OK;
}

/* Waits until nothing is in flight any more. */
static void settle(wane_load *l) {
  while (l->reading) uv_run(&l->loop, UV_RUN_ONCE);
  if (!l->stream) return;
  if (l->status != WANE_OK) wane_stream_cancel(l->stream);
  wane_stream_wait(l->stream, wane_stream_tail(l->stream), -1);
}

static void work(wane_load *l) {
  while (l->status == WANE_OK) {
    if (wane_job_cancelled(l->job)) { l->status = wane_fail(WANE_E_CANCELLED, "loading was cancelled"); return; }
    int converting = -1;
    for (int i = 0; i < l->slots_used && l->status == WANE_OK; i++) {
      slot *s = &l->slots[i];
      if (s->state == READY) hand_over(l, s);
      if (s->state == FREE && l->reading < READS) issue(l, s);
      if (s->state == CONVERTING && (converting < 0 || s->ticket < l->slots[converting].ticket)) converting = i;
    }
    if (l->status != WANE_OK || (!l->reading && converting < 0)) return;
    if (l->reading) uv_run(&l->loop, UV_RUN_ONCE);
    else wane_stream_wait(l->stream, l->slots[converting].ticket, -1);
    reclaim(l);
  }
}

static int load_run(wane_job *job, void *state) {
  wane_load *l = state;
  l->job = job;
  wane_job_set_progress(job, 0, l->total);
  int e = uv_loop_init(&l->loop);
  if (e) return wane_fail(WANE_E_IO, "no event loop could be made for loading: %s", uv_strerror(e));
  l->status = make_slots(l);
  work(l);
  char message[512];
  wane_error_save(message, sizeof message);    /* before settling sets others */
  settle(l);
  if (l->status == WANE_OK) {
    reclaim(l);
    wane_error_save(message, sizeof message);
  }
  wane_stream_close(l->stream);
  l->stream = NULL;
  for (int i = 0; i < SLOTS; i++) wane_pages_free(l->slots[i].buffer, l->buffer_bytes);
  uv_loop_close(&l->loop);
  wane_error_restore(message);
  return l->status;
}

static void load_drop(void *state) { wane_load_free(state); }
static const wane_job_vtable load_vtable = { load_run, load_drop };

int wane_load_start(wane_load *l, wane_job **out) {
  *out = NULL;
  return wane_job_start(out, &load_vtable, l);
}

int64_t wane_load_done(wane_job *job) { return atomic_load(&((wane_load *)wane_job_state(job))->finished); }

int wane_load_take(wane_job *job, int64_t i, wane_stream *s, wane_handle *out) {
  memset(out, 0, sizeof *out);
  int status = wane_job_poll(job);
  if (status != WANE_OK) return status;
  status = wane_enter(s);
  if (status) return status;
  wane_load *l = wane_job_state(job);
  if (i < 0 || i >= l->count) return wane_fail(WANE_E_ARG, "item %lld of a load of %lld", (long long)i, (long long)l->count);
  item *it = &l->items[i];
  if (it->taken) return wane_fail(WANE_E_ARG, "tensor '%s' was taken from its load before", it->name);
  status = wane_tensor_over(s, out, it->block, it->block->base, &it->c.to);
  if (status != WANE_OK) return status;
  it->taken = 1;
  wane_mapping_unref(it->block);
  it->block = NULL;
  return WANE_OK;
}
