/* vocab_gguf.c: reads a tokenizer out of a GGUF file's metadata (ggml's gguf.md; versions 2 and 3): tokens, types, scores and merges go
 * into the tables, the other tokenizer keys become a small JSON object for Lua. Only the metadata is read. Every count is held
 * against the size of the file before anything is allocated or looped over. */
#include "text.h"
#include "../reader/reader.h"
#include <math.h>
#include <stdio.h>

enum { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64, TYPES };
enum { BUFFER = 1 << 16, SHOWN = 200 };
static const uint8_t size_of[TYPES] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };

typedef struct reader {
  wane_tokenizer *t;
  wane_job *job;
  const wane_file *file;
  const char *path;
  uint64_t size, at;                 /* of the file; position of buffer[from] */
  size_t from, filled;
  text_buf string;                   /* the string read last */
  text_buf key;
  int32_t *types;
  uint64_t types_n, tokens_n;
  int seen;                          /* bits of the tables that were there */
  text_table names;                  /* keys so far */
  char buffer[BUFFER];
} reader;

/* ---------------------------------------------------------------- bytes */

static int truncated(reader *r) {
  return wane_fail(WANE_E_FORMAT, "%.*s ends inside its metadata (%llu bytes): the file is truncated", SHOWN, r->path, (unsigned long long)r->size);
}

static int refill(reader *r) {
  size_t n = r->size - r->at < BUFFER ? (size_t)(r->size - r->at) : BUFFER;
  if (r->job && wane_job_cancelled(r->job)) return wane_fail(WANE_E_CANCELLED, "reading %.*s was cancelled", SHOWN, r->path);
  if (n == 0) return truncated(r);
  int status = wane_file_read(r->file, r->at, r->buffer, n);
  if (status) return status;
  r->from = 0;
  r->filled = n;
  if (r->job) wane_job_set_progress(r->job, r->at, 0);
  return 0;
}

static int get(reader *r, void *out, size_t n) {
  char *to = out;
  while (n) {
    if (r->from == r->filled) { int status = refill(r); if (status) return status; }
    size_t part = r->filled - r->from < n ? r->filled - r->from : n;
    memcpy(to, r->buffer + r->from, part);
    to += part;
    n -= part;
    r->from += part;
    r->at += part;
  }
  return 0;
}

static int skip(reader *r, uint64_t n) {
  if (n > r->size - r->at) return truncated(r);
  if (n <= r->filled - r->from) r->from += (size_t)n;
  else r->from = r->filled = 0;
  r->at += n;
  return 0;
}

static int get_string(reader *r, text_buf *out) {
  uint64_t n;
  int status = get(r, &n, 8);
  if (status) return status;
  if (n > r->size - r->at) return truncated(r);
  if (n > TEXT_MAX_BYTES) return wane_fail(WANE_E_FORMAT, "%.*s: a string of %llu bytes in the metadata", SHOWN, r->path, (unsigned long long)n);
  out->n = 0;
  if (!text_room(out, (size_t)n + 1)) return out->failed;
  status = get(r, out->data, (size_t)n);
  out->n = (size_t)n;
  return status;
}

/* ---------------------------------------------------------------- values */

static int skip_value(reader *r, uint32_t type, int depth);

static int skip_array(reader *r, int depth) {
  uint32_t type;
  uint64_t n;
  int status = get(r, &type, 4);
  if (!status) status = get(r, &n, 8);
  if (status) return status;
  if (type >= TYPES || depth > 4) return wane_fail(WANE_E_FORMAT, "%.*s: an array of items of unknown type %u", SHOWN, r->path, type);
  if (size_of[type]) return n > (r->size - r->at) / size_of[type] ? truncated(r) : skip(r, n * size_of[type]);
  if (n > (r->size - r->at) / 8) return truncated(r);
  while (n-- && !status) status = skip_value(r, type, depth + 1);
  return status;
}

static int skip_value(reader *r, uint32_t type, int depth) {
  uint64_t n;
  if (type == ARRAY) return skip_array(r, depth);
  if (type == STRING) { int status = get(r, &n, 8); return status ? status : skip(r, n); }
  return skip(r, size_of[type]);
}

/* A scalar as JSON text. */
static int scalar(reader *r, uint32_t type, char text[40]) {
  union { uint8_t u8; int8_t i8; uint16_t u16; int16_t i16; uint32_t u32; int32_t i32; float f32; uint64_t u64; int64_t i64; double f64; } v = { 0 };
  int status = get(r, &v, size_of[type]);
  double f = type == F32 ? (double)v.f32 : v.f64;
  switch (type) {
    case U8: snprintf(text, 40, "%u", v.u8); break;
    case I8: snprintf(text, 40, "%d", v.i8); break;
    case U16: snprintf(text, 40, "%u", v.u16); break;
    case I16: snprintf(text, 40, "%d", v.i16); break;
    case U32: snprintf(text, 40, "%u", v.u32); break;
    case I32: snprintf(text, 40, "%d", v.i32); break;
    case U64: snprintf(text, 40, "%llu", (unsigned long long)v.u64); break;
    case I64: snprintf(text, 40, "%lld", (long long)v.i64); break;
    case BOOL: snprintf(text, 40, "%s", v.u8 ? "true" : "false"); break;
    default: /* a host's locale may write a decimal comma, so no printf("%g"): fractions are of no use here */
      snprintf(text, 40, isfinite(f) && fabs(f) < 1e15 ? "%.0f" : "null", f);
  }
  return status;
}

static int small_value(reader *r, uint32_t type) {
  text_buf *out = &r->t->config[0];
  char text[40];
  int status;
  if (type == STRING) status = get_string(r, &r->string);
  else status = scalar(r, type, text);
  if (status) return status;
  if (out->n > 1) text_add(out, ",", 1);
  text_add_json(out, r->key.data, r->key.n);
  text_add(out, ":", 1);
  if (type == STRING) text_add_json(out, r->string.data, r->string.n);
  else text_add(out, text, strlen(text));
  if (out->n > TEXT_CONFIG_LIMIT) return wane_fail(WANE_E_FORMAT, "%.*s: more than %d bytes of tokenizer settings", SHOWN, r->path, TEXT_CONFIG_LIMIT);
  return out->failed;
}

/* ---------------------------------------------------------------- the tables */

static int token(reader *r, uint64_t i) {
  int status = get_string(r, &r->string);
  if (status) return status;
  if (text_valid(r->string.data, r->string.n) != r->string.n)
    return wane_fail(WANE_E_FORMAT, "%.*s: token %llu is no UTF-8", SHOWN, r->path, (unsigned long long)i);
  /* Empty tokens stand for ids that are not used; several may be. */
  if (r->string.n == 0) return text_table_reserve(&r->t->vocab, (int64_t)i, "", 0);
  return text_table_add(&r->t->vocab, (int64_t)i, r->string.data, r->string.n);
}

/* "left right": the left part is at least one byte, which may be the space itself (as llama.cpp reads it). */
static int merge(reader *r) {
  int status = get_string(r, &r->string);
  if (status) return status;
  size_t n = r->string.n;
  const char *s = r->string.data, *space = n > 1 ? memchr(s + 1, ' ', n - 1) : NULL;
  if (!space) return wane_fail(WANE_E_FORMAT, "%.*s: the merge '%.*s' has no two parts", SHOWN, r->path, (int)(n < 40 ? n : 40), s);
  return text_add_merge(r->t, s, (size_t)(space - s), space + 1, n - (size_t)(space + 1 - s));
}

enum { TOKENS = 1, KINDS = 2, SCORES = 4, MERGES = 8 };
static const struct { const char *key; int bit; uint32_t type; } tables[] = {
  { "tokenizer.ggml.tokens", TOKENS, STRING }, { "tokenizer.ggml.token_type", KINDS, I32 },
  { "tokenizer.ggml.scores", SCORES, F32 }, { "tokenizer.ggml.merges", MERGES, STRING },
};

static int read_table(reader *r, int which) {
  uint32_t type;
  uint64_t n;
  int status = get(r, &type, 4);
  if (!status) status = get(r, &n, 8);
  if (status) return status;
  if (type != tables[which].type && !(tables[which].bit == KINDS && type == U32))
    return wane_fail(WANE_E_FORMAT, "%.*s: %s holds items of type %u", SHOWN, r->path, tables[which].key, type);
  if (n > TEXT_MAX_ID || n > (r->size - r->at) / (type == STRING ? 8 : 4)) return truncated(r);
  r->seen |= tables[which].bit;
  switch (tables[which].bit) {
    case TOKENS:
      r->tokens_n = n;
      for (uint64_t i = 0; i < n && !status; i++) status = token(r, i);
      return status;
    case MERGES:
      for (uint64_t i = 0; i < n && !status; i++) status = merge(r);
      return status;
    case KINDS:
      if (!(r->types = wane_alloc(n * 4 + 4, "token types"))) return WANE_E_MEMORY;
      r->types_n = n;
      return get(r, r->types, (size_t)n * 4);
    default:
      if (!(r->t->scores = wane_alloc(n * 4 + 4, "token scores"))) return WANE_E_MEMORY;
      r->t->scores_n = (size_t)n;
      return get(r, r->t->scores, (size_t)n * 4);
  }
}

static int pair(reader *r) {
  uint32_t type;
  int status = get_string(r, &r->key);
  if (!status) status = get(r, &type, 4);
  if (status) return status;
  if (type >= TYPES)
    return wane_fail(WANE_E_FORMAT, "%.*s: key '%.*s' has the unknown type %u", SHOWN, r->path, (int)(r->key.n < 60 ? r->key.n : 60), r->key.data, type);
  if (text_table_find(&r->names, r->key.data, r->key.n) >= 0)
    return wane_fail(WANE_E_FORMAT, "%.*s: the key '%.*s' is there twice", SHOWN, r->path, (int)(r->key.n < 60 ? r->key.n : 60), r->key.data);
  status = text_table_add(&r->names, (int64_t)r->names.ids, r->key.data, r->key.n);
  if (status) return status;
  int ours = (r->key.n > 10 && !memcmp(r->key.data, "tokenizer.", 10)) || (r->key.n == 20 && !memcmp(r->key.data, "general.architecture", 20));
  for (int i = 0; i < 4; i++) {
    if (r->key.n != strlen(tables[i].key) || memcmp(r->key.data, tables[i].key, r->key.n)) continue;
    if (type != ARRAY) return wane_fail(WANE_E_FORMAT, "%.*s: %s is no array", SHOWN, r->path, tables[i].key);
    return read_table(r, i);
  }
  return ours && type != ARRAY ? small_value(r, type) : skip_value(r, type, 0);
}

/* Control tokens (type 3) are special, user-defined ones (4) are cut out of the text too; unknown (2) is special. */
static int add_kinds(reader *r) {
  if (r->seen & KINDS && r->types_n != r->tokens_n)
    return wane_fail(WANE_E_FORMAT, "%.*s: %llu token types for %llu tokens", SHOWN, r->path, (unsigned long long)r->types_n, (unsigned long long)r->tokens_n);
  if (r->seen & SCORES && r->t->scores_n != r->tokens_n)
    return wane_fail(WANE_E_FORMAT, "%.*s: %zu token scores for %llu tokens", SHOWN, r->path, r->t->scores_n, (unsigned long long)r->tokens_n);
  for (uint64_t i = 0; i < r->types_n; i++) {
    size_t n;
    if (r->types[i] < 2 || r->types[i] > 4) continue;
    const char *s = text_table_get(&r->t->vocab, (int32_t)i, &n);
    if (!n) continue;
    int status = text_add_added(r->t, (int64_t)i, s, n, r->types[i] == 4 ? 0 : WANE_TOKEN_SPECIAL);
    if (status) return status;
  }
  return 0;
}

static int read_all(reader *r) {
  char magic[4];
  uint32_t version;
  uint64_t tensors, pairs = 0;
  int status = get(r, magic, 4);
  if (!status && memcmp(magic, "GGUF", 4)) return wane_fail(WANE_E_FORMAT, "%.*s is no GGUF file (its first bytes are not 'GGUF')", SHOWN, r->path);
  if (!status) status = get(r, &version, 4);
  if (!status && version != 2 && version != 3) return wane_fail(WANE_E_FORMAT, "%.*s: GGUF version %u; 2 and 3 are read", SHOWN, r->path, version);
  if (!status) status = get(r, &tensors, 8);
  if (!status) status = get(r, &pairs, 8);
  /* A pair takes at least 13 bytes: key length, type, one byte. */
  if (!status && pairs > (r->size - r->at) / 13) status = truncated(r);
  text_add(&r->t->config[0], "{", 1);
  for (uint64_t i = 0; i < pairs && !status; i++) status = pair(r);
  if (status) return status;
  text_add(&r->t->config[0], "}", 1);
  if (!(r->seen & TOKENS)) return wane_fail(WANE_E_NOTFOUND, "%.*s holds no tokenizer (no tokenizer.ggml.tokens)", SHOWN, r->path);
  r->t->skip_bad_merges = 1;
  status = add_kinds(r);
  return status ? status : r->t->config[0].failed;
}

/* Reads the metadata of an open file into t. */
int text_read_gguf(wane_tokenizer *t, wane_job *job, const wane_file *file) {
  reader *r = wane_alloc_zero(sizeof *r, "a GGUF reader");
  if (!r) return WANE_E_MEMORY;
  r->t = t;
  r->job = job;
  r->file = file;
  r->path = file->path;
  r->size = file->size;
  int status = read_all(r);
  text_free(&r->string);
  text_free(&r->key);
  text_table_free(&r->names);
  wane_release(r->types);
  wane_release(r);
  return status;
}
