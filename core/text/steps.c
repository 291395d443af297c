/* steps.c: runs normalizers and pre-tokenizers: each step maps a text and its pieces to a text and its pieces.
 * Source of every step: tokenizers, normalizers/ and pre_tokenizers/. */
#include "text.h"

void text_run_free(text_run *r) {
  text_free(&r->text);
  text_free(&r->spare);
  wane_release(r->spans.at);
  wane_release(r->spare_spans.at);
  text_match_free(&r->match);
}

static void strip(text_buf *out, const char *s, size_t n, int64_t sides) {
  size_t start = 0, end = n;
  uint32_t cp;
  while ((sides & WANE_STRIP_LEFT) && start < n) {
    size_t k = text_next(s + start, n - start, &cp);
    if (!text_is_space(cp)) break;
    start += k;
  }
  while ((sides & WANE_STRIP_RIGHT) && end > start) {
    size_t k = end - 1;
    while (k > start && (s[k] & 0xc0) == 0x80) k--;
    text_next(s + k, end - k, &cp);
    if (!text_is_space(cp)) break;
    end = k;
  }
  text_add(out, s + start, end - start);
}

static void strip_accents(text_buf *out, const char *s, size_t n) {
  for (size_t i = 0; i < n;) {
    uint32_t cp;
    size_t k = text_next(s + i, n - i, &cp);
    if (!text_is_mark(cp)) text_add(out, s + i, k);
    i += k;
  }
}

/* One piece through one step. `first`: the piece begins where the whole input begins. */
static int transform(text_buf *out, const text_step *step, text_match *match, const char *s, size_t n, int first) {
  switch (step->kind) {
    case WANE_STEP_NFC: text_normalize(out, s, n, TEXT_NFC); break;
    case WANE_STEP_NFD: text_normalize(out, s, n, TEXT_NFD); break;
    case WANE_STEP_NFKC: text_normalize(out, s, n, TEXT_NFKC); break;
    case WANE_STEP_NFKD: text_normalize(out, s, n, TEXT_NFKD); break;
    case WANE_STEP_LOWERCASE: text_lowercase(out, s, n); break;
    case WANE_STEP_STRIP: strip(out, s, n, step->flags); break;
    case WANE_STEP_STRIP_ACCENTS: strip_accents(out, s, n); break;
    case WANE_STEP_REPLACE: return text_replace(out, &step->match, match, s, n, step->content, step->content_n);
    case WANE_STEP_PREFIX: {
      int there = n >= step->content_n && !memcmp(s, step->content, step->content_n);
      int wanted = !((step->flags & WANE_PREFIX_UNLESS_THERE) && there) && !((step->flags & WANE_PREFIX_AT_START) && !first);
      if (n && wanted) text_add(out, step->content, step->content_n);
      text_add(out, s, n);
      break;
    }
    case WANE_STEP_BYTES:
      for (size_t i = 0; i < n; i++) text_add_char(out, text_byte_char((unsigned char)s[i]));
      break;
    default: text_add(out, s, n);
  }
  return out->failed;
}

static int run_one(text_run *r, const text_step *step) {
  r->spare.n = r->spare_spans.n = 0;
  if (step->kind == WANE_STEP_SPLIT) {
    for (size_t i = 0; i < r->spans.n; i++) {
      int behavior = (int)(step->flags & 255), invert = (step->flags & WANE_SPLIT_INVERT) != 0;
      int status = text_split(&r->spare_spans, &step->match, &r->match, r->text.data, r->spans.at[i], behavior, invert);
      if (status) return status;
    }
  } else {
    int at_start = r->at_start && r->spans.n && r->spans.at[0].start == 0;
    for (size_t i = 0; i < r->spans.n; i++) {
      size_t start = r->spare.n;
      text_span p = r->spans.at[i];
      int status = transform(&r->spare, step, &r->match, r->text.data + p.start, p.end - p.start, at_start && i == 0);
      if (status) return status;
      if (r->spare.n > start) text_push(&r->spare_spans, start, r->spare.n);
    }
    r->at_start = at_start;
    text_buf text = r->text;
    r->text = r->spare;
    r->spare = text;
  }
  text_spans spans = r->spans;
  r->spans = r->spare_spans;
  r->spare_spans = spans;
  return r->spans.failed;
}

/* Runs all steps over r->text and r->spans, in place. */
int text_run_steps(text_run *r, const text_steps *steps) {
  for (size_t i = 0; i < steps->n; i++) {
    int status = run_one(r, &steps->at[i]);
    if (status) return status;
  }
  return 0;
}
