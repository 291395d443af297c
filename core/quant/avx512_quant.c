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

/* Eight bytes of pairs: four in the lower half of the lanes, four in the upper; each lane shifts its nibble down. */
VEC vi quant_nibbles(const uint8_t *p, int k) {
  const vi shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const __m128i low = _mm_loadu_si32(p + k * 8), high = _mm_loadu_si32(p + k * 8 + 4);
  return _mm512_srlv_epi32(_mm512_mask_broadcastd_epi32(_mm512_broadcastd_epi32(low), 0xff00, high), shift);
}

/* A map in registers: eight look-ups of 32 entries, and of those the one that the code's upper bits choose. (A gather is slow, and
 * very slow where the processor was mended against gather data sampling.) */
typedef struct quant_map { __m512 part[16]; } quant_map;
VEC quant_map quant_map_of(const float *table) {
  quant_map m;
#pragma GCC unroll 16
  for (int k = 0; k < 16; k++) m.part[k] = _mm512_loadu_ps(table + 16 * k);
  return m;
}
VEC vf quant_mapped(quant_map m, vi i) {
  const vm bit5 = _mm512_test_epi32_mask(i, vi_set1(32)), bit6 = _mm512_test_epi32_mask(i, vi_set1(64)), bit7 = _mm512_test_epi32_mask(i, vi_set1(128));
  vf v[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++) v[k] = _mm512_permutex2var_ps(m.part[2 * k], i, m.part[2 * k + 1]);
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) v[k] = vf_select(bit5, v[2 * k + 1], v[2 * k]);
  return vf_select(bit7, vf_select(bit6, v[3], v[2]), vf_select(bit6, v[1], v[0]));
}

VEC vi quant_gather_int(const uint32_t *table, vi i) { return _mm512_i32gather_epi32(i, table, 4); }
VEC vi vi_umax(vi a, vi b) { return _mm512_max_epu32(a, b); }
VEC uint32_t vi_hmax(vi v) { return _mm512_reduce_max_epu32(v); }

#include "quant_simd.h"

WANE_QUANT_KERNELS(avx512, &kit)

void wane_quant_register_avx512(wane_backend *b) {
  wane_quant_set_kit(WANE_CPU_AVX512, &kit);
  avx512_register(b);
}
