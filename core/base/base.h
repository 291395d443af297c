/* base.h: what every room of the core uses: errors, memory, CPU level, jobs. Internal. */
#ifndef WANE_BASE_H
#define WANE_BASE_H
#include "../include/wane.h"

/* Sets this thread's error message and returns `status`, so that `return wane_fail(WANE_E_SHAPE, "…", …)` reads well. */
int wane_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same with ": strerror(errno)" appended. */
int wane_fail_errno(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Copies this thread's message out / sets it, to carry an error from a worker to the caller. */
void wane_error_save(char *buffer, size_t size);
void wane_error_restore(const char *message);

/* Counted allocation; every byte of the core goes through here so that tests can make any of them fail.
 * NULL with the thread's error set ("out of memory: N bytes for WHAT"). Alignment is 64. wane_release takes NULL. */
void *wane_alloc(size_t bytes, const char *what);
void *wane_alloc_zero(size_t bytes, const char *what);
/* Grows a block: new block of `bytes`, `keep` bytes copied, old one released. On failure the old block stays. */
void *wane_regrow(void *old, size_t keep, size_t bytes, const char *what);
void wane_release(void *p);
/* strdup through the allocator. */
char *wane_copy_string(const char *text);
/* Anonymous pages, zeroed, touched on first use. NULL with the error set. */
void *wane_pages_alloc(size_t bytes, const char *what);
/* The same for what will be filled whole and read often: side by side in regions that ask for huge pages. Freed alike. */
void *wane_pages_dense(size_t bytes, const char *what);
void wane_pages_free(void *p, size_t bytes);
/* Books mapped file bytes for wane_memory_read. */
void wane_count_mapped(int64_t bytes);

/* Cut-off for the workers' number: affinity and cgroup quota. */
int wane_cpu_quota(void);
uint64_t wane_memory_quota(void);

/* wane_hash of what comes in parts: begin, feed multiples of 32 bytes, end with the fewer than 32 that are left. */
typedef struct wane_hash_state { uint64_t lane[4], bytes; } wane_hash_state;
void wane_hash_begin(wane_hash_state *s);
void wane_hash_feed(wane_hash_state *s, const void *data, size_t bytes);
uint64_t wane_hash_end(const wane_hash_state *s, const void *tail, size_t bytes);

/* Jobs (section 3 of wane.h). `run` executes on a thread of its own; it returns a status and has set the error if negative.
 * `drop` frees `state` after run has returned and the last reference went; it runs exactly once. */
typedef struct wane_job_vtable {
  int (*run)(wane_job *job, void *state);
  void (*drop)(void *state);
} wane_job_vtable;
int wane_job_start(wane_job **out, const wane_job_vtable *vtable, void *state);
/* For run(): nonzero when it should stop. */
int wane_job_cancelled(const wane_job *job);
void wane_job_set_progress(wane_job *job, uint64_t done, uint64_t total);
/* The state of a job that has ended (for result accessors). */
void *wane_job_state(wane_job *job);
#endif
