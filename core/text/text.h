/* text.h: what the files of core/text share: growable buffers, the vocabulary's tables, the steps of a tokenizer. Internal.
 *
 * A tokenizer is built in two parts. A job reads the large tables (vocab.c; vocab_json.c and vocab_gguf.c fill them); Lua then reads the small
 * configuration that is left and describes normalizer, pre-tokenizer and decoder as lists of steps. After wane_tokenizer_ready
 * nothing changes any more, so that any number of threads may encode and decode at once. Files are opened, and JSON is fed to yajl, by
 * core/reader. */
#ifndef WANE_TEXT_H
#define WANE_TEXT_H
#include "../base/base.h"
#include <stdatomic.h>
#include <string.h>

/* ---- growable buffers; the first failed allocation sticks in `failed`, so that callers check once at the end ---- */
struct wane_file;
typedef struct text_buf { char *data; size_t n, cap; int failed; } text_buf;
/* Room for `more` bytes behind n; 0 when memory ran out (then n stays and `failed` is set). */
int text_room(text_buf *b, size_t more);
void text_add(text_buf *b, const char *s, size_t n);
void text_add_char(text_buf *b, uint32_t cp);          /* as UTF-8 */
void text_free(text_buf *b);

typedef struct text_span { uint32_t start, end; } text_span;
/* A list of spans over one text. */
typedef struct text_spans { text_span *at; size_t n, cap; int failed; } text_spans;
void text_push(text_spans *s, size_t start, size_t end);
/* Grows `old` (n items of `size` bytes kept) so that one more fits; NULL, with the old block untouched, without memory. */
void *text_grow(void *old, size_t n, size_t *cap, size_t size, const char *what);

/* ---- Unicode (unicode.c) ---- */
/* Length of the longest valid UTF-8 prefix. */
size_t text_valid(const char *s, size_t n);
/* Appends s with every maximal invalid part replaced by U+FFFD (Unicode 15, 3.9 "substitution of maximal subparts"). */
void text_lossy(text_buf *out, const char *s, size_t n);
/* Decodes the character at s, valid UTF-8, n > 0; returns its length. */
size_t text_next(const char *s, size_t n, uint32_t *cp);
size_t text_encode(uint32_t cp, char out[4]);
int text_is_space(uint32_t cp);                        /* White_Space */
int text_is_word(uint32_t cp);                         /* \w: Alphabetic, M, Nd, Pc, Join_Control */
int text_is_mark(uint32_t cp);                         /* M */
enum { TEXT_NFC, TEXT_NFD, TEXT_NFKC, TEXT_NFKD };
void text_normalize(text_buf *out, const char *s, size_t n, int form);
void text_lowercase(text_buf *out, const char *s, size_t n);
/* GPT-2's map of bytes to printable characters (encoder.py bytes_to_unicode), and back: -1 for a character outside it. */
uint32_t text_byte_char(unsigned byte);
int text_char_byte(uint32_t cp);

/* ---- the vocabulary (vocab.c) ---- */
typedef struct text_slot { uint32_t hash; int32_t id; } text_slot;
typedef struct text_table {
  text_buf bytes;                    /* all strings, one behind the other */
  text_span *at;                     /* by id; start UINT32_MAX where no token has this id */
  size_t ids, at_cap;                /* highest id + 1 */
  int64_t count;
  text_slot *slots;                  /* open addressing; id -1 is free */
  size_t mask;
} text_table;
enum { TEXT_MAX_ID = 1 << 24, TEXT_MAX_BYTES = 1 << 30 };
/* Adds a token. WANE_E_FORMAT for a string or an id that is there already, or an id too large. */
int text_table_add(text_table *t, int64_t id, const char *s, size_t n);
/* Gives an id to a string that cannot be looked up (an empty token in GGUF). */
int text_table_reserve(text_table *t, int64_t id, const char *s, size_t n);
int32_t text_table_find(const text_table *t, const char *s, size_t n);
int text_table_has(const text_table *t, int64_t id);
const char *text_table_get(const text_table *t, int32_t id, size_t *n);
void text_table_free(text_table *t);

typedef struct text_merge { uint64_t pair; uint32_t rank; int32_t id; } text_merge;
typedef struct text_merges { text_merge *slots; size_t mask, n; } text_merges;
const text_merge *text_merges_find(const text_merges *m, int32_t left, int32_t right);

/* ---- regular expressions and splitting (split.c) ---- */
typedef struct text_regex text_regex;
typedef struct text_matcher { text_regex *regex; char *literal; size_t length; } text_matcher;
int text_matcher_init(text_matcher *m, const char *pattern, size_t n, int is_regex);
void text_matcher_free(text_matcher *m);
/* What a thread needs to run patterns; one an encode call. */
typedef struct text_match { void *data, *context; } text_match;
int text_match_init(text_match *m);
void text_match_free(text_match *m);
/* Cuts text[span] at the matches and appends the pieces. behavior: WANE_SPLIT_… */
int text_split(text_spans *out, const text_matcher *m, text_match *ctx, const char *text, text_span span, int behavior, int invert);
/* Appends s with every match replaced. */
int text_replace(text_buf *out, const text_matcher *m, text_match *ctx, const char *s, size_t n, const char *content, size_t content_n);

/* ---- steps ---- */
typedef struct text_step {
  int kind;                          /* WANE_STEP_… */
  int64_t flags;
  text_matcher match;
  char *content;
  size_t content_n;
} text_step;
typedef struct text_steps { text_step *at; size_t n, cap; } text_steps;

/* ---- tokenizers ---- */
typedef struct text_added {
  int32_t id;
  int32_t flags;
  text_span at;                      /* content, in added_bytes */
  text_span norm;                    /* content after the normalizer */
} text_added;
/* Added tokens of one kind (normalized or not), sorted by bytes, for leftmost-longest search. */
typedef struct text_index { int32_t *order; size_t n; uint32_t first[257]; } text_index;

typedef struct text_pending { uint32_t start, middle, end; } text_pending;   /* a merge that is not resolved yet: "left", "right" */

struct wane_tokenizer {
  _Atomic int refs;
  text_table vocab;
  int64_t model_tokens;              /* of these, the model's own */
  text_merges merges;
  float *scores;                     /* by id; NULL: ranked merges (HF); else SPM's scores */
  size_t scores_n;
  text_added *added;                 /* sorted by id once settled */
  size_t added_n, added_cap;
  text_buf added_bytes;
  text_index raw, normalized;
  text_buf config[2];                /* small JSON */
  text_steps stage[3];               /* WANE_STAGE_… */
  /* the model */
  int64_t model_flags;
  int32_t unk_id;
  char *prefix, *suffix;             /* continuing_subword_prefix, end_of_word_suffix */
  size_t prefix_n, suffix_n;
  int32_t byte_id[256];              /* token of the mapped byte, -1 */
  int32_t fallback_id[256];          /* token <0xHH>, -1 */
  int word_breaks;                   /* no token holds a "▁" behind another character: a text may be cut there */
  int raw_bytes;                     /* the last step maps bytes: the model reads plain bytes through byte_id instead */
  int ready;
  int source;                        /* WANE_VOCAB_… */
  /* while reading */
  text_buf merge_bytes;
  text_pending *pending;
  size_t pending_n, pending_cap;
  int skip_bad_merges;
};

struct wane_encoding {
  int32_t *ids;
  size_t n, cap;
  int failed;
  /* added tokens whose matched text is not their own (surrounding space, normalization) */
  text_buf bytes;
  struct text_shown { int64_t index; text_span at; } *shown;
  size_t shown_n, shown_cap;
};

enum { TEXT_CONFIG_LIMIT = 4 << 20 };        /* bytes of small JSON that Lua is given to parse */
/* Appends s as a JSON string. */
void text_add_json(text_buf *out, const char *s, size_t n);
/* What vocab_json.c and vocab_gguf.c call. */
int text_add_merge(wane_tokenizer *t, const char *left, size_t left_n, const char *right, size_t right_n);
int text_add_added(wane_tokenizer *t, int64_t id, const char *s, size_t n, int flags);
/* Turns pending merges into the hash of pairs. After all tokens are in. */
int text_resolve(wane_tokenizer *t, wane_job *job);
int text_read_json(wane_tokenizer *t, wane_job *job, const struct wane_file *file, int which);
int text_read_gguf(wane_tokenizer *t, wane_job *job, const struct wane_file *file);

/* Puts the byte-pair tokens of one piece behind `out` (bpe.c). */
typedef struct text_bpe text_bpe;
text_bpe *text_bpe_new(void);
void text_bpe_free(text_bpe *b);
int text_bpe_encode(const wane_tokenizer *t, text_bpe *b, wane_encoding *out, const char *s, size_t n);
void text_emit(wane_encoding *out, int32_t id);

/* Gives every added token its id, sorts them by it, drops repetitions (added.c). Before text_resolve. */
int text_settle_added(wane_tokenizer *t);
/* The added token of an id, or NULL. */
const text_added *text_added_of(const wane_tokenizer *t, int32_t id);
/* Finds the next added token in s[from, n): its place, or NULL (added.c). */
const text_added *text_index_next(const wane_tokenizer *t, const text_index *ix, int normalized, const char *s, size_t n, size_t from, text_span *at);
int text_index_build(wane_tokenizer *t, text_index *ix, int normalized);
/* Runs the text steps of a stage over spans of a text (steps.c). */
typedef struct text_run {
  text_buf text, spare;
  text_spans spans, spare_spans;
  text_match match;
  int at_start;                      /* the text's first byte is the first of the whole input */
} text_run;
int text_run_steps(text_run *r, const text_steps *steps);
void text_run_free(text_run *r);
#endif
