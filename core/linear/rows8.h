/* rows8.h: few rows of x times 8-bit and GGUF weights: how x is laid out for the kernels. Internal.
 *
 * WANE_COMPUTE_F32: x as f32. Otherwise x as int16 with a factor for each 256 values: the largest rounding error is 1.5e-5 of the
 * group's largest value, where bf16's is 2e-3 of it, so the product is more accurate than bf16 x bf16 at half the instructions.
 * GGUF kinds with a shift (gguf_split.h) also need the sum of x, as rounded, over each run. */
#ifndef WANE_ROWS8_H
#define WANE_ROWS8_H
#include "linear.h"

/* Values a run of a GGUF kind: 16 or 32; and whether it has shifts. */
static inline int wane_gguf_run(int dtype) { return dtype == WANE_Q2_K || dtype == WANE_Q3_K || dtype == WANE_Q6_K ? 16 : 32; }
static inline int wane_gguf_has_shift(int dtype) { return dtype != WANE_Q8_0; }

typedef struct wane_rows8 {
  int64_t stride;                /* values a row of x, K rounded up to 256; zeros after K */
  int64_t groups;                /* of 256 */
  int wide;                      /* 1: f32, 0: int16 */
  int mixed;                     /* GGUF: the order of bytes widened by shifts, 32 values at a time:
                                  * i16 0 2 4 … 30, 1 3 … 31; f32 0 4 … 28, 1 5 … 29, 2 6 … 30, 3 7 … 31 */
  int run;                       /* values a sum: 16 or 32; 0 if no sums are wanted */
  int64_t sums, scales;          /* offsets: f32 [M][stride / run], f32 [M][groups] */
  int64_t map;                   /* offset of a wane_block8_map: BLOCK8 */
} wane_rows8;

static inline wane_rows8 wane_rows8_plan(int dtype, int compute, int64_t M, int64_t K) {
  int gguf = dtype >= WANE_Q4_0, exact = compute == WANE_COMPUTE_F32 || dtype == WANE_BLOCK8 || dtype == WANE_BLOCK8U;
  wane_rows8 r = { .stride = (K + 255) / 256 * 256, .wide = exact, .mixed = gguf, .run = gguf && wane_gguf_has_shift(dtype) ? wane_gguf_run(dtype) : 0 };
  r.groups = r.stride / 256;
  r.sums = M * r.stride * (r.wide ? 4 : 2);
  r.scales = r.sums + (r.run ? M * (r.stride / r.run) * 4 : 0);
  r.map = (r.scales + (r.wide ? 0 : M * r.groups * 4) + 63) / 64 * 64;
  return r;
}

/* A stored map as eight straight lines: with d = code + offset and p the power of two at or below |d|, value = step[i] * (d - p) + base[i] * p,
 * where i is the low three bits of d's f32 exponent. bitsandbytes' dynamic maps are such lines; code 0 may be an exception. */
typedef struct wane_block8_map {
  float step[8], base[8];
  int32_t offset;
  int32_t fits;                  /* 0: the map is something else and is looked up */
  float zero;                    /* what code 0 is worth more than its line says */
} wane_block8_map;

/* Dot products of the weight row n with `rows` (1 or 4) rows of x from row m on. */
typedef void (*wane_rows8_dots)(const wane_qview *w, int64_t n, const wane_rows8 *r, const char *work, int64_t m, int rows, float *out);

void wane_rows8_prepare_avx2(const wane_op *op, uint32_t chunk);
/* ROWS with given dot products: 16 weight rows at a time meet four rows of x. */
void wane_rows8_product(const wane_op *op, uint32_t chunk, wane_rows8_dots dots);

/* Blockwise 8-bit weights in f32, any shape and compute mode. */
void wane_block8_prepare_avx2(const wane_op *op, uint32_t chunk);
void wane_block8_product_avx2(const wane_op *op, uint32_t chunk);

void wane_gguf_register_avx2(wane_backend *b);
void wane_block8_register_avx2(wane_backend *b);
void wane_int8_rows_register_avx2(wane_backend *b);
void wane_block8_register_avx512(wane_backend *b);
#endif
