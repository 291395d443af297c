/* tokenizer.c: section 12 of wane.h: opening, describing, encoding. The order of encoding (tokenizers, tokenizer/mod.rs and
 * added_vocabulary.rs): added tokens that are not normalized are cut out of the text; what is left is normalized; added tokens in
 * their normalized form are cut out of that; the rest is pre-tokenized, and each piece is merged. */
#include "text.h"
#include "../reader/reader.h"
#include <stdio.h>

/* ---------------------------------------------------------------- lifetime */

static void free_step(text_step *s) {
  text_matcher_free(&s->match);
  wane_release(s->content);
}

void wane_tokenizer_free(wane_tokenizer *t) {
  if (!t || atomic_fetch_sub(&t->refs, 1) != 1) return;
  for (int k = 0; k < 3; k++) {
    for (size_t i = 0; i < t->stage[k].n; i++) free_step(&t->stage[k].at[i]);
    wane_release(t->stage[k].at);
  }
  text_table_free(&t->vocab);
  wane_release(t->merges.slots);
  wane_release(t->scores);
  wane_release(t->added);
  text_free(&t->added_bytes);
  wane_release(t->raw.order);
  wane_release(t->normalized.order);
  text_free(&t->config[0]);
  text_free(&t->config[1]);
  wane_release(t->prefix);
  wane_release(t->suffix);
  text_free(&t->merge_bytes);
  wane_release(t->pending);
  wane_release(t);
}

/* ---------------------------------------------------------------- opening */

typedef struct opening { wane_tokenizer *t; char *path, *config_path; } opening;

static void opening_drop(void *state) {
  opening *o = state;
  wane_tokenizer_free(o->t);
  wane_release(o->path);
  wane_release(o->config_path);
  wane_release(o);
}

static int read_file(wane_tokenizer *t, wane_job *job, const char *path, int which) {
  char magic[4] = { 0 };
  wane_file file;
  int status = wane_file_open(&file, path);
  if (status) return status;
  if (which == 0 && file.size >= 4) status = wane_file_read(&file, 0, magic, 4);
  int gguf = !memcmp(magic, "GGUF", 4);
  if (which == 0) t->source = gguf ? WANE_VOCAB_GGUF : WANE_VOCAB_JSON;
  if (!status) status = gguf ? text_read_gguf(t, job, &file) : text_read_json(t, job, &file, which);
  wane_file_close(&file);
  return status;
}

static int opening_run(wane_job *job, void *state) {
  opening *o = state;
  int status = read_file(o->t, job, o->path, 0);
  if (!status && o->config_path) status = read_file(o->t, job, o->config_path, 1);
  if (!status) status = text_settle_added(o->t);
  if (!status) status = text_resolve(o->t, job);
  for (int i = 0; i < 2 && !status; i++) { text_add(&o->t->config[i], "", 1); status = o->t->config[i].failed; }
  text_free(&o->t->merge_bytes);
  wane_release(o->t->pending);
  o->t->pending = NULL;
  o->t->pending_n = 0;
  return status;
}

static const wane_job_vtable opening_job = { opening_run, opening_drop };

int wane_tokenizer_open(wane_job **out, const char *path, const char *config_path) {
  if (!out || !path) return wane_fail(WANE_E_ARG, "wane_tokenizer_open: out and path are needed");
  opening *o = wane_alloc_zero(sizeof *o, "a tokenizer");
  if (!o) return WANE_E_MEMORY;
  o->t = wane_alloc_zero(sizeof *o->t, "a tokenizer");
  o->path = wane_copy_string(path);
  o->config_path = config_path ? wane_copy_string(config_path) : NULL;
  if (o->t) { o->t->refs = 1; o->t->unk_id = -1; }
  if (!o->t || !o->path || (config_path && !o->config_path)) { opening_drop(o); return WANE_E_MEMORY; }
  return wane_job_start(out, &opening_job, o);
}

int wane_tokenizer_take(wane_job *job, wane_tokenizer **out) {
  if (!job || !out) return wane_fail(WANE_E_ARG, "wane_tokenizer_take: job and out are needed");
  int status = wane_job_poll(job);
  if (status) return status;
  opening *o = wane_job_state(job);
  if (!o || !o->t) return wane_fail(WANE_E_ARG, "this job's tokenizer was taken before");
  *out = o->t;
  o->t = NULL;
  return WANE_OK;
}

const char *wane_tokenizer_config(const wane_tokenizer *t, int which) {
  return t && (which == 0 || which == 1) && t->config[which].data ? t->config[which].data : "";
}

void wane_vocab_info_read(const wane_tokenizer *t, wane_vocab_info *out) {
  *out = (wane_vocab_info){ .source = t->source, .ready = t->ready, .size = (int64_t)t->vocab.ids, .tokens = t->vocab.count, .added = (int64_t)t->added_n,
                            .merges = (int64_t)t->merges.n, .has_scores = t->scores != NULL };
}

/* ---------------------------------------------------------------- describing */

static int describing(const wane_tokenizer *t, const char *what) {
  if (!t) return wane_fail(WANE_E_ARG, "%s: no tokenizer", what);
  return t->ready ? wane_fail(WANE_E_ARG, "%s: the tokenizer is ready and cannot be changed any more", what) : 0;
}

int wane_tokenizer_model(wane_tokenizer *t, int flags, int32_t unk_id) {
  int status = describing(t, "wane_tokenizer_model");
  if (status) return status;
  if (unk_id != -1 && !text_table_has(&t->vocab, unk_id)) return wane_fail(WANE_E_ARG, "the unknown token's id %d is not in the vocabulary", unk_id);
  if ((flags & WANE_MODEL_USE_SCORES) && !t->scores) return wane_fail(WANE_E_NOTFOUND, "the tokenizer holds no scores (tokenizer.ggml.scores)");
  t->model_flags = flags;
  t->unk_id = unk_id;
  return WANE_OK;
}

int wane_tokenizer_add(wane_tokenizer *t, const char *text, size_t bytes, int flags) {
  int status = describing(t, "wane_tokenizer_add");
  if (!status && (!text || !bytes || text_valid(text, bytes) != bytes)) status = wane_fail(WANE_E_ARG, "wane_tokenizer_add: a text in UTF-8 is needed");
  if (!status) status = text_add_added(t, -1, text, bytes, flags & 31);
  return status ? status : text_settle_added(t);
}

/* Which steps each stage has, and which need a pattern or content. */
static int step_fits(int stage, int kind, size_t pattern, size_t content, int64_t flags) {
  int decode = stage == WANE_STAGE_DECODE;
  switch (kind) {
    case WANE_STEP_SPLIT: return stage == WANE_STAGE_SPLIT && pattern && (flags & 255) <= WANE_SPLIT_CONTIGUOUS;
    case WANE_STEP_REPLACE: return pattern != 0;
    case WANE_STEP_PREFIX: return !decode && content;
    case WANE_STEP_BYTES: return 1;
    case WANE_STEP_METASPACE: return decode && content && content <= 4;
    case WANE_STEP_TRIM: return decode && content && content <= 4 && flags >= 0 && flags >> 16 <= 0xffff;
    case WANE_STEP_BYTE_FALLBACK:
    case WANE_STEP_FUSE: return decode;
    default: return !decode && kind >= 0 && kind < WANE_STEP_END;
  }
}

int wane_tokenizer_step(wane_tokenizer *t, int stage, int kind, const char *pattern, size_t pattern_bytes, const char *content, size_t content_bytes,
                        int64_t flags) {
  int status = describing(t, "wane_tokenizer_step");
  if (status) return status;
  if (stage < 0 || stage > 2 || !step_fits(stage, kind, pattern ? pattern_bytes : 0, content ? content_bytes : 0, flags))
    return wane_fail(WANE_E_ARG, "wane_tokenizer_step: stage %d has no step %d with these arguments", stage, kind);
  if (content && text_valid(content, content_bytes) != content_bytes) return wane_fail(WANE_E_ARG, "wane_tokenizer_step: content is no UTF-8");
  text_steps *s = &t->stage[stage];
  if (s->n >= 256) return wane_fail(WANE_E_FORMAT, "more than 256 steps");
  if (s->n == s->cap) {
    void *p = text_grow(s->at, s->n, &s->cap, sizeof *s->at, "steps");
    if (!p) return WANE_E_MEMORY;
    s->at = p;
  }
  text_step step = { .kind = kind, .flags = flags };
  if (kind == WANE_STEP_SPLIT || kind == WANE_STEP_REPLACE) status = text_matcher_init(&step.match, pattern, pattern_bytes, (flags & WANE_STEP_REGEX) != 0);
  if (!status && content) {
    step.content = wane_alloc(content_bytes + 1, "a step");
    step.content_n = content_bytes;
    if (step.content) memcpy(step.content, content, content_bytes);
    else status = WANE_E_MEMORY;
  }
  if (status) free_step(&step);
  else s->at[s->n++] = step;
  return status;
}

/* Normalized forms of the added tokens: what is searched in normalized text, and what the decoder is given. */
static int normalize_added(wane_tokenizer *t) {
  text_run r = { 0 };
  int status = text_match_init(&r.match);
  for (size_t i = 0; i < t->added_n && !status; i++) {
    text_added *a = &t->added[i];
    a->norm = a->at;
    if (!(a->flags & WANE_TOKEN_NORMALIZED) || !t->stage[WANE_STAGE_NORMALIZE].n) continue;
    r.text.n = r.spans.n = 0;
    r.at_start = 1;
    text_add(&r.text, t->added_bytes.data + a->at.start, a->at.end - a->at.start);
    text_push(&r.spans, 0, r.text.n);
    status = text_run_steps(&r, &t->stage[WANE_STAGE_NORMALIZE]);
    if (status) break;
    size_t start = t->added_bytes.n;
    if (r.spans.n) text_add(&t->added_bytes, r.text.data + r.spans.at[0].start, r.spans.at[0].end - r.spans.at[0].start);
    a->norm = (text_span){ (uint32_t)start, (uint32_t)t->added_bytes.n };
    status = t->added_bytes.failed;
  }
  text_run_free(&r);
  return status;
}

/* Whether no token has a "▁" right behind something else. Then no merge crosses such a place, and a long text without a
 * pre-tokenizer (SentencePiece's models) can be merged word by word: the same result from memory that stays in the cache. */
static int breaks_at_words(const wane_tokenizer *t) {
  static const char mark[] = "\xe2\x96\x81";
  if (t->prefix_n || t->suffix_n || text_table_find(&t->vocab, mark, 3) < 0) return 0;
  for (size_t id = 0; id < t->vocab.ids; id++) {
    size_t n;
    const char *s = text_table_get(&t->vocab, (int32_t)id, &n);
    for (size_t i = 3; s && i + 3 <= n; i++)
      if (!memcmp(s + i, mark, 3) && memcmp(s + i - 3, mark, 3)) return 0;
  }
  return 1;
}

int wane_tokenizer_ready(wane_tokenizer *t) {
  int status = describing(t, "wane_tokenizer_ready");
  if (!status && !(t->model_flags & WANE_MODEL_USE_SCORES)) { wane_release(t->scores); t->scores = NULL; }
  if (!status) status = normalize_added(t);
  if (!status) status = text_index_build(t, &t->raw, 0);
  if (!status) status = text_index_build(t, &t->normalized, 1);
  if (status) return status;
  for (unsigned b = 0; b < 256; b++) {
    char name[8], c[4];
    t->byte_id[b] = text_table_find(&t->vocab, c, text_encode(text_byte_char(b), c));
    snprintf(name, sizeof name, "<0x%02X>", b);
    t->fallback_id[b] = text_table_find(&t->vocab, name, 6);
  }
  const text_steps *split = &t->stage[WANE_STAGE_SPLIT];
  t->raw_bytes = split->n && split->at[split->n - 1].kind == WANE_STEP_BYTES && !t->scores && !t->prefix_n && !t->suffix_n &&
                 !(t->model_flags & WANE_MODEL_BYTE_FALLBACK);
  t->word_breaks = !t->raw_bytes && breaks_at_words(t);
  t->ready = 1;
  return WANE_OK;
}

/* ---------------------------------------------------------------- looking up */

int32_t wane_tokenizer_find(const wane_tokenizer *t, const char *text, size_t bytes) { return t && text ? text_table_find(&t->vocab, text, bytes) : -1; }

int wane_tokenizer_token(const wane_tokenizer *t, int64_t id, const char **text, size_t *bytes, int *flags) {
  if (!t || !text || !bytes || !flags) return wane_fail(WANE_E_ARG, "wane_tokenizer_token: a NULL argument");
  if (!text_table_has(&t->vocab, id))
    return wane_fail(WANE_E_NOTFOUND, "no token has the id %lld: ids run from 0 to %lld", (long long)id, (long long)t->vocab.ids - 1);
  const text_added *a = text_added_of(t, (int32_t)id);
  *text = text_table_get(&t->vocab, (int32_t)id, bytes);
  *flags = a ? a->flags : 0;
  return WANE_OK;
}

/* ---------------------------------------------------------------- encoding */

typedef struct encoder {
  const wane_tokenizer *t;
  wane_job *job;
  wane_encoding *out;
  text_bpe *bpe;
  text_run run;                      /* of one gap between added tokens */
  text_buf normal;                   /* a normalized gap */
  text_steps split;                  /* the tokenizer's, without a last byte map that the model does itself */
} encoder;

static int emit_added(encoder *e, const text_added *a, const char *matched, size_t n) {
  wane_encoding *out = e->out;
  text_emit(out, a->id);
  const char *own = e->t->added_bytes.data + a->at.start;
  if (out->failed || (n == a->at.end - a->at.start && !memcmp(own, matched, n))) return out->failed;
  if (out->shown_n == out->shown_cap) {
    void *p = text_grow(out->shown, out->shown_n, &out->shown_cap, sizeof *out->shown, "matched texts");
    if (!p) return WANE_E_MEMORY;
    out->shown = p;
  }
  size_t start = out->bytes.n;
  text_add(&out->bytes, matched, n);
  out->shown[out->shown_n].index = (int64_t)out->n - 1;
  out->shown[out->shown_n++].at = (text_span){ (uint32_t)start, (uint32_t)out->bytes.n };
  return out->bytes.failed;
}

/* A stretch without added tokens, normalized. */
static int encode_plain(encoder *e, const char *s, size_t n, int at_start) {
  text_run *r = &e->run;
  r->text.n = r->spans.n = 0;
  r->at_start = at_start;
  text_add(&r->text, s, n);
  text_push(&r->spans, 0, n);
  if (r->text.failed || r->spans.failed) return WANE_E_MEMORY;
  int status = text_run_steps(r, &e->split);
  for (size_t i = 0; i < r->spans.n && !status; i++) {
    if (i % 1024 == 0 && e->job && wane_job_cancelled(e->job)) return wane_fail(WANE_E_CANCELLED, "encoding was cancelled");
    status = text_bpe_encode(e->t, e->bpe, e->out, r->text.data + r->spans.at[i].start, r->spans.at[i].end - r->spans.at[i].start);
  }
  return status;
}

static int word_before(const char *s, size_t at) {
  size_t k = at;
  uint32_t cp;
  if (!at) return 0;
  do k--; while (k && (s[k] & 0xc0) == 0x80);
  text_next(s + k, at - k, &cp);
  return text_is_word(cp);
}

static size_t space_before(const char *s, size_t at) {
  while (at) {
    size_t k = at;
    uint32_t cp;
    do k--; while (k && (s[k] & 0xc0) == 0x80);
    text_next(s + k, at - k, &cp);
    if (!text_is_space(cp)) break;
    at = k;
  }
  return at;
}

static size_t space_behind(const char *s, size_t n, size_t at) {
  while (at < n) {
    uint32_t cp;
    size_t k = text_next(s + at, n - at, &cp);
    if (!text_is_space(cp)) break;
    at += k;
  }
  return at;
}

static int stands_alone(const char *s, size_t n, text_span at) {
  uint32_t cp;
  if (word_before(s, at.start)) return 0;
  if (at.end == n) return 1;
  text_next(s + at.end, n - at.end, &cp);
  return !text_is_word(cp);
}

static int encode_gap(encoder *e, const char *s, size_t n, int at_start, int normalized);

/* Cuts the added tokens of one index out of s. A match that is refused (single_word) still takes its text out of the search, and
 * text swallowed by rstrip may match again: both as upstream's find_matches has it. */
static int cut_added(encoder *e, const char *s, size_t n, int at_start, int normalized) {
  const text_index *ix = normalized ? &e->t->normalized : &e->t->raw;
  size_t from = 0, done = 0;
  text_span at;
  const text_added *a;
  int status = 0;
  while (!status && (a = text_index_next(e->t, ix, normalized, s, n, from, &at))) {
    from = at.end;
    if ((a->flags & WANE_TOKEN_SINGLE_WORD) && !stands_alone(s, n, at)) continue;
    size_t start = at.start, stop = at.end;
    if (a->flags & WANE_TOKEN_LSTRIP) { start = space_before(s, start); if (start < done) start = done; }
    if (a->flags & WANE_TOKEN_RSTRIP) stop = space_behind(s, n, stop);
    if (done < start) status = encode_gap(e, s + done, start - done, at_start && done == 0, normalized);
    if (!status && stop > start) status = emit_added(e, a, s + start, stop - start);
    done = stop;
  }
  if (!status && done != n) status = encode_gap(e, s + done, n - done, at_start && done == 0, normalized);
  return status;
}

/* What lies between added tokens: the normalizer comes after the first cut, the rest after the second. */
static int encode_gap(encoder *e, const char *s, size_t n, int at_start, int normalized) {
  const text_steps *steps = &e->t->stage[WANE_STAGE_NORMALIZE];
  text_run *r = &e->run;
  if (normalized) return encode_plain(e, s, n, at_start);
  if (!steps->n) return cut_added(e, s, n, at_start, 1);
  r->text.n = r->spans.n = 0;
  r->at_start = at_start;
  text_add(&r->text, s, n);
  text_push(&r->spans, 0, n);
  if (r->text.failed || r->spans.failed) return WANE_E_MEMORY;
  int status = text_run_steps(r, steps);
  if (status || !r->spans.n) return status;
  e->normal.n = 0;
  text_add(&e->normal, r->text.data + r->spans.at[0].start, r->spans.at[0].end - r->spans.at[0].start);
  return e->normal.failed ? e->normal.failed : cut_added(e, e->normal.data, e->normal.n, at_start, 1);
}

static int encode(const wane_tokenizer *t, wane_job *job, wane_encoding **out, const char *text, size_t bytes) {
  encoder e = { .t = t, .job = job, .split = t->stage[WANE_STAGE_SPLIT] };
  text_buf clean = { 0 };
  if (t->raw_bytes) e.split.n--;
  e.out = wane_alloc_zero(sizeof *e.out, "an encoding");
  e.bpe = text_bpe_new();
  int status = e.out && e.bpe ? text_match_init(&e.run.match) : WANE_E_MEMORY;
  if (!status && text_valid(text, bytes) != bytes) {
    text_lossy(&clean, text, bytes);
    status = clean.failed;
    text = clean.data;
    bytes = clean.n;
  }
  if (!status && bytes) status = cut_added(&e, text, bytes, 1, 0);
  text_free(&clean);
  text_free(&e.normal);
  text_run_free(&e.run);
  text_bpe_free(e.bpe);
  if (status) { wane_encoding_free(e.out); return status; }
  *out = e.out;
  return WANE_OK;
}

static int encodable(const wane_tokenizer *t, const void *out, const char *text, size_t bytes) {
  if (!t || !t->ready || !out || (!text && bytes)) return wane_fail(WANE_E_ARG, "encode: a ready tokenizer and a text are needed");
  if (bytes > TEXT_MAX_BYTES) return wane_fail(WANE_E_ARG, "a text of %zu bytes; at most %d at once", bytes, TEXT_MAX_BYTES);
  return 0;
}

int wane_tokenizer_encode(const wane_tokenizer *t, wane_encoding **out, const char *text, size_t bytes) {
  int status = encodable(t, out, text, bytes);
  return status ? status : encode(t, NULL, out, text, bytes);
}

/* ---------------------------------------------------------------- encoding as a job */

typedef struct encoding_job { wane_tokenizer *t; wane_encoding *out; size_t bytes; char text[]; } encoding_job;

static int encoding_run(wane_job *job, void *state) {
  encoding_job *e = state;
  return encode(e->t, job, &e->out, e->text, e->bytes);
}

static void encoding_drop(void *state) {
  encoding_job *e = state;
  wane_encoding_free(e->out);
  wane_tokenizer_free(e->t);
  wane_release(e);
}

static const wane_job_vtable encoding_vtable = { encoding_run, encoding_drop };

int wane_tokenizer_encode_start(wane_tokenizer *t, wane_job **out, const char *text, size_t bytes) {
  int status = encodable(t, out, text, bytes);
  if (status) return status;
  encoding_job *e = wane_alloc(sizeof *e + bytes, "a text");
  if (!e) return WANE_E_MEMORY;
  *e = (encoding_job){ .t = t, .bytes = bytes };
  if (bytes) memcpy(e->text, text, bytes);
  atomic_fetch_add(&t->refs, 1);
  return wane_job_start(out, &encoding_vtable, e);
}

int wane_encoding_take(wane_job *job, wane_encoding **out) {
  if (!job || !out) return wane_fail(WANE_E_ARG, "wane_encoding_take: job and out are needed");
  int status = wane_job_poll(job);
  if (status) return status;
  encoding_job *e = wane_job_state(job);
  if (!e || !e->out) return wane_fail(WANE_E_ARG, "this job's encoding was taken before");
  *out = e->out;
  e->out = NULL;
  return WANE_OK;
}

int64_t wane_encoding_count(const wane_encoding *e) { return e ? (int64_t)e->n : 0; }
const int32_t *wane_encoding_ids(const wane_encoding *e) { return e ? e->ids : NULL; }

int wane_encoding_token(const wane_encoding *e, const wane_tokenizer *t, int64_t i, const char **text, size_t *bytes) {
  if (!e || !t || !text || !bytes || i < 0 || (size_t)i >= e->n)
    return wane_fail(WANE_E_ARG, "token %lld of %lld", (long long)i, (long long)wane_encoding_count(e));
  size_t low = 0, high = e->shown_n;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (e->shown[middle].index < i) low = middle + 1;
    else high = middle;
  }
  if (low < e->shown_n && e->shown[low].index == i) {
    *text = e->bytes.data ? e->bytes.data + e->shown[low].at.start : "";
    *bytes = e->shown[low].at.end - e->shown[low].at.start;
    return WANE_OK;
  }
  *text = text_table_get(&t->vocab, e->ids[i], bytes);
  return *text ? WANE_OK : wane_fail(WANE_E_ARG, "the encoding is another tokenizer's");
}

void wane_encoding_free(wane_encoding *e) {
  if (!e) return;
  wane_release(e->ids);
  text_free(&e->bytes);
  wane_release(e->shown);
  wane_release(e);
}
