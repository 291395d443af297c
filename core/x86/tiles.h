/* tiles.h: products of bf16 tiles with f32 sums, and values on their way into them.
 *
 * A tile is 1 KiB, 16 rows of 64 bytes: of a first operand [16][32], of a second [16 pairs along the contraction][16][2], of a result [16][16] f32. Kernels
 * on tiles are written once, in tiles_*.h of the rooms, and compiled twice: by amx_*.c, which define WANE_TILES_AMX, for the unit that multiplies whole
 * tiles, and by avx512bf16_*.c for vdpbf16ps, which multiplies a row of a second operand by a pair of a first one. Both take subnormal numbers for zero. */
#ifndef WANE_TILES_H
#define WANE_TILES_H
#include "../base/float16.h"
#include <string.h>
#ifdef WANE_TILES_AMX
#include "amx.h"
#define TILED(name) amx_##name
#else
#include "simd.h"
#define TILED(name) avx512bf16_##name
static inline __attribute__((unused)) void wane_tiles_on(void) {}
static inline __attribute__((unused)) void wane_tiles_off(void) {}
#endif

enum { TILE_BYTES = 1024, TILE_FLOATS = 256 };

/* The order that interleaves the words of two registers of 32 values: their halves `half` (0 or 1), a word of each in turn; and, with `second` = 16, of the two
 * halves of one register. For permutex2var_epi16 and permutexvar_epi16. */
static inline __attribute__((always_inline, unused)) __m512i wane_interleave(int half, int second) {
  static const int32_t ramp[16] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
  __m512i i = _mm512_loadu_si512(ramp);
  return _mm512_add_epi32(_mm512_or_si512(i, _mm512_slli_epi32(i, 16)), _mm512_set1_epi32((second + 16 * half) << 16 | 16 * half));
}

/* 32 floats as bf16, rounded to nearest even. */
static inline __attribute__((always_inline, unused)) __m512i to_bf16(__m512 lo, __m512 hi) {
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

/* 32 values from element `at` on as bf16; zeros beyond the first `left`. */
static inline __attribute__((always_inline, unused)) __m512i load_bf16(const void *x, int dtype, int64_t at, int64_t left) {
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

/* Where a product's tiles are. First operands: rows `a_row` bytes apart; after `steps` of them, `more` steps of whole tiles from more0 and more1 on. Results:
 * rows `c_row` bytes apart, the tile below (of a1) `c_down`, the tile beside (of b1) `c_right` floats on. Steps along the contraction are in bytes. */
typedef struct tile_product {
  const char *a0, *a1;
  int64_t a_row, a_step;
  const char *b0, *b1;
  int64_t b_step, steps;
  float *c;
  int64_t c_down, c_right, c_row;
  const char *more0, *more1;
  int64_t more;
} tile_product;
/* A product of operands in whole tiles, a's one behind the other, b's `b_step` bytes apart, into four tiles of results that lie together: a0 b0, a0 b1,
 * a1 b0, a1 b1. */
static inline __attribute__((always_inline, unused)) tile_product packed(const char *a0, const char *a1, const char *b0, const char *b1, int64_t b_step, int64_t steps,
                                                                         float *c) {
  return (tile_product){ .a0 = a0, .a1 = a1, .a_row = 64, .a_step = TILE_BYTES, .b0 = b0, .b1 = b1, .b_step = b_step, .steps = steps, .c = c,
                         .c_down = 2 * TILE_FLOATS, .c_right = TILE_FLOATS, .c_row = 64 };
}

/* Operands that are read once and shall pass by the first-level cache. */
enum { TILES_KEEP, TILES_STREAM_A, TILES_STREAM_B };

#ifdef WANE_TILES_AMX
#define TILE(t, at, row, streamed) do { if (streamed) _tile_stream_loadd(t, at, row); else _tile_loadd(t, at, row); } while (0)

/* Steps of a product whose results are in tiles 0 to 3. Two by two, a load serves two products. */
static inline __attribute__((always_inline, unused)) void tiles_steps(tile_product *t, const int down, const int right, const int stream) {
  for (int64_t i = 0; i < t->steps; i++, t->a0 += t->a_step, t->a1 += t->a_step, t->b0 += t->b_step, t->b1 += t->b_step) {
    TILE(6, t->b0, 64, stream == TILES_STREAM_B);
    TILE(4, t->a0, t->a_row, stream == TILES_STREAM_A);
    if (right == 2) TILE(7, t->b1, 64, stream == TILES_STREAM_B);
    _tile_dpbf16ps(0, 4, 6);
    if (down == 2) TILE(5, t->a1, t->a_row, stream == TILES_STREAM_A);
    if (right == 2) _tile_dpbf16ps(1, 4, 7);
    if (down == 2) _tile_dpbf16ps(2, 5, 6);
    if (down == 2 && right == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

/* c (+)= a b: `down` tiles of a (1 or 2) times `right` tiles of b. All but the tiles' places are constants. */
static inline __attribute__((always_inline, unused)) void tiles_multiply(tile_product t, int add, const int down, const int right, const int stream) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  if (add) {
    _tile_loadd(0, t.c, t.c_row);
    if (right == 2) _tile_loadd(1, t.c + t.c_right, t.c_row);
    if (down == 2) _tile_loadd(2, t.c + t.c_down, t.c_row);
    if (down == 2 && right == 2) _tile_loadd(3, t.c + t.c_down + t.c_right, t.c_row);
  }
  tiles_steps(&t, down, right, stream);
  if (t.more) {
    tile_product more = { .a0 = t.more0, .a1 = t.more1, .a_row = 64, .a_step = TILE_BYTES, .b0 = t.b0, .b1 = t.b1, .b_step = t.b_step, .steps = t.more };
    tiles_steps(&more, down, right, stream);
  }
  _tile_stored(0, t.c, t.c_row);
  if (right == 2) _tile_stored(1, t.c + t.c_right, t.c_row);
  if (down == 2) _tile_stored(2, t.c + t.c_down, t.c_row);
  if (down == 2 && right == 2) _tile_stored(3, t.c + t.c_down + t.c_right, t.c_row);
}
#else
/* sum[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1], a being the same pair everywhere. */
static inline __attribute__((always_inline, unused)) __m512 wane_dot_pairs(__m512 sum, __m512i a, __m512i b) {
#ifdef WANE_EMULATE
  float s[16];
  uint16_t x[32], y[32];
  _mm512_storeu_ps(s, sum);
  _mm512_storeu_si512(x, a);
  _mm512_storeu_si512(y, b);
  for (int i = 0; i < 32; i++) s[i / 2] += wane_bf16_to_f32(x[i]) * wane_bf16_to_f32(y[i]);
  return _mm512_loadu_ps(s);
#else
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
}

/* Steps of eight rows of results: a pair of a is broadcast to one or two registers of b. 16 sums hide the latency, 10 loads serve 16 products. */
static inline __attribute__((always_inline, unused)) void tiles_steps(__m512 s[8][2], const char *a, int64_t a_row, int64_t a_step, const char *b0, const char *b1,
                                                                      int64_t b_step, int64_t steps, const int right) {
  for (; steps > 0; steps--, a += a_step, b0 += b_step, b1 += b_step)
#pragma GCC unroll 4
    for (int k = 0; k < 64; k += 4) {
      __m512i y0 = _mm512_loadu_si512(b0 + 16 * k), y1 = right == 2 ? _mm512_loadu_si512(b1 + 16 * k) : y0;
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        int32_t pair;
        memcpy(&pair, a + i * a_row + k, 4);
        __m512i x = _mm512_set1_epi32(pair);
        s[i][0] = wane_dot_pairs(s[i][0], x, y0);
        if (right == 2) s[i][1] = wane_dot_pairs(s[i][1], x, y1);
      }
    }
}

/* Rows `row` to row + 7 of c's tile of a0 or, `second`, of a1. */
static inline __attribute__((always_inline, unused)) void tiles_rows(const tile_product *t, const int second, int row, int add, const int right) {
  __m512 s[8][2];
  float *c = t->c + (second ? t->c_down : 0) + row * t->c_row / 4;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
    for (int j = 0; j < right; j++) s[i][j] = add ? _mm512_loadu_ps((const char *)(c + j * t->c_right) + i * t->c_row) : _mm512_setzero_ps();
  tiles_steps(s, (second ? t->a1 : t->a0) + row * t->a_row, t->a_row, t->a_step, t->b0, t->b1, t->b_step, t->steps, right);
  if (t->more)
    tiles_steps(s, (second ? t->more1 : t->more0) + row * 64, 64, TILE_BYTES, t->b0 + t->steps * t->b_step, t->b1 + t->steps * t->b_step, t->b_step, t->more, right);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
#pragma GCC unroll 2
    for (int j = 0; j < right; j++) _mm512_storeu_ps((char *)(c + j * t->c_right) + i * t->c_row, s[i][j]);
}

/* c (+)= a b: `down` tiles of a (1 or 2) times `right` tiles of b. */
static inline __attribute__((always_inline, unused)) void tiles_multiply(tile_product t, int add, const int down, const int right, const int stream) {
  (void)stream;
  for (int i = 0; i < 2 * down; i++) {
    if (add) tiles_rows(&t, i > 1, i % 2 * 8, 1, right);
    else tiles_rows(&t, i > 1, i % 2 * 8, 0, right);
  }
}
#endif
#endif
