/* amx_lora.c: the low-rank products (lora.h) of bf16 x and y with AMX bf16 tiles.
 *
 * x and y are bf16 as they are. What is f32, W and u, is split in two (amx_split.h): u stacked as [hi | lo | hi] against W as [hi | hi | lo] for y;
 * [hi | lo] of W or u against x for u and dW, added up afterwards.
 * Other dtypes, dropout and large ranks go to the kernels with vectors. */
#define WANE_VEC 512
#include "amx_split.h"
#include "../x86/transpose16.h"
#include "../x86/vec.h"
#include "lora.h"
#include <string.h>

enum {
  RANK = WANE_SPLIT_RANK,
  STRIP = 256,                             /* columns that COLUMNS takes at once */
  ROWS = 256,                              /* rows that it takes at once */
  W_ROOM = 512 << 10,                      /* W's tiles in ROWS */
  FAR = 96, NEAR = 12,                     /* rows ahead that are fetched into the second-level cache, into the first */
  BESIDE = 256                             /* floats of a tile */
};

/* The kernels that do what tiles do not. */
static void (*vectors_rows)(const wane_op *, uint32_t), (*vectors_columns)(const wane_op *, uint32_t);

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* 16 f32 values as their two parts. */
VEC void split(vf x, uint16_t *hi, uint16_t *lo) {
  __m256i h, l;
  wane_split16(x, &h, &l);
  _mm256_storeu_si256((__m256i *)(void *)hi, h);
  _mm256_storeu_si256((__m256i *)(void *)lo, l);
}

/* 32 values of a row of x: zeros beyond its end. */
VEC __m512i part(const uint16_t *row, int64_t left) { return load_bf16(row, WANE_BF16, 0, left); }

/* Four tiles c, [2][2] with rows `c_row` bytes apart, (+)= `steps` products: a0 and a1, rows `a_row` bytes apart, times b0 and, if two, b1. Steps in bytes. */
VEC void product(const char *a0, const char *a1, int64_t a_row, int64_t a_step, const char *b0, const char *b1, int64_t b_step, int64_t steps,
                 float *c, int64_t c_down, int64_t c_row, int add, const int two) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  if (add) {
    _tile_loadd(0, c, c_row); _tile_loadd(2, c + c_down, c_row);
    if (two) { _tile_loadd(1, (char *)c + (c_row == 64 ? TILE_BYTES : 64), c_row); _tile_loadd(3, (char *)(c + c_down) + (c_row == 64 ? TILE_BYTES : 64), c_row); }
  }
  for (int64_t i = 0; i < steps; i++, a0 += a_step, a1 += a_step, b0 += b_step, b1 += b_step) {
    _tile_loadd(6, b0, 64);
    _tile_loadd(4, a0, a_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a1, a_row);
    _tile_dpbf16ps(2, 5, 6);
    if (two) {
      _tile_loadd(7, b1, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row); _tile_stored(2, c + c_down, c_row);
  if (two) { _tile_stored(1, (char *)c + (c_row == 64 ? TILE_BYTES : 64), c_row); _tile_stored(3, (char *)(c + c_down) + (c_row == 64 ? TILE_BYTES : 64), c_row); }
}

/* ================================================================ along rows */

/* W's parts, columns [c, c + n), as second operands: tiles [n / 32][tiles] of [pair of columns][16 of hi | lo][2]. */
static void rows_pack(const wane_op *op, int64_t c, int64_t n, int64_t tiles, char *out) {
  const float *w = op->p[WANE_LORA_W];
  int64_t C = op->n[WANE_LORA_C], r = op->n[WANE_LORA_R];
  for (int64_t k = 0; k < n; k += 32, out += tiles * TILE_BYTES) {
    memset(out, 0, (size_t)(tiles * TILE_BYTES));
    for (int64_t j = 0; j < r; j++)
      for (int64_t h = 0; h < 2 && k + 16 * h < n; h++) {
        uint16_t parts[2][16];
        split(vf_load_n(w + j * C + c + k + 16 * h, vec_left(k + 16 * h, n)), parts[0], parts[1]);
        memcpy(out + j / 16 * TILE_BYTES + j % 16 * 64 + 32 * h, parts[0], 32);
        memcpy(out + (j + r) / 16 * TILE_BYTES + (j + r) % 16 * 64 + 32 * h, parts[1], 32);
      }
    for (int64_t q = 0; q < tiles; q++) wane_transpose16(out + q * TILE_BYTES, 64, out + q * TILE_BYTES, 64);
  }
}

/* Rows [m, m + 32) times W's tiles of columns [c, c + n): sums [32][16 tiles], kept between pieces. */
static void rows_panel(const wane_op *op, const char *w, int64_t tiles, int64_t m, int64_t c, int64_t n, float *sums, char *spare) {
  int64_t C = op->n[WANE_LORA_C], M = op->n[WANE_LORA_M], steps = n / 32, wide = tiles * 16, row = C * 2;
  const uint16_t *x = (const uint16_t *)op->p[WANE_LORA_X] + m * C + c;
  const char *a = (const char *)x;
  if (M - m < 32 || steps * 32 < n) {                                     /* rows or columns are missing: a copy has zeros */
    steps = (n + 31) / 32;
    for (int64_t i = 0; i < 32; i++)
      for (int64_t k = 0; k < steps; k++) _mm512_storeu_si512(spare + (i * steps + k) * 64, m + i < M ? part(x + i * C + 32 * k, n - 32 * k) : _mm512_setzero_si512());
    a = spare;
    row = steps * 64;
  }
  for (int64_t q = 0; q + 1 < tiles; q += 2)
    product(a, a + 16 * row, row, 64, w + q * TILE_BYTES, w + (q + 1) * TILE_BYTES, tiles * TILE_BYTES, steps, sums + q * 16, 16 * wide, wide * 4, c > 0, 1);
  if (tiles % 2)
    product(a, a + 16 * row, row, 64, w + (tiles - 1) * TILE_BYTES, w, tiles * TILE_BYTES, steps, sums + (tiles - 1) * 16, 16 * wide, wide * 4, c > 0, 0);
}

static void rows(const wane_op *op, uint32_t chunk) {
  int64_t C = op->n[WANE_LORA_C], r = op->n[WANE_LORA_R], tiles = (2 * r + 15) / 16, piece = least(up(C, 32), W_ROOM / TILE_BYTES / tiles * 32), lo, hi;
  char *w = wane_scratch(), *spare = w + W_ROOM;                           /* spare: 32 rows of a piece: as much as W's tiles at most, for each of them 2 */
  float *sums = (float *)(void *)(spare + 2 * W_ROOM);
  if (op->i[WANE_LORA_DTYPE] != WANE_BF16 || op->f[WANE_LORA_THRESHOLD] != 0 || C == 0 || r > RANK) {
    vectors_rows(op, chunk);
    return;
  }
  wane_op_range(op, chunk, op->n[WANE_LORA_M], 32, &lo, &hi);
  if (lo == hi) return;
  if (piece >= C) rows_pack(op, 0, C, tiles, w);
  wane_tiles_on();
  for (int64_t m = lo; m < hi; m += 32) {
    for (int64_t c = 0; c < C; c += piece) {
      if (piece < C) rows_pack(op, c, least(piece, C - c), tiles, w);
      rows_panel(op, w, tiles, m, c, least(piece, C - c), sums, spare);
    }
    vf scale = vf_set1(op->f[WANE_LORA_SCALE]);
    for (int64_t i = 0; i < least(32, hi - m); i++) {
      const float *s = sums + i * tiles * 16;
      float *u = (float *)op->p[WANE_LORA_U] + (m + i) * r;
      for (int64_t j = 0; j < r; j += VW) {
        int left = vec_left(j, r);
        vf_store_n(u + j, vf_mul(vf_add(vf_load_n(s + j, left), vf_load_n(s + r + j, left)), scale), left);
      }
    }
  }
  wane_tiles_off();
}
_Static_assert(3 * W_ROOM + 32 * 2 * RANK * 4 <= WANE_SCRATCH, "W's tiles, a panel of x and its sums fit into the scratch memory");

/* ================================================================ down columns */

/* A strip of columns [c, c + width) and a block of rows [m, m + rows). Tiles: u [rows / 16][S], ut [Q][rows / 32], w [S][width / 16], x [rows / 32][2],
 * the sums for dW [width / 32][Q, even][2]; W's values and parts are rows STRIP apart, parts being hi, lo and a row of zeros. */
typedef struct strip {
  const wane_op *op;
  int64_t r, S, Q, c, width, m, rows;
  char *u, *ut, *w, *x;
  float *y, *dw, *values;
  uint16_t *parts;
  __m512i halves[2], eights[4];
} strip;
enum { DEEP = (3 * RANK + 31) / 32, HIGH = 2 * RANK / 16 };
_Static_assert((ROWS / 16 * DEEP + HIGH * ROWS / 32 + DEEP * STRIP / 16 + ROWS / 32 * 2 + 4 + HIGH * STRIP / 16) * TILE_BYTES + RANK * STRIP * 4 + (2 * RANK + 1) * STRIP * 2 <= WANE_SCRATCH,
               "a strip and a block of rows fit into the scratch memory");

static void strip_open(strip *t, const wane_op *op) {
  char *at = wane_scratch();
  int16_t index[6][32];
  t->op = op;
  t->r = op->n[WANE_LORA_R]; t->S = wane_split_tiles(t->r); t->Q = (2 * t->r + 15) / 16;
  t->u = at; at += ROWS / 16 * t->S * TILE_BYTES;
  t->ut = at; at += t->Q * ROWS / 32 * TILE_BYTES;
  t->w = at; at += t->S * STRIP / 16 * TILE_BYTES;
  t->x = at; at += ROWS / 32 * 2 * TILE_BYTES;
  t->y = (float *)(void *)at; at += 4 * TILE_BYTES;
  t->dw = (float *)(void *)at; at += (t->Q + t->Q % 2) * STRIP / 16 * TILE_BYTES;
  t->values = (float *)(void *)at; at += t->r * STRIP * 4;
  t->parts = (uint16_t *)(void *)at;
  for (int i = 0; i < 32; i++) {
    for (int h = 0; h < 2; h++) index[h][i] = (int16_t)(16 * h + i / 2 + (i % 2 ? 32 : 0));
    for (int k = 0; k < 4; k++) index[2 + k][i] = (int16_t)(8 * k + i % 8 + (i / 8 == 1 ? 32 : 0));
  }
  for (int h = 0; h < 2; h++) t->halves[h] = _mm512_loadu_si512(index[h]);
  for (int k = 0; k < 4; k++) t->eights[k] = _mm512_loadu_si512(index[2 + k]);
}

/* Four rows of u of rank 8 at once: each [hi | lo | hi | 0]. */
VEC void four_rows(const strip *t, const float *u, char *out) {
  vf a = vf_load(u), b = vf_load(u + 16);
  __m512i hi = to_bf16(a, b);
  vf high_a = vf_bits(vi_sll(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(hi, 0)), 16)), high_b = vf_bits(vi_sll(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(hi, 1)), 16));
  __m512i lo = to_bf16(vf_sub(a, high_a), vf_sub(b, high_b));
  for (int k = 0; k < 4; k++) _mm512_storeu_si512(out + 64 * k, _mm512_maskz_mov_epi64(0x3f, _mm512_permutex2var_epi16(hi, t->eights[k], lo)));
}

/* Rows [m, m + rows) of u; and turned, where dW is wanted. */
static void strip_rows(strip *t, int64_t m, int64_t rows) {
  int64_t r = t->r, padded = up(rows, 32), i = 0;
  const float *u = (const float *)t->op->p[WANE_LORA_U] + m * r;
  t->m = m; t->rows = rows;
  if (r == 8) for (; i + 4 <= rows; i += 4) four_rows(t, u + i * 8, t->u + i / 16 * TILE_BYTES + i % 16 * 64);
  for (; i < padded; i++) {
    char *out = t->u + i / 16 * t->S * TILE_BYTES + i % 16 * 64;
    wane_split_row(i < rows ? u + i * r : NULL, r, WANE_SPLIT_FIRST, out);
  }
  if (!t->op->p[WANE_LORA_DW]) return;
  for (i = 0; i < padded; i += 32)
    for (int64_t q = 0; q < t->Q; q++) {
      char *out = t->ut + (q * ROWS / 32 + i / 32) * TILE_BYTES;
      for (int64_t k = 0; k < 16; k++) {
        const char *pair = t->u + ((i + 2 * k) / 16 * t->S + q / 2) * TILE_BYTES + (i + 2 * k) % 16 * 64;
        _mm512_storeu_si512(out + 64 * k, _mm512_permutex2var_epi16(_mm512_loadu_si512(pair), t->halves[q % 2], _mm512_loadu_si512(pair + 64)));
      }
      wane_transpose16(out, 64, out, 64);
    }
}

/* Columns [c, c + width) of W: the copy where one is wanted; [hi | hi | lo] in pairs, where y is. */
static void strip_columns(strip *t, int64_t c, int64_t width) {
  const wane_op *op = t->op;
  int64_t C = op->n[WANE_LORA_C], r = t->r, turned = op->i[WANE_LORA_TURNED], tiles = up(width, 32) / 16;
  const float *w = op->p[WANE_LORA_W];
  float *copy = op->p[WANE_LORA_COPY];
  t->c = c; t->width = width;
  if (!copy && !op->p[WANE_LORA_Y]) return;
  for (int64_t j = 0; j < r; j++) {
    float *v = t->values + j * STRIP;
    if (turned) for (int64_t i = 0; i < width; i++) v[i] = w[(c + i) * r + j];
    else memcpy(v, w + j * C + c, (size_t)width * sizeof *v);
    for (int64_t i = width; i < tiles * 16; i++) v[i] = 0.0f;
    if (copy) memcpy(copy + j * C + c, v, (size_t)width * sizeof *v);
  }
  if (!op->p[WANE_LORA_Y]) return;
  uint16_t *zeros = t->parts + 2 * r * STRIP;
  memset(zeros, 0, STRIP * 2);
  for (int64_t j = 0; j < r; j++)
    for (int64_t i = 0; i < tiles; i++) split(vf_load(t->values + j * STRIP + 16 * i), t->parts + j * STRIP + 16 * i, t->parts + (r + j) * STRIP + 16 * i);
  for (int64_t k = 0; k < t->S * 32; k += 2)
    for (int64_t i = 0; i < tiles; i += 2) {
      __m512i v[2];
      for (int64_t l = 0; l < 2; l++) {
        int64_t row = k + l < r ? k + l : k + l < 3 * r ? k + l - r : 2 * r;       /* hi, hi, lo, zeros */
        v[l] = _mm512_loadu_si512(t->parts + row * STRIP + 16 * i);
      }
      for (int h = 0; h < 2; h++) _mm512_storeu_si512(t->w + (k / 32 * tiles + i + h) * TILE_BYTES + k % 32 / 2 * 64, _mm512_permutex2var_epi16(v[0], t->halves[h], v[1]));
    }
}

/* Columns [c + i, c + i + 32) of the block's rows: y += u W. */
static void strip_y(strip *t, int64_t i) {
  int64_t C = t->op->n[WANE_LORA_C], tiles = up(t->width, 32) / 16, left = t->width - i;
  for (int64_t m = 0; m < t->rows; m += 32) {
    const char *u = t->u + m / 16 * t->S * TILE_BYTES, *w = t->w + i / 16 * TILE_BYTES;
    product(u, u + t->S * TILE_BYTES, 64, TILE_BYTES, w, w + TILE_BYTES, tiles * TILE_BYTES, t->S, t->y, 2 * BESIDE, 64, 0, 1);
    uint16_t *y = (uint16_t *)t->op->p[WANE_LORA_Y] + (t->m + m) * C + t->c + i;
    for (int64_t k = 0; k < least(32, t->rows - m); k++, y += C) {
      const float *c = t->y + k / 16 * 2 * BESIDE + k % 16 * 16;
      if (left >= 32) {
        _mm512_storeu_si512(y, to_bf16(vf_add(vf_from_bf16(y), vf_load(c)), vf_add(vf_from_bf16(y + 16), vf_load(c + BESIDE))));
        continue;
      }
      uint16_t row[32] = { 0 };
      memcpy(row, y, (size_t)left * 2);
      _mm512_storeu_si512(row, to_bf16(vf_add(vf_from_bf16(row), vf_load(c)), vf_add(vf_from_bf16(row + 16), vf_load(c + BESIDE))));
      memcpy(y, row, (size_t)left * 2);
    }
  }
}

/* c (two tiles; two more below) += one first operand's `steps` products with pairs of tiles at b: the even steps above, the odd ones below, so that
 * two sums run at once. */
static void product_single(const char *a, const char *b, int64_t steps, float *c, int add) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  if (add) {
    _tile_loadd(0, c, 64); _tile_loadd(1, c + BESIDE, 64);
    _tile_loadd(2, c + 2 * BESIDE, 64); _tile_loadd(3, c + 3 * BESIDE, 64);
  }
  for (int64_t i = 0; i < steps; i += 2, a += 2 * TILE_BYTES, b += 4 * TILE_BYTES) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + TILE_BYTES, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (i + 1 == steps) break;
    _tile_loadd(5, a + TILE_BYTES, 64);
    _tile_loadd(6, b + 2 * TILE_BYTES, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + 3 * TILE_BYTES, 64);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64); _tile_stored(1, c + BESIDE, 64);
  _tile_stored(2, c + 2 * BESIDE, 64); _tile_stored(3, c + 3 * BESIDE, 64);
}

/* The same columns: dW += uᵀ x. Interleaving within 128 bits costs half of interleaving in order: tile 0 has columns 0 to 3, 8 to 11 …, tile 1 the others. */
static void strip_dw(strip *t, int64_t i) {
  int64_t C = t->op->n[WANE_LORA_C], left = t->width - i, steps = up(t->rows, 32) / 32, row = ROWS / 32 * TILE_BYTES;
  const uint16_t *x = (const uint16_t *)t->op->p[WANE_LORA_X] + t->m * C + t->c + i;
  for (int64_t k = 0; k < steps * 16; k++, x += 2 * C) {
    __m512i a = 2 * k < t->rows ? part(x, left) : _mm512_setzero_si512(), b = 2 * k + 1 < t->rows ? part(x + C, left) : _mm512_setzero_si512();
    char *out = t->x + k / 16 * 2 * TILE_BYTES + k % 16 * 64;
    for (int l = 0; l < 2; l++) {                                          /* rows lie apart: no stream of reads foresees them */
      __builtin_prefetch(x + (FAR + l) * C, 0, 2);
      __builtin_prefetch(x + (NEAR + l) * C);
    }
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(out + TILE_BYTES, _mm512_unpackhi_epi16(a, b));
  }
  float *dw = t->dw + i / 32 * (t->Q + t->Q % 2) * 2 * BESIDE;
  for (int64_t q = 0; q + 1 < t->Q; q += 2)
    product(t->ut + q * row, t->ut + (q + 1) * row, 64, TILE_BYTES, t->x, t->x + TILE_BYTES, 2 * TILE_BYTES, steps, dw + q * 2 * BESIDE, 2 * BESIDE, 64, t->m > 0, 1);
  if (t->Q % 2) product_single(t->ut + (t->Q - 1) * row, t->x, steps, dw + (t->Q - 1) * 2 * BESIDE, t->m > 0);
}

/* A row of the sums of 32 columns, in their order; row: of the stack of hi and lo. */
static void strip_sums(const strip *t, const float *sums, int64_t row, float out[32]) {
  _Alignas(64) float v[2][16];
  const float *s = sums + row / 16 * 2 * BESIDE + row % 16 * 16;
  for (int h = 0; h < 2; h++) {
    vf x = vf_load(s + h * BESIDE);
    if (row / 16 + 1 == t->Q && t->Q % 2) x = vf_add(x, vf_load(s + (2 + h) * BESIDE));
    vf_store(v[h], x);
  }
  for (int g = 0; g < 8; g++) memcpy(out + 4 * g, v[g % 2] + g / 2 * 4, 16);
}

/* dW = the sums over hi and lo. */
static void strip_store(const strip *t) {
  int64_t C = t->op->n[WANE_LORA_C], r = t->r, turned = t->op->i[WANE_LORA_TURNED], pairs = t->Q + t->Q % 2;
  float *dw = t->op->p[WANE_LORA_DW], hi[32], lo[32];
  for (int64_t i = 0; i < t->width; i += 32)
    for (int64_t j = 0; j < r; j++) {
      int64_t left = least(32, t->width - i);
      strip_sums(t, t->dw + i / 32 * pairs * 2 * BESIDE, j, hi);
      strip_sums(t, t->dw + i / 32 * pairs * 2 * BESIDE, j + r, lo);
      for (int64_t l = 0; l < left; l++) dw[turned ? (t->c + i + l) * r + j : j * C + t->c + i + l] = hi[l] + lo[l];
    }
}

static void strip_block(strip *t) {
  for (int64_t i = 0; i < t->width; i += 32) {
    if (t->op->p[WANE_LORA_DW]) strip_dw(t, i);
    if (t->op->p[WANE_LORA_Y]) strip_y(t, i);
  }
}

static void columns(const wane_op *op, uint32_t chunk) {
  int64_t C = op->n[WANE_LORA_C], M = op->n[WANE_LORA_M], lo, hi;
  strip t;
  if (op->i[WANE_LORA_DTYPE] != WANE_BF16 || op->f[WANE_LORA_THRESHOLD] != 0 || M == 0 || op->n[WANE_LORA_R] > RANK) {
    vectors_columns(op, chunk);
    return;
  }
  strip_open(&t, op);
  wane_tiles_on();
  if (!op->p[WANE_LORA_DW] && !op->p[WANE_LORA_COPY]) {                    /* y alone goes by rows, which lie in one piece */
    wane_op_range(op, chunk, M, 32, &lo, &hi);
    for (int64_t m = lo; m < hi; m += ROWS) {
      strip_rows(&t, m, least(ROWS, hi - m));
      for (int64_t c = 0; c < C; c += STRIP) {
        strip_columns(&t, c, least(STRIP, C - c));
        strip_block(&t);
      }
    }
  } else {
    wane_op_range(op, chunk, C, 32, &lo, &hi);
    for (int64_t c = lo; c < hi; c += STRIP) {
      strip_columns(&t, c, least(STRIP, hi - c));
      if (!op->p[WANE_LORA_DW] && !op->p[WANE_LORA_Y]) continue;
      for (int64_t m = 0; m < M; m += ROWS) {
        strip_rows(&t, m, least(ROWS, M - m));
        strip_block(&t);
      }
      if (op->p[WANE_LORA_DW]) strip_store(&t);
    }
  }
  wane_tiles_off();
}

void wane_lora_register_amx(wane_backend *b) {
  vectors_rows = b->ops[WANE_OP_LORA_ROWS];
  vectors_columns = b->ops[WANE_OP_LORA_COLUMNS];
  b->ops[WANE_OP_LORA_ROWS] = rows;
  b->ops[WANE_OP_LORA_COLUMNS] = columns;
}
