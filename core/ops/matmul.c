/* matmul.c: the batched matrix product of tensors, by numpy.matmul's rules. Products with (quantized) weights are core/linear's. */
#include "matmul.h"
#include "convert.h"
#include "strided.h"
#include <string.h>

/* The operands as matrices with batches in front, and the result's shape. */
typedef struct product {
  wane_tensor a, b;                        /* batches only; the matrices' sizes and strides are below */
  int64_t m, n, k, am, ak, bk, bn;
  int ndim;
  int64_t shape[WANE_MAX_DIMS];            /* of C, [batch..., m, n] */
  int drop_m, drop_n;                      /* a 1-D operand's dimension does not appear in the result */
} product;

/* Takes the matrix off t's last dimensions: rows and columns of sizes and strides in size[2], stride[2]. */
static void take_matrix(wane_tensor *t, int is_right, int64_t *size, int64_t *stride) {
  if (t->ndim == 1) {
    int row = is_right;                    /* [K] is [1, K] on the left, [K, 1] on the right */
    size[row ? 0 : 1] = t->shape[0];
    stride[row ? 0 : 1] = t->stride[0];
    size[row ? 1 : 0] = 1;
    stride[row ? 1 : 0] = 0;
    t->ndim = 0;
    return;
  }
  t->ndim -= 2;
  for (int i = 0; i < 2; i++) size[i] = t->shape[t->ndim + i], stride[i] = t->stride[t->ndim + i];
}

static int plan(product *p, const wane_tensor *a, const wane_tensor *b) {
  int64_t size[2], stride[2];
  if (a->ndim == 0 || b->ndim == 0)
    return wane_fail(WANE_E_SHAPE, "matmul: %s and %s: a number is no matrix; multiply with mul", wane_shape_text(a), wane_shape_text(b));
  memset(p, 0, sizeof *p);
  p->a = *a;
  p->b = *b;
  p->drop_m = a->ndim == 1;
  p->drop_n = b->ndim == 1;
  take_matrix(&p->a, 0, size, stride);
  p->m = size[0], p->k = size[1], p->am = stride[0], p->ak = stride[1];
  take_matrix(&p->b, 1, size, stride);
  p->n = size[1], p->bk = stride[0], p->bn = stride[1];
  if (size[0] != p->k)
    return wane_fail(WANE_E_SHAPE, "matmul: %s times %s: the inner sizes %lld and %lld differ",
                     wane_shape_text(a), wane_shape_text(b), (long long)p->k, (long long)size[0]);
  int rc = wane_broadcast_shape(&p->a, &p->b, "matmul (batches)", &p->ndim, p->shape);
  if (rc) return rc;
  p->shape[p->ndim++] = p->m;
  p->shape[p->ndim++] = p->n;
  return WANE_OK;
}

/* The result without the dimensions of 1-D operands. */
static int squeezed(const product *p, int64_t *shape) {
  int ndim = p->ndim - 2;
  memcpy(shape, p->shape, sizeof p->shape);
  if (!p->drop_m) shape[ndim++] = p->m;
  if (!p->drop_n) shape[ndim++] = p->n;
  return ndim;
}

/* Enqueues c = a b for f32 or i64 operands; c is contiguous. */
static void push_matmul(wane_stream *s, product *p, wane_tensor *c) {
  wane_tensor batches = *c;
  int64_t step = p->m * p->n;
  batches.ndim = p->ndim - 2;
  for (int d = batches.ndim - 1; d >= 0; d--) {
    batches.shape[d] = p->shape[d];
    batches.stride[d] = step;
    step *= p->shape[d];
  }
  wane_strided g;
  wane_op model = { 0 };
  model.i[5] = c->dtype == WANE_I64;
  model.n[7] = p->m;
  model.n[8] = p->n;
  model.n[9] = p->k;
  model.n[10] = p->am;
  model.n[11] = p->ak;
  model.spare[0] = (uint64_t)p->bk;
  model.spare[1] = (uint64_t)p->bn;
  wane_strided_begin(&g, batches.ndim, batches.shape);
  wane_strided_add(&g, &batches);
  wane_strided_add(&g, &p->a);
  wane_strided_add(&g, &p->b);
  if (p->m * p->n == 0) return;
  /* Sixteen multiplications cost about one addition elsewhere; a tile is never shared. */
  wane_strided_push(s, &g, WANE_OP_MATMUL, &model, p->m * p->n * (p->k + 1) / 16 + 1, c);
}

int wane_matmul(wane_stream *s, wane_handle *out, const wane_handle *a, const wane_handle *b) {
  int rc = wane_enter(s);
  wane_tensor *x = rc ? NULL : wane_use(s, a, "a"), *y = x ? wane_use(s, b, "b") : NULL, *c;
  wane_handle tx = { 0 }, ty = { 0 }, raw = { 0 };
  product p;
  int64_t shape[WANE_MAX_DIMS];
  if (!y) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(x, "matmul", "a")) || (rc = wane_need_plain(y, "matmul", "b")) || (rc = plan(&p, x, y))) return rc;
  int dtype = wane_promote(x->dtype, y->dtype), compute = wane_is_float(dtype) ? WANE_F32 : WANE_I64;
  /* Views of the dtype computed in are taken as they lie, whatever their strides. */
  if (x->dtype != compute) x = wane_as(s, x, compute, &tx);
  if (x && y->dtype != compute) y = wane_as(s, y, compute, &ty);
  rc = x && y ? plan(&p, x, y) : WANE_E_MEMORY;
  int ndim = rc ? 0 : squeezed(&p, shape);
  c = rc ? NULL : wane_make(s, dtype == compute ? out : &raw, compute, ndim, shape);
  if (c) {
    push_matmul(s, &p, c);
    if (dtype != compute) rc = wane_cast(s, out, &raw, dtype);
  } else if (!rc) rc = WANE_E_MEMORY;
  wane_tensor_free(&tx);
  wane_tensor_free(&ty);
  wane_tensor_free(&raw);
  return rc;
}
