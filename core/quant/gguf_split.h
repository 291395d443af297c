/* gguf_split.h: 256 values of a GGUF row as small integers with a factor and a shift for each run of them (AVX2):
 *
 *   value = factor[j / run] * q[j] + shift[j / run]
 *
 * so that one dot product serves all kinds: sum x * value = factor * (sum x * q) + shift * (sum x), run by run. The integers are
 * unsigned bytes, which widen with fewer instructions: a kind's offset (8 of Q4_0, 32 of Q6_K) is part of the shift. Q8_0 alone has
 * signed bytes and no shift. Factors are those of quant's gguf_blocks.h. Layouts: ggml-common.h. `kind` and `j` are constants wherever these are used: each
 * kind's code is specialised, and nothing passes through memory. */
#ifndef WANE_GGUF_SPLIT_H
#define WANE_GGUF_SPLIT_H
#include <immintrin.h>
#include <string.h>
#include "../include/wane.h"

#define SPLIT static inline __attribute__((always_inline))

SPLIT uint32_t load32(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}

SPLIT uint64_t load64(const uint8_t *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}

SPLIT float half_at(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return _cvtsh_ss(h);
}

SPLIT __m256i load256(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* (v >> shift) & mask in every byte; a negative shift goes left. Bits of a neighbour are masked away. */
SPLIT __m256i field(__m256i v, const int shift, const int mask) {
  return _mm256_and_si256(shift < 0 ? _mm256_slli_epi16(v, -shift) : _mm256_srli_epi16(v, shift), _mm256_set1_epi8((char)mask));
}

/* ---------------------------------------------------------------- blocks of 32 */

SPLIT int small_bytes(const int kind) {
  return kind == WANE_Q4_0 ? 18 : kind == WANE_Q4_1 ? 20 : kind == WANE_Q5_0 ? 22 : kind == WANE_Q5_1 ? 24 : 34;
}

/* 16 bytes of nibbles as 32 values: low nibbles, then high ones. */
SPLIT __m256i nibbles32(const uint8_t *p) {
  __m128i v = _mm_loadu_si128((const __m128i *)p);
  return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_srli_epi16(v, 4), 1), _mm256_set1_epi8(15));
}

/* 16 in the bytes whose bit is set in 4 bytes of bits. */
SPLIT __m256i fifth32(const uint8_t *p) {
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bits = _mm256_set1_epi64x((long long)0x8040201008040201ull);
  __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)load32(p)), spread), bits);
  return _mm256_and_si256(_mm256_cmpeq_epi8(v, bits), _mm256_set1_epi8(16));
}

SPLIT __m256i small_values(const int kind, const uint8_t *p) {
  switch (kind) {
    case WANE_Q4_0: return nibbles32(p + 2);
    case WANE_Q4_1: return nibbles32(p + 4);
    case WANE_Q5_0: return _mm256_or_si256(nibbles32(p + 6), fifth32(p + 2));
    case WANE_Q5_1: return _mm256_or_si256(nibbles32(p + 8), fifth32(p + 4));
    default: return load256(p + 2);
  }
}

/* The f16 at the start of eight blocks, `bytes` apart, as f32. (Each load takes two bytes more; they belong to the block.) */
SPLIT __m256 halves8(const uint8_t *p, const int bytes) {
  __m128i v[8];
#pragma GCC unroll 8
  for (int b = 0; b < 8; b++) v[b] = _mm_cvtsi32_si128((int)load32(p + b * bytes));
  __m128i low = _mm_unpacklo_epi32(_mm_unpacklo_epi16(v[0], v[1]), _mm_unpacklo_epi16(v[2], v[3]));
  __m128i high = _mm_unpacklo_epi32(_mm_unpacklo_epi16(v[4], v[5]), _mm_unpacklo_epi16(v[6], v[7]));
  return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
}

/* ---------------------------------------------------------------- blocks of 256 */

/* Eight bytes (unsigned) less `offset` as floats, times f. */
SPLIT __m256 scaled8(uint64_t bytes, int offset, float f) {
  __m256i v = _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)), _mm256_set1_epi32(offset));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(f));
}

/* The 6-bit scales and minimums of Q4_K and Q5_K, four bytes at a time (get_scale_min_k4). */
SPLIT void factors_k4(const uint8_t *in, __m256 *factor, __m256 *shift) {
  uint32_t a = load32(in + 4), b = load32(in + 8), c = load32(in + 12);
  uint64_t scale = (uint64_t)((c & 0x0f0f0f0fu) | (a >> 6 & 0x03030303u) << 4) << 32 | (a & 0x3f3f3f3fu);
  uint64_t minimum = (uint64_t)((c >> 4 & 0x0f0f0f0fu) | (b >> 6 & 0x03030303u) << 4) << 32 | (b & 0x3f3f3f3fu);
  *factor = scaled8(scale, 0, half_at(in));
  *shift = scaled8(minimum, 0, -half_at(in + 2));
}

/* Q3_K: low four bits of 16 scales, then their high pairs. */
SPLIT void factors_q3(const uint8_t *in, __m256 *factor) {
  uint32_t high = load32(in + 104);
  uint64_t low = load64(in + 96);
  float d = half_at(in + 108);
  for (int k = 0; k < 2; k++) {
    uint64_t top = (uint64_t)(high >> (4 * k + 2) & 0x03030303u) << 32 | (high >> (4 * k) & 0x03030303u);
    factor[k] = scaled8((low >> (4 * k) & 0x0f0f0f0f0f0f0f0full) | top << 4, 32, d);
  }
}

/* ---------------------------------------------------------------- all kinds */

/* Values 32 j … 32 j + 31 of the group at `in`, as bytes. */
SPLIT __m256i gguf_values(const int kind, const uint8_t *in, const int j) {
  const int half = j / 4, pair = j % 4;
  switch (kind) {
    case WANE_Q2_K: return field(load256(in + 16 + 32 * half), 2 * pair, 3);
    case WANE_Q3_K: return _mm256_or_si256(field(load256(in + 32 + 32 * half), 2 * pair, 3), field(load256(in), j - 2, 4));
    case WANE_Q4_K: return field(load256(in + 16 + 32 * (j / 2)), 4 * (j % 2), 15);
    case WANE_Q5_K: return _mm256_or_si256(field(load256(in + 48 + 32 * (j / 2)), 4 * (j % 2), 15), field(load256(in + 16), j - 4, 16));
    case WANE_Q6_K:
      return _mm256_or_si256(field(load256(in + 64 * half + 32 * (pair % 2)), 4 * (pair / 2), 15), field(load256(in + 128 + 32 * half), 2 * pair - 4, 0x30));
    default: return small_values(kind, in + j * small_bytes(kind));
  }
}

/* Factors and shifts of the group's runs, eight a vector. */
SPLIT void gguf_factors(const int kind, const uint8_t *in, __m256 *factor, __m256 *shift) {
  switch (kind) {
    case WANE_Q2_K:
      for (int k = 0; k < 2; k++) {
        factor[k] = scaled8(load64(in + 8 * k) & 0x0f0f0f0f0f0f0f0full, 0, half_at(in + 80));
        shift[k] = scaled8(load64(in + 8 * k) >> 4 & 0x0f0f0f0f0f0f0f0full, 0, -half_at(in + 82));
      }
      break;
    case WANE_Q3_K:
      factors_q3(in, factor);
      for (int k = 0; k < 2; k++) shift[k] = _mm256_mul_ps(factor[k], _mm256_set1_ps(-4));
      break;
    case WANE_Q4_K:
    case WANE_Q5_K: factors_k4(in, factor, shift); break;
    case WANE_Q6_K:
      for (int k = 0; k < 2; k++) {
        __m256i scale = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(in + 192 + 8 * k)));
        factor[k] = _mm256_mul_ps(_mm256_set1_ps(half_at(in + 208)), _mm256_cvtepi32_ps(scale));
        shift[k] = _mm256_mul_ps(factor[k], _mm256_set1_ps(-32));
      }
      break;
    default:
      factor[0] = halves8(in, small_bytes(kind));
      if (kind == WANE_Q4_1 || kind == WANE_Q5_1) shift[0] = halves8(in + 2, small_bytes(kind));
      else if (kind != WANE_Q8_0) shift[0] = _mm256_mul_ps(factor[0], _mm256_set1_ps(kind == WANE_Q4_0 ? -8 : -16));
  }
}
#undef SPLIT
#endif
