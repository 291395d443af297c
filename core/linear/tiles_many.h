/* tiles_many.h: many rows of x times a weight of any kind, and the backward, with bf16 tiles (bf16 products, f32 sums).
 *
 * Forward: W is the first operand, so its decoded rows stay row-major; x is the second, packed once as [16 pairs of k][16 tokens][2]; a
 * result tile is [16 of W][16 tokens] and is turned on the way out. Backward: dy is the first operand, W the second, two rows of it
 * interleaved. Tiles work two by two (four loads for four products).
 * The order of k inside a step of 128 (64 at the end of a row) is free as long as both sides agree: 4-bit weights use the order in which vpermw
 * delivers them. Their levels times their scale are one 32-entry table of bf16 a step, so a weight is bf16(level * absmax), as bitsandbytes has
 * it. bf16 weights are copied; other kinds are decoded by quant.h to f32 and rounded. WANE_COMPUTE_F32 stays with the f32 kernels.
 * A low-rank product beside it (lora.h) is a few more values of the contraction, in tiles after its own: u with x, the other factor with W.
 * Backward, rows of dy that are bf16 in whole steps are read where they are.
 * The contraction is cut in equal runs of at most RUN tiles (a panel of x, 2 KiB a tile, stays in the first-level cache, past which W is streamed)
 * and, beyond the scratch, in phases, by the shapes alone. */
#ifndef WANE_TILES_MANY_H
#define WANE_TILES_MANY_H
#include "tiles_linear.h"
#include "tiles_split.h"

enum { STEP = 128, BLOCK = TILE_BLOCK, PHASE = 96, PHASE_GRAIN = 8, UNITS_WANTED = 8, UNIT_ROWS = 128 };
/* The scratch: W's tiles, results kept between runs and phases, a row's scales, and which tiles they are. */
enum { W_ROOM = 1088 << 10, KEPT_ROOM = 432 << 10, SCALES_ROOM = 64 << 10, NAME_AT = W_ROOM + KEPT_ROOM + SCALES_ROOM };
_Static_assert(NAME_AT + 64 <= WANE_SCRATCH, "tiles, results and scales fit into the scratch memory");

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Tiles that the low-rank product adds. */
static int64_t added_tiles(const wane_op *op) { return op->i[WANE_LINEAR_RANK] > 0 ? wane_split_tiles(op->i[WANE_LINEAR_RANK]) : 0; }

/* 4-bit rows made of whole blocks of 64 with one scale each have decoders of their own. */
static int is_fast(const wane_qview *w) {
  return (w->dtype == WANE_NF4 || w->dtype == WANE_FP4) && w->cols % BLOCK == 0 && w->cols > 0 && w->block_size % BLOCK == 0 &&
         w->cols / BLOCK * 4 <= SCALES_ROOM;
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

/* Rows of a [M, width] tensor as tiles [M / 16][width / 32 + added] of 1 KiB, padded with zeros to 32 rows and 64 columns; turned into
 * [16 pairs][16 rows][2] when `turn`. The low-rank product's u lies where a bias would; of the first `in_place` rows it is all that is packed. */
static void pack_tiles(const wane_linear_args *a, const wane_op *op, uint32_t chunk, int64_t width, const __m512i *order, int turn, int64_t in_place) {
  _Alignas(64) uint16_t rows[16][STEP];
  int64_t lo, hi, tiles = tiles_of_row(width) + added_tiles(op), rank = op->i[WANE_LINEAR_RANK];
  wane_op_range(op, chunk, a->M, 32, &lo, &hi);
  for (int64_t m = lo; m < round_up(hi, 32) && lo < hi; m += 16) {
    for (int64_t k = 0; k < width && m >= in_place; k += STEP) {
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
    char *out = (char *)a->work + (m / 16 * tiles + tiles_of_row(width)) * TILE_BYTES;
    for (int i = 0; rank && i < 16; i++) wane_split_row(m + i < a->M ? (const float *)a->bias + (m + i) * rank : NULL, rank, WANE_SPLIT_FIRST, out + 64 * i);
    for (int64_t q = 0; turn && q < added_tiles(op); q++) wane_transpose16(out + q * TILE_BYTES, 64, out + q * TILE_BYTES, 64);
  }
}

static void pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  __m512i order[2];
  if (a.compute == WANE_COMPUTE_F32) { avx512_pack(op, chunk); return; }
  word_order(order);
  pack_tiles(&a, op, chunk, a.K, is_fast(&w) ? order : NULL, 1, 0);
}

/* Rows of dy that BACK reads where they are: bf16 in whole steps, in panels of 32. Rows a multiple of 2 KiB apart would share few sets of a cache. */
static int64_t rows_in_place(const wane_linear_args *a) {
  return a->dtype == WANE_BF16 && a->N % BLOCK == 0 && a->N % 1024 != 0 ? a->M / 32 * 32 : 0;
}

static void back_pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  if (a.compute == WANE_COMPUTE_F32) { avx512_back_pack(op, chunk); return; }
  pack_tiles(&a, op, chunk, a.N, NULL, 0, rows_in_place(&a));
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

/* Rows [n, n + count) of W (zeros up to a multiple of 32), values [k, k + width), as rows of 16 of tiles, `stride` bytes apart. */
void TILED(decode_rows)(const wane_qview *w, int64_t n, int64_t count, int64_t k, int64_t width, char *out, int64_t stride, float *scales) {
  __m512 levels = levels_of(w);
  int fast = is_fast(w);
  for (int64_t i = 0; i < round_up(count, 32); i++) {
    char *row = out + i / 16 * stride + i % 16 * 64;
    if (i >= count) for (int64_t t = 0; t < width / 32; t++) memset(row + t * TILE_BYTES, 0, 64);
    else if (fast) decode_fast(w, levels, avx512_row_scales(w, n + i, 0, scales), n + i, k, width, row);
    else decode_any(w, n + i, k, width, row);
  }
}

/* Rows [n, n + count) (zeros up to a multiple of 32) of the low-rank product's factor [N, r], as decode_rows has W's. */
static void added_rows(const wane_op *op, int64_t n, int64_t count, char *out, int64_t stride) {
  int64_t r = op->i[WANE_LINEAR_RANK];
  for (int64_t i = 0; i < round_up(count, 32); i++)
    wane_split_row(i < count ? (const float *)op->p[WANE_LINEAR_X] + (n + i) * r : NULL, r, WANE_SPLIT_SECOND, out + i / 16 * stride + i % 16 * 64);
}

/* 32 results of a row that begin at element `at` of a tensor: the first `count` and what lies there already, zeros beyond. */
WANE_INLINE void add_there(const void *x, int dtype, int64_t at, int64_t count, __m512 *lo, __m512 *hi) {
  float there[32] = { 0 };
  for (int64_t j = 0; count < 32 && j < count; j++) there[j] = wane_float_at(x, dtype, at + j);
  for (int64_t j = 0; count == 32 && j < 32; j += 8) _mm256_storeu_ps(there + j, avx2_load(x, dtype, at + j));
  *lo = _mm512_add_ps(*lo, _mm512_loadu_ps(there));
  *hi = _mm512_add_ps(*hi, _mm512_loadu_ps(there + 16));
}

/* Two panels of 16 tokens of rows [n, n + 32) to y, `onto` what lies where a bias would. c: four tiles. */
static void put_y(const wane_linear_args *a, const float *c, int64_t m, int64_t n, int onto) {
  _Alignas(64) float turned[2][16][16], bias[32] = { 0 };
  int64_t count = least(32, a->N - n);
  if (a->bias && !onto) for (int64_t i = 0; i < count; i++) bias[i] = wane_linear_bias(a, n + i);
  __m512 lo = _mm512_loadu_ps(bias), hi = _mm512_loadu_ps(bias + 16);
  for (int x = 0; x < 2; x++) {
    int64_t rows = least(16, a->M - m - 16 * x), at = (m + 16 * x) * a->N + n;
    if (rows <= 0) break;
    wane_transpose16(c + x * 256, 64, turned[0], 64);
    wane_transpose16(c + (2 + x) * 256, 64, turned[1], 64);
    for (int64_t t = 0; t < rows; t++, at += a->N) {
      __m512 y0 = _mm512_add_ps(_mm512_loadu_ps(turned[0][t]), lo), y1 = _mm512_add_ps(_mm512_loadu_ps(turned[1][t]), hi);
      if (onto) add_there(a->bias, a->dtype, at, count, &y0, &y1);
      put_row(a->y, a->dtype, at, y0, y1, count);
    }
  }
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
  for (int t = 0; t < 2; t++) z.words[t] = wane_interleave(t, 32);
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
    if (w->dtype == WANE_BF16)                                               /* 32 rows on: the columns are a strip that no stream of reads foresees */
      for (int h = 0; h < 2; h++) _mm_prefetch((const char *)w->codes + ((n + i + 32) * w->cols + k + 32 * h) * 2, _MM_HINT_T0);
    if (there && w->dtype != WANE_BF16) kit->dequantize(w, (n + i) * w->cols + k, count, f[i]);
    for (int h = 0; h < 2; h++)
      row[i][h] = w->dtype == WANE_BF16 ? load_bf16(w->codes, WANE_BF16, (n + i) * w->cols + k + 32 * h, there ? count - 32 * h : 0)
                                        : to_bf16(_mm512_loadu_ps(f[i] + 32 * h), _mm512_loadu_ps(f[i] + 32 * h + 16));
  }
  for (int t = 0; t < 4; t++) _mm512_storeu_si512(out + t * stride, _mm512_permutex2var_epi16(row[0][t / 2], z->words[t % 2], row[1][t / 2]));
}

/* Columns [k, k + columns) of W, rows [n, n + width), as tiles: 16 columns a row of tiles, `stride` bytes apart, two rows of W a row of a tile. */
void TILED(decode_columns)(const wane_qview *w, int64_t k, int64_t columns, int64_t n, int64_t width, char *out, int64_t stride) {
  pairing z = pairing_of(w);
  int64_t per = w->block_size / BLOCK;
  int fast = is_fast(w);
  for (int64_t i = 0; i < width; i += 2)
    for (int64_t j = 0; j < columns; j += BLOCK) {
      char *row = out + j / 16 * stride + i / 32 * TILE_BYTES + i % 32 / 2 * 64;
      if (n + i >= w->rows || k + j >= w->cols) for (int t = 0; t < 4; t++) memset(row + t * stride, 0, 64);
      else if (fast) pair_fast(w, &z, n + i, k + j, per, row, stride);
      else pair_any(w, &z, n + i, k + j, row, stride);
    }
}

/* Columns [k, k + columns) of the low-rank product's factor [r, K], as decode_columns has W's. */
static void added_columns(const wane_op *op, int64_t k, int64_t columns, char *out, int64_t stride) {
  const __m512i words[2] = { wane_interleave(0, 32), wane_interleave(1, 32) };
  int64_t r = op->i[WANE_LINEAR_RANK], K = op->n[11];
  for (int64_t s = 0; s < wane_split_tiles(r) * 32; s += 2)
    for (int64_t j = 0; j < columns; j += 32) {
      __m256i parts[2][2][2];                                                /* [of the two rows][half][hi, lo] */
      __m512i row[2];
      for (int64_t l = 0; l < 2; l++) {
        int64_t at = s + l, lo = at >= 2 * r;
        for (int64_t h = 0; h < 2; h++) {
          int64_t from = k + j + 16 * h, left = at < 3 * r ? K - from : 0;
          __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
          wane_split16(_mm512_maskz_loadu_ps(there, (const float *)op->p[WANE_LINEAR_BIAS] + at % r * K + from), &parts[l][h][0], &parts[l][h][1]);
        }
        row[l] = _mm512_inserti64x4(_mm512_inserti64x4(_mm512_setzero_si512(), parts[l][0][lo], 0), parts[l][1][lo], 1);
      }
      for (int t = 0; t < 2; t++)
        _mm512_storeu_si512(out + (j / 16 + t) * stride + s / 32 * TILE_BYTES + s % 32 / 2 * 64, _mm512_permutex2var_epi16(row[0], words[t], row[1]));
    }
}

/* Four tiles, columns [k, k + 32) of dx's rows [m, m + 32): rows 0 to 15, columns 0 to 15 and 16 to 31; rows 16 to 31. */
static void put_rows(const wane_linear_args *a, const float *c, int64_t m, int64_t k, int onto) {
  int64_t count = least(32, a->K - k);
  for (int64_t i = 0; i < least(32, a->M - m); i++) {
    const float *row = c + i / 16 * 512 + i % 16 * 16;
    int64_t at = (m + i) * a->K + k;
    __m512 lo = _mm512_loadu_ps(row), hi = _mm512_loadu_ps(row + 256);
    if (onto) add_there(a->y, a->dtype, at, count, &lo, &hi);
    put_row(a->y, a->dtype, at, lo, hi, count);
  }
}

/* ================================================================ both */

/* How a product is cut into units, by the shapes alone: `outs` outputs (rows of W; backward: its columns) of `rows` rows of x. All of W's share of
 * a unit lies in the scratch, or, beyond PHASE tiles, `phase` tiles at a time with the results kept between. Units are first as wide as the
 * scratch allows, because each block of outputs reads x anew, then made from fewer rows (not in phases, where each slice of rows would decode W anew),
 * at last from fewer outputs, so that there are some to share. */
typedef struct cut { int64_t outs, phase, phased, rows, blocks, slices; } cut;

static cut cut_of(int64_t M, int64_t outputs, int64_t tiles, int64_t added, int64_t grain) {
  int64_t phases = (tiles + PHASE - 1) / PHASE, most, want, kept;
  cut c = { .phase = phases == 1 ? tiles : round_up((tiles + phases - 1) / phases, PHASE_GRAIN), .phased = phases > 1 };
  most = W_ROOM / TILE_BYTES / (c.phase + added + 1) / (grain / 16) * grain;
  c.blocks = (outputs + most - 1) / most;
  c.slices = c.phased ? 1 : least((UNITS_WANTED + c.blocks - 1) / c.blocks, M < UNIT_ROWS ? 1 : M / UNIT_ROWS);
  want = (UNITS_WANTED + c.slices - 1) / c.slices;
  if (c.blocks < want) c.blocks = want;
  c.outs = round_up((outputs + c.blocks - 1) / c.blocks, grain);
  c.blocks = (outputs + c.outs - 1) / c.outs;
  kept = KEPT_ROOM / (c.outs / 32 * 4 * TILE_BYTES) * 32;
  if (phases > 1 && M > kept * c.slices) c.slices = (M + kept - 1) / kept;
  c.rows = round_up((M + c.slices - 1) / c.slices, 32);
  c.slices = (M + c.rows - 1) / c.rows;
  return c;
}

/* The tiles in this worker's scratch: block `block` of the product `id` (WANE_LINEAR_ID; 0 never matches). While an op runs its workers do nothing else,
 * so a worker that takes two units of one block decodes W once. The scratch holds the name too: it may be another than last time. */
typedef struct name { int64_t id, block; } name;
static _Thread_local name decoded;

static int is_decoded(const char *scratch, name wanted) {
  return wanted.id && !memcmp(&decoded, &wanted, sizeof wanted) && !memcmp(scratch + NAME_AT, &wanted, sizeof wanted);
}

static void set_decoded(char *scratch, name now) {
  decoded = now;
  memcpy(scratch + NAME_AT, &now, sizeof now);
}

/* A unit: rows [m0, m1) of x times the outputs from o on. w: W's tiles, pairs of rows of tiles `stride` bytes apart, of tiles [p, p + part). */
WANE_INLINE void unit_panels(const wane_linear_args *a, const cut *cut, const char *w, int64_t stride, int64_t o, int64_t m0, int64_t m1, int64_t tiles, int64_t p,
                             int64_t part, int back, int onto) {
  int64_t outputs = back ? a->K : a->N, pairs = (least(cut->outs, outputs - o) + 31) / 32;
  int64_t run = tiles_of_run(part), phased = cut->phased, in_place = back ? rows_in_place(a) : 0, own = tiles_of_row(back ? a->N : a->K);
  float *kept = (float *)(void *)((char *)wane_scratch() + W_ROOM);       /* [rows / 32 if phased][pairs if there are runs][4][16][16] */
  for (int64_t m = m0; m < m1; m += 32)
    for (int64_t k = 0; k < part; k += run) {
      const char *x0 = (const char *)a->work + (m / 16 * tiles + p + k) * TILE_BYTES, *x1 = x0 + tiles * TILE_BYTES;
      int last = p + part == tiles && k + run >= part;
      for (int64_t i = 0; i < pairs; i++) {
        const char *w0 = w + 2 * i * stride + k * TILE_BYTES, *w1 = w0 + stride;
        float *c = kept + ((phased ? (m - m0) / 32 * pairs : 0) + (phased || run < part ? i : 0)) * 1024;
        int64_t steps = least(run, part - k);
        if (!back) multiply(packed(w0, w1, x0, x1, TILE_BYTES, steps, c), p + k == 0, a->M - m > 16, 1);
        else if (m >= in_place) multiply(packed(x0, x1, w0, w1, TILE_BYTES, steps, c), p + k == 0, a->M - m > 16, 0);
        else {
          int64_t there = own - p - k < 0 ? 0 : least(steps, own - p - k), row = a->N * 2;      /* steps of dy itself; the rest are u's */
          const char *dy = (const char *)a->x + m * row + (p + k) * 64;
          tile_product t = packed(dy, dy + 16 * row, w0, w1, TILE_BYTES, there, c);
          t.a_row = row; t.a_step = 64;
          t.more0 = x0 + there * TILE_BYTES; t.more1 = x1 + there * TILE_BYTES; t.more = steps - there;
          multiply(t, p + k == 0, 1, 0);
        }
        if (!last) continue;
        if (back) put_rows(a, c, m, o + 32 * i, onto); else put_y(a, c, m, o + 32 * i, onto);
      }
    }
}

/* The units of a chunk. */
WANE_INLINE void units(const wane_op *op, uint32_t chunk, int back) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t outputs = back ? a.K : a.N, tiles = tiles_of_row(back ? a.N : a.K), added = added_tiles(op), lo, hi;
  cut cut = cut_of(a.M, outputs, tiles, added, back ? BLOCK : 32);
  int64_t stride = (cut.phase + added + 1) * TILE_BYTES;                   /* one more: powers of two would share few sets of a cache */
  char *scratch = wane_scratch();
  float *scales = (float *)(void *)(scratch + W_ROOM + KEPT_ROOM);
  wane_op_range(op, chunk, cut.blocks * cut.slices, 1, &lo, &hi);
  if (lo == hi) return;
  wane_tiles_on();
  for (int64_t u = lo; u < hi; u++) {
    int64_t o = u / cut.slices * cut.outs, m = u % cut.slices * cut.rows, count = least(cut.outs, outputs - o);
    name name = { cut.phased ? 0 : op->n[WANE_LINEAR_ID], u / cut.slices };
    for (int64_t p = 0; p < tiles; p += cut.phase) {
      int64_t part = least(cut.phase, tiles - p), more = p + part == tiles ? added : 0;
      if (!is_decoded(scratch, name)) {
        if (back) TILED(decode_columns)(&w, o, round_up(count, BLOCK), p * 32, part * 32, scratch, stride);
        else TILED(decode_rows)(&w, o, count, p * 32, part * 32, scratch, stride, scales);
        if (more && back) added_columns(op, o, round_up(count, BLOCK), scratch + part * TILE_BYTES, stride);
        else if (more) added_rows(op, o, count, scratch + part * TILE_BYTES, stride);
        set_decoded(scratch, name);
      }
      unit_panels(&a, &cut, scratch, stride, o, m, least(m + cut.rows, a.M), tiles + added, p, part + more, back, op->i[WANE_LINEAR_ONTO]);
    }
  }
  wane_tiles_off();
}

static void many(const wane_op *op, uint32_t chunk) {
  if (op->i[WANE_LINEAR_COMPUTE] == WANE_COMPUTE_F32 || op->n[11] == 0) avx512_many(op, chunk); else units(op, chunk, 0);
}

static void back(const wane_op *op, uint32_t chunk) {
  if (op->i[WANE_LINEAR_COMPUTE] == WANE_COMPUTE_F32 || op->n[10] == 0) avx512_back(op, chunk); else units(op, chunk, 1);
}

static void tiles_register(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_ADDS] = many;
  for (int group = 0; group < WANE_GROUPS; group++) {
    if (!b->ops[WANE_OP_LINEAR_BACK + group]) continue;                     /* LLM_INT8 has kernels of its own */
    b->ops[WANE_OP_LINEAR_PACK + group] = pack;
    b->ops[WANE_OP_LINEAR_MANY + group] = many;
    b->ops[WANE_OP_LINEAR_BACK_PACK + group] = back_pack;
    b->ops[WANE_OP_LINEAR_BACK + group] = back;
  }
}
#endif
