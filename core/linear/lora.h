/* lora.h: what the low-rank products' front functions (lora.c) and kernels (lora_kernels.h) agree on. Internal.
 *
 * Two kernels do all four functions. One sums along a row of x, the other walks down columns; both keep x, y at 16 bits and everything
 * of rank size in f32. r is padded with zeros to whole register tiles inside a kernel only.
 *
 *   ROWS     u[m][j] = scale * sum_c drop(x)[m][c] W[j][c]                  chunks: rows
 *   COLUMNS  y[m][c] += factor[m][c] * sum_j u[m][j] W[j][c]                chunks: columns
 *            dW[j][c] = sum_m u[m][j] drop(x)[m][c]
 *
 * and, where there are tiles and nothing is dropped, in place of COLUMNS with dW and of ROWS beside it:
 *
 *   GRADIENT u (its p Y) and the share of dW (its p COPY) of a part of the rows   chunks: parts
 *   SUM      dW from the parts' shares                                            chunks: columns
 *
 * where drop(x) = factor * x, factor is 0 for a dropped element and 1 / (1 - p) for a kept one. COLUMNS skips y, dW or both where they
 * are NULL. Sums over c run lane by lane in rising c, sums over m in rising m (GRADIENT: in each part, whose
 * number the shapes decide, and then over the parts): threads do not change them. */
#ifndef WANE_LORA_H
#define WANE_LORA_H
#include "../include/wane_backend.h"

enum { WANE_LORA_MAX_RANK = 256, WANE_LORA_TILED_RANK = 128 };   /* of all kernels; of those with tiles */

enum {
  WANE_LORA_X = 0,           /* p: x [M, C], or NULL */
  WANE_LORA_W = 1,           /* p: f32 [r, C]; COLUMNS: [C, r] where WANE_LORA_TURNED */
  WANE_LORA_U = 2,           /* p: f32 [M, r]: ROWS writes it, COLUMNS reads it */
  WANE_LORA_Y = 3,           /* p, COLUMNS: y [M, C], or NULL */
  WANE_LORA_DW = 4,          /* p, COLUMNS: f32, laid out as W, or NULL */
  WANE_LORA_COPY = 5,        /* p, COLUMNS: f32 [r, C] that receives W, or NULL */
  WANE_LORA_M = 0, WANE_LORA_C = 1, WANE_LORA_R = 2, WANE_LORA_SEED = 3, WANE_LORA_OFFSET = 4,   /* n */
  WANE_LORA_PART = 5,        /* n, GRADIENT and SUM: rows of a part, a multiple of 32 */
  WANE_LORA_DTYPE = 0,       /* i: of x and y */
  WANE_LORA_TURNED = 1,      /* i: W is [C, r] */
  WANE_LORA_SCALE = 0,       /* f, ROWS */
  WANE_LORA_KEPT = 1,        /* f: 1 / (1 - p) */
  WANE_LORA_THRESHOLD = 2    /* f: wane_dropout_threshold; 0: nothing is dropped */
};

void wane_register_generic_lora(wane_backend *b);
void wane_lora_register_avx2(wane_backend *b);
void wane_lora_register_avx512(wane_backend *b);
void wane_lora_register_avx512bf16(wane_backend *b);
/* After those with vectors, to which they leave what tiles do not. */
void wane_lora_register_tiles_avx512bf16(wane_backend *b);
void wane_lora_register_amx(wane_backend *b);
#endif
