/* avx512_quant.c: the quantizers in AVX-512. */
#define WANE_VEC 512
#include "../x86/vec.h"

VEC vi quant_bytes(const uint8_t *p, int k) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p + k * 16))); }

VEC void quant_put(uint8_t *p, const vi v[2]) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(v[0]));
  _mm_storeu_si128((__m128i *)(p + 16), _mm512_cvtepi32_epi8(v[1]));
}

typedef __m512 quant_levels;
VEC quant_levels quant_levels_of(const float *table) { return _mm512_loadu_ps(table); }
VEC vf quant_level(quant_levels l, vi i) { return _mm512_permutexvar_ps(i, l); }
VEC vf quant_step(vf table, vi i) { return _mm512_permutexvar_ps(i, table); }
VEC vi quant_mask(vm m) { return _mm512_movm_epi32(m); }
VEC vf quant_gather(const float *table, vi i) { return _mm512_i32gather_ps(i, table, 4); }
VEC vi quant_gather_int(const uint32_t *table, vi i) { return _mm512_i32gather_epi32(i, table, 4); }
VEC vi vi_umax(vi a, vi b) { return _mm512_max_epu32(a, b); }
VEC uint32_t vi_hmax(vi v) { return _mm512_reduce_max_epu32(v); }

#include "quant_simd.h"

WANE_QUANT_KERNELS(avx512, &kit)

void wane_quant_register_avx512(wane_backend *b) {
  wane_quant_set_kit(WANE_CPU_AVX512, &kit);
  avx512_register(b);
}
