/* amx.h: AMX tiles. Normally the intrinsics; under WANE_EMULATE the handful that the kernels use in plain C, tile state a thread,
 * so that the same sources can be checked on any CPU. amx_* files include it instead of simd.h, or get it through tiles.h.
 *
 * All kernels use one configuration: eight tiles of 16 rows of 64 bytes. A worker calls wane_tiles_on before its first tile and
 * wane_tiles_off when it leaves, because a thread with live tiles pays 8 KiB at each context switch. */
#ifndef WANE_AMX_H
#define WANE_AMX_H
#include "simd.h"
#include <stdint.h>
#include <string.h>

#ifdef WANE_EMULATE
static _Thread_local unsigned char wane_tile[8][16][64];

static inline __attribute__((unused)) void wane_tiles_on(void) { memset(wane_tile, 0, sizeof wane_tile); }
static inline __attribute__((unused)) void wane_tiles_off(void) {}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_zero(t) memset(wane_tile[t], 0, sizeof wane_tile[t])
#define _tile_loadd(t, base, stride) wane_tile_load(t, base, (int64_t)(stride))
#define _tile_stream_loadd(t, base, stride) wane_tile_load(t, base, (int64_t)(stride))
#define _tile_stored(t, base, stride) wane_tile_store(t, base, (int64_t)(stride))
#define _tile_dpbssd(d, a, b) wane_tile_dot_s8(d, a, b)
#define _tile_dpbf16ps(d, a, b) wane_tile_dot_bf16(d, a, b)

static inline __attribute__((unused)) void wane_tile_load(int t, const void *base, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(wane_tile[t][r], (const char *)base + r * stride, 64);
}

static inline __attribute__((unused)) void wane_tile_store(int t, void *base, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy((char *)base + r * stride, wane_tile[t][r], 64);
}

/* d[r][c] += sum over k, j < 4 of a[r][4k + j] * b[k][4c + j], signed bytes, wrapping int32. */
static inline __attribute__((unused)) void wane_tile_dot_s8(int d, int a, int b) {
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) {
      uint32_t sum;
      memcpy(&sum, &wane_tile[d][r][4 * c], 4);
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 4; j++) sum += (uint32_t)((int8_t)wane_tile[a][r][4 * k + j] * (int8_t)wane_tile[b][k][4 * c + j]);
      memcpy(&wane_tile[d][r][4 * c], &sum, 4);
    }
}

static inline __attribute__((unused)) float wane_tile_bf16(const unsigned char *p) {
  uint32_t u = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

/* d[r][c] += sum over k, j < 2 of a[r][2k + j] * b[k][2c + j], bf16 pairs summed in f32. */
static inline __attribute__((unused)) void wane_tile_dot_bf16(int d, int a, int b) {
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) {
      float sum;
      memcpy(&sum, &wane_tile[d][r][4 * c], 4);
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 2; j++) sum += wane_tile_bf16(&wane_tile[a][r][4 * k + 2 * j]) * wane_tile_bf16(&wane_tile[b][k][4 * c + 2 * j]);
      memcpy(&wane_tile[d][r][4 * c], &sum, 4);
    }
}
#else
static inline __attribute__((unused)) void wane_tiles_on(void) {
  _Alignas(64) struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
  __asm__ volatile("" : : "r"(&config) : "memory");    /* gcc 12 believes that loadconfig reads 8 bytes and drops the other stores */
  _tile_loadconfig(&config);
}
static inline __attribute__((unused)) void wane_tiles_off(void) { _tile_release(); }
#endif
#endif
