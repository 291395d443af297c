/* float16.h: exact conversions between f32 and the two 16-bit floats, for every room. Internal.
 *
 * Narrowing rounds to nearest, ties to even, once; too large becomes infinity; NaN stays NaN (made quiet, upper payload bits
 * kept), as the F16C instructions do, so that scalar and vector kernels give the same bits. Widening is exact. */
#ifndef WANE_FLOAT16_H
#define WANE_FLOAT16_H
#include <stdint.h>
#include <string.h>
#include "../include/wane.h"

static inline uint32_t wane_float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

static inline float wane_bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

static inline float wane_bf16_to_f32(uint16_t h) { return wane_bits_float((uint32_t)h << 16); }

static inline uint16_t wane_f32_to_bf16(float x) {
  uint32_t u = wane_float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

static inline float wane_f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u)                                    /* infinity, NaN */
    return wane_bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13 | (rest > 0x7c00u ? 0x400000u : 0u));
  if (rest < 0x400u)                                      /* zero and subnormals: rest * 2^-24, exact */
    return wane_bits_float(sign | wane_float_bits((float)rest * 0x1p-24f));
  return wane_bits_float(sign | (rest + 0x1c000u) << 13); /* exponent bias 15 -> 127 */
}

static inline uint16_t wane_f32_to_f16(float x) {
  uint32_t u = wane_float_bits(x), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (rest >> 13 & 0x1ffu));
  if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and up round to infinity */
  if (rest < 0x38800000u) /* below 2^-14: 0.5 has an ulp of 2^-24, so adding it rounds to a subnormal's step */
    return (uint16_t)(sign | (wane_float_bits(wane_bits_float(rest) + 0.5f) - 0x3f000000u));
  rest += 0xfffu + (rest >> 13 & 1u);
  return (uint16_t)(sign | (rest - 0x38000000u) >> 13);
}

/* Element i of an array of f32, f16 or bf16, widened. The array may be unaligned. */
static inline float wane_float_at(const void *x, int dtype, int64_t i) {
  uint16_t h;
  float f;
  if (dtype == WANE_F32) {
    memcpy(&f, (const char *)x + i * 4, 4);
    return f;
  }
  memcpy(&h, (const char *)x + i * 2, 2);
  return dtype == WANE_F16 ? wane_f16_to_f32(h) : wane_bf16_to_f32(h);
}

/* Stores v as element i of an array of f32, f16 or bf16, rounded once. */
static inline void wane_float_put(void *y, int dtype, int64_t i, float v) {
  if (dtype == WANE_F32) {
    memcpy((char *)y + i * 4, &v, 4);
    return;
  }
  uint16_t h = dtype == WANE_F16 ? wane_f32_to_f16(v) : wane_f32_to_bf16(v);
  memcpy((char *)y + i * 2, &h, 2);
}
#endif
