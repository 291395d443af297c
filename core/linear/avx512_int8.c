/* avx512_int8.c: LLM.int8() with VNNI. vpdpbusd multiplies unsigned by signed bytes, so W is the unsigned operand: its bytes with the
 * top bit turned over are W + 128, and 128 times the sum of x's codes, known since they were made, is taken off at the end. No row
 * sums of W are stored. Two regimes:
 *   few rows of x     weights are read as they lie; 6 rows of x by 4 rows of W stay in registers, sums of lanes are added at the end
 *   many              W's rows are turned, 16 to a tile, once for all of x: four bytes of a row of x, broadcast, meet four of 16 rows of W, and a lane is a result
 * Same integers and roundings as int8.c. */
#define WANE_VEC 512
#include "int8.h"
#include "../x86/transpose16.h"
#include "../x86/vec.h"
#include "simd8.h"
#include <math.h>

/* Rows of x from which on turning W pays. */
enum { TURNED_FROM = 64 };

/* ---------------------------------------------------------------- prepare */

/* 16 values of a row of x as the quantizer sees them (int8.c's `rounded`), and their sizes. */
VEC vf size_of(vf x) { return vf_bits(vi_and(vi_bits(x), vi_set1(0x7fffffff))); }
VEC vf rounded(vf x) { return vf_select(vf_lt(size_of(x), vf_set1(65520.0f)), _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)), x); }

/* Largest |x| of row m that is no outlier; NaN if there is a NaN. *most never is. */
static float row_scale(const wane_linear_args *a, int64_t m, float *most) {
  const vf limit = vf_set1(a->threshold > 0 ? a->threshold : NAN);           /* nothing is >= NaN */
  vf top = vf_zero();
  vm sound = 0xffff;
  for (int64_t k = 0; k < a->K; k += VW) {
    vf v = size_of(rounded(vf_get_n(a->x, a->dtype, m * a->K + k, vec_left(k, a->K))));
    sound &= vf_eq(v, v);
    top = vf_select(vf_le(limit, v), top, vf_max(v, top));                   /* the second operand wins over NaN */
  }
  *most = vf_hmax(top);
  return sound == 0xffff ? *most : NAN;
}

/* Row m as codes, zeros beyond K; flags: columns to clear, or NULL. */
static void quantize_row(const wane_linear_args *a, int64_t m, int64_t stride, const uint8_t *flags, int8_t *codes, float *scale, int32_t *sum) {
  float most;
  *scale = row_scale(a, m, &most);
  const vf top = vf_set1(most), step = vf_set1(most > 0 ? 127.0f / most : 0);
  vi total = vi_set1(0);
  for (int64_t k = 0; k < stride; k += VW) {
    vi q = vi_set1(0);
    if (k < a->K) {
      int left = vec_left(k, a->K);
      vf v = rounded(vf_get_n(a->x, a->dtype, m * a->K + k, left)), size = size_of(v);
      vm keep = vf_le(size, top) & vf_lt(size, vf_set1(INFINITY));
      if (flags) {
        uint8_t there[VW] = { 0 };
        memcpy(there, flags + k, (size_t)left);
        keep &= vf_eq(vf_from_int(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)there))), vf_zero());
      }
      q = _mm512_maskz_mov_epi32(keep, vi_from_float(vf_mul(v, step)));
    }
    total = vi_add(total, q);
    _mm_storeu_si128((__m128i *)(codes + k), _mm512_cvtepi32_epi8(q));
  }
  *sum = wane_sum8_i32(_mm256_add_epi32(_mm512_castsi512_si256(total), _mm512_extracti64x4_epi64(total, 1)));
}

void wane_int8_quantize_avx512(const wane_op *op, int64_t lo, int64_t hi, int8_t *codes) {
  wane_linear_args a = wane_linear_load(op);
  wane_int8_layout l = wane_int8_plan(a.M, a.K);
  char *work = a.work;
  const uint8_t *flags = a.threshold > 0 && !op->i[WANE_LINEAR_BY_ROW] ? (uint8_t *)work + l.flags : NULL;
  for (int64_t m = lo; m < hi; m++)
    quantize_row(&a, m, l.stride, flags, codes + (m - lo) * l.stride, (float *)(work + l.scale) + m, (int32_t *)(work + l.sum) + m);
}

static void quantize(const wane_op *op, uint32_t chunk) {
  int64_t M = op->n[WANE_LINEAR_M], lo, hi;
  wane_int8_layout l = wane_int8_plan(M, op->n[11]);
  wane_op_range(op, chunk, M, 1, &lo, &hi);
  wane_int8_begin_avx2(op, chunk);
  wane_int8_quantize_avx512(op, lo, hi, (int8_t *)op->p[WANE_LINEAR_WORK] + l.codes + lo * l.stride);
}

/* ---------------------------------------------------------------- few rows of x */

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

/* ---------------------------------------------------------------- many */

/* Rows of W + 128 as tiles [rows / 16][k / 64][16 fours of k][16 rows][4]; past the last row it is taken again, for an even number of strips of 16. */
static const void *load(const int8_t *w, int64_t K, int64_t rows, void *scratch) {
  int64_t stride = (K + 63) / 64 * 64;
  char *out = scratch;
  for (int64_t n = 0; n < (rows + 31) / 32 * 32; n += 16)
    for (int64_t k = 0; k < stride; k += 64, out += 1024) {
      for (int64_t i = 0; i < 16; i++) {
        const int8_t *row = w + (n + i < rows ? n + i : rows - 1) * K + k;
        _mm512_storeu_si512(out + 64 * i, K - k >= 64 ? unsigned64(row) : unsigned_tail(row, K - k));
      }
      wane_transpose16(out, 64, out, 64);
    }
  return scratch;
}

/* Eight rows of x by two strips of W. c: rows of WANE_INT8_ROWS. */
static void eight(const int8_t *x, const int32_t *xsum, int64_t stride, const char *w0, int32_t *c) {
  const char *w1 = w0 + 16 * stride;
  __m512i s[8][2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) s[i][0] = s[i][1] = _mm512_setzero_si512();
  for (int64_t k = 0; k < stride; k += 4) {
    __m512i y0 = _mm512_loadu_si512(w0 + 16 * k), y1 = _mm512_loadu_si512(w1 + 16 * k);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      int32_t four;
      memcpy(&four, x + i * stride + k, 4);
      __m512i v = _mm512_set1_epi32(four);
      s[i][0] = dot4(s[i][0], y0, v);
      s[i][1] = dot4(s[i][1], y1, v);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    __m512i shifted = _mm512_slli_epi32(_mm512_set1_epi32(xsum[i]), 7);
    _mm512_storeu_si512(c + i * WANE_INT8_ROWS, _mm512_sub_epi32(s[i][0], shifted));
    _mm512_storeu_si512(c + i * WANE_INT8_ROWS + 16, _mm512_sub_epi32(s[i][1], shifted));
  }
}

static void multiply(const wane_int8_layout *l, const char *work, int64_t m, int mr, const void *w, int64_t K, int64_t nb, int32_t *c) {
  (void)mr, (void)K;                                   /* rows past the end are whatever lies there: there is memory, and c has room */
  for (int64_t n = 0; n < nb; n += 32)
    eight((const int8_t *)(work + l->codes) + m * l->stride, (const int32_t *)(work + l->sum) + m, l->stride, (const char *)w + n * l->stride, c + n);
}

void wane_int8_outliers_avx512(const float *x, int64_t count, const float *wo, int64_t nb, float *acc) {
  for (int64_t j = 0; j < nb; j += VW) {
    vf sum = vf_load(acc + j);
    for (int64_t o = 0; o < count; o++) sum = vf_add(sum, vf_mul(vf_set1(x[o]), vf_load(wo + o * WANE_INT8_ROWS + j)));
    vf_store(acc + j, sum);
  }
}

void wane_int8_finish_avx512(const int32_t *c, float sca, const float *acc, const float *scb, const void *bias, int bias_dtype, int64_t nb, void *y, int y_dtype) {
  for (int64_t j = 0; j < nb; j += VW) {
    int left = vec_left(j, nb);
    vf scale = vf_load_n(scb + j, left), r = vf_mul(vf_mul(vf_from_int(vi_load(c + j)), vf_set1(sca)), vf_mul(scale, vf_set1(1.0f / 16129.0f)));
    if (bias) r = vf_add(r, vf_get_n(bias, bias_dtype, j, left));
    if (acc) r = vf_add(r, vf_mul(vf_load(acc + j), vf_mul(scale, vf_set1(1.0f / 127.0f))));
    vf_put_n(y, y_dtype, j, r, left);
  }
}

static void product(const wane_op *op, uint32_t chunk) {
  static const wane_int8_kit few = { 6, NULL, wane_int8_multiply_avx512, wane_int8_gather_avx2, wane_int8_outliers_avx512, wane_int8_finish_avx512 };
  static const wane_int8_kit many = { 8, load, multiply, wane_int8_gather_avx2, wane_int8_outliers_avx512, wane_int8_finish_avx512 };
  int64_t M = op->n[WANE_LINEAR_M];
  wane_int8_product(op, chunk, M < TURNED_FROM || wane_int8_too_long(wane_int8_plan(M, op->n[11]).stride) ? &few : &many);
}

void wane_int8_register_avx512(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_LLM_INT8] = b->ops[WANE_OP_LINEAR_PACK + WANE_GROUP_LLM_INT8] = quantize;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_LLM_INT8] = b->ops[WANE_OP_LINEAR_MANY + WANE_GROUP_LLM_INT8] = product;
}
