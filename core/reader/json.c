/* json.c: large JSON read by yajl, a streaming parser, straight from a file in pieces.
 *
 * yajl (2.1.0) does not look at what its allocator returns. Its blocks therefore come from a list kept here, and an allocation that
 * fails leaves the parser by longjmp: the list is freed as a whole, whatever state yajl was in. */
#include "reader.h"
#include <setjmp.h>
#include <string.h>
#include <yajl/yajl_parse.h>

typedef struct block { struct block *next, *prev; size_t bytes; char pad[40]; } block;
typedef struct pool { block head; jmp_buf failed; } pool;

static void unlink_block(block *b) { b->prev->next = b->next; b->next->prev = b->prev; }

static void *pool_alloc(void *context, size_t bytes) {
  pool *p = context;
  block *b = bytes > SIZE_MAX - sizeof *b ? NULL : wane_alloc(sizeof *b + bytes, "JSON");
  if (!b) longjmp(p->failed, 1);
  b->bytes = bytes;
  b->next = p->head.next;
  b->prev = &p->head;
  b->next->prev = p->head.next = b;
  return b + 1;
}

static void pool_free(void *context, void *at) {
  (void)context;
  if (!at) return;
  block *b = (block *)at - 1;
  unlink_block(b);
  wane_release(b);
}

static void *pool_realloc(void *context, void *at, size_t bytes) {
  void *fresh = pool_alloc(context, bytes);
  if (at) {
    size_t old = ((block *)at - 1)->bytes;
    memcpy(fresh, at, old < bytes ? old : bytes);
    pool_free(context, at);
  }
  return fresh;
}

/* Turns yajl's complaint into ours; the place is a byte of the file. */
static int complain(const wane_json_source *src, yajl_handle h, const unsigned char *text, size_t n, uint64_t at) {
  unsigned char *said = yajl_get_error(h, 0, text, n);
  char *end = strchr((char *)said, '\n');
  if (end) *end = 0;
  int status = wane_fail(WANE_E_FORMAT, "%s of '%s' is no valid JSON near byte %llu: %s", src->what, src->file->path,
                         (unsigned long long)(at + yajl_get_bytes_consumed(h)), (char *)said);
  yajl_free_error(h, said);
  return status;
}

enum { PIECE = 256 << 10 };

/* Feeds the file's bytes piece by piece. */
static int feed(const wane_json_source *src, yajl_handle h, unsigned char *text) {
  yajl_status s = yajl_status_ok;
  uint64_t done = 0;
  size_t n = 0;
  while (done < src->bytes && s == yajl_status_ok) {
    if (src->job && wane_job_cancelled(src->job)) return wane_fail(WANE_E_CANCELLED, "opening '%s' was cancelled", src->file->path);
    n = src->bytes - done < PIECE ? (size_t)(src->bytes - done) : PIECE;
    int status = wane_file_read(src->file, src->offset + done, text, n);
    if (status != WANE_OK) return status;
    s = yajl_parse(h, text, n);
    if (s != yajl_status_ok) break;
    done += n;
  }
  if (s == yajl_status_ok) { n = 0; s = yajl_complete_parse(h); }
  if (s == yajl_status_error) return complain(src, h, text, n, src->offset + done);
  return s == yajl_status_ok ? WANE_OK : WANE_E_FORMAT;   /* a callback stopped it, and said why */
}

int wane_json_parse(const wane_json_source *src, const void *callbacks, void *context) {
  pool p;
  p.head.next = p.head.prev = &p.head;
  yajl_alloc_funcs functions = { pool_alloc, pool_realloc, pool_free, &p };
  unsigned char *text = wane_alloc(PIECE, "JSON");
  if (!text) return WANE_E_MEMORY;
  volatile int status = WANE_E_MEMORY;
  if (!setjmp(p.failed)) {
    yajl_handle h = yajl_alloc(callbacks, &functions, context);
    status = feed(src, h, text);
    yajl_free(h);
  }
  while (p.head.next != &p.head) pool_free(&p, p.head.next + 1);
  wane_release(text);
  return status;
}
