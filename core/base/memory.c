/* memory.c: the allocator. Every byte that the core takes is counted here, and any allocation can be made to fail on request,
 * so that tests can walk through all of them. A block carries its size in a 64-byte header, which also keeps the alignment. */
#include "base.h"
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { HEADER = 64, HUGE_PAGE = 2 << 20, REGION = 32 << 20 };
typedef struct block { size_t bytes; } block;

static _Atomic uint64_t heap, heap_peak, mapped;
static _Atomic int64_t allocations, fail_in;
_Atomic int64_t wane_live_tensors;             /* counted by core/tensor */

/* Counts one allocation; nonzero when the test hook says that it fails. */
static int refused(void) {
  atomic_fetch_add_explicit(&allocations, 1, memory_order_relaxed);
  if (atomic_load_explicit(&fail_in, memory_order_relaxed) == 0) return 0;
  return atomic_fetch_sub(&fail_in, 1) == 1;
}

static void count(int64_t bytes) {
  uint64_t now = atomic_fetch_add(&heap, (uint64_t)bytes) + (uint64_t)bytes;
  uint64_t peak = atomic_load_explicit(&heap_peak, memory_order_relaxed);
  while (bytes > 0 && now > peak && !atomic_compare_exchange_weak(&heap_peak, &peak, now)) ;
}

void *wane_alloc(size_t bytes, const char *what) {
  size_t whole = (bytes + HEADER + 63) & ~(size_t)63;
  void *p = NULL;
  if (whole < bytes || refused() || !(p = aligned_alloc(64, whole))) {
    wane_fail(WANE_E_MEMORY, "out of memory: %zu bytes for %s", bytes, what);
    return NULL;
  }
  ((block *)p)->bytes = bytes;
  count((int64_t)bytes);
  return (char *)p + HEADER;
}

void *wane_alloc_zero(size_t bytes, const char *what) {
  void *p = wane_alloc(bytes, what);
  if (p) memset(p, 0, bytes);
  return p;
}

void *wane_regrow(void *old, size_t keep, size_t bytes, const char *what) {
  void *p = wane_alloc(bytes, what);
  if (!p) return NULL;
  if (old) memcpy(p, old, keep);
  wane_release(old);
  return p;
}

void wane_release(void *p) {
  if (!p) return;
  block *b = (block *)((char *)p - HEADER);
  count(-(int64_t)b->bytes);
  free(b);
}

char *wane_copy_string(const char *text) {
  size_t n = strlen(text) + 1;
  char *copy = wane_alloc(n, "a string");
  if (copy) memcpy(copy, text, n);
  return copy;
}

/* A weight of a few MB holds few aligned huge pages, and small ones cost about an eighth of decode's speed in a virtual
 * machine (each miss of the TLB walks two tables; docs/kernels.md). So blocks share regions: nothing but a region's end is left over, freeing gives
 * back exactly a block's pages, and address space is not used twice. `busy` is no lock to wait for: who finds it taken (a forked
 * child forever, if it was held then) gets pages of its own. */
static struct { _Atomic int busy; char *next, *end; } region;

/* A region of at least `bytes`, aligned. */
static char *region_new(size_t bytes, char **end) {
  size_t whole = ((bytes < REGION ? REGION : bytes) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  char *p = mmap(NULL, whole + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return NULL;
  size_t before = (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE;
  if (before) munmap(p, before);
  munmap(p + before + whole, HUGE_PAGE - before);
  p += before;
  madvise(p, whole, MADV_HUGEPAGE);
  *end = p + whole;
  return p;
}

/* `bytes` (whole pages) of a region; NULL if there is none. */
static char *region_take(size_t bytes) {
  char *p = NULL, *end;
  if (atomic_exchange(&region.busy, 1)) return NULL;
  if ((size_t)(region.end - region.next) >= bytes) {
    p = region.next;
    region.next += bytes;
  } else if ((p = region_new(bytes, &end))) {
    int larger = end - (p + bytes) > region.end - region.next;
    char *rest = larger ? region.next : p + bytes, *rest_end = larger ? region.end : end;
    if (larger) region.next = p + bytes, region.end = end;
    if (rest_end > rest) munmap(rest, (size_t)(rest_end - rest));
  }
  atomic_store(&region.busy, 0);
  return p;
}

static void *pages_new(size_t bytes, int dense, const char *what) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = ((bytes ? bytes : 1) + page - 1) / page * page;
  void *p = NULL;
  if (whole >= bytes && !refused()) {
    if (dense) p = region_take(whole);
    if (!p && (p = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) == MAP_FAILED) p = NULL;
  }
  if (p) count((int64_t)(bytes ? bytes : 1));
  else wane_fail(WANE_E_MEMORY, "out of memory: %zu bytes for %s", bytes, what);
  return p;
}

void *wane_pages_alloc(size_t bytes, const char *what) { return pages_new(bytes, 0, what); }
void *wane_pages_dense(size_t bytes, const char *what) { return pages_new(bytes, 1, what); }

void wane_pages_free(void *p, size_t bytes) {
  if (!p) return;
  if (!bytes) bytes = 1;
  munmap(p, bytes);
  count(-(int64_t)bytes);
}

void wane_count_mapped(int64_t bytes) { atomic_fetch_add(&mapped, (uint64_t)bytes); }
void wane_fail_allocation(int64_t n) { atomic_store(&fail_in, n > 0 ? n : 0); }

/* Reads "Key:  123 kB" of /proc/self/status; 0 if it is not there. */
static uint64_t status_kb(const char *text, const char *key) {
  const char *line = strstr(text, key);
  return line ? strtoull(line + strlen(key), NULL, 10) * 1024 : 0;
}

void wane_memory_read(wane_memory *out) {
  memset(out, 0, sizeof *out);
  out->heap = atomic_load(&heap);
  out->heap_peak = atomic_load(&heap_peak);
  out->mapped = atomic_load(&mapped);
  out->limit = wane_memory_quota();
  out->tensors = atomic_load(&wane_live_tensors);
  out->allocations = atomic_load(&allocations);
  FILE *f = fopen("/proc/self/status", "re");
  if (!f) return;
  char text[4096];
  size_t n = fread(text, 1, sizeof text - 1, f);
  text[n] = 0;
  fclose(f);
  out->rss = status_kb(text, "VmRSS:");
  out->rss_peak = status_kb(text, "VmHWM:");
}
