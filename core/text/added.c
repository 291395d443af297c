/* added.c: added tokens: those that are cut out of the text before (or right after) it is normalized. The search is
 * leftmost-longest over a sorted list, narrowed byte by byte. */
#include "text.h"
#include <stdlib.h>

enum { LONGEST = 4096 };                /* bytes; bounds the work at each place of the text */

/* Notes an added token; ids are settled once the vocabulary is complete. */
int text_add_added(wane_tokenizer *t, int64_t id, const char *s, size_t n, int flags) {
  if (n == 0) return 0;                 /* upstream ignores them */
  if (n > LONGEST) return wane_fail(WANE_E_FORMAT, "an added token of %zu bytes; at most %d", n, LONGEST);
  if (id < -1 || id >= TEXT_MAX_ID) return wane_fail(WANE_E_FORMAT, "the added token '%.*s' has the id %lld", (int)(n < 60 ? n : 60), s, (long long)id);
  if (t->added_n == t->added_cap) {
    void *p = text_grow(t->added, t->added_n, &t->added_cap, sizeof *t->added, "added tokens");
    if (!p) return WANE_E_MEMORY;
    t->added = p;
  }
  if (t->added_bytes.n + n > TEXT_MAX_BYTES) return wane_fail(WANE_E_FORMAT, "more than %d bytes of added tokens", TEXT_MAX_BYTES);
  uint32_t start = (uint32_t)t->added_bytes.n;
  text_add(&t->added_bytes, s, n);
  if (t->added_bytes.failed) return t->added_bytes.failed;
  text_span at = { start, (uint32_t)t->added_bytes.n };
  t->added[t->added_n++] = (text_added){ (int32_t)id, flags | WANE_TOKEN_ADDED, at, at };
  return 0;
}

/* The id of an added token: the vocabulary's, else the next one behind the vocabulary and the added tokens before it; the id that the
 * file states is not asked (tokenizers, added_vocabulary.rs `add_tokens`). */
static int settle_id(wane_tokenizer *t, text_added *a, int64_t *next) {
  const char *s = t->added_bytes.data + a->at.start;
  size_t n = a->at.end - a->at.start;
  int32_t id = text_table_find(&t->vocab, s, n);
  if (id < 0) {
    int status = text_table_add(&t->vocab, *next, s, n);
    if (status) return status;
    id = (int32_t)*next;
  }
  a->id = id;
  if (id >= *next) *next = id + 1;
  return 0;
}

static int by_id(const void *a, const void *b) {
  const text_added *x = a, *y = b;
  if (x->id != y->id) return x->id < y->id ? -1 : 1;
  return x->at.start < y->at.start ? -1 : x->at.start > y->at.start;
}

/* Settles the ids and sorts by them; of several entries for a token the last counts. */
int text_settle_added(wane_tokenizer *t) {
  size_t kept = 0;
  int64_t next = t->model_tokens ? t->model_tokens : (t->model_tokens = t->vocab.count);
  for (size_t i = 0; i < t->added_n; i++) {
    int status = settle_id(t, &t->added[i], &next);
    if (status) return status;
  }
  if (t->added_n) qsort(t->added, t->added_n, sizeof *t->added, by_id);
  for (size_t i = 0; i < t->added_n; i++) {
    if (i + 1 < t->added_n && t->added[i + 1].id == t->added[i].id) continue;
    t->added[kept++] = t->added[i];
  }
  t->added_n = kept;
  return 0;
}

const text_added *text_added_of(const wane_tokenizer *t, int32_t id) {
  size_t low = 0, high = t->added_n;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (t->added[middle].id < id) low = middle + 1;
    else high = middle;
  }
  return low < t->added_n && t->added[low].id == id ? &t->added[low] : NULL;
}

/* ---------------------------------------------------------------- searching */

static text_span pattern(const wane_tokenizer *t, int32_t i, int normalized) { return normalized ? t->added[i].norm : t->added[i].at; }

typedef struct sorting { const wane_tokenizer *t; int normalized; } sorting;

static int by_bytes(const void *a, const void *b, void *ctx) {
  const sorting *c = ctx;
  text_span x = pattern(c->t, *(const int32_t *)a, c->normalized), y = pattern(c->t, *(const int32_t *)b, c->normalized);
  uint32_t n = x.end - x.start, m = y.end - y.start;
  int order = memcmp(c->t->added_bytes.data + x.start, c->t->added_bytes.data + y.start, n < m ? n : m);
  if (order) return order;
  if (n != m) return n < m ? -1 : 1;
  return *(const int32_t *)a < *(const int32_t *)b ? -1 : 1;
}

int text_index_build(wane_tokenizer *t, text_index *ix, int normalized) {
  sorting c = { t, normalized };
  wane_release(ix->order);
  memset(ix, 0, sizeof *ix);
  if (!(ix->order = wane_alloc((t->added_n + 1) * sizeof *ix->order, "added tokens"))) return WANE_E_MEMORY;
  for (size_t i = 0; i < t->added_n; i++) {
    text_span p = pattern(t, (int32_t)i, normalized);
    if (!(t->added[i].flags & WANE_TOKEN_NORMALIZED) == !normalized && p.end > p.start) ix->order[ix->n++] = (int32_t)i;
  }
  if (ix->n) qsort_r(ix->order, ix->n, sizeof *ix->order, by_bytes, &c);
  for (size_t i = 0, b = 0; b <= 256; b++) {
    while (i < ix->n && (unsigned char)t->added_bytes.data[pattern(t, ix->order[i], normalized).start] < b) i++;
    ix->first[b] = (uint32_t)i;
  }
  return 0;
}

/* Longest added token that begins at s: its place in the index, or -1. */
static int64_t longest(const wane_tokenizer *t, const text_index *ix, int normalized, const char *s, size_t n, size_t *length) {
  size_t low = ix->first[(unsigned char)*s], high = ix->first[(unsigned char)*s + 1];
  int64_t best = -1;
  for (uint32_t depth = 1; low < high; depth++) {
    text_span p = pattern(t, ix->order[low], normalized);
    if (p.end - p.start == depth) { best = (int64_t)low; *length = depth; }
    while (low < high && (p = pattern(t, ix->order[low], normalized), p.end - p.start == depth)) low++;
    if (depth >= n) break;
    unsigned char c = (unsigned char)s[depth];
    size_t a = low, b = high;
    while (a < b) {
      size_t middle = (a + b) / 2;
      if ((unsigned char)t->added_bytes.data[pattern(t, ix->order[middle], normalized).start + depth] < c) a = middle + 1;
      else b = middle;
    }
    low = a;
    for (b = high; a < b;) {
      size_t middle = (a + b) / 2;
      if ((unsigned char)t->added_bytes.data[pattern(t, ix->order[middle], normalized).start + depth] <= c) a = middle + 1;
      else b = middle;
    }
    high = a;
  }
  return best;
}

const text_added *text_index_next(const wane_tokenizer *t, const text_index *ix, int normalized, const char *s, size_t n, size_t from, text_span *at) {
  if (!ix->n) return NULL;
  for (size_t i = from; i < n; i++) {
    size_t length = 0;
    if (ix->first[(unsigned char)s[i]] == ix->first[(unsigned char)s[i] + 1]) continue;
    int64_t k = longest(t, ix, normalized, s + i, n - i, &length);
    if (k < 0) continue;
    *at = (text_span){ (uint32_t)i, (uint32_t)(i + length) };
    return &t->added[ix->order[k]];
  }
  return NULL;
}
