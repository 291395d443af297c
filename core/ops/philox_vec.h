/* philox_vec.h: Philox (philox.h) on the vectors of vec.h, and dropout's factors out of its words. Included by kernels.
 *
 * Word w of element e is word e % 4 of Philox(seed, e / 4), as in random_kernels.h. A vector works on VW / 2 counters, one in each
 * 64 bits: a round's products are 64 bits wide, and only lower halves are read, so nothing needs to be masked off between rounds. */
#ifndef WANE_PHILOX_VEC_H
#define WANE_PHILOX_VEC_H
#include "../x86/vec.h"

enum { PHILOX_BLOCK = 256 };   /* words made at a time */

/* At least n words, from the first of counter value `counter` on; out holds n rounded up to a multiple of 2 VW. */
VEC void philox_words(uint64_t seed, uint64_t counter, int64_t n, uint32_t *out) {
  int32_t first[VW] = { 0 };
  for (int i = 0; i < VW / 2; i++) first[2 * i] = i / 2 + i % 2 * (VW / 4);   /* so that vi_low64 and vi_high64 give them in order */
  vi lanes = vi_load(first), lower = vi_set64(0xffffffffu), m0 = vi_set64(0xD2511F53u), m1 = vi_set64(0xCD9E8D57u);
  for (int64_t i = 0; i < n; i += 2 * VW, counter += VW / 2) {
    vi c0 = vi_add64(vi_set64(counter), lanes), c1 = vi_down64(c0), c2 = vi_set1(0), c3 = c2;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      vi a = vi_mul64(c0, m0), b = vi_mul64(c2, m1);
      c0 = vi_xor(vi_xor(vi_down64(b), c1), vi_set1((int32_t)k0));
      c2 = vi_xor(vi_xor(vi_down64(a), c3), vi_set1((int32_t)k1));
      c1 = b;
      c3 = a;
    }
    vi front = vi_or(vi_and(c0, lower), vi_up64(c1)), back = vi_or(vi_and(c2, lower), vi_up64(c3));
    vi_store((int32_t *)out + i, vi_low64(front, back));
    vi_store((int32_t *)out + i + VW, vi_high64(front, back));
  }
}

/* factors[i] = 0 where element e + i is dropped, `scale` where it is kept, for n elements; up to VW - 1 more are written.
 * threshold: wane_dropout_threshold. */
VEC void dropout_factors(uint64_t seed, uint64_t e, int64_t n, float threshold, float scale, float *factors) {
  uint32_t words[PHILOX_BLOCK + 4 * VW];
  vf t = vf_set1(threshold), kept = vf_set1(scale);
  for (int64_t i = 0; i < n; i += PHILOX_BLOCK, e += PHILOX_BLOCK) {
    int64_t count = n - i < PHILOX_BLOCK ? n - i : PHILOX_BLOCK;
    philox_words(seed, e / 4, (int64_t)(e % 4) + count, words);
    for (int64_t j = 0; j < count; j += VW) {
      vf bits = vf_from_int(vi_srl(vi_load((const int32_t *)words + e % 4 + j), 8));
      vf_store(factors + i + j, vf_select(vf_lt(bits, t), vf_zero(), kept));
    }
  }
}
#endif
