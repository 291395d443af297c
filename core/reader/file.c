/* file.c: opening, reading and mapping files, and the counted blocks that weights lie in.
 *
 * A file is opened once, without following it into a pipe's or a device's blocking open, and its size is taken then. Mappings are
 * private and writable: a tensor over a file may be written like any other, and the file never changes. */
#include "reader.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---------------------------------------------------------------- files */

/* A git-lfs pointer is a text of about 130 bytes that begins with the word "version". */
static int is_lfs_pointer(const wane_file *f) {
  char head[8] = { 0 };
  return f->size < 1024 && f->size >= 8 && wane_file_read(f, 0, head, 8) == WANE_OK && !memcmp(head, "version ", 8);
}

int wane_file_open(wane_file *f, const char *path) {
  memset(f, 0, sizeof *f);
  f->fd = -1;
  f->path = wane_copy_string(path);
  if (!f->path) return WANE_E_MEMORY;
  int status = WANE_OK;
  struct stat st;
  f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (f->fd < 0) status = wane_fail_errno(WANE_E_IO, "cannot open '%s'", path);
  else if (fstat(f->fd, &st)) status = wane_fail_errno(WANE_E_IO, "cannot ask for the size of '%s'", path);
  else if (S_ISDIR(st.st_mode)) status = wane_fail(WANE_E_IO, "'%s' is a directory, a file was expected", path);
  else if (!S_ISREG(st.st_mode)) status = wane_fail(WANE_E_IO, "'%s' is no regular file", path);
  else if (st.st_size == 0) status = wane_fail(WANE_E_FORMAT, "'%s' is empty: download it again", path);
  if (status == WANE_OK) {
    f->size = (uint64_t)st.st_size;
    if (is_lfs_pointer(f))
      status = wane_fail(WANE_E_FORMAT, "'%s' is a git-lfs pointer, not the weights: run `git lfs pull` in its folder, or download the file itself", path);
  }
  if (status != WANE_OK) wane_file_close(f);
  return status;
}

void wane_file_close(wane_file *f) {
  if (f->mapping) wane_mapping_unref(f->mapping);
  if (f->fd >= 0) close(f->fd);
  wane_release(f->path);
  memset(f, 0, sizeof *f);
  f->fd = -1;
}

int wane_file_read(const wane_file *f, uint64_t offset, void *data, size_t bytes) {
  char *to = data;
  while (bytes) {
    ssize_t n = pread(f->fd, to, bytes, (off_t)offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return wane_fail_errno(WANE_E_IO, "cannot read '%s' at byte %llu", f->path, (unsigned long long)offset);
    if (n == 0)
      return wane_fail(WANE_E_IO, "'%s' ended at byte %llu, %zu bytes short: it was truncated after it was opened", f->path,
                       (unsigned long long)offset, bytes);
    to += n; offset += (uint64_t)n; bytes -= (size_t)n;
  }
  return WANE_OK;
}

/* ---------------------------------------------------------------- mappings */

static wane_mapping *mapping_new(void) {
  wane_mapping *m = wane_alloc_zero(sizeof *m, "a mapping");
  if (m) m->refs = 1;
  return m;
}

int wane_file_map(wane_file *f) {
  if (f->mapping) return WANE_OK;
  struct stat st;
  if (fstat(f->fd, &st) || (uint64_t)st.st_size != f->size)
    return wane_fail(WANE_E_IO, "'%s' changed its size since it was opened (%llu bytes then): open it again", f->path, (unsigned long long)f->size);
  wane_mapping *m = mapping_new();
  if (!m) return WANE_E_MEMORY;
  m->kind = WANE_MAPPING_FILE;
  m->bytes = (size_t)f->size;
  m->base = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, f->fd, 0);
  if (m->base == MAP_FAILED) {
    wane_fail_errno(WANE_E_MEMORY, "cannot map the %zu bytes of '%s' (loading with io = \"read\" needs no mapping)", m->bytes, f->path);
    wane_release(m);
    return WANE_E_MEMORY;
  }
  wane_count_mapped((int64_t)m->bytes);
  f->mapping = m;
  return WANE_OK;
}

enum { PAGES_FROM = 64 << 10 };

wane_mapping *wane_mapping_block(size_t bytes, const char *what) {
  wane_mapping *m = mapping_new();
  if (!m) return NULL;
  m->kind = bytes >= PAGES_FROM ? WANE_MAPPING_PAGES : WANE_MAPPING_HEAP;
  m->bytes = bytes;
  m->base = m->kind == WANE_MAPPING_PAGES ? wane_pages_dense(bytes, what) : wane_alloc(bytes ? bytes : 1, what);
  if (!m->base) { wane_release(m); return NULL; }
  return m;
}

wane_mapping *wane_mapping_scratch(const char *dir, size_t bytes) {
  char path[4096];
  int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) {                                       /* a file system without nameless files */
    if (snprintf(path, sizeof path, "%s/.wane-XXXXXX", dir) >= (int)sizeof path) { wane_fail(WANE_E_ARG, "the path '%.64s…' is too long", dir); return NULL; }
    fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0) { wane_fail_errno(WANE_E_IO, "cannot make a file in '%s' for memory that may be written out", dir); return NULL; }
    unlink(path);
  }
  /* The whole file at once: a disk that is full later would be a SIGBUS. */
  int error = posix_fallocate(fd, 0, (off_t)bytes);
  void *base = error ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (error) errno = error;
  if (base == MAP_FAILED) wane_fail_errno(WANE_E_IO, "cannot have %zu bytes of a file in '%s' as memory", bytes, dir);
  close(fd);
  if (base == MAP_FAILED) return NULL;
  wane_mapping *m = mapping_new();
  if (!m) { munmap(base, bytes); return NULL; }
  m->kind = WANE_MAPPING_FILE;
  m->base = base;
  m->bytes = bytes;
  wane_count_mapped((int64_t)bytes);
  return m;
}

wane_mapping *wane_mapping_ref(wane_mapping *m) {
  atomic_fetch_add((_Atomic int32_t *)&m->refs, 1);
  return m;
}

void wane_mapping_unref(wane_mapping *m) {
  if (!m || atomic_fetch_sub((_Atomic int32_t *)&m->refs, 1) != 1) return;
  if (m->kind == WANE_MAPPING_FILE) {
    munmap(m->base, m->bytes);
    wane_count_mapped(-(int64_t)m->bytes);
  } else if (m->kind == WANE_MAPPING_PAGES) {
    wane_pages_free(m->base, m->bytes);
  } else {
    wane_release(m->base);
  }
  wane_release(m);
}

/* ---------------------------------------------------------------- paths */

int wane_path_kind(const char *path) {
  struct stat st;
  if (!path || stat(path, &st)) return WANE_PATH_NONE;
  return S_ISREG(st.st_mode) ? WANE_PATH_FILE : S_ISDIR(st.st_mode) ? WANE_PATH_FOLDER : WANE_PATH_OTHER;
}

int wane_path_make(const char *path) {
  if (!path || !*path) return wane_fail(WANE_E_ARG, "the path of a directory is empty");
  char *copy = wane_copy_string(path);
  if (!copy) return WANE_E_MEMORY;
  int status = WANE_OK;
  for (char *p = copy + 1; status == WANE_OK; p++) {
    if (*p != '/' && *p != 0) continue;
    char kept = *p;
    *p = 0;
    if (mkdir(copy, 0777) && errno != EEXIST) status = wane_fail_errno(WANE_E_IO, "cannot make the directory '%s'", copy);
    *p = kept;
    if (!kept) break;
  }
  wane_release(copy);
  if (status == WANE_OK && wane_path_kind(path) != WANE_PATH_FOLDER) status = wane_fail(WANE_E_IO, "'%s' exists and is no directory", path);
  return status;
}

int wane_path_stat(const char *path, uint64_t *bytes, int64_t *changed) {
  struct stat st;
  if (!path || stat(path, &st)) return wane_fail_errno(WANE_E_IO, "cannot look at '%s'", path ? path : "");
  if (bytes) *bytes = (uint64_t)st.st_size;
  if (changed) *changed = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
  return WANE_OK;
}

int64_t wane_path_list(const char *path, char *names, int64_t room) {
  DIR *folder = path ? opendir(path) : NULL;
  if (!folder) return wane_fail_errno(WANE_E_IO, "cannot list '%s'", path ? path : "");
  int64_t used = 0;
  for (struct dirent *e; (e = readdir(folder));) {
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    int64_t bytes = (int64_t)strlen(e->d_name) + 1;
    if (used + bytes <= room) memcpy(names + used, e->d_name, (size_t)bytes);
    used += bytes;
  }
  closedir(folder);
  return used;
}
