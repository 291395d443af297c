/* writer.c: a file that appears whole or not at all. Bytes go into a new file beside the destination; finishing flushes it to the
 * disk and renames it over the old one, on a job's thread, because a disk may take seconds. */
#include "reader.h"
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct wane_writer { char *path, *temporary; int fd; pid_t pid; };

void wane_writer_free(wane_writer *w) {
  if (!w) return;
  if (w->fd >= 0) close(w->fd);
  if (w->temporary && w->pid == getpid()) unlink(w->temporary);   /* a forked child's finalizer leaves the parent's file alone */
  wane_release(w->temporary);
  wane_release(w->path);
  wane_release(w);
}

/* "DIR/.NAME.PID.N.part": hidden, in the same directory (rename works within one file system only), and nobody else's. */
static char *temporary_name(const char *path) {
  static _Atomic unsigned serial;
  const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
  size_t room = strlen(path) + 64;
  char *t = wane_alloc(room, "a file's name");
  if (t) snprintf(t, room, "%.*s.%s.%ld.%u.part", (int)(name - path), path, name, (long)getpid(), atomic_fetch_add(&serial, 1));
  return t;
}

int wane_writer_open(wane_writer **out, const char *path) {
  *out = NULL;
  if (!path || !*path) return wane_fail(WANE_E_ARG, "the path of the file to write is empty");
  wane_writer *w = wane_alloc_zero(sizeof *w, "a writer");
  if (!w) return WANE_E_MEMORY;
  w->fd = -1;
  w->pid = getpid();
  w->path = wane_copy_string(path);
  char *temporary = w->path ? temporary_name(path) : NULL;
  if (!temporary) { wane_writer_free(w); return WANE_E_MEMORY; }
  w->fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (w->fd < 0) {
    int status = wane_fail_errno(WANE_E_IO, "cannot write '%s'", path);
    wane_release(temporary);
    wane_writer_free(w);
    return status;
  }
  w->temporary = temporary;
  *out = w;
  return WANE_OK;
}

int wane_writer_write(wane_writer *w, uint64_t offset, const void *data, size_t bytes) {
  const char *from = data;
  while (bytes) {
    ssize_t n = pwrite(w->fd, from, bytes, (off_t)offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return wane_fail_errno(WANE_E_IO, "cannot write '%s' at byte %llu (the old file stays)", w->path, (unsigned long long)offset);
    from += n; bytes -= (size_t)n; offset += (uint64_t)n;
  }
  return WANE_OK;
}

/* Some file systems refuse to flush a directory; what lies in it is safe by then. */
static void flush_folder(const char *folder) {
  int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0) { (void)!fsync(fd); close(fd); }
}

/* Makes the rename last: the directory is flushed too. */
static void flush_folder_of(const char *path) {
  const char *slash = strrchr(path, '/');
  char *folder = wane_copy_string(slash ? path : ".");
  if (!folder) return;
  if (slash) folder[slash == path ? 1 : slash - path] = 0;
  flush_folder(folder);
  wane_release(folder);
}

static int finish_run(wane_job *job, void *state) {
  wane_writer *w = state;
  if (fsync(w->fd)) return wane_fail_errno(WANE_E_IO, "cannot flush '%s' to the disk (the old file stays)", w->path);
  int closed = close(w->fd);
  w->fd = -1;
  if (closed) return wane_fail_errno(WANE_E_IO, "cannot finish '%s' (the old file stays)", w->path);
  if (wane_job_cancelled(job)) return wane_fail(WANE_E_CANCELLED, "writing '%s' was cancelled (the old file stays)", w->path);
  if (rename(w->temporary, w->path)) return wane_fail_errno(WANE_E_IO, "cannot rename the finished file to '%s'", w->path);
  wane_release(w->temporary);
  w->temporary = NULL;
  flush_folder_of(w->path);
  return WANE_OK;
}

static void finish_drop(void *state) { wane_writer_free(state); }
static const wane_job_vtable finish_vtable = { finish_run, finish_drop };

int wane_writer_finish(wane_writer *w, wane_job **out) {
  *out = NULL;
  return wane_job_start(out, &finish_vtable, w);
}

/* ---------------------------------------------------------------- folders */

static int flush_run(wane_job *job, void *state) {
  (void)job;
  flush_folder(state);
  return WANE_OK;
}

static const wane_job_vtable flush_vtable = { flush_run, wane_release };

int wane_path_flush(wane_job **out, const char *path) {
  *out = NULL;
  if (!path || !*path) return wane_fail(WANE_E_ARG, "the path of a directory is empty");
  char *folder = wane_copy_string(path);
  return folder ? wane_job_start(out, &flush_vtable, folder) : WANE_E_MEMORY;
}
