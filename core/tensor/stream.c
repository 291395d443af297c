/* stream.c: the CPU as a device that executes streams of ops.
 *
 * DESIGN. N workers; the calling thread only enqueues. One op is active at a time; its chunks are claimed from one 64-bit word,
 * cursor = serial:40 | chunks left:24, by compare-and-swap. A late worker's swap fails because the serial moved on, so a ring
 * slot is read only while one of its chunks is owned. Who finishes the last chunk retires the op and publishes the next, round
 * robin over the streams. There is no driver thread, no barrier object and no reference held by an op in flight: order keeps
 * memory alive (a block freed by the owner is reused by later ops of the same stream only).
 *
 * Two Dekker pairs need sequential consistency: "tail, then active" (enqueue) against "active = 0, then tails" (retire), and
 * "sleepers, then cursor" (a worker going to sleep) against "cursor, then sleepers" (publishing).
 *
 * Idle workers spin a little, then sleep, and leave the process after some seconds. If no worker can be started at all, the
 * thread that waits executes chunks itself; nothing else ever computes on a caller's thread.
 *
 * fork: prepare takes the locks (microseconds, nothing is drained); the child finds `forked` set at its first call, counts ops in
 * flight as lost, and starts threads of its own when it enqueues. */
#include "stream.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { LEFT_BITS = 24, SPIN_US = 20, BUSY_SPIN_US = 300, IDLE_SECONDS = 5, WORKER_STACK = 512 << 10 };
#define LEFT_MASK ((1ull << LEFT_BITS) - 1)

static struct device {
  _Alignas(64) _Atomic uint64_t cursor;
  _Alignas(64) _Atomic uint32_t done;                 /* chunks of the active op that have finished */
  _Alignas(64) const wane_op *op;                     /* the active op; stable while one of its chunks is owned */
  wane_stream *stream;
  uint64_t serial;
  _Alignas(64) _Atomic int active;
  _Alignas(64) _Atomic uint32_t work_seq;             /* futex that idle workers sleep on */
  _Atomic int sleepers;
  _Atomic int threads;                                /* wanted; 0: not asked yet */
  _Atomic int live;
  _Atomic int forked;
  pthread_mutex_t lock;                               /* streams, and choosing the next op */
  wane_stream *streams, *last;                        /* last: served last */
} cpu = { .lock = PTHREAD_MUTEX_INITIALIZER };

static _Thread_local void *scratch;

/* ---------------------------------------------------------------- small things */

static void futex_wait(_Atomic uint32_t *word, uint32_t value, int64_t ns) {
  struct timespec t = { ns / 1000000000, ns % 1000000000 };
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, ns < 0 ? NULL : &t, NULL, 0);
}
static void futex_wake(_Atomic uint32_t *word, int n) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0); }

static void pause_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void *wane_scratch(void) { return scratch; }

const char *wane_op_name(int code) {
  switch (code) {
    case WANE_OP_RELEASE: return "release";
    case WANE_OP_UPLOAD: return "upload";
    case WANE_OP_COPY: return "copy";
    case WANE_OP_FILL: return "fill";
    case WANE_OP_UNARY: return "unary";
    case WANE_OP_BINARY: return "binary";
    case WANE_OP_WHERE: return "where";
    case WANE_OP_REDUCE: return "reduce";
    case WANE_OP_ARANGE: return "arange";
    case WANE_OP_RANDOM: return "random";
    case WANE_OP_SORT: return "sort";
    case WANE_OP_TOPK: return "topk";
    case WANE_OP_INDEX: return "index";
    case WANE_OP_MATMUL: return "matmul";
    case WANE_OP_CUMSUM: return "cumsum";
    case WANE_OP_EMBEDDING: return "embedding";
    case WANE_OP_RMS_NORM: return "rms_norm";
    case WANE_OP_LAYER_NORM: return "layer_norm";
    case WANE_OP_ROPE: return "rope";
    case WANE_OP_KV_APPEND: return "kv_append";
    case WANE_OP_ATTENTION: case WANE_OP_ATTENTION_MERGE: return "attention";
    case WANE_OP_GLU: return "glu";
    case WANE_OP_SOFTMAX: return "softmax";
    case WANE_OP_SAMPLE_FILTER: return "logits_filter";
    case WANE_OP_SAMPLE: return "sample";
    case WANE_OP_NLL: return "nll";
    case WANE_OP_PENALTY: return "penalty";
    case WANE_OP_ROUTE: return "route";
    case WANE_OP_LORA_ROWS: case WANE_OP_LORA_COLUMNS: case WANE_OP_LORA_GRADIENT: case WANE_OP_LORA_SUM: return "lora";
    case WANE_OP_ATTENTION_BACKWARD: return "attention_backward";
    case WANE_OP_OPTIMIZER: return "optimizer_step";
    case WANE_OP_UNARY_BACKWARD: return "unary_backward";
    case WANE_OP_GLU_BACKWARD: return "glu_backward";
    case WANE_OP_SOFTMAX_BACKWARD: return "softmax_backward";
    case WANE_OP_SCATTER_ADD: return "scatter_add";
    case WANE_OP_TOPK_BACKWARD: return "topk_backward";
    case WANE_OP_DROPOUT: return "dropout";
    case WANE_OP_ADD_INTO: return "add_into";
    case WANE_OP_EXPERTS_WEIGHT: return "experts_weight_backward";
  }
  if (code >= WANE_OP_QUANTIZE_4BIT && code <= WANE_OP_QUANTIZE_NESTED) return "quantize";
  if (code == WANE_OP_DEQUANTIZE) return "dequantize";
  if (code >= WANE_OP_LINEAR && code <= WANE_OP_LINEAR_END) return "linear";
  return "op";
}

/* ---------------------------------------------------------------- retiring and choosing */

/* Wakes whoever armed a ticket that has now retired. */
static void notify(wane_stream *s, uint64_t retired) {
  uint64_t a = atomic_load(&s->arm_futex);
  if (retired >= a && atomic_compare_exchange_strong(&s->arm_futex, &a, NO_TICKET)) {
    atomic_fetch_add(&s->futex, 1);
    futex_wake(&s->futex, 1);
  }
  a = atomic_load(&s->arm_fd);
  if (retired >= a && atomic_compare_exchange_strong(&s->arm_fd, &a, NO_TICKET)) {
    uint64_t one = 1;
    ssize_t w = write(atomic_load(&s->fd), &one, sizeof one);
    (void)w;
  }
}

/* Lock held, no op of s active: passes over the ops of a stopped stream that need not run. */
static void skip(wane_stream *s) {
  if (!atomic_load(&s->stop)) return;
  uint64_t first = atomic_load(&s->retired), r = first, tail = atomic_load(&s->tail);
  while (r < tail && !s->ring[r % RING].always) r++;
  if (r == first) return;
  if (atomic_load(&s->first_bad) == NO_TICKET) atomic_store(&s->first_bad, first);
  atomic_store(&s->retired, r);
  notify(s, r);
}

/* Lock held: publishes the next op, round robin over streams, or goes idle. Returns its chunk count, 0 when idle. */
static uint32_t pick(void) {
  for (;;) {
    for (wane_stream *s = cpu.streams; s; s = s->next) skip(s);
    wane_stream *start = cpu.last && cpu.last->next ? cpu.last->next : cpu.streams, *s = start;
    if (s) do {
      uint64_t r = atomic_load(&s->retired);
      if (r < atomic_load(&s->tail)) {
        const wane_op *op = &s->ring[r % RING];
        cpu.op = op;
        cpu.stream = cpu.last = s;
        cpu.serial++;
        atomic_store_explicit(&cpu.active, 1, memory_order_relaxed);
        uint32_t n = op->nchunks;
        atomic_store(&cpu.cursor, cpu.serial << LEFT_BITS | n);
        return n;
      }
      s = s->next ? s->next : cpu.streams;
    } while (s != start);
    atomic_store(&cpu.active, 0);
    int again = 0;                                    /* an op enqueued meanwhile saw active = 1 and left it to us */
    for (s = cpu.streams; s; s = s->next) again |= atomic_load(&s->retired) < atomic_load(&s->tail);
    if (!again) return 0;
  }
}

static void wake_workers(int n) {
  atomic_fetch_add(&cpu.work_seq, 1);
  if (atomic_load(&cpu.sleepers) > 0) futex_wake(&cpu.work_seq, n);
}

/* The last chunk of the active op is done. */
static void retire(void) {
  wane_stream *s = cpu.stream, *closing = NULL;
  atomic_store_explicit(&cpu.done, 0, memory_order_relaxed);
  pthread_mutex_lock(&cpu.lock);
  uint64_t r = atomic_load_explicit(&s->retired, memory_order_relaxed);
  if (atomic_load(&s->stop) && !cpu.op->always && atomic_load(&s->first_bad) == NO_TICKET) atomic_store(&s->first_bad, r);
  if (cpu.op->code == WANE_OP_NONE) closing = s;      /* the closing op of wane_stream_close */
  atomic_store(&s->retired, r + 1);
  notify(s, r + 1);
  uint32_t n = pick();
  pthread_mutex_unlock(&cpu.lock);
  if (n > 1) wake_workers((int)n - 1);
  if (closing) wane_stream_unref(closing);
}

/* Executes at most one chunk of the active op. 0: nothing to claim. */
static int step(void) {
  uint64_t c = atomic_load_explicit(&cpu.cursor, memory_order_acquire);
  if (!(c & LEFT_MASK)) return 0;
  if (!atomic_compare_exchange_weak_explicit(&cpu.cursor, &c, c - 1, memory_order_acq_rel, memory_order_relaxed)) return 1;
  const wane_op *op = cpu.op;
  uint32_t n = op->nchunks;
  if (op->always || !atomic_load_explicit(&cpu.stream->stop, memory_order_relaxed)) op->fn(op, n - (uint32_t)(c & LEFT_MASK));
  if (atomic_fetch_add_explicit(&cpu.done, 1, memory_order_acq_rel) == n - 1) retire();
  return 1;
}

/* ---------------------------------------------------------------- workers */

/* Leaves the pool if there is nothing to do; the lock makes it atomic against publishing. */
static int leave(int idle) {
  pthread_mutex_lock(&cpu.lock);
  int go = atomic_load(&cpu.live) > atomic_load(&cpu.threads) || (idle && !atomic_load(&cpu.active));
  if (go) atomic_fetch_sub(&cpu.live, 1);
  pthread_mutex_unlock(&cpu.lock);
  return go;
}

/* Waits for chunks a little: longer while another worker's op runs, because what follows it will be there at once, and a worker that is woken
 * comes late, or to a processor that is busy. */
static int spin(void) {
  double begun = 0;
  for (;;) {
    for (int i = 0; i < 32; i++) {
      if (atomic_load_explicit(&cpu.cursor, memory_order_relaxed) & LEFT_MASK) return 1;
      pause_cpu();
    }
    double now = wane_clock();
    if (begun == 0) begun = now;
    if (now - begun >= (atomic_load_explicit(&cpu.active, memory_order_relaxed) ? BUSY_SPIN_US : SPIN_US) * 1e-6) return 0;
  }
}

static void *worker(void *memory) {
  scratch = memory;
  for (;;) {
    while (step()) ;
    if (atomic_load(&cpu.live) > atomic_load(&cpu.threads) && leave(0)) break;
    if (spin()) continue;
    uint32_t seq = atomic_load(&cpu.work_seq);
    double slept = wane_clock();
    atomic_fetch_add(&cpu.sleepers, 1);
    if (!(atomic_load(&cpu.cursor) & LEFT_MASK)) futex_wait(&cpu.work_seq, seq, IDLE_SECONDS * 1000000000ll);
    atomic_fetch_sub(&cpu.sleepers, 1);
    if (wane_clock() - slept > IDLE_SECONDS - 0.5 && leave(1)) break;
  }
  wane_pages_free(memory, WANE_SCRATCH);
  return NULL;
}

/* Brings the pool up to strength. All signals stay with the host's threads. */
static void start_workers(void) {
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  pthread_attr_t attr;
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, WORKER_STACK);
  for (;;) {
    int live = atomic_load(&cpu.live);
    if (live >= atomic_load(&cpu.threads)) break;
    if (!atomic_compare_exchange_strong(&cpu.live, &live, live + 1)) continue;
    void *memory = wane_pages_alloc(WANE_SCRATCH, "a worker's scratch");
    pthread_t t;
    if (!memory || pthread_create(&t, &attr, worker, memory)) {
      wane_pages_free(memory, WANE_SCRATCH);
      atomic_fetch_sub(&cpu.live, 1);
      break;                                          /* none at all: wane_stream_wait does the work */
    }
  }
  pthread_attr_destroy(&attr);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
}

int wane_threads(void) {
  int n = atomic_load(&cpu.threads);
  if (n == 0) {
    int expected = 0;
    atomic_compare_exchange_strong(&cpu.threads, &expected, wane_cpu_quota());
    n = atomic_load(&cpu.threads);
  }
  return n;
}

int wane_set_threads(int n) {
  if (n < 0 || n > 1024) return wane_fail(WANE_E_ARG, "threads: expected 0 (default) to 1024, found %d", n);
  atomic_store(&cpu.threads, n ? n : wane_cpu_quota());
  wake_workers(1024);                                 /* those above the number leave */
  return WANE_OK;
}

int wane_live_threads(void) { return atomic_load(&cpu.live); }

/* ---------------------------------------------------------------- fork */

static void fork_prepare(void) {
  pthread_mutex_lock(&cpu.lock);
  wane_descriptors_lock(1);
}
static void fork_parent(void) {
  wane_descriptors_lock(0);
  pthread_mutex_unlock(&cpu.lock);
}
static void fork_child(void) {
  wane_descriptors_lock(0);
  pthread_mutex_unlock(&cpu.lock);
  atomic_store(&cpu.forked, 1);
}

static void note_bad(wane_stream *s, uint64_t from, uint64_t to, int why, int code) {
  if (from >= to) return;
  if (s->nbad == BAD_RANGES) {                        /* forget nothing: merge the two oldest */
    s->bad[1].from = s->bad[0].from;
    memmove(s->bad, s->bad + 1, (BAD_RANGES - 1) * sizeof s->bad[0]);
    s->nbad--;
  }
  s->bad[s->nbad++] = (bad_range){ from, to, why, code };
}

/* First call in a forked child: only this thread exists. */
static void revive(void) {
  atomic_store(&cpu.forked, 0);
  atomic_store(&cpu.live, 0);
  atomic_store(&cpu.sleepers, 0);
  atomic_store(&cpu.active, 0);
  atomic_store(&cpu.done, 0);
  cpu.serial++;
  atomic_store(&cpu.cursor, cpu.serial << LEFT_BITS);
  for (wane_stream *s = cpu.streams; s; s = s->next) {
    uint64_t r = atomic_load(&s->retired), tail = atomic_load(&s->tail);
    note_bad(s, r, tail, WANE_E_FORKED, r < tail ? s->ring[r % RING].code : 0);
    atomic_store(&s->retired, tail);
    atomic_store(&s->arm_futex, NO_TICKET);
    atomic_store(&s->arm_fd, NO_TICKET);
    atomic_store(&s->stop, 0);
    atomic_store(&s->first_bad, NO_TICKET);
    int fd = atomic_load(&s->fd);
    if (fd >= 0) {                                    /* the same number, no longer the parent's counter */
      int fresh = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
      if (fresh >= 0) { dup3(fresh, fd, O_CLOEXEC); close(fresh); }
    }
  }
}

static inline void alive(void) {
  if (__builtin_expect(atomic_load_explicit(&cpu.forked, memory_order_relaxed), 0)) revive();
}

static void register_fork(void) { pthread_atfork(fork_prepare, fork_parent, fork_child); }

/* ---------------------------------------------------------------- opening and closing */

int wane_stream_open(wane_stream **out, const char *device) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, register_fork);
  alive();
  if (strcmp(device, "cpu")) return wane_fail(WANE_E_NOTFOUND, "no device '%s': this build has cpu", device);
  wane_threads();
  wane_stream *s = wane_alloc_zero(sizeof *s, "a stream");
  if (!s) return WANE_E_MEMORY;
  s->ring = wane_pages_alloc(RING * sizeof(wane_op), "a stream's ring");
  if (!s->ring) { wane_release(s); return WANE_E_MEMORY; }
  atomic_store(&s->fd, -1);
  atomic_store(&s->arm_futex, NO_TICKET);
  atomic_store(&s->arm_fd, NO_TICKET);
  atomic_store(&s->first_bad, NO_TICKET);
  atomic_store(&s->refs, 1);
  pthread_mutex_lock(&cpu.lock);
  s->next = cpu.streams;
  cpu.streams = s;
  pthread_mutex_unlock(&cpu.lock);
  *out = s;
  return WANE_OK;
}

/* Drops a reference; the last one frees everything. Never called with the device's lock held. */
void wane_stream_unref(wane_stream *s) {
  if (atomic_fetch_sub(&s->refs, 1) != 1) return;
  pthread_mutex_lock(&cpu.lock);
  for (wane_stream **p = &cpu.streams; *p; p = &(*p)->next) if (*p == s) { *p = s->next; break; }
  if (cpu.last == s) cpu.last = NULL;
  pthread_mutex_unlock(&cpu.lock);
  wane_stream_free_memory(s);
  wane_pages_free(s->ring, RING * sizeof(wane_op));
  if (atomic_load(&s->fd) >= 0) close(atomic_load(&s->fd));
  wane_release(s);
}

static void publish(wane_stream *s);
static void make_room(wane_stream *s, uint64_t slots);

void wane_stream_close(wane_stream *s) {
  if (!s || s->closed) return;
  alive();
  while (s->scopes) wane_scope_close(s, s->scopes);
  s->closed = 1;
  if (atomic_load(&s->retired) != s->tail_local) {    /* ops in flight: skip them, and let the last retire drop its reference */
    int32_t none = 0;
    atomic_compare_exchange_strong(&s->stop, &none, WANE_E_CANCELLED);
    atomic_fetch_add(&s->refs, 1);
    make_room(s, 1);                                  /* a full ring is stopped too: at most the claimed chunks are waited for */
    wane_op *op = &s->ring[s->tail_local % RING];
    memset(op, 0, sizeof *op);
    op->nchunks = 1;
    op->always = 1;
    op->stream = s;
    op->fn = wane_cpu_backend()->ops[WANE_OP_NONE];
    publish(s);
  }
  wane_stream_unref(s);
}

/* ---------------------------------------------------------------- stops: cancel and failure */

void wane_stream_cancel(wane_stream *s) {
  int32_t none = 0;
  atomic_compare_exchange_strong(&s->stop, &none, WANE_E_CANCELLED);
}

void wane_op_fail(const wane_op *op, const char *format, ...) {
  wane_stream *s = op->stream;
  if (atomic_exchange(&s->failing, 1)) return;        /* another chunk failed first and is writing the message */
  va_list args;
  va_start(args, format);
  vsnprintf(s->message, sizeof s->message, format, args);
  va_end(args);
  s->failed_code = op->code;
  int32_t none = 0;
  if (!atomic_compare_exchange_strong(&s->stop, &none, WANE_E_FAILED)) atomic_store(&s->failing, 0);
}

static int report(wane_stream *s, int why, int code) {
  switch (why) {
    case WANE_E_CANCELLED: return wane_fail(why, "cancelled");
    case WANE_E_FORKED: return wane_fail(why, "this result was being computed (%s) when the process forked; compute it again here", wane_op_name(code));
    default: {                                        /* a kernel may have named the op itself */
      const char *name = wane_op_name(code);
      size_t n = strlen(name);
      int named = !strncmp(s->message, name, n) && s->message[n] == ':';
      return named ? wane_fail(why, "%s", s->message) : wane_fail(why, "%s: %s", name, s->message);
    }
  }
}

/* The owner meets a stop: lets the stream drain (claimed chunks finish, the rest is skipped), remembers which ops did not run,
 * and reports it, once. */
static int acknowledge(wane_stream *s) {
  int why = atomic_load(&s->stop);
  while (atomic_load(&s->retired) < s->tail_local) {
    pthread_mutex_lock(&cpu.lock);
    if (!(atomic_load(&cpu.active) && cpu.stream == s)) skip(s);
    pthread_mutex_unlock(&cpu.lock);
    if (atomic_load(&cpu.live) == 0) step();
    if (atomic_load(&s->retired) < s->tail_local) sched_yield();
  }
  uint64_t from = atomic_load(&s->first_bad);
  int code = why == WANE_E_FAILED ? s->failed_code : 0;
  if (from != NO_TICKET) note_bad(s, from, s->tail_local, why, code);
  atomic_store(&s->first_bad, NO_TICKET);
  atomic_store(&s->failing, 0);
  atomic_store(&s->stop, 0);
  return report(s, why, code);
}

int wane_stream_bad(wane_stream *s, uint64_t ticket, int *code) {
  for (int i = 0; i < s->nbad; i++) if (ticket > s->bad[i].from && ticket <= s->bad[i].to) { *code = s->bad[i].code; return s->bad[i].why; }
  return 0;
}

int wane_enter(wane_stream *s) {
  alive();
  if (__builtin_expect(s->closed, 0)) return wane_fail(WANE_E_STALE, "this stream is closed");
  if (__builtin_expect(atomic_load_explicit(&s->stop, memory_order_relaxed), 0)) return acknowledge(s);
  return WANE_OK;
}

/* ---------------------------------------------------------------- waiting */

uint64_t wane_stream_tail(wane_stream *s) { return s->tail_local; }

int wane_stream_poll(wane_stream *s, uint64_t ticket) {
  int code = 0, status = wane_enter(s);
  if (status) return status;
  if (atomic_load_explicit(&s->retired, memory_order_acquire) < ticket) return WANE_PENDING;
  int why = s->nbad ? wane_stream_bad(s, ticket, &code) : 0;
  return why ? report(s, why, code) : WANE_OK;
}

int wane_stream_fd(wane_stream *s) {
  if (atomic_load(&s->fd) < 0) {
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (fd < 0) return wane_fail_errno(WANE_E_IO, "eventfd for a stream");
    atomic_store(&s->fd, fd);
  }
  return atomic_load(&s->fd);
}

int wane_stream_arm(wane_stream *s, uint64_t ticket) {
  int fd = wane_stream_fd(s);
  if (fd < 0) return fd;
  uint64_t count;
  ssize_t n = read(fd, &count, sizeof count);         /* drain old wake-ups */
  (void)n;
  int status = wane_stream_poll(s, ticket);
  if (status != WANE_PENDING) return status;
  atomic_store(&s->arm_fd, ticket);
  /* Look again: it may have retired between the poll and the arming, and then nobody would write. */
  if (atomic_load(&s->retired) >= ticket && atomic_exchange(&s->arm_fd, NO_TICKET) != NO_TICKET) return wane_stream_poll(s, ticket);
  return WANE_PENDING;
}

/* Runs chunks on the calling thread until the ticket retired: only when no worker exists. */
static int help(wane_stream *s, uint64_t ticket) {
  void *own = NULL;
  if (!scratch && !(own = scratch = wane_pages_alloc(WANE_SCRATCH, "scratch memory"))) return WANE_E_MEMORY;
  while (atomic_load(&s->retired) < ticket && step()) ;
  if (own) { wane_pages_free(own, WANE_SCRATCH); scratch = NULL; }
  return WANE_OK;
}

int wane_stream_wait(wane_stream *s, uint64_t ticket, int64_t timeout_ns) {
  double end = timeout_ns < 0 ? 0 : wane_clock() + (double)timeout_ns * 1e-9;
  int status;
  while ((status = wane_stream_poll(s, ticket)) == WANE_PENDING) {
    if (atomic_load(&cpu.live) == 0 && (status = help(s, ticket)) != WANE_OK) return status;
    int64_t left = -1;
    if (end > 0) {
      left = (int64_t)((end - wane_clock()) * 1e9);
      if (left <= 0) return wane_fail(WANE_E_TIMEOUT, "the stream did not get there within %.3f s", (double)timeout_ns * 1e-9);
    }
    uint32_t v = atomic_load(&s->futex);
    atomic_store(&s->arm_futex, ticket);
    if (atomic_load(&s->retired) < ticket && !atomic_load(&s->stop)) futex_wait(&s->futex, v, left);
    atomic_store(&s->arm_futex, NO_TICKET);
  }
  return status;
}

/* ---------------------------------------------------------------- enqueuing */

/* Waits until `slots` slots of the ring are free. Callers bound their run-ahead, so this is the backstop. A stop is not reported
 * here: what is enqueued next is skipped with the rest, and the owner's next call tells. */
static void make_room(wane_stream *s, uint64_t slots) {
  uint64_t want = s->tail_local + slots;
  want = want > RING ? want - RING : 0;
  while (atomic_load(&s->retired) < want) {
    if (atomic_load(&s->stop)) {
      pthread_mutex_lock(&cpu.lock);
      if (!(atomic_load(&cpu.active) && cpu.stream == s)) skip(s);
      pthread_mutex_unlock(&cpu.lock);
      if (atomic_load(&s->retired) >= want) break;
    }
    if (atomic_load(&cpu.live) == 0) {
      if (help(s, want) != WANE_OK) { start_workers(); sched_yield(); }   /* no memory for scratch: try again until there is */
      continue;
    }
    uint32_t v = atomic_load(&s->futex);
    atomic_store(&s->arm_futex, want);
    if (atomic_load(&s->retired) < want && !atomic_load(&s->stop)) futex_wait(&s->futex, v, -1);
    else sched_yield();
    atomic_store(&s->arm_futex, NO_TICKET);
  }
}

wane_op *wane_op_new(wane_stream *s, int code) {
  uint64_t t = s->tail_local;
  if (__builtin_expect(t - atomic_load_explicit(&s->retired, memory_order_acquire) >= RING, 0)) make_room(s, RING / 2);
  wane_op *op = &s->ring[t % RING];
  memset(op, 0, sizeof *op);
  op->code = (uint16_t)code;
  op->nchunks = 1;
  op->stream = s;
  return op;
}

/* Makes the op at tail_local visible and sees to it that somebody runs it. */
static void publish(wane_stream *s) {
  atomic_store(&s->tail, ++s->tail_local);
  if (atomic_load(&cpu.active)) return;               /* the retirer of the active op looks at the tails again */
  pthread_mutex_lock(&cpu.lock);
  uint32_t n = atomic_load(&cpu.active) ? 0 : pick();
  int missing = atomic_load(&cpu.live) < atomic_load(&cpu.threads);
  pthread_mutex_unlock(&cpu.lock);
  if (missing) start_workers();
  if (n) wake_workers((int)n);
}

void wane_op_push(wane_stream *s, wane_op *op, wane_tensor *written, wane_tensor *written2) {
  if (!op->fn) op->fn = wane_cpu_backend()->ops[op->code];
  uint64_t ticket = s->tail_local + 1;
  if (written && written->storage) written->storage->ticket = ticket, written->storage->always = op->always;
  if (written2 && written2->storage) written2->storage->ticket = ticket, written2->storage->always = op->always;
  publish(s);
}

uint32_t wane_chunks(int64_t work, int64_t grain_work) {
  int64_t n = work / (grain_work > 0 ? grain_work : 1);
  return n < 1 ? 1 : n > 64 ? 64 : (uint32_t)n;
}
