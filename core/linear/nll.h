/* nll.h: the loss of a head, scores and all: what the front function (nll.c) and the kernels (tiles_nll.h) agree on. Internal.
 *
 * Scores of a vocabulary exist a block of W's rows at a time, in a worker's scratch: with M the largest score of a row of x so far, e^(score - M) times the
 * block goes into the gradient of x at once, which shrinks when M grows, as attention does it. What is written is as large as x, not as the vocabulary.
 *
 *   NLL_PACK   x in pairs of tiles                                                                                                               chunks: 32 rows
 *   NLL_SHARES of each of a few groups of blocks, for each row of x: M, the sum of e^(score - M), the sum of e^(score - M) W without the label's own     chunks: groups
 *   NLL_MERGE  each row's nll, and the base-2 logarithm of its sum                                                                               one chunk
 *   NLL_DX     the groups' sums, in their order, by the row's own, and the label's part                                                           chunks: 32 rows
 *
 * The records are LINEAR's, with labels where the bias would be, NLL_MERGE with nll and NLL_DX with dx in y, n 2 the ignored label, f 1 the factor of
 * the loss, i 7 the labels' dtype. */
#ifndef WANE_LINEAR_NLL_H
#define WANE_LINEAR_NLL_H
#include "linear.h"

enum {
  WANE_OP_LINEAR_NLL_SHARES = WANE_OP_LINEAR + 59, WANE_OP_LINEAR_NLL_MERGE, WANE_OP_LINEAR_NLL_DX, WANE_OP_LINEAR_NLL_PACK,
  WANE_NLL_IGNORED = 2,                    /* n */
  WANE_NLL_FACTOR = 1,                     /* f */
  WANE_NLL_LABELS = 7,                     /* i; 6 is LINEAR's own */
  WANE_NLL_GROUPS = 8,
  WANE_NLL_TILES = 1280                    /* of W in the scratch, once as it is and once turned */
};

/* How the work is cut, and where things lie in the workspace, in bytes. */
typedef struct wane_nll_plan {
  int64_t block, blocks, groups, per;      /* rows of W a block (0: W's rows are too long); blocks a group */
  int64_t padded, wide;                    /* rows of x, up to whole 32; values of a row of x, up to whole 64 */
  int64_t sums, lse, own, shares, bytes;   /* [groups][2][padded], [padded] (inf: no gradient), the label's score, then nll [padded], [groups][padded * wide] */
} wane_nll_plan;

static inline wane_nll_plan wane_nll_cut(int64_t M, int64_t K, int64_t V) {
  wane_nll_plan p = { .padded = (M + 31) / 32 * 32, .wide = (K + 63) / 64 * 64, .block = 256 };
  while (p.block > 0 && p.block / 16 * (p.wide / 32 + 1) + p.wide / 16 * (p.block / 32 + 1) > WANE_NLL_TILES) p.block = p.block > 32 ? p.block / 2 : 0;
  if (p.block == 0) return p;
  p.blocks = (V + p.block - 1) / p.block;
  p.per = (p.blocks + WANE_NLL_GROUPS - 1) / WANE_NLL_GROUPS;
  p.groups = (p.blocks + p.per - 1) / p.per;
  p.sums = p.padded * p.wide * 2;
  p.lse = p.sums + p.groups * 2 * p.padded * 4;
  p.own = p.lse + p.padded * 4;
  p.shares = (p.own + p.padded * 4 + 63) / 64 * 64;
  p.bytes = p.shares + p.groups * p.padded * p.wide * 4;
  return p;
}

void wane_linear_nll_register_avx512bf16(wane_backend *b);
void wane_linear_nll_register_amx(wane_backend *b);
#endif
