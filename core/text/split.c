/* split.c: patterns: PCRE2 (compiled once, JIT where it is allowed) or plain strings, cutting and replacing by them. Patterns come
 * from files: their length, nesting and number of steps are bounded, and a match that needs more is an error, not a hang.
 * lua/wane/tokenizer/regex.lua has translated them from Oniguruma's syntax. */
#include "text.h"
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

struct text_regex { pcre2_code *code; int jit; };

static void *take(size_t bytes, void *data) { (void)data; return wane_alloc(bytes, "a pattern"); }
static void give(void *p, void *data) { (void)data; wane_release(p); }

/* flags: PCRE2 options beside those that every pattern gets. */
static int compile(text_matcher *m, const char *pattern, size_t n, uint32_t flags) {
  int code = 0;
  size_t at = 0;
  pcre2_general_context *memory = pcre2_general_context_create(take, give, NULL);
  pcre2_compile_context *options = memory ? pcre2_compile_context_create(memory) : NULL;
  m->regex = options ? wane_alloc_zero(sizeof *m->regex, "a pattern") : NULL;
  if (m->regex) {
    pcre2_set_max_pattern_length(options, 1 << 16);
    pcre2_set_newline(options, PCRE2_NEWLINE_LF);
    m->regex->code = pcre2_compile((PCRE2_SPTR)pattern, n, PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C | flags, &code, &at, options);
  }
  pcre2_compile_context_free(options);
  pcre2_general_context_free(memory);
  if (!m->regex || (!m->regex->code && (code == PCRE2_ERROR_NOMEMORY || code == PCRE2_ERROR_HEAP_FAILED))) return wane_fail(WANE_E_MEMORY, "out of memory: a pattern of %zu bytes", n);
  if (!m->regex->code) {
    PCRE2_UCHAR why[120];
    pcre2_get_error_message(code, why, sizeof why);
    return wane_fail(WANE_E_FORMAT, "pattern '%.*s': %s at byte %zu", (int)(n < 100 ? n : 100), pattern, (char *)why, at);
  }
  /* A host may forbid executable memory: the interpreter does the same, slower. */
  m->regex->jit = pcre2_jit_compile(m->regex->code, PCRE2_JIT_COMPLETE) == 0;
  return 0;
}

int text_matcher_init(text_matcher *m, const char *pattern, size_t n, int is_regex) {
  memset(m, 0, sizeof *m);
  if (n == 0) return wane_fail(WANE_E_ARG, "an empty pattern");
  if (is_regex) return compile(m, pattern, n, PCRE2_MULTILINE);      /* in Oniguruma's syntax ^ and $ always stand at lines */
  if (!(m->literal = wane_alloc(n, "a pattern"))) return WANE_E_MEMORY;
  memcpy(m->literal, pattern, n);
  m->length = n;
  return 0;
}

void text_matcher_free(text_matcher *m) {
  if (m->regex) pcre2_code_free(m->regex->code);
  wane_release(m->regex);
  wane_release(m->literal);
  memset(m, 0, sizeof *m);
}

int text_match_init(text_match *m) {
  pcre2_general_context *memory = pcre2_general_context_create(take, give, NULL);
  m->data = memory ? pcre2_match_data_create(1, memory) : NULL;
  m->context = memory ? pcre2_match_context_create(memory) : NULL;
  pcre2_general_context_free(memory);
  return m->data && m->context ? 0 : WANE_E_MEMORY;
}

void text_match_free(text_match *m) {
  pcre2_match_data_free(m->data);
  pcre2_match_context_free(m->context);
  m->data = m->context = NULL;
}

/* Finds the first match in s[from, n): 1 with its place, 0 for none, or an error. */
static int find(const text_matcher *m, text_match *ctx, const char *s, size_t n, size_t from, text_span *at) {
  if (m->literal) {
    const char *p = from <= n ? memmem(s + from, n - from, m->literal, m->length) : NULL;
    if (p) *at = (text_span){ (uint32_t)(p - s), (uint32_t)(p - s + (ptrdiff_t)m->length) };
    return p != NULL;
  }
  /* Honest patterns go over a run of the text a few times; a hostile one would go over it forever. */
  pcre2_set_match_limit(ctx->context, (uint32_t)(10000 + 16 * (n - from)));
  int k = pcre2_match(m->regex->code, (PCRE2_SPTR)s, n, from, PCRE2_NO_UTF_CHECK, ctx->data, ctx->context);
  if (k == PCRE2_ERROR_JIT_STACKLIMIT)
    k = pcre2_match(m->regex->code, (PCRE2_SPTR)s, n, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, ctx->data, ctx->context);
  if (k == PCRE2_ERROR_NOMATCH) return 0;
  if (k == PCRE2_ERROR_NOMEMORY) return wane_fail(WANE_E_MEMORY, "out of memory: matching a pattern");
  if (k < 0) {
    PCRE2_UCHAR why[120];
    pcre2_get_error_message(k, why, sizeof why);
    return wane_fail(WANE_E_FORMAT, "a pattern could not be run on this text: %s", (char *)why);
  }
  PCRE2_SIZE *o = pcre2_get_ovector_pointer(ctx->data);
  *at = (text_span){ (uint32_t)o[0], (uint32_t)o[1] };
  /* \K may put the start behind the end. */
  if (at->start > at->end || at->end > n || at->start < from) return wane_fail(WANE_E_FORMAT, "a pattern matches backwards");
  return 1;
}

/* Walks over the matches; an empty match right behind the last one does not count (rust-onig, FindMatches). */
typedef struct walk { size_t from, last; int any; } walk;

static int step(const text_matcher *m, text_match *ctx, const char *s, size_t n, walk *w, text_span *at) {
  for (;;) {
    if (w->from > n) return 0;
    int k = find(m, ctx, s, n, w->from, at);
    if (k <= 0) return k;
    if (at->start != at->end || !w->any || w->last != at->end) break;
    uint32_t cp;
    w->from += w->from < n ? text_next(s + w->from, n - w->from, &cp) : 1;
  }
  w->from = w->last = at->end;
  w->any = 1;
  return 1;
}

/* ---------------------------------------------------------------- cutting */

typedef struct cut { text_spans *out; size_t base; int behavior, previous, held; text_span hold; } cut;

/* One stretch of the text, matched or not, in order (tokenizers, normalizer.rs `split`). */
static void feed(cut *c, size_t start, size_t end, int match) {
  text_span *last = c->out->n > c->base ? &c->out->at[c->out->n - 1] : NULL;
  switch (c->behavior) {
    case WANE_SPLIT_REMOVED: if (!match) text_push(c->out, start, end); break;
    case WANE_SPLIT_CONTIGUOUS:
      if (match == c->previous && last) last->end = (uint32_t)end;
      else text_push(c->out, start, end);
      break;
    case WANE_SPLIT_MERGED_WITH_PREVIOUS:
      if (match && !c->previous && last) last->end = (uint32_t)end;
      else text_push(c->out, start, end);
      break;
    case WANE_SPLIT_MERGED_WITH_NEXT:
      if (c->held && !match) text_push(c->out, c->hold.start, end);
      else if (c->held) text_push(c->out, c->hold.start, c->hold.end);
      if (!match && !c->held) text_push(c->out, start, end);
      c->held = match;
      c->hold = (text_span){ (uint32_t)start, (uint32_t)end };
      break;
    default: text_push(c->out, start, end);
  }
  c->previous = match;
}

int text_split(text_spans *out, const text_matcher *m, text_match *ctx, const char *text, text_span span, int behavior, int invert) {
  /* The piece is a text of its own: what stands around it is not seen by lookaround. */
  const char *s = text + span.start;
  size_t n = span.end - span.start, previous = 0;
  cut c = { .out = out, .base = out->n, .behavior = behavior };
  walk w = { 0 };
  text_span at;
  int k;
  while ((k = step(m, ctx, s, n, &w, &at)) > 0) {
    if (previous != at.start) feed(&c, previous, at.start, invert);
    feed(&c, at.start, at.end, !invert);
    previous = at.end;
  }
  if (k < 0) return k;
  if (previous != n) feed(&c, previous, n, invert);
  if (c.held) text_push(out, c.hold.start, c.hold.end);
  if (out->failed) return out->failed;
  size_t kept = c.base;
  for (size_t i = c.base; i < out->n; i++) {
    if (out->at[i].start == out->at[i].end) continue;
    out->at[kept++] = (text_span){ out->at[i].start + span.start, out->at[i].end + span.start };
  }
  out->n = kept;
  return 0;
}

int text_replace(text_buf *out, const text_matcher *m, text_match *ctx, const char *s, size_t n, const char *content, size_t content_n) {
  walk w = { 0 };
  text_span at;
  size_t previous = 0;
  int k = 0;
  while (n && (k = step(m, ctx, s, n, &w, &at)) > 0) {
    text_add(out, s + previous, at.start - previous);
    text_add(out, content, content_n);
    previous = at.end;
    if (out->failed) return out->failed;
  }
  text_add(out, s + previous, n - previous);
  return k < 0 ? k : out->failed;
}

/* ---- patterns alone (wane.h): whole texts, for names ---- */

struct wane_pattern { text_matcher matcher; text_match match; };

void wane_pattern_free(wane_pattern *p) {
  if (!p) return;
  text_matcher_free(&p->matcher);
  text_match_free(&p->match);
  wane_release(p);
}

int wane_pattern_new(wane_pattern **out, const char *pattern, size_t bytes) {
  if (!out || !pattern) return wane_fail(WANE_E_ARG, "pattern_new: NULL argument");
  *out = NULL;
  wane_pattern *p = wane_alloc_zero(sizeof *p, "a pattern");
  if (!p) return WANE_E_MEMORY;
  int status = text_match_init(&p->match);
  if (status < 0) wane_fail(status, "out of memory: a pattern");
  else status = compile(&p->matcher, pattern, bytes, PCRE2_ANCHORED | PCRE2_ENDANCHORED);
  if (status < 0) {
    wane_pattern_free(p);
    return status;
  }
  *out = p;
  return 0;
}

int wane_pattern_match(wane_pattern *p, const char *text, size_t bytes) {
  text_span at;
  if (!p || !text) return wane_fail(WANE_E_ARG, "pattern_match: NULL argument");
  if (bytes > 1 << 20) return wane_fail(WANE_E_ARG, "pattern_match: a text of %zu bytes, names have at most 1 MiB", bytes);
  for (size_t i = 0; i < bytes; i++)
    if ((unsigned char)text[i] >= 128) return wane_fail(WANE_E_ARG, "pattern_match: byte %zu is not ASCII, names are", i);
  return find(&p->matcher, &p->match, text, bytes, 0, &at);
}
