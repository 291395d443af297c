/* gguf_blocks_iq.h: GGUF's kinds whose values come out of tables: IQ1 to IQ4, the ternary TQ kinds, MXFP4 and NVFP4. Included by
 * gguf_blocks.h and brought to the form that it explains: whole numbers times factors.
 *
 * Layouts: ggml-common.h; values as gguf-py's quants.py gives them. The IQ1 kinds have factor * (point +- 1/8); eight times the sum is
 * a whole number and an eighth of the factor is exact, so the product is rounded the same. */
#ifndef WANE_GGUF_BLOCKS_IQ_H
#define WANE_GGUF_BLOCKS_IQ_H

static const int8_t gguf_iq4_values[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
static const int8_t gguf_fp4_values[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };  /* E2M1, doubled */

static inline uint16_t gguf_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static inline uint32_t gguf_u32(const uint8_t *p) { return gguf_u16(p) | (uint32_t)gguf_u16(p + 2) << 16; }

/* n/2 bytes of indices into a table of 16: the low nibbles first, then the high ones. */
static inline void gguf_look_up(const int8_t *table, const uint8_t *in, int n, int8_t *q) {
  for (int j = 0; j < n / 2; j++) q[j] = table[in[j] & 15], q[j + n / 2] = table[in[j] >> 4];
}

static inline void gguf_set_factors(wane_gguf_parts *out, int runs, float factor) {
  for (int r = 0; r < runs; r++) out->factor[r] = factor;
}

/* n coordinates of a point with the signs of a byte: bit j negates coordinate j. */
static inline void gguf_signed_point(const int8_t *point, int n, int signs, int8_t *q) {
  for (int j = 0; j < n; j++) q[j] = (int8_t)(signs >> j & 1 ? -point[j] : point[j]);
}

/* Seven stored sign bits; the eighth makes their number even. */
static inline int gguf_even_signs(uint32_t seven) {
  int s = (int)(seven & 127);
  return s | (0x6996 >> ((s ^ s >> 4) & 15) & 1) << 7;
}

/* ---------------------------------------------------------------- IQ4, MXFP4, NVFP4 */

/* 2^(e - 128), the half of an E8M0 scale: the table of values is doubled. Below the smallest normal number too. */
static inline float gguf_half_e8m0(uint8_t e) {
  uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* Half of an unsigned E4M3 scale (bias 7); bit 7 is not looked at, 0x7f is 0. */
static inline float gguf_half_e4m3(uint8_t x) {
  int e = x >> 3 & 15, m = x & 7;
  if (x == 0x7f) return 0;
  return e ? (float)(8 + m) * gguf_half_e8m0((uint8_t)(e + 117)) : (float)m * 0x1p-10f;
}

/* f16 d, nibbles u8[16] */
static inline void gguf_split_iq4_nl(const uint8_t *in, wane_gguf_parts *out) {
  out->factor[0] = gguf_half(in);
  gguf_look_up(gguf_iq4_values, in + 2, 32, out->q);
}

/* f16 d, upper bits of eight scales u16, lower nibbles u8[4], nibbles u8[128] */
static inline void gguf_split_iq4_xs(const uint8_t *in, wane_gguf_parts *out) {
  float d = gguf_half(in);
  for (int j = 0; j < 8; j++) {
    int scale = (in[4 + j / 2] >> (4 * (j % 2)) & 15) | (gguf_u16(in + 2) >> (2 * j) & 3) << 4;
    out->factor[j] = d * (float)(scale - 32);
    gguf_look_up(gguf_iq4_values, in + 8 + 16 * j, 32, out->q + 32 * j);
  }
}

/* E8M0 scale u8, nibbles u8[16] */
static inline void gguf_split_mxfp4(const uint8_t *in, wane_gguf_parts *out) {
  out->factor[0] = gguf_half_e8m0(in[0]);
  gguf_look_up(gguf_fp4_values, in + 1, 32, out->q);
}

/* E4M3 scales u8[4], nibbles u8[32]: a scale for 16 values */
static inline void gguf_split_nvfp4(const uint8_t *in, wane_gguf_parts *out) {
  for (int j = 0; j < 4; j++) {
    out->factor[j] = gguf_half_e4m3(in[j]);
    gguf_look_up(gguf_fp4_values, in + 4 + 8 * j, 16, out->q + 16 * j);
  }
}

/* ---------------------------------------------------------------- ternary */

/* Base 3, five digits a byte (four in the last 4 bytes), stored as ceil(number * 256 / 243): the upper byte of three times it is the
 * first digit. u8[48], u8[4], f16 d */
static inline void gguf_split_tq1(const uint8_t *in, wane_gguf_parts *out) {
  static const uint8_t power[5] = { 1, 3, 9, 27, 81 };
  static const struct { uint8_t at, bytes, digits; } part[3] = { { 0, 32, 5 }, { 32, 16, 5 }, { 48, 4, 4 } };
  int8_t *q = out->q;
  for (int p = 0; p < 3; p++)
    for (int n = 0; n < part[p].digits; n++)
      for (int j = 0; j < part[p].bytes; j++) *q++ = (int8_t)(((uint8_t)(in[part[p].at + j] * power[n]) * 3 >> 8) - 1);
  gguf_set_factors(out, 8, gguf_half(in + 52));
}

/* Bit pairs u8[64], f16 d */
static inline void gguf_split_tq2(const uint8_t *in, wane_gguf_parts *out) {
  for (int half = 0; half < 2; half++)
    for (int pair = 0; pair < 4; pair++)
      for (int j = 0; j < 32; j++) out->q[half * 128 + pair * 32 + j] = (int8_t)((in[half * 32 + j] >> (2 * pair) & 3) - 1);
  gguf_set_factors(out, 8, gguf_half(in + 64));
}

/* ---------------------------------------------------------------- IQ1 */

/* Eight values: eight times (point +- 1/8). */
static inline void gguf_iq1_point(int index, int minus, int8_t *q) {
  const int8_t *point = wane_gguf_grid.iq1[index];
  for (int j = 0; j < 8; j++) q[j] = (int8_t)(8 * point[j] + (minus ? -1 : 1));
}

/* f16 d, lower index bits u8[32], u16[8]: three upper bits of four indices, a scale, the sign of the eighth */
static inline void gguf_split_iq1_s(const uint8_t *in, wane_gguf_parts *out) {
  float d = gguf_half(in);
  for (int j = 0; j < 8; j++) {
    int high = gguf_u16(in + 34 + 2 * j);
    out->factor[j] = d * (float)(2 * (high >> 12 & 7) + 1) * 0.125f;
    for (int l = 0; l < 4; l++) gguf_iq1_point(in[2 + 4 * j + l] | (high >> (3 * l) & 7) << 8, high >> 15, out->q + 32 * j + 8 * l);
  }
}

/* lower index bits u8[32], u8[16]: three upper bits and a sign for two indices, u16[4]: four scales of three bits, and in each upper
 * nibble a quarter of the f16 d */
static inline void gguf_split_iq1_m(const uint8_t *in, wane_gguf_parts *out) {
  const uint8_t *scales = in + 48;
  uint16_t bits = 0;
  for (int j = 0; j < 4; j++) bits = (uint16_t)(bits | gguf_u16(scales + 2 * j) >> 12 << (4 * j));
  float d = wane_float_at(&bits, WANE_F16, 0);
  for (int j = 0; j < 16; j++) {
    out->factor[j] = d * (float)(2 * (gguf_u16(scales + j / 4 * 2) >> (3 * (j % 4)) & 7) + 1) * 0.125f;
    for (int l = 0; l < 2; l++) {
      int high = in[32 + j] >> (4 * l);
      gguf_iq1_point(in[2 * j + l] | (high & 7) << 8, high & 8, out->q + 16 * j + 8 * l);
    }
  }
}

/* ---------------------------------------------------------------- IQ2, IQ3 */

/* f16 d, eight times u8[4] indices and u32: four times seven signs, a scale */
static inline void gguf_split_iq2_xxs(const uint8_t *in, wane_gguf_parts *out) {
  float d = gguf_half(in);
  for (int j = 0; j < 8; j++) {
    const uint8_t *index = in + 2 + 8 * j;
    uint32_t rest = gguf_u32(index + 4);
    out->factor[j] = d * (0.5f + (float)(rest >> 28)) * 0.25f;
    for (int l = 0; l < 4; l++) gguf_signed_point(wane_gguf_grid.iq2_xxs[index[l]], 8, gguf_even_signs(rest >> (7 * l)), out->q + 32 * j + 8 * l);
  }
}

/* Scales of the IQ2 kinds with one for 16 values: nibbles u8[8]. */
static inline void gguf_scales_iq2(float d, const uint8_t *in, wane_gguf_parts *out) {
  for (int j = 0; j < 16; j++) out->factor[j] = d * (0.5f + (float)(in[j / 2] >> (4 * (j % 2)) & 15)) * 0.25f;
}

/* f16 d, u16[32]: an index of 9 bits and seven signs, scales u8[8] */
static inline void gguf_split_iq2_xs(const uint8_t *in, wane_gguf_parts *out) {
  gguf_scales_iq2(gguf_half(in), in + 66, out);
  for (int j = 0; j < 32; j++) {
    int v = gguf_u16(in + 2 + 2 * j);
    gguf_signed_point(wane_gguf_grid.iq2_xs[v & 511], 8, gguf_even_signs((uint32_t)v >> 9), out->q + 8 * j);
  }
}

/* f16 d, lower index bits u8[32], signs u8[32], upper index bits u8[8], scales u8[8] */
static inline void gguf_split_iq2_s(const uint8_t *in, wane_gguf_parts *out) {
  gguf_scales_iq2(gguf_half(in), in + 74, out);
  for (int j = 0; j < 32; j++) {
    int index = in[2 + j] | (in[66 + j / 4] >> (2 * (j % 4)) & 3) << 8;
    gguf_signed_point(wane_gguf_grid.iq2_s[index], 8, in[34 + j], out->q + 8 * j);
  }
}

/* f16 d, indices u8[64], u32[8]: four times seven signs, a scale */
static inline void gguf_split_iq3_xxs(const uint8_t *in, wane_gguf_parts *out) {
  float d = gguf_half(in);
  for (int j = 0; j < 8; j++) {
    uint32_t rest = gguf_u32(in + 66 + 4 * j);
    out->factor[j] = d * (0.5f + (float)(rest >> 28)) * 0.5f;
    for (int l = 0; l < 8; l++) {
      int signs = gguf_even_signs(rest >> (7 * (l / 2))) >> (4 * (l % 2));
      gguf_signed_point(wane_gguf_grid.iq3_xxs[in[2 + 8 * j + l]], 4, signs, out->q + 32 * j + 4 * l);
    }
  }
}

/* f16 d, lower index bits u8[64], the ninth bits u8[8], signs u8[32], scales: nibbles u8[4] */
static inline void gguf_split_iq3_s(const uint8_t *in, wane_gguf_parts *out) {
  float d = gguf_half(in);
  for (int j = 0; j < 8; j++) {
    out->factor[j] = d * (float)(1 + 2 * (in[106 + j / 2] >> (4 * (j % 2)) & 15));
    for (int l = 0; l < 8; l++) {
      int index = in[2 + 8 * j + l] | (in[66 + j] >> l & 1) << 8, signs = in[74 + 4 * j + l / 2] >> (4 * (l % 2));
      gguf_signed_point(wane_gguf_grid.iq3_s[index], 4, signs, out->q + 32 * j + 4 * l);
    }
  }
}

/* Splits a block of any of these kinds. */
static inline void gguf_split_table(int dtype, const uint8_t *in, wane_gguf_parts *out) {
  for (int r = 0; r < 16; r++) out->shift[r] = -0.0f;
  switch (dtype) {
    case WANE_IQ4_NL: gguf_split_iq4_nl(in, out); break;
    case WANE_IQ4_XS: gguf_split_iq4_xs(in, out); break;
    case WANE_MXFP4: gguf_split_mxfp4(in, out); break;
    case WANE_NVFP4: gguf_split_nvfp4(in, out); break;
    case WANE_TQ1_0: gguf_split_tq1(in, out); break;
    case WANE_TQ2_0: gguf_split_tq2(in, out); break;
    case WANE_IQ1_S: gguf_split_iq1_s(in, out); break;
    case WANE_IQ1_M: gguf_split_iq1_m(in, out); break;
    case WANE_IQ2_XXS: gguf_split_iq2_xxs(in, out); break;
    case WANE_IQ2_XS: gguf_split_iq2_xs(in, out); break;
    case WANE_IQ2_S: gguf_split_iq2_s(in, out); break;
    case WANE_IQ3_XXS: gguf_split_iq3_xxs(in, out); break;
    default: gguf_split_iq3_s(in, out);
  }
}
#endif
