/* lock.c: a file that one process at a time holds. The lock is the kernel's (flock): it goes with the process, however that ends, so a file
 * that a killed one left means nothing. What stands in it, the holder's number and machine, is for messages alone.
 *
 * Whoever lets go removes the file first. Another may have opened it by then, and gets a lock on a file that no path leads to any more:
 * it looks whether its file is still the path's, and begins again. */
#include "reader.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { LOCK_PAUSE = 20 * 1000 * 1000 /* ns between two tries */ };

struct wane_lock { char *path; int fd; pid_t pid; };
typedef struct taking { wane_lock *lock; int64_t patience; } taking;

static int is_at(int fd, const char *path) {
  struct stat ours, named;
  return !fstat(fd, &ours) && !stat(path, &named) && ours.st_dev == named.st_dev && ours.st_ino == named.st_ino;
}

void wane_lock_free(wane_lock *l) {
  if (!l) return;
  if (l->fd >= 0) {
    /* Not a forked child's finalizer, and not the file of another who found the folder removed and made it again. */
    if (l->pid == getpid() && is_at(l->fd, l->path)) unlink(l->path);
    close(l->fd);
  }
  wane_release(l->path);
  wane_release(l);
}

/* WANE_OK with l->fd open and locked, WANE_PENDING where another holds it, or an error. */
static int try_lock(wane_lock *l) {
  for (;;) {
    int fd = open(l->path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return wane_fail_errno(WANE_E_IO, "cannot write '%s'", l->path);
    int held = flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK;      /* other errors: a file system without locks, and nobody is refused there */
    if (!held && is_at(fd, l->path)) return l->fd = fd, WANE_OK;
    close(fd);
    if (held) return WANE_PENDING;
  }
}

/* The holder's name goes into the file; a disk too full for it is no reason not to hold the lock. */
static void sign(int fd) {
  char host[64] = "";
  gethostname(host, sizeof host - 1);
  if (!ftruncate(fd, 0)) dprintf(fd, "%ld on %s", (long)getpid(), host);
}

static int refuse(const wane_lock *l) {
  char holder[96] = "";
  int fd = open(l->path, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? 0 : read(fd, holder, sizeof holder - 1);
  if (fd >= 0) close(fd);
  return wane_fail(WANE_E_TIMEOUT, "'%s' is held by process %s", l->path, n > 0 ? holder : "(unknown)");
}

static int take_run(wane_job *job, void *state) {
  taking *o = state;
  double until = wane_clock() + (double)o->patience * 1e-9;
  int status;
  while ((status = try_lock(o->lock)) == WANE_PENDING && wane_clock() < until) {
    if (wane_job_cancelled(job)) return wane_fail(WANE_E_CANCELLED, "waiting for '%s' was cancelled", o->lock->path);
    nanosleep(&(struct timespec){ .tv_nsec = LOCK_PAUSE }, NULL);
  }
  if (status == WANE_PENDING) return refuse(o->lock);
  if (status == WANE_OK) sign(o->lock->fd);
  return status;
}

static void take_drop(void *state) {
  taking *o = state;
  wane_lock_free(o->lock);
  wane_release(o);
}

static const wane_job_vtable take_vtable = { take_run, take_drop };

int wane_lock_open(wane_job **out, const char *path, int64_t patience) {
  *out = NULL;
  if (!path || !*path) return wane_fail(WANE_E_ARG, "the path of a lock is empty");
  taking *o = wane_alloc_zero(sizeof *o, "a lock");
  if (!o) return WANE_E_MEMORY;
  o->patience = patience;
  o->lock = wane_alloc_zero(sizeof *o->lock, "a lock");
  if (o->lock) {
    o->lock->fd = -1;
    o->lock->pid = getpid();
    o->lock->path = wane_copy_string(path);
  }
  if (!o->lock || !o->lock->path) { take_drop(o); return WANE_E_MEMORY; }
  return wane_job_start(out, &take_vtable, o);
}

int wane_lock_take(wane_job *job, wane_lock **out) {
  *out = NULL;
  int status = wane_job_poll(job);
  if (status != WANE_OK) return status;
  taking *o = wane_job_state(job);
  if (!o->lock) return wane_fail(WANE_E_ARG, "this job's lock was taken before");
  *out = o->lock;
  o->lock = NULL;
  return WANE_OK;
}
