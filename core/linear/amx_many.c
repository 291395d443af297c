/* amx_many.c: many rows of x times a weight of any kind, and the backward, with AMX bf16 tiles (bf16 products, f32 sums).
 *
 * Forward: W is the first operand, so its decoded rows stay row-major; x is the second, packed once as [16 pairs of k][16 tokens][2]; a
 * result tile is [16 of W][16 tokens] and is turned on the way out. Backward: dy is the first operand, W the second, two rows of it
 * interleaved. Tiles work two by two (four loads for four products).
 * The order of k inside a step of 128 (64 at the end of a row) is free as long as both sides agree: 4-bit weights use the order in which vpermw
 * delivers them. Their levels times their scale are one 32-entry table of bf16 a step, so a weight is bf16(level * absmax), as bitsandbytes has
 * it. bf16 weights are copied; other kinds are decoded by quant.h to f32 and rounded. WANE_COMPUTE_F32 stays with the f32 kernels.
 * The contraction is cut in equal runs of at most RUN tiles (a panel of x, 2 KiB a tile, stays in the first-level cache, past which W is streamed)
 * and, beyond the scratch, in phases, by the shapes alone. */
#include "avx512_linear.h"
#include "../x86/amx.h"
#include "../x86/transpose16.h"

enum { TILE_BYTES = 1024, STEP = 128, RUN = 18, LIMIT = 1088 << 10, BACK_LIMIT = 1000 << 10, BLOCK = 64, BLOCKS_WANTED = 6 };

/* 32 floats as bf16, rounded to nearest even. */
WANE_INLINE __m512i to_bf16(__m512 lo, __m512 hi) {
#ifdef WANE_EMULATE
  float f[32];
  uint16_t h[32];
  _mm512_storeu_ps(f, lo);
  _mm512_storeu_ps(f + 16, hi);
  for (int i = 0; i < 32; i++) h[i] = wane_f32_to_bf16(f[i]);
  return _mm512_loadu_si512(h);
#else
  return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
#endif
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Tiles of 32 values that a row of `width` fills: whole blocks of 64. */
static int64_t tiles_of(int64_t width) { return round_up(width, BLOCK) / 32; }

/* `tiles` in equal parts of at most RUN. */
static int64_t run_of(int64_t tiles) {
  int64_t parts = (tiles + RUN - 1) / RUN;
  return (tiles + parts - 1) / parts;
}

/* 4-bit rows made of whole blocks of 64 with one scale each have decoders of their own. */
static int is_fast(const wane_qview *w) {
  return (w->dtype == WANE_NF4 || w->dtype == WANE_FP4) && w->cols % BLOCK == 0 && w->cols > 0 && w->block_size % BLOCK == 0;
}

static __m512 levels_of(const wane_qview *w) { return _mm512_loadu_ps(w->dtype == WANE_FP4 ? wane_fp4_levels : wane_nf4_levels); }

/* ================================================================ packing */

/* The words of 64 consecutive values (two registers) that belong to nibbles 0 and 1, 2 and 3 of the packed bytes: see avx512_many16.c. */
static void word_order(__m512i *order) {
  static const int nibble[4] = { 1, 0, 3, 2 };
  int16_t index[64];
  for (int i = 0; i < 64; i++) index[i] = (int16_t)(i % 16 * 4 + nibble[i / 16]);
  order[0] = _mm512_loadu_si512(index);
  order[1] = _mm512_loadu_si512(index + 32);
}

/* 32 values from element `at` on as bf16; zeros beyond the first `left`. */
WANE_INLINE __m512i load_bf16(const void *x, int dtype, int64_t at, int64_t left) {
  if (left < 32) {
    uint16_t h[32] = { 0 };
    for (int64_t i = 0; i < left; i++) h[i] = dtype == WANE_BF16 ? ((const uint16_t *)x)[at + i] : wane_f32_to_bf16(wane_float_at(x, dtype, at + i));
    return _mm512_loadu_si512(h);
  }
  if (dtype == WANE_BF16) return _mm512_loadu_si512((const uint16_t *)x + at);
  if (dtype == WANE_F32) return to_bf16(_mm512_loadu_ps((const float *)x + at), _mm512_loadu_ps((const float *)x + at + 16));
  const __m256i *h = (const __m256i *)(const void *)((const uint16_t *)x + at);
  return to_bf16(_mm512_cvtph_ps(_mm256_loadu_si256(h)), _mm512_cvtph_ps(_mm256_loadu_si256(h + 1)));
}

/* A step of a row of x: `count` values (128 or 64, zeros past `left`) in vpermw's order where `order`. */
WANE_INLINE void pack_step(const void *x, int dtype, int64_t at, int64_t left, int count, const __m512i *order, uint16_t *out) {
  __m512i z[4];
  for (int i = 0; i < count / 32; i++) z[i] = load_bf16(x, dtype, at + 32 * i, left - 32 * i);
  if (!order) {
    for (int i = 0; i < count / 32; i++) _mm512_storeu_si512(out + 32 * i, z[i]);
    return;
  }
  for (int i = 0; i < 2; i++) {
    __m512i a = _mm512_permutex2var_epi16(z[0], order[i], z[1]), b;
    if (count == BLOCK) { _mm512_storeu_si512(out + 32 * i, a); continue; }
    b = _mm512_permutex2var_epi16(z[2], order[i], z[3]);
    _mm512_storeu_si512(out + 64 * i, _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1));
    _mm512_storeu_si512(out + 64 * i + 32, _mm512_inserti64x4(b, _mm512_extracti64x4_epi64(a, 1), 0));
  }
}

/* Rows of a [M, width] tensor as tiles [M / 16][width / 32] of 1 KiB, padded with zeros to 32 rows and 64 columns; turned into
 * [16 pairs][16 rows][2] when `turn`. */
static void pack_tiles(const wane_linear_args *a, const wane_op *op, uint32_t chunk, int64_t width, const __m512i *order, int turn) {
  _Alignas(64) uint16_t rows[16][STEP];
  int64_t lo, hi, tiles = tiles_of(width);
  wane_op_range(op, chunk, a->M, 32, &lo, &hi);
  for (int64_t m = lo; m < round_up(hi, 32) && lo < hi; m += 16)
    for (int64_t k = 0; k < width; k += STEP) {
      int count = width - k > BLOCK ? STEP : BLOCK;
      char *out = (char *)a->work + (m / 16 * tiles + k / 32) * TILE_BYTES;
      for (int i = 0; i < 16; i++) {
        if (m + i < a->M) pack_step(a->x, a->dtype, (m + i) * width + k, width - k, count, order, rows[i]);
        else memset(rows[i], 0, sizeof rows[i]);
      }
      for (int q = 0; q < count / 32; q++) {
        if (turn) wane_transpose16(rows[0] + 32 * q, sizeof rows[0], out + q * TILE_BYTES, 64);
        else for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + q * TILE_BYTES + 64 * i, _mm512_loadu_si512(rows[i] + 32 * q));
      }
    }
}

static void pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  __m512i order[2];
  if (a.compute == WANE_COMPUTE_F32) { avx512_pack(op, chunk); return; }
  word_order(order);
  pack_tiles(&a, op, chunk, a.K, is_fast(&w) ? order : NULL, 1);
}

static void back_pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  if (a.compute == WANE_COMPUTE_F32) { avx512_back_pack(op, chunk); return; }
  pack_tiles(&a, op, chunk, a.N, NULL, 0);
}

/* ================================================================ products of tiles */

/* A tile to registers; a streamed one passes by the first-level cache. */
#define TILE(t, at, streamed) do { if (streamed) _tile_stream_loadd(t, at, 64); else _tile_loadd(t, at, 64); } while (0)

/* c (four tiles: a0 b0, a0 b1, a1 b0, a1 b1) += runs of `tiles` tiles; without b1 when !two. W, which is a or b, is read once for each panel of
 * x: it is streamed, so that the panel, read once for each pair of W's tiles, stays in the first-level cache. */
WANE_INLINE void multiply(const char *a0, const char *a1, const char *b0, const char *b1, int64_t tiles, float *c, int first, int two, int w_is_a) {
  if (first) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
  else { _tile_loadd(0, c, 64); _tile_loadd(1, c + 256, 64); _tile_loadd(2, c + 512, 64); _tile_loadd(3, c + 768, 64); }
  if (two)
    for (int64_t t = 0; t < tiles * TILE_BYTES; t += TILE_BYTES) {
      TILE(6, b0 + t, !w_is_a);
      TILE(4, a0 + t, w_is_a);
      TILE(7, b1 + t, !w_is_a);
      _tile_dpbf16ps(0, 4, 6);
      TILE(5, a1 + t, w_is_a);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  else
    for (int64_t t = 0; t < tiles * TILE_BYTES; t += TILE_BYTES) {
      TILE(6, b0 + t, !w_is_a);
      TILE(4, a0 + t, w_is_a);
      _tile_dpbf16ps(0, 4, 6);
      TILE(5, a1 + t, w_is_a);
      _tile_dpbf16ps(2, 5, 6);
    }
  _tile_stored(0, c, 64); _tile_stored(1, c + 256, 64); _tile_stored(2, c + 512, 64); _tile_stored(3, c + 768, 64);
}

/* Stores `count` <= 32 values of a row. */
WANE_INLINE void put_row(void *y, int dtype, int64_t at, __m512 lo, __m512 hi, int64_t count) {
  if (count == 32 && dtype == WANE_BF16) { _mm512_storeu_si512((uint16_t *)y + at, to_bf16(lo, hi)); return; }
  if (count == 32 && dtype == WANE_F32) {
    _mm512_storeu_ps((float *)y + at, lo);
    _mm512_storeu_ps((float *)y + at + 16, hi);
    return;
  }
  float v[32];
  _mm512_storeu_ps(v, lo);
  _mm512_storeu_ps(v + 16, hi);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) avx2_store(y, dtype, at + i, _mm256_loadu_ps(v + i));
  for (; i < count; i++) wane_float_put(y, dtype, at + i, v[i]);
}

/* Asks for the lines of a result before they are written: 32 rows of 32 values. */
WANE_INLINE void own_rows(const void *y, int64_t bytes, int64_t at, int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; i++) _mm_prefetch((const char *)y + (at + i * stride) * bytes, _MM_HINT_ET0);
}

/* ================================================================ forward */

/* Row n, values [k, k + width) (a multiple of 64, inside the row), as row r of tiles `out`, a KiB apart. */
static void decode_fast(const wane_qview *w, __m512 levels, const float *scale, int64_t n, int64_t k, int64_t width, char *out) {
  const __m512i fifteen = _mm512_set1_epi16(15), upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const uint8_t *q = (const uint8_t *)w->codes + (n * w->cols + k) / 2;
  int64_t i = 0;
  for (; i + STEP <= width; i += STEP, q += 64, out += 4 * TILE_BYTES) {
    __m512i v = _mm512_loadu_si512(q);
    __m512i table = to_bf16(_mm512_mul_ps(levels, _mm512_set1_ps(scale[(k + i) / BLOCK])), _mm512_mul_ps(levels, _mm512_set1_ps(scale[(k + i) / BLOCK + 1])));
    _mm_prefetch((const char *)q + w->cols * 8, _MM_HINT_T1);               /* this place, 16 rows on */
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
      _mm_prefetch(out + t * TILE_BYTES + 128, _MM_HINT_ET0);
      __m512i index = _mm512_or_si512(_mm512_and_si512(t ? _mm512_srli_epi16(v, (unsigned)(4 * t)) : v, fifteen), upper);
      _mm512_storeu_si512(out + t * TILE_BYTES, _mm512_permutexvar_epi16(index, table));
    }
  }
  if (i < width) {                                                           /* 64 values: nibbles 0 and 1, then 2 and 3 */
    __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)q);
    __m512i v = _mm512_inserti64x4(_mm512_inserti64x4(_mm512_setzero_si512(), half, 0), _mm256_srli_epi16(half, 4), 1);
    __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(scale[(k + i) / BLOCK]));
    __m512i table = to_bf16(scaled, scaled);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_and_si512(v, fifteen), table));
    _mm512_storeu_si512(out + TILE_BYTES, _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi16(v, 8), fifteen), table));
  }
}

/* The same of other kinds, in rising order of k. */
static void decode_any(const wane_qview *w, int64_t n, int64_t k, int64_t width, char *out) {
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  float f[STEP];
  if (w->dtype == WANE_BF16) {
    for (int64_t i = 0; i < width; i += 32, out += TILE_BYTES) _mm512_storeu_si512(out, load_bf16(w->codes, WANE_BF16, n * w->cols + k + i, w->cols - k - i));
    return;
  }
  for (int64_t i = 0; i < width; i += STEP, out += 4 * TILE_BYTES) {
    int64_t count = least(STEP, w->cols - k - i);
    if (count < 0) count = 0;
    kit->dequantize(w, n * w->cols + k + i, count, f);
    if (count < STEP) memset(f + count, 0, (size_t)(STEP - count) * 4);
    for (int t = 0; t < 4 && i + 32 * t < width; t++)
      _mm512_storeu_si512(out + t * TILE_BYTES, to_bf16(_mm512_loadu_ps(f + 32 * t), _mm512_loadu_ps(f + 32 * t + 16)));
  }
}

/* Rows [n, n + count) of W (zeros up to a multiple of 32), values [k, k + width), as tiles [rows / 16][width / 32]. */
static void decode_rows(const wane_qview *w, int64_t n, int64_t count, int64_t k, int64_t width, char *out, float *scales) {
  __m512 levels = levels_of(w);
  int fast = is_fast(w);
  for (int64_t i = 0; i < round_up(count, 32); i++) {
    char *row = out + i / 16 * (width / 32) * TILE_BYTES + i % 16 * 64;
    if (i >= count) for (int64_t t = 0; t < width / 32; t++) memset(row + t * TILE_BYTES, 0, 64);
    else if (fast) decode_fast(w, levels, avx512_row_scales(w, n + i, 0, scales), n + i, k, width, row);
    else decode_any(w, n + i, k, width, row);
  }
}

/* How W's rows and the contraction are cut: blocks of rows that leave something to do for several workers, all of the contraction in the scratch
 * if 32 rows fit, else in phases with the results kept between. */
typedef struct cut { int64_t rows, phase; } cut;
static cut forward_cut(const wane_linear_args *a) {
  int64_t width = round_up(a->K, BLOCK), most = a->M >= 256 ? 256 : 128, share = round_up((a->N + BLOCKS_WANTED - 1) / BLOCKS_WANTED, 32);
  cut c = { 32, 16384 };
  if (width <= 16384) {
    c.phase = width;
    c.rows = least(least(most, share), LIMIT / (width * 2) / 32 * 32);
  }
  return c;
}

/* Two panels of 16 tokens of rows [n, n + 32) to y. c: four tiles. */
static void put_tiles(const wane_linear_args *a, const float *c, int64_t m, int64_t n) {
  _Alignas(64) float turned[2][16][16], bias[32] = { 0 };
  int64_t count = least(32, a->N - n);
  if (a->bias) for (int64_t i = 0; i < count; i++) bias[i] = wane_linear_bias(a, n + i);
  __m512 lo = _mm512_loadu_ps(bias), hi = _mm512_loadu_ps(bias + 16);
  for (int x = 0; x < 2; x++) {
    int64_t rows = least(16, a->M - m - 16 * x);
    if (rows <= 0) break;
    wane_transpose16(c + x * 256, 64, turned[0], 64);
    wane_transpose16(c + (2 + x) * 256, 64, turned[1], 64);
    for (int64_t t = 0; t < rows; t++)
      put_row(a->y, a->dtype, (m + 16 * x + t) * a->N + n, _mm512_add_ps(_mm512_loadu_ps(turned[0][t]), lo), _mm512_add_ps(_mm512_loadu_ps(turned[1][t]), hi), count);
  }
}

/* Rows [n, n + count) of W against all tokens. Scratch: decoded rows, result tiles, scales. */
static void many_block(const wane_linear_args *a, const wane_qview *w, const cut *cut, int64_t n, int64_t count) {
  int64_t tiles = tiles_of(a->K), pairs = round_up(count, 32) / 32, phase = cut->phase / 32, phased = tiles > phase, bytes = a->dtype == WANE_F32 ? 4 : 2;
  char *rows = wane_scratch();
  float *c = (float *)(void *)(rows + LIMIT);                              // [m / 32 if phased][pairs][4][16][16]
  float *scales = c + 1024 * (phased ? WANE_LINEAR_SLICE / 32 : 256 / 32);
  for (int64_t p = 0; p < tiles; p += phase) {
    int64_t part = least(phase, tiles - p), run = run_of(part), kept = phased || run < part;
    decode_rows(w, n, count, p * 32, part * 32, rows, scales);
    for (int64_t m = 0; m < a->M; m += 32)
      for (int64_t k = 0; k < part; k += run) {
        const char *x0 = (const char *)a->work + (m / 16 * tiles + p + k) * TILE_BYTES, *x1 = x0 + tiles * TILE_BYTES;
        int last = p + part == tiles && k + run >= part;
        for (int64_t i = 0; i < pairs; i++) {
          const char *w0 = rows + (2 * i * part + k) * TILE_BYTES, *w1 = w0 + part * TILE_BYTES;
          float *out = c + ((phased ? m / 32 * pairs : 0) + (kept ? i : 0)) * 1024;
          if (last) own_rows(a->y, bytes, m * a->N + n + 32 * i, a->N, least(32, a->M - m));
          multiply(w0, w1, x0, x1, least(run, part - k), out, p + k == 0, a->M - m > 16, 1);
          if (last) put_tiles(a, out, m, n + 32 * i);
        }
      }
  }
}

static void many(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  if (a.compute == WANE_COMPUTE_F32 || a.K == 0) { avx512_many(op, chunk); return; }
  cut cut = forward_cut(&a);
  wane_op_range(op, chunk, a.N, cut.rows, &lo, &hi);
  if (lo == hi) return;
  wane_tiles_on();
  for (int64_t n = lo; n < hi; n += cut.rows) many_block(&a, &w, &cut, n, least(cut.rows, hi - n));
  wane_tiles_off();
}

/* ================================================================ backward */

/* What the decoders of two rows at once need: bytes[t] says where the bytes of values 16t to 16t + 15 of two rows (32 bytes each) go: word 2i
 * the first row's, 2i + 1 the second's; shift brings a value's nibble down, top chooses the second row's half of the table; words[t] does with
 * 16-bit values what bytes does with nibbles. */
typedef struct pairing { __m512 levels; __m512i bytes[4], shift, top, words[2]; } pairing;

static pairing pairing_of(const wane_qview *w) {
  pairing z = { .levels = levels_of(w) };
  int16_t shifts[32], tops[32];
  for (int t = 0; t < 4; t++) {
    uint8_t index[64] = { 0 };
    for (int i = 0; i < 16; i++) index[4 * i] = (uint8_t)((16 * t + i) / 2), index[4 * i + 2] = (uint8_t)(32 + (16 * t + i) / 2);
    z.bytes[t] = _mm512_loadu_si512(index);
  }
  for (int i = 0; i < 32; i++) shifts[i] = i / 2 % 2 ? 0 : 4, tops[i] = i % 2 ? 16 : 0;
  z.shift = _mm512_loadu_si512(shifts);
  z.top = _mm512_loadu_si512(tops);
  for (int t = 0; t < 2; t++) {
    int16_t index[32];
    for (int i = 0; i < 32; i++) index[i] = (int16_t)(16 * t + i / 2 + (i % 2 ? 32 : 0));
    z.words[t] = _mm512_loadu_si512(index);
  }
  return z;
}

/* Scale of block b of 64 values. */
WANE_INLINE float scale_of(const wane_qview *w, int64_t b, int64_t per) {
  b /= per;
  if (!w->nested_absmax) return ((const float *)w->absmax)[b];
  return w->nested_code[((const uint8_t *)w->absmax)[b]] * w->nested_absmax[b / WANE_NESTED_BLOCK] + *w->offset;
}

/* Rows n and n + 1 (zeros past the end) at the 64 columns from k on: one row of four tiles, `stride` bytes apart. */
WANE_INLINE void pair_fast(const wane_qview *w, const pairing *z, int64_t n, int64_t k, int64_t per, char *out, int64_t stride) {
  const uint8_t *q = (const uint8_t *)w->codes + (n * w->cols + k) / 2;
  int more = n + 1 < w->rows;
  int64_t b = (n * w->cols + k) / BLOCK;
  float s0 = scale_of(w, b, per), s1 = more ? scale_of(w, b + w->cols / BLOCK, per) : 0.0f;
  __m512i v = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_loadu_si256((const __m256i *)(const void *)q), 0);
  if (more) v = _mm512_inserti64x4(v, _mm256_loadu_si256((const __m256i *)(const void *)(q + w->cols / 2)), 1);
  _mm_prefetch((const char *)q + w->cols * 8, _MM_HINT_T0);                  /* 16 rows on */
  _mm_prefetch((const char *)q + w->cols * 8 + w->cols / 2, _MM_HINT_T0);
  __m512i table = to_bf16(_mm512_mul_ps(z->levels, _mm512_set1_ps(s0)), _mm512_mul_ps(z->levels, _mm512_set1_ps(s1)));
#pragma GCC unroll 4
  for (int t = 0; t < 4; t++) {
    __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(z->bytes[t], v), z->shift);
    index = _mm512_or_si512(_mm512_and_si512(index, _mm512_set1_epi16(15)), z->top);
    _mm512_storeu_si512(out + t * stride, _mm512_permutexvar_epi16(index, table));
  }
}

static void pair_any(const wane_qview *w, const pairing *z, int64_t n, int64_t k, char *out, int64_t stride) {
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  float f[2][BLOCK] = { { 0 } };
  int64_t count = least(BLOCK, w->cols - k);
  __m512i row[2][2];
  for (int i = 0; i < 2; i++) {
    int there = n + i < w->rows;
    if (there && w->dtype != WANE_BF16) kit->dequantize(w, (n + i) * w->cols + k, count, f[i]);
    for (int h = 0; h < 2; h++)
      row[i][h] = w->dtype == WANE_BF16 ? load_bf16(w->codes, WANE_BF16, (n + i) * w->cols + k + 32 * h, there ? count - 32 * h : 0)
                                        : to_bf16(_mm512_loadu_ps(f[i] + 32 * h), _mm512_loadu_ps(f[i] + 32 * h + 16));
  }
  for (int t = 0; t < 4; t++) _mm512_storeu_si512(out + t * stride, _mm512_permutex2var_epi16(row[0][t / 2], z->words[t % 2], row[1][t / 2]));
}

/* Columns of dx that are made at once: 128 where W's share of them fits the scratch and enough blocks are left, else 64. */
static int64_t back_columns(const wane_linear_args *a) {
  return a->K >= BLOCKS_WANTED * STEP && 8 * (tiles_of(a->N) + 1) * TILE_BYTES <= BACK_LIMIT ? STEP : BLOCK;
}

/* Columns [k, k + 64 or 128) of dx: W as tiles [columns / 16][N / 32], two rows a tile row. Scratch: those, then result tiles. */
static void back_block(const wane_linear_args *a, const wane_qview *w, const pairing *z, int64_t k, int64_t columns) {
  int64_t tiles = tiles_of(a->N), phase = least(tiles, BACK_LIMIT / TILE_BYTES / (columns / 16) - 1), phased = tiles > phase, stride = (phase + 1) * TILE_BYTES;
  int64_t per = w->block_size / BLOCK, bytes = a->dtype == WANE_F32 ? 4 : 2;
  int fast = is_fast(w);
  char *b = wane_scratch();
  float *c = (float *)(void *)(b + BACK_LIMIT);                              // [m / 32 if phased][pairs of k][4][16][16]
  for (int64_t p = 0; p < tiles; p += phase) {
    int64_t part = least(phase, tiles - p), run = run_of(part), kept = phased || run < part;
    for (int64_t n = p * 32; n < (p + part) * 32; n += 2)
      for (int64_t j = 0; j < columns; j += BLOCK) {
        char *out = b + j / 16 * stride + (n / 32 - p) * TILE_BYTES + n % 32 / 2 * 64;
        if (n >= a->N || k + j >= a->K) for (int t = 0; t < 4; t++) memset(out + t * stride, 0, 64);
        else if (fast) pair_fast(w, z, n, k + j, per, out, stride);
        else pair_any(w, z, n, k + j, out, stride);
      }
    for (int64_t m = 0; m < a->M; m += 32)
      for (int64_t t = 0; t < part; t += run) {
        const char *d0 = (const char *)a->work + (m / 16 * tiles + p + t) * TILE_BYTES;
        int last = p + part == tiles && t + run >= part;
        for (int64_t j = 0; j < columns / 32 && k + 32 * j < a->K; j++) {
          float *out = c + ((phased ? m / 32 * (columns / 32) : 0) + (kept ? j : 0)) * 1024;
          const char *b0 = b + 2 * j * stride + t * TILE_BYTES;
          int64_t column = k + 32 * j, count = least(32, a->K - column);
          if (last) own_rows(a->y, bytes, m * a->K + column, a->K, least(32, a->M - m));
          multiply(d0, d0 + tiles * TILE_BYTES, b0, b0 + stride, least(run, part - t), out, p + t == 0, 1, 0);
          for (int64_t i = 0; last && i < least(32, a->M - m); i++) {        /* tiles: rows 0-15, columns 0-15 and 16-31; rows 16-31 */
            const float *row = out + i / 16 * 512 + i % 16 * 16;
            put_row(a->y, a->dtype, (m + i) * a->K + column, _mm512_loadu_ps(row), _mm512_loadu_ps(row + 256), count);
          }
        }
      }
  }
}

static void back(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  if (a.compute == WANE_COMPUTE_F32 || a.N == 0) { avx512_back(op, chunk); return; }
  int64_t columns = back_columns(&a);
  pairing z = pairing_of(&w);
  wane_op_range(op, chunk, a.K, columns, &lo, &hi);
  if (lo == hi) return;
  wane_tiles_on();
  for (int64_t k = lo; k < hi; k += columns) back_block(&a, &w, &z, k, columns);
  wane_tiles_off();
}

void wane_linear_register_amx(wane_backend *b) {
  for (int group = 0; group < WANE_GROUPS; group++) {
    if (!b->ops[WANE_OP_LINEAR_BACK + group]) continue;                     /* LLM_INT8 has tiles of its own */
    b->ops[WANE_OP_LINEAR_PACK + group] = pack;
    b->ops[WANE_OP_LINEAR_MANY + group] = many;
    b->ops[WANE_OP_LINEAR_BACK_PACK + group] = back_pack;
    b->ops[WANE_OP_LINEAR_BACK + group] = back;
  }
}
