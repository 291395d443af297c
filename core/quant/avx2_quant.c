/* avx2_quant.c: the quantizers in AVX2. */
#define WANE_VEC 256
#include "../x86/vec.h"

VEC vi quant_bytes(const uint8_t *p, int k) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + k * 8))); }

VEC void quant_put(uint8_t *p, const vi v[4]) {
  const __m256i byte = _mm256_set1_epi32(255);
  __m256i a = _mm256_packs_epi32(_mm256_and_si256(v[0], byte), _mm256_and_si256(v[1], byte));
  __m256i b = _mm256_packs_epi32(_mm256_and_si256(v[2], byte), _mm256_and_si256(v[3], byte));
  __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* undoes the packing within 128-bit lanes */
  _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order));
}

typedef struct quant_levels { __m256 low, high; } quant_levels;
VEC quant_levels quant_levels_of(const float *table) {
  quant_levels l = { _mm256_loadu_ps(table), _mm256_loadu_ps(table + 8) };
  return l;
}
VEC vf quant_level(quant_levels l, vi i) {
  vf low = _mm256_permutevar8x32_ps(l.low, i), high = _mm256_permutevar8x32_ps(l.high, i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
VEC vf quant_step(vf table, vi i) { return _mm256_permutevar8x32_ps(table, i); }
VEC vi quant_mask(vm m) { return _mm256_castps_si256(m); }
/* Four bytes of pairs in every lane; each lane shifts its nibble down. */
VEC vi quant_nibbles(const uint8_t *p, int k) {
  int32_t pairs;
  memcpy(&pairs, p + k * 4, 4);
  return _mm256_srlv_epi32(_mm256_set1_epi32(pairs), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}

typedef const float *quant_map;
VEC quant_map quant_map_of(const float *table) { return table; }
VEC vf quant_mapped(quant_map m, vi i) { return _mm256_i32gather_ps(m, i, 4); }
VEC vi quant_gather_int(const uint32_t *table, vi i) { return _mm256_i32gather_epi32((const int *)table, i, 4); }
VEC vi vi_umax(vi a, vi b) { return _mm256_max_epu32(a, b); }
VEC uint32_t vi_hmax(vi v) {
  __m128i q = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  q = _mm_max_epu32(q, _mm_shuffle_epi32(q, 0x4e));
  return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(q, _mm_shuffle_epi32(q, 0xb1)));
}

#include "quant_simd.h"

WANE_QUANT_KERNELS(avx2, &kit)

void wane_quant_register_avx2(wane_backend *b) {
  wane_quant_set_kit(WANE_CPU_AVX2, &kit);
  avx2_register(b);
}
