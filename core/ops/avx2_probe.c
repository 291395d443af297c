/* avx2_probe.c: multiply-adds at full rate: FMA, and the byte products of maddubs + madd. */
#include "probe.h"
#include <immintrin.h>

enum { CHAINS = 10, STEPS = 16 };
const double wane_probe_ops_avx2[WANE_PROBE_KINDS] = { [WANE_PROBE_F32] = 2.0 * 8 * CHAINS * STEPS, [WANE_PROBE_I8] = 2.0 * 32 * CHAINS * STEPS };

static void k_f32(const wane_op *op, uint32_t chunk) {
  __m256 a[CHAINS], x = _mm256_set1_ps(1.0f - 1e-7f), y = _mm256_set1_ps(1e-9f);
  for (int i = 0; i < CHAINS; i++) a[i] = _mm256_set1_ps((float)i);
  for (int64_t r = 0; r < op->n[1]; r++)
    for (int k = 0; k < STEPS; k++)
      for (int i = 0; i < CHAINS; i++) a[i] = _mm256_fmadd_ps(a[i], x, y);
  for (int i = 1; i < CHAINS; i++) a[0] = _mm256_add_ps(a[0], a[i]);
  ((float *)op->p[0])[chunk] = _mm256_cvtss_f32(a[0]);
}

static void k_i8(const wane_op *op, uint32_t chunk) {
  __m256i a[CHAINS], x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(1), one = _mm256_set1_epi16(1);
  for (int i = 0; i < CHAINS; i++) a[i] = _mm256_set1_epi32(i);
  for (int64_t r = 0; r < op->n[1]; r++)
    for (int k = 0; k < STEPS; k++)
      for (int i = 0; i < CHAINS; i++) {
        __asm__ volatile("" : "+x"(x));               /* the products must not be hoisted out of the loop */
        a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), one));
      }
  for (int i = 1; i < CHAINS; i++) a[0] = _mm256_add_epi32(a[0], a[i]);
  ((float *)op->p[0])[chunk] = (float)_mm256_extract_epi32(a[0], 0);
}

void wane_probe_register_avx2(wane_backend *b) {
  b->ops[WANE_OP_PROBE_F32] = k_f32;
  b->ops[WANE_OP_PROBE_I8] = k_i8;
}
