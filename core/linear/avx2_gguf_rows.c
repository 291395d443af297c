/* avx2_gguf_rows.c: few rows of x times GGUF weights as they lie.
 *
 * Each 32 bytes of values (gguf_split.h) are widened by shifts, which leaves them in an order of their own; x was laid out in that order
 * (rows8.h). Up to four rows of x meet a value once it is unpacked. A row of x meets the same operations in the same order whatever
 * the number of rows. Two sums a row: one chain of fused additions would be the limit. */
#include "../quant/gguf_split.h"
#include "rows8.h"
#include "simd8.h"

#define INLINE static inline __attribute__((always_inline))

/* The factors of values 32 j … 32 j + 31: lanes 0 to 3 belong to the first 16, lanes 4 to 7 to the others. From memory: the load ports
 * are idle, the shuffle ports are not. */
INLINE __m256 run_factor(const int RUN, const float *factor, const int j) {
  if (RUN == 32) return _mm256_broadcast_ss(factor + j);
  return _mm256_blend_ps(_mm256_broadcast_ss(factor + 2 * j), _mm256_broadcast_ss(factor + 2 * j + 1), 0xf0);
}

/* sum[i][j % 2] += the values 32 j … of a group times MR rows of int16 x, `stride` apart. */
INLINE void dots_i16(const int SIGNED, const int MR, __m256i q, __m256 factor, const int j, const int16_t *x, int64_t stride, __m256 (*sum)[2]) {
  __m256i even = SIGNED ? _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8) : _mm256_and_si256(q, _mm256_set1_epi16(255));
  __m256i odd = SIGNED ? _mm256_srai_epi16(q, 8) : _mm256_srli_epi16(q, 8);
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++) {
    const __m256i *xv = (const __m256i *)(x + i * stride + 32 * j);
    __m256i t = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_load_si256(xv)), _mm256_madd_epi16(odd, _mm256_load_si256(xv + 1)));
    sum[i][j % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t), factor, sum[i][j % 2]);
  }
}

/* Byte `b` of each dword as f32. */
INLINE __m256 byte8(const int SIGNED, __m256i q, const int b) {
  if (SIGNED) return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(q, 24 - 8 * b), 24));
  return _mm256_cvtepi32_ps(b == 3 ? _mm256_srli_epi32(q, 24) : _mm256_and_si256(_mm256_srli_epi32(q, 8 * b), _mm256_set1_epi32(255)));
}

INLINE void dots_f32(const int SIGNED, const int MR, __m256i q, __m256 factor, const int j, const float *x, int64_t stride, __m256 (*sum)[2]) {
  __m256 w0 = byte8(SIGNED, q, 0), w1 = byte8(SIGNED, q, 1), w2 = byte8(SIGNED, q, 2), w3 = byte8(SIGNED, q, 3);
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++) {
    const float *xv = x + i * stride + 32 * j;
    __m256 t = _mm256_fmadd_ps(w1, _mm256_load_ps(xv + 8), _mm256_mul_ps(w0, _mm256_load_ps(xv)));
    t = _mm256_fmadd_ps(w3, _mm256_load_ps(xv + 24), _mm256_fmadd_ps(w2, _mm256_load_ps(xv + 16), t));
    sum[i][j % 2] = _mm256_fmadd_ps(t, factor, sum[i][j % 2]);
  }
}

/* One group of a row: acc[i] and shifts[i] of MR rows of x from row m on. */
INLINE void group_dots(const int KIND, const int WIDE, const int MR, const uint8_t *in, int64_t g, const wane_rows8 *r, const char *work, int64_t m,
                       __m256 *acc, __m256 *shifts) {
  const int RUN = wane_gguf_run(KIND), SIGNED = KIND == WANE_Q8_0;
  __m256 sum[4][2], factor[2], shift[2];
  _Alignas(32) float factors[16];
  int64_t at = m * r->stride + g * 256;
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
  gguf_factors(KIND, in, factor, shift);
  for (int k = 0; k < 256 / RUN / 8; k++) _mm256_store_ps(factors + 8 * k, factor[k]);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    __m256i q = gguf_values(KIND, in, j);
    if (WIDE) dots_f32(SIGNED, MR, q, run_factor(RUN, factors, j), j, (const float *)work + at, r->stride, sum);
    else dots_i16(SIGNED, MR, q, run_factor(RUN, factors, j), j, (const int16_t *)work + at, r->stride, sum);
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++) {
    __m256 both = _mm256_add_ps(sum[i][0], sum[i][1]);
    acc[i] = WIDE ? _mm256_add_ps(acc[i], both)
                  : _mm256_fmadd_ps(both, _mm256_broadcast_ss((const float *)(work + r->scales) + (m + i) * r->groups + g), acc[i]);
    if (!wane_gguf_has_shift(KIND)) continue;
    const float *xsum = (const float *)(work + r->sums) + ((m + i) * r->groups + g) * (256 / RUN);
    for (int k = 0; k < 256 / RUN / 8; k++) shifts[i] = _mm256_fmadd_ps(shift[k], _mm256_loadu_ps(xsum + 8 * k), shifts[i]);
  }
}

/* A whole row at `in`, BYTES a group; a last, short group is completed with zeros. */
INLINE void row_dots(const int KIND, const int WIDE, const int MR, const int BYTES, const uint8_t *in, int64_t length, const wane_rows8 *r, const char *work,
                     int64_t m, float *out) {
  __m256 acc[4], shifts[4];
  uint8_t last[BYTES];
  for (int i = 0; i < MR; i++) acc[i] = shifts[i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < r->groups; g++, in += BYTES, length -= BYTES) {
    for (int ahead = 0; ahead < BYTES; ahead += 64) _mm_prefetch((const char *)in + WANE_PREFETCH_AHEAD + ahead, _MM_HINT_T0);
    const uint8_t *group = in;
    if (length < BYTES) {
      memset(last, 0, sizeof last);
      group = memcpy(last, in, (size_t)length);
    }
    group_dots(KIND, WIDE, MR, group, g, r, work, m, acc, shifts);
  }
  for (int i = 0; i < MR; i++) out[i] = wane_sum8(_mm256_add_ps(acc[i], shifts[i]));
}

typedef void (*dots)(const uint8_t *in, int64_t length, const wane_rows8 *r, const char *work, int64_t m, float *out);
#define ROW(name, KIND, WIDE, MR, BYTES) \
  static void name(const uint8_t *in, int64_t length, const wane_rows8 *r, const char *work, int64_t m, float *out) { \
    row_dots(KIND, WIDE, MR, BYTES, in, length, r, work, m, out); \
  }
#define ROWS(name, KIND, BYTES) \
  ROW(name##_i1, KIND, 0, 1, BYTES) ROW(name##_i4, KIND, 0, 4, BYTES) \
  ROW(name##_f1, KIND, 1, 1, BYTES) ROW(name##_f4, KIND, 1, 4, BYTES) \
  static const dots name[2][2] = { { name##_i1, name##_i4 }, { name##_f1, name##_f4 } };
ROWS(q4_0, WANE_Q4_0, 8 * 18)
ROWS(q4_1, WANE_Q4_1, 8 * 20)
ROWS(q5_0, WANE_Q5_0, 8 * 22)
ROWS(q5_1, WANE_Q5_1, 8 * 24)
ROWS(q8_0, WANE_Q8_0, 8 * 34)
ROWS(q2_k, WANE_Q2_K, 84)
ROWS(q3_k, WANE_Q3_K, 110)
ROWS(q4_k, WANE_Q4_K, 144)
ROWS(q5_k, WANE_Q5_K, 176)
ROWS(q6_k, WANE_Q6_K, 210)

static void gguf_dots(const wane_qview *w, int64_t n, const wane_rows8 *r, const char *work, int64_t m, int rows, float *out) {
  static const dots (*const table[])[2] = { q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k };
  int64_t length = w->cols / wane_gguf_block(w->dtype) * wane_gguf_block_bytes(w->dtype);
  table[w->dtype - WANE_Q4_0][r->wide][rows == 4]((const uint8_t *)w->codes + n * length, length, r, work, m, out);
}

static void gguf_product(const wane_op *op, uint32_t chunk) { wane_rows8_product(op, chunk, gguf_dots); }

void wane_gguf_register_avx2(wane_backend *b) {
  const int groups[] = { WANE_GROUP_GGUF, WANE_GROUP_GGUF_K };
  for (int k = 0; k < 2; k++) {
    b->ops[WANE_OP_LINEAR_PREPARE + groups[k]] = wane_rows8_prepare_avx2;
    b->ops[WANE_OP_LINEAR_ROWS + groups[k]] = gguf_product;
  }
}
