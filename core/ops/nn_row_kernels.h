/* nn_row_kernels.h: kernels that work on rows: norms and their gradients, softmax, losses, gated activations.
 *
 * Values are read as f32 whatever their dtype, computed in f32, rounded once. Sums run over four vectors of partial sums in a
 * fixed order; long sums are gathered in double every EXP_BLOCK values. */
#ifndef WANE_NN_ROW_KERNELS_H
#define WANE_NN_ROW_KERNELS_H
#include "../x86/vec_math.h"
#include "nn.h"
#include <math.h>

enum { EXP_BLOCK = 1024 };

/* Calls f(…, dtype) with a constant dtype, so that the loops in it have one kind of load. */
#define WITH_DTYPE(dtype, f, ...)                            \
  do {                                                       \
    if ((dtype) == WANE_F32) f(__VA_ARGS__, WANE_F32);       \
    else if ((dtype) == WANE_BF16) f(__VA_ARGS__, WANE_BF16); \
    else f(__VA_ARGS__, WANE_F16);                           \
  } while (0)

/* ---------------------------------------------------------------- sums of a row */

/* sum of x[i] - mean, or of its square. */
VEC float row_sum(const void *x, int64_t at, int64_t n, float mean, int square, const int dtype) {
  vf s[4] = { vf_zero(), vf_zero(), vf_zero(), vf_zero() }, m = vf_set1(mean);
  int64_t i = 0;
  for (; i + 4 * VW <= n; i += 4 * VW)
    for (int k = 0; k < 4; k++) {
      vf v = vf_sub(vf_get(x, dtype, at + i + k * VW), m);
      s[k] = square ? vf_fma(v, v, s[k]) : vf_add(s[k], v);
    }
  for (; i < n; i += VW) {
    int left = vec_left(i, n);
    float lanes[VW] = { 0 };
    vf_store(lanes, vf_sub(vf_get_n(x, dtype, at + i, left), m));
    for (int k = left; k < VW; k++) lanes[k] = 0.0f;
    vf v = vf_load(lanes);
    s[0] = square ? vf_fma(v, v, s[0]) : vf_add(s[0], v);
  }
  return vf_sum(vf_add(vf_add(s[0], s[1]), vf_add(s[2], s[3])));
}

/* Mean (0 unless centred) and 1 / sqrt(variance + eps) of a row. */
VEC void row_statistics(const void *x, int64_t at, int64_t n, double eps, int centred, float *mean, float *scale, const int dtype) {
  *mean = centred ? (float)((double)row_sum(x, at, n, 0.0f, 0, dtype) / (double)n) : 0.0f;
  *scale = (float)(1.0 / sqrt((double)row_sum(x, at, n, *mean, 1, dtype) / (double)n + eps));
}

/* Largest value; NaN is passed over. */
VEC float row_max(const void *x, int64_t at, int64_t n, const int dtype) {
  vf m[2] = { vf_set1(-__builtin_inff()), vf_set1(-__builtin_inff()) };
  int64_t i = 0;
  for (; i + 2 * VW <= n; i += 2 * VW) {
    m[0] = vf_max(vf_get(x, dtype, at + i), m[0]);
    m[1] = vf_max(vf_get(x, dtype, at + i + VW), m[1]);
  }
  float best = vf_hmax(vf_max(m[0], m[1]));
  for (; i < n; i++) {
    float v = wane_float_at(x, dtype, at + i);
    if (v > best) best = v;
  }
  return best;
}

/* sum of e^(x[i] - max); the terms go to `keep` unless it is NULL. */
VEC double row_exp_sum_keep(const void *x, int64_t at, int64_t n, float max, float *keep, const int dtype) {
  vf m = vf_set1(max);
  double sum = 0.0;
  for (int64_t j = 0; j < n; j += EXP_BLOCK) {
    int64_t end = j + EXP_BLOCK < n ? j + EXP_BLOCK : n, i = j;
    vf s[2] = { vf_zero(), vf_zero() };
    for (; i + 2 * VW <= end; i += 2 * VW)
      for (int k = 0; k < 2; k++) {
        vf e = vec_exp(vf_sub(vf_get(x, dtype, at + i + k * VW), m));
        s[k] = vf_add(s[k], e);
        if (keep) vf_store(keep + i + k * VW, e);
      }
    sum += (double)vf_sum(vf_add(s[0], s[1]));
    for (; i < end; i += VW) {
      float lanes[VW];
      vf_store(lanes, vec_exp(vf_sub(vf_get_n(x, dtype, at + i, vec_left(i, end)), m)));
      for (int k = 0; k < vec_left(i, end); k++) {
        sum += (double)lanes[k];
        if (keep) keep[i + k] = lanes[k];
      }
    }
  }
  return sum;
}

VEC double row_exp_sum(const void *x, int64_t at, int64_t n, float max, const int dtype) { return row_exp_sum_keep(x, at, n, max, NULL, dtype); }

/* ---------------------------------------------------------------- norms
 * RMS_NORM, LAYER_NORM: p 0 out, 1 x, 2 weight or NULL, 3 bias or NULL; n 0 rows, 1 C; i 0 dtype of x and out, 1 weight's, 2 bias's;
 * f 0 added to the weight; d 0 eps. Chunks: rows. */

VEC void norm_rows(const wane_op *op, int64_t lo, int64_t hi, const int centred, const int dtype) {
  int64_t C = op->n[1];
  const void *x = op->p[1], *w = op->p[2], *b = op->p[3];
  vf offset = vf_set1(op->f[0]);
  for (int64_t r = lo; r < hi; r++) {
    float mean, scale;
    row_statistics(x, r * C, C, op->d[0], centred, &mean, &scale, dtype);
    vf m = vf_set1(mean), k = vf_set1(scale);
    for (int64_t i = 0; i < C; i += VW) {
      int n = vec_left(i, C);
      vf v = vf_mul(vf_sub(vf_get_n(x, dtype, r * C + i, n), m), k);
      if (w) v = vf_mul(v, vf_add(vf_get_n(w, op->i[1], i, n), offset));
      if (b) v = vf_add(v, vf_get_n(b, op->i[2], i, n));
      vf_put_n(op->p[0], dtype, r * C + i, v, n);
    }
  }
}

static void VEC_NAME(wane_nn_rms_norm)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 1, &lo, &hi);
  WITH_DTYPE(op->i[0], norm_rows, op, lo, hi, 0);
}

static void VEC_NAME(wane_nn_layer_norm)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 1, &lo, &hi);
  WITH_DTYPE(op->i[0], norm_rows, op, lo, hi, 1);
}

/* ---------------------------------------------------------------- their gradients
 * With z = (x - mean) * scale and g = weight + offset: dx = scale * (dy g - mean(dy g) - z mean(dy g z)), the middle term for
 * LAYER_NORM alone; dweight = sum over rows of dy z; dbias = sum of dy.
 * *_NORM_BACKWARD: p 0 dx, 1 dy, 2 x, 3 weight or NULL, 4 dweight f32, 5 statistics f32 [rows, 2], 6 dbias f32 or NULL; n 0 rows,
 * 1 C; i 0 dtype of x and dx, 1 weight's, 2 dy's, 3 phase, 4 centred, 5 adds to what dx holds; f 0, d 0 as above.
 * Phase 0, chunks of rows: statistics and dx. Phase 1, chunks of columns: dweight and dbias, each a sum in the order of the rows. */

/* g = dy (weight + offset) and z, the normalised x, of n <= VW elements from i on. */
VEC void norm_terms(const wane_op *op, int64_t at, int64_t i, int n, vf mean, vf scale, vf *g, vf *z, const int dtype, const int dy_dtype, const int w_dtype) {
  *g = vf_get_n(op->p[1], dy_dtype, at + i, n);
  if (op->p[3]) *g = vf_mul(*g, vf_add(vf_get_n(op->p[3], w_dtype, i, n), vf_set1(op->f[0])));
  *z = vf_mul(vf_sub(vf_get_n(op->p[2], dtype, at + i, n), mean), scale);
}

/* Rows of dx; constant dtypes leave one kind of load. */
VEC void norm_backward_as(const wane_op *op, int64_t lo, int64_t hi, const int dtype, const int dy_dtype, const int w_dtype) {
  int64_t C = op->n[1], whole = C / VW * VW;
  float *statistics = op->p[5];
  for (int64_t r = lo; r < hi; r++) {
    float mean = 0, scale = 0;
    int64_t at = r * C;
    row_statistics(op->p[2], at, C, op->d[0], op->i[4], &mean, &scale, dtype);
    statistics[2 * r] = mean;
    statistics[2 * r + 1] = scale;
    vf m = vf_set1(mean), k = vf_set1(scale), sum = vf_zero(), dot = vf_zero(), g, z;
    for (int64_t i = 0; i < C; i += VW) {             /* lanes beyond the end hold dy = 0 */
      norm_terms(op, at, i, i < whole ? VW : (int)(C - whole), m, k, &g, &z, dtype, dy_dtype, w_dtype);
      sum = vf_add(sum, g);
      dot = vf_fma(g, z, dot);
    }
    vf mean_g = vf_set1(op->i[4] ? vf_sum(sum) / (float)C : 0.0f), mean_gz = vf_set1(vf_sum(dot) / (float)C);
    for (int64_t i = 0; i < C; i += VW) {
      int n = i < whole ? VW : (int)(C - whole);
      norm_terms(op, at, i, n, m, k, &g, &z, dtype, dy_dtype, w_dtype);
      vf dx = vf_mul(k, vf_sub(vf_sub(g, mean_g), vf_mul(z, mean_gz)));
      vf_put_n(op->p[0], dtype, at + i, op->i[5] ? vf_add(vf_get_n(op->p[0], dtype, at + i, n), dx) : dx, n);
    }
  }
}

static void norm_backward_rows(const wane_op *op, int64_t lo, int64_t hi) {
  int dtype = op->i[0], same = op->i[2] == dtype, weight = op->p[3] ? op->i[1] : WANE_F32;
  if (same && dtype == WANE_BF16 && weight == WANE_F32) norm_backward_as(op, lo, hi, WANE_BF16, WANE_BF16, WANE_F32);
  else if (same && dtype == WANE_BF16 && weight == WANE_BF16) norm_backward_as(op, lo, hi, WANE_BF16, WANE_BF16, WANE_BF16);
  else if (same && dtype == WANE_F32 && weight == WANE_F32) norm_backward_as(op, lo, hi, WANE_F32, WANE_F32, WANE_F32);
  else norm_backward_as(op, lo, hi, dtype, op->i[2], weight);
}

static void norm_backward_columns(const wane_op *op, int64_t lo, int64_t hi) {
  int64_t rows = op->n[0], C = op->n[1];
  const float *statistics = op->p[5];
  float *dweight = op->p[4], *dbias = op->p[6];
  for (int64_t i = lo; i < hi; i += VW) {
    int n = vec_left(i, hi);
    vf sum = vf_zero(), plain = vf_zero();
    for (int64_t r = 0; r < rows; r++) {
      vf g = vf_get_n(op->p[1], op->i[2], r * C + i, n);
      vf z = vf_mul(vf_sub(vf_get_n(op->p[2], op->i[0], r * C + i, n), vf_set1(statistics[2 * r])), vf_set1(statistics[2 * r + 1]));
      sum = vf_fma(g, z, sum);
      plain = vf_add(plain, g);
    }
    vf_put_n(dweight, WANE_F32, i, sum, n);
    if (dbias) vf_put_n(dbias, WANE_F32, i, plain, n);
  }
}

static void VEC_NAME(wane_nn_norm_backward)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->i[3] ? op->n[1] : op->n[0], op->i[3] ? 16 : 1, &lo, &hi);
  if (op->i[3]) norm_backward_columns(op, lo, hi);
  else norm_backward_rows(op, lo, hi);
}

/* ---------------------------------------------------------------- softmax
 * SOFTMAX: p 0 out, 1 x; n 0 outer, 1 n, 2 inner: x is [outer, n, inner], the middle is normalised; i 0 dtype, 1 log. Chunks: outer
 * rows where inner is 1, else groups of VW columns, each lane a column. */

VEC void softmax_rows(const wane_op *op, int64_t lo, int64_t hi, const int dtype) {
  int64_t C = op->n[1];
  for (int64_t r = lo; r < hi; r++) {
    float max = row_max(op->p[1], r * C, C, dtype);
    double sum = row_exp_sum(op->p[1], r * C, C, max, dtype);
    vf m = vf_set1(max), scale = vf_set1((float)(1.0 / sum)), log_sum = vf_set1((float)log(sum));
    for (int64_t i = 0; i < C; i += VW) {
      int n = vec_left(i, C);
      vf v = vf_sub(vf_get_n(op->p[1], dtype, r * C + i, n), m);
      v = op->i[1] ? vf_sub(v, log_sum) : vf_mul(vec_exp(v), scale);
      vf_put_n(op->p[0], dtype, r * C + i, v, n);
    }
  }
}

VEC void softmax_columns(const wane_op *op, int64_t lo, int64_t hi, const int dtype) {
  int64_t n = op->n[1], inner = op->n[2], groups = (inner + VW - 1) / VW;
  for (int64_t unit = lo; unit < hi; unit++) {
    int64_t column = unit % groups * VW, at = unit / groups * n * inner + column;
    int lanes = vec_left(column, inner);
    vf m = vf_set1(-__builtin_inff()), s = vf_zero();
    for (int64_t i = 0; i < n; i++) m = vf_max(vf_get_n(op->p[1], dtype, at + i * inner, lanes), m);
    for (int64_t i = 0; i < n; i++) s = vf_add(s, vec_exp(vf_sub(vf_get_n(op->p[1], dtype, at + i * inner, lanes), m)));
    vf log_sum = vec_log(s);
    for (int64_t i = 0; i < n; i++) {
      vf v = vf_sub(vf_get_n(op->p[1], dtype, at + i * inner, lanes), m);
      v = op->i[1] ? vf_sub(v, log_sum) : vf_div(vec_exp(v), s);
      vf_put_n(op->p[0], dtype, at + i * inner, v, lanes);
    }
  }
}

static void VEC_NAME(wane_nn_softmax)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi, inner = op->n[2];
  wane_op_range(op, chunk, inner == 1 ? op->n[0] : op->n[0] * ((inner + VW - 1) / VW), 1, &lo, &hi);
  if (inner == 1) WITH_DTYPE(op->i[0], softmax_rows, op, lo, hi);
  else WITH_DTYPE(op->i[0], softmax_columns, op, lo, hi);
}

/* ---------------------------------------------------------------- loss
 * NLL: p 0 out f32 [M], 1 logits [M, V], 2 labels, n 0 M, 1 V, 2 ignored label; i 0 logits' dtype, 1 labels'.
 * NLL_BACKWARD: p 0 dlogits, 1, 2 as above, 3 scale f32 [M] or NULL (f 0 for all), 4 what NLL's 0 is, or NULL; i 2 dlogits' dtype. Chunks: rows. */

/* The row's label; -1 for one to be ignored. Fails the op, and gives -1, if it is out of range. */
static int64_t label_of(const wane_op *op, int64_t r) {
  int64_t label = op->i[1] == WANE_I64 ? ((const int64_t *)op->p[2])[r] : ((const int32_t *)op->p[2])[r];
  if (label == op->n[2]) return -1;
  if (label >= 0 && label < op->n[1]) return label;
  wane_op_fail(op, "nll: label %lld of row %lld is outside the %lld classes (and is not the ignored label %lld)", (long long)label, (long long)r + 1,
               (long long)op->n[1], (long long)op->n[2]);
  return -1;
}

VEC void nll_rows(const wane_op *op, int64_t lo, int64_t hi, const int dtype) {
  int64_t V = op->n[1];
  float *out = op->p[0];
  for (int64_t r = lo; r < hi; r++) {
    int64_t label = label_of(op, r);
    out[r] = 0.0f;
    if (label < 0) continue;
    float max = row_max(op->p[1], r * V, V, dtype);
    double sum = row_exp_sum(op->p[1], r * V, V, max, dtype);
    out[r] = (float)(log(sum) + (double)max - (double)wane_float_at(op->p[1], dtype, r * V + label));
  }
}

VEC void nll_backward_rows(const wane_op *op, int64_t lo, int64_t hi, int dtype, int out) {
  int64_t V = op->n[1];
  float *nll = op->p[4];
  for (int64_t r = lo; r < hi; r++) {
    int64_t label = label_of(op, r);
    float factor = label < 0 ? 0.0f : op->p[3] ? ((const float *)op->p[3])[r] : op->f[0];
    if (nll) nll[r] = 0.0f;
    if (label < 0 || (factor == 0.0f && !nll)) {
      memset((char *)op->p[0] + r * V * wane_size_of(out), 0, (size_t)(V * wane_size_of(out)));
      continue;
    }
    float max = row_max(op->p[1], r * V, V, dtype);
    float *terms = V * 4 <= WANE_SCRATCH ? wane_scratch() : NULL;         /* kept, so that they are computed once */
    double sum = terms ? row_exp_sum_keep(op->p[1], r * V, V, max, terms, dtype) : row_exp_sum(op->p[1], r * V, V, max, dtype);
    if (nll) nll[r] = (float)(log(sum) + (double)max - (double)wane_float_at(op->p[1], dtype, r * V + label));
    float share = (float)((double)factor / sum);
    vf m = vf_set1(max), scale = vf_set1(share);
    for (int64_t i = 0; i < V; i += VW) {
      int n = vec_left(i, V);
      vf e = terms ? vf_get_n(terms, WANE_F32, i, n) : vec_exp(vf_sub(vf_get_n(op->p[1], dtype, r * V + i, n), m));
      vf_put_n(op->p[0], out, r * V + i, vf_mul(e, scale), n);
    }
    float own = terms ? terms[label] : expf(wane_float_at(op->p[1], dtype, r * V + label) - max);
    wane_float_put(op->p[0], out, r * V + label, own * share - factor);
  }
}

static void VEC_NAME(wane_nn_nll)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 1, &lo, &hi);
  WITH_DTYPE(op->i[0], nll_rows, op, lo, hi);
}

static void VEC_NAME(wane_nn_nll_backward)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 1, &lo, &hi);
  if (op->i[0] == WANE_F32 && op->i[2] == WANE_BF16) nll_backward_rows(op, lo, hi, WANE_F32, WANE_BF16);
  else if (op->i[0] == WANE_F32 && op->i[2] == WANE_F32) nll_backward_rows(op, lo, hi, WANE_F32, WANE_F32);
  else WITH_DTYPE(op->i[2], nll_backward_rows, op, lo, hi, op->i[0]);
}

/* ---------------------------------------------------------------- gated activations
 * GLU: p 0 out, 1 gate, 2 up; n 0 elements; i 0 dtype, 1 act. Chunks: elements. */

VEC void glu_act(const wane_op *op, int64_t lo, int64_t hi, const int act, const int dtype) {
  for (int64_t i = lo; i < hi; i += VW) {
    int n = vec_left(i, hi);
    vf_put_n(op->p[0], dtype, i, vf_mul(vec_activation(vf_get_n(op->p[1], dtype, i, n), act), vf_get_n(op->p[2], dtype, i, n)), n);
  }
}

VEC void glu_elements(const wane_op *op, int64_t lo, int64_t hi, const int dtype) {
  switch (op->i[1]) {
  case WANE_RELU: glu_act(op, lo, hi, WANE_RELU, dtype); break;
  case WANE_SILU: glu_act(op, lo, hi, WANE_SILU, dtype); break;
  case WANE_GELU: glu_act(op, lo, hi, WANE_GELU, dtype); break;
  case WANE_GELU_TANH: glu_act(op, lo, hi, WANE_GELU_TANH, dtype); break;
  case WANE_QUICK_GELU: glu_act(op, lo, hi, WANE_QUICK_GELU, dtype); break;
  case WANE_SIGMOID: glu_act(op, lo, hi, WANE_SIGMOID, dtype); break;
  default: glu_act(op, lo, hi, WANE_TANH, dtype); break;
  }
}

static void VEC_NAME(wane_nn_glu)(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0], 64, &lo, &hi);
  WITH_DTYPE(op->i[0], glu_elements, op, lo, hi);
}
#endif
