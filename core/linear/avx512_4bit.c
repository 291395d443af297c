/* avx512_4bit.c: few rows of x times NF4 or FP4 weights with AVX-512 VNNI. The plan is avx2_4bit.c's; the registers are kinder:
 *
 *   INT16   vpermw looks 32 levels up at once and heeds only five bits of each index, so a chunk of 128 weights (64 bytes) is a load, three
 *           shifts and four lookups without a mask; vpdpwssd multiplies. x as int16 with a scale per 64 values: error about 3e-4.
 *   EXACT   vpermps looks f32 levels up, likewise; products and sums in f32.
 * Word i of a chunk holds elements 4i to 4i + 3 and nibble q of it is element 4i + (1, 0, 3, 2)[q]: x is stored in that order.
 * A row's scales are used as they lie, or expanded once a row when they are double-quantized or shared by several chunks. */
#include "avx512_linear.h"
#include "../x86/simd.h"
#include <math.h>

enum { CHUNK = 128, BLOCK = 64 };
enum { INT16, EXACT, DECODED };
enum { X_MAX = 8191, LEVEL_MAX = 16383 };  /* a lane sums 8 products a chunk */
enum { AHEAD = 4096, ROWS_AHEAD = 8 };     /* prefetch: bytes of codes, rows of scales; a decoding loop outruns no hardware prefetcher's page */

static int mode_of(const wane_linear_args *a, const wane_qview *w) {
  if (w->cols % BLOCK || w->cols == 0 || w->cols > WANE_SCRATCH || (w->block_size % BLOCK && w->block_size != BLOCK / 2)) return DECODED;
  return a->compute == WANE_COMPUTE_F32 ? EXACT : INT16;
}

static int64_t chunks_of(int64_t K) { return (K + CHUNK - 1) / CHUNK; }

/* Bytes of a prepared row. INT16: int16 [chunks][128], then f32 [chunks][16], the scale of each lane. EXACT: f32 [chunks][128]. */
static int64_t row_bytes(int mode, int64_t K) { return chunks_of(K) * (mode == INT16 ? CHUNK * 2 + 64 : CHUNK * 4); }

/* 64 values of x (at < K) into one half of a chunk, as whole numbers. Returns the factor that makes products of whole numbers x times level. */
static float quantize_half(const void *x, int dtype, int64_t at, int half, int16_t *out) {
#define EVERY4(q) q, q + 4, q + 8, q + 12, q + 16, q + 20, q + 24, q + 28, q + 32, q + 36, q + 40, q + 44, q + 48, q + 52, q + 56, q + 60
  static const _Alignas(64) int16_t index[64] = { EVERY4(1), EVERY4(0), EVERY4(3), EVERY4(2) };
#undef EVERY4
  __m256i d[8], w[4];
  float factor = avx2_quantize64(x, dtype, at, X_MAX, d);
  for (int i = 0; i < 4; i++) w[i] = _mm512_cvtepi32_epi16(_mm512_inserti64x4(_mm512_castsi256_si512(d[2 * i]), d[2 * i + 1], 1));
  __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(w[0]), w[1], 1), high = _mm512_inserti64x4(_mm512_castsi256_si512(w[2]), w[3], 1);
  for (int q = 0; q < 4; q += 2) {
    __m512i v = _mm512_permutex2var_epi16(low, _mm512_load_si512(index + 16 * q), high);
    _mm256_storeu_si256((__m256i *)(void *)(out + 32 * q + 16 * half), _mm512_castsi512_si256(v));
    _mm256_storeu_si256((__m256i *)(void *)(out + 32 * q + 32 + 16 * half), _mm512_extracti64x4_epi64(v, 1));
  }
  return factor / LEVEL_MAX;
}

static void prepare_row(const void *x, int dtype, int64_t K, int mode, char *out) {
  float *scale = (float *)(void *)(out + chunks_of(K) * CHUNK * 2);
  memset(out, 0, (size_t)row_bytes(mode, K));              /* the half chunk that K may lack */
  for (int64_t k = 0; k < K; k += BLOCK) {
    int64_t c = k / CHUNK;
    int half = (int)(k / BLOCK % 2);
    if (mode == INT16) {
      float factor = quantize_half(x, dtype, k, half, (int16_t *)(void *)out + c * CHUNK);
      _mm256_storeu_ps(scale + c * 16 + half * 8, _mm256_set1_ps(factor));
    } else
      for (int i = 0; i < BLOCK; i++) ((float *)(void *)out)[c * CHUNK + (i % 8 ^ 1) * 16 + half * 8 + i / 8] = wane_float_at(x, dtype, k + i);
  }
}

static void prepare(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int mode = mode_of(&a, &w);
  int64_t lo, hi, size = a.dtype == WANE_F32 ? 4 : 2;
  if (mode == DECODED) { avx2_decoded_prepare(op, chunk); return; }
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  for (int64_t m = lo; m < hi; m++) prepare_row((const char *)a.x + m * a.K * size, a.dtype, a.K, mode, (char *)a.work + m * row_bytes(mode, a.K));
}

/* ================================================================ scales */

const float *avx512_row_scales(const wane_qview *w, int64_t n, int halves, float *buffer) {
  int64_t count = w->cols / BLOCK << halves, first = n * count, per = halves ? 1 : w->block_size / BLOCK, i = 0;
  if (!w->nested_absmax && per == 1) return (const float *)w->absmax + first;
  if (!w->nested_absmax) {
    for (; i < count; i++) buffer[i] = ((const float *)w->absmax)[(first + i) / per];
    return buffer;
  }
  const uint8_t *codes = w->absmax;
  const float offset = *w->offset;
  for (; per == 1 && i + 16 <= count; i += 16) {
    int64_t b = first + i, c = b / WANE_NESTED_BLOCK, left = (c + 1) * WANE_NESTED_BLOCK - b;
    __m512 outer = _mm512_set1_ps(w->nested_absmax[c]);
    if (left < 16) outer = _mm512_mask_blend_ps((__mmask16)(0xffff << left), outer, _mm512_set1_ps(w->nested_absmax[c + 1]));
    __m512 level = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(codes + b))), w->nested_code, 4);
    _mm512_storeu_ps(buffer + i, _mm512_add_ps(_mm512_mul_ps(level, outer), _mm512_set1_ps(offset)));
  }
  for (; i < count; i++) {
    int64_t b = (first + i) / per;
    buffer[i] = w->nested_code[codes[b]] * w->nested_absmax[b / WANE_NESTED_BLOCK] + offset;
  }
  return buffer;
}

/* The scale of each lane of chunk j; of the first half alone where the second is not there. */
WANE_INLINE __m512 chunk_scale(const float *s, int64_t j, const int halves, int whole) {
  if (!halves) {
    __m512 v = _mm512_set1_ps(s[2 * j]);
    return _mm512_mask_mov_ps(v, 0xff00, _mm512_set1_ps(s[2 * j + whole]));
  }
  __m512 v = _mm512_mask_mov_ps(_mm512_set1_ps(s[4 * j]), 0x00f0, _mm512_set1_ps(s[4 * j + 1]));
  v = _mm512_mask_mov_ps(v, 0x0f00, _mm512_set1_ps(s[4 * j + 2 * whole]));
  return _mm512_mask_mov_ps(v, 0xf000, _mm512_set1_ps(s[4 * j + 3 * whole]));
}

/* ================================================================ products */

/* acc + products of pairs of words. gcc 12 keeps none of many accumulators in registers through the intrinsic. */
WANE_INLINE __m512i dot2(__m512i acc, __m512i a, __m512i b) {
#ifdef WANE_EMULATE
  return _mm512_dpwssd_epi32(acc, a, b);
#else
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
#endif
}

WANE_INLINE __m512i load_chunk(const uint8_t *q, int whole) {
  _mm_prefetch((const char *)q + AHEAD, _MM_HINT_T0);
  return whole ? _mm512_loadu_si512(q) : _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_loadu_si256((const __m256i *)(const void *)q), 0);
}

WANE_INLINE void chunk_int16(const uint8_t *q, const char *x, const char *xs,
                             int64_t stride, __m512 scale, int whole, __m512i levels, const int R, __m512 *sum) {
  __m512i v = load_chunk(q, whole), acc[4];
  for (int m = 0; m < R; m++) acc[m] = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int n = 0; n < 4; n++) {
    __m512i w = _mm512_permutexvar_epi16(n ? _mm512_srli_epi16(v, (unsigned)(4 * n)) : v, levels);
    for (int m = 0; m < R; m++) acc[m] = dot2(acc[m], w, _mm512_loadu_si512(x + m * stride + 64 * n));
  }
  for (int m = 0; m < R; m++)
    sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m]), _mm512_mul_ps(scale, _mm512_loadu_ps(xs + m * stride)), sum[m]);
}

WANE_INLINE void chunk_exact(const uint8_t *q, const char *x, int64_t stride, __m512 scale, int whole, __m512 levels, const int R, __m512 *sum) {
  __m512i v = load_chunk(q, whole);
  __m512 part[4];
  for (int m = 0; m < R; m++) part[m] = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int n = 0; n < 8; n++) {
    __m512 w = _mm512_permutexvar_ps(n ? _mm512_srli_epi32(v, (unsigned)(4 * n)) : v, levels);
    for (int m = 0; m < R; m++) part[m] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + m * stride + 64 * n), part[m]);
  }
  for (int m = 0; m < R; m++) sum[m] = _mm512_fmadd_ps(part[m], scale, sum[m]);
}

/* The levels as vpermw's and vpermps's tables. */
typedef struct tables { __m512i words; __m512 floats; } tables;

static tables tables_of(int dtype) {
  const float *levels = dtype == WANE_NF4 ? wane_nf4_levels : wane_fp4_levels;
  int16_t words[32];
  for (int i = 0; i < 32; i++) words[i] = (int16_t)lrintf(levels[i % 16] * LEVEL_MAX);
  tables t = { _mm512_loadu_si512(words), _mm512_loadu_ps(levels) };
  return t;
}

/* Rows [lo, hi) of W against R rows of x from m on. mode, halves and R are constants: one loop a combination. */
WANE_INLINE void block(const wane_linear_args *a, const wane_qview *w, const tables *t, int64_t lo, int64_t hi, int64_t m,
                       const int mode, const int halves, const int R) {
  int64_t chunks = a->K / CHUNK, stride = row_bytes(mode, a->K), part = a->K % CHUNK != 0, per_row = a->K / BLOCK << halves;
  const char *x = (const char *)a->work + m * stride, *xs = x + chunks_of(a->K) * CHUNK * 2;
  float *buffer = wane_scratch();
  __m512i words = t->words;
  __m512 floats = t->floats;
  for (int64_t n = lo; n < hi; n++) {
    const uint8_t *q = (const uint8_t *)w->codes + n * (a->K / 2);
    const float *s = avx512_row_scales(w, n, halves, buffer);
    __m512 sum[4];
    for (int i = 0; i < R; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t j = 0; j < chunks + part; j++) {
      int whole = j < chunks;
      __m512 scale = chunk_scale(s, j, halves, whole);
      if (mode == INT16) chunk_int16(q + 64 * j, x + 2 * CHUNK * j, xs + 64 * j, stride, scale, whole, words, R, sum);
      else chunk_exact(q + 64 * j, x + 4 * CHUNK * j, stride, scale, whole, floats, R, sum);
    }
    if (s != buffer) for (int64_t i = 0; i < per_row; i += 16) _mm_prefetch((const char *)(s + ROWS_AHEAD * per_row + i), _MM_HINT_T0);
    for (int i = 0; i < R; i++) wane_float_put(a->y, a->dtype, (m + i) * a->N + n, avx512_sum(sum[i]) + wane_linear_bias(a, n));
  }
}

/* All rows of x, four at a time, against a block of W's rows that stays in the cache meanwhile. */
WANE_INLINE void blocks(const wane_linear_args *a, const wane_qview *w, int64_t lo, int64_t hi, const int mode, const int halves) {
  enum { CACHED = 32 << 10 };
  tables t = tables_of(w->dtype);
  int64_t step = a->M <= 4 ? hi - lo : CACHED / (a->K / 2) + 1;
  for (int64_t n = lo; n < hi; n += step) {
    int64_t end = hi - n < step ? hi : n + step, m = 0;
    for (; m + 4 <= a->M; m += 4) block(a, w, &t, n, end, m, mode, halves, 4);
    switch (a->M - m) {
      case 3: block(a, w, &t, n, end, m, mode, halves, 3); break;
      case 2: block(a, w, &t, n, end, m, mode, halves, 2); break;
      case 1: block(a, w, &t, n, end, m, mode, halves, 1); break;
      default: break;
    }
  }
}

static void rows(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  int mode = mode_of(&a, &w), halves = w.block_size < BLOCK;
  if (mode == DECODED) { avx2_decoded_rows(op, chunk); return; }
  wane_op_range(op, chunk, a.N, 1, &lo, &hi);
  if (mode == INT16) {
    if (halves) blocks(&a, &w, lo, hi, INT16, 1); else blocks(&a, &w, lo, hi, INT16, 0);
  } else {
    if (halves) blocks(&a, &w, lo, hi, EXACT, 1); else blocks(&a, &w, lo, hi, EXACT, 0);
  }
}

void avx512_register_4bit(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_4BIT] = prepare;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_4BIT] = rows;
}
