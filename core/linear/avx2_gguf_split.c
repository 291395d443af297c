/* avx2_gguf_split.c: GGUF blocks to integers, factors and shifts (gguf_split.h) with AVX2. */
#include <immintrin.h>
#include <string.h>
#include "gguf_split.h"

static inline uint32_t load32(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}

static inline float half_at(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return _cvtsh_ss(h);
}

static inline __m256i load256(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void store256(void *p, __m256i v) { _mm256_store_si256((__m256i *)p, v); }

/* (v >> shift) & mask in every byte; bits of a neighbour are masked away. */
#define FIELD(v, shift, mask) _mm256_and_si256(_mm256_srli_epi16(v, shift), _mm256_set1_epi8(mask))

/* ---------------------------------------------------------------- blocks of 32 */

/* 16 bytes of nibbles as 32 values: low nibbles, then high ones. */
static inline __m256i nibbles32(const uint8_t *p) {
  __m128i v = _mm_loadu_si128((const __m128i *)p);
  return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_srli_epi16(v, 4), 1), _mm256_set1_epi8(15));
}

/* 16 in the bytes whose bit is set in 4 bytes of bits. */
static inline __m256i fifth32(const uint8_t *p) {
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bits = _mm256_set1_epi64x((long long)0x8040201008040201ull);
  __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)load32(p)), spread), bits);
  return _mm256_and_si256(_mm256_cmpeq_epi8(v, bits), _mm256_set1_epi8(16));
}

/* The values of one block of a kind. */
static inline __attribute__((always_inline)) __m256i small_values(const int kind, const uint8_t *p) {
  switch (kind) {
    case WANE_Q4_0: return _mm256_sub_epi8(nibbles32(p + 2), _mm256_set1_epi8(8));
    case WANE_Q4_1: return nibbles32(p + 4);
    case WANE_Q5_0: return _mm256_sub_epi8(_mm256_or_si256(nibbles32(p + 6), fifth32(p + 2)), _mm256_set1_epi8(16));
    case WANE_Q5_1: return _mm256_or_si256(nibbles32(p + 8), fifth32(p + 4));
    default: return load256(p + 2);
  }
}

/* `bytes` a block. Factors (and shifts) are converted eight at a time. */
static inline __attribute__((always_inline)) void split_small(const int kind, const int bytes, const uint8_t *in, int blocks, wane_gguf_group *out) {
  const int shifted = kind == WANE_Q4_1 || kind == WANE_Q5_1;
  _Alignas(16) uint16_t d[8] = { 0 }, m[8] = { 0 };
  for (int b = 0; b < blocks; b++, in += bytes) {
    memcpy(d + b, in, 2);
    if (shifted) memcpy(m + b, in + 2, 2);
    store256(out->q + 32 * b, small_values(kind, in));
  }
  for (int b = blocks; b < 8; b++) store256(out->q + 32 * b, _mm256_setzero_si256());
  _mm256_store_ps(out->factor, _mm256_cvtph_ps(_mm_load_si128((const __m128i *)d)));
  if (shifted) _mm256_store_ps(out->shift, _mm256_cvtph_ps(_mm_load_si128((const __m128i *)m)));
}

static void split_q4_0(const uint8_t *in, int blocks, wane_gguf_group *out) { split_small(WANE_Q4_0, 18, in, blocks, out); }
static void split_q4_1(const uint8_t *in, int blocks, wane_gguf_group *out) { split_small(WANE_Q4_1, 20, in, blocks, out); }
static void split_q5_0(const uint8_t *in, int blocks, wane_gguf_group *out) { split_small(WANE_Q5_0, 22, in, blocks, out); }
static void split_q5_1(const uint8_t *in, int blocks, wane_gguf_group *out) { split_small(WANE_Q5_1, 24, in, blocks, out); }
static void split_q8_0(const uint8_t *in, int blocks, wane_gguf_group *out) { split_small(WANE_Q8_0, 34, in, blocks, out); }

/* ---------------------------------------------------------------- blocks of 256 */

/* Eight bytes (unsigned) as floats, times f. */
static inline __m256 scaled8(uint64_t bytes, float f) {
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes))), _mm256_set1_ps(f));
}

/* The 6-bit scales and minimums of Q4_K and Q5_K, four bytes at a time (get_scale_min_k4). */
static inline void scales_k4(const uint8_t *in, wane_gguf_group *out) {
  float d = half_at(in), dmin = half_at(in + 2);
  uint32_t a = load32(in + 4), b = load32(in + 8), c = load32(in + 12);
  uint64_t scale = (uint64_t)((c & 0x0f0f0f0fu) | (a >> 6 & 0x03030303u) << 4) << 32 | (a & 0x3f3f3f3fu);
  uint64_t minimum = (uint64_t)((c >> 4 & 0x0f0f0f0fu) | (b >> 6 & 0x03030303u) << 4) << 32 | (b & 0x3f3f3f3fu);
  _mm256_store_ps(out->factor, scaled8(scale, d));
  _mm256_store_ps(out->shift, scaled8(minimum, -dmin));
}

static void split_q4_k(const uint8_t *in, int blocks, wane_gguf_group *out) {
  (void)blocks;
  scales_k4(in, out);
  for (int t = 0; t < 4; t++) {
    __m256i v = load256(in + 16 + 32 * t);
    store256(out->q + 64 * t, FIELD(v, 0, 15));
    store256(out->q + 64 * t + 32, FIELD(v, 4, 15));
  }
}

static void split_q5_k(const uint8_t *in, int blocks, wane_gguf_group *out) {
  (void)blocks;
  scales_k4(in, out);
  __m256i fifth = load256(in + 16);
  const __m256i sixteen = _mm256_set1_epi8(16);
  for (int t = 0; t < 4; t++) {
    __m256i v = load256(in + 48 + 32 * t);
    __m256i low = _mm256_and_si256(_mm256_slli_epi16(fifth, 4), sixteen), high = _mm256_and_si256(_mm256_slli_epi16(fifth, 3), sixteen);
    store256(out->q + 64 * t, _mm256_or_si256(FIELD(v, 0, 15), low));
    store256(out->q + 64 * t + 32, _mm256_or_si256(FIELD(v, 4, 15), high));
    fifth = _mm256_srli_epi16(fifth, 2);
  }
}

static void split_q6_k(const uint8_t *in, int blocks, wane_gguf_group *out) {
  (void)blocks;
  const __m256i pair = _mm256_set1_epi8(0x30), offset = _mm256_set1_epi8(32);
  for (int half = 0; half < 2; half++) {
    __m256i a = load256(in + 64 * half), b = load256(in + 64 * half + 32), h = load256(in + 128 + 32 * half);
    int8_t *q = out->q + 128 * half;
    store256(q, _mm256_sub_epi8(_mm256_or_si256(FIELD(a, 0, 15), _mm256_and_si256(_mm256_slli_epi16(h, 4), pair)), offset));
    store256(q + 32, _mm256_sub_epi8(_mm256_or_si256(FIELD(b, 0, 15), _mm256_and_si256(_mm256_slli_epi16(h, 2), pair)), offset));
    store256(q + 64, _mm256_sub_epi8(_mm256_or_si256(FIELD(a, 4, 15), _mm256_and_si256(h, pair)), offset));
    store256(q + 96, _mm256_sub_epi8(_mm256_or_si256(FIELD(b, 4, 15), _mm256_and_si256(_mm256_srli_epi16(h, 2), pair)), offset));
  }
  __m256 d = _mm256_set1_ps(half_at(in + 208));
  __m128i scales = _mm_loadu_si128((const __m128i *)(in + 192));
  _mm256_store_ps(out->factor, _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales))));
  _mm256_store_ps(out->factor + 8, _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(scales, 8)))));
}

static void split_q2_k(const uint8_t *in, int blocks, wane_gguf_group *out) {
  (void)blocks;
  float d = half_at(in + 80), dmin = half_at(in + 82);
  for (int part = 0; part < 2; part++) {
    uint64_t bytes;
    memcpy(&bytes, in + 8 * part, 8);
    _mm256_store_ps(out->factor + 8 * part, scaled8(bytes & 0x0f0f0f0f0f0f0f0full, d));
    _mm256_store_ps(out->shift + 8 * part, scaled8(bytes >> 4 & 0x0f0f0f0f0f0f0f0full, -dmin));
    __m256i v = load256(in + 16 + 32 * part);
    int8_t *q = out->q + 128 * part;
    store256(q, FIELD(v, 0, 3));
    store256(q + 32, FIELD(v, 2, 3));
    store256(q + 64, FIELD(v, 4, 3));
    store256(q + 96, FIELD(v, 6, 3));
  }
}

/* The third bit of Q3_K comes from bit 4 * half + pair of the mask; a bit of 0 takes 4 off. */
static void split_q3_k(const uint8_t *in, int blocks, wane_gguf_group *out) {
  (void)blocks;
  __m256i mask = load256(in);
  const __m256i four = _mm256_set1_epi8(4);
  for (int half = 0; half < 2; half++) {
    __m256i v = load256(in + 32 + 32 * half);
    for (int pair = 0; pair < 4; pair++) {
      __m256i third = _mm256_and_si256(_mm256_slli_epi16(mask, 2), four);
      store256(out->q + 128 * half + 32 * pair, _mm256_sub_epi8(_mm256_or_si256(FIELD(v, 0, 3), third), four));
      v = _mm256_srli_epi16(v, 2);
      mask = _mm256_srli_epi16(mask, 1);
    }
  }
  uint32_t high = load32(in + 104);
  uint64_t low;
  memcpy(&low, in + 96, 8);
  float d = half_at(in + 108);
  for (int part = 0; part < 2; part++) {
    uint64_t top = (uint64_t)(high >> (4 * part + 2) & 0x03030303u) << 32 | (high >> (4 * part) & 0x03030303u);
    uint64_t scale = (low >> (4 * part) & 0x0f0f0f0f0f0f0f0full) | top << 4;
    __m256i s = _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)scale)), _mm256_set1_epi32(32));
    _mm256_store_ps(out->factor + 8 * part, _mm256_mul_ps(_mm256_cvtepi32_ps(s), _mm256_set1_ps(d)));
  }
}

wane_gguf_splitter wane_gguf_splitter_avx2(int dtype) {
  switch (dtype) {
    case WANE_Q4_0: return split_q4_0;
    case WANE_Q4_1: return split_q4_1;
    case WANE_Q5_0: return split_q5_0;
    case WANE_Q5_1: return split_q5_1;
    case WANE_Q8_0: return split_q8_0;
    case WANE_Q2_K: return split_q2_k;
    case WANE_Q3_K: return split_q3_k;
    case WANE_Q4_K: return split_q4_k;
    case WANE_Q5_K: return split_q5_k;
    default: return split_q6_k;
  }
}
