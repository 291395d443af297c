/* gguf_simd.h: GGUF blocks -> f32 with vectors; a part of quant_simd.h, which brings the primitives. gguf_split.h takes blocks apart.
 * The bits are those of gguf_blocks.h: an integer takes its offset first, and product and shift round one after the other. */
#ifndef WANE_GGUF_SIMD_H
#define WANE_GGUF_SIMD_H
#include "gguf_blocks.h"
#include "gguf_split.h"

/* What the unsigned integers of a kind are too large by. */
VEC int gguf_offset(const int kind) {
  return kind == WANE_Q4_0 ? 8 : kind == WANE_Q5_0 ? 16 : kind == WANE_Q3_K ? 4 : kind == WANE_Q6_K ? 32 : 0;
}
VEC int gguf_has_shift(const int kind) {
  return kind == WANE_Q4_1 || kind == WANE_Q5_1 || kind == WANE_Q2_K || kind == WANE_Q4_K || kind == WANE_Q5_K;
}

/* 32 integers of runs of `run` values -> out. Factors and shifts of those runs. */
VEC void gguf_unit(const int kind, __m256i q, const int run, const float *factor, const float *shift, float *out) {
  uint8_t byte[32];
  _mm256_storeu_si256((__m256i *)byte, q);
#pragma GCC unroll 4
  for (int k = 0; k < 32 / VW; k++) {
    vi v = quant_bytes(byte, k);
    if (kind == WANE_Q8_0) v = vi_sra(vi_sll(v, 24), 24);
    else if (gguf_offset(kind)) v = vi_sub(v, vi_set1(gguf_offset(kind)));
    vf value = vf_mul(vf_from_int(v), vf_set1(factor[k * VW / run]));
    if (gguf_has_shift(kind)) value = vf_add(value, vf_set1(shift[k * VW / run]));
    vf_store(out + k * VW, value);
  }
}

/* One block. */
VEC void gguf_vector_decode(const int kind, const uint8_t *in, float *out) {
  float factor[16], shift[16];
  if (kind <= WANE_Q8_0) {
    factor[0] = half_at(in);
    if (gguf_has_shift(kind)) shift[0] = half_at(in + 2);
    gguf_unit(kind, small_values(kind, in), 32, factor, shift, out);
    return;
  }
  const int run = kind == WANE_Q4_K || kind == WANE_Q5_K ? 32 : 16;
  __m256 f[2], s[2];
  gguf_factors(kind, in, f, s);
  for (int k = 0; k < 32 / run; k++) {
    _mm256_storeu_ps(factor + 8 * k, f[k]);
    if (gguf_has_shift(kind)) _mm256_storeu_ps(shift + 8 * k, s[k]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) gguf_unit(kind, gguf_values(kind, in, j), run, factor + 32 / run * j, shift + 32 / run * j, out + 32 * j);
}

/* Values [first, first + count) of consecutive blocks. */
static void gguf_range(int dtype, const uint8_t *blocks, int64_t first, int64_t count, float *out) {
  switch (dtype) { /* a constant kind in each call, so that each gets code of its own */
#define KIND(K) case K: gguf_decode_range(K, blocks, first, count, out, gguf_vector_decode); break;
    KIND(WANE_Q4_0) KIND(WANE_Q4_1) KIND(WANE_Q5_0) KIND(WANE_Q5_1) KIND(WANE_Q8_0)
    KIND(WANE_Q2_K) KIND(WANE_Q3_K) KIND(WANE_Q4_K) KIND(WANE_Q5_K) KIND(WANE_Q6_K)
#undef KIND
    default: gguf_decode_range(dtype, blocks, first, count, out, gguf_decode);      /* points of a table: the reference's loops */
  }
}
#endif
