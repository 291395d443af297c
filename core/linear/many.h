/* many.h: many rows of x times a weight of any kind, and the backward, with f32 products. Written once on the vectors of vec.h:
 * avx2_many.c and avx512_many.c define WANE_VEC and MANY, the prefix of the exported names, and include it.
 *
 * One register tile does both: C [TILE_M][TILE_N] += A [TILE_M][k] (each value broadcast) times B [k][TILE_N] (two registers).
 *   forward   A = decoded rows of W, B = tokens of x packed side by side: W's rows need no shuffling, C is y transposed
 *   backward  A = rows of dy, B = columns of decoded rows of W: C is dx
 * AVX2's tile is 6 x 16, AVX-512's 12 x 32: three quarters of the registers hold sums. A panel of x with at most one register's
 * tokens left takes a tile twice as high and half as wide, so that a short batch does not pay for a full one.
 * The contraction is cut in runs, so that a B panel (16 KiB) stays in the first-level cache while all A rows of a block pass by, and
 * A and the C tiles wait in the second level. Each element of C is one chain of fused additions in rising k: it does not depend on
 * how many rows there are, nor on where a tile begins. */
#ifndef WANE_MANY_H
#define WANE_MANY_H
#include "avx2_linear.h"
#include "../x86/vec.h"

enum {
  TILE_M = VEC_REGISTERS * 3 / 8, TILE_N = 2 * VW, TILE = TILE_M * TILE_N,
  STEP = 256,                              /* values of a row that are decoded at once: whole blocks of every kind */
  RUN = 4096 / TILE_N,                     /* values of a row that a tile takes at once */
  BLOCK_ROWS = 48 * VW / 8, BLOCK_COLUMNS = 4 * TILE_N
};

/* c [height][TILE_N] (+)= a [height][k], rows `stride` apart, times b [k][TILE_N]; `registers` of the two of a row. Height, stride and
 * registers are constants. A line at `ahead` is fetched with every k: what the next tile reads and this one does not. */
VEC void multiply_part(const float *a, const int stride, const float *b, int64_t k, float *c, int first, const int height, const int registers,
                       const float *ahead) {
  vf s[2 * TILE_M][2];
#pragma GCC unroll 24
  for (int i = 0; i < height; i++) {
    s[i][0] = first ? vf_zero() : vf_load(c + i * TILE_N);
    if (registers == 2) s[i][1] = first ? vf_zero() : vf_load(c + i * TILE_N + VW);
  }
#pragma GCC unroll 2
  for (; k > 0; k--, a++, b += TILE_N, ahead += 16) {
    vf b0 = vf_load(b), b1 = registers == 2 ? vf_load(b + VW) : b0;
    _mm_prefetch((const char *)ahead, _MM_HINT_T0);
#pragma GCC unroll 24
    for (int i = 0; i < height; i++) {
      vf v = vf_set1(a[i * stride]);
      s[i][0] = vf_fma(v, b0, s[i][0]);
      if (registers == 2) s[i][1] = vf_fma(v, b1, s[i][1]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < height; i++) {
    vf_store(c + i * TILE_N, s[i][0]);
    if (registers == 2) vf_store(c + i * TILE_N + VW, s[i][1]);
  }
}

/* Fetches the codes of elements [e, e + count) of W into the second-level cache; they may lie past its end. */
VEC void fetch_codes(const wane_qview *w, int64_t bytes_of_256, int64_t e, int64_t count) {
  const char *at = (const char *)w->codes + e * bytes_of_256 / 256, *end = at + count * bytes_of_256 / 256;
  for (; at < end; at += 64) _mm_prefetch(at, _MM_HINT_T1);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ================================================================ forward */

/* x -> panels [ceil(M / TILE_N)][K][TILE_N] of f32. Tokens past the end are zero, but a register of them is not written. */
void MANY(pack)(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  int64_t lo, hi, size = a.dtype == WANE_F32 ? 4 : 2;
  if (VW == 16 && a.M <= 16) { avx2_pack(op, chunk); return; }
  wane_op_range(op, chunk, a.M, 32, &lo, &hi);
  for (int64_t m = lo; m < hi; m += VW) {
    float *out = (float *)a.work + m / TILE_N * a.K * TILE_N + m % TILE_N;
    const char *x = (const char *)a.x + m * a.K * size;
    int rows = vec_left(m, hi);
    for (int64_t k = 0; k < a.K; k += VW) {
      int width = vec_left(k, a.K);
      vf r[VW];
      if (rows == VW && width == VW) {
        vec_load_transposed(r, x + k * size, a.K * size, a.dtype);
      } else {
        for (int i = 0; i < VW; i++) r[i] = i < rows ? vf_get_n(x, a.dtype, i * a.K + k, width) : vf_zero();
        vec_transpose(r);
      }
      for (int i = 0; i < width; i++) vf_store(out + (k + i) * TILE_N, r[i]);
    }
  }
}

/* Writes a panel's tiles to y: tokens [m, m + tokens), rows [n, n + count) of W. c: rows of TILE_N. */
void MANY(write_panel)(const wane_linear_args *a, const float *c, int64_t m, int64_t tokens, int64_t n, int64_t count) {
  for (int64_t i = 0; i < count; i += VW) {
    int width = vec_left(i, count);
    float bias[VW] = { 0 };
    for (int j = 0; j < width; j++) bias[j] = wane_linear_bias(a, n + i + j);
    const vf add = vf_load(bias);
    for (int64_t t = 0; t < tokens; t += VW) {
      vf r[VW];
      for (int j = 0; j < VW; j++) r[j] = j < width ? vf_load(c + (i + j) * TILE_N + t) : vf_zero();
      vec_transpose(r);
      for (int j = 0; j < VW && t + j < tokens; j++) vf_put_n(a->y, a->dtype, (m + t + j) * a->N + n + i, vf_add(r[j], add), width);
    }
  }
}

/* All groups of decoded rows at value r of the step against `run` values of a panel: c [groups][TILE_M][TILE_N]. */
static void multiply_panel(const float *rows, int64_t groups, const float *b, int64_t run, float *c, int first, int64_t tokens, const float *ahead) {
  int64_t g = 0;
  if (tokens > VW) {
    for (; g < groups; g++)
      multiply_part(rows + g * TILE_M * STEP, STEP, b, run, c + g * TILE, first, TILE_M, 2, ahead + g % (TILE_N / 16) * RUN * 16);
    return;
  }
  for (; g + 2 <= groups; g += 2) multiply_part(rows + g * TILE_M * STEP, STEP, b, run, c + g * TILE, first, 2 * TILE_M, 1, ahead);
  if (g < groups) multiply_part(rows + g * TILE_M * STEP, STEP, b, run, c + g * TILE, first, TILE_M, 1, ahead);
}

/* Rows [n, n + count) of W, count <= BLOCK_ROWS, against all tokens. */
static void many_block(const wane_linear_args *a, const wane_qview *w, int64_t n, int64_t count) {
  int64_t groups = (count + TILE_M - 1) / TILE_M, panels = (a->M + TILE_N - 1) / TILE_N, bytes = wane_dtype_bytes(w->dtype, 256);
  float *rows = wane_scratch(), *c = rows + BLOCK_ROWS * STEP;     // rows [count][STEP], c [panels][groups][TILE_M][TILE_N]
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  if (a->K == 0) memset(c, 0, (size_t)(panels * groups * TILE) * 4);
  for (int64_t k = 0; k < a->K; k += STEP) {
    int64_t step = least(a->K - k, STEP);
    for (int64_t i = 0; i < count; i++) {
      fetch_codes(w, bytes, (n + i) * a->K + k + STEP, STEP);
      kit->dequantize(w, (n + i) * a->K + k, step, rows + i * STEP);
    }
    for (int64_t i = count; i < groups * TILE_M; i++) memset(rows + i * STEP, 0, (size_t)step * 4);
    for (int64_t r = 0; r < step; r += RUN)
      for (int64_t p = 0; p < panels; p++) {
        const float *run = (const float *)a->work + (k + r) * TILE_N, *b = run + p * a->K * TILE_N;
        const float *ahead = p + 1 < panels ? b + a->K * TILE_N : run + RUN * TILE_N;
        multiply_panel(rows + r, groups, b, least(step - r, RUN), c + p * groups * TILE, k + r == 0, a->M - p * TILE_N, ahead);
      }
  }
  for (int64_t p = 0; p < panels; p++) MANY(write_panel)(a, c + p * groups * TILE, p * TILE_N, least(a->M - p * TILE_N, TILE_N), n, count);
}

/* Each block of rows reads all of x, so blocks are large; but decoded rows of a short x, which are soon used up, stay in the first-level
 * cache. */
void MANY(many)(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi, block = a.M <= 2 * TILE_N ? 2 * TILE_M : BLOCK_ROWS;
  if (VW == 16 && a.M <= 16) { avx2_many(op, chunk); return; }            /* fills AVX2's tile; its clock is higher, and memory the limit */
  wane_op_range(op, chunk, a.N, a.N < 1024 || a.M <= 2 * TILE_N ? 12 : 48, &lo, &hi);
  for (int64_t n = lo; n < hi; n += block) many_block(&a, &w, n, least(hi - n, block));
}

/* ================================================================ backward */

static int64_t runs_of(int64_t n) { return (n + RUN - 1) / RUN; }

/* dy -> f32 [ceil(M / TILE_M)][ceil(N / RUN)][TILE_M][RUN]: what a tile reads lies together. Rows past the end are zero. */
void MANY(back_pack)(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  int64_t lo, hi, size = a.dtype == WANE_F32 ? 4 : 2, runs = runs_of(a.N);
  wane_op_range(op, chunk, a.M, TILE_M, &lo, &hi);
  for (int64_t m = lo; m < hi || (lo < hi && m % TILE_M != 0); m++)
    for (int64_t n = 0; n < a.N; n += RUN) {
      float *out = (float *)a.work + ((m / TILE_M * runs + n / RUN) * TILE_M + m % TILE_M) * RUN;
      int64_t run = least(a.N - n, RUN);
      if (m < hi) avx2_widen((const char *)a.x + (m * a.N + n) * size, a.dtype, run, out);
      else memset(out, 0, (size_t)run * 4);
    }
}

/* Columns [k, k + count) of dx, count <= BLOCK_COLUMNS. */
static void back_block(const wane_linear_args *a, const wane_qview *w, int64_t k, int64_t count) {
  enum { PANELS = BLOCK_COLUMNS / TILE_N, AHEAD = 16 /* rows */ };
  int64_t groups = (a->M + TILE_M - 1) / TILE_M, panels = (count + TILE_N - 1) / TILE_N, runs = runs_of(a->N), bytes = wane_dtype_bytes(w->dtype, 256);
  float *b = wane_scratch(), *c = b + PANELS * RUN * TILE_N;       // b [panels][RUN][TILE_N], c [panels][groups][TILE_M][TILE_N]
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  float row[BLOCK_COLUMNS] = { 0 };
  if (a->N == 0) memset(c, 0, (size_t)(panels * groups * TILE) * 4);
  for (int64_t n = 0; n < a->N; n += RUN) {
    int64_t run = least(a->N - n, RUN);
    for (int64_t i = 0; i < run; i++) {
      fetch_codes(w, bytes, (n + i + AHEAD) * a->K + k, count);
      kit->dequantize(w, (n + i) * a->K + k, count, row);
      for (int64_t p = 0; p < panels; p++) memcpy(b + (p * RUN + i) * TILE_N, row + p * TILE_N, TILE_N * 4);
    }
    for (int64_t p = 0; p < panels; p++)
      for (int64_t g = 0; g < groups; g++) {
        const float *first = (const float *)a->work + n * TILE_M, *dy = first + g * runs * TILE_M * RUN;
        const float *ahead = g + 1 < groups ? dy + runs * TILE_M * RUN : first;
        multiply_part(dy, RUN, b + p * RUN * TILE_N, run, c + (p * groups + g) * TILE, n == 0, TILE_M, 2, ahead);
      }
  }
  for (int64_t m = 0; m < a->M; m++)
    for (int64_t i = 0; i < count; i += VW) {
      const float *from = c + (i / TILE_N * groups * TILE_M + m) * TILE_N + i % TILE_N;
      vf_put_n(a->y, a->dtype, m * a->K + k + i, vf_load(from), vec_left(i, count));
    }
}

void MANY(back)(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.K, BLOCK_COLUMNS, &lo, &hi);
  for (int64_t k = lo; k < hi; k += BLOCK_COLUMNS) back_block(&a, &w, k, least(hi - k, BLOCK_COLUMNS));
}

void MANY(register_many)(wane_backend *b, int group) {
  b->ops[WANE_OP_LINEAR_PACK + group] = MANY(pack);
  b->ops[WANE_OP_LINEAR_MANY + group] = MANY(many);
  b->ops[WANE_OP_LINEAR_BACK_PACK + group] = MANY(back_pack);
  b->ops[WANE_OP_LINEAR_BACK + group] = MANY(back);
}
#endif
