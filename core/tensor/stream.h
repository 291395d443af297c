/* stream.h: the executor and the memory of a stream. Internal to core/tensor. */
#ifndef WANE_STREAM_H
#define WANE_STREAM_H
#include "tensor.h"
#include <stdatomic.h>

enum { RING = 4096, CLASSES = 8 * 42, BAD_RANGES = 16, STORAGE_SLAB = 64, STREAM_MESSAGE = 256 };
#define NO_TICKET UINT64_MAX

/* Pooled blocks of one size class that are free now. Capacity is reserved when a block is made, so freeing never fails. */
typedef struct freelist { void **blocks; int32_t count, capacity, made; } freelist;

/* Ops [from, to) did not run. */
typedef struct bad_range { uint64_t from, to; int32_t why; int32_t code; } bad_range;

struct wane_scope {
  wane_tensor list;                 /* ring of tensors through next/prev; only those two fields are used */
  wane_scope *parent;
  wane_scope *next, *prev;          /* all scopes of the stream */
};

struct wane_stream {
  _Alignas(64) _Atomic uint64_t tail;         /* owner writes */
  _Alignas(64) _Atomic uint64_t retired;      /* the retirer writes */
  _Atomic uint64_t first_bad;                 /* first op skipped since the last stop, or NO_TICKET */
  _Alignas(64) _Atomic uint64_t arm_futex;    /* wake a blocked owner when retired reaches this */
  _Atomic uint64_t arm_fd;                    /* make fd readable when retired reaches this */
  _Atomic uint32_t futex;
  _Atomic int32_t stop;                       /* 0, or why ops are being skipped */
  _Atomic int32_t failing;                    /* 1 while message is being written by the kernel that failed first */
  _Atomic int32_t refs;                       /* the open handle, each tensor, a closing op in flight */
  wane_op *ring;                              /* [RING] */
  wane_stream *next;                          /* all streams of the device, under its lock */
  _Atomic int fd;
  int32_t closed;
  int32_t failed_code;
  char message[STREAM_MESSAGE];
  /* owner only */
  uint64_t tail_local;
  bad_range bad[BAD_RANGES];
  int32_t nbad;
  wane_scope *scope, *scopes;
  freelist pool[CLASSES];
  size_t pool_bytes, pool_free, pool_peak;    /* in all; of it in the free lists; most that was in use at once when it grew */
  wane_storage *storage_free;
  void **slabs; int32_t nslabs, slabs_capacity;
  wane_storage *dying;                        /* storages freed after the stream was closed */
};

/* stream.c */
int wane_stream_bad(wane_stream *s, uint64_t ticket, int *code);   /* why the op with this ticket did not run, or 0 */
void wane_stream_unref(wane_stream *s);
const char *wane_op_name(int code);
/* storage.c */
void wane_descriptors_lock(int on);                                /* around a fork */
void wane_stream_free_memory(wane_stream *s);                      /* pool, storages, slabs: when the last reference went */
void wane_storage_drop(wane_storage *st);                          /* gives the memory back now */
#endif
