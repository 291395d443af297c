/* tiles_lora.h: the low-rank products (lora.h) of bf16 x and y with bf16 tiles.
 *
 * x and y are bf16 as they are. What is f32, W and u, is split in two (tiles_split.h): u stacked as [hi | lo | hi] against W as [hi | hi | lo] for y;
 * [hi | lo] of W or u against x for u and dW, added up afterwards. Rows of x are read in one piece and once: GRADIENT makes u of a part of the rows
 * and that part's share of dW, SUM adds the shares up.
 * Other dtypes, dropout and large ranks go to the kernels with vectors. */
#ifndef WANE_TILES_LORA_H
#define WANE_TILES_LORA_H
#define WANE_VEC 512
#include "tiles_split.h"
#include "../x86/transpose16.h"
#include "../x86/vec.h"
#include "lora.h"
#include <string.h>

enum {
  RANK = WANE_SPLIT_RANK,
  STRIP = 256,                             /* columns that COLUMNS takes at once */
  ROWS = 128,                              /* rows that it and GRADIENT take at once */
  W_ROOM = 512 << 10,                      /* W's tiles in ROWS */
  NEAR = 12                                /* rows ahead that are fetched */
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
        int64_t at = c + k + 16 * h;
        int left = vec_left(k + 16 * h, n);
        float turned[16] = { 0 };
        if (op->i[WANE_LORA_TURNED]) for (int l = 0; l < left; l++) turned[l] = w[(at + l) * r + j];
        split(op->i[WANE_LORA_TURNED] ? vf_load(turned) : vf_load_n(w + j * C + at, left), parts[0], parts[1]);
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
      for (int64_t k = 0; k < steps; k++)
        _mm512_storeu_si512(spare + (i * steps + k) * 64, m + i < M ? part(x + i * C + 32 * k, n - 32 * k) : _mm512_setzero_si512());
    a = spare;
    row = steps * 64;
  }
  tile_product t = { .a0 = a, .a1 = a + 16 * row, .a_row = row, .a_step = 64, .b0 = w, .b1 = w + TILE_BYTES, .b_step = tiles * TILE_BYTES, .steps = steps,
                     .c = sums, .c_down = 16 * wide, .c_right = 16, .c_row = wide * 4 };
  for (int64_t q = 0; q + 1 < tiles; q += 2, t.b0 += 2 * TILE_BYTES, t.b1 += 2 * TILE_BYTES, t.c += 32) tiles_multiply(t, c > 0, 2, 2, TILES_KEEP);
  if (tiles % 2) tiles_multiply(t, c > 0, 2, 1, TILES_KEEP);
}

/* u = scale x W^T of rows [lo, hi), to `out`. */
static void rows_range(const wane_op *op, int64_t lo, int64_t hi, float *out) {
  int64_t C = op->n[WANE_LORA_C], r = op->n[WANE_LORA_R], tiles = (2 * r + 15) / 16, piece = least(up(C, 32), W_ROOM / TILE_BYTES / tiles * 32);
  char *w = wane_scratch(), *spare = w + W_ROOM;                           /* spare: 32 rows of a piece: as much as W's tiles at most, for each of them 2 */
  float *sums = (float *)(void *)(spare + 2 * W_ROOM);
  if (piece >= C) rows_pack(op, 0, C, tiles, w);
  for (int64_t m = lo; m < hi; m += 32) {
    for (int64_t c = 0; c < C; c += piece) {
      if (piece < C) rows_pack(op, c, least(piece, C - c), tiles, w);
      rows_panel(op, w, tiles, m, c, least(piece, C - c), sums, spare);
    }
    vf scale = vf_set1(op->f[WANE_LORA_SCALE]);
    for (int64_t i = 0; i < least(32, hi - m); i++) {
      const float *s = sums + i * tiles * 16;
      float *u = out + (m + i) * r;
      for (int64_t j = 0; j < r; j += VW) {
        int left = vec_left(j, r);
        vf_store_n(u + j, vf_mul(vf_add(vf_load_n(s + j, left), vf_load_n(s + r + j, left)), scale), left);
      }
    }
  }
}
_Static_assert(3 * W_ROOM + 32 * 2 * RANK * 4 <= WANE_SCRATCH, "W's tiles, a panel of x and its sums fit into the scratch memory");

static void rows(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  if (op->i[WANE_LORA_DTYPE] != WANE_BF16 || op->f[WANE_LORA_THRESHOLD] != 0 || op->n[WANE_LORA_C] == 0 || op->n[WANE_LORA_R] > RANK) {
    vectors_rows(op, chunk);
    return;
  }
  wane_op_range(op, chunk, op->n[WANE_LORA_M], 32, &lo, &hi);
  if (lo == hi) return;
  wane_tiles_on();
  rows_range(op, lo, hi, op->p[WANE_LORA_U]);
  wane_tiles_off();
}

/* ================================================================ blocks of rows of u */

/* Rows [m, m + rows) of u as tiles [ROWS / 16][S], and turned as [Q][ROWS / 32]. */
typedef struct block {
  int64_t r, S, Q, m, rows;
  char *u, *ut;
  __m512i halves[2], eights[4];
} block;
enum { DEEP = (3 * RANK + 31) / 32, HIGH = 2 * RANK / 16 };

/* Takes its part of the scratch memory from `at` on; returns where the rest begins. */
static char *block_open(block *b, const wane_op *op, char *at) {
  int16_t index[4][32];
  b->r = op->n[WANE_LORA_R]; b->S = wane_split_tiles(b->r); b->Q = (2 * b->r + 15) / 16;
  b->u = at; at += ROWS / 16 * b->S * TILE_BYTES;
  b->ut = at; at += b->Q * ROWS / 32 * TILE_BYTES;
  for (int i = 0; i < 32; i++) for (int k = 0; k < 4; k++) index[k][i] = (int16_t)(8 * k + i % 8 + (i / 8 == 1 ? 32 : 0));
  for (int h = 0; h < 2; h++) b->halves[h] = wane_interleave(h, 32);
  for (int k = 0; k < 4; k++) b->eights[k] = _mm512_loadu_si512(index[k]);
  return at;
}

/* Four rows of u of rank 8 at once: each [hi | lo | hi | 0]. */
VEC void four_rows(const block *b, const float *u, char *out) {
  vf x = vf_load(u), y = vf_load(u + 16);
  __m512i hi = to_bf16(x, y);
  vf high_x = vf_bits(vi_sll(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(hi, 0)), 16));
  vf high_y = vf_bits(vi_sll(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(hi, 1)), 16));
  __m512i lo = to_bf16(vf_sub(x, high_x), vf_sub(y, high_y));
  for (int k = 0; k < 4; k++) _mm512_storeu_si512(out + 64 * k, _mm512_maskz_mov_epi64(0x3f, _mm512_permutex2var_epi16(hi, b->eights[k], lo)));
}

static void block_rows(block *b, const float *u, int64_t m, int64_t rows, int turned) {
  int64_t r = b->r, padded = up(rows, 32), i = 0;
  u += m * r;
  b->m = m; b->rows = rows;
  if (r == 8) for (; i + 4 <= rows; i += 4) four_rows(b, u + i * 8, b->u + i / 16 * TILE_BYTES + i % 16 * 64);
  for (; i < padded; i++) wane_split_row(i < rows ? u + i * r : NULL, r, WANE_SPLIT_FIRST, b->u + i / 16 * b->S * TILE_BYTES + i % 16 * 64);
  for (i = 0; turned && i < padded; i += 32)
    for (int64_t q = 0; q < b->Q; q++) {
      char *out = b->ut + (q * ROWS / 32 + i / 32) * TILE_BYTES;
      for (int64_t k = 0; k < 16; k++) {
        const char *pair = b->u + ((i + 2 * k) / 16 * b->S + q / 2) * TILE_BYTES + (i + 2 * k) % 16 * 64;
        _mm512_storeu_si512(out + 64 * k, _mm512_permutex2var_epi16(_mm512_loadu_si512(pair), b->halves[q % 2], _mm512_loadu_si512(pair + 64)));
      }
      wane_transpose16(out, 64, out, 64);
    }
}

/* ================================================================ y += u W */

/* A strip of columns [c, c + width). Tiles: w [S][width / 16], y four; W's values and parts are rows STRIP apart, parts being hi, lo and a row of zeros. */
typedef struct strip {
  const wane_op *op;
  block b;
  int64_t c, width;
  char *w;
  float *y, *values;
  uint16_t *parts;
} strip;
_Static_assert((ROWS / 16 * DEEP + HIGH * ROWS / 32 + DEEP * STRIP / 16 + 4) * TILE_BYTES + RANK * STRIP * 4 + (2 * RANK + 1) * STRIP * 2 <= WANE_SCRATCH,
               "a strip and a block of rows fit into the scratch memory");

/* Columns [c, c + width) of W: [hi | hi | lo] in pairs. */
static void strip_columns(strip *t, int64_t c, int64_t width) {
  const wane_op *op = t->op;
  int64_t C = op->n[WANE_LORA_C], r = t->b.r, turned = op->i[WANE_LORA_TURNED], tiles = up(width, 32) / 16;
  const float *w = op->p[WANE_LORA_W];
  uint16_t *zeros = t->parts + 2 * r * STRIP;
  t->c = c; t->width = width;
  memset(zeros, 0, STRIP * 2);
  for (int64_t j = 0; j < r; j++) {
    float *v = t->values + j * STRIP;
    if (turned) for (int64_t i = 0; i < width; i++) v[i] = w[(c + i) * r + j];
    else memcpy(v, w + j * C + c, (size_t)width * sizeof *v);
    for (int64_t i = width; i < tiles * 16; i++) v[i] = 0.0f;
    for (int64_t i = 0; i < tiles; i++) split(vf_load(v + 16 * i), t->parts + j * STRIP + 16 * i, t->parts + (r + j) * STRIP + 16 * i);
  }
  for (int64_t k = 0; k < t->b.S * 32; k += 2)
    for (int64_t i = 0; i < tiles; i += 2) {
      __m512i v[2];
      for (int64_t l = 0; l < 2; l++) {
        int64_t row = k + l < r ? k + l : k + l < 3 * r ? k + l - r : 2 * r;       /* hi, hi, lo, zeros */
        v[l] = _mm512_loadu_si512(t->parts + row * STRIP + 16 * i);
      }
      for (int h = 0; h < 2; h++) _mm512_storeu_si512(t->w + (k / 32 * tiles + i + h) * TILE_BYTES + k % 32 / 2 * 64, _mm512_permutex2var_epi16(v[0], t->b.halves[h], v[1]));
    }
}

/* Columns [c + i, c + i + 32) of the block's rows. */
static void strip_y(strip *t, int64_t i) {
  int64_t C = t->op->n[WANE_LORA_C], tiles = up(t->width, 32) / 16, left = t->width - i;
  for (int64_t m = 0; m < t->b.rows; m += 32) {
    const char *u = t->b.u + m / 16 * t->b.S * TILE_BYTES, *w = t->w + i / 16 * TILE_BYTES;
    tile_product p = packed(u, u + t->b.S * TILE_BYTES, w, w + TILE_BYTES, tiles * TILE_BYTES, t->b.S, t->y);
    tiles_multiply(p, 0, 2, 2, TILES_KEEP);
    uint16_t *y = (uint16_t *)t->op->p[WANE_LORA_Y] + (t->b.m + m) * C + t->c + i;
    for (int64_t k = 0; k < least(32, t->b.rows - m); k++, y += C) {
      const float *c = t->y + k / 16 * 2 * TILE_FLOATS + k % 16 * 16;
      if (left >= 32) {
        _mm512_storeu_si512(y, to_bf16(vf_add(vf_from_bf16(y), vf_load(c)), vf_add(vf_from_bf16(y + 16), vf_load(c + TILE_FLOATS))));
        continue;
      }
      uint16_t row[32] = { 0 };
      memcpy(row, y, (size_t)left * 2);
      _mm512_storeu_si512(row, to_bf16(vf_add(vf_from_bf16(row), vf_load(c)), vf_add(vf_from_bf16(row + 16), vf_load(c + TILE_FLOATS))));
      memcpy(y, row, (size_t)left * 2);
    }
  }
}

/* COLUMNS of y alone, by rows, which lie in one piece. */
static void columns(const wane_op *op, uint32_t chunk) {
  int64_t C = op->n[WANE_LORA_C], M = op->n[WANE_LORA_M], lo, hi;
  strip t;
  if (op->i[WANE_LORA_DTYPE] != WANE_BF16 || op->f[WANE_LORA_THRESHOLD] != 0 || M == 0 || op->n[WANE_LORA_R] > RANK || op->p[WANE_LORA_DW] || op->p[WANE_LORA_COPY]) {
    vectors_columns(op, chunk);
    return;
  }
  char *at = block_open(&t.b, op, wane_scratch());
  t.op = op;
  t.w = at; at += t.b.S * STRIP / 16 * TILE_BYTES;
  t.y = (float *)(void *)at; at += 4 * TILE_BYTES;
  t.values = (float *)(void *)at; at += t.b.r * STRIP * 4;
  t.parts = (uint16_t *)(void *)at;
  wane_op_range(op, chunk, M, 32, &lo, &hi);
  wane_tiles_on();
  for (int64_t m = lo; m < hi; m += ROWS) {
    block_rows(&t.b, op->p[WANE_LORA_U], m, least(ROWS, hi - m), 0);
    for (int64_t c = 0; c < C; c += STRIP) {
      strip_columns(&t, c, least(STRIP, C - c));
      for (int64_t i = 0; i < t.width; i += 32) strip_y(&t, i);
    }
  }
  wane_tiles_off();
}

/* ================================================================ dW = uᵀ x */

/* The block's rows of x, columns [c, c + 32), in pairs: tiles [ROWS / 32][2]. Interleaving within 128 bits costs half of interleaving in order: tile 0
 * has columns 0 to 3, 8 to 11 …, tile 1 the others. */
static void pair_rows(const wane_op *op, const block *b, int64_t c, char *out) {
  int64_t C = op->n[WANE_LORA_C], left = C - c;
  const uint16_t *x = (const uint16_t *)op->p[WANE_LORA_X] + b->m * C + c;
  for (int64_t k = 0; k < up(b->rows, 32) / 2; k++, x += 2 * C) {
    __m512i v[2];
    for (int l = 0; l < 2; l++) {
      v[l] = 2 * k + l < b->rows ? part(x + l * C, left) : _mm512_setzero_si512();
      __builtin_prefetch(x + (NEAR + l) * C);                              /* rows lie apart: no stream of reads foresees them */
    }
    _mm512_storeu_si512(out + k / 16 * 2 * TILE_BYTES + k % 16 * 64, _mm512_unpacklo_epi16(v[0], v[1]));
    _mm512_storeu_si512(out + (k / 16 * 2 + 1) * TILE_BYTES + k % 16 * 64, _mm512_unpackhi_epi16(v[0], v[1]));
  }
}

/* Floats of a part's share of dW: tiles [C / 32][Q][2]. */
static int64_t share_floats(const wane_op *op) { return up(op->n[WANE_LORA_C], 32) / 32 * ((2 * op->n[WANE_LORA_R] + 15) / 16) * 2 * TILE_FLOATS; }

/* A part of the rows: u where it is wanted, then its share of dW. */
static void gradient(const wane_op *op, uint32_t part) {
  int64_t C = op->n[WANE_LORA_C], M = op->n[WANE_LORA_M], rows = op->n[WANE_LORA_PART], lo = part * rows, hi = least(M, lo + rows);
  float *share = op->p[WANE_LORA_COPY];
  block b;
  wane_tiles_on();
  if (op->p[WANE_LORA_Y] && lo < hi) rows_range(op, lo, hi, op->p[WANE_LORA_Y]);
  if (share) {
    char *x = block_open(&b, op, wane_scratch());
    share += part * share_floats(op);
    for (int64_t m = lo; m < hi; m += ROWS) {
      block_rows(&b, op->p[WANE_LORA_U], m, least(ROWS, hi - m), 1);
      int64_t steps = up(b.rows, 32) / 32, row = ROWS / 32 * TILE_BYTES;
      for (int64_t c = 0; c < C; c += 32) {
        float *dw = share + c / 32 * b.Q * 2 * TILE_FLOATS;
        pair_rows(op, &b, c, x);
        for (int64_t q = 0; q < b.Q; q += 2) {
          const char *a = b.ut + q * row;
          tile_product t = packed(a, a + row, x, x + TILE_BYTES, 2 * TILE_BYTES, steps, dw + q * 2 * TILE_FLOATS);
          if (q + 1 < b.Q) tiles_multiply(t, m > lo, 2, 2, TILES_KEEP);
          else tiles_multiply(t, m > lo, 1, 2, TILES_KEEP);
        }
      }
    }
  }
  wane_tiles_off();
}
_Static_assert((ROWS / 16 * DEEP + HIGH * ROWS / 32 + ROWS / 32 * 2) * TILE_BYTES <= WANE_SCRATCH, "a block of rows and its columns fit into the scratch memory");

/* A row of a share's 32 columns, in their order; row: of the stack of hi and lo. */
static void add_row(const float *share, int64_t row, float out[32]) {
  const float *s = share + row / 16 * 2 * TILE_FLOATS + row % 16 * 16;
  for (int g = 0; g < 8; g++) for (int l = 0; l < 4; l++) out[4 * g + l] += s[g % 2 * TILE_FLOATS + g / 2 * 4 + l];
}

/* dW of some columns: sums over the parts, in their order, and over hi and lo. */
static void sum(const wane_op *op, uint32_t chunk) {
  int64_t C = op->n[WANE_LORA_C], r = op->n[WANE_LORA_R], turned = op->i[WANE_LORA_TURNED], parts = (op->n[WANE_LORA_M] + op->n[WANE_LORA_PART] - 1) / op->n[WANE_LORA_PART];
  int64_t floats = share_floats(op), Q = (2 * r + 15) / 16, lo, hi;
  float *dw = op->p[WANE_LORA_DW];
  wane_op_range(op, chunk, up(C, 32) / 32, 1, &lo, &hi);
  for (int64_t i = lo; i < hi; i++)
    for (int64_t j = 0; j < r; j++) {
      _Alignas(64) float v[32] = { 0 };
      const float *share = (const float *)op->p[WANE_LORA_COPY] + i * Q * 2 * TILE_FLOATS;
      for (int64_t p = 0; p < parts; p++, share += floats) {
        add_row(share, j, v);
        add_row(share, j + r, v);
      }
      for (int64_t l = 0; l < least(32, C - 32 * i); l++) dw[turned ? (32 * i + l) * r + j : j * C + 32 * i + l] = v[l];
    }
}

static void tiles_register(wane_backend *b) {
  vectors_rows = b->ops[WANE_OP_LORA_ROWS];
  vectors_columns = b->ops[WANE_OP_LORA_COLUMNS];
  b->ops[WANE_OP_LORA_ROWS] = rows;
  b->ops[WANE_OP_LORA_COLUMNS] = columns;
  b->ops[WANE_OP_LORA_GRADIENT] = gradient;
  b->ops[WANE_OP_LORA_SUM] = sum;
}
#endif
