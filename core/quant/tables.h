/* tables.h: what quant_maps.c and quant_gguf.c offer to the quantizers. Internal to core/quant. */
#ifndef WANE_QUANT_TABLES_H
#define WANE_QUANT_TABLES_H
#include <math.h>
#include "../base/float16.h"
#include "quant.h"

extern const float wane_nf4_thresholds[15], wane_fp4_thresholds[7];
extern const uint8_t wane_fp4_order[8];

/* Nearest dynamic code in one table look-up. A bucket is all magnitudes with the same exponent and 7 upper mantissa bits (the
 * magnitude's bits >> 16): narrower than a cell of either map everywhere, so that it holds one boundary at most. Its entry: the
 * code at its near end << 24 | the largest value of the 16 lower bits that is still that code. [0]: s >= 0; [1]: s < 0. */
enum { WANE_BUCKET_FIRST = (127 - 23) << 7, WANE_BUCKET_LAST = 127 << 7, WANE_BUCKETS = WANE_BUCKET_LAST - WANE_BUCKET_FIRST + 2 };
typedef struct wane_buckets { uint32_t entry[2][WANE_BUCKETS]; } wane_buckets;
/* [0] of the unsigned map, [1] of the signed one; filled by wane_quant_fill_buckets while backends are registered. */
extern wane_buckets wane_quant_buckets[2];
void wane_quant_fill_buckets(void);

/* ---- points that GGUF's IQ kinds index ---- */

/* As they are kept (gguf_grids.c): one point a number, 2 bits a coordinate (IQ3: 4 bits), coordinate 0 in the lowest. */
extern const uint16_t wane_gguf_packed_iq1[2048], wane_gguf_packed_iq2_xxs[256], wane_gguf_packed_iq2_xs[512], wane_gguf_packed_iq2_s[1024];
extern const uint16_t wane_gguf_packed_iq3_xxs[256], wane_gguf_packed_iq3_s[512];
/* As they are looked up; filled by wane_gguf_fill_grids while backends are registered. IQ1_S and IQ1_M share one. */
typedef struct wane_gguf_grids {
  int8_t iq1[2048][8], iq2_xxs[256][8], iq2_xs[512][8], iq2_s[1024][8], iq3_xxs[256][4], iq3_s[512][4];
} wane_gguf_grids;
extern wane_gguf_grids wane_gguf_grid;
void wane_gguf_fill_grids(void);

/* ---- a block's scale ---- */

enum { WANE_BLOCK_VOID, WANE_BLOCK_USUAL, WANE_BLOCK_TINY };
/* How a block is scaled, from its absmax: VOID (all zero, or not finite: the code of 0 throughout), USUAL (s = x * *inverse), or
 * TINY (1/absmax is beyond f32: s = x / absmax in double). */
static inline int wane_block_mode(float absmax, float *inverse) {
  *inverse = 0.0f;
  if (!(absmax > 0.0f) || isinf(absmax)) return WANE_BLOCK_VOID;
  *inverse = 1.0f / absmax;
  return isinf(*inverse) ? WANE_BLOCK_TINY : WANE_BLOCK_USUAL;
}

/* Scale of block b of a view: stored, or decoded from double quantization. Arrays may be unaligned (mapped files). */
static inline float wane_scale_at(const wane_qview *q, int64_t b) {
  if (!q->nested_absmax) return wane_float_at(q->absmax, WANE_F32, b);
  float level = wane_float_at(q->nested_code, WANE_F32, ((const uint8_t *)q->absmax)[b]);
  float product = level * wane_float_at(q->nested_absmax, WANE_F32, b / WANE_NESTED_BLOCK);
  return product + wane_float_at(q->offset, WANE_F32, 0);
}

static inline int wane_is_4bit(int kind) { return kind == WANE_NF4 || kind == WANE_FP4; }
static inline int wane_is_float16(int dtype) { return dtype == WANE_F16 || dtype == WANE_BF16; }
static inline int wane_code_of_zero(int kind) { return kind == WANE_NF4 ? 7 : kind == WANE_BLOCK8 ? 127 : 0; }
#endif
