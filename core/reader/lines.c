/* lines.c: where the lines of a text file begin, so that any of them can be read without the others: training data larger than memory.
 *
 * One pass over the file on a job's thread; 8 bytes of memory a line. The file is read by place and never held. */
#include "reader.h"
#include <string.h>

enum { LINES_CHUNK = 1 << 20 };

struct wane_lines {
  wane_file file;
  uint64_t *start;                       /* of each line, and the end of the last */
  int64_t count, room;
};

typedef struct scanning { char *path; wane_lines *lines; } scanning;

void wane_lines_free(wane_lines *l) {
  if (!l) return;
  wane_file_close(&l->file);
  wane_release(l->start);
  wane_release(l);
}

static int add_line(wane_lines *l, uint64_t at) {
  if (l->count == l->room) {
    int64_t more = l->room ? l->room * 2 : 1024;
    uint64_t *grown = wane_regrow(l->start, (size_t)l->count * sizeof *grown, (size_t)more * sizeof *grown, "an index of lines");
    if (!grown) return WANE_E_MEMORY;
    l->start = grown;
    l->room = more;
  }
  l->start[l->count++] = at;
  return WANE_OK;
}

static int scan(wane_job *job, wane_lines *l, char *chunk) {
  uint64_t size = l->file.size, from = 0, begin = 0;
  if (size >= 3 && wane_file_read(&l->file, 0, chunk, 3) == WANE_OK && !memcmp(chunk, "\xef\xbb\xbf", 3)) from = begin = 3;      /* a byte order mark */
  for (; from < size;) {
    size_t n = size - from < LINES_CHUNK ? (size_t)(size - from) : LINES_CHUNK;
    int status = wane_file_read(&l->file, from, chunk, n);
    if (status != WANE_OK) return status;
    if (wane_job_cancelled(job)) return wane_fail(WANE_E_CANCELLED, "reading the lines of '%s' was cancelled", l->file.path);
    for (char *p = chunk, *end = chunk + n; (p = memchr(p, '\n', (size_t)(end - p))); ) {
      p++;
      if ((status = add_line(l, begin)) != WANE_OK) return status;
      begin = from + (uint64_t)(p - chunk);
      if (p == end) break;
    }
    from += n;
    wane_job_set_progress(job, from, size);
  }
  int status = begin < size ? add_line(l, begin) : WANE_OK;
  if (status == WANE_OK && (status = add_line(l, size)) == WANE_OK) l->count--;      /* the end is no line */
  return status;
}

static int scan_run(wane_job *job, void *state) {
  scanning *o = state;
  int status = wane_file_open(&o->lines->file, o->path);
  if (status != WANE_OK) return status;
  char *chunk = wane_alloc(LINES_CHUNK, "a part of a text file");
  if (!chunk) return WANE_E_MEMORY;
  status = scan(job, o->lines, chunk);
  wane_release(chunk);
  return status;
}

static void scan_drop(void *state) {
  scanning *o = state;
  wane_lines_free(o->lines);
  wane_release(o->path);
  wane_release(o);
}

static const wane_job_vtable scan_vtable = { scan_run, scan_drop };

int wane_lines_open(wane_job **out, const char *path) {
  *out = NULL;
  if (!path || !*path) return wane_fail(WANE_E_ARG, "the path of a text file is empty");
  scanning *o = wane_alloc_zero(sizeof *o, "an index of lines");
  if (!o) return WANE_E_MEMORY;
  o->path = wane_copy_string(path);
  o->lines = wane_alloc_zero(sizeof *o->lines, "an index of lines");
  if (!o->path || !o->lines) { wane_release(o->lines); wane_release(o->path); wane_release(o); return WANE_E_MEMORY; }
  o->lines->file.fd = -1;
  return wane_job_start(out, &scan_vtable, o);
}

int wane_lines_take(wane_job *job, wane_lines **out) {
  *out = NULL;
  int status = wane_job_poll(job);
  if (status != WANE_OK) return status;
  scanning *o = wane_job_state(job);
  if (!o->lines) return wane_fail(WANE_E_ARG, "this job's lines were taken before");
  *out = o->lines;
  o->lines = NULL;
  return WANE_OK;
}

int64_t wane_lines_count(const wane_lines *l) { return l->count; }

int64_t wane_lines_read(const wane_lines *l, int64_t i, char *text, int64_t room) {
  if (i < 0 || i >= l->count) return wane_fail(WANE_E_ARG, "'%s' has %lld lines; line %lld was asked for", l->file.path, (long long)l->count, (long long)i + 1);
  uint64_t from = l->start[i], n = l->start[i + 1] - from;
  char last;
  for (const char *end = "\n\r"; *end && n > 0; end++) {                     /* without its end: "\n" or "\r\n" */
    int status = wane_file_read(&l->file, from + n - 1, &last, 1);
    if (status != WANE_OK) return status;
    if (last == *end) n--;
    else if (*end == '\n') break;                    /* the last line, cut off */
  }
  if (n > INT64_MAX) return wane_fail(WANE_E_SHAPE, "line %lld of '%s' is too long", (long long)i + 1, l->file.path);
  if ((int64_t)n <= room && n > 0) {
    int status = wane_file_read(&l->file, from, text, (size_t)n);
    if (status != WANE_OK) return status;
  }
  return (int64_t)n;
}
