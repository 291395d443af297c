/* convert.h: blocks of any plain dtype as f32 or i64 and back, the one place where elementwise kernels meet dtypes.
 *
 * A kernel computes on short contiguous buffers; contiguous f32 (i64) is used where it lies. The same source is compiled for
 * each instruction set: the plain loops are vectorised by the compiler, only the 16-bit floats need intrinsics. Both give the
 * same bits. Memory may be unaligned (mapped files), hence the types below. */
#ifndef WANE_CONVERT_H
#define WANE_CONVERT_H
#include "../base/float16.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

enum { WANE_BLOCK = 512 };                 /* elements of a buffer */

typedef float wane_f32u __attribute__((aligned(1), may_alias));
typedef uint16_t wane_u16u __attribute__((aligned(1), may_alias));
typedef uint32_t wane_u32u __attribute__((aligned(1), may_alias));
typedef int32_t wane_i32u __attribute__((aligned(1), may_alias));
typedef int64_t wane_i64u __attribute__((aligned(1), may_alias));

static inline int wane_is_float_dtype(int dtype) { return dtype <= WANE_BF16; }

/* f32 -> integer: toward zero, saturating, NaN gives 0. lo and hi are exact in f32 or rounded outward by their callers. */
static inline int64_t wane_f32_to_i64(float x) {
  if (x >= 0x1p63f) return INT64_MAX;
  if (x <= -0x1p63f) return INT64_MIN;
  return x == x ? (int64_t)x : 0;
}

static inline int64_t wane_clamp_i64(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

/* Contiguous halves, eight at a time where the CPU can. */
static inline void wane_widen_f16(float *restrict y, const wane_u16u *restrict x, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(x + i))));
#endif
  for (; i < n; i++) y[i] = wane_f16_to_f32(x[i]);
}

static inline void wane_narrow_f16(wane_u16u *restrict y, const wane_f32u *restrict x, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i *)(void *)(y + i), _mm256_cvtps_ph(_mm256_loadu_ps((const float *)(const void *)(x + i)), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; i++) y[i] = wane_f32_to_f16(x[i]);
}

/* n elements of `dtype`, `stride` elements apart, as f32: in `buffer` (n <= WANE_BLOCK), or where they lie. */
static inline const wane_f32u *wane_load_f32(int dtype, const char *p, int64_t stride, int64_t n, float *restrict buffer) {
#define EACH(type, widen)                                                                        \
  do {                                                                                           \
    const type *x = (const type *)(const void *)p;                                               \
    if (stride == 1) for (int64_t i = 0; i < n; i++) buffer[i] = widen(x[i]);                    \
    else for (int64_t i = 0; i < n; i++) buffer[i] = widen(x[i * stride]);                       \
  } while (0)
#define PLAIN(v) ((float)(v))
#define TRUTH(v) ((v) != 0 ? 1.0f : 0.0f)
  switch (dtype) {
    case WANE_F32:
      if (stride == 1) return (const wane_f32u *)(const void *)p;
      EACH(wane_f32u, PLAIN);
      break;
    case WANE_F16:
      if (stride == 1) wane_widen_f16(buffer, (const wane_u16u *)(const void *)p, n);
      else EACH(wane_u16u, wane_f16_to_f32);
      break;
    case WANE_BF16: EACH(wane_u16u, wane_bf16_to_f32); break;
    case WANE_I8: EACH(int8_t, PLAIN); break;
    case WANE_U8: EACH(uint8_t, PLAIN); break;
    case WANE_I32: EACH(wane_i32u, PLAIN); break;
    case WANE_I64: EACH(wane_i64u, PLAIN); break;
    default: EACH(uint8_t, TRUTH); break;
  }
#undef PLAIN
#undef TRUTH
#undef EACH
  return (const wane_f32u *)(const void *)buffer;
}

/* The same as i64, for integers and bool (1 or 0). */
static inline const wane_i64u *wane_load_i64(int dtype, const char *p, int64_t stride, int64_t n, int64_t *restrict buffer) {
#define EACH(type, widen)                                                                        \
  do {                                                                                           \
    const type *x = (const type *)(const void *)p;                                               \
    if (stride == 1) for (int64_t i = 0; i < n; i++) buffer[i] = (int64_t)widen(x[i]);           \
    else for (int64_t i = 0; i < n; i++) buffer[i] = (int64_t)widen(x[i * stride]);              \
  } while (0)
#define TRUTH(v) ((v) != 0)
  switch (dtype) {
    case WANE_I8: EACH(int8_t, ); break;
    case WANE_U8: EACH(uint8_t, ); break;
    case WANE_I32: EACH(wane_i32u, ); break;
    case WANE_I64:
      if (stride == 1) return (const wane_i64u *)(const void *)p;
      EACH(wane_i64u, );
      break;
    default: EACH(uint8_t, TRUTH); break;
  }
#undef TRUTH
#undef EACH
  return (const wane_i64u *)(const void *)buffer;
}

/* Stores n values as `dtype`, `stride` elements apart: rounded once to a 16-bit float, truncated and saturated to an integer,
 * != 0 to bool. */
static inline void wane_store_f32(int dtype, char *p, int64_t stride, int64_t n, const wane_f32u *restrict v) {
#define EACH(type, narrow)                                                                       \
  do {                                                                                           \
    type *y = (type *)(void *)p;                                                                 \
    if (stride == 1) for (int64_t i = 0; i < n; i++) y[i] = (type)(narrow);                      \
    else for (int64_t i = 0; i < n; i++) y[i * stride] = (type)(narrow);                         \
  } while (0)
  switch (dtype) {
    case WANE_F32: EACH(wane_f32u, v[i]); break;
    case WANE_F16:
      if (stride == 1) wane_narrow_f16((wane_u16u *)(void *)p, v, n);
      else EACH(wane_u16u, wane_f32_to_f16(v[i]));
      break;
    case WANE_BF16: EACH(wane_u16u, wane_f32_to_bf16(v[i])); break;
    case WANE_I8: EACH(int8_t, wane_clamp_i64(wane_f32_to_i64(v[i]), -128, 127)); break;
    case WANE_U8: EACH(uint8_t, wane_clamp_i64(wane_f32_to_i64(v[i]), 0, 255)); break;
    case WANE_I32: EACH(wane_i32u, wane_clamp_i64(wane_f32_to_i64(v[i]), INT32_MIN, INT32_MAX)); break;
    case WANE_I64: EACH(wane_i64u, wane_f32_to_i64(v[i])); break;
    default: EACH(uint8_t, v[i] != 0); break;
  }
#undef EACH
}

/* Stores integers: the low bits (two's complement), != 0 to bool. dtype is an integer or bool. */
static inline void wane_store_i64(int dtype, char *p, int64_t stride, int64_t n, const wane_i64u *restrict v) {
#define EACH(type, narrow)                                                                       \
  do {                                                                                           \
    type *y = (type *)(void *)p;                                                                 \
    if (stride == 1) for (int64_t i = 0; i < n; i++) y[i] = (type)(narrow);                      \
    else for (int64_t i = 0; i < n; i++) y[i * stride] = (type)(narrow);                         \
  } while (0)
  switch (dtype) {
    case WANE_I8: EACH(int8_t, v[i]); break;
    case WANE_U8: EACH(uint8_t, v[i]); break;
    case WANE_I32: EACH(wane_i32u, v[i]); break;
    case WANE_I64: EACH(wane_i64u, v[i]); break;
    default: EACH(uint8_t, v[i] != 0); break;
  }
#undef EACH
}

/* One value as `dtype`'s bytes in the low end of the result (little-endian): for fills. Integers keep 64-bit exactness. */
static inline uint64_t wane_value_bits(int dtype, double value) {
  char bytes[8] = { 0 };
  uint64_t bits;
  if (wane_is_float_dtype(dtype) || dtype == WANE_BOOL) {
    float v = dtype == WANE_BOOL ? (value != 0 ? 1.0f : 0.0f) : (float)value;
    wane_store_f32(dtype, bytes, 1, 1, &v);
  } else {
    int64_t lo = dtype == WANE_I8 ? -128 : dtype == WANE_U8 ? 0 : dtype == WANE_I32 ? INT32_MIN : INT64_MIN;
    int64_t hi = dtype == WANE_I8 ? 127 : dtype == WANE_U8 ? 255 : dtype == WANE_I32 ? INT32_MAX : INT64_MAX;
    int64_t v = value >= 0x1p63 ? INT64_MAX : value <= -0x1p63 ? INT64_MIN : value == value ? (int64_t)value : 0;
    v = wane_clamp_i64(v, lo, hi);
    wane_store_i64(dtype, bytes, 1, 1, &v);
  }
  memcpy(&bits, bytes, 8);
  return bits;
}
#endif
