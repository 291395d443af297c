/* avx2_4bit.c: few rows of x times NF4 or FP4 weights, from bitsandbytes' bytes, with AVX2.
 *
 * A row of W is read in chunks of 64 weights = 32 bytes. There are three ways (mode_of chooses):
 *   INT16   not WANE_COMPUTE_F32. x becomes int16 with one scale per 64 values (its largest magnitude becomes 8191), the levels are
 *           int16 too (1.0 becomes 16383); sixteen-bit dot products are exact in int32, a chunk's sum is scaled and added in f32.
 *           Relative error about 3e-4 of the result's typical size: bf16 x bf16 has 6e-3.
 *   EXACT   WANE_COMPUTE_F32. Levels as f32, byte plane by byte plane (twice as fast as permuting f32 where vpermps is slow);
 *           products and sums in f32, scaled once a chunk.
 *   DECODED rows that are no whole number of chunks, or blocks that a chunk may straddle: decoded to f32, then a plain dot product.
 * In the first two x is stored in the order in which a chunk's nibbles fall out of the registers, so that W needs no shuffling.
 * Scales: f32, or double-quantized u8 looked up on the fly in the 1 KiB map, which stays in L1: no second copy of them in memory. */
#include "avx2_linear.h"
#include <math.h>

enum { CHUNK = 64 };
enum { INT16, EXACT, DECODED };
enum { X_MAX = 8191, LEVEL_MAX = 16383 };   /* a lane sums 8 products a chunk: 2^13 * 2^14 * 8 fits int32 */
enum { AHEAD = 2048 };                      /* bytes of prefetch: a decoding loop hides no page boundary of the hardware's prefetcher */

/* ================================================================ layouts */

/* A chunk has one scale, or one for each half (block size 32). */
static int mode_of(const wane_linear_args *a, const wane_qview *w) {
  if (w->cols % CHUNK || w->cols == 0 || (w->block_size % CHUNK && w->block_size != CHUNK / 2)) return DECODED;
  return a->compute == WANE_COMPUTE_F32 ? EXACT : INT16;
}

/* Bytes of a prepared row: INT16 has int16 [K] then f32 [K / 64], EXACT f32 [K]. */
static int64_t row_bytes(int mode, int64_t K) {
  return mode == INT16 ? (K * 2 + K / CHUNK * 4 + 63) / 64 * 64 : (K * 4 + 63) / 64 * 64;
}

/* Where value k of a chunk goes in EXACT: eight vectors of eight, four from each half, high nibbles (even k) first. */
static int place_exact(int k) {
  int byte = k / 2, half = byte / 16, in = byte % 16;
  return ((k & 1) * 4 + in / 4) * 8 + half * 4 + in % 4;
}

/* Dwords k to k + 15 (two vectors) -> the even ones, the odd ones, in order. */
WANE_INLINE void split(const __m256i *d, __m256i *even, __m256i *odd) {
  __m256 a = _mm256_castsi256_ps(d[0]), b = _mm256_castsi256_ps(d[1]);
  *even = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8);
  *odd = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8);
}

/* x [64] -> int16 in INT16's order: four vectors of sixteen, even k first (high nibbles), eight from each half. Returns the factor that
 * turns the products of whole numbers back into x times level. */
WANE_INLINE float quantize_chunk(const void *x, int dtype, int64_t at, int16_t *out) {
  __m256i d[8], even[2], odd[2];
  float factor = avx2_quantize64(x, dtype, at, X_MAX, d);
  for (int g = 0; g < 2; g++) {
    split(d + 2 * g, &even[0], &odd[0]);
    split(d + 4 + 2 * g, &even[1], &odd[1]);
    __m256i *w = (__m256i *)(void *)out;
    w[g] = _mm256_permute4x64_epi64(_mm256_packs_epi32(even[0], even[1]), 0xd8);
    w[2 + g] = _mm256_permute4x64_epi64(_mm256_packs_epi32(odd[0], odd[1]), 0xd8);
  }
  return factor / LEVEL_MAX;
}

static void prepare(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int mode = mode_of(&a, &w);
  int64_t lo, hi, stride = row_bytes(mode, a.K), size = a.dtype == WANE_F32 ? 4 : 2;
  float x[CHUNK];
  if (mode == DECODED) { avx2_decoded_prepare(op, chunk); return; }
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  for (int64_t m = lo; m < hi; m++) {
    const char *row = (const char *)a.x + m * a.K * size;
    char *out = (char *)a.work + m * stride;
    for (int64_t k = 0; k < a.K; k += CHUNK) {
      if (mode == INT16) {
        ((float *)(void *)(out + a.K * 2))[k / CHUNK] = quantize_chunk(row, a.dtype, k, (int16_t *)(void *)out + k);
        continue;
      }
      avx2_widen(row + k * size, a.dtype, CHUNK, x);
      for (int i = 0; i < CHUNK; i++) ((float *)(void *)out)[k + place_exact(i)] = x[i];
    }
  }
}

/* ================================================================ scales */

/* How a chunk finds its scale. */
enum { PLAIN, NESTED, CONSTANT, HALVES, NESTED_HALVES };

/* A weight's scales, in registers rather than behind pointers that a store might change. */
typedef struct scales {
  const float *absmax;         /* PLAIN */
  const uint8_t *codes;        /* NESTED: code[codes[b]] * outer[b / 256] + offset */
  const float *outer, *code;
  float offset;
  int kind;
  int64_t per;                 /* chunks a block */
} scales;

static scales scales_of(const wane_qview *w) {
  int64_t per = w->block_size / CHUNK;
  int nested = w->nested_absmax != NULL;
  scales s = { w->absmax, w->absmax, w->nested_absmax, w->nested_code, nested ? *w->offset : 0, nested ? NESTED : PLAIN, per };
  if (per == 0) s.kind = nested ? NESTED_HALVES : HALVES;
  if (per > 1) s.kind = CONSTANT;
  return s;
}

/* Scale b of the tensor. */
static inline float scale_at(const scales *s, int64_t b) {
  return s->outer ? s->code[s->codes[b]] * s->outer[b / WANE_NESTED_BLOCK] + s->offset : s->absmax[b];
}

/* Chunks from flat chunk c on, at most `most`, whose scales (or whose nested absmax) share what `shared` is set to. */
WANE_INLINE int64_t scale_run(const scales *s, int64_t c, int64_t most, const int kind, __m256 *shared) {
  int64_t run = most;
  if (kind == NESTED) {
    *shared = _mm256_broadcast_ss(s->outer + c / WANE_NESTED_BLOCK);
    run = WANE_NESTED_BLOCK - c % WANE_NESTED_BLOCK;
  } else if (kind == NESTED_HALVES) {
    *shared = _mm256_broadcast_ss(s->outer + 2 * c / WANE_NESTED_BLOCK);
    run = WANE_NESTED_BLOCK / 2 - c % (WANE_NESTED_BLOCK / 2);
  } else if (kind == CONSTANT) {
    *shared = _mm256_set1_ps(scale_at(s, c / s->per));
    run = s->per - c % s->per;
  }
  return run < most ? run : most;
}

/* The scale vector of flat chunk c. */
WANE_INLINE __m256 chunk_scale(const scales *s, int64_t c, const int kind, __m256 shared, __m256 offset) {
  if (kind == PLAIN) return _mm256_broadcast_ss(s->absmax + c);
  if (kind == NESTED) return _mm256_fmadd_ps(_mm256_broadcast_ss(s->code + s->codes[c]), shared, offset);
  if (kind == HALVES) return _mm256_blend_ps(_mm256_broadcast_ss(s->absmax + 2 * c), _mm256_broadcast_ss(s->absmax + 2 * c + 1), 0xf0);
  if (kind == NESTED_HALVES) {
    __m256 level = _mm256_blend_ps(_mm256_broadcast_ss(s->code + s->codes[2 * c]), _mm256_broadcast_ss(s->code + s->codes[2 * c + 1]), 0xf0);
    return _mm256_fmadd_ps(level, shared, offset);
  }
  return shared;
}

/* ================================================================ products */

/* Byte planes of the sixteen levels, in both halves of a register: int16 (2) and f32 (4). */
typedef struct tables { __m256i int16[2], f32[4]; } tables;

static tables tables_of(int dtype) {
  const float *levels = dtype == WANE_NF4 ? wane_nf4_levels : wane_fp4_levels;
  uint8_t plane[2][16], fplane[4][16];
  tables t;
  for (int i = 0; i < 16; i++) {
    uint32_t v = (uint32_t)lrintf(levels[i] * LEVEL_MAX), f = wane_float_bits(levels[i]);
    for (int b = 0; b < 2; b++) plane[b][i] = (uint8_t)(v >> 8 * b);
    for (int b = 0; b < 4; b++) fplane[b][i] = (uint8_t)(f >> 8 * b);
  }
  for (int b = 0; b < 2; b++) t.int16[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)plane[b]));
  for (int b = 0; b < 4; b++) t.f32[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)fplane[b]));
  return t;
}

/* The 64 levels of a chunk as int16, in quantize_chunk's order. */
WANE_INLINE void decode_int16(const uint8_t *q, const tables *t, __m256i *w) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)q);
  __m256i hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask), lo = _mm256_and_si256(v, mask);
  __m256i a = _mm256_shuffle_epi8(t->int16[0], hi), b = _mm256_shuffle_epi8(t->int16[1], hi);
  __m256i c = _mm256_shuffle_epi8(t->int16[0], lo), d = _mm256_shuffle_epi8(t->int16[1], lo);
  w[0] = _mm256_unpacklo_epi8(a, b), w[1] = _mm256_unpackhi_epi8(a, b), w[2] = _mm256_unpacklo_epi8(c, d), w[3] = _mm256_unpackhi_epi8(c, d);
}

/* Thirty-two levels as f32, in place_exact's order. */
WANE_INLINE void decode_exact(__m256i index, const tables *t, __m256 *w) {
  __m256i a = _mm256_shuffle_epi8(t->f32[0], index), b = _mm256_shuffle_epi8(t->f32[1], index);
  __m256i c = _mm256_shuffle_epi8(t->f32[2], index), d = _mm256_shuffle_epi8(t->f32[3], index);
  __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d), AB = _mm256_unpackhi_epi8(a, b), CD = _mm256_unpackhi_epi8(c, d);
  w[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(ab, cd));
  w[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(ab, cd));
  w[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(AB, CD));
  w[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(AB, CD));
}

/* A decoded chunk times R prepared rows of x: whole numbers, eight lanes each. */
WANE_INLINE void multiply_int16(const __m256i *w, const char *x, int64_t stride, const int R, __m256i *sum) {
  for (int m = 0; m < R; m++) {
    const __m256i *xm = (const __m256i *)(const void *)(x + m * stride);
    __m256i even = _mm256_add_epi32(_mm256_madd_epi16(w[0], xm[0]), _mm256_madd_epi16(w[1], xm[1]));
    sum[m] = _mm256_add_epi32(even, _mm256_add_epi32(_mm256_madd_epi16(w[2], xm[2]), _mm256_madd_epi16(w[3], xm[3])));
  }
}

/* One row of W, which begins at flat chunk `first`, against R prepared rows of x. With one row of x a chunk is decoded while the one
 * before it is multiplied (the scheduler of a core cannot look far enough ahead to do so itself); more rows fill the time anyway. */
WANE_INLINE void row_int16(const uint8_t *q, const scales *s, int64_t first, int64_t chunks, const char *x, int64_t stride, const tables *t,
                           const int kind, const int R, float *out) {
  const __m256 offset = _mm256_set1_ps(s->offset);
  const char *xs = x + chunks * CHUNK * 2;
  __m256 sum[4], shared = offset;
  __m256i w[4], whole[4];
  for (int m = 0; m < R; m++) sum[m] = _mm256_setzero_ps();
  if (R == 1) decode_int16(q, t, w);
  for (int64_t j = 0; j < chunks;) {
    int64_t end = j + scale_run(s, first + j, chunks - j, kind, &shared);
    for (; j < end; j++) {
      __m256 scale = chunk_scale(s, first + j, kind, shared, offset);
      _mm_prefetch((const char *)q + AHEAD, _MM_HINT_T0);
      if (R > 1) decode_int16(q, t, w);
      multiply_int16(w, x + 2 * CHUNK * j, stride, R, whole);
      q += CHUNK / 2;
      if (R == 1) decode_int16(j + 1 < chunks ? q : q - CHUNK / 2, t, w);
      for (int m = 0; m < R; m++) {
        __m256 both = _mm256_mul_ps(scale, _mm256_broadcast_ss((const float *)(const void *)(xs + m * stride + 4 * j)));
        sum[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[m]), both, sum[m]);
      }
    }
  }
  for (int m = 0; m < R; m++) out[m] = avx2_sum(sum[m]);
}

/* The same with f32 products. */
WANE_INLINE void row_exact(const uint8_t *q, const scales *s, int64_t first, int64_t chunks, const char *x, int64_t stride, const tables *t,
                           const int kind, const int R, float *out) {
  const __m256 offset = _mm256_set1_ps(s->offset);
  const __m256i mask = _mm256_set1_epi8(15);
  __m256 sum[4], part[4], shared = offset, w[4];
  for (int m = 0; m < R; m++) sum[m] = _mm256_setzero_ps();
  for (int64_t j = 0; j < chunks;) {
    int64_t end = j + scale_run(s, first + j, chunks - j, kind, &shared);
    for (; j < end; j++, q += CHUNK / 2) {
      __m256 scale = chunk_scale(s, first + j, kind, shared, offset);
      __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)q);
      _mm_prefetch((const char *)q + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int low = 0; low < 2; low++) {
        decode_exact(_mm256_and_si256(low ? v : _mm256_srli_epi16(v, 4), mask), t, w);
        for (int m = 0; m < R; m++) {
          const float *xm = (const float *)(const void *)(x + m * stride + 4 * CHUNK * j) + 32 * low;
          part[m] = low ? _mm256_fmadd_ps(w[0], _mm256_load_ps(xm), part[m]) : _mm256_mul_ps(w[0], _mm256_load_ps(xm));
          for (int i = 1; i < 4; i++) part[m] = _mm256_fmadd_ps(w[i], _mm256_load_ps(xm + 8 * i), part[m]);
        }
      }
      for (int m = 0; m < R; m++) sum[m] = _mm256_fmadd_ps(part[m], scale, sum[m]);
    }
  }
  for (int m = 0; m < R; m++) out[m] = avx2_sum(sum[m]);
}

/* ================================================================ the op */

/* Rows [lo, hi) of W against R rows of x from m on. All arguments but the sizes are constants: one loop a combination. */
WANE_INLINE void block(const wane_linear_args *a, const wane_qview *w, const tables *t, int64_t lo, int64_t hi, int64_t m, const int mode,
                       const int kind, const int R) {
  scales s = scales_of(w);
  int64_t chunks = a->K / CHUNK, stride = row_bytes(mode, a->K);
  const char *x = (const char *)a->work + m * stride;
  const uint8_t *q = w->codes;
  float out[4];
  for (int64_t n = lo; n < hi; n++) {
    if (mode == INT16) row_int16(q + n * (a->K / 2), &s, n * chunks, chunks, x, stride, t, kind, R, out);
    else row_exact(q + n * (a->K / 2), &s, n * chunks, chunks, x, stride, t, kind, R, out);
    for (int i = 0; i < R; i++) wane_float_put(a->y, a->dtype, (m + i) * a->N + n, out[i] + wane_linear_bias(a, n));
  }
}

/* All rows of x, four at a time, against a block of W's rows that stays in the cache meanwhile. */
WANE_INLINE void blocks(const wane_linear_args *a, const wane_qview *w, int64_t lo, int64_t hi, const int mode, const int kind) {
  enum { CACHED = 24 << 10 };
  tables t = tables_of(w->dtype);
  int64_t step = a->M <= 4 ? hi - lo : CACHED / (a->K / 2) + 1;
  for (int64_t n = lo; n < hi; n += step) {
    int64_t end = hi - n < step ? hi : n + step, m = 0;
    for (; m + 4 <= a->M; m += 4) block(a, w, &t, n, end, m, mode, kind, 4);
    switch (a->M - m) {
      case 3: block(a, w, &t, n, end, m, mode, kind, 3); break;
      case 2: block(a, w, &t, n, end, m, mode, kind, 2); break;
      case 1: block(a, w, &t, n, end, m, mode, kind, 1); break;
      default: break;
    }
  }
}

static void rows(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  int mode = mode_of(&a, &w);
  if (mode == DECODED) { avx2_decoded_rows(op, chunk); return; }
  wane_op_range(op, chunk, a.N, 1, &lo, &hi);
#define CASE(kind) case kind: if (mode == INT16) blocks(&a, &w, lo, hi, INT16, kind); else blocks(&a, &w, lo, hi, EXACT, kind); break
  switch (scales_of(&w).kind) {
    CASE(PLAIN); CASE(NESTED); CASE(CONSTANT); CASE(HALVES); CASE(NESTED_HALVES);
  }
#undef CASE
}

void avx2_register_4bit(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_4BIT] = prepare;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_4BIT] = rows;
  b->ops[WANE_OP_LINEAR_PACK + WANE_GROUP_4BIT] = avx2_pack_4bit;
  b->ops[WANE_OP_LINEAR_MANY + WANE_GROUP_4BIT] = avx2_many_4bit;
}
