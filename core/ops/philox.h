/* philox.h: the counter generator Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
 *
 * Element i of a random tensor is a function of (seed, offset + i) alone: no state, any order, any number of threads. */
#ifndef WANE_PHILOX_H
#define WANE_PHILOX_H
#include <stdint.h>

/* Four random words of counter value `counter` under `seed`. Counter 0, seed 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8. */
static inline void wane_philox(uint64_t seed, uint64_t counter, uint32_t out[4]) {
  uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0, n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)b; c3 = (uint32_t)a; c0 = n0; c2 = n2;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}

/* Uniform in [0, 1) with 53 bits out of two words, and with 24 bits out of one. */
static inline double wane_uniform53(uint32_t hi, uint32_t lo) { return (double)(((uint64_t)hi << 32 | lo) >> 11) * 0x1p-53; }
static inline float wane_uniform24(uint32_t word) { return (float)(word >> 8) * 0x1p-24f; }

/* Dropout: element i is dropped where its 24 random bits are below this threshold, that is where the uniform number made of them is
 * below p, 0 <= p < 1. The product is exact, so every kernel drops the same elements. */
static inline float wane_dropout_threshold(double p) {
  double bits = p * 0x1p24;
  return (float)((double)(int32_t)bits < bits ? (int32_t)bits + 1 : (int32_t)bits);
}
#endif
