/* avx512_probe.c: multiply-adds at full rate with 512-bit registers: FMA and vpdpbusd. */
#include "../x86/simd.h"
#include "probe.h"

enum { CHAINS = 12, STEPS = 16 };
const double wane_probe_ops_avx512[WANE_PROBE_KINDS] = { [WANE_PROBE_F32] = 2.0 * 16 * CHAINS * STEPS, [WANE_PROBE_I8] = 2.0 * 64 * CHAINS * STEPS };

static void k_f32(const wane_op *op, uint32_t chunk) {
  __m512 a[CHAINS], x = _mm512_set1_ps(1.0f - 1e-7f), y = _mm512_set1_ps(1e-9f);
  for (int i = 0; i < CHAINS; i++) a[i] = _mm512_set1_ps((float)i);
  for (int64_t r = 0; r < op->n[1]; r++)
    for (int k = 0; k < STEPS; k++)
      for (int i = 0; i < CHAINS; i++) a[i] = _mm512_fmadd_ps(a[i], x, y);
  float out[16];
  for (int i = 1; i < CHAINS; i++) a[0] = _mm512_add_ps(a[0], a[i]);
  _mm512_storeu_ps(out, a[0]);
  ((float *)op->p[0])[chunk] = out[0];
}

static void k_i8(const wane_op *op, uint32_t chunk) {
  __m512i a[CHAINS], x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(1);
  for (int i = 0; i < CHAINS; i++) a[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < op->n[1]; r++)
    for (int k = 0; k < STEPS; k++)
      for (int i = 0; i < CHAINS; i++) {
#ifdef WANE_EMULATE
        a[i] = _mm512_dpbusd_epi32(a[i], x, y);
#else
        __asm__("vpdpbusd %2, %1, %0" : "+v"(a[i]) : "v"(x), "v"(y));   /* gcc 12 spills the accumulators of the intrinsic */
#endif
      }
  int32_t out[16];
  for (int i = 1; i < CHAINS; i++) a[0] = _mm512_add_epi32(a[0], a[i]);
  _mm512_storeu_si512(out, a[0]);
  ((float *)op->p[0])[chunk] = (float)out[0];
}

void wane_probe_register_avx512(wane_backend *b) {
  b->ops[WANE_OP_PROBE_F32] = k_f32;
  b->ops[WANE_OP_PROBE_I8] = k_i8;
}
