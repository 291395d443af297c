/* nn_gradient_kernels.h: gradients of the ops that work element by element or row by row, and what training needs besides: dropout,
 * adding into a gradient, scattering rows. Values are read as f32 whatever their dtype, computed in f32, rounded once. */
#ifndef WANE_NN_GRADIENT_KERNELS_H
#define WANE_NN_GRADIENT_KERNELS_H
#include "../x86/vec_math.h"
#include "nn.h"
#include "philox_vec.h"
#include <math.h>

/* ---------------------------------------------------------------- one argument
 * UNARY_BACKWARD: p 0 dx, 1 dy, 2 x; n 0 elements; i 0 dtype of all three, 1 op. Chunks: elements. */

/* f'(x) of the activations; a constant `op` leaves one formula. *value gets f(x) where `value` is not NULL: both cost one exponential. */
VEC vf activation_slope(vf x, int op, vf *value) {
  const vf one = vf_set1(1.0f), half = vf_set1(0.5f);
  switch (op) {
  case WANE_RELU:
    if (value) *value = vf_max(vf_zero(), x);
    return vf_select(vf_lt(vf_zero(), x), one, vf_zero());
  case WANE_SILU: case WANE_QUICK_GELU: {             /* x s(kx): slope s + k x s (1 - s) */
    vf k = vf_set1(op == WANE_SILU ? 1.0f : 1.702f), s = vec_sigmoid(op == WANE_SILU ? x : vf_mul(k, x));
    if (value) *value = vf_mul(x, s);
    return vf_fma(vf_mul(vf_mul(k, x), s), vf_sub(one, s), s);
  }
  case WANE_SIGMOID: {
    vf s = vec_sigmoid(x);
    if (value) *value = s;
    return vf_mul(s, vf_sub(one, s));
  }
  case WANE_TANH: {
    vf t = vec_tanh(x);
    if (value) *value = t;
    return vf_sub(one, vf_mul(t, t));
  }
  case WANE_GELU: {                                   /* x Phi(x): slope Phi + x phi */
    vf phi = vf_mul(vf_set1(0.39894228f), vec_exp(vf_mul(vf_set1(-0.5f), vf_mul(x, x))));
    vf cumulated = vf_fma(half, vec_erf(vf_mul(x, vf_set1(0.70710678f))), half);
    if (value) *value = vf_mul(x, cumulated);
    return vf_fma(x, phi, cumulated);
  }
  case WANE_GELU_TANH: {                              /* x (1 + t) / 2, t = tanh(c (x + a x^3)) */
    vf xx = vf_mul(x, x), c = vf_set1(0.79788456f);
    vf t = vec_tanh(vf_mul(c, vf_fma(vf_mul(vf_set1(0.044715f), xx), x, x)));
    vf inner = vf_mul(c, vf_fma(vf_set1(0.134145f), xx, one)), share = vf_fma(half, t, half);
    if (value) *value = vf_mul(x, share);
    return vf_fma(vf_mul(vf_mul(half, x), vf_sub(one, vf_mul(t, t))), inner, share);
  }
  default: return one;
  }
}

/* f'(x) of the other functions, one value at a time. */
static inline float plain_slope(float x, int op) {
  switch (op) {
  case WANE_NEG: return -1.0f;
  case WANE_ABS: return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f;
  case WANE_SQRT: return 0.5f / sqrtf(x);
  case WANE_RSQRT: return -0.5f / (x * sqrtf(x));
  case WANE_EXP: return expf(x);
  case WANE_LOG: return 1.0f / x;
  case WANE_SIN: return cosf(x);
  case WANE_COS: return -sinf(x);
  case WANE_RECIPROCAL: return -1.0f / (x * x);
  case WANE_SQUARE: return 2.0f * x;
  case WANE_ERF: return 1.12837917f * expf(-x * x);
  default: return 0.0f;                               /* sign, floor, ceil, round */
  }
}

VEC void unary_backward_act(const wane_op *op, int64_t lo, int64_t hi, const int act, const int dtype) {
  for (int64_t i = lo; i < hi; i += VW) {
    int n = vec_left(i, hi);
    vf_put_n(op->p[0], dtype, i, vf_mul(vf_get_n(op->p[1], dtype, i, n), activation_slope(vf_get_n(op->p[2], dtype, i, n), act, NULL)), n);
  }
}

VEC void unary_backward_elements(const wane_op *op, int64_t lo, int64_t hi, const int dtype) {
  switch (op->i[1]) {
  case WANE_RELU: unary_backward_act(op, lo, hi, WANE_RELU, dtype); break;
  case WANE_SILU: unary_backward_act(op, lo, hi, WANE_SILU, dtype); break;
  case WANE_QUICK_GELU: unary_backward_act(op, lo, hi, WANE_QUICK_GELU, dtype); break;
  case WANE_SIGMOID: unary_backward_act(op, lo, hi, WANE_SIGMOID, dtype); break;
  case WANE_TANH: unary_backward_act(op, lo, hi, WANE_TANH, dtype); break;
  case WANE_GELU: unary_backward_act(op, lo, hi, WANE_GELU, dtype); break;
  case WANE_GELU_TANH: unary_backward_act(op, lo, hi, WANE_GELU_TANH, dtype); break;
  default:
    for (int64_t i = lo; i < hi; i++)
      wane_float_put(op->p[0], dtype, i, wane_float_at(op->p[1], dtype, i) * plain_slope(wane_float_at(op->p[2], dtype, i), op->i[1]));
  }
}

static void VEC_NAME(wane_nn_unary_backward)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 64, &lo, &hi);
  WITH_DTYPE(op->i[0], unary_backward_elements, op, lo, hi);
}

/* ---------------------------------------------------------------- gated activations
 * GLU_BACKWARD, of act(gate) * up: p 0 dgate, 1 dup, 2 dy, 3 gate, 4 up; n 0 elements; i 0 dtype of all, 1 act. Chunks: elements. */

VEC void glu_backward_act(const wane_op *op, int64_t lo, int64_t hi, const int act, const int dtype) {
  for (int64_t i = lo; i < hi; i += VW) {
    int n = vec_left(i, hi);
    vf value, dy = vf_get_n(op->p[2], dtype, i, n), slope = activation_slope(vf_get_n(op->p[3], dtype, i, n), act, &value);
    vf_put_n(op->p[0], dtype, i, vf_mul(vf_mul(dy, vf_get_n(op->p[4], dtype, i, n)), slope), n);
    vf_put_n(op->p[1], dtype, i, vf_mul(dy, value), n);
  }
}

VEC void glu_backward_elements(const wane_op *op, int64_t lo, int64_t hi, const int dtype) {
  switch (op->i[1]) {
  case WANE_RELU: glu_backward_act(op, lo, hi, WANE_RELU, dtype); break;
  case WANE_SILU: glu_backward_act(op, lo, hi, WANE_SILU, dtype); break;
  case WANE_QUICK_GELU: glu_backward_act(op, lo, hi, WANE_QUICK_GELU, dtype); break;
  case WANE_SIGMOID: glu_backward_act(op, lo, hi, WANE_SIGMOID, dtype); break;
  case WANE_GELU: glu_backward_act(op, lo, hi, WANE_GELU, dtype); break;
  case WANE_GELU_TANH: glu_backward_act(op, lo, hi, WANE_GELU_TANH, dtype); break;
  default: glu_backward_act(op, lo, hi, WANE_TANH, dtype); break;
  }
}

static void VEC_NAME(wane_nn_glu_backward)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 64, &lo, &hi);
  WITH_DTYPE(op->i[0], glu_backward_elements, op, lo, hi);
}

/* ---------------------------------------------------------------- softmax
 * SOFTMAX_BACKWARD: dx = y (dy - sum(dy y)). p 0 dx, 1 dy, 2 y; n 0 outer, 1 n, 2 inner; i 0 dtype of all. Chunks: outer * inner slices. */

static void VEC_NAME(wane_nn_softmax_backward)(const wane_op *op, uint32_t chunk) {
  int64_t n = op->n[1], inner = op->n[2], lo, hi;
  int dtype = op->i[0];
  wane_op_range(op, chunk, op->n[0] * inner, 1, &lo, &hi);
  for (int64_t slice = lo; slice < hi; slice++) {
    int64_t at = slice / inner * n * inner + slice % inner;
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += (double)wane_float_at(op->p[1], dtype, at + i * inner) * (double)wane_float_at(op->p[2], dtype, at + i * inner);
    for (int64_t i = 0; i < n; i++) {
      float y = wane_float_at(op->p[2], dtype, at + i * inner);
      wane_float_put(op->p[0], dtype, at + i * inner, y * (wane_float_at(op->p[1], dtype, at + i * inner) - (float)sum));
    }
  }
}

/* ---------------------------------------------------------------- scattering
 * SCATTER_ADD: p 0 out f32 [n, C], filled with zeros here, 1 src [rows, C], 2 index; n 0 rows, 1 C, 2 n; i 0 src's dtype, 1 index's.
 * Chunks: columns; each takes the rows in order, so that sums have one order. */

static void VEC_NAME(wane_nn_scatter_add)(const wane_op *op, uint32_t chunk) {
  int64_t rows = op->n[0], C = op->n[1], n = op->n[2], lo, hi;
  float *out = op->p[0];
  wane_op_range(op, chunk, C, 16, &lo, &hi);
  if (lo == hi) return;
  for (int64_t r = 0; r < n; r++) memset(out + r * C + lo, 0, (size_t)(hi - lo) * sizeof *out);
  for (int64_t r = 0; r < rows; r++) {
    int64_t id = op->i[1] == WANE_I64 ? ((const int64_t *)op->p[2])[r] : ((const int32_t *)op->p[2])[r];
    if (id < 0 || id >= n) {
      wane_op_fail(op, "scatter_add: index %lld of row %lld is outside the %lld rows", (long long)id, (long long)r + 1, (long long)n);
      return;
    }
    for (int64_t i = lo; i < hi; i += VW) {
      int left = vec_left(i, hi);
      vf_put_n(out, WANE_F32, id * C + i, vf_add(vf_get_n(out, WANE_F32, id * C + i, left), vf_get_n(op->p[1], op->i[0], r * C + i, left)), left);
    }
  }
}

/* TOPK_BACKWARD: p 0 dx [M, N], 1 dvalues [M, k], 2 indices i64 [M, k]; n 0 M, 1 k, 2 N; i 0 dtype of dx and dvalues. Chunks: rows. */
static void VEC_NAME(wane_nn_topk_backward)(const wane_op *op, uint32_t chunk) {
  int64_t k = op->n[1], N = op->n[2], lo, hi, size = op->i[0] == WANE_F32 ? 4 : 2;
  const int64_t *indices = op->p[2];
  wane_op_range(op, chunk, op->n[0], 1, &lo, &hi);
  for (int64_t r = lo; r < hi; r++) {
    memset((char *)op->p[0] + r * N * size, 0, (size_t)(N * size));
    for (int64_t i = 0; i < k; i++) {
      int64_t at = indices[r * k + i];
      if (at < 0 || at >= N) {
        wane_op_fail(op, "topk_backward: index %lld of row %lld is outside the %lld columns", (long long)at, (long long)r + 1, (long long)N);
        return;
      }
      wane_float_put(op->p[0], op->i[0], r * N + at, wane_float_at(op->p[1], op->i[0], r * k + i));
    }
  }
}

/* ---------------------------------------------------------------- dropout and sums
 * DROPOUT: p 0 y, 1 x; n 0 elements, 1 seed, 2 offset; f 0 wane_dropout_threshold(p), 1 what kept ones are multiplied by; i 0 dtype.
 * Chunks: elements. */

VEC void dropout_elements(const wane_op *op, int64_t lo, int64_t hi, const int dtype) {
  float factors[PHILOX_BLOCK + VW];
  for (int64_t i = lo; i < hi; i += PHILOX_BLOCK) {
    int64_t count = hi - i < PHILOX_BLOCK ? hi - i : PHILOX_BLOCK;
    dropout_factors((uint64_t)op->n[1], (uint64_t)op->n[2] + (uint64_t)i, count, op->f[0], op->f[1], factors);
    for (int64_t j = 0; j < count; j += VW) {
      int n = vec_left(j, count);
      vf_put_n(op->p[0], dtype, i + j, vf_mul(vf_get_n(op->p[1], dtype, i + j, n), vf_load(factors + j)), n);
    }
  }
}

static void VEC_NAME(wane_nn_dropout)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 64, &lo, &hi);
  WITH_DTYPE(op->i[0], dropout_elements, op, lo, hi);
}

/* ADD_INTO: p 0 dst f32, 1 src; n 0 elements; f 0 factor; i 0 src's dtype. Chunks: elements. */
VEC void add_into(const wane_op *op, int64_t lo, int64_t hi, const int dtype) {
  vf factor = vf_set1(op->f[0]);
  for (int64_t i = lo; i < hi; i += VW) {
    int n = vec_left(i, hi);
    vf_put_n(op->p[0], WANE_F32, i, vf_fma(vf_get_n(op->p[1], dtype, i, n), factor, vf_get_n(op->p[0], WANE_F32, i, n)), n);
  }
}

static void VEC_NAME(wane_nn_add_into)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 64, &lo, &hi);
  WITH_DTYPE(op->i[0], add_into, op, lo, hi);
}

/* EXPERTS_WEIGHT: dw[e][n] = sum over the rows p of expert e of dy[p][n] x[p]. p 0 dw f32 [E, N, K], 1 dy [P, N], 2 x [P, K], 3 bounds;
 * n 0 E, 1 N, 2 K; i 0 dy's dtype, 1 x's. Chunks: rows of dw; each takes the rows p in order. */
static void VEC_NAME(wane_nn_experts_weight)(const wane_op *op, uint32_t chunk) {
  const int32_t *bounds = op->p[3];
  int64_t N = op->n[1], K = op->n[2], lo, hi;
  wane_op_range(op, chunk, op->n[0] * N, 1, &lo, &hi);
  for (int64_t unit = lo; unit < hi; unit++) {
    int64_t e = unit / N, n = unit % N;
    float *dw = (float *)op->p[0] + unit * K;
    memset(dw, 0, (size_t)K * sizeof *dw);
    for (int64_t p = bounds[e]; p < bounds[e + 1]; p++) {
      vf factor = vf_set1(wane_float_at(op->p[1], op->i[0], p * N + n));
      for (int64_t i = 0; i < K; i += VW) {
        int left = vec_left(i, K);
        vf_put_n(dw, WANE_F32, i, vf_fma(factor, vf_get_n(op->p[2], op->i[1], p * K + i, left), vf_get_n(dw, WANE_F32, i, left)), left);
      }
    }
  }
}
#endif
