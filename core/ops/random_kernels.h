/* random_kernels.h: arange and counter-based random numbers. Included once by each instruction-set group; all give the same
 * bits, because every step is plain f32 (or f64) arithmetic without contraction.
 *
 * Word w of element e = offset + i is word e % 4 of Philox(seed, e / 4), so an element depends on (seed, offset + i) alone.
 * uniform: (w >> 8) 2^-24 for f32; as many leading bits as the dtype has for f16 (11) and bf16 (8), so that b is never reached
 * by rounding; w 2^-32 for integers, whose result is floor(a + (b - a) u).
 * normal: Box & Muller 1958 on the pairs of words (0, 1) and (2, 3): the even element takes the cosine, the odd the sine. */
#include "convert.h"
#include "philox.h"
#include "strided.h"
#include <math.h>

/* ln of u in [2^-24, 1]: u = 2^e m with sqrt(1/2) <= m < sqrt(2), ln m = 2 atanh((m - 1) / (m + 1)) as its series. */
static inline float random_log(float u) {
  int32_t bits = (int32_t)wane_float_bits(u) - 0x3f3504f3, e = bits >> 23;
  float m = wane_bits_float((uint32_t)bits - ((uint32_t)e << 23) + 0x3f3504f3u);
  float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  float p = 2.0f + z * (0.66666667f + z * (0.4f + z * (0.28571429f + z * 0.22222222f)));
  return (float)e * 0.69314718f + s * p;
}

/* sin and cos of 2 pi t for t in [0, 1): a quarter turn is taken off exactly, then Taylor's series on [-pi/4, pi/4]. */
static inline void random_turn(float t, float *sine, float *cosine) {
  float quarters = (float)(int32_t)(t * 4.0f + 0.5f);
  int32_t q = (int32_t)quarters;
  float r = (t - quarters * 0.25f) * 6.2831853f, z = r * r;
  float s = r * (1.0f - z * (0.16666667f - z * (8.3333333e-3f - z * 1.9841270e-4f)));
  float c = 1.0f - z * (0.5f - z * (0.041666667f - z * (1.3888889e-3f - z * 2.4801587e-5f)));
  float a = q & 1 ? c : s, b = q & 1 ? s : c;
  *sine = q & 2 ? -a : a;
  *cosine = (q + 1) & 2 ? -b : b;
}

/* Two normal values for each of the pairs of words. */
static void normal_block(const uint32_t *word, int64_t pairs, float mean, float deviation, float *y) {
  for (int64_t i = 0; i < pairs; i++) {
    float u = (float)(int32_t)((word[2 * i] >> 8) + 1) * 0x1p-24f, t = (float)(int32_t)(word[2 * i + 1] >> 8) * 0x1p-24f;
    float radius = sqrtf(-2.0f * random_log(u)), sine, cosine;
    random_turn(t, &sine, &cosine);
    y[2 * i] = mean + deviation * (radius * cosine);
    y[2 * i + 1] = mean + deviation * (radius * sine);
  }
}

/* A uniform value for each word. */
static void uniform_block(const uint32_t *word, int64_t n, int dtype, double a, double b, float *y) {
  int bits = dtype == WANE_F16 ? 11 : dtype == WANE_BF16 ? 8 : 24;
  float scale = 1.0f / (float)(1 << bits), low = (float)a, width = (float)(b - a), high = (float)b;
  for (int64_t i = 0; i < n; i++) {
    float v = low + width * ((float)(int32_t)(word[i] >> (32 - bits)) * scale);
    y[i] = v < high || !(low < high) ? v : low;              /* rounding must not reach b */
  }
}

/* WANE_OP_RANDOM. p[0] out, n[0] elements, n[1] seed, n[2] offset, i[0] dtype, i[4] kind, d[0], d[1] parameters. */
static void kernel_random(const wane_op *op, uint32_t chunk) {
  int dtype = op->i[0], integers = !wane_is_float_dtype(dtype) && op->i[4] == WANE_UNIFORM;
  uint64_t seed = (uint64_t)op->n[1], offset = (uint64_t)op->n[2];
  int64_t lo, hi, skip, size = wane_element_size(dtype);
  wane_op_range(op, chunk, op->n[0], WANE_BLOCK, &lo, &hi);
  for (int64_t i = lo; i < hi; i += WANE_BLOCK) {
    int64_t m = hi - i < WANE_BLOCK ? hi - i : WANE_BLOCK;
    uint64_t counter = (offset + (uint64_t)i) / 4;
    skip = (int64_t)((offset + (uint64_t)i) % 4);
    uint32_t word[WANE_BLOCK + 8];
    for (int64_t w = 0; w < skip + m; w += 4) wane_philox(seed, counter++, word + w);
    char *y = (char *)op->p[0] + i * size;
    if (integers) {
      int64_t v[WANE_BLOCK];
      for (int64_t j = 0; j < m; j++) v[j] = (int64_t)floor(op->d[0] + (op->d[1] - op->d[0]) * ((double)word[skip + j] * 0x1p-32));
      wane_store_i64(dtype, y, 1, m, v);
    } else {
      float v[WANE_BLOCK + 8];
      if (op->i[4] == WANE_NORMAL) normal_block(word, (skip + m + 1) / 2, (float)op->d[0], (float)op->d[1], v);
      else uniform_block(word, skip + m, dtype, op->d[0], op->d[1], v);
      wane_store_f32(dtype, y, 1, m, v + skip);
    }
  }
}

/* WANE_OP_ARANGE. p[0] out, n[0] elements, i[0] dtype, d[0] start, d[1] step: start + i * step in f64, rounded once. */
static void kernel_arange(const wane_op *op, uint32_t chunk) {
  int dtype = op->i[0];
  int64_t lo, hi, size = wane_element_size(dtype);
  wane_op_range(op, chunk, op->n[0], WANE_BLOCK, &lo, &hi);
  for (int64_t i = lo; i < hi; i += WANE_BLOCK) {
    int64_t m = hi - i < WANE_BLOCK ? hi - i : WANE_BLOCK;
    char *y = (char *)op->p[0] + i * size;
    if (wane_is_float_dtype(dtype) || dtype == WANE_BOOL) {
      float v[WANE_BLOCK];
      for (int64_t j = 0; j < m; j++) v[j] = (float)(op->d[0] + (double)(i + j) * op->d[1]);
      wane_store_f32(dtype, y, 1, m, v);
    } else {
      for (int64_t j = 0; j < m; j++) {
        uint64_t bits = wane_value_bits(dtype, op->d[0] + (double)(i + j) * op->d[1]);
        memcpy(y + j * size, &bits, (size_t)size);
      }
    }
  }
}

static void register_random(wane_backend *b, const char *origin) {
  b->ops[WANE_OP_RANDOM] = kernel_random;
  b->ops[WANE_OP_ARANGE] = kernel_arange;
  b->origin[WANE_OP_RANDOM] = b->origin[WANE_OP_ARANGE] = origin;
}
