/* bpe.c: byte-pair merging of one piece, O(n log n) with a heap. Two orders: by rank in the list of merges (tokenizers,
 * bpe/word.rs), or by the score of the resulting token (SentencePiece's BPE, as in GGUF files of model "llama"). */
#include "text.h"

typedef struct symbol { int32_t id, prev, next; uint32_t start, length; } symbol;     /* next -2: merged into its left neighbour */
typedef struct candidate { uint32_t rank; int32_t at, id; } candidate;

struct text_bpe {
  symbol *symbols;
  size_t n, cap;
  candidate *heap;
  size_t heap_n, heap_cap;
  text_buf mapped;                    /* the piece in printable characters, when the model sees bytes */
};

text_bpe *text_bpe_new(void) { return wane_alloc_zero(sizeof(text_bpe), "merging"); }

void text_bpe_free(text_bpe *b) {
  if (!b) return;
  wane_release(b->symbols);
  wane_release(b->heap);
  text_free(&b->mapped);
  wane_release(b);
}

void text_emit(wane_encoding *out, int32_t id) {
  if (out->n == out->cap && !out->failed) {
    void *p = text_grow(out->ids, out->n, &out->cap, sizeof *out->ids, "token ids");
    if (p) out->ids = p;
    else out->failed = WANE_E_MEMORY;
  }
  if (!out->failed) out->ids[out->n++] = id;
}

/* ---------------------------------------------------------------- the heap: lowest rank first, then leftmost */

static int before(candidate a, candidate b) { return a.rank < b.rank || (a.rank == b.rank && a.at < b.at); }

static int push(text_bpe *b, candidate c) {
  if (b->heap_n == b->heap_cap) {
    void *p = text_grow(b->heap, b->heap_n, &b->heap_cap, sizeof *b->heap, "merging");
    if (!p) return WANE_E_MEMORY;
    b->heap = p;
  }
  size_t i = b->heap_n++;
  while (i && before(c, b->heap[(i - 1) / 2])) { b->heap[i] = b->heap[(i - 1) / 2]; i = (i - 1) / 2; }
  b->heap[i] = c;
  return 0;
}

static candidate pop(text_bpe *b) {
  candidate top = b->heap[0], last = b->heap[--b->heap_n];
  size_t i = 0;
  for (;;) {
    size_t child = 2 * i + 1;
    if (child >= b->heap_n) break;
    if (child + 1 < b->heap_n && before(b->heap[child + 1], b->heap[child])) child++;
    if (!before(b->heap[child], last)) break;
    b->heap[i] = b->heap[child];
    i = child;
  }
  if (b->heap_n) b->heap[i] = last;
  return top;
}

/* ---------------------------------------------------------------- pairs */

/* A rank that is lower the higher the score is; any float, infinities and NaN included, has its place. */
static uint32_t rank_of_score(float score) {
  uint32_t bits;
  memcpy(&bits, &score, 4);
  return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
}

/* What the symbols at `left` and behind it merge into: 1 with the candidate, 0 for nothing. */
static int look_up(const wane_tokenizer *t, const text_bpe *b, const char *s, int32_t left, candidate *c) {
  const symbol *x = &b->symbols[left], *y = &b->symbols[x->next];
  if (!t->scores) {
    const text_merge *m = text_merges_find(&t->merges, x->id, y->id);
    if (m) *c = (candidate){ m->rank, left, m->id };
    return m != NULL;
  }
  int32_t id = text_table_find(&t->vocab, s + x->start, x->length + y->length);
  if (id < 0 || (size_t)id >= t->scores_n) return 0;
  *c = (candidate){ rank_of_score(t->scores[id]), left, id };
  return 1;
}

static int merge_all(const wane_tokenizer *t, text_bpe *b, const char *s) {
  candidate c, now;
  b->heap_n = 0;
  for (size_t i = 0; i + 1 < b->n; i++)
    if (look_up(t, b, s, (int32_t)i, &c) && push(b, c)) return WANE_E_MEMORY;
  while (b->heap_n) {
    c = pop(b);
    symbol *x = &b->symbols[c.at];
    /* Stale unless the pair that stands here now still gives the same token. */
    if (x->next < 0 || !look_up(t, b, s, c.at, &now) || now.id != c.id) continue;
    symbol *y = &b->symbols[x->next];
    x->id = c.id;
    x->length += y->length;
    x->next = y->next;
    y->next = -2;
    if (x->next >= 0) b->symbols[x->next].prev = c.at;
    if (x->prev >= 0 && look_up(t, b, s, x->prev, &now) && push(b, now)) return WANE_E_MEMORY;
    if (x->next >= 0 && look_up(t, b, s, c.at, &now) && push(b, now)) return WANE_E_MEMORY;
  }
  return 0;
}

/* ---------------------------------------------------------------- the first symbols */

static int add_symbol(text_bpe *b, int32_t id, size_t start, size_t length) {
  if (b->n == b->cap) {
    void *p = text_grow(b->symbols, b->n, &b->cap, sizeof *b->symbols, "merging");
    if (!p) return WANE_E_MEMORY;
    b->symbols = p;
  }
  int32_t at = (int32_t)b->n;
  if (at) b->symbols[at - 1].next = at;
  b->symbols[b->n++] = (symbol){ id, at - 1, -1, (uint32_t)start, (uint32_t)length };
  return 0;
}

/* A character as the vocabulary spells it: with the prefix unless it is the first, with the suffix if it is the last. */
static int32_t char_id(const wane_tokenizer *t, text_bpe *b, const char *s, size_t n, int first, int last) {
  int prefix = t->prefix_n && !first, suffix = t->suffix_n && last;
  if (!prefix && !suffix) return text_table_find(&t->vocab, s, n);
  b->mapped.n = 0;
  if (prefix) text_add(&b->mapped, t->prefix, t->prefix_n);
  text_add(&b->mapped, s, n);
  if (suffix) text_add(&b->mapped, t->suffix, t->suffix_n);
  return text_table_find(&t->vocab, b->mapped.data, b->mapped.n);
}

/* Characters the vocabulary lacks: their bytes, else the unknown token (a run of them is one where fuse_unk says so), else nothing.
 * In the order of scores they wait as symbols without a token, because a merge may still cover them. */
static int unknown(const wane_tokenizer *t, text_bpe *b, const char *s, size_t at, size_t n, int *fusing) {
  int bytes = t->model_flags & WANE_MODEL_BYTE_FALLBACK ? 1 : 0, status = 0;
  for (size_t i = 0; i < n && bytes; i++) bytes = t->fallback_id[(unsigned char)s[at + i]] >= 0;
  if (t->scores) return add_symbol(b, -1, at, n);
  if (bytes) {
    *fusing = 0;
    for (size_t i = 0; i < n && !status; i++) status = add_symbol(b, t->fallback_id[(unsigned char)s[at + i]], at + i, 1);
    return status;
  }
  if (t->unk_id < 0) return 0;
  if (*fusing && (t->model_flags & WANE_MODEL_FUSE_UNK)) { b->symbols[b->n - 1].length += (uint32_t)n; return 0; }
  *fusing = 1;
  return add_symbol(b, t->unk_id, at, n);
}

static int first_symbols(const wane_tokenizer *t, text_bpe *b, const char *s, size_t n) {
  int status = 0, fusing = 0;
  b->n = 0;
  for (size_t i = 0; i < n && !status;) {
    uint32_t cp;
    size_t k = text_next(s + i, n - i, &cp);
    int32_t id = char_id(t, b, s + i, k, i == 0, i + k == n);
    if (id >= 0) { fusing = 0; status = add_symbol(b, id, i, k); }
    else status = unknown(t, b, s, i, k, &fusing);
    i += k;
  }
  return status;
}

/* The same for plain bytes, each standing for its printable character. */
static int first_bytes(const wane_tokenizer *t, text_bpe *b, const char *s, size_t n) {
  int status = 0, fusing = 0;
  b->n = 0;
  for (size_t i = 0; i < n && !status; i++) {
    int32_t id = t->byte_id[(unsigned char)s[i]];
    if (id >= 0) { fusing = 0; status = add_symbol(b, id, i, 1); }
    else if (t->unk_id >= 0 && !(fusing && (t->model_flags & WANE_MODEL_FUSE_UNK))) { fusing = 1; status = add_symbol(b, t->unk_id, i, 1); }
  }
  return status;
}

/* ---------------------------------------------------------------- one piece */

/* The tokens of symbols in the order of scores: a symbol without a token becomes its bytes, or the unknown token. */
static void emit_scored(const wane_tokenizer *t, const symbol *x, const char *s, wane_encoding *out, int *fusing) {
  int bytes = 1;
  if (x->id >= 0) { *fusing = 0; text_emit(out, x->id); return; }
  for (uint32_t i = 0; i < x->length && bytes; i++) bytes = t->fallback_id[(unsigned char)s[x->start + i]] >= 0;
  if (bytes) for (uint32_t i = 0; i < x->length; i++) text_emit(out, t->fallback_id[(unsigned char)s[x->start + i]]);
  else if (t->unk_id >= 0 && !(*fusing && (t->model_flags & WANE_MODEL_FUSE_UNK))) text_emit(out, t->unk_id);
  *fusing = !bytes;
}

/* Merges a stretch that no merge leaves, and emits it. */
static int encode_stretch(const wane_tokenizer *t, text_bpe *b, wane_encoding *out, const char *s, size_t n) {
  int fusing = 0, status = t->raw_bytes ? first_bytes(t, b, s, n) : first_symbols(t, b, s, n);
  if (!status && b->n > 1) status = merge_all(t, b, s);
  if (status || !b->n) return status;
  for (int32_t i = 0; i >= 0; i = b->symbols[i].next) {
    if (t->scores) emit_scored(t, &b->symbols[i], s, out, &fusing);
    else text_emit(out, b->symbols[i].id);
  }
  return out->failed;
}

/* End of the stretch that begins at s: the next "▁" behind another character. */
static size_t stretch(const char *s, size_t n) {
  for (size_t i = 1; i + 3 <= n; i++) {
    const char *p = memchr(s + i, '\xe2', n - i);
    if (!p) return n;
    i = (size_t)(p - s);
    if (i + 3 <= n && !memcmp(p, "\xe2\x96\x81", 3) && (i < 3 || memcmp(p - 3, "\xe2\x96\x81", 3))) return i;
  }
  return n;
}

int text_bpe_encode(const wane_tokenizer *t, text_bpe *b, wane_encoding *out, const char *s, size_t n) {
  int status = 0;
  if (t->model_flags & WANE_MODEL_IGNORE_MERGES) {
    const char *whole = s;
    size_t whole_n = n;
    if (t->raw_bytes) {
      b->mapped.n = 0;
      for (size_t i = 0; i < n; i++) text_add_char(&b->mapped, text_byte_char((unsigned char)s[i]));
      if (b->mapped.failed) return b->mapped.failed;
      whole = b->mapped.data;
      whole_n = b->mapped.n;
    }
    int32_t id = text_table_find(&t->vocab, whole, whole_n);
    if (id >= 0) { text_emit(out, id); return out->failed; }
  }
  while (n && !status) {
    size_t k = t->word_breaks ? stretch(s, n) : n;
    status = encode_stretch(t, b, out, s, k);
    s += k;
    n -= k;
  }
  return status;
}
