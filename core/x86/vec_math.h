/* vec_math.h: exp, log, tanh, erf and the activations on the vectors of vec.h.
 *
 * Polynomials were fitted for these intervals by Remez exchange in double and rounded to f32. Largest errors over all f32
 * inputs: exp 1.0, log 0.9, tanh 1.4, erf 1.3 units in the last place, with FMA or without.
 * NaN gives NaN, infinities their limits, subnormal results are kept by vec_exp. */
#ifndef WANE_VEC_MATH_H
#define WANE_VEC_MATH_H
#include "vec.h"

/* e^x. x = n ln2 + r, |r| <= ln2/2; 2^n is applied in two factors so that the ends of the range round once, or by
 * the instruction that does so. */
VEC vf vec_exp(vf x) {
  x = vf_min(vf_set1(89.0f), vf_max(vf_set1(-104.0f), x));
  vi n = vi_from_float(vf_mul(x, vf_set1(1.44269504f)));
  vf k = vf_from_int(n);
  vf r = vf_fma(k, vf_set1(-0.693359375f), x);
  r = vf_fma(k, vf_set1(2.12194440e-4f), r);
  vf p = vf_fma(r, vf_set1(1.990783743e-04f), vf_set1(1.394882027e-03f));
  p = vf_fma(p, r, vf_set1(8.333285646e-03f));
  p = vf_fma(p, r, vf_set1(4.166623729e-02f));
  p = vf_fma(p, r, vf_set1(1.666666676e-01f));
  p = vf_fma(p, r, vf_set1(5.000000082e-01f));
  p = vf_add(vf_fma(p, vf_mul(r, r), r), vf_set1(1.0f));
#if defined(WANE_VEC) && WANE_VEC == 512 && !defined(WANE_EMULATE)
  return _mm512_scalef_ps(p, k);
#else
  vi half = vi_sra(n, 1), rest = vi_sub(n, half);
  p = vf_mul(p, vf_bits(vi_sll(vi_add(half, vi_set1(127)), 23)));
  return vf_mul(p, vf_bits(vi_sll(vi_add(rest, vi_set1(127)), 23)));
#endif
}

/* 2^x for x <= 0, results below 2^-126 flushed to 0: the attention's exponential, cheaper by half. NaN gives NaN. */
VEC vf vec_exp2_negative(vf x) {
  vm tiny = vf_lt(x, vf_set1(-126.0f));
  vf z = vf_max(vf_set1(-126.0f), x);
  vi n = vi_from_float(z);
  vf r = vf_sub(z, vf_from_int(n));
  vf p = vf_fma(r, vf_set1(1.546973198e-04f), vf_set1(1.341000097e-03f));
  p = vf_fma(p, r, vf_set1(9.618030783e-03f));
  p = vf_fma(p, r, vf_set1(5.550297314e-02f));
  p = vf_fma(p, r, vf_set1(2.402265108e-01f));
  p = vf_fma(p, r, vf_set1(6.931472254e-01f));
  p = vf_fma(p, r, vf_set1(1.0f));
  return vf_select(tiny, vf_zero(), vf_mul(p, vf_bits(vi_sll(vi_add(n, vi_set1(127)), 23))));
}

/* Natural logarithm: x = 2^e m, sqrt(1/2) <= m < sqrt(2). 0 gives -inf, negative NaN. */
VEC vf vec_log(vf x) {
  vm small = vf_lt(x, vf_set1(1.17549435e-38f));
  vf z = vf_select(small, vf_mul(x, vf_set1(8388608.0f)), x);
  vi u = vi_bits(z);
  vi e = vi_sra(vi_sub(u, vi_set1(0x3f3504f3)), 23);
  vf m = vf_bits(vi_sub(u, vi_sll(e, 23)));
  vf k = vf_sub(vf_from_int(e), vf_select(small, vf_set1(23.0f), vf_zero()));
  vf f = vf_sub(m, vf_set1(1.0f));
  vf p = vf_fma(f, vf_set1(6.746633934e-02f), vf_set1(-1.167564553e-01f));
  p = vf_fma(p, f, vf_set1(1.188816173e-01f));
  p = vf_fma(p, f, vf_set1(-1.240558993e-01f));
  p = vf_fma(p, f, vf_set1(1.421955258e-01f));
  p = vf_fma(p, f, vf_set1(-1.666799581e-01f));
  p = vf_fma(p, f, vf_set1(2.000211865e-01f));
  p = vf_fma(p, f, vf_set1(-2.500000960e-01f));
  p = vf_fma(p, f, vf_set1(3.333331260e-01f));
  vf s = vf_mul(f, f);
  vf low = vf_fma(k, vf_set1(-2.12194440e-4f), vf_mul(vf_mul(p, f), s));
  vf y = vf_add(vf_fma(s, vf_set1(-0.5f), low), f);
  y = vf_fma(k, vf_set1(0.693359375f), y);
  vf infinity = vf_set1(__builtin_inff());
  y = vf_select(vf_eq(x, infinity), x, y);
  y = vf_select(vf_eq(x, vf_zero()), vf_neg(infinity), y);
  return vf_select(vf_le(vf_zero(), x), y, vf_set1(__builtin_nanf("")));
}

/* tanh: an odd polynomial near 0, 1 - 2/(e^2|x| + 1) beyond. */
VEC vf vec_tanh(vf x) {
  vf a = vf_abs(x), z = vf_mul(x, x);
  vf p = vf_fma(z, vf_set1(2.231066244e-03f), vf_set1(-8.267093275e-03f));
  p = vf_fma(p, z, vf_set1(2.173444076e-02f));
  p = vf_fma(p, z, vf_set1(-5.395247578e-02f));
  p = vf_fma(p, z, vf_set1(1.333324779e-01f));
  p = vf_fma(p, z, vf_set1(-3.333333178e-01f));
  vf near = vf_fma(vf_mul(p, z), a, a);
  vf far = vf_sub(vf_set1(1.0f), vf_div(vf_set1(2.0f), vf_add(vec_exp(vf_add(a, a)), vf_set1(1.0f))));
  return vf_copysign(vf_select(vf_lt(vf_set1(0.6f), a), far, near), x);
}

VEC vf vec_sigmoid(vf x) { return vf_div(vf_set1(1.0f), vf_add(vf_set1(1.0f), vec_exp(vf_neg(x)))); }

/* erf: x + x P(x^2) below 0.93, 1 - exp(Q(|x|)) beyond, where Q approximates log(erfc). */
VEC vf vec_erf(vf x) {
  vf a = vf_abs(x), z = vf_mul(x, x);
  vf p = vf_fma(z, vf_set1(8.345254374e-05f), vf_set1(-8.137445767e-04f));
  p = vf_fma(p, z, vf_set1(5.200635182e-03f));
  p = vf_fma(p, z, vf_set1(-2.685927123e-02f));
  p = vf_fma(p, z, vf_set1(1.128369395e-01f));
  p = vf_fma(p, z, vf_set1(-3.761263370e-01f));
  p = vf_fma(p, z, vf_set1(1.283791666e-01f));
  vf near = vf_fma(p, x, x);
  vf t = vf_min(vf_set1(4.1f), a);                        /* erf is 1 in f32 from 3.92 on; NaN passes */
  vf q = vf_fma(t, vf_set1(1.982196004e-04f), vf_set1(-3.065489778e-03f));
  q = vf_fma(q, t, vf_set1(2.231521101e-02f));
  q = vf_fma(q, t, vf_set1(-1.041136745e-01f));
  q = vf_fma(q, t, vf_set1(-6.369760880e-01f));
  q = vf_fma(q, t, vf_set1(-1.127797240e+00f));
  q = vf_fma(q, t, vf_set1(-1.664482923e-04f));
  vf far = vf_copysign(vf_sub(vf_set1(1.0f), vec_exp(q)), x);
  return vf_select(vf_lt(vf_set1(0.92f), a), far, near);
}

/* The activations among the unary op codes of wane.h section 8 (transformers activations.py); other codes give x. A constant
 * `act` leaves one formula, so call it from loops specialised by a switch. */
VEC vf vec_activation(vf x, int act) {
  vf half_x = vf_mul(vf_set1(0.5f), x);
  switch (act) {
  case WANE_RELU: return vf_max(vf_zero(), x);
  case WANE_SILU: return vf_div(x, vf_add(vf_set1(1.0f), vec_exp(vf_neg(x))));
  case WANE_SIGMOID: return vec_sigmoid(x);
  case WANE_TANH: return vec_tanh(x);
  case WANE_ERF: return vec_erf(x);
  case WANE_GELU: return vf_fma(half_x, vec_erf(vf_mul(x, vf_set1(0.70710678f))), half_x);
  case WANE_GELU_TANH: {
    vf inner = vf_mul(vf_set1(0.79788456f), vf_fma(vf_mul(vf_set1(0.044715f), vf_mul(x, x)), x, x));
    return vf_fma(half_x, vec_tanh(inner), half_x);
  }
  case WANE_QUICK_GELU: return vf_div(x, vf_add(vf_set1(1.0f), vec_exp(vf_mul(vf_set1(-1.702f), x))));
  default: return x;
  }
}
#endif
