/* amx_many.c: many rows of x times a weight of any kind, and the backward, with AMX bf16 tiles (bf16 products, f32 sums).
 *
 * Forward: W is the first operand, so its decoded rows stay row-major; x is the second, packed once as [16 pairs of k][16 tokens][2]; a
 * result tile is [16 of W][16 tokens] and is turned on the way out. Backward: dy is the first operand, W the second, two rows of it
 * interleaved. Tiles work two by two (four loads for four products).
 * The order of k inside a step of 128 is free as long as both sides agree: 4-bit weights use the order in which vpermw delivers them.
 * Their levels times their scale are one 32-entry table of bf16 a step, so a weight is bf16(level * absmax), as bitsandbytes has it.
 * Other kinds are decoded by quant.h to f32 and rounded. WANE_COMPUTE_F32 stays with the f32 kernels.
 * The contraction is cut in runs of RUN tiles (x's share stays in the first-level cache) and, beyond the scratch, in phases, by the
 * shapes alone. */
#include "avx512_linear.h"
#include "../x86/amx.h"
#include "../x86/transpose16.h"

enum { TILE_BYTES = 1024, STEP = 128, RUN = 8, LIMIT = 1088 << 10, BLOCK = 64 };

/* 32 floats as bf16, rounded to nearest even. */
WANE_INLINE __m512i to_bf16(__m512 lo, __m512 hi) {
#ifdef WANE_EMULATE
  float f[32];
  uint16_t h[32];
  _mm512_storeu_ps(f, lo);
  _mm512_storeu_ps(f + 16, hi);
  for (int i = 0; i < 32; i++) h[i] = wane_f32_to_bf16(f[i]);
  return _mm512_loadu_si512(h);
#else
  return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
#endif
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 4-bit rows made of whole blocks of 64 with one scale each have decoders of their own. */
static int is_fast(const wane_qview *w) {
  return (w->dtype == WANE_NF4 || w->dtype == WANE_FP4) && w->cols % BLOCK == 0 && w->cols > 0 && w->block_size % BLOCK == 0;
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

/* Values [k, k + 128) of a row of x (zeros past the end) as bf16; in vpermw's order when `order`. */
static void pack_step(const void *x, int dtype, int64_t at, int64_t left, const __m512i *order, uint16_t *out) {
  float f[STEP];
  __m512i z[4];
  avx2_widen((const char *)x + at * (dtype == WANE_F32 ? 4 : 2), dtype, least(left, STEP), f);
  if (left < STEP) memset(f + left, 0, (size_t)(STEP - left) * 4);
  for (int i = 0; i < 4; i++) z[i] = to_bf16(_mm512_loadu_ps(f + 32 * i), _mm512_loadu_ps(f + 32 * i + 16));
  if (order)
    for (int i = 0; i < 2; i++) {
      __m512i a = _mm512_permutex2var_epi16(z[0], order[i], z[1]), b = _mm512_permutex2var_epi16(z[2], order[i], z[3]);
      _mm512_storeu_si512(out + 64 * i, _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1));
      _mm512_storeu_si512(out + 64 * i + 32, _mm512_inserti64x4(b, _mm512_extracti64x4_epi64(a, 1), 0));
    }
  else for (int i = 0; i < 4; i++) _mm512_storeu_si512(out + 32 * i, z[i]);
}

/* Rows of a [M, width] tensor as tiles [M / 16][width / 32] of 1 KiB, padded with zeros to 32 rows and 128 columns; turned into
 * [16 pairs][16 rows][2] when `turn`. */
static void pack_tiles(const wane_linear_args *a, const wane_op *op, uint32_t chunk, int64_t width, const __m512i *order, int turn) {
  _Alignas(64) uint16_t rows[16][STEP];
  int64_t lo, hi, tiles = round_up(width, STEP) / 32, size = a->dtype == WANE_F32 ? 4 : 2;
  wane_op_range(op, chunk, a->M, 32, &lo, &hi);
  for (int64_t m = lo; m < round_up(hi, 32) && lo < hi; m += 16)
    for (int64_t k = 0; k < width; k += STEP) {
      char *out = (char *)a->work + (m / 16 * tiles + k / 32) * TILE_BYTES;
      for (int i = 0; i < 16; i++) {
        if (m + i < a->M) pack_step((const char *)a->x + (m + i) * width * size, a->dtype, k, width - k, order, rows[i]);
        else memset(rows[i], 0, sizeof rows[i]);
      }
      for (int q = 0; q < 4; q++) {
        if (turn) wane_transpose16(rows[0] + 32 * q, sizeof rows[0], out + q * TILE_BYTES, 64);
        else for (int i = 0; i < 16; i++) memcpy(out + q * TILE_BYTES + 64 * i, rows[i] + 32 * q, 64);
      }
    }
}

static void pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  __m512i order[2];
  if (a.compute == WANE_COMPUTE_F32) { avx512_pack(op, chunk); return; }
  word_order(order);
  pack_tiles(&a, op, chunk, a.K, is_fast(&w) ? order : NULL, 1);
}

static void back_pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  if (a.compute == WANE_COMPUTE_F32) { avx512_back_pack(op, chunk); return; }
  pack_tiles(&a, op, chunk, a.N, NULL, 0);
}

/* ================================================================ products of tiles */

/* c (four tiles: a0 b0, a0 b1, a1 b0, a1 b1) += runs of `tiles` tiles; without b1 when !two. */
static void multiply(const char *a0, const char *a1, const char *b0, const char *b1, int64_t tiles, float *c, int first, int two) {
  if (first) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }
  else { _tile_loadd(0, c, 64); _tile_loadd(1, c + 256, 64); _tile_loadd(2, c + 512, 64); _tile_loadd(3, c + 768, 64); }
  for (int64_t t = 0; t < tiles * TILE_BYTES; t += TILE_BYTES) {
    _tile_loadd(6, b0 + t, 64);
    _tile_loadd(4, a0 + t, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a1 + t, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (two) {
      _tile_loadd(7, b1 + t, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64); _tile_stored(1, c + 256, 64); _tile_stored(2, c + 512, 64); _tile_stored(3, c + 768, 64);
}

/* Stores `count` <= 16 values of a row. */
static void put_row(void *y, int dtype, int64_t at, const float *v, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) avx2_store(y, dtype, at + i, _mm256_loadu_ps(v + i));
  for (; i < count; i++) wane_float_put(y, dtype, at + i, v[i]);
}

/* ================================================================ forward */

/* Row n, values [k, k + width) (width a multiple of 128, zeros past K), as row r of tiles `out`, a KiB apart. */
static void decode_fast(const wane_qview *w, __m512 levels, const float *scale, int64_t n, int64_t k, int64_t width, char *out) {
  const __m512i fifteen = _mm512_set1_epi16(15), upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const uint8_t *q = (const uint8_t *)w->codes + (n * w->cols + k) / 2;
  for (int64_t i = 0; i < width; i += STEP, q += 64, out += 4 * TILE_BYTES) {
    int whole = w->cols - k - i >= STEP;
    __m512i v = whole ? _mm512_loadu_si512(q) : _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_loadu_si256((const __m256i *)(const void *)q), 0);
    float s0 = scale[(k + i) / BLOCK], s1 = whole ? scale[(k + i) / BLOCK + 1] : 0;
    __m512i table = to_bf16(_mm512_mul_ps(levels, _mm512_set1_ps(s0)), _mm512_mul_ps(levels, _mm512_set1_ps(s1)));
    _mm_prefetch((const char *)q + w->cols * 8, _MM_HINT_T1);               /* this place, 16 rows on */
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
      __m512i index = _mm512_or_si512(_mm512_and_si512(t ? _mm512_srli_epi16(v, (unsigned)(4 * t)) : v, fifteen), upper);
      _mm512_storeu_si512(out + t * TILE_BYTES, _mm512_permutexvar_epi16(index, table));
    }
  }
}

static void decode_any(const wane_qview *w, int64_t n, int64_t k, int64_t width, char *out) {
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  float f[STEP];
  for (int64_t i = 0; i < width; i += STEP, out += 4 * TILE_BYTES) {
    int64_t count = least(STEP, w->cols - k - i);
    kit->dequantize(w, n * w->cols + k + i, count, f);
    if (count < STEP) memset(f + count, 0, (size_t)(STEP - count) * 4);
    for (int t = 0; t < 4; t++) _mm512_storeu_si512(out + t * TILE_BYTES, to_bf16(_mm512_loadu_ps(f + 32 * t), _mm512_loadu_ps(f + 32 * t + 16)));
  }
}

/* Rows [n, n + count) of W (zeros up to a multiple of 32), values [k, k + width), as tiles [rows / 16][width / 32]. */
static void decode_rows(const wane_qview *w, int64_t n, int64_t count, int64_t k, int64_t width, char *out, float *scales) {
  __m512 levels = levels_of(w);
  int fast = is_fast(w);
  for (int64_t i = 0; i < round_up(count, 32); i++) {
    char *row = out + i / 16 * (width / 32) * TILE_BYTES + i % 16 * 64;
    if (i >= count) for (int64_t t = 0; t < width / 32; t++) memset(row + t * TILE_BYTES, 0, 64);
    else if (fast) decode_fast(w, levels, avx512_row_scales(w, n + i, 0, scales), n + i, k, width, row);
    else decode_any(w, n + i, k, width, row);
  }
}

/* How W's rows and the contraction are cut: all of it in the scratch if 32 rows fit, else in phases with the results kept between. */
typedef struct cut { int64_t rows, phase; } cut;
static cut forward_cut(const wane_linear_args *a) {
  int64_t width = round_up(a->K, STEP), most = a->M >= 256 && a->N >= 2048 ? 256 : a->N >= 1024 ? 128 : 32;
  cut c = { 32, 16384 };
  if (width <= 16384) {
    c.phase = width;
    c.rows = least(most, LIMIT / (width * 2) / 32 * 32);
  }
  return c;
}

/* Two panels of 16 tokens of rows [n, n + 32) to y. c: four tiles. */
static void put_tiles(const wane_linear_args *a, const float *c, int64_t m, int64_t n) {
  _Alignas(64) float turned[16][16];
  for (int w = 0; w < 2; w++) {
    int64_t at = n + 16 * w, count = least(16, a->N - at);
    float bias[16] = { 0 };
    for (int64_t i = 0; i < count; i++) bias[i] = wane_linear_bias(a, at + i);
    for (int x = 0; x < 2 && count > 0; x++) {
      wane_transpose16(c + (2 * w + x) * 256, 64, turned, 64);
      for (int64_t t = 0; t < 16 && m + 16 * x + t < a->M; t++) {
        _mm512_storeu_ps(turned[t], _mm512_add_ps(_mm512_loadu_ps(turned[t]), _mm512_loadu_ps(bias)));
        put_row(a->y, a->dtype, (m + 16 * x + t) * a->N + at, turned[t], count);
      }
    }
  }
}

/* Rows [n, n + count) of W against all tokens. Scratch: decoded rows, result tiles, scales. */
static void many_block(const wane_linear_args *a, const wane_qview *w, const cut *cut, int64_t n, int64_t count) {
  int64_t tiles = round_up(a->K, STEP) / 32, pairs = round_up(count, 32) / 32, phase = cut->phase / 32, phased = tiles > phase;
  char *rows = wane_scratch();
  float *c = (float *)(void *)(rows + LIMIT);                              // [m / 32 if phased][pairs][4][16][16]
  float *scales = c + 1024 * (phased ? WANE_LINEAR_SLICE / 32 : 256 / 32);
  for (int64_t p = 0; p < tiles; p += phase) {
    int64_t part = least(phase, tiles - p);
    decode_rows(w, n, count, p * 32, part * 32, rows, scales);
    for (int64_t m = 0; m < a->M; m += 32)
      for (int64_t k = 0; k < part; k += RUN) {
        const char *x0 = (const char *)a->work + (m / 16 * tiles + p + k) * TILE_BYTES, *x1 = x0 + tiles * TILE_BYTES;
        for (int64_t i = 0; i < pairs; i++) {
          const char *w0 = rows + (2 * i * part + k) * TILE_BYTES, *w1 = w0 + part * TILE_BYTES;
          float *out = c + ((phased ? m / 32 * pairs : 0) + i) * 1024;
          multiply(w0, w1, x0, x1, least(RUN, part - k), out, p + k == 0, a->M - m > 16);
          if (p + k + RUN >= tiles || (p + part == tiles && k + RUN >= part)) put_tiles(a, out, m, n + 32 * i);
        }
      }
  }
}

static void many(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  if (a.compute == WANE_COMPUTE_F32 || a.K == 0) { avx512_many(op, chunk); return; }
  cut cut = forward_cut(&a);
  wane_op_range(op, chunk, a.N, cut.rows, &lo, &hi);
  if (lo == hi) return;
  wane_tiles_on();
  for (int64_t n = lo; n < hi; n += cut.rows) many_block(&a, &w, &cut, n, least(cut.rows, hi - n));
  wane_tiles_off();
}

/* ================================================================ backward */

/* Rows n and n + 1 (zeros past the end) at columns [k, k + width), width <= 64 of a block: one row of tiles, `stride` bytes apart. */
static void pair_fast(const wane_qview *w, __m512 levels, const __m512i *bytes, int64_t n, int64_t k, char *out, int64_t stride) {
  int16_t shifts[32], tops[32];
  const uint8_t *q = (const uint8_t *)w->codes + (n * w->cols + k) / 2;
  int more = n + 1 < w->rows;
  float s[2], buffer[2];
  for (int i = 0; i < 32; i++) shifts[i] = i / 2 % 2 ? 0 : 4, tops[i] = i % 2 ? 16 : 0;
  for (int i = 0; i < 2; i++) {
    int64_t b = ((n + i) * w->cols + k) / w->block_size;
    buffer[0] = 0;
    if (i == 0 || more) {
      if (w->nested_absmax) wane_dequantize_nested(w, b, 1, buffer); else buffer[0] = ((const float *)w->absmax)[b];
    }
    s[i] = buffer[0];
  }
  __m512i v = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_loadu_si256((const __m256i *)(const void *)q), 0);
  if (more) v = _mm512_inserti64x4(v, _mm256_loadu_si256((const __m256i *)(const void *)(q + w->cols / 2)), 1);
  __m512i table = to_bf16(_mm512_mul_ps(levels, _mm512_set1_ps(s[0])), _mm512_mul_ps(levels, _mm512_set1_ps(s[1])));
  __m512i shift = _mm512_loadu_si512(shifts), top = _mm512_loadu_si512(tops);
  for (int t = 0; t < 4; t++) {
    __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(bytes[t], v), shift);
    index = _mm512_or_si512(_mm512_and_si512(index, _mm512_set1_epi16(15)), top);
    _mm512_storeu_si512(out + t * stride, _mm512_permutexvar_epi16(index, table));
  }
}

/* bytes[t]: where the bytes of values 16t to 16t + 15 of two rows (32 bytes each) go: word 2i the first row's, 2i + 1 the second's. */
static void byte_order(__m512i *bytes) {
  for (int t = 0; t < 4; t++) {
    uint8_t index[64] = { 0 };
    for (int i = 0; i < 16; i++) index[4 * i] = (uint8_t)((16 * t + i) / 2), index[4 * i + 2] = (uint8_t)(32 + (16 * t + i) / 2);
    bytes[t] = _mm512_loadu_si512(index);
  }
}

static void pair_any(const wane_qview *w, int64_t n, int64_t k, char *out, int64_t stride) {
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  float f[2][BLOCK] = { { 0 } };
  uint16_t h[2 * BLOCK];
  int64_t count = least(BLOCK, w->cols - k);
  for (int i = 0; i < 2 && n + i < w->rows; i++) kit->dequantize(w, (n + i) * w->cols + k, count, f[i]);
  for (int i = 0; i < BLOCK; i++) h[2 * i] = wane_f32_to_bf16(f[0][i]), h[2 * i + 1] = wane_f32_to_bf16(f[1][i]);
  for (int t = 0; t < 4; t++) memcpy(out + t * stride, h + 32 * t, 64);
}

/* Columns [k, k + 64) of dx: W as tiles [4 of k][N / 32], two rows a tile row. Scratch: those, then result tiles. */
static void back_block(const wane_linear_args *a, const wane_qview *w, const __m512i *bytes, int64_t k) {
  int64_t tiles = round_up(a->N, STEP) / 32, phase = least(tiles, 7168 / 32), phased = tiles > phase, stride = (phase + 1) * TILE_BYTES;
  int fast = is_fast(w);
  char *b = wane_scratch();
  float *c = (float *)(void *)(b + 4 * (7168 / 32 + 1) * TILE_BYTES);     // [m / 32 if phased][2 pairs of k][4][16][16]
  for (int64_t p = 0; p < tiles; p += phase) {
    int64_t part = least(phase, tiles - p);
    for (int64_t n = p * 32; n < (p + part) * 32; n += 2) {
      char *out = b + (n / 32 - p) * TILE_BYTES + n % 32 / 2 * 64;
      if (n >= a->N) for (int t = 0; t < 4; t++) memset(out + t * stride, 0, 64);
      else if (fast) pair_fast(w, levels_of(w), bytes, n, k, out, stride);
      else pair_any(w, n, k, out, stride);
    }
    for (int64_t m = 0; m < a->M; m += 32)
      for (int64_t j = 0; j < 2; j++) {
        float *out = c + ((phased ? m / 32 * 2 : 0) + j) * 1024;
        const char *d0 = (const char *)a->work + (m / 16 * tiles + p) * TILE_BYTES, *b0 = b + 2 * j * stride;
        multiply(d0, d0 + tiles * TILE_BYTES, b0, b0 + stride, part, out, p == 0, 1);
        if (p + part < tiles) continue;
        for (int64_t t = 0; t < 4; t++)                                     /* tile t: rows 16 (t / 2), columns 16 (t % 2) */
          for (int64_t i = 0; i < 16 && m + t / 2 * 16 + i < a->M; i++) {
            int64_t column = k + 32 * j + t % 2 * 16;
            put_row(a->y, a->dtype, (m + t / 2 * 16 + i) * a->K + column, out + t * 256 + i * 16, least(16, a->K - column));
          }
      }
  }
}

static void back(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  __m512i bytes[4];
  int64_t lo, hi;
  if (a.compute == WANE_COMPUTE_F32 || a.N == 0) { avx512_back(op, chunk); return; }
  wane_op_range(op, chunk, a.K, BLOCK, &lo, &hi);
  if (lo == hi) return;
  byte_order(bytes);
  wane_tiles_on();
  for (int64_t k = lo; k < hi; k += BLOCK) back_block(&a, &w, bytes, k);
  wane_tiles_off();
}

void wane_linear_register_amx(wane_backend *b) {
  for (int group = 0; group < WANE_GROUPS; group++) {
    if (!b->ops[WANE_OP_LINEAR_BACK + group]) continue;                     /* LLM_INT8 has tiles of its own */
    b->ops[WANE_OP_LINEAR_PACK + group] = pack;
    b->ops[WANE_OP_LINEAR_MANY + group] = many;
    b->ops[WANE_OP_LINEAR_BACK_PACK + group] = back_pack;
    b->ops[WANE_OP_LINEAR_BACK + group] = back;
  }
}
