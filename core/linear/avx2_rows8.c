/* avx2_rows8.c: laying out x for few-row products (rows8.h), the loop around their dot products, and GGUF's dot products.
 *
 * A GGUF row is split 256 values at a time into int8 values in L1 (gguf_split.h) and met there by up to four rows of x: the bits are
 * unpacked once, and one pair of dot products, f32 and int16, serves ten kinds. A row of x meets the same operations in the same
 * order whatever the number of rows. */
#include <immintrin.h>
#include <math.h>
#include "rows8.h"
#include "simd8.h"

/* ---------------------------------------------------------------- x */

/* One group of 256 (`left` of them exist) as int16; returns the factor of the integers. A group below 2^-100 becomes zeros. */
static float group_i16(const void *x, int dtype, int64_t at, int64_t left, int16_t *out) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 top = _mm256_setzero_ps(), nan = top;
  for (int64_t i = 0; i < 256 && i < left; i += 8) {
    __m256 v = _mm256_andnot_ps(sign, wane_load8(x, dtype, at + i, left - i));
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    top = _mm256_max_ps(v, top);
  }
  float most = wane_max8(top);
  const __m256 step = _mm256_set1_ps(most > 0x1p-100f ? 32767.0f / most : 0);
  for (int64_t i = 0; i < 256; i += 16) {
    __m256i a = _mm256_setzero_si256(), b = a;
    if (i < left) a = _mm256_cvtps_epi32(_mm256_mul_ps(wane_load8(x, dtype, at + i, left - i), step));
    if (i + 8 < left) b = _mm256_cvtps_epi32(_mm256_mul_ps(wane_load8(x, dtype, at + i + 8, left - i - 8), step));
    _mm256_store_si256((__m256i *)(out + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
  }
  return _mm256_movemask_ps(nan) ? NAN : most > 0x1p-100f ? most / 32767.0f : 0;
}

static void group_f32(const void *x, int dtype, int64_t at, int64_t left, float *out) {
  for (int64_t i = 0; i < 256; i += 8)
    _mm256_store_ps(out + i, i < left ? wane_load8(x, dtype, at + i, left - i) : _mm256_setzero_ps());
}

/* Sums over the runs of a group. */
static void group_sums(const void *x, int dtype, int64_t at, int64_t left, int run, float *out) {
  for (int64_t i = 0; i < 256; i += run) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = i; j < i + run && j < left; j += 8) sum = _mm256_add_ps(sum, wane_load8(x, dtype, at + j, left - j));
    *out++ = wane_sum8(sum);
  }
}

void wane_rows8_prepare_avx2(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_rows8 r = wane_rows8_plan(op->i[14], a.compute, a.M, a.K);
  char *work = a.work;
  int64_t lo, hi;
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  for (int64_t m = lo; m < hi; m++)
    for (int64_t g = 0; g < r.groups; g++) {
      int64_t at = m * a.K + g * 256, left = a.K - g * 256, to = m * r.stride + g * 256;
      if (r.wide) group_f32(a.x, a.dtype, at, left, (float *)work + to);
      else ((float *)(work + r.scales))[m * r.groups + g] = group_i16(a.x, a.dtype, at, left, (int16_t *)work + to);
      if (r.run) group_sums(a.x, a.dtype, at, left, r.run, (float *)(work + r.sums) + to / r.run);
    }
}

/* ---------------------------------------------------------------- the loop */

void wane_rows8_product(const wane_op *op, uint32_t chunk, wane_rows8_dots dots) {
  enum { BLOCK = 16 };
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  wane_rows8 r = wane_rows8_plan(w.dtype, a.compute, a.M, a.K);
  int64_t lo, hi;
  wane_op_range(op, chunk, a.N, 1, &lo, &hi);
  for (int64_t n0 = lo; n0 < hi; n0 += BLOCK)
    for (int64_t m = 0; m < a.M;) {
      int rows = a.M - m >= 4 ? 4 : a.M - m >= 2 ? 2 : 1;
      for (int64_t n = n0; n < hi && n < n0 + BLOCK; n++) {
        float y[4], bias = wane_linear_bias(&a, n);
        dots(&w, n, &r, a.work, m, rows, y);
        for (int i = 0; i < rows; i++) wane_float_put(a.y, a.dtype, (m + i) * a.N + n, y[i] + bias);
      }
      m += rows;
    }
}

/* ---------------------------------------------------------------- GGUF */

static inline __m256i widen16(const int8_t *q) { return _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i *)q)); }
static inline __m256 widen8(const int8_t *q) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q))); }

/* sum[i] += factor * q . x over one group. */
static inline __attribute__((always_inline)) void group_dots_i16(const int RUN, const int MR, const wane_gguf_group *p, const int16_t *x, int64_t stride, __m256 *sum) {
  for (int j = 0; j < 256 / RUN; j++) {
    const __m256 factor = _mm256_broadcast_ss(p->factor + j);
    __m256i w0 = widen16(p->q + j * RUN), w1 = RUN == 32 ? widen16(p->q + j * RUN + 16) : w0;
    for (int i = 0; i < MR; i++) {
      const __m256i *xv = (const __m256i *)(x + i * stride + j * RUN);
      __m256i t = _mm256_madd_epi16(w0, _mm256_load_si256(xv));
      if (RUN == 32) t = _mm256_add_epi32(t, _mm256_madd_epi16(w1, _mm256_load_si256(xv + 1)));
      sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t), factor, sum[i]);
    }
  }
}

static inline __attribute__((always_inline)) void group_dots_f32(const int RUN, const int MR, const wane_gguf_group *p, const float *x, int64_t stride, __m256 *sum) {
  for (int j = 0; j < 256 / RUN; j++) {
    const __m256 factor = _mm256_broadcast_ss(p->factor + j);
    __m256 t[4];
    for (int c = 0; c < RUN; c += 8) {
      __m256 w = widen8(p->q + j * RUN + c);
      for (int i = 0; i < MR; i++) {
        __m256 xv = _mm256_load_ps(x + i * stride + j * RUN + c);
        t[i] = c ? _mm256_fmadd_ps(w, xv, t[i]) : _mm256_mul_ps(w, xv);
      }
    }
    for (int i = 0; i < MR; i++) sum[i] = _mm256_fmadd_ps(t[i], factor, sum[i]);
  }
}

/* The row of `blocks` blocks at `in`. PER: blocks a group; `bytes` a block. */
static inline __attribute__((always_inline)) void row_dots(const int WIDE, const int RUN, const int MR, wane_gguf_splitter split, const uint8_t *in,
                                                           int64_t blocks, int per, int bytes, const wane_rows8 *r, const char *work, int64_t m, float *out) {
  wane_gguf_group p;
  __m256 acc[4], shifts[4];
  for (int i = 0; i < MR; i++) acc[i] = shifts[i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < r->groups; g++, blocks -= per, in += per * bytes) {
    for (int ahead = 0; ahead < per * bytes; ahead += 64) _mm_prefetch((const char *)in + WANE_PREFETCH_AHEAD + ahead, _MM_HINT_T0);
    split(in, blocks < per ? (int)blocks : per, &p);
    __m256 sum[4];
    for (int i = 0; i < MR; i++) sum[i] = _mm256_setzero_ps();
    if (WIDE) group_dots_f32(RUN, MR, &p, (const float *)work + m * r->stride + g * 256, r->stride, sum);
    else group_dots_i16(RUN, MR, &p, (const int16_t *)work + m * r->stride + g * 256, r->stride, sum);
    for (int i = 0; i < MR; i++) {
      acc[i] = WIDE ? _mm256_add_ps(acc[i], sum[i])
                    : _mm256_fmadd_ps(sum[i], _mm256_broadcast_ss((const float *)(work + r->scales) + (m + i) * r->groups + g), acc[i]);
      if (!r->run) continue;
      const float *xsum = (const float *)(work + r->sums) + ((m + i) * r->groups + g) * (256 / RUN);
      for (int j = 0; j < 256 / RUN; j += 8) shifts[i] = _mm256_fmadd_ps(_mm256_load_ps(p.shift + j), _mm256_loadu_ps(xsum + j), shifts[i]);
    }
  }
  for (int i = 0; i < MR; i++) out[i] = wane_sum8(_mm256_add_ps(acc[i], shifts[i]));
}

#define ROW_DOTS(name, WIDE, RUN, MR)                                                                                           \
  static void name(wane_gguf_splitter split, const uint8_t *in, int64_t blocks, int per, int bytes, const wane_rows8 *r,        \
                   const char *work, int64_t m, float *out) {                                                                   \
    row_dots(WIDE, RUN, MR, split, in, blocks, per, bytes, r, work, m, out);                                                    \
  }
#define ROW_DOTS_OF(name, WIDE, RUN) ROW_DOTS(name##_1, WIDE, RUN, 1) ROW_DOTS(name##_2, WIDE, RUN, 2) ROW_DOTS(name##_4, WIDE, RUN, 4)
ROW_DOTS_OF(i16_16, 0, 16)
ROW_DOTS_OF(i16_32, 0, 32)
ROW_DOTS_OF(f32_16, 1, 16)
ROW_DOTS_OF(f32_32, 1, 32)

static void gguf_dots(const wane_qview *w, int64_t n, const wane_rows8 *r, const char *work, int64_t m, int rows, float *out) {
  typedef void (*dots)(wane_gguf_splitter, const uint8_t *, int64_t, int, int, const wane_rows8 *, const char *, int64_t, float *);
  static const dots table[2][2][3] = { { { i16_16_1, i16_16_2, i16_16_4 }, { i16_32_1, i16_32_2, i16_32_4 } },
                                       { { f32_16_1, f32_16_2, f32_16_4 }, { f32_32_1, f32_32_2, f32_32_4 } } };
  int block = wane_gguf_block(w->dtype), bytes = wane_gguf_block_bytes(w->dtype);
  int64_t blocks = w->cols / block;
  table[r->wide][wane_gguf_run(w->dtype) == 32][rows >> 1](wane_gguf_splitter_avx2(w->dtype), (const uint8_t *)w->codes + n * blocks * bytes, blocks,
                                                           WANE_GROUP / block, bytes, r, work, m, out);
}

static void gguf_product(const wane_op *op, uint32_t chunk) { wane_rows8_product(op, chunk, gguf_dots); }

void wane_rows8_register_avx2(wane_backend *b) {
  const int groups[] = { WANE_GROUP_GGUF, WANE_GROUP_GGUF_K };
  for (int k = 0; k < 2; k++) {
    b->ops[WANE_OP_LINEAR_PREPARE + groups[k]] = wane_rows8_prepare_avx2;
    b->ops[WANE_OP_LINEAR_ROWS + groups[k]] = gguf_product;
  }
}
