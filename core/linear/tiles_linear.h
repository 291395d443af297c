/* tiles_linear.h: what products of bf16 tiles with weights share: runs of tiles, rows out, W's decoders. Internal to tiles_*.h of this room. */
#ifndef WANE_TILES_LINEAR_H
#define WANE_TILES_LINEAR_H
#include "avx512_linear.h"
#include "../x86/tiles.h"
#include "../x86/transpose16.h"

enum { TILE_BLOCK = 64, TILE_RUN = 19 };

/* Tiles of 32 values that a row of `width` fills: whole blocks of 64. */
static inline int64_t tiles_of_row(int64_t width) { return (width + TILE_BLOCK - 1) / TILE_BLOCK * (TILE_BLOCK / 32); }

/* `tiles` of a contraction in equal parts of at most TILE_RUN: a panel of x of so many stays in the first-level cache. */
static inline int64_t tiles_of_run(int64_t tiles) {
  int64_t parts = (tiles + TILE_RUN - 1) / TILE_RUN;
  return (tiles + parts - 1) / parts;
}

/* tiles_many.h, where they are explained. */
void TILED(decode_rows)(const wane_qview *w, int64_t n, int64_t count, int64_t k, int64_t width, char *out, int64_t stride, float *scales);
void TILED(decode_columns)(const wane_qview *w, int64_t k, int64_t columns, int64_t n, int64_t width, char *out, int64_t stride);

/* A product, without x's second tile when !two. W, which is a or b, is read once for each panel of x: it is streamed, so that the panel, read once for each
 * pair of W's tiles, stays in the first-level cache. */
WANE_INLINE void multiply(tile_product t, int first, int two, const int w_is_a) {
  if (two) tiles_multiply(t, !first, 2, 2, w_is_a ? TILES_STREAM_A : TILES_STREAM_B);
  else if (w_is_a) tiles_multiply(t, !first, 2, 1, TILES_STREAM_A);
  else tiles_multiply(t, !first, 1, 2, TILES_STREAM_B);
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
#endif
