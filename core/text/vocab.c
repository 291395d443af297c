/* vocab.c: the large tables of a tokenizer: tokens by string and by id, merges by pair of ids. Open addressing with linear
 * probing, at most half full; the strings lie in one arena. 256k tokens and 500k merges take about 30 MB. */
#include "text.h"

/* wyhash's mixing on 8-byte words; only the tables see it, so that it may differ between runs (the arena's address salts it,
 * which keeps a prepared file from colliding on purpose). */
static uint32_t hash_of(const text_table *t, const char *s, size_t n) {
  uint64_t h = 0x9e3779b97f4a7c15u ^ (uint64_t)(uintptr_t)t ^ n;
  while (n >= 8) {
    uint64_t w;
    memcpy(&w, s, 8);
    __uint128_t m = (__uint128_t)(h ^ w) * 0xa0761d6478bd642fu;
    h = (uint64_t)m ^ (uint64_t)(m >> 64);
    s += 8;
    n -= 8;
  }
  uint64_t w = 0;
  memcpy(&w, s, n);
  __uint128_t m = (__uint128_t)(h ^ w ^ (uint64_t)n << 56) * 0xe7037ed1a0b428dbu;
  h = (uint64_t)m ^ (uint64_t)(m >> 64);
  return (uint32_t)(h ^ h >> 32);
}

static int rehash(text_table *t, size_t size) {
  text_slot *slots = wane_alloc(size * sizeof *slots, "a vocabulary's index");
  if (!slots) return WANE_E_MEMORY;
  for (size_t i = 0; i < size; i++) slots[i].id = -1;
  for (size_t i = 0; t->slots && i <= t->mask; i++) {
    if (t->slots[i].id < 0) continue;
    size_t k = t->slots[i].hash & (size - 1);
    while (slots[k].id >= 0) k = (k + 1) & (size - 1);
    slots[k] = t->slots[i];
  }
  wane_release(t->slots);
  t->slots = slots;
  t->mask = size - 1;
  return 0;
}

int32_t text_table_find(const text_table *t, const char *s, size_t n) {
  if (!t->slots) return -1;
  uint32_t h = hash_of(t, s, n);
  for (size_t k = h & t->mask; t->slots[k].id >= 0; k = (k + 1) & t->mask) {
    if (t->slots[k].hash != h) continue;
    text_span at = t->at[t->slots[k].id];
    if (at.end - at.start == n && !memcmp(t->bytes.data + at.start, s, n)) return t->slots[k].id;
  }
  return -1;
}

int text_table_has(const text_table *t, int64_t id) { return id >= 0 && (size_t)id < t->ids && t->at[id].start != UINT32_MAX; }

const char *text_table_get(const text_table *t, int32_t id, size_t *n) {
  if (!text_table_has(t, id)) return NULL;
  *n = t->at[id].end - t->at[id].start;
  return t->bytes.data + t->at[id].start;
}

int text_table_reserve(text_table *t, int64_t id, const char *s, size_t n) {
  /* A few ids may be missing, but a tiny file may not claim a table of millions. */
  if (id < 0 || id >= TEXT_MAX_ID || id > (1 << 20) + 8 * t->count)
    return wane_fail(WANE_E_FORMAT, "token id %lld of '%.*s' is out of range: %lld tokens so far, and ids end at %d", (long long)id, (int)(n < 40 ? n : 40), s,
                     (long long)t->count, TEXT_MAX_ID - 1);
  if (text_table_has(t, id)) return wane_fail(WANE_E_FORMAT, "two tokens have the id %lld, the second is '%.*s'", (long long)id, (int)(n < 40 ? n : 40), s);
  if ((size_t)id >= t->at_cap) {
    size_t cap = t->at_cap ? t->at_cap : 1024;
    while (cap <= (size_t)id) cap *= 2;
    void *p = wane_regrow(t->at, t->ids * sizeof *t->at, cap * sizeof *t->at, "a vocabulary");
    if (!p) return WANE_E_MEMORY;
    t->at = p;
    t->at_cap = cap;
  }
  for (; t->ids <= (size_t)id; t->ids++) t->at[t->ids] = (text_span){ UINT32_MAX, UINT32_MAX };
  if (t->bytes.n + n > TEXT_MAX_BYTES) return wane_fail(WANE_E_FORMAT, "a vocabulary of more than %d bytes", TEXT_MAX_BYTES);
  size_t start = t->bytes.n;
  if (!text_room(&t->bytes, n + 1)) return t->bytes.failed;
  text_add(&t->bytes, s, n);
  t->at[id] = (text_span){ (uint32_t)start, (uint32_t)t->bytes.n };
  t->count++;
  return 0;
}

int text_table_add(text_table *t, int64_t id, const char *s, size_t n) {
  if (2 * ((size_t)t->count + 1) > t->mask) {
    int status = rehash(t, t->slots ? 2 * (t->mask + 1) : 2048);
    if (status) return status;
  }
  uint32_t h = hash_of(t, s, n);
  size_t k = h & t->mask;
  for (; t->slots[k].id >= 0; k = (k + 1) & t->mask) {
    if (t->slots[k].hash != h) continue;
    text_span at = t->at[t->slots[k].id];
    if (at.end - at.start == n && !memcmp(t->bytes.data + at.start, s, n))
      return wane_fail(WANE_E_FORMAT, "the token '%.*s' is there twice (ids %d and %lld)", (int)(n < 40 ? n : 40), s, t->slots[k].id, (long long)id);
  }
  int status = text_table_reserve(t, id, s, n);
  if (status) return status;
  t->slots[k] = (text_slot){ h, (int32_t)id };
  return 0;
}

void text_table_free(text_table *t) {
  text_free(&t->bytes);
  wane_release(t->at);
  wane_release(t->slots);
  memset(t, 0, sizeof *t);
}

/* ---------------------------------------------------------------- merges */

static size_t pair_slot(uint64_t pair, size_t mask) { return (size_t)((pair * 0x9e3779b97f4a7c15u) >> 29) & mask; }

const text_merge *text_merges_find(const text_merges *m, int32_t left, int32_t right) {
  if (!m->slots) return NULL;
  uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  for (size_t k = pair_slot(pair, m->mask); m->slots[k].id >= 0; k = (k + 1) & m->mask)
    if (m->slots[k].pair == pair) return &m->slots[k];
  return NULL;
}

int text_add_merge(wane_tokenizer *t, const char *left, size_t left_n, const char *right, size_t right_n) {
  if (t->pending_n == t->pending_cap) {
    void *p = text_grow(t->pending, t->pending_n, &t->pending_cap, sizeof *t->pending, "merges");
    if (!p) return WANE_E_MEMORY;
    t->pending = p;
  }
  if (t->merge_bytes.n + left_n + right_n > TEXT_MAX_BYTES || t->pending_n >= TEXT_MAX_ID)
    return wane_fail(WANE_E_FORMAT, "more merges than %d, or more than %d bytes of them", TEXT_MAX_ID, TEXT_MAX_BYTES);
  text_pending *p = &t->pending[t->pending_n++];
  p->start = (uint32_t)t->merge_bytes.n;
  text_add(&t->merge_bytes, left, left_n);
  p->middle = (uint32_t)t->merge_bytes.n;
  text_add(&t->merge_bytes, right, right_n);
  p->end = (uint32_t)t->merge_bytes.n;
  return t->merge_bytes.failed;
}

/* The three ids of merge i: left, right, result. 1 when it is to be left out. The result drops the right part's
 * continuing_subword_prefix (tokenizers, bpe/model.rs). */
static int resolve_one(wane_tokenizer *t, size_t i, text_buf *joined, uint32_t *ids) {
  text_pending p = t->pending[i];
  const char *bytes = t->merge_bytes.data;
  size_t left_n = p.middle - p.start, right_n = p.end - p.middle;
  int32_t left = text_table_find(&t->vocab, bytes + p.start, left_n), right = text_table_find(&t->vocab, bytes + p.middle, right_n);
  size_t cut = t->prefix_n < right_n ? t->prefix_n : 0;
  joined->n = 0;
  text_add(joined, bytes + p.start, left_n);
  text_add(joined, bytes + p.middle + cut, right_n - cut);
  if (joined->failed) return joined->failed;
  int32_t whole = text_table_find(&t->vocab, joined->data, joined->n);
  if (left < 0 || right < 0 || whole < 0) {
    if (t->skip_bad_merges) return 1;
    return wane_fail(WANE_E_FORMAT, "merge %zu ('%.*s' and '%.*s') names a token that the vocabulary does not have", i, (int)(left_n < 40 ? left_n : 40),
                     bytes + p.start, (int)(right_n < 40 ? right_n : 40), bytes + p.middle);
  }
  ids[0] = (uint32_t)left;
  ids[1] = (uint32_t)right;
  ids[2] = (uint32_t)whole;
  return 0;
}

int text_resolve(wane_tokenizer *t, wane_job *job) {
  size_t size = 16;
  while (size < 2 * t->pending_n) size *= 2;
  text_merge *slots = wane_alloc(size * sizeof *slots, "merges");
  text_buf joined = { 0 };
  int status = slots ? 0 : WANE_E_MEMORY;
  for (size_t i = 0; slots && i < size; i++) slots[i].id = -1;
  wane_release(t->merges.slots);
  t->merges = (text_merges){ slots, size - 1, 0 };
  for (size_t i = 0; i < t->pending_n && status >= 0; i++) {
    uint32_t ids[3] = { 0 };
    if (i % 4096 == 0 && job && wane_job_cancelled(job)) { status = wane_fail(WANE_E_CANCELLED, "reading the tokenizer was cancelled"); break; }
    status = resolve_one(t, i, &joined, ids);
    if (status) continue;
    uint64_t pair = (uint64_t)ids[0] << 32 | ids[1];
    size_t k = pair_slot(pair, t->merges.mask);
    while (slots[k].id >= 0 && slots[k].pair != pair) k = (k + 1) & t->merges.mask;
    if (slots[k].id < 0) t->merges.n++;
    slots[k] = (text_merge){ pair, (uint32_t)i, (int32_t)ids[2] };   /* a pair listed twice: the later rank counts, as upstream's map has it */
  }
  text_free(&joined);
  return status < 0 ? status : 0;
}
