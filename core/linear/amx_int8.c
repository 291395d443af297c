/* amx_int8.c: LLM.int8() for many rows with AMX. W is the first operand of tdpbssd: its rows are copied into 16 x 64 byte tiles, once
 * for all of x (loading tiles from the strided rows costs 10 to 30 %). x is the second: packed once as [k/4][16 rows][4]. A result
 * tile is [16 of W][16 of x]; it is turned on the way out. Few rows stay with the AVX-512 level's kernels, and so does a K too long
 * for the scratch. Same integers and roundings as int8.c. */
#include "int8.h"
#include "../x86/amx.h"
#include "../x86/transpose16.h"

/* ---------------------------------------------------------------- prepare */

/* x's codes as tiles [M/16][k/64][16 quads of k][16 rows][4], rows padded with zeros to a multiple of 32. */
static void pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_int8_layout l = wane_int8_plan(a.M, a.K);
  char *rows = wane_scratch();
  int64_t lo, hi;
  wane_op_range(op, chunk, a.M, 32, &lo, &hi);
  wane_int8_begin_avx2(op, chunk);
  if (wane_int8_too_long(l.stride)) {
    wane_int8_quantize_avx512(op, lo, hi, (int8_t *)a.work + l.codes + lo * l.stride);
    return;
  }
  for (int64_t m = lo; m < (hi + 31) / 32 * 32; m += 16) {
    int64_t count = m >= hi ? 0 : hi - m < 16 ? hi - m : 16;
    wane_int8_quantize_avx512(op, m, m + count, (int8_t *)rows);
    memset(rows + count * l.stride, 0, (size_t)((16 - count) * l.stride));
    char *tiles = (char *)a.work + l.codes + m * l.stride;
    for (int64_t k = 0; k < l.stride; k += 64) wane_transpose16(rows + k, l.stride, tiles + k * 16, 64);
  }
}

/* ---------------------------------------------------------------- product */

/* Rows of W as tiles [rows/16][k/64][16][64], padded with zeros in both directions, an even number of tiles of rows. */
static const void *load(const int8_t *w, int64_t K, int64_t rows, void *scratch) {
  int64_t stride = (K + 63) / 64 * 64, whole = K & ~(int64_t)63;
  for (int64_t n = 0; n < (rows + 31) / 32 * 32; n++) {
    char *tile = (char *)scratch + n / 16 * 16 * stride + n % 16 * 64;
    if (n >= rows) {
      for (int64_t k = 0; k < stride; k += 64) memset(tile + k * 16, 0, 64);
      continue;
    }
    const int8_t *row = w + n * K;
    for (int64_t k = 0; k < whole; k += 64) _mm512_storeu_si512(tile + k * 16, _mm512_loadu_si512(row + k));
    if (whole < K) {
      memset(tile + whole * 16, 0, 64);
      memcpy(tile + whole * 16, row + whole, (size_t)(K - whole));
    }
  }
  return scratch;
}

/* Two tiles of W by two of x over all of k; c: 32 rows of WANE_INT8_ROWS. */
static void four(const char *w, const char *x, int64_t stride, int32_t *c) {
  _Alignas(64) int32_t out[4][256];
  const char *w1 = w + 16 * stride, *x1 = x + 16 * stride;
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int64_t k = 0; k < stride * 16; k += 1024) {
    _tile_loadd(4, w + k, 64);
    _tile_loadd(6, x + k, 64);
    _tile_loadd(7, x1 + k, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, w1 + k, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
  _tile_stored(2, out[2], 64);
  _tile_stored(3, out[3], 64);
  wane_transpose16(out[0], 64, c, WANE_INT8_ROWS * 4);
  wane_transpose16(out[1], 64, c + 16 * WANE_INT8_ROWS, WANE_INT8_ROWS * 4);
  wane_transpose16(out[2], 64, c + 16, WANE_INT8_ROWS * 4);
  wane_transpose16(out[3], 64, c + 16 * WANE_INT8_ROWS + 16, WANE_INT8_ROWS * 4);
}

static void multiply(const wane_int8_layout *l, const char *work, int64_t m, int mr, const void *w, int64_t K, int64_t nb, int32_t *c) {
  (void)mr, (void)K;                                   /* rows past the end are zeros, and c has room for them */
  for (int64_t n = 0; n < nb; n += 32) four((const char *)w + n * l->stride, work + l->codes + m * l->stride, l->stride, c + n);
}

static void product(const wane_op *op, uint32_t chunk) {
  static const wane_int8_kit tiles = { 32, load, multiply, wane_int8_gather_avx2, wane_int8_outliers_avx512, wane_int8_finish_avx512 };
  static const wane_int8_kit rows = { 6, NULL, wane_int8_multiply_avx512, wane_int8_gather_avx2, wane_int8_outliers_avx512, wane_int8_finish_avx512 };
  if (wane_int8_too_long(wane_int8_plan(op->n[WANE_LINEAR_M], op->n[11]).stride)) {
    wane_int8_product(op, chunk, &rows);
    return;
  }
  wane_tiles_on();
  wane_int8_product(op, chunk, &tiles);
  wane_tiles_off();
}

void wane_int8_register_amx(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PACK + WANE_GROUP_LLM_INT8] = pack;
  b->ops[WANE_OP_LINEAR_MANY + WANE_GROUP_LLM_INT8] = product;
}
