/* vocab_json.c: reads tokenizer.json and tokenizer_config.json in one streaming pass (yajl). The large members go straight into the
 * tables: model.vocab, model.merges, added_tokens, added_tokens_decoder. Everything else is written out again as a small JSON text
 * (the large members become null) for Lua to parse. A name that appears twice in an object is an error. */
#include "text.h"
#include "../reader/reader.h"
#include <yajl/yajl_parse.h>

enum { DEPTH_LIMIT = 64 };
/* Where in the document the parser stands. */
enum where { REST, VOCAB, MERGES, MERGE_PAIR, ADDED, ADDED_ITEM, DECODER, DECODER_ITEM, SKIP, PLACES };

typedef struct reader {
  wane_tokenizer *t;
  int which;                          /* 0 tokenizer.json, 1 tokenizer_config.json */
  enum where where;
  int depth, skip_from;               /* containers open; where a skipped value began */
  int in_model;                       /* 1 inside the top-level "model" */
  int vocab_seen, merges_seen;
  text_buf key;                       /* the last key of the object being read */
  text_buf rest;
  struct { char array, comma; uint32_t serial; } level[DEPTH_LIMIT + 1];
  uint32_t serial;                    /* numbers objects, for the set of their keys */
  text_table names;                   /* "serial key" of every key seen in REST */
  /* the merge or the added token being read */
  text_buf first, second;
  int parts;
  int64_t id;
  int flags, given;
  int status;                         /* why a callback stopped the parser */
} reader;

/* ---------------------------------------------------------------- the rest, written again */

static int stop(reader *r, int status) {
  if (status < 0) r->status = status;
  return status >= 0;
}

void text_add_json(text_buf *out, const char *s, size_t n) {
  static const char hex[] = "0123456789abcdef";
  text_add(out, "\"", 1);
  for (size_t i = 0; i < n; i++) {
    unsigned char c = (unsigned char)s[i];
    if (c == '"' || c == '\\') { char two[2] = { '\\', (char)c }; text_add(out, two, 2); }
    else if (c < 32) { char six[6] = { '\\', 'u', '0', '0', hex[c >> 4], hex[c & 15] }; text_add(out, six, 6); }
    else text_add(out, (const char *)&c, 1);
  }
  text_add(out, "\"", 1);
}

/* Before a value in an array, and before a key. */
static void comma(reader *r) {
  if (r->level[r->depth].comma) text_add(&r->rest, ",", 1);
  r->level[r->depth].comma = 1;
}

static int value(reader *r, const char *text, size_t n) {
  if (r->level[r->depth].array) comma(r);
  text_add(&r->rest, text, n);
  if (r->rest.failed) return stop(r, r->rest.failed);
  if (r->rest.n > TEXT_CONFIG_LIMIT) return stop(r, wane_fail(WANE_E_FORMAT, "more than %d bytes of settings beside vocabulary and merges", TEXT_CONFIG_LIMIT));
  return 1;
}

static int is_key(const reader *r, const char *name) { return r->key.n == strlen(name) && !memcmp(r->key.data, name, r->key.n); }

static int unexpected(reader *r, const char *found) {
  static const char *const place[PLACES] = { [VOCAB] = "model.vocab", [MERGES] = "model.merges", [MERGE_PAIR] = "model.merges", [ADDED] = "added_tokens",
                                       [ADDED_ITEM] = "added_tokens", [DECODER] = "added_tokens_decoder", [DECODER_ITEM] = "added_tokens_decoder" };
  const char *where = place[r->where] ? place[r->where] : "the file";
  return stop(r, wane_fail(WANE_E_FORMAT, "%s in %s after the key '%.*s'", found, where, (int)(r->key.n < 40 ? r->key.n : 40), r->key.n ? r->key.data : ""));
}

/* ---------------------------------------------------------------- added tokens */

static const struct { const char *name; int flag; } added_flags[] = {
  { "single_word", WANE_TOKEN_SINGLE_WORD }, { "lstrip", WANE_TOKEN_LSTRIP }, { "rstrip", WANE_TOKEN_RSTRIP },
  { "normalized", WANE_TOKEN_NORMALIZED }, { "special", WANE_TOKEN_SPECIAL },
};

static int begin_added(reader *r) {
  r->first.n = 0;
  r->parts = 0;
  r->flags = r->given = 0;
  if (r->where == ADDED) r->id = -1;
  r->where = r->where == ADDED ? ADDED_ITEM : DECODER_ITEM;
  return 1;
}

static int end_added(reader *r) {
  int decoder = r->where == DECODER_ITEM;
  r->where = decoder ? DECODER : ADDED;
  if (!r->parts || r->id < 0) return stop(r, wane_fail(WANE_E_FORMAT, "an added token without %s", r->parts ? "an id" : "content"));
  if (!(r->given & WANE_TOKEN_NORMALIZED) && !(r->flags & WANE_TOKEN_SPECIAL)) r->flags |= WANE_TOKEN_NORMALIZED;
  return stop(r, text_add_added(r->t, r->id, r->first.data ? r->first.data : "", r->first.n, r->flags));
}

/* ---------------------------------------------------------------- merges */

/* "left right": exactly one space. */
static int merge_line(reader *r, const char *s, size_t n) {
  const char *space = memchr(s, ' ', n);
  if (n >= 8 && !memcmp(s, "#version", 8)) return 1;
  if (!space || memchr(space + 1, ' ', n - (size_t)(space + 1 - s)))
    return stop(r, wane_fail(WANE_E_FORMAT, "merge '%.*s': two tokens with one space between them were expected", (int)(n < 60 ? n : 60), s));
  return stop(r, text_add_merge(r->t, s, (size_t)(space - s), space + 1, n - (size_t)(space + 1 - s)));
}

static int merge_part(reader *r, const char *s, size_t n) {
  text_buf *b = r->parts++ ? &r->second : &r->first;
  if (r->parts > 2) return unexpected(r, "a third token of a merge");
  b->n = 0;
  text_add(b, s, n);
  return stop(r, b->failed);
}

static int merge_end(reader *r) {
  r->where = MERGES;
  if (r->parts != 2) return unexpected(r, "a merge of fewer than two tokens");
  return stop(r, text_add_merge(r->t, r->first.n ? r->first.data : "", r->first.n, r->second.n ? r->second.data : "", r->second.n));
}

/* ---------------------------------------------------------------- yajl's events */

static int on_string(void *ctx, const unsigned char *text, size_t n) {
  reader *r = ctx;
  const char *s = (const char *)text;
  switch (r->where) {
    case SKIP: return 1;
    case MERGES: return merge_line(r, s, n);
    case MERGE_PAIR: return merge_part(r, s, n);
    case ADDED_ITEM:
    case DECODER_ITEM:
      if (!is_key(r, "content")) return 1;
      r->parts = 1;
      r->first.n = 0;
      text_add(&r->first, s, n);
      return stop(r, r->first.failed);
    case REST: break;
    default: return unexpected(r, "a string");
  }
  if (r->in_model && r->depth == 2 && r->which == 0) {
    int prefix = is_key(r, "continuing_subword_prefix");
    if (prefix || is_key(r, "end_of_word_suffix")) {
      char **where = prefix ? &r->t->prefix : &r->t->suffix;
      wane_release(*where);
      if (!(*where = wane_alloc(n + 1, "a prefix"))) return stop(r, WANE_E_MEMORY);
      memcpy(*where, s, n);
      *(prefix ? &r->t->prefix_n : &r->t->suffix_n) = n;
    }
  }
  if (r->level[r->depth].array) comma(r);
  text_add_json(&r->rest, s, n);
  r->level[r->depth].comma = 1;
  if (r->rest.n > TEXT_CONFIG_LIMIT) return value(r, "", 0);
  return stop(r, r->rest.failed);
}

/* Digits only: -1 for anything else. */
static int64_t whole_number(const char *s, size_t n) {
  int64_t x = 0;
  if (n == 0 || n > 12) return -1;
  for (size_t i = 0; i < n; i++) {
    if (s[i] < '0' || s[i] > '9') return -1;
    x = x * 10 + (s[i] - '0');
  }
  return x;
}

static int on_number(void *ctx, const char *s, size_t n) {
  reader *r = ctx;
  int64_t id;
  switch (r->where) {
    case SKIP: return 1;
    case VOCAB:
      if ((id = whole_number(s, n)) < 0) return stop(r, wane_fail(WANE_E_FORMAT, "token '%.*s' has the id %.*s", (int)(r->key.n < 40 ? r->key.n : 40),
                                                                   r->key.n ? r->key.data : "", (int)(n < 20 ? n : 20), s));
      return stop(r, text_table_add(&r->t->vocab, id, r->key.n ? r->key.data : "", r->key.n));
    case ADDED_ITEM:
    case DECODER_ITEM:
      if (is_key(r, "id") && r->where == ADDED_ITEM && (r->id = whole_number(s, n)) < 0) return unexpected(r, "an id that is no whole number");
      return 1;
    case REST: return value(r, s, n);
    default: return unexpected(r, "a number");
  }
}

static int on_boolean(void *ctx, int yes) {
  reader *r = ctx;
  switch (r->where) {
    case SKIP: return 1;
    case ADDED_ITEM:
    case DECODER_ITEM:
      for (size_t i = 0; i < sizeof added_flags / sizeof *added_flags; i++) {
        if (!is_key(r, added_flags[i].name)) continue;
        r->given |= added_flags[i].flag;
        if (yes) r->flags |= added_flags[i].flag;
      }
      return 1;
    case REST: return yes ? value(r, "true", 4) : value(r, "false", 5);
    default: return unexpected(r, "true or false");
  }
}

static int on_null(void *ctx) {
  reader *r = ctx;
  switch (r->where) {
    case SKIP:
    case ADDED_ITEM:
    case DECODER_ITEM: return 1;
    case REST: return value(r, "null", 4);
    default: return unexpected(r, "null");
  }
}

/* The member that begins here is one of the large ones: notes it, leaves null in the rest. */
static int capture(reader *r, enum where where, int *seen) {
  if (seen && (*seen)++) return unexpected(r, "a second table");
  if (!value(r, "null", 4)) return 0;
  r->where = where;
  return 1;
}

static int open_container(reader *r, int array) {
  if (r->where == REST && r->level[r->depth].array) comma(r);
  if (r->where == REST) text_add(&r->rest, array ? "[" : "{", 1);
  if (++r->depth > DEPTH_LIMIT) return stop(r, wane_fail(WANE_E_FORMAT, "nested deeper than %d", DEPTH_LIMIT));
  r->level[r->depth].array = (char)array;
  r->level[r->depth].comma = 0;
  r->level[r->depth].serial = ++r->serial;
  return r->where == REST ? stop(r, r->rest.failed) : 1;
}

static int on_map(void *ctx) {
  reader *r = ctx;
  int ok = 1;
  if (r->where == ADDED) ok = begin_added(r);
  else if (r->where == DECODER) {
    if ((r->id = whole_number(r->key.n ? r->key.data : "", r->key.n)) < 0) return unexpected(r, "an id that is no whole number");
    ok = begin_added(r);
  } else if (r->where == VOCAB || r->where == MERGES || r->where == MERGE_PAIR) return unexpected(r, "an object");
  else if (r->where == REST && r->which == 0 && r->in_model && r->depth == 2 && is_key(r, "vocab")) ok = capture(r, VOCAB, &r->vocab_seen);
  else if (r->where == REST && r->which == 1 && r->depth == 1 && is_key(r, "added_tokens_decoder")) ok = capture(r, DECODER, NULL);
  else if (r->where == REST && r->which == 0 && r->depth == 1 && is_key(r, "model")) r->in_model = 1;
  else if (r->where == ADDED_ITEM || r->where == DECODER_ITEM) { r->skip_from = r->depth + 1; return unexpected(r, "an object"); }
  return ok && open_container(r, 0);
}

static int on_map_end(void *ctx) {
  reader *r = ctx;
  r->depth--;
  switch (r->where) {
    case VOCAB:
    case DECODER: r->where = REST; return 1;
    case ADDED_ITEM:
    case DECODER_ITEM: return end_added(r);
    case REST:
      if (r->depth == 1) r->in_model = 0;
      text_add(&r->rest, "}", 1);
      r->level[r->depth].comma = 1;
      return stop(r, r->rest.failed);
    default: return 1;
  }
}

static int on_array(void *ctx) {
  reader *r = ctx;
  int ok = 1;
  if (r->where == MERGES) { r->where = MERGE_PAIR; r->parts = 0; }
  else if (r->where == REST && r->which == 0 && r->in_model && r->depth == 2 && is_key(r, "merges")) ok = capture(r, MERGES, &r->merges_seen);
  else if (r->where == REST && r->which == 0 && r->in_model && r->depth == 2 && is_key(r, "vocab")) {
    ok = capture(r, SKIP, &r->vocab_seen);            /* Unigram: Lua refuses it by name */
    r->skip_from = r->depth;
  } else if (r->where == REST && r->which == 0 && r->depth == 1 && is_key(r, "added_tokens")) ok = capture(r, ADDED, NULL);
  else if (r->where != REST && r->where != SKIP) return unexpected(r, "a list");
  return ok && open_container(r, 1);
}

static int on_array_end(void *ctx) {
  reader *r = ctx;
  r->depth--;
  switch (r->where) {
    case MERGE_PAIR: return merge_end(r);
    case MERGES:
    case ADDED: r->where = REST; return 1;
    case SKIP:
      if (r->depth == r->skip_from) r->where = REST;
      return 1;
    default:
      text_add(&r->rest, "]", 1);
      r->level[r->depth].comma = 1;
      return stop(r, r->rest.failed);
  }
}

/* A key of the rest may appear once an object: their set is a table of its own. */
static int note_name(reader *r, const char *s, size_t n) {
  uint32_t serial = r->level[r->depth].serial;
  r->second.n = 0;
  text_add(&r->second, (const char *)&serial, sizeof serial);
  text_add(&r->second, s, n);
  if (r->second.failed) return stop(r, r->second.failed);
  if (text_table_find(&r->names, r->second.data, r->second.n) >= 0)
    return stop(r, wane_fail(WANE_E_FORMAT, "the name '%.*s' is there twice in one object", (int)(n < 60 ? n : 60), s));
  return stop(r, text_table_add(&r->names, (int64_t)r->names.ids, r->second.data, r->second.n));
}

static int on_key(void *ctx, const unsigned char *text, size_t n) {
  reader *r = ctx;
  r->key.n = 0;
  text_add(&r->key, (const char *)text, n);
  if (r->key.failed) return stop(r, r->key.failed);
  if (r->where != REST) return 1;
  if (!note_name(r, (const char *)text, n)) return 0;
  comma(r);
  text_add_json(&r->rest, (const char *)text, n);
  return value(r, ":", 1);
}

/* ---------------------------------------------------------------- the file */

static const yajl_callbacks callbacks = { on_null, on_boolean, NULL, NULL, on_number, on_string, on_map, on_key, on_map_end, on_array, on_array_end };

/* Reads a whole file into t; which: 0 tokenizer.json, 1 tokenizer_config.json. */
int text_read_json(wane_tokenizer *t, wane_job *job, const wane_file *file, int which) {
  wane_json_source source = { file, 0, file->size, which ? "the configuration" : "the tokenizer", job };
  reader *r = wane_alloc_zero(sizeof *r, "a JSON reader");
  if (!r) return WANE_E_MEMORY;
  r->t = t;
  r->which = which;
  int status = wane_json_parse(&source, &callbacks, r);
  if (r->status < 0) {
    char why[400];
    wane_error_save(why, sizeof why);
    status = wane_fail(r->status, "%.200s: %s", file->path, why);
  }
  if (!status && (!r->rest.n || r->rest.data[0] != '{')) status = wane_fail(WANE_E_FORMAT, "%.200s: an object was expected", file->path);
  text_free(&t->config[which]);
  t->config[which] = r->rest;
  text_free(&r->key);
  text_free(&r->first);
  text_free(&r->second);
  text_table_free(&r->names);
  wane_release(r);
  return status;
}
