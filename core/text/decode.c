/* decode.c: ids back to text: the tokens' strings, through the decoder's steps, joined. Source: tokenizers, decoders/. */
#include "text.h"

static const char replacement[] = "\xef\xbf\xbd";

static int hex(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

/* The byte that "<0xHH>" stands for, or -1. */
static int fallback_byte(const char *s, size_t n) {
  if (n != 6 || memcmp(s, "<0x", 3) || s[5] != '>' || hex(s[3]) < 0 || hex(s[4]) < 0) return -1;
  return hex(s[3]) * 16 + hex(s[4]);
}

/* All tokens become one: their characters' bytes; a token with a character outside the map gives its own bytes. */
static void from_bytes(text_run *r) {
  text_buf bytes = { 0 };
  for (size_t i = 0; i < r->spans.n; i++) {
    const char *s = r->text.data + r->spans.at[i].start;
    size_t n = r->spans.at[i].end - r->spans.at[i].start, mark = bytes.n;
    for (size_t k = 0; k < n;) {
      uint32_t cp;
      k += text_next(s + k, n - k, &cp);
      int byte = text_char_byte(cp);
      if (byte < 0) { bytes.n = mark; text_add(&bytes, s, n); break; }
      char c = (char)byte;
      text_add(&bytes, &c, 1);
    }
  }
  text_lossy(&r->spare, bytes.data, bytes.n);
  if (bytes.failed) r->spare.failed = bytes.failed;
  text_free(&bytes);
  text_push(&r->spare_spans, 0, r->spare.n);
}

/* The bytes of a run of <0xHH> tokens end here: their text, or as many U+FFFD. */
static void end_run(text_run *r, text_buf *run) {
  if (text_valid(run->data, run->n) == run->n) {
    size_t start = r->spare.n;
    text_add(&r->spare, run->data, run->n);
    if (run->n) text_push(&r->spare_spans, start, r->spare.n);
  } else {
    for (size_t i = 0; i < run->n; i++) {
      text_add(&r->spare, replacement, 3);
      text_push(&r->spare_spans, r->spare.n - 3, r->spare.n);
    }
  }
  run->n = 0;
}

static void byte_fallback(text_run *r) {
  text_buf run = { 0 };
  for (size_t i = 0; i < r->spans.n; i++) {
    const char *s = r->text.data + r->spans.at[i].start;
    size_t n = r->spans.at[i].end - r->spans.at[i].start;
    int byte = fallback_byte(s, n);
    char c = (char)byte;
    if (byte >= 0) { text_add(&run, &c, 1); continue; }
    if (run.n) end_run(r, &run);
    size_t start = r->spare.n;
    text_add(&r->spare, s, n);
    text_push(&r->spare_spans, start, r->spare.n);
  }
  if (run.n) end_run(r, &run);
  if (run.failed) r->spare.failed = run.failed;
  text_free(&run);
}

static void metaspace(text_buf *out, const text_step *step, const char *s, size_t n, int first) {
  for (size_t i = 0; i < n;) {
    uint32_t cp;
    size_t k = text_next(s + i, n - i, &cp);
    if (k != step->content_n || memcmp(s + i, step->content, k)) text_add(out, s + i, k);
    else if (!first || (step->flags & WANE_METASPACE_KEEP_FIRST)) text_add(out, " ", 1);
    i += k;
  }
}

static void trim(text_buf *out, const text_step *step, const char *s, size_t n) {
  size_t k = step->content_n;
  int64_t start = step->flags & 0xffff, stop = step->flags >> 16;
  while (start-- > 0 && n >= k && !memcmp(s, step->content, k)) { s += k; n -= k; }
  while (stop-- > 0 && n >= k && !memcmp(s + n - k, step->content, k)) n -= k;
  text_add(out, s, n);
}

static int each(text_run *r, const text_step *step) {
  for (size_t i = 0; i < r->spans.n; i++) {
    const char *s = r->text.data + r->spans.at[i].start;
    size_t n = r->spans.at[i].end - r->spans.at[i].start, start = r->spare.n;
    int status = 0;
    if (step->kind == WANE_STEP_REPLACE) status = text_replace(&r->spare, &step->match, &r->match, s, n, step->content, step->content_n);
    else if (step->kind == WANE_STEP_METASPACE) metaspace(&r->spare, step, s, n, i == 0);
    else trim(&r->spare, step, s, n);
    if (status) return status;
    text_push(&r->spare_spans, start, r->spare.n);
  }
  return 0;
}

static int run_one(text_run *r, const text_step *step) {
  int status = 0;
  r->spare.n = r->spare_spans.n = 0;
  if (!text_room(&r->spare, 1) || !text_room(&r->text, 1)) return WANE_E_MEMORY;
  switch (step->kind) {
    case WANE_STEP_BYTES: from_bytes(r); break;
    case WANE_STEP_BYTE_FALLBACK: byte_fallback(r); break;
    case WANE_STEP_FUSE:                     /* the tokens already lie one behind the other */
      text_push(&r->spare_spans, 0, r->text.n);
      text_add(&r->spare, r->text.data, r->text.n);
      break;
    default: status = each(r, step);
  }
  text_buf text = r->text;
  text_spans spans = r->spans;
  r->text = r->spare;
  r->spans = r->spare_spans;
  r->spare = text;
  r->spare_spans = spans;
  return status ? status : r->text.failed ? r->text.failed : r->spans.failed;
}

/* The tokens' strings, as the decoder wants them: added tokens in their normalized form. Without a decoder a space between. */
static int gather(const wane_tokenizer *t, text_run *r, const int32_t *ids, int64_t count, int skip_special) {
  for (int64_t i = 0; i < count; i++) {
    size_t n;
    const char *s = text_table_get(&t->vocab, ids[i], &n);
    const text_added *a = t->added_n ? text_added_of(t, ids[i]) : NULL;
    if (!s || (a && skip_special && (a->flags & WANE_TOKEN_SPECIAL))) continue;
    if (a) { s = t->added_bytes.data + a->norm.start; n = a->norm.end - a->norm.start; }
    if (!t->stage[WANE_STAGE_DECODE].n && r->spans.n) text_add(&r->text, " ", 1);
    size_t start = r->text.n;
    text_add(&r->text, s, n);
    text_push(&r->spans, start, r->text.n);
  }
  return r->text.failed ? r->text.failed : r->spans.failed;
}

int wane_tokenizer_decode(const wane_tokenizer *t, const int32_t *ids, int64_t count, int skip_special, char *out, size_t size, size_t *bytes) {
  if (!t || !t->ready || !bytes || count < 0 || (count && !ids)) return wane_fail(WANE_E_ARG, "decode: a ready tokenizer and a list of ids are needed");
  const text_steps *steps = &t->stage[WANE_STAGE_DECODE];
  text_run r = { 0 };
  int status = text_match_init(&r.match);
  if (!status) status = gather(t, &r, ids, count, skip_special);
  for (size_t i = 0; i < steps->n && !status; i++) status = run_one(&r, &steps->at[i]);
  if (!status) {
    *bytes = r.text.n;
    if (size && r.text.n) memcpy(out, r.text.data, r.text.n < size ? r.text.n : size);
  }
  text_run_free(&r);
  return status;
}
