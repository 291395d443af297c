/* nn_place_kernels.h: kernels that place values: rotary embedding, writing keys and values into a cache. */
#ifndef WANE_NN_PLACE_KERNELS_H
#define WANE_NN_PLACE_KERNELS_H
#include "../x86/vec.h"
#include "nn.h"

/* ---------------------------------------------------------------- rotary embedding
 * ROPE: p 0 out [B, T, H, D] contiguous, 1 x, 2 inv_freq f32 [R], 3 positions i32 or NULL; n 0 B, 1 T, 2 H, 3 D, 4 R, 5 start,
 * 6, 7 positions' strides; stride 0 x (b, t, h); i 0 dtype, 1 interleaved; f 0 scale. Chunks: (b, t). */

/* cos and sin, times scale, of position * inv_freq. The angle is the f32 product that upstream forms; its reduction by multiples of
 * pi/2 is done in double, so that position 100,000 is as exact as position 1. Plain C without branches: the compiler's to widen. */
static void rope_angles(const float *inv_freq, int64_t R, float position, float scale, float *cosines, float *sines) {
  const double magic = 6755399441055744.0;            /* 1.5 * 2^52: adding it rounds to an integer, found in the low bits */
  for (int64_t j = 0; j < R; j++) {
    double a = (double)(position * inv_freq[j]), t = a * 0.63661977236758134308 + magic;
    uint64_t quadrant;
    memcpy(&quadrant, &t, 8);
    double r = a - (t - magic) * 1.57079632679489661923, z = r * r;
    double s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 - z * (1.0 / 39916800)))));
    double c = 1.0 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
    double sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
    sines[j] = (float)(quadrant & 2 ? -sine : sine) * scale;
    cosines[j] = (float)((quadrant + 1) & 2 ? -cosine : cosine) * scale;
  }
}

/* One head's 2R dimensions: pairs (j, j + R). */
static void rope_halves(const wane_op *op, int64_t from, int64_t to, int64_t R, const float *c, const float *s) {
  int dtype = op->i[0];
  for (int64_t j = 0; j < R; j += VW) {
    int n = vec_left(j, R);
    vf a = vf_get_n(op->p[1], dtype, from + j, n), b = vf_get_n(op->p[1], dtype, from + R + j, n);
    vf cj = vf_load_n(c + j, n), sj = vf_load_n(s + j, n);
    vf_put_n(op->p[0], dtype, to + j, vf_sub(vf_mul(a, cj), vf_mul(b, sj)), n);
    vf_put_n(op->p[0], dtype, to + R + j, vf_add(vf_mul(b, cj), vf_mul(a, sj)), n);
  }
}

/* One head's 2R dimensions: pairs (2j, 2j + 1). */
static void rope_pairs(const wane_op *op, int64_t from, int64_t to, int64_t R, const float *c, const float *s) {
  int dtype = op->i[0];
  for (int64_t j = 0; j < R; j++) {
    float a = wane_float_at(op->p[1], dtype, from + 2 * j), b = wane_float_at(op->p[1], dtype, from + 2 * j + 1);
    wane_float_put(op->p[0], dtype, to + 2 * j, a * c[j] - b * s[j]);
    wane_float_put(op->p[0], dtype, to + 2 * j + 1, b * c[j] + a * s[j]);
  }
}

static void VEC_NAME(wane_nn_rope)(const wane_op *op, uint32_t chunk) {
  int64_t T = op->n[1], H = op->n[2], D = op->n[3], R = op->n[4], size = wane_size_of(op->i[0]), lo, hi;
  float *c = wane_scratch(), *s = c + R;
  wane_op_range(op, chunk, op->n[0] * T, 1, &lo, &hi);
  for (int64_t unit = lo; unit < hi; unit++) {
    int64_t b = unit / T, t = unit % T;
    int64_t position = op->p[3] ? ((const int32_t *)op->p[3])[b * op->n[6] + t * op->n[7]] : op->n[5] + t;
    rope_angles(op->p[2], R, (float)position, op->f[0], c, s);
    for (int64_t h = 0; h < H; h++) {
      int64_t from = b * op->stride[0][0] + t * op->stride[0][1] + h * op->stride[0][2], to = (unit * H + h) * D;
      if (op->i[1]) rope_pairs(op, from, to, R, c, s);
      else rope_halves(op, from, to, R, c, s);
      memcpy((char *)op->p[0] + (to + 2 * R) * size, (const char *)op->p[1] + (from + 2 * R) * size, (size_t)((D - 2 * R) * size));
    }
  }
}

/* ---------------------------------------------------------------- key and value cache
 * KV_APPEND: p 0 cache [B, H, capacity, D], 1 x [B, T, H, D]; n 0 B, 1 T, 2 H, 3 D, 4 start; stride 0 cache (b, h, t), 1 x (b, t, h);
 * i 0 cache's dtype, 1 x's. Chunks: (b, h, t). */
static void VEC_NAME(wane_nn_kv_append)(const wane_op *op, uint32_t chunk) {
  int64_t T = op->n[1], H = op->n[2], D = op->n[3], lo, hi;
  const int64_t *cache = op->stride[0], *x = op->stride[1];
  wane_op_range(op, chunk, op->n[0] * H * T, 1, &lo, &hi);
  for (int64_t unit = lo; unit < hi; unit++) {
    int64_t t = unit % T, h = unit / T % H, b = unit / T / H;
    int64_t to = b * cache[0] + h * cache[1] + (op->n[4] + t) * cache[2], from = b * x[0] + t * x[1] + h * x[2];
    for (int64_t d = 0; d < D; d += VW) {
      int n = vec_left(d, D);
      vf_put_n(op->p[0], op->i[0], to + d, vf_get_n(op->p[1], op->i[1], from + d, n), n);
    }
  }
}
#endif
