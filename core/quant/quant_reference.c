/* quant_reference.c: the quantizers as the papers and kernels state them, one element at a time. Every vector twin must give the
 * same codes, scales and values; read this file to know what they compute. */
#include "kernels.h"
#include "tables.h"

/* max|x| of n elements from element i on. Compared as bit patterns: NaN counts as larger than infinity and stays visible. */
static float block_absmax(const void *x, int dtype, int64_t i, int64_t n) {
  uint32_t most = 0;
  for (int64_t j = 0; j < n; j++) {
    uint32_t bits = wane_float_bits(wane_float_at(x, dtype, i + j)) & 0x7fffffffu;
    if (bits > most) most = bits;
  }
  return wane_bits_float(most);
}

/* x / absmax in [-1, 1], rounded as block_mode says. */
static float scaled(float x, float absmax, float inverse, int mode) {
  return mode == WANE_BLOCK_USUAL ? x * inverse : (float)((double)x / (double)absmax);
}

/* ---- 4-bit ---- */

static int nf4_code(float s) {
  int code = 0;
  while (code < 15 && s > wane_nf4_thresholds[code]) code++;
  return code;
}

static int fp4_code(float s) {
  int rank = 0;
  while (rank < 7 && fabsf(s) > wane_fp4_thresholds[rank]) rank++;
  return wane_fp4_order[rank] | (s < 0.0f ? 8 : 0);
}

static void quantize_4bit(int kind, const void *x, int dtype, int64_t first, int64_t count, int bs, uint8_t *codes, float *absmax) {
  for (int64_t begin = 0; begin < count; begin += bs) {
    int64_t n = count - begin < bs ? count - begin : bs;
    float inverse, most = block_absmax(x, dtype, begin, n);
    int mode = wane_block_mode(most, &inverse);
    absmax[(first + begin) / bs] = most;
    for (int64_t j = begin; j < begin + n; j++) {
      int code = wane_code_of_zero(kind);
      if (mode != WANE_BLOCK_VOID) {
        float s = scaled(wane_float_at(x, dtype, j), most, inverse, mode);
        code = kind == WANE_NF4 ? nf4_code(s) : fp4_code(s);
      }
      uint8_t *byte = codes + (first + j) / 2;
      *byte = (first + j) % 2 == 0 ? (uint8_t)(code << 4 | wane_code_of_zero(kind)) : (uint8_t)((*byte & 0xf0) | code);
    }
  }
}

/* ---- blockwise 8-bit ---- */

/* Nearest code of a sorted map; an exact midpoint belongs to the even one of its two codes (csrc/kernels.cu dQuantize). */
static int nearest_code(const float *map, float s) {
  int low = 0, high = 255; /* the code lies in [low, high] */
  while (low < high) {
    int i = (low + high) / 2;
    float midpoint = (map[i] + map[i + 1]) * 0.5f;
    if (i % 2 == 0 ? s > midpoint : s >= midpoint) low = i + 1;
    else high = i;
  }
  return low;
}

static void quantize_8bit(int kind, const void *x, int dtype, int64_t first, int64_t count, int bs, uint8_t *codes, float *absmax) {
  const float *map = wane_dynamic_map(kind == WANE_BLOCK8);
  for (int64_t begin = 0; begin < count; begin += bs) {
    int64_t n = count - begin < bs ? count - begin : bs;
    float inverse, most = block_absmax(x, dtype, begin, n);
    int mode = wane_block_mode(most, &inverse);
    absmax[(first + begin) / bs] = most;
    for (int64_t j = begin; j < begin + n; j++)
      codes[first + j] = (uint8_t)(mode == WANE_BLOCK_VOID ? wane_code_of_zero(kind)
                                   : nearest_code(map, scaled(wane_float_at(x, dtype, j), most, inverse, mode)));
  }
}

/* ---- row-wise int8 ---- */

/* The weight is rounded to f16 first, as upstream does (autograd/_functions.py, csrc/kernels.cu kInt8VectorQuant). */
static void quantize_rows(const void *x, int dtype, int64_t rows, int64_t K, int8_t *codes, float *absmax) {
  for (int64_t r = 0; r < rows; r++) {
    uint32_t most = 0;
    for (int64_t k = 0; k < K; k++) {
      float v = wane_f16_to_f32(wane_f32_to_f16(wane_float_at(x, dtype, r * K + k)));
      uint32_t bits = wane_float_bits(v) & 0x7fffffffu;
      if (bits > most) most = bits;
    }
    absmax[r] = wane_bits_float(most);
    int usable = absmax[r] > 0.0f && !isinf(absmax[r]);
    float factor = usable ? 127.0f / absmax[r] : 0.0f;
    for (int64_t k = 0; k < K; k++) {
      float v = wane_f16_to_f32(wane_f32_to_f16(wane_float_at(x, dtype, r * K + k)));
      codes[r * K + k] = (int8_t)(usable ? lrintf(v * factor) : 0);
    }
  }
}

/* ---- dequantize ---- */

static void dequantize(const wane_qview *q, int64_t first, int64_t count, float *out) {
  const uint8_t *codes = q->codes;
  switch (q->dtype) {
    case WANE_NF4:
    case WANE_FP4: {
      const float *level = q->dtype == WANE_NF4 ? wane_nf4_levels : wane_fp4_levels;
      for (int64_t j = 0; j < count; j++) {
        int64_t e = first + j;
        out[j] = level[e % 2 == 0 ? codes[e / 2] >> 4 : codes[e / 2] & 15] * wane_scale_at(q, e / q->block_size);
      }
      break;
    }
    case WANE_BLOCK8:
    case WANE_BLOCK8U:
      for (int64_t j = 0; j < count; j++) {
        int64_t e = first + j;
        out[j] = wane_float_at(q->code, WANE_F32, codes[e]) * wane_scale_at(q, e / q->block_size);
      }
      break;
    case WANE_INT8: /* code * absmax / 127, rounded once: the product is exact in double */
      for (int64_t j = 0; j < count; j++) {
        int64_t e = first + j;
        out[j] = (float)((double)(int8_t)codes[e] * (double)wane_scale_at(q, e / q->cols) / 127.0);
      }
      break;
    case WANE_F32:
    case WANE_F16:
    case WANE_BF16:
      for (int64_t j = 0; j < count; j++) out[j] = wane_float_at(codes, q->dtype, first + j);
      break;
    default: wane_gguf_range_generic(q->dtype, codes, first, count, out);
  }
}

static void narrow(const float *x, int64_t n, int dtype, void *out) {
  for (int64_t j = 0; j < n; j++) wane_float_put(out, dtype, j, x[j]);
}

const wane_quant_kit wane_quant_generic = { quantize_4bit, quantize_8bit, quantize_rows, dequantize, narrow };
