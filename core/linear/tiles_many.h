/* tiles_many.h: many rows of x times a weight of any kind, and the backward, with bf16 tiles (bf16 products, f32 sums).
 *
 * Of a product one operand is in rows as they are, the first, and one in pairs along the contraction, the second. Forward, either may be which:
 *   few rows of x     W is first: its decoded rows stay as they are; x is turned into pairs once (PACK), results are turned on the way out
 *   many (x_first)    x is first: bf16 rows in whole steps are read where they are, results leave as rows; W's tiles are turned as they are decoded
 * Backward, dy is first; W, two of its rows interleaved, second. Tiles work two by two (four loads for four products).
 * 4-bit levels times their scale are one table of bf16 a block, so a weight is bf16(level * absmax), as bitsandbytes has it. bf16 weights are copied; other
 * kinds are decoded by quant.h to f32 and rounded. WANE_COMPUTE_F32 stays with the f32 kernels.
 * A low-rank product beside it (lora.h) is a few more values of the contraction, in tiles after its own: u with x, the other factor with W.
 * The contraction is cut in equal runs of at most RUN tiles (a panel of x, 2 KiB a tile, stays in the first-level cache, past which W is streamed)
 * and, beyond the scratch, in phases, by the shapes alone. */
#ifndef WANE_TILES_MANY_H
#define WANE_TILES_MANY_H
#include "nll.h"
#include "tiles_linear.h"
#include "tiles_split.h"

enum { STEP = 128, BLOCK = TILE_BLOCK, PHASE = 96, PHASE_GRAIN = 8, UNITS_WANTED = 8, UNIT_ROWS = 128 };
/* The scratch: W's tiles, results kept between runs and phases, a row's scales, and which tiles they are. */
enum { W_ROOM = 1088 << 10, KEPT_ROOM = 432 << 10, SCALES_ROOM = 64 << 10, NAME_AT = W_ROOM + KEPT_ROOM + SCALES_ROOM };
_Static_assert(NAME_AT + 64 <= WANE_SCRATCH, "tiles, results and scales fit into the scratch memory");

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 4-bit rows made of whole blocks of 64 with one scale each have decoders of their own. */
static int is_fast(const wane_qview *w) {
  return (w->dtype == WANE_NF4 || w->dtype == WANE_FP4) && w->cols % BLOCK == 0 && w->cols > 0 && w->block_size % BLOCK == 0 &&
         w->cols / BLOCK * 4 <= SCALES_ROOM;
}

static __m512 levels_of(const wane_qview *w) { return _mm512_loadu_ps(w->dtype == WANE_FP4 ? wane_fp4_levels : wane_nf4_levels); }

/* Tiles, one behind the other, turned where they are: rows into pairs. */
static void turn_tiles(char *at, int64_t tiles) {
  for (; tiles > 0; tiles--, at += TILE_BYTES) wane_transpose16(at, 64, at, 64);
}

/* ================================================================ x's rows */

/* Does MANY take x's rows as first operand? A tile costs the same to turn whatever it holds: tiles of x and of results for each 16 rows of x, or tiles of W
 * as often as they are decoded, which is once or twice. */
static int x_first(int64_t M, int64_t N, int64_t K) { return M * (2 * N + K) >= 2 * N * K; }

/* A product as tiles see it. */
typedef struct job {
  wane_linear_args a;
  wane_qview w;
  int64_t width, outputs;                                                   /* values of a row of x and of results (BACK: of dy and of dx) */
  int64_t own, rank, added;                                                 /* tiles of a row; of the low-rank product the rank and the tiles */
  int64_t in_place;                                                         /* rows of x that are read where they are */
  int back, first;                                                          /* first: rows of x are the first operand */
  const void *factor, *onto;                                                /* the low-rank product's; [M, outputs] to add to the results, or NULL */
} job;

static job job_of(const wane_op *op, int back) {
  job j = { .a = wane_linear_load(op), .w = wane_qview_load(op), .rank = op->i[WANE_LINEAR_RANK], .factor = op->p[WANE_LINEAR_FACTOR], .back = back };
  j.width = back ? j.a.N : j.a.K; j.outputs = back ? j.a.K : j.a.N;
  j.own = tiles_of_row(j.width);
  j.added = j.rank > 0 ? wane_split_tiles(j.rank) : 0;
  j.first = back || x_first(j.a.M, j.a.N, j.a.K);
  /* bf16 in whole steps, in panels of 32 rows. Rows a multiple of 2 KiB apart would share few sets of a cache. */
  if (j.first && j.a.dtype == WANE_BF16 && j.width % BLOCK == 0 && j.width % 1024 != 0) j.in_place = j.a.M / 32 * 32;
  if (op->i[WANE_LINEAR_ONTO]) j.onto = back ? j.a.y : j.a.bias;
  return j;
}

/* Rows of x as tiles [M / 16][own + added] of 1 KiB, padded with zeros to 32 rows and 64 columns, in pairs unless they are the first operand. The low-rank
 * product's u lies where a bias would; of rows that are read in place it is all that is packed. */
static void pack_tiles(const job *j, const wane_op *op, uint32_t chunk) {
  const wane_linear_args *a = &j->a;
  int64_t lo, hi, tiles = j->own + j->added;
  wane_op_range(op, chunk, a->M, 32, &lo, &hi);
  for (int64_t m = lo; m < round_up(hi, 32) && lo < hi; m += 16) {
    char *out = (char *)a->work + m / 16 * tiles * TILE_BYTES;
    for (int64_t i = 0; i < 16 && m >= j->in_place; i++)
      for (int64_t t = 0; t < j->own; t++)
        _mm512_storeu_si512(out + t * TILE_BYTES + 64 * i,
                            m + i < a->M ? load_bf16(a->x, a->dtype, (m + i) * j->width + 32 * t, j->width - 32 * t) : _mm512_setzero_si512());
    for (int64_t i = 0; j->rank && i < 16; i++)
      wane_split_row(m + i < a->M ? (const float *)a->bias + (m + i) * j->rank : NULL, j->rank, WANE_SPLIT_FIRST, out + j->own * TILE_BYTES + 64 * i);
    if (!j->first) turn_tiles(out, tiles);
  }
}

static void pack(const wane_op *op, uint32_t chunk) {
  job j = job_of(op, 0);
  if (j.a.compute == WANE_COMPUTE_F32) avx512_pack(op, chunk); else pack_tiles(&j, op, chunk);
}

static void back_pack(const wane_op *op, uint32_t chunk) {
  job j = job_of(op, 1);
  if (j.a.compute == WANE_COMPUTE_F32) avx512_back_pack(op, chunk); else pack_tiles(&j, op, chunk);
}

/* x in pairs, whatever its shape: for nll.h. */
static void nll_pack(const wane_op *op, uint32_t chunk) {
  job j = job_of(op, 0);
  j.first = 0; j.in_place = 0;
  pack_tiles(&j, op, chunk);
}

/* ================================================================ W's rows */

/* Row n, values [k, k + width) (a multiple of 64, inside the row), as row r of tiles `out`, a KiB apart. */
static void decode_fast(const wane_qview *w, __m512 levels, const float *scale, int64_t n, int64_t k, int64_t width, char *out) {
  const __m128i *q = (const __m128i *)(const void *)((const uint8_t *)w->codes + (n * w->cols + k) / 2);
  const __m512i fifteens = _mm512_set1_epi16(15);
  for (int64_t b = k / BLOCK; b < (k + width) / BLOCK; b++) {
    __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(scale[b]));
    __m512i table = to_bf16(scaled, scaled);
    _mm_prefetch((const char *)q + w->cols * 8, _MM_HINT_T1);               /* this place, 16 rows on */
    for (int t = 0; t < 2; t++, q++, out += TILE_BYTES) {
      __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128(q));                  /* a byte is a pair: the upper nibble first */
      __m512i index = _mm512_and_si512(_mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16)), fifteens);
      _mm_prefetch(out + 128, _MM_HINT_ET0);
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
    }
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
static void added_rows(const job *j, int64_t n, int64_t count, char *out, int64_t stride) {
  for (int64_t i = 0; i < round_up(count, 32); i++)
    wane_split_row(i < count ? (const float *)j->factor + (n + i) * j->rank : NULL, j->rank, WANE_SPLIT_SECOND, out + i / 16 * stride + i % 16 * 64);
}

/* What units of MANY multiply with: rows [n, n + count), tiles [p, p + part) and `more` of the low-rank product's; 32 rows at a time, which are
 * still near when they are turned. */
static void take_rows(const job *j, int64_t n, int64_t count, int64_t p, int64_t part, int64_t more, char *out, int64_t stride, float *scales) {
  for (int64_t i = 0; i < count; i += 32, out += 2 * stride) {
    int64_t some = least(32, count - i);
    TILED(decode_rows)(&j->w, n + i, some, p * 32, part * 32, out, stride, scales);
    if (more) added_rows(j, n + i, some, out + part * TILE_BYTES, stride);
    for (int s = 0; s < 2 && j->first; s++) turn_tiles(out + s * stride, part + more);
  }
}

/* ================================================================ W's columns */

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

/* Columns [first, first + columns) of the low-rank product's factor [r, K], as decode_columns has W's. */
static void added_columns(const job *j, int64_t first, int64_t columns, char *out, int64_t stride) {
  const __m512i words[2] = { wane_interleave(0, 32), wane_interleave(1, 32) };
  int64_t r = j->rank, K = j->outputs;
  for (int64_t s = 0; s < wane_split_tiles(r) * 32; s += 2)
    for (int64_t c = 0; c < columns; c += 32) {
      __m256i parts[2][2][2];                                                /* [of the two rows][half][hi, lo] */
      __m512i row[2];
      for (int64_t l = 0; l < 2; l++) {
        int64_t at = s + l, lo = at >= 2 * r;
        for (int64_t h = 0; h < 2; h++) {
          int64_t from = first + c + 16 * h, left = at < 3 * r ? K - from : 0;
          __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
          wane_split16(_mm512_maskz_loadu_ps(there, (const float *)j->factor + at % r * K + from), &parts[l][h][0], &parts[l][h][1]);
        }
        row[l] = _mm512_inserti64x4(_mm512_inserti64x4(_mm512_setzero_si512(), parts[l][0][lo], 0), parts[l][1][lo], 1);
      }
      for (int t = 0; t < 2; t++)
        _mm512_storeu_si512(out + (c / 16 + t) * stride + s / 32 * TILE_BYTES + s % 32 / 2 * 64, _mm512_permutex2var_epi16(row[0], words[t], row[1]));
    }
}

/* ================================================================ results */

/* 32 results of a row that begin at element `at` of a tensor: the first `count` and what lies there already, zeros beyond. */
WANE_INLINE void add_there(const void *x, int dtype, int64_t at, int64_t count, __m512 *lo, __m512 *hi) {
  float there[32] = { 0 };
  for (int64_t j = 0; count < 32 && j < count; j++) there[j] = wane_float_at(x, dtype, at + j);
  for (int64_t j = 0; count == 32 && j < 32; j += 8) _mm256_storeu_ps(there + j, avx2_load(x, dtype, at + j));
  *lo = _mm512_add_ps(*lo, _mm512_loadu_ps(there));
  *hi = _mm512_add_ps(*hi, _mm512_loadu_ps(there + 16));
}

/* Results [o, o + count) of row m, with what is to be added: bias, or what lies there. */
WANE_INLINE void put(const job *j, int64_t m, int64_t o, int64_t count, __m512 lo, __m512 hi, const __m512 *bias) {
  int64_t at = m * j->outputs + o;
  if (j->onto) add_there(j->onto, j->a.dtype, at, count, &lo, &hi);
  else lo = _mm512_add_ps(lo, bias[0]), hi = _mm512_add_ps(hi, bias[1]);
  put_row(j->a.y, j->a.dtype, at, lo, hi, count);
}

/* Four tiles, rows [m, m + 32) of x and results [o, o + 32): with x first the tiles are rows 0 to 15 with results 0 to 15 and 16 to 31, then rows 16 to 31;
 * otherwise results 0 to 15 with rows 0 to 15 and 16 to 31, each tile to be turned. */
WANE_INLINE void put_tiles(const job *j, float *c, int64_t m, int64_t o, const int first) {
  int64_t count = least(32, j->outputs - o), rows = least(32, j->a.M - m), below = first ? 512 : 256, beside = first ? 256 : 512;
  float values[32] = { 0 };
  for (int64_t i = 0; i < count && !j->back && !j->onto; i++) values[i] = wane_linear_bias(&j->a, o + i);
  const __m512 bias[2] = { _mm512_loadu_ps(values), _mm512_loadu_ps(values + 16) };
  for (int64_t t = 0; t < 4 && !first; t++) if (t % 2 * 16 < rows) turn_tiles((char *)(c + t * TILE_FLOATS), 1);
  for (int64_t i = 0; i < rows; i++) {
    const float *row = c + i / 16 * below + i % 16 * 16;
    put(j, m + i, o, count, _mm512_loadu_ps(row), _mm512_loadu_ps(row + beside), bias);
  }
}

/* ================================================================ units */

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

/* A unit: rows [m0, m1) of x times the outputs from o on. w: W's tiles, pairs of rows of tiles `stride` bytes apart, of tiles [p, p + part) of all. */
WANE_INLINE void unit_panels(const job *j, const cut *cut, const char *w, int64_t stride, int64_t o, int64_t m0, int64_t m1, int64_t p, int64_t part, const int first) {
  const wane_linear_args *a = &j->a;
  int64_t tiles = j->own + j->added, pairs = (least(cut->outs, j->outputs - o) + 31) / 32, run = tiles_of_run(part), phased = cut->phased, row = j->width * 2;
  float *kept = (float *)(void *)((char *)wane_scratch() + W_ROOM);       /* [rows / 32 if phased][pairs if there are runs][4][16][16] */
  for (int64_t m = m0; m < m1; m += 32)
    for (int64_t k = 0; k < part; k += run) {
      const char *x0 = (const char *)a->work + (m / 16 * tiles + p + k) * TILE_BYTES, *x1 = x0 + tiles * TILE_BYTES;
      int last = p + part == tiles && k + run >= part;
      for (int64_t i = 0; i < pairs; i++) {
        const char *w0 = w + 2 * i * stride + k * TILE_BYTES, *w1 = w0 + stride;
        float *c = kept + ((phased ? (m - m0) / 32 * pairs : 0) + (phased || run < part ? i : 0)) * 1024;
        int64_t steps = least(run, part - k);
        if (!first) multiply(packed(w0, w1, x0, x1, TILE_BYTES, steps, c), p + k == 0, a->M - m > 16, 1);
        else if (m >= j->in_place) multiply(packed(x0, x1, w0, w1, TILE_BYTES, steps, c), p + k == 0, a->M - m > 16, 0);
        else {
          int64_t there = j->own - p - k < 0 ? 0 : least(steps, j->own - p - k);                 /* steps of x itself; the rest are u's */
          const char *x = (const char *)a->x + m * row + (p + k) * 64;
          tile_product t = packed(x, x + 16 * row, w0, w1, TILE_BYTES, there, c);
          t.a_row = row; t.a_step = 64;
          t.more0 = x0 + there * TILE_BYTES; t.more1 = x1 + there * TILE_BYTES; t.more = steps - there;
          multiply(t, p + k == 0, 1, 0);
        }
        if (last) put_tiles(j, c, m, o + 32 * i, first);
      }
    }
}

/* The units of a chunk. */
static void units(const wane_op *op, uint32_t chunk, int back) {
  job j = job_of(op, back);
  int64_t lo, hi;
  cut cut = cut_of(j.a.M, j.outputs, j.own, j.added, back ? BLOCK : 32);
  int64_t stride = (cut.phase + j.added + 1) * TILE_BYTES;                 /* one more: powers of two would share few sets of a cache */
  char *scratch = wane_scratch();
  float *scales = (float *)(void *)(scratch + W_ROOM + KEPT_ROOM);
  wane_op_range(op, chunk, cut.blocks * cut.slices, 1, &lo, &hi);
  if (lo == hi) return;
  wane_tiles_on();
  for (int64_t u = lo; u < hi; u++) {
    int64_t o = u / cut.slices * cut.outs, m = u % cut.slices * cut.rows, m1 = least(m + cut.rows, j.a.M), count = least(cut.outs, j.outputs - o);
    name name = { cut.phased ? 0 : op->n[WANE_LINEAR_ID], u / cut.slices };
    for (int64_t p = 0; p < j.own; p += cut.phase) {
      int64_t part = least(cut.phase, j.own - p), more = p + part == j.own ? j.added : 0;
      if (!is_decoded(scratch, name)) {
        if (!back) take_rows(&j, o, count, p, part, more, scratch, stride, scales);
        else TILED(decode_columns)(&j.w, o, round_up(count, BLOCK), p * 32, part * 32, scratch, stride);
        if (back && more) added_columns(&j, o, round_up(count, BLOCK), scratch + part * TILE_BYTES, stride);
        set_decoded(scratch, name);
      }
      if (j.first) unit_panels(&j, &cut, scratch, stride, o, m, m1, p, part + more, 1);
      else unit_panels(&j, &cut, scratch, stride, o, m, m1, p, part + more, 0);
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
  b->ops[WANE_OP_LINEAR_NLL_PACK] = nll_pack;
  for (int group = 0; group < WANE_GROUPS; group++) {
    if (!b->ops[WANE_OP_LINEAR_BACK + group]) continue;                     /* LLM_INT8 has kernels of its own */
    b->ops[WANE_OP_LINEAR_PACK + group] = pack;
    b->ops[WANE_OP_LINEAR_MANY + group] = many;
    b->ops[WANE_OP_LINEAR_BACK_PACK + group] = back_pack;
    b->ops[WANE_OP_LINEAR_BACK + group] = back;
  }
}
#endif
