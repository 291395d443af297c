/* lines.c: where the lines of a text file begin, so that any of them can be read without the others: training data larger than memory.
 *
 * One pass over the file on a job's thread finds the lines, which of them are blank, and a checksum of all; 8 bytes of memory a line, and a blank line. The
 * file is read by place and never held. */
#include "reader.h"
#include <string.h>

enum { LINES_CHUNK = 1 << 20 };          /* a multiple of 32, as wane_hash_feed takes it */

typedef struct numbers { uint64_t *at; int64_t count, room; } numbers;

struct wane_lines {
  wane_file file;
  numbers start;                         /* of each line, and the end of the last */
  numbers blank;                         /* lines, from 0, that are empty or white space */
  uint64_t hash;                         /* of all but a byte order mark */
};

typedef struct scanning { char *path; wane_lines *lines; } scanning;

void wane_lines_free(wane_lines *l) {
  if (!l) return;
  wane_file_close(&l->file);
  wane_release(l->start.at);
  wane_release(l->blank.at);
  wane_release(l);
}

static int add(numbers *n, uint64_t value) {
  if (n->count == n->room) {
    int64_t more = n->room ? n->room * 2 : 1024;
    uint64_t *grown = wane_regrow(n->at, (size_t)n->count * sizeof *grown, (size_t)more * sizeof *grown, "an index of lines");
    if (!grown) return WANE_E_MEMORY;
    n->at = grown;
    n->room = more;
  }
  n->at[n->count++] = value;
  return WANE_OK;
}

static int add_line(wane_lines *l, uint64_t begin, int white) {
  int status = white ? add(&l->blank, (uint64_t)l->start.count) : WANE_OK;
  return status == WANE_OK ? add(&l->start, begin) : status;
}

/* White space is C's: space, tab, and what moves paper. Most lines are told by their first byte. */
static int is_white(const char *p, const char *end) {
  while (p < end && (*p == ' ' || (*p >= '\t' && *p <= '\r'))) p++;
  return p == end;
}

static int scan(wane_job *job, wane_lines *l, char *chunk) {
  uint64_t size = l->file.size, from = 0, begin = 0;
  wane_hash_state hash;
  wane_hash_begin(&hash);
  int status, white = 1;                             /* the line that begins at `begin`, as far as it was read */
  if (size >= 3 && wane_file_read(&l->file, 0, chunk, 3) == WANE_OK && !memcmp(chunk, "\xef\xbb\xbf", 3)) from = begin = 3;      /* a byte order mark */
  for (; from < size;) {
    size_t n = size - from < LINES_CHUNK ? (size_t)(size - from) : LINES_CHUNK;
    if ((status = wane_file_read(&l->file, from, chunk, n)) != WANE_OK) return status;
    if (wane_job_cancelled(job)) return wane_fail(WANE_E_CANCELLED, "reading the lines of '%s' was cancelled", l->file.path);
    const char *p = chunk, *end = chunk + n, *stop;
    for (; (stop = memchr(p, '\n', (size_t)(end - p))); p = stop + 1, white = 1) {
      if ((status = add_line(l, begin, white && is_white(p, stop))) != WANE_OK) return status;
      begin = from + (uint64_t)(stop + 1 - chunk);
    }
    white = white && is_white(p, end);
    size_t tail = n & 31;                            /* none but in the last part */
    wane_hash_feed(&hash, chunk, n - tail);
    if (from + n == size) l->hash = wane_hash_end(&hash, chunk + n - tail, tail);
    from += n;
    wane_job_set_progress(job, from, size);
  }
  status = begin < size ? add_line(l, begin, white) : WANE_OK;
  return status == WANE_OK ? add(&l->start, size) : status;
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

int64_t wane_lines_count(const wane_lines *l) { return l->start.count - 1; }      /* the end is no line */

uint64_t wane_lines_hash(const wane_lines *l) { return l->hash; }

int64_t wane_lines_blank(const wane_lines *l, const uint64_t **numbers) {
  *numbers = l->blank.at;
  return l->blank.count;
}

int64_t wane_lines_read(const wane_lines *l, int64_t i, char *text, int64_t room) {
  int64_t count = wane_lines_count(l);
  if (i < 0 || i >= count) return wane_fail(WANE_E_ARG, "'%s' has %lld lines; line %lld was asked for", l->file.path, (long long)count, (long long)i + 1);
  uint64_t from = l->start.at[i], n = l->start.at[i + 1] - from;
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
