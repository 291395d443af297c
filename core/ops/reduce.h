/* reduce.h: what the front functions and the kernels of reductions agree on. Internal. */
#ifndef WANE_REDUCE_H
#define WANE_REDUCE_H
#include "strided.h"

/* A row is reduced in pieces of this many elements, merged in order: the same result whether one worker does the whole row
 * or many share it. */
enum { WANE_PIECE = 4096 };

/* What is known of some elements. sum, product, norm: a (or i for integers); var: a mean, b sum of squared differences;
 * amax, argmax: a (or i) the extreme, at its index, -1 before the first element; any, all: i. */
typedef struct wane_reduced {
  double a, b;
  int64_t i, at, count;
} wane_reduced;

/* Stages of WANE_OP_REDUCE (i[6]). */
enum {
  WANE_REDUCE_WHOLE,   /* strided.h's loop over outputs: operand 0 the output, operand 1 x without the reduced dimension; n[7] its size, n[8] its stride in x */
  WANE_REDUCE_PIECES,  /* p[0] states [rows][pieces], p[1] x; n[0] rows, n[1] pieces, n[2] stride between rows, n[7], n[8]; i[1] dtype of x */
  WANE_REDUCE_MERGE    /* p[0] output [rows], p[1] states; n[0], n[1]; i[0] dtype of the output */
};
/* i[4] operation, i[5] computed in integers. WANE_OP_CUMSUM: strided.h's loop over rows, n[7] size, n[8] and n[9] strides of
 * the summed dimension in x and in the output, i[5]. */
#endif
