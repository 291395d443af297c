/* checksum.c: the checksum of a whole file, on a job's thread; the file is read in parts and never held. */
#include "reader.h"

enum { HASH_CHUNK = 1 << 20 };           /* a multiple of 32, as wane_hash_feed takes it */

typedef struct hashing { char *path; uint64_t hash; } hashing;

static int hash_all(wane_job *job, const wane_file *f, char *chunk, uint64_t *hash) {
  wane_hash_state s;
  uint64_t at = 0;
  wane_hash_begin(&s);
  for (;;) {
    size_t n = f->size - at < HASH_CHUNK ? (size_t)(f->size - at) : HASH_CHUNK, whole = n & ~(size_t)31;
    int status = wane_file_read(f, at, chunk, n);
    if (status != WANE_OK) return status;
    if (wane_job_cancelled(job)) return wane_fail(WANE_E_CANCELLED, "reading '%s' was cancelled", f->path);
    wane_hash_feed(&s, chunk, whole);
    at += n;
    wane_job_set_progress(job, at, f->size);
    if (at == f->size) { *hash = wane_hash_end(&s, chunk + whole, n - whole); return WANE_OK; }
  }
}

static int hash_run(wane_job *job, void *state) {
  hashing *o = state;
  wane_file file;
  int status = wane_file_open(&file, o->path);
  if (status != WANE_OK) return status;
  char *chunk = wane_alloc(HASH_CHUNK, "a part of a file");
  status = chunk ? hash_all(job, &file, chunk, &o->hash) : WANE_E_MEMORY;
  wane_release(chunk);
  wane_file_close(&file);
  return status;
}

static void hash_drop(void *state) {
  hashing *o = state;
  wane_release(o->path);
  wane_release(o);
}

static const wane_job_vtable hash_vtable = { hash_run, hash_drop };

int wane_hash_file(wane_job **out, const char *path) {
  *out = NULL;
  if (!path || !*path) return wane_fail(WANE_E_ARG, "the path of a file is empty");
  hashing *o = wane_alloc_zero(sizeof *o, "a checksum");
  if (!o) return WANE_E_MEMORY;
  o->path = wane_copy_string(path);
  if (!o->path) { wane_release(o); return WANE_E_MEMORY; }
  return wane_job_start(out, &hash_vtable, o);
}

int wane_hash_take(wane_job *job, uint64_t *hash) {
  int status = wane_job_poll(job);
  if (status == WANE_OK) *hash = ((hashing *)wane_job_state(job))->hash;
  return status;
}
