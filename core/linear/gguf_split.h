/* gguf_split.h: 256 values of a GGUF row as small integers with a factor, and for some kinds a shift, for each run of them:
 *
 *   value = factor[j / run] * q[j] + shift[j / run]
 *
 * so that one dot product serves all kinds: sum x * value = factor * (sum x * q) + shift * (sum x), run by run. The integers, factors
 * and shifts are those of quant's gguf_blocks.h. Layouts: ggml-common.h. */
#ifndef WANE_GGUF_SPLIT_H
#define WANE_GGUF_SPLIT_H
#include "../include/wane.h"

enum { WANE_GROUP = 256 };                 /* values split at once: one block of the K kinds, eight of the others */

typedef struct wane_gguf_group {
  _Alignas(32) int8_t q[WANE_GROUP];
  _Alignas(32) float factor[16], shift[16];
} wane_gguf_group;

/* Splits `blocks` blocks at `in` (1 of the K kinds, 1 to 8 of the others; what is missing becomes zeros). */
typedef void (*wane_gguf_splitter)(const uint8_t *in, int blocks, wane_gguf_group *out);

/* Values a run: 16 or 32; and whether a kind has shifts. */
static inline int wane_gguf_run(int dtype) { return dtype == WANE_Q2_K || dtype == WANE_Q3_K || dtype == WANE_Q6_K ? 16 : 32; }
static inline int wane_gguf_has_shift(int dtype) {
  return dtype == WANE_Q4_1 || dtype == WANE_Q5_1 || dtype == WANE_Q2_K || dtype == WANE_Q4_K || dtype == WANE_Q5_K;
}

wane_gguf_splitter wane_gguf_splitter_avx2(int dtype);
#endif
