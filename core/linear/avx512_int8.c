/* avx512_int8.c: LLM.int8() with VNNI. vpdpbusd multiplies unsigned by signed bytes, so W is the unsigned operand: its bytes with the
 * top bit turned over are W + 128, and 128 times the sum of x's codes, known since they were made, is taken off at the end. No row
 * sums of W are stored. Weights are read as they lie; prefill keeps a tile of 6 rows of x by 4 rows of W in registers.
 * Same integers and roundings as int8.c; everything but the multiplication is the AVX2 level's. */
#include "int8.h"
#include "../x86/simd.h"
#include "simd8.h"

/* acc += dot products of four bytes a lane. gcc 12 keeps none of many accumulators in registers through the intrinsic. */
static inline __attribute__((always_inline)) __m512i dot4(__m512i acc, __m512i u8, __m512i s8) {
#ifdef WANE_EMULATE
  return _mm512_dpbusd_epi32(acc, u8, s8);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
  return acc;
#endif
}

static inline __m512i unsigned64(const int8_t *w) { return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)0x80)); }

/* A row's last K % 64 weights, then zeros (x's codes are zeros there). */
static inline __m512i unsigned_tail(const int8_t *w, int64_t left) {
  int8_t bytes[64] = { 0 };
  memcpy(bytes, w, (size_t)left);
  return unsigned64(bytes);
}

/* The sums of four vectors' lanes. */
static inline __m128i sums4(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* 64 values of k of a tile of MR rows of x and four of W. */
static inline __attribute__((always_inline)) void step(const int MR, const int8_t *x, int64_t stride, const __m512i *wv, __m512i (*sum)[4]) {
#pragma GCC unroll 6
  for (int i = 0; i < MR; i++) {
    __m512i xv = _mm512_loadu_si512(x + i * stride);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[i][j] = dot4(sum[i][j], wv[j], xv);
  }
}

/* Sums of MR rows of x with four rows of W at row[0..3]. c: [MR][WANE_INT8_ROWS]. */
static inline __attribute__((always_inline)) void tile(const int MR, const int8_t *x, const int32_t *xsum, int64_t stride, const int8_t *const *row,
                                                       int64_t K, int32_t *c) {
  __m512i sum[6][4], wv[4];
  int64_t whole = K & ~(int64_t)63;
#pragma GCC unroll 6
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < whole; k += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) wv[j] = unsigned64(row[j] + k);
    step(MR, x + k, stride, wv, sum);
  }
  if (whole < K) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) wv[j] = unsigned_tail(row[j] + whole, K - whole);
    step(MR, x + whole, stride, wv, sum);
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; i++) {
    __m128i four = _mm_sub_epi32(sums4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), _mm_set1_epi32(128 * xsum[i]));
    _mm_storeu_si128((__m128i *)(c + i * WANE_INT8_ROWS), four);
  }
}

/* One row of x with one row of W: decode. */
static int32_t dot(const int8_t *x, const int8_t *w, int64_t K) {
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0;
  int64_t k = 0;
  for (; k + 256 <= K; k += 256) {
    for (int64_t p = 0; p < 256; p += 64) _mm_prefetch((const char *)(w + k + p + WANE_PREFETCH_AHEAD), _MM_HINT_T0);
    s0 = dot4(s0, unsigned64(w + k), _mm512_loadu_si512(x + k));
    s1 = dot4(s1, unsigned64(w + k + 64), _mm512_loadu_si512(x + k + 64));
    s2 = dot4(s2, unsigned64(w + k + 128), _mm512_loadu_si512(x + k + 128));
    s3 = dot4(s3, unsigned64(w + k + 192), _mm512_loadu_si512(x + k + 192));
  }
  for (; k < K; k += 64) s0 = dot4(s0, K - k >= 64 ? unsigned64(w + k) : unsigned_tail(w + k, K - k), _mm512_loadu_si512(x + k));
  __m512i all = _mm512_add_epi32(_mm512_add_epi32(s0, s1), _mm512_add_epi32(s2, s3));
  return wane_sum8_i32(_mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1)));
}

void wane_int8_multiply_avx512(const wane_int8_layout *l, const char *work, int64_t m, int mr, const void *weight, int64_t K, int64_t nb, int32_t *c) {
  const int8_t *x = (const int8_t *)(work + l->codes) + m * l->stride, *w = weight;
  const int32_t *xsum = (const int32_t *)(work + l->sum) + m;
  int64_t S = l->stride;
  if (mr == 1) {
    for (int64_t j = 0; j < nb; j++) c[j] = dot(x, w + j * K, K) - 128 * xsum[0];
    return;
  }
  for (int64_t j = 0; j < nb; j += 4) {             /* past the end the last row is taken again: c has room */
    const int8_t *row[4];
    for (int i = 0; i < 4; i++) row[i] = w + (j + i < nb ? j + i : nb - 1) * K;
    switch (mr) {
      case 6: tile(6, x, xsum, S, row, K, c + j); break;
      case 5: tile(5, x, xsum, S, row, K, c + j); break;
      case 4: tile(4, x, xsum, S, row, K, c + j); break;
      case 3: tile(3, x, xsum, S, row, K, c + j); break;
      default: tile(2, x, xsum, S, row, K, c + j);
    }
  }
}

static void quantize(const wane_op *op, uint32_t chunk) {
  int64_t M = op->n[WANE_LINEAR_M], lo, hi;
  wane_int8_layout l = wane_int8_plan(M, op->n[11]);
  wane_op_range(op, chunk, M, 1, &lo, &hi);
  wane_int8_begin_avx2(op, chunk);
  wane_int8_quantize_avx2(op, lo, hi, 0, (char *)op->p[WANE_LINEAR_WORK] + l.codes + lo * l.stride);
}

static void product(const wane_op *op, uint32_t chunk) {
  static const wane_int8_kit kit = { 6, NULL, wane_int8_multiply_avx512, wane_int8_gather_avx2, wane_int8_outliers_avx2, wane_int8_finish_avx2 };
  wane_int8_product(op, chunk, &kit);
}

void wane_int8_register_avx512(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_LLM_INT8] = b->ops[WANE_OP_LINEAR_PACK + WANE_GROUP_LLM_INT8] = quantize;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_LLM_INT8] = b->ops[WANE_OP_LINEAR_MANY + WANE_GROUP_LLM_INT8] = product;
}
