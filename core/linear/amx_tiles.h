/* amx_tiles.h: what products with AMX bf16 tiles are made of: tiles in and out of registers, rows out, W's decoders. Internal to amx_*.c of this room. */
#ifndef WANE_AMX_TILES_H
#define WANE_AMX_TILES_H
#include "avx512_linear.h"
#include "../x86/amx_bf16.h"
#include "../x86/transpose16.h"

enum { AMX_BLOCK = 64, AMX_RUN = 19 };

/* Tiles of 32 values that a row of `width` fills: whole blocks of 64. */
static inline int64_t amx_tiles_of(int64_t width) { return (width + AMX_BLOCK - 1) / AMX_BLOCK * (AMX_BLOCK / 32); }

/* `tiles` of a contraction in equal parts of at most AMX_RUN: a panel of x of so many stays in the first-level cache. */
static inline int64_t amx_run_of(int64_t tiles) {
  int64_t parts = (tiles + AMX_RUN - 1) / AMX_RUN;
  return (tiles + parts - 1) / parts;
}

/* amx_many.c, where they are explained. */
void amx_decode_rows(const wane_qview *w, int64_t n, int64_t count, int64_t k, int64_t width, char *out, int64_t stride, float *scales);
void amx_decode_columns(const wane_qview *w, int64_t k, int64_t columns, int64_t n, int64_t width, char *out, int64_t stride);
void amx_put_tiles(const wane_linear_args *a, const float *c, int64_t m, int64_t n);

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
#endif
