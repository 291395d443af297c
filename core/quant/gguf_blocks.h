/* gguf_blocks.h: GGUF blocks -> f32 in portable C, and the walk over blocks that the vector decoders (gguf_simd.h) share.
 *
 * Every kind is brought to one form first: 32 or 256 small integers, and a factor and a shift for each 16 or 32 of them;
 * value = factor * integer + shift. A kind without minimum has the shift -0.0, which changes no value, not even a zero's sign.
 * Layouts: ggml-common.h (block_q4_0 …); values as dequantize_row_* of ggml-quants.c and gguf-py quants.py give them. */
#ifndef WANE_GGUF_BLOCKS_H
#define WANE_GGUF_BLOCKS_H
#include "tables.h"

typedef struct wane_gguf_parts {
  int8_t q[256];
  float factor[16], shift[16];     /* of each run of values */
} wane_gguf_parts;

static inline float gguf_half(const uint8_t *p) { return wane_float_at(p, WANE_F16, 0); }

#include "gguf_blocks_iq.h"

/* Two halves of n/2 values: low nibbles first, then high ones. */
static inline void gguf_nibbles(const uint8_t *in, int n, int8_t *q) {
  for (int j = 0; j < n / 2; j++) q[j] = (int8_t)(in[j] & 15), q[j + n / 2] = (int8_t)(in[j] >> 4);
}

/* The fifth bits of a Q5_0 or Q5_1 block: bit j belongs to value j. */
static inline void gguf_fifth_bits(const uint8_t *in, int8_t *q) {
  for (int j = 0; j < 32; j++) q[j] = (int8_t)(q[j] | (in[j / 8] >> (j % 8) & 1) << 4);
}

/* 6-bit scales and minimums of Q4_K and Q5_K: eight of each in 12 bytes (get_scale_min_k4). */
static inline void gguf_scales_k4(const uint8_t *in, wane_gguf_parts *out) {
  float d = gguf_half(in), dmin = gguf_half(in + 2);
  const uint8_t *b = in + 4;
  for (int j = 0; j < 8; j++) {
    int scale = j < 4 ? b[j] & 63 : (b[j + 4] & 15) | (b[j - 4] >> 6) << 4;
    int minimum = j < 4 ? b[j + 4] & 63 : b[j + 4] >> 4 | (b[j] >> 6) << 4;
    out->factor[j] = d * (float)scale;
    out->shift[j] = -(dmin * (float)minimum);
  }
}

static inline void gguf_split_small(int dtype, const uint8_t *in, wane_gguf_parts *out) {
  int has_min = dtype == WANE_Q4_1 || dtype == WANE_Q5_1, offset = 0;
  out->factor[0] = gguf_half(in);
  out->shift[0] = has_min ? gguf_half(in + 2) : -0.0f;
  in += has_min ? 4 : 2;
  if (dtype == WANE_Q8_0) {
    memcpy(out->q, in, 32);
  } else if (dtype == WANE_Q4_0 || dtype == WANE_Q4_1) {
    gguf_nibbles(in, 32, out->q);
    offset = dtype == WANE_Q4_0 ? 8 : 0;
  } else {
    gguf_nibbles(in + 4, 32, out->q);
    gguf_fifth_bits(in, out->q);
    offset = dtype == WANE_Q5_0 ? 16 : 0;
  }
  for (int j = 0; j < 32; j++) out->q[j] = (int8_t)(out->q[j] - offset);
}

/* scales u8[16], q u8[64], f16 d, f16 dmin */
static inline void gguf_split_q2(const uint8_t *in, wane_gguf_parts *out) {
  float d = gguf_half(in + 80), dmin = gguf_half(in + 82);
  for (int j = 0; j < 16; j++) out->factor[j] = d * (float)(in[j] & 15), out->shift[j] = -(dmin * (float)(in[j] >> 4));
  for (int half = 0; half < 2; half++)
    for (int pair = 0; pair < 4; pair++)
      for (int j = 0; j < 32; j++) out->q[half * 128 + pair * 32 + j] = (int8_t)(in[16 + half * 32 + j] >> (2 * pair) & 3);
}

/* high bits u8[32], q u8[64], scales 6 bits x 16 in 12 bytes, f16 d. A high bit of 0 takes 4 off. */
static inline void gguf_split_q3(const uint8_t *in, wane_gguf_parts *out) {
  const uint8_t *scales = in + 96;
  float d = gguf_half(in + 108);
  for (int j = 0; j < 16; j++) {
    int low = j < 8 ? scales[j] & 15 : scales[j - 8] >> 4, high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
    out->factor[j] = d * (float)((low | high << 4) - 32);
    out->shift[j] = -0.0f;
  }
  for (int half = 0; half < 2; half++)
    for (int pair = 0; pair < 4; pair++)
      for (int j = 0; j < 32; j++) {
        int low = in[32 + half * 32 + j] >> (2 * pair) & 3, high = in[j] >> (4 * half + pair) & 1;
        out->q[half * 128 + pair * 32 + j] = (int8_t)(low - (high ? 0 : 4));
      }
}

/* f16 d, f16 dmin, scales [12], (Q5_K: fifth bits u8[32],) nibbles u8[128] */
static inline void gguf_split_q45(int dtype, const uint8_t *in, wane_gguf_parts *out) {
  gguf_scales_k4(in, out);
  const uint8_t *fifth = in + 16;
  in += dtype == WANE_Q5_K ? 48 : 16;
  for (int part = 0; part < 4; part++) gguf_nibbles(in + part * 32, 64, out->q + part * 64);
  if (dtype == WANE_Q5_K)
    for (int part = 0; part < 8; part++)
      for (int j = 0; j < 32; j++) out->q[part * 32 + j] = (int8_t)(out->q[part * 32 + j] | (fifth[j] >> part & 1) << 4);
}

/* low nibbles u8[128], high bit pairs u8[64], scales i8[16], f16 d */
static inline void gguf_split_q6(const uint8_t *in, wane_gguf_parts *out) {
  const int8_t *scales = (const int8_t *)in + 192;
  float d = gguf_half(in + 208);
  for (int j = 0; j < 16; j++) out->factor[j] = d * (float)scales[j], out->shift[j] = -0.0f;
  for (int half = 0; half < 2; half++) {
    const uint8_t *low = in + half * 64, *high = in + 128 + half * 32;
    int8_t *q = out->q + half * 128;
    gguf_nibbles(low, 128, q);
    for (int pair = 0; pair < 4; pair++)
      for (int j = 0; j < 32; j++) q[pair * 32 + j] = (int8_t)((q[pair * 32 + j] | (high[j] >> (2 * pair) & 3) << 4) - 32);
  }
}

/* Values of one block. */
static inline __attribute__((unused)) void gguf_decode(int dtype, const uint8_t *in, float *out) {
  wane_gguf_parts parts;
  int n = 256, run = 32;
  switch (dtype) {
    case WANE_Q2_K: gguf_split_q2(in, &parts); run = 16; break;
    case WANE_Q3_K: gguf_split_q3(in, &parts); run = 16; break;
    case WANE_Q4_K:
    case WANE_Q5_K: gguf_split_q45(dtype, in, &parts); break;
    case WANE_Q6_K: gguf_split_q6(in, &parts); run = 16; break;
    case WANE_Q4_0: case WANE_Q4_1: case WANE_Q5_0: case WANE_Q5_1: case WANE_Q8_0: gguf_split_small(dtype, in, &parts); n = 32; break;
    default:
      gguf_split_table(dtype, in, &parts);
      n = dtype == WANE_IQ4_NL || dtype == WANE_MXFP4 ? 32 : dtype == WANE_NVFP4 ? 64 : 256;
      if (dtype == WANE_NVFP4 || dtype == WANE_IQ1_M || dtype == WANE_IQ2_XS || dtype == WANE_IQ2_S) run = 16;
  }
  for (int r = 0; r < n / run; r++)
    for (int j = r * run; j < (r + 1) * run; j++) {
      float product = parts.factor[r] * (float)parts.q[j];
      out[j] = product + parts.shift[r];
    }
}

/* Values [first, first + count) of consecutive blocks, by a decoder of whole ones; a range may begin and end inside a block. */
static inline __attribute__((always_inline)) void gguf_decode_range(const int dtype, const uint8_t *blocks, int64_t first, int64_t count, float *out,
                                                                    void (*decode)(int, const uint8_t *, float *)) {
  const int n = dtype <= WANE_Q8_0 ? 32 : dtype <= WANE_Q6_K ? 256 : wane_gguf_block(dtype), bytes = wane_gguf_block_bytes(dtype);
  const uint8_t *in = blocks + first / n * bytes;
  int64_t skip = first % n;
  for (; count > 0; in += bytes, skip = 0) {
    int64_t take = n - skip < count ? n - skip : count;
    if (take == n) {
      decode(dtype, in, out);
    } else {
      float whole[256];
      decode(dtype, in, whole);
      memcpy(out, whole + skip, (size_t)take * sizeof(float));
    }
    count -= take, out += take;
  }
}
#endif
