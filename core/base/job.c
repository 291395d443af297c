/* job.c: long work on a thread of its own, with a file descriptor that becomes readable when it is done.
 *
 * Two references: the caller's (wane_job_free) and the thread's. The state is dropped by whoever leaves last, so a job may be
 * freed while it runs: it is cancelled and cleans up behind itself. After fork the child has no such thread: there the job
 * counts as lost (its pid differs). */
#include "base.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

struct wane_job {
  const wane_job_vtable *vtable;
  void *state;
  pthread_mutex_t lock;
  pthread_cond_t ended;
  _Atomic int refs, done, cancelled;
  _Atomic uint64_t progress, total;
  int status;                                  /* written before `done` */
  int fd;
  pid_t pid;
  char message[512];
};

static void unref(wane_job *job) {
  if (atomic_fetch_sub(&job->refs, 1) != 1) return;
  if (job->vtable->drop) job->vtable->drop(job->state);
  if (job->fd >= 0) close(job->fd);
  pthread_cond_destroy(&job->ended);
  pthread_mutex_destroy(&job->lock);
  wane_release(job);
}

static void *thread(void *arg) {
  wane_job *job = arg;
  int status = job->vtable->run(job, job->state);
  if (status < 0) wane_error_save(job->message, sizeof job->message);
  pthread_mutex_lock(&job->lock);
  job->status = status;
  atomic_store(&job->done, 1);
  uint64_t one = 1;
  if (job->fd >= 0) { ssize_t w = write(job->fd, &one, sizeof one); (void)w; }
  pthread_cond_broadcast(&job->ended);
  pthread_mutex_unlock(&job->lock);
  unref(job);
  return NULL;
}

int wane_job_start(wane_job **out, const wane_job_vtable *vtable, void *state) {
  wane_job *job = wane_alloc_zero(sizeof *job, "a job");
  if (!job) { if (vtable->drop) vtable->drop(state); return WANE_E_MEMORY; }
  job->vtable = vtable;
  job->state = state;
  job->pid = getpid();
  job->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  atomic_store(&job->refs, 2);
  pthread_mutex_init(&job->lock, NULL);
  pthread_condattr_t clock;
  pthread_condattr_init(&clock);
  pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
  pthread_cond_init(&job->ended, &clock);
  pthread_condattr_destroy(&clock);
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);    /* signals are the host's: none is delivered to this thread */
  pthread_attr_t attr;
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 512 << 10);
  pthread_t t;
  int e = pthread_create(&t, &attr, thread, job);
  pthread_attr_destroy(&attr);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  if (e) {
    atomic_store(&job->refs, 1);
    unref(job);
    errno = e;
    return wane_fail_errno(WANE_E_IO, "no thread could be started for background work");
  }
  *out = job;
  return WANE_OK;
}

int wane_job_poll(wane_job *job) {
  if (atomic_load(&job->done)) {
    if (job->status < 0) wane_error_restore(job->message);
    return job->status;
  }
  if (job->pid != getpid()) return wane_fail(WANE_E_FORKED, "this work was running in the parent process when it forked; start it again here");
  return WANE_PENDING;
}

int wane_job_fd(wane_job *job) { return job->fd; }

int wane_job_wait(wane_job *job, int64_t timeout_ns) {
  int status = wane_job_poll(job);
  if (status != WANE_PENDING) return status;
  struct timespec end;
  clock_gettime(CLOCK_MONOTONIC, &end);
  if (timeout_ns >= 0) {
    int64_t ns = end.tv_nsec + timeout_ns % 1000000000;
    end.tv_sec += timeout_ns / 1000000000 + ns / 1000000000;
    end.tv_nsec = ns % 1000000000;
  }
  pthread_mutex_lock(&job->lock);
  int e = 0;
  while (!atomic_load(&job->done) && e != ETIMEDOUT) e = timeout_ns < 0 ? pthread_cond_wait(&job->ended, &job->lock) : pthread_cond_timedwait(&job->ended, &job->lock, &end);
  pthread_mutex_unlock(&job->lock);
  status = wane_job_poll(job);
  return status == WANE_PENDING ? wane_fail(WANE_E_TIMEOUT, "the work did not end within %.3f s", (double)timeout_ns * 1e-9) : status;
}

void wane_job_cancel(wane_job *job) { atomic_store(&job->cancelled, 1); }
int wane_job_cancelled(const wane_job *job) { return atomic_load_explicit(&((wane_job *)job)->cancelled, memory_order_relaxed); }
void *wane_job_state(wane_job *job) { return job->state; }

void wane_job_set_progress(wane_job *job, uint64_t done, uint64_t total) {
  atomic_store_explicit(&job->total, total, memory_order_relaxed);
  atomic_store_explicit(&job->progress, done, memory_order_relaxed);
}

void wane_job_progress(wane_job *job, uint64_t *done, uint64_t *total) {
  *total = atomic_load_explicit(&job->total, memory_order_relaxed);
  *done = atomic_load_explicit(&job->progress, memory_order_relaxed);
}

void wane_job_free(wane_job *job) {
  if (!job) return;
  wane_job_cancel(job);
  unref(job);
}
