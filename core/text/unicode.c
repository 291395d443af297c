/* unicode.c: UTF-8, normal forms, the character classes that upstream's tokenizers use, and GPT-2's byte map. Tables are
 * utf8proc's; its whole-string functions are not used, because they allocate by themselves and reorder marks in quadratic time. */
#include "text.h"
#include <utf8proc.h>

/* ---------------------------------------------------------------- buffers */

int text_room(text_buf *b, size_t more) {
  if (b->failed) return 0;
  if (b->cap - b->n >= more) return 1;
  if (more > TEXT_MAX_BYTES || b->n > TEXT_MAX_BYTES * (size_t)2 - more) {
    b->failed = wane_fail(WANE_E_ARG, "text of more than %d bytes; cut it into parts", (int)TEXT_MAX_BYTES);
    return 0;
  }
  size_t cap = b->cap < 64 ? 64 : b->cap;
  while (cap - b->n < more) cap += cap / 2;
  char *data = wane_regrow(b->data, b->n, cap, "text");
  if (!data) { b->failed = WANE_E_MEMORY; return 0; }
  b->data = data;
  b->cap = cap;
  return 1;
}

void text_add(text_buf *b, const char *s, size_t n) {
  if (!n || !text_room(b, n)) return;
  memcpy(b->data + b->n, s, n);
  b->n += n;
}

void text_add_char(text_buf *b, uint32_t cp) {
  if (!text_room(b, 4)) return;
  b->n += text_encode(cp, b->data + b->n);
}

void text_free(text_buf *b) {
  wane_release(b->data);
  memset(b, 0, sizeof *b);
}

void *text_grow(void *old, size_t n, size_t *cap, size_t size, const char *what) {
  size_t more = *cap < 16 ? 16 : *cap + *cap / 2;
  void *p = wane_regrow(old, n * size, more * size, what);
  if (p) *cap = more;
  return p;
}

void text_push(text_spans *s, size_t start, size_t end) {
  if (s->failed) return;
  if (s->n == s->cap) {
    void *p = text_grow(s->at, s->n, &s->cap, sizeof *s->at, "pieces of a text");
    if (!p) { s->failed = WANE_E_MEMORY; return; }
    s->at = p;
  }
  s->at[s->n++] = (text_span){ (uint32_t)start, (uint32_t)end };
}

/* ---------------------------------------------------------------- UTF-8 */

/* Length of the valid character at s, or 0; then *bad is the length of the maximal invalid part (Unicode 15, table 3-7). */
static size_t character(const unsigned char *s, size_t n, size_t *bad) {
  unsigned c = s[0], low = 0x80, high = 0xbf;
  size_t length;
  *bad = 1;
  if (c < 0x80) return 1;
  if (c < 0xc2 || c > 0xf4) return 0;
  length = c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
  if (c == 0xe0) low = 0xa0;
  else if (c == 0xed) high = 0x9f;
  else if (c == 0xf0) low = 0x90;
  else if (c == 0xf4) high = 0x8f;
  for (size_t i = 1; i < length; i++) {
    if (i >= n || s[i] < low || s[i] > high) { *bad = i; return 0; }
    low = 0x80;
    high = 0xbf;
  }
  return length;
}

size_t text_valid(const char *s, size_t n) {
  size_t i = 0, bad;
  while (i < n) {
    uint64_t eight;
    if (n - i >= 8 && (memcpy(&eight, s + i, 8), !(eight & 0x8080808080808080u))) { i += 8; continue; }
    size_t length = character((const unsigned char *)s + i, n - i, &bad);
    if (!length) return i;
    i += length;
  }
  return n;
}

size_t wane_utf8_valid(const char *text, size_t bytes) { return text_valid(text, bytes); }

void text_lossy(text_buf *out, const char *s, size_t n) {
  while (n) {
    size_t good = text_valid(s, n), bad;
    text_add(out, s, good);
    s += good;
    n -= good;
    if (!n) return;
    character((const unsigned char *)s, n, &bad);
    text_add(out, "\xef\xbf\xbd", 3);
    s += bad;
    n -= bad;
  }
}

size_t text_next(const char *s, size_t n, uint32_t *cp) {
  const unsigned char *u = (const unsigned char *)s;
  if (u[0] < 0x80 || n < 2) { *cp = u[0]; return 1; }
  if (u[0] < 0xe0 || n < 3) { *cp = (u[0] & 31u) << 6 | (u[1] & 63u); return 2; }
  if (u[0] < 0xf0 || n < 4) { *cp = (u[0] & 15u) << 12 | (u[1] & 63u) << 6 | (u[2] & 63u); return 3; }
  *cp = (u[0] & 7u) << 18 | (u[1] & 63u) << 12 | (u[2] & 63u) << 6 | (u[3] & 63u);
  return 4;
}

size_t text_encode(uint32_t cp, char out[4]) {
  if (cp < 0x80) { out[0] = (char)cp; return 1; }
  if (cp < 0x800) { out[0] = (char)(0xc0 | cp >> 6); out[1] = (char)(0x80 | (cp & 63)); return 2; }
  if (cp < 0x10000) {
    out[0] = (char)(0xe0 | cp >> 12);
    out[1] = (char)(0x80 | (cp >> 6 & 63));
    out[2] = (char)(0x80 | (cp & 63));
    return 3;
  }
  out[0] = (char)(0xf0 | cp >> 18);
  out[1] = (char)(0x80 | (cp >> 12 & 63));
  out[2] = (char)(0x80 | (cp >> 6 & 63));
  out[3] = (char)(0x80 | (cp & 63));
  return 4;
}

/* ---------------------------------------------------------------- classes */

int text_is_space(uint32_t cp) {
  return (cp >= 9 && cp <= 13) || cp == 32 || cp == 0x85 || cp == 0xa0 || cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200a) ||
         cp == 0x2028 || cp == 0x2029 || cp == 0x202f || cp == 0x205f || cp == 0x3000;
}

int text_is_mark(uint32_t cp) {
  utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);
  return c == UTF8PROC_CATEGORY_MN || c == UTF8PROC_CATEGORY_MC || c == UTF8PROC_CATEGORY_ME;
}

/* Alphabetic is L, Nl and, outside M (which \w holds anyway), the circled and squared letters (Unicode PropList.txt, Other_Alphabetic). */
int text_is_word(uint32_t cp) {
  switch (utf8proc_category((utf8proc_int32_t)cp)) {
    case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT: case UTF8PROC_CATEGORY_LM: case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN: case UTF8PROC_CATEGORY_MC: case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND: case UTF8PROC_CATEGORY_NL: case UTF8PROC_CATEGORY_PC:
      return 1;
    default:
      return cp == 0x200c || cp == 0x200d || (cp >= 0x24b6 && cp <= 0x24e9) || (cp >= 0x1f130 && cp <= 0x1f149) ||
             (cp >= 0x1f150 && cp <= 0x1f169) || (cp >= 0x1f170 && cp <= 0x1f189);
  }
}

/* ---------------------------------------------------------------- normal forms */

static int combining(int32_t cp) { return cp < 0x300 ? 0 : utf8proc_get_property(cp)->combining_class; }

/* Sorts a run of marks by combining class, keeping the order of equals: counting sort, linear in hostile runs too. */
static int order_marks(int32_t *cps, size_t n) {
  size_t at[257] = { 0 };
  int32_t few[64], *copy = few;
  if (n > 64 && !(copy = wane_alloc(n * sizeof *copy, "combining marks"))) return WANE_E_MEMORY;
  for (size_t i = 0; i < n; i++) at[combining(cps[i]) + 1]++;
  for (int i = 0; i < 256; i++) at[i + 1] += at[i];
  for (size_t i = 0; i < n; i++) copy[at[combining(cps[i])]++] = cps[i];
  memcpy(cps, copy, n * sizeof *cps);
  if (copy != few) wane_release(copy);
  return 0;
}

/* Decomposes s into code points: at most 18 a character (U+FDFA). */
static int32_t *decompose(const char *s, size_t n, int compatible, size_t *count) {
  size_t cap = n + 32, used = 0;
  int32_t *cps = wane_alloc(cap * sizeof *cps, "code points");
  int options = UTF8PROC_DECOMPOSE | UTF8PROC_STABLE | (compatible ? UTF8PROC_COMPAT : 0), boundary = 0;
  for (size_t i = 0; cps && i < n;) {
    uint32_t cp;
    i += text_next(s + i, n - i, &cp);
    if (cap - used < 32) {
      int32_t *more = wane_regrow(cps, used * sizeof *cps, (cap + cap / 2 + 32) * sizeof *cps, "code points");
      if (!more) { wane_release(cps); return NULL; }
      cps = more;
      cap += cap / 2 + 32;
    }
    utf8proc_ssize_t k = utf8proc_decompose_char((int32_t)cp, cps + used, (utf8proc_ssize_t)(cap - used), options, &boundary);
    if (k < 0 || (size_t)k > cap - used) { cps[used] = (int32_t)cp; k = 1; }
    used += (size_t)k;
  }
  *count = used;
  return cps;
}

void text_normalize(text_buf *out, const char *s, size_t n, int form) {
  size_t ascii = 0, count = 0;
  while (ascii < n && !(s[ascii] & 0x80)) ascii++;
  if (ascii == n) { text_add(out, s, n); return; }
  /* The last ASCII character may combine with what follows. */
  if (ascii) ascii--;
  text_add(out, s, ascii);
  int32_t *cps = decompose(s + ascii, n - ascii, form == TEXT_NFKC || form == TEXT_NFKD, &count);
  if (!cps) { out->failed = WANE_E_MEMORY; return; }
  for (size_t i = 0; i < count;) {
    size_t end = i;
    while (end < count && combining(cps[end])) end++;
    if (end - i > 1 && order_marks(cps + i, end - i)) out->failed = WANE_E_MEMORY;
    i = end + 1;
  }
  if (form == TEXT_NFC || form == TEXT_NFKC)
    count = (size_t)utf8proc_normalize_utf32(cps, (utf8proc_ssize_t)count, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
  for (size_t i = 0; i < count; i++) text_add_char(out, (uint32_t)cps[i]);
  wane_release(cps);
}

/* Character by character, as Rust's char::to_lowercase: the only one with two results is U+0130 (SpecialCasing.txt). */
void text_lowercase(text_buf *out, const char *s, size_t n) {
  for (size_t i = 0; i < n;) {
    uint32_t cp;
    i += text_next(s + i, n - i, &cp);
    if (cp == 0x130) text_add(out, "i\xcc\x87", 3);
    else text_add_char(out, (uint32_t)utf8proc_tolower((int32_t)cp));
  }
}

/* ---------------------------------------------------------------- bytes as characters */

uint32_t text_byte_char(unsigned byte) {
  if ((byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174) return byte;
  if (byte <= 32) return 256 + byte;                  /* 0..32 -> 256..288 */
  if (byte <= 160) return 289 + (byte - 127);         /* 127..160 -> 289..322 */
  return 323;                                         /* 173 */
}

int text_char_byte(uint32_t cp) {
  if (cp < 256) return text_byte_char(cp) == cp ? (int)cp : -1;
  if (cp <= 288) return (int)cp - 256;
  if (cp <= 322) return (int)cp - 289 + 127;
  return cp == 323 ? 173 : -1;
}
