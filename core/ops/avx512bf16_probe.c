/* avx512bf16_probe.c: vdpbf16ps at full rate. */
#include "../x86/simd.h"
#include "probe.h"

enum { CHAINS = 12, STEPS = 16 };
const double wane_probe_ops_avx512bf16[WANE_PROBE_KINDS] = { [WANE_PROBE_BF16] = 2.0 * 32 * CHAINS * STEPS };

static void k_bf16(const wane_op *op, uint32_t chunk) {
  __m512 a[CHAINS];
  __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = (__m512bh)_mm512_set1_epi16(0x3000);
  for (int i = 0; i < CHAINS; i++) a[i] = _mm512_set1_ps((float)i);
  for (int64_t r = 0; r < op->n[1]; r++)
    for (int k = 0; k < STEPS; k++)
      for (int i = 0; i < CHAINS; i++) a[i] = _mm512_dpbf16_ps(a[i], x, y);
  float out[16];
  for (int i = 1; i < CHAINS; i++) a[0] = _mm512_add_ps(a[0], a[i]);
  _mm512_storeu_ps(out, a[0]);
  ((float *)op->p[0])[chunk] = out[0];
}

void wane_probe_register_avx512bf16(wane_backend *b) { b->ops[WANE_OP_PROBE_BF16] = k_bf16; }
