/* random.c: arange, and random numbers from a counter: arguments are checked here, the kernels are in random_kernels.h. */
#include "convert.h"
#include "strided.h"
#include <math.h>

int wane_arange(wane_stream *s, wane_handle *out, double start, double stop, double step, int dtype) {
  int rc = wane_enter(s);
  if (rc) return rc;
  if (dtype < 0 || dtype >= WANE_DTYPE_PLAIN) return wane_fail(WANE_E_DTYPE, "arange: the dtype must be a plain one");
  double count = ceil((stop - start) / step);
  if (!(fabs(step) > 0) || !isfinite(start) || !isfinite(stop) || !isfinite(step))
    return wane_fail(WANE_E_ARG, "arange: start %g, stop %g and step %g must be finite, and the step not 0", start, stop, step);
  if (count > 0x1p48) return wane_fail(WANE_E_ARG, "arange: %g elements from %g to %g by %g are too many", count, start, stop, step);
  int64_t n = count > 0 ? (int64_t)count : 0;
  wane_tensor *y = wane_make(s, out, dtype, 1, &n);
  if (!y) return WANE_E_MEMORY;
  if (n == 0) return WANE_OK;
  wane_op *op = wane_op_new(s, WANE_OP_ARANGE);
  op->p[0] = y->data;
  op->n[0] = n;
  op->i[0] = dtype;
  op->d[0] = start;
  op->d[1] = step;
  op->nchunks = wane_chunks(n, 16384);
  wane_op_push(s, op, y, NULL);
  return WANE_OK;
}

int wane_random(wane_stream *s, wane_handle *out, int kind, double a, double b, uint64_t seed, uint64_t offset, int dtype, int ndim, const int64_t *shape) {
  int rc = wane_enter(s);
  if (rc) return rc;
  if (kind != WANE_UNIFORM && kind != WANE_NORMAL) return wane_fail(WANE_E_ARG, "random: there is no kind number %d", kind);
  if (dtype < 0 || dtype >= WANE_DTYPE_PLAIN) return wane_fail(WANE_E_DTYPE, "random: the dtype must be a plain one");
  if (!isfinite(a) || !isfinite(b)) return wane_fail(WANE_E_ARG, "random: the parameters %g and %g must be finite", a, b);
  wane_tensor *y = wane_make(s, out, dtype, ndim, shape);
  if (!y) return WANE_E_MEMORY;
  int64_t n = wane_numel(y);
  if (n == 0) return WANE_OK;
  wane_op *op = wane_op_new(s, WANE_OP_RANDOM);
  op->p[0] = y->data;
  op->n[0] = n;
  op->n[1] = (int64_t)seed;
  op->n[2] = (int64_t)offset;
  op->i[0] = dtype;
  op->i[4] = kind;
  op->d[0] = a;
  op->d[1] = b;
  op->nchunks = wane_chunks(n * 8, 16384);
  wane_op_push(s, op, y, NULL);
  return WANE_OK;
}
