/* optim_kernels.h: one optimizer step of one parameter, for the vectors of the including file.
 *
 * The parameter goes by blocks of 256 elements: state is read (dequantized where it is 8-bit), the step is taken in f32 with the moments as
 * they are before they are stored, and state is written back. Formulas: wane.h section 10.
 *
 * OPTIMIZER: p 0 parameter, 1 gradient, 2 m, 3 v, 4 absmax of m, 5 of v (NULL: f32 state), 6 factor of the gradient f32 [1] or NULL; n 0 elements;
 * i 0 parameter's dtype, 1 gradient's, 2 WANE_OPTIMIZER_…, 3 first step, 4 upstream's rounding; f 0 lr, 1 beta1, 2 beta2, 3 eps, 4 weight decay,
 * 5 1 - beta1, 6 1 - beta2; d 0 lr / (1 - beta1^t), 1 sqrt(1 - beta2^t). Chunks: blocks. */
#ifndef WANE_OPTIM_KERNELS_H
#define WANE_OPTIM_KERNELS_H
#include "../quant/quant.h"
#include "../x86/vec_math.h"
#include "nn.h"
#include <math.h>

enum { STATE_BLOCK = 256 };

/* The numbers of a step on vectors. */
typedef struct optim_numbers { vf lr, b1, b2, r1, r2, eps, decay, wd, step, root; } optim_numbers;

VEC optim_numbers optim_load(const wane_op *op) {
  optim_numbers k = { vf_set1(op->f[0]), vf_set1(op->f[1]), vf_set1(op->f[2]), vf_set1(op->f[5]), vf_set1(op->f[6]), vf_set1(op->f[3]),
                      vf_set1((float)(1.0 - (double)op->f[0] * (double)op->f[4])), vf_set1(op->f[4]), vf_set1((float)op->d[0]), vf_set1((float)op->d[1]) };
  return k;
}

/* One vector: p, m, v before; p, m, v after. m is the only state of SGD and LION, v of RMSPROP and ADAGRAD. */
VEC void optim_vector(const wane_op *op, const optim_numbers *k, vf g, vf *p, vf *m, vf *v) {
  switch (op->i[2]) {
  case WANE_OPTIMIZER_ADAM:
    *m = vf_add(vf_mul(*m, k->b1), vf_mul(k->r1, g));
    *v = vf_add(vf_mul(*v, k->b2), vf_mul(vf_mul(k->r2, g), g));
    *p = vf_mul(*p, k->decay);
    *p = vf_sub(*p, vf_mul(k->step, vf_div(*m, vf_add(vf_div(vf_sqrt(*v), k->root), k->eps))));
    break;
  case WANE_OPTIMIZER_SGD:
    g = vf_add(g, vf_mul(k->wd, *p));
    *m = op->i[3] ? g : vf_add(vf_mul(*m, k->b1), g);
    *p = vf_sub(*p, vf_mul(k->lr, *m));
    break;
  case WANE_OPTIMIZER_LION: {
    vf c = vf_add(vf_mul(*m, k->b1), vf_mul(k->r1, g)), one = vf_set1(1.0f);
    vf sign = vf_select(vf_lt(vf_zero(), c), one, vf_select(vf_lt(c, vf_zero()), vf_neg(one), vf_zero()));
    *p = vf_sub(vf_mul(*p, k->decay), vf_mul(k->lr, sign));
    *m = vf_add(vf_mul(*m, k->b2), vf_mul(k->r2, g));
    break;
  }
  case WANE_OPTIMIZER_RMSPROP:
    g = vf_add(g, vf_mul(k->wd, *p));
    *v = vf_add(vf_mul(*v, k->b1), vf_mul(vf_mul(k->r1, g), g));
    *p = vf_sub(*p, vf_mul(k->lr, vf_div(g, vf_add(vf_sqrt(*v), k->eps))));
    break;
  default:                                            /* ADAGRAD */
    g = vf_add(g, vf_mul(k->wd, *p));
    *v = vf_add(*v, vf_mul(g, g));
    *p = vf_sub(*p, vf_mul(k->lr, vf_div(g, vf_add(vf_sqrt(*v), k->eps))));
  }
}

/* A state's values of a block. */
static void optim_read(const wane_op *op, int which, int kind, int64_t first, int64_t n, float *out) {
  const float *absmax = op->p[4 + which];
  if (!op->p[2 + which]) return;
  if (!absmax) { memcpy(out, (const float *)op->p[2 + which] + first, (size_t)n * sizeof *out); return; }
  wane_qview q = { .dtype = kind, .block_size = STATE_BLOCK, .rows = 1, .cols = op->n[0], .codes = op->p[2 + which], .absmax = absmax,
                   .code = wane_dynamic_map(kind == WANE_BLOCK8) };
  wane_quant_kit_in_force()->dequantize(&q, first, n, out);
}

/* Stores them. A positive second moment never becomes 0: an element that then gets no gradient would fly off by lr * m / eps. */
static void optim_write(const wane_op *op, int which, int kind, int positive, int64_t first, int64_t n, const float *x) {
  float *absmax = op->p[4 + which];
  uint8_t *codes = op->p[2 + which], zero = kind == WANE_BLOCK8 ? 127 : 0;
  if (!codes) return;
  if (!absmax) { memcpy((float *)op->p[2 + which] + first, x, (size_t)n * sizeof *x); return; }
  wane_quant_kit_in_force()->quantize_8bit(kind, x, WANE_F32, first, n, STATE_BLOCK, codes, absmax);
  if (positive && !op->i[4])
    for (int64_t i = 0; i < n; i++) if (codes[first + i] == zero && x[i] > 0) codes[first + i]++;
}

static void VEC_NAME(wane_nn_optimizer)(const wane_op *op, uint32_t chunk) {
  _Alignas(64) float p[STATE_BLOCK], g[STATE_BLOCK], m[STATE_BLOCK] = { 0 }, v[STATE_BLOCK] = { 0 };
  int64_t lo, hi;
  int v_kind = op->i[2] == WANE_OPTIMIZER_ADAM ? WANE_BLOCK8U : WANE_BLOCK8;
  optim_numbers k = optim_load(op);
  vf factor = vf_set1(op->p[6] ? *(const float *)op->p[6] : 1.0f), most = vf_set1(3.40282347e38f);
  wane_op_range(op, chunk, op->n[0], STATE_BLOCK, &lo, &hi);
  for (int64_t at = lo; at < hi; at += STATE_BLOCK) {
    int64_t n = hi - at < STATE_BLOCK ? hi - at : STATE_BLOCK;
    optim_read(op, 0, WANE_BLOCK8, at, n, m);
    optim_read(op, 1, v_kind, at, n, v);
    for (int64_t i = 0; i < n; i += VW) {
      int left = vec_left(i, n);
      vf_store(p + i, vf_get_n(op->p[0], op->i[0], at + i, left));
      vf_store(g + i, vf_mul(vf_get_n(op->p[1], op->i[1], at + i, left), factor));
    }
    for (int64_t i = 0; i < n; i += VW) {
      vf grad = vf_load(g + i), np = vf_load(p + i), nm = vf_load(m + i), nv = vf_load(v + i);
      optim_vector(op, &k, grad, &np, &nm, &nv);
      /* A gradient that is no number changes nothing, nor one whose square is none: it would take its 8-bit block along. */
      vm usable = vf_le(vf_add(vf_abs(grad), vf_abs(nv)), most);
      vf_store(m + i, vf_select(usable, nm, vf_load(m + i)));
      vf_store(v + i, vf_select(usable, nv, vf_load(v + i)));
      vf_put_n(op->p[0], op->i[0], at + i, vf_select(usable, np, vf_load(p + i)), vec_left(i, n));
    }
    optim_write(op, 0, WANE_BLOCK8, 0, at, n, m);
    optim_write(op, 1, v_kind, 1, at, n, v);
  }
}
#endif
