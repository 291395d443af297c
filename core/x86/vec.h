/* vec.h: float vectors of the instruction set in use, so that a hot loop is written once and compiled per file group.
 *
 * A file chooses the width before it includes this: WANE_VEC 512 (avx512_*.c; and WANE_VEC_BF16 in avx512bf16_*.c), 256 (avx2_*.c), or
 * nothing: the portable version, four lanes of GCC's vector extension, which any target compiles to what it has. Types: vf (floats), vi (32-bit
 * integers), vm (one truth value a lane), VW lanes each. Everything is static inline. No loop here reads or writes past `n`.
 * vf_fma rounds once where the CPU has it and twice in the portable version: levels agree within a tolerance, not bit for bit. */
#ifndef WANE_VEC_H
#define WANE_VEC_H
#include "../base/float16.h"

#define VEC static inline __attribute__((always_inline, unused))

#if defined(WANE_VEC) && WANE_VEC == 512
/* ================================================================ AVX-512 */
#include "simd.h"
#define VEC_NAME(x) x##_avx512
enum { VW = 16, VEC_REGISTERS = 32 };
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

VEC vf vf_zero(void) { return _mm512_setzero_ps(); }
VEC vf vf_set1(float x) { return _mm512_set1_ps(x); }
VEC vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
VEC void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
VEC vf vf_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps((vm)((1u << n) - 1), p); }
VEC void vf_store_n(float *p, vf v, int n) { _mm512_mask_storeu_ps(p, (vm)((1u << n) - 1), v); }
VEC vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
VEC vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
VEC vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
VEC vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
VEC vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
VEC vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
VEC vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
VEC vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
VEC vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
VEC vi vi_load(const int32_t *p) { return _mm512_loadu_si512((const void *)p); }
VEC void vi_store(int32_t *p, vi v) { _mm512_storeu_si512((void *)p, v); }
VEC vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
VEC vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
VEC vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
VEC vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
VEC vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
#define vi_sll(a, k) _mm512_slli_epi32(a, k)
#define vi_srl(a, k) _mm512_srli_epi32(a, k)
#define vi_sra(a, k) _mm512_srai_epi32(a, k)
VEC vi vi_set64(uint64_t x) { return _mm512_set1_epi64((long long)x); }
VEC vi vi_add64(vi a, vi b) { return _mm512_add_epi64(a, b); }
VEC vi vi_mul64(vi a, vi b) { return _mm512_mul_epu32(a, b); }
VEC vi vi_down64(vi a) { return _mm512_shuffle_epi32(a, 0xf5); }
VEC vi vi_up64(vi a) { return _mm512_slli_epi64(a, 32); }
VEC vi vi_low64(vi a, vi b) { return _mm512_unpacklo_epi64(a, b); }
VEC vi vi_high64(vi a, vi b) { return _mm512_unpackhi_epi64(a, b); }
VEC vf vf_bits(vi a) { return _mm512_castsi512_ps(a); }
VEC vi vi_bits(vf a) { return _mm512_castps_si512(a); }
VEC vf vf_from_int(vi a) { return _mm512_cvtepi32_ps(a); }
VEC vi vi_from_float(vf a) { return _mm512_cvtps_epi32(a); }
VEC vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
VEC vm vf_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
VEC vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
VEC vf vf_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
VEC uint32_t vm_bits(vm m) { return m; }
VEC vf vf_from_bf16(const void *p) {
  return vf_bits(vi_sll(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
VEC vf vf_from_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
VEC void vf_to_f16(void *p, vf v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#if defined(WANE_VEC_BF16) && !defined(WANE_EMULATE)
/* One instruction, which takes subnormal numbers for zero; else the same. */
VEC void vf_to_bf16(void *p, vf v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }
#else
VEC void vf_to_bf16(void *p, vf v) {
  vi u = vi_bits(v), odd = vi_and(vi_srl(u, 16), vi_set1(1));
  vi r = vi_srl(vi_add(vi_add(u, vi_set1(0x7fff)), odd), 16), nan = vi_or(vi_srl(u, 16), vi_set1(0x40));
  r = vi_bits(vf_select(vf_eq(v, v), vf_bits(r), vf_bits(nan)));
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(r));
}
#endif
/* Sum of the lanes, always folded in halves. */
VEC float vf_sum(vf v) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
VEC float vf_hmax(vf v) {
  __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
/* Transposes a VW x VW block in place: r[i][k] <-> r[k][i]. */
VEC void vec_transpose(vf r[VW]) {
  vf a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) for (int k = 0; k < 2; k++) {
    __m512d lo = _mm512_castps_pd(a[i + k]), hi = _mm512_castps_pd(a[i + k + 2]);
    b[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
    b[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
  }
  for (int k = 0; k < 4; k++) {                      /* b[4i + k]: rows 4i..4i+3 of columns k, k+4, k+8, k+12, one a 128-bit lane */
    vf even = _mm512_shuffle_f32x4(b[k], b[4 + k], 0x88), odd = _mm512_shuffle_f32x4(b[k], b[4 + k], 0xdd);
    vf even2 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x88), odd2 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xdd);
    r[k] = _mm512_shuffle_f32x4(even, even2, 0x88);
    r[8 + k] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    r[4 + k] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    r[12 + k] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

#elif defined(WANE_VEC) && WANE_VEC == 256
/* ================================================================ AVX2, FMA, F16C */
#include <immintrin.h>
#define VEC_NAME(x) x##_avx2
enum { VW = 8, VEC_REGISTERS = 16 };
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;

VEC vf vf_zero(void) { return _mm256_setzero_ps(); }
VEC vf vf_set1(float x) { return _mm256_set1_ps(x); }
VEC vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
VEC void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
VEC vi vec_first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
VEC vf vf_load_n(const float *p, int n) { return _mm256_maskload_ps(p, vec_first(n)); }
VEC void vf_store_n(float *p, vf v, int n) { _mm256_maskstore_ps(p, vec_first(n), v); }
VEC vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
VEC vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
VEC vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
VEC vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
VEC vf vf_sqrt(vf a) { return _mm256_sqrt_ps(a); }
VEC vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
VEC vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
VEC vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
VEC vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
VEC vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
VEC void vi_store(int32_t *p, vi v) { _mm256_storeu_si256((__m256i *)p, v); }
VEC vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
VEC vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
VEC vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
VEC vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
VEC vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
#define vi_sll(a, k) _mm256_slli_epi32(a, k)
#define vi_srl(a, k) _mm256_srli_epi32(a, k)
#define vi_sra(a, k) _mm256_srai_epi32(a, k)
VEC vi vi_set64(uint64_t x) { return _mm256_set1_epi64x((long long)x); }
VEC vi vi_add64(vi a, vi b) { return _mm256_add_epi64(a, b); }
VEC vi vi_mul64(vi a, vi b) { return _mm256_mul_epu32(a, b); }
VEC vi vi_down64(vi a) { return _mm256_shuffle_epi32(a, 0xf5); }
VEC vi vi_up64(vi a) { return _mm256_slli_epi64(a, 32); }
VEC vi vi_low64(vi a, vi b) { return _mm256_unpacklo_epi64(a, b); }
VEC vi vi_high64(vi a, vi b) { return _mm256_unpackhi_epi64(a, b); }
VEC vf vf_bits(vi a) { return _mm256_castsi256_ps(a); }
VEC vi vi_bits(vf a) { return _mm256_castps_si256(a); }
VEC vf vf_from_int(vi a) { return _mm256_cvtepi32_ps(a); }
VEC vi vi_from_float(vf a) { return _mm256_cvtps_epi32(a); }
VEC vm vf_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
VEC vm vf_le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
VEC vm vf_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
VEC vf vf_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
VEC uint32_t vm_bits(vm m) { return (uint32_t)_mm256_movemask_ps(m); }
VEC vf vf_from_bf16(const void *p) { return vf_bits(vi_sll(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16)); }
VEC vf vf_from_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
VEC void vf_to_f16(void *p, vf v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
VEC void vf_to_bf16(void *p, vf v) {
  vi u = vi_bits(v), odd = vi_and(vi_srl(u, 16), vi_set1(1));
  vi r = vi_srl(vi_add(vi_add(u, vi_set1(0x7fff)), odd), 16), nan = vi_or(vi_srl(u, 16), vi_set1(0x40));
  r = vi_bits(vf_select(vf_eq(v, v), vf_bits(r), vf_bits(nan)));
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(r));
}
VEC float vf_sum(vf v) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
VEC float vf_hmax(vf v) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
VEC void vec_transpose(vf r[VW]) {
  vf a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) for (int k = 0; k < 2; k++) {
    b[i + 2 * k] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0x44);
    b[i + 2 * k + 1] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0xee);
  }
  for (int k = 0; k < 4; k++) {
    r[k] = _mm256_permute2f128_ps(b[k], b[4 + k], 0x20);
    r[4 + k] = _mm256_permute2f128_ps(b[k], b[4 + k], 0x31);
  }
}
#define VEC_LOAD_TRANSPOSED
/* r[k] = value k of each of VW rows, `stride` bytes apart. Rows i and i + 4 share a register from the load on, which saves the
 * transposition its last third; bf16 is transposed as 16-bit words and widened by the last interleaving with zeros. */
VEC void vec_load_transposed(vf r[VW], const char *p, int64_t stride, int dtype) {
  if (dtype == WANE_F32) {
    for (int half = 0; half < 2; half++) {
      vf a[4], b[4];
      for (int i = 0; i < 4; i++) {
        const float *lo = (const float *)(p + i * stride) + 4 * half, *hi = (const float *)(p + (i + 4) * stride) + 4 * half;
        a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(lo)), _mm_loadu_ps(hi), 1);
      }
      for (int i = 0; i < 4; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int k = 0; k < 2; k++) {
        r[4 * half + 2 * k] = _mm256_shuffle_ps(b[k], b[k + 2], 0x44);
        r[4 * half + 2 * k + 1] = _mm256_shuffle_ps(b[k], b[k + 2], 0xee);
      }
    }
  } else if (dtype == WANE_BF16) {
    __m256i a[4], b[4], zero = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
      __m128i lo = _mm_loadu_si128((const __m128i *)(p + i * stride)), hi = _mm_loadu_si128((const __m128i *)(p + (i + 4) * stride));
      a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1);
    }
    for (int i = 0; i < 4; i += 2) {
      b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
    }
    for (int k = 0; k < 2; k++) {                    /* b[k], b[k + 2]: values 4k .. 4k+3 of rows 0 1 and 2 3 */
      __m256i two[2] = { _mm256_unpacklo_epi32(b[k], b[k + 2]), _mm256_unpackhi_epi32(b[k], b[k + 2]) };
      for (int i = 0; i < 2; i++) {
        r[4 * k + 2 * i] = vf_bits(_mm256_unpacklo_epi16(zero, two[i]));
        r[4 * k + 2 * i + 1] = vf_bits(_mm256_unpackhi_epi16(zero, two[i]));
      }
    }
  } else {
    for (int i = 0; i < VW; i++) r[i] = vf_from_f16(p + i * stride);
    vec_transpose(r);
  }
}

#else
/* ================================================================ portable */
#define VEC_NAME(x) x##_generic
enum { VW = 4, VEC_REGISTERS = 16 };
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vec_u __attribute__((vector_size(16)));
typedef uint64_t vec_q __attribute__((vector_size(16)));
typedef vi vm;

VEC vf vf_set1(float x) { return (vf){ x, x, x, x }; }
VEC vf vf_zero(void) { return vf_set1(0.0f); }
VEC vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
VEC void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
VEC vf vf_load_n(const float *p, int n) { vf v = vf_zero(); for (int k = 0; k < n; k++) v[k] = p[k]; return v; }
VEC void vf_store_n(float *p, vf v, int n) { for (int k = 0; k < n; k++) p[k] = v[k]; }
VEC vf vf_add(vf a, vf b) { return a + b; }
VEC vf vf_sub(vf a, vf b) { return a - b; }
VEC vf vf_mul(vf a, vf b) { return a * b; }
VEC vf vf_div(vf a, vf b) { return a / b; }
VEC vf vf_sqrt(vf a) { for (int k = 0; k < VW; k++) a[k] = __builtin_sqrtf(a[k]); return a; }
VEC vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
VEC vf vf_bits(vi a) { return (vf)a; }
VEC vi vi_bits(vf a) { return (vi)a; }
VEC vm vf_lt(vf a, vf b) { return a < b; }
VEC vm vf_le(vf a, vf b) { return a <= b; }
VEC vm vf_eq(vf a, vf b) { return a == b; }
VEC vf vf_select(vm m, vf a, vf b) { return (vf)(((vi)a & m) | ((vi)b & ~m)); }
VEC vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
VEC vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
VEC vi vi_set1(int32_t x) { return (vi){ x, x, x, x }; }
VEC vi vi_load(const int32_t *p) { vi v; memcpy(&v, p, sizeof v); return v; }
VEC void vi_store(int32_t *p, vi v) { memcpy(p, &v, sizeof v); }
VEC vi vi_add(vi a, vi b) { return (vi)((vec_u)a + (vec_u)b); }
VEC vi vi_sub(vi a, vi b) { return (vi)((vec_u)a - (vec_u)b); }
VEC vi vi_and(vi a, vi b) { return a & b; }
VEC vi vi_or(vi a, vi b) { return a | b; }
VEC vi vi_xor(vi a, vi b) { return a ^ b; }
#define vi_sll(a, k) ((vi)((vec_u)(a) << (k)))
#define vi_srl(a, k) ((vi)((vec_u)(a) >> (k)))
#define vi_sra(a, k) ((a) >> (k))
VEC vi vi_set64(uint64_t x) { return (vi)(vec_q){ x, x }; }
VEC vi vi_add64(vi a, vi b) { return (vi)((vec_q)a + (vec_q)b); }
VEC vi vi_mul64(vi a, vi b) { return (vi)(((vec_q)a & 0xffffffff) * ((vec_q)b & 0xffffffff)); }
VEC vi vi_down64(vi a) { return (vi)((vec_q)a >> 32); }
VEC vi vi_up64(vi a) { return (vi)((vec_q)a << 32); }
VEC vi vi_low64(vi a, vi b) { return (vi)(vec_q){ ((vec_q)a)[0], ((vec_q)b)[0] }; }
VEC vi vi_high64(vi a, vi b) { return (vi)(vec_q){ ((vec_q)a)[1], ((vec_q)b)[1] }; }
VEC vf vf_from_int(vi a) { return __builtin_convertvector(a, vf); }
/* Nearest, ties to even, by the sum with 1.5 * 2^23: |a| < 2^22. */
VEC vi vi_from_float(vf a) { return vi_sub(vi_bits(a + 12582912.0f), vi_bits(vf_set1(12582912.0f))); }
VEC uint32_t vm_bits(vm m) { return (uint32_t)((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8)); }
VEC vf vf_from_bf16(const void *p) { vf v; for (int k = 0; k < VW; k++) v[k] = wane_float_at(p, WANE_BF16, k); return v; }
VEC vf vf_from_f16(const void *p) { vf v; for (int k = 0; k < VW; k++) v[k] = wane_float_at(p, WANE_F16, k); return v; }
VEC void vf_to_bf16(void *p, vf v) { for (int k = 0; k < VW; k++) wane_float_put(p, WANE_BF16, k, v[k]); }
VEC void vf_to_f16(void *p, vf v) { for (int k = 0; k < VW; k++) wane_float_put(p, WANE_F16, k, v[k]); }
VEC float vf_sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
VEC float vf_hmax(vf v) {
  float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
VEC void vec_transpose(vf r[VW]) {
  for (int i = 0; i < VW; i++) for (int k = 0; k < i; k++) { float x = r[i][k]; r[i][k] = r[k][i]; r[k][i] = x; }
}
#endif

/* ================================================================ built on the above */
/* vf_max and vf_min give b where either is NaN. vi_from_float: nearest, ties to even; |a| < 2^22 everywhere.
 * vi_*64 take a vi as pairs of lanes, the lower lane being the lower half of a 64-bit number: vi_mul64 multiplies lower halves (unsigned);
 * vi_down64 brings the upper half down and leaves anything above it; vi_low64 and vi_high64 take, from each 128 bits of a and of b, the lower
 * or the upper number: a's then b's. */

VEC vf vf_neg(vf a) { return vf_bits(vi_xor(vi_bits(a), vi_set1((int32_t)0x80000000u))); }
VEC vf vf_abs(vf a) { return vf_bits(vi_and(vi_bits(a), vi_set1(0x7fffffff))); }
/* |a| with the sign of b. */
VEC vf vf_copysign(vf a, vf b) { return vf_bits(vi_or(vi_bits(vf_abs(a)), vi_and(vi_bits(b), vi_set1((int32_t)0x80000000u)))); }
/* Nearest integer, ties to even; |a| < 2^22. */
VEC vf vf_round(vf a) { return vf_from_int(vi_from_float(a)); }

/* VW values from element i on of an array of f32, f16 or bf16. With a constant dtype the branch goes away. */
VEC vf vf_get(const void *p, int dtype, int64_t i) {
  if (dtype == WANE_F32) return vf_load((const float *)p + i);
  const char *h = (const char *)p + i * 2;
  return dtype == WANE_BF16 ? vf_from_bf16(h) : vf_from_f16(h);
}
VEC void vf_put(void *p, int dtype, int64_t i, vf v) {
  if (dtype == WANE_F32) vf_store((float *)p + i, v);
  else if (dtype == WANE_BF16) vf_to_bf16((char *)p + i * 2, v);
  else vf_to_f16((char *)p + i * 2, v);
}
/* The same for n values, 0 < n <= VW; the other lanes are 0 / not written. */
VEC vf vf_get_n(const void *p, int dtype, int64_t i, int n) {
  if (n >= VW) return vf_get(p, dtype, i);
  if (dtype == WANE_F32) return vf_load_n((const float *)p + i, n);
  uint16_t h[VW] = { 0 };
  memcpy(h, (const char *)p + i * 2, (size_t)n * 2);
  return vf_get(h, dtype, 0);
}
VEC void vf_put_n(void *p, int dtype, int64_t i, vf v, int n) {
  if (n >= VW) { vf_put(p, dtype, i, v); return; }
  if (dtype == WANE_F32) { vf_store_n((float *)p + i, v, n); return; }
  uint16_t h[VW];
  vf_put(h, dtype, 0, v);
  memcpy((char *)p + i * 2, h, (size_t)n * 2);
}
#ifndef VEC_LOAD_TRANSPOSED
/* r[k] = value k of each of VW rows, `stride` bytes apart. */
VEC void vec_load_transposed(vf r[VW], const char *p, int64_t stride, int dtype) {
  for (int i = 0; i < VW; i++) r[i] = vf_get(p + i * stride, dtype, 0);
  vec_transpose(r);
}
#endif
/* Lanes left at i of n: min(VW, n - i). */
VEC int vec_left(int64_t i, int64_t n) { return n - i < VW ? (int)(n - i) : VW; }
#endif
