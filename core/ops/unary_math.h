/* unary_math.h: the one-argument functions on blocks of f32. Included by elementwise_kernels.h for each instruction set, whose
 * width the file has chosen (WANE_VEC, see vec.h). Exponentials and their like are vec_math.h's; sine and cosine are libm's. */
#ifndef WANE_UNARY_MATH_H
#define WANE_UNARY_MATH_H
#include "../x86/vec_math.h"
#include "convert.h"
#include <math.h>

static inline float sign_f32(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }

/* y = f(x): one loop a function, so that the compiler vectorises what it can. */
static void unary_f32(int code, const wane_f32u *restrict x, float *restrict y, int64_t n) {
#define EACH(expression) for (int64_t i = 0; i < n; i++) y[i] = (expression); break
#define VECTOR(expression)                                                                       \
  for (int64_t i = 0; i < n; i += VW) {                                                          \
    vf v = vf_get_n(x, WANE_F32, i, vec_left(i, n));                                             \
    vf_put_n(y, WANE_F32, i, expression, vec_left(i, n));                                        \
  }                                                                                              \
  break
  switch (code) {
    case WANE_NEG: EACH(-x[i]);
    case WANE_ABS: EACH(fabsf(x[i]));
    case WANE_SQRT: EACH(sqrtf(x[i]));
    case WANE_RSQRT: EACH(1.0f / sqrtf(x[i]));
    case WANE_EXP: VECTOR(vec_exp(v));
    case WANE_LOG: VECTOR(vec_log(v));
    case WANE_SIN: EACH(sinf(x[i]));
    case WANE_COS: EACH(cosf(x[i]));
    case WANE_TANH: VECTOR(vec_activation(v, WANE_TANH));
    case WANE_SIGMOID: VECTOR(vec_activation(v, WANE_SIGMOID));
    case WANE_FLOOR: EACH(floorf(x[i]));
    case WANE_CEIL: EACH(ceilf(x[i]));
    case WANE_ROUND: EACH(rintf(x[i]));
    case WANE_SIGN: EACH(sign_f32(x[i]));
    case WANE_NOT: EACH(x[i] == 0 ? 1.0f : 0.0f);
    case WANE_ISNAN: EACH(x[i] != x[i] ? 1.0f : 0.0f);
    case WANE_ISFINITE: EACH(fabsf(x[i]) <= 3.40282347e38f ? 1.0f : 0.0f);
    case WANE_RECIPROCAL: EACH(1.0f / x[i]);
    case WANE_SQUARE: EACH(x[i] * x[i]);
    case WANE_RELU: EACH(x[i] < 0 ? 0.0f : x[i]);           /* NaN stays */
    case WANE_SILU: VECTOR(vec_activation(v, WANE_SILU));
    case WANE_GELU: VECTOR(vec_activation(v, WANE_GELU));
    case WANE_GELU_TANH: VECTOR(vec_activation(v, WANE_GELU_TANH));
    case WANE_QUICK_GELU: VECTOR(vec_activation(v, WANE_QUICK_GELU));
    case WANE_ERF: VECTOR(vec_activation(v, WANE_ERF));
    default: EACH(x[i]);
  }
#undef EACH
#undef VECTOR
}
#endif
