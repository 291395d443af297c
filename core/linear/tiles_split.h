/* tiles_split.h: f32 matrices of small rank in bf16 tiles. A value is split in two, hi = bf16(w) and lo = bf16(w - hi), which together have 16 of its 24
 * bits. Two factors are stacked along the rank, [hi | lo | hi] against [hi | hi | lo]: the product that is left out, lo times lo, is below f32's own
 * rounding, and a small rank leaves room in a tile for all of it. Internal to tiles_*.h of core/linear. */
#ifndef WANE_TILES_SPLIT_H
#define WANE_TILES_SPLIT_H
#include "../x86/tiles.h"
#include "lora.h"
#include <string.h>

enum { WANE_SPLIT_RANK = WANE_LORA_TILED_RANK, WANE_SPLIT_FIRST = 0, WANE_SPLIT_SECOND = 1 };   /* the largest rank; [hi | lo | hi], [hi | hi | lo] */

/* Tiles of 32 that a stacked row of rank r fills. */
static inline __attribute__((unused)) int64_t wane_split_tiles(int64_t r) { return (3 * r + 31) / 32; }

/* 16 values as their two parts. */
static inline __attribute__((always_inline, unused)) void wane_split16(__m512 x, __m256i *hi, __m256i *lo) {
  *hi = _mm512_extracti64x4_epi64(to_bf16(x, x), 0);
  __m512 high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(*hi), 16));
  *lo = _mm512_extracti64x4_epi64(to_bf16(_mm512_sub_ps(x, high), _mm512_setzero_ps()), 0);
}

/* A row of r values, stacked, as a row of tiles a KiB apart; NULL: zeros. */
static inline __attribute__((unused)) void wane_split_row(const float *u, int64_t r, int order, char *out) {
  uint16_t parts[2][WANE_SPLIT_RANK + 16], row[3 * WANE_SPLIT_RANK + 32];
  int64_t tiles = wane_split_tiles(r);
  __m256i hi, lo;
  if (!u) {
    for (int64_t s = 0; s < tiles; s++) memset(out + s * TILE_BYTES, 0, 64);
    return;
  }
  if (r == 8) {                                                            /* the commonest, without a detour through memory */
    wane_split16(_mm512_maskz_loadu_ps(0xff, u), &hi, &lo);
    __m128i h = _mm256_castsi256_si128(hi), l = _mm256_castsi256_si128(lo);
    __m128i *to = (__m128i *)(void *)out;
    _mm_storeu_si128(to, h);
    _mm_storeu_si128(to + 1, order == WANE_SPLIT_FIRST ? l : h);
    _mm_storeu_si128(to + 2, order == WANE_SPLIT_FIRST ? h : l);
    _mm_storeu_si128(to + 3, _mm_setzero_si128());
    return;
  }
  for (int64_t j = 0; j < r; j += 16) {
    wane_split16(_mm512_maskz_loadu_ps((__mmask16)(r - j < 16 ? (1u << (r - j)) - 1 : 0xffff), u + j), &hi, &lo);
    _mm256_storeu_si256((__m256i *)(void *)(parts[0] + j), hi);
    _mm256_storeu_si256((__m256i *)(void *)(parts[1] + j), lo);
  }
  for (int64_t third = 0; third < 3; third++)                              /* zeros past r, which the next third writes over */
    for (int64_t j = 0; j < r; j += 16) memcpy(row + third * r + j, parts[third == (order == WANE_SPLIT_FIRST ? 1 : 2)] + j, 32);
  for (int64_t k = 3 * r; k < tiles * 32; k++) row[k] = 0;
  for (int64_t s = 0; s < tiles; s++) memcpy(out + s * TILE_BYTES, row + 32 * s, 64);
}
#endif
