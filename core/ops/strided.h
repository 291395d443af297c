/* strided.h: one loop nest for every elementwise op. Internal to the ops.
 *
 * A front function describes its operands (operand 0 is the output) over one shape; strided.c drops dimensions of size 1,
 * orders the rest by the output's strides and merges neighbours, so that most ops become one or two dimensions whatever the
 * tensors looked like. More than five dimensions that will not merge are peeled: one op for each index of the extra ones.
 * Kernels then see, in the record:
 *   p[k], stride[k][0..ndim)   operand k and its element strides (0 where it is broadcast)
 *   n[0..ndim), n[5], n[6]     sizes, their product, ndim (1 to 5)
 *   i[0..3]                    the operands' dtypes
 * and the op's own fields in i[4..15], n[7..11], d, f, spare. */
#ifndef WANE_STRIDED_H
#define WANE_STRIDED_H
#include "../tensor/tensor.h"

typedef struct wane_strided {
  int operands, ndim;
  int64_t size[WANE_MAX_DIMS];
  int64_t stride[WANE_OP_OPERANDS][WANE_MAX_DIMS];
  char *data[WANE_OP_OPERANDS];
  int dtype[WANE_OP_OPERANDS];
} wane_strided;

/* Starts a loop over `shape`. */
void wane_strided_begin(wane_strided *g, int ndim, const int64_t *shape);
/* Adds t, broadcast against the loop's shape from the right; the shapes must be known to fit. */
void wane_strided_add(wane_strided *g, const wane_tensor *t);
/* Enqueues the loop as op `code`; own fields are taken from `model`. work: cost of an element, 1 for an addition. Nothing is
 * enqueued for an empty loop. */
void wane_strided_push(wane_stream *s, wane_strided *g, int code, const wane_op *model, int64_t work, wane_tensor *written);
/* The shape a and b broadcast to; WANE_E_SHAPE (naming both) if they do not. what: "binary", … for the message. */
int wane_broadcast_shape(const wane_tensor *a, const wane_tensor *b, const char *what, int *ndim, int64_t *shape);
/* The dtype of an op on a and b, as wane_binary's comment in wane.h says. */
int wane_promote(int a, int b);
/* WANE_E_DTYPE unless t is of a plain dtype. */
int wane_need_plain(const wane_tensor *t, const char *op, const char *what);

/* ---- for kernels ---- */

/* Bytes of an element of a plain dtype. */
static inline int64_t wane_element_size(int dtype) {
  static const int8_t size[WANE_DTYPE_PLAIN] = { 4, 2, 2, 1, 1, 4, 8, 1 };
  return size[dtype];
}

/* n elements along the innermost dimension; p and stride as in the record. */
typedef void (*wane_run)(const wane_op *op, char *const p[WANE_OP_OPERANDS], const int64_t stride[WANE_OP_OPERANDS], int64_t n);

/* Calls `run` for every stretch of innermost elements in this chunk of the loop, cut at multiples of `grain` elements. */
static inline void wane_walk(const wane_op *op, uint32_t chunk, int operands, int64_t grain, wane_run run) {
  int64_t lo, hi, index[5], inner[WANE_OP_OPERANDS] = { 0 };
  int ndim = (int)op->n[6], last = ndim - 1;
  wane_op_range(op, chunk, op->n[5], grain, &lo, &hi);
  int64_t rest = lo;
  for (int d = last; d >= 0; d--) index[d] = rest % op->n[d], rest /= op->n[d];
  for (int k = 0; k < operands; k++) inner[k] = op->stride[k][last];
  while (lo < hi) {
    char *p[WANE_OP_OPERANDS] = { 0 };
    int64_t n = op->n[last] - index[last];
    if (n > hi - lo) n = hi - lo;
    for (int k = 0; k < operands; k++) {
      int64_t at = 0;
      for (int d = 0; d < ndim; d++) at += index[d] * op->stride[k][d];
      p[k] = (char *)op->p[k] + at * wane_element_size(op->i[k]);
    }
    run(op, p, inner, n);
    lo += n;
    index[last] += n;
    for (int d = last; d > 0 && index[d] == op->n[d]; d--) index[d] = 0, index[d - 1]++;
  }
}
#endif
