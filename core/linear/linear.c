/* linear.c: wane_linear and wane_linear_backward: checks, memory, and the choice of kernels. The frame is explained in linear.h. */
#include "linear.h"
#include "int8.h"
#include "lora.h"
#include "../tensor/tensor.h"

int wane_linear_group(int dtype) {
  if (wane_is_float(dtype)) return WANE_GROUP_FLOAT;
  switch (dtype) {
    case WANE_NF4: case WANE_FP4: return WANE_GROUP_4BIT;
    case WANE_INT8: return WANE_GROUP_INT8;
    case WANE_BLOCK8: case WANE_BLOCK8U: return WANE_GROUP_BLOCK8;
    case WANE_Q4_0: case WANE_Q4_1: case WANE_Q5_0: case WANE_Q5_1: case WANE_Q8_0: return WANE_GROUP_GGUF;
    case WANE_Q2_K: case WANE_Q3_K: case WANE_Q4_K: case WANE_Q5_K: case WANE_Q6_K: return WANE_GROUP_GGUF_K;
    default: return wane_gguf_block(dtype) ? WANE_GROUP_GGUF_TABLE : -1;
  }
}

int64_t wane_linear_work_bytes(int64_t rows, int64_t width) {
  int64_t r = (rows + 63) / 64 * 64, dozens = (rows + 11) / 12 * 12, w, values, bytes;
  if (r < dozens) r = dozens;
  if (width > INT64_MAX - 255) return -1;
  w = (width + 255) / 256 * 256;
  if (__builtin_mul_overflow(r, w, &values) || values > INT64_MAX / 8 || w > INT64_MAX / 32) return -1;
  if (__builtin_add_overflow(values * 4 + values / 4, r * 64 + w * 8 + 4096, &bytes)) return -1;
  return bytes;
}

/* One product, checked. Tensors are borrowed; `tmp` are copies made for it. */
typedef struct product {
  wane_tensor *x, *y, *bias;             /* contiguous */
  wane_qview w;
  int64_t M, width, out;                 /* rows; values a row of x; values a row of y */
  int compute, group, by_row;
  float threshold;
  void *work;
  const float *u, *factor;               /* a low-rank product beside it: see WANE_LINEAR_RANK */
  int64_t rank;
  int onto;                              /* something is added to: see WANE_LINEAR_ONTO */
  const wane_tensor *other;              /* forward: this */
} product;

/* Fills a fresh record with everything that all ops of a product share. rows [m0, m0 + rows) of x and y. */
static wane_op *product_op(wane_stream *s, const product *p, int slot, int64_t m0, int64_t rows) {
  static _Atomic int64_t ids;
  wane_op *op = wane_op_new(s, slot + p->group);
  int64_t size = wane_size_of(p->x->dtype);
  wane_qview_store(op, &p->w);
  op->p[WANE_LINEAR_Y] = p->y->data + m0 * p->out * size;
  op->p[WANE_LINEAR_X] = p->x->data + m0 * p->width * size;
  op->p[WANE_LINEAR_BIAS] = p->bias ? p->bias->data : NULL;
  op->p[WANE_LINEAR_WORK] = p->work;
  op->n[WANE_LINEAR_M] = rows;
  op->n[WANE_LINEAR_ID] = ++ids;
  op->i[WANE_LINEAR_DTYPE] = p->x->dtype;
  op->i[WANE_LINEAR_BIAS_DTYPE] = p->bias ? p->bias->dtype : WANE_F32;
  op->i[WANE_LINEAR_COMPUTE] = p->compute;
  op->i[WANE_LINEAR_BY_ROW] = p->by_row;
  op->f[WANE_LINEAR_THRESHOLD] = p->threshold;
  return op;
}

static uint32_t at_most(uint32_t chunks, int64_t limit) {
  if (limit < 1) limit = 1;
  return chunks < limit ? chunks : (uint32_t)limit;
}

/* Enqueues the ops of rows [m0, m0 + rows): [scan,] prepare or pack, product. */
static void product_slice(wane_stream *s, const product *p, int prepare, int multiply, int64_t m0, int64_t rows) {
  int64_t values = rows * p->width, weights = p->w.rows * p->w.cols;
  int scan = p->group == WANE_GROUP_LLM_INT8 && p->threshold > 0, alone = scan && values <= 1 << 14;
  wane_op *op;
  if (scan && !alone) {
    op = product_op(s, p, WANE_OP_LINEAR_SCAN, m0, rows);
    op->nchunks = at_most(wane_chunks(values, 1 << 15), (p->width + 63) / 64);
    wane_op_push(s, op, NULL, NULL);
  }
  op = product_op(s, p, prepare, m0, rows);
  op->i[WANE_LINEAR_ALONE] = alone;
  if (p->rank) {
    op->i[WANE_LINEAR_RANK] = (int32_t)p->rank;
    op->p[WANE_LINEAR_BIAS] = (void *)(p->u + m0 * p->rank);
  }
  op->nchunks = prepare == WANE_OP_LINEAR_PREPARE ? at_most(wane_chunks(values, 1 << 14), rows) : at_most(wane_chunks(values, 1 << 15), (rows + 31) / 32);
  if (alone) op->nchunks = 1;
  wane_op_push(s, op, NULL, NULL);
  op = product_op(s, p, multiply, m0, rows);
  if (p->rank) {
    op->i[WANE_LINEAR_RANK] = (int32_t)p->rank;
    op->p[WANE_LINEAR_FACTOR] = (void *)p->factor;
    op->i[WANE_LINEAR_ONTO] = p->onto;
    if (p->other) op->p[WANE_LINEAR_BIAS] = p->other->data + m0 * p->out * wane_size_of(p->x->dtype);
  }
  if (multiply == WANE_OP_LINEAR_ROWS) op->nchunks = at_most(wane_chunks(weights * ((rows + 3) / 4), 1 << 16), p->out);
  else if (multiply == WANE_OP_LINEAR_MANY) op->nchunks = at_most(wane_chunks(weights / 256 * rows, 1 << 12), (p->out + 23) / 24 * ((rows + 127) / 128));
  else op->nchunks = at_most(wane_chunks(weights / 256 * rows, 1 << 12), (p->out + 63) / 64 * ((rows + 127) / 128));
  wane_op_push(s, op, p->y, NULL);
}

/* Workspace of a slice: with a low-rank product, at least what rows of 16-bit values in whole tiles take with its 3 r more. */
static int64_t work_bytes(const product *p, int64_t rows) {
  int64_t bytes = wane_linear_work_bytes(rows, p->width), tiled;
  if (bytes < 0 || p->rank == 0) return bytes;
  tiled = (rows + 31) / 32 * 32 * ((p->width + 63) / 64 * 64 + (3 * p->rank + 31) / 32 * 32) * 2;
  return bytes > tiled ? bytes : tiled;
}

/* The whole product: slices of x that share one workspace. */
static int product_run(wane_stream *s, product *p, int prepare, int multiply) {
  const wane_backend *b = wane_cpu_backend();
  wane_storage *hold = NULL;
  int64_t slice = p->group == WANE_GROUP_LLM_INT8 ? p->M : WANE_LINEAR_SLICE, bytes;
  if (!b->ops[prepare + p->group] || !b->ops[multiply + p->group])
    return wane_fail(WANE_E_UNSUPPORTED, "no kernel multiplies with a %s weight in this way", wane_dtype_name(p->w.dtype));
  if (p->M == 0 || p->out == 0) return WANE_OK;
  if (slice > p->M) slice = p->M;
  bytes = work_bytes(p, slice);
  if (bytes < 0) return wane_fail(WANE_E_SHAPE, "a product of %lld rows of %lld values is too large", (long long)p->M, (long long)p->width);
  if (p->group == WANE_GROUP_LLM_INT8) bytes = wane_int8_plan(p->M, p->width).bytes;
  p->work = wane_workspace(s, (size_t)bytes, &hold);
  if (!p->work) return WANE_E_MEMORY;
  for (int64_t m = 0; m < p->M; m += slice) product_slice(s, p, prepare, multiply, m, p->M - m < slice ? p->M - m : slice);
  wane_storage_unref(hold);
  return WANE_OK;
}

/* Checks a weight and describes it. `hold` keeps a contiguous copy of a strided float weight, or stays empty. */
static int weight_view(wane_stream *s, const wane_handle *h, wane_qview *view, int *group, wane_handle *hold) {
  wane_tensor *w = wane_use(s, h, "weight");
  if (!w) return WANE_E_STALE;
  *group = wane_linear_group(w->dtype);
  if (*group < 0)
    return wane_fail(WANE_E_DTYPE, "weight is %s; a product needs f32, f16, bf16 or a quantized kind", wane_shape_text(w));
  if (w->ndim != 2) return wane_fail(WANE_E_SHAPE, "weight is %s; a product needs two dimensions [out, in]", wane_shape_text(w));
  if (*group == WANE_GROUP_FLOAT && !(w = wane_contiguous(s, w, hold))) return WANE_E_MEMORY;
  wane_qview_of(w, view);
  return WANE_OK;
}

/* Checks x against the values a row must have, makes it contiguous, makes y with the last dimension replaced. */
static int operands(wane_stream *s, product *p, const wane_handle *xh, const char *what, wane_handle *xhold, wane_handle *y) {
  wane_tensor *x = wane_use(s, xh, what);
  int64_t shape[WANE_MAX_DIMS];
  if (!x) return WANE_E_STALE;
  if (!wane_is_float(x->dtype)) return wane_fail(WANE_E_DTYPE, "%s is %s; a product needs f32, f16 or bf16", what, wane_shape_text(x));
  if (x->ndim < 1 || x->shape[x->ndim - 1] != p->width)
    return wane_fail(WANE_E_SHAPE, "%s is %s, but the weight is [%lld, %lld]: the last dimension must be %lld", what, wane_shape_text(x),
                     (long long)p->w.rows, (long long)p->w.cols, (long long)p->width);
  p->M = 1;
  for (int d = 0; d + 1 < x->ndim; d++) p->M *= x->shape[d];
  memcpy(shape, x->shape, sizeof shape);
  shape[x->ndim - 1] = p->out;
  if (!(p->x = wane_contiguous(s, x, xhold))) return WANE_E_MEMORY;
  p->y = wane_make(s, y, x->dtype, x->ndim, shape);
  return p->y ? WANE_OK : WANE_E_MEMORY;
}

static int check_compute(int compute) {
  int mode = compute & ~WANE_COMPUTE_INVARIANT;
  if (mode < WANE_COMPUTE_F32 || mode > WANE_COMPUTE_FAST) return wane_fail(WANE_E_ARG, "compute is %d; expected a WANE_COMPUTE_ mode", compute);
  return WANE_OK;
}

/* A low-rank product beside one: handles of u [M, r] and of its other factor, [out, r] or, `turned`, [r, out]. onto: a tensor of the result's shape and dtype
 * to add the whole to (backward: in place), or NULL. */
typedef struct beside {
  const wane_handle *u, *factor;
  int turned;
  const wane_handle *onto;
} beside;

/* Takes it, where the kernels can. WANE_E_UNSUPPORTED without a message: they cannot. */
static int take_beside(wane_stream *s, product *p, const beside *a, int rows) {
  wane_tensor *u = wane_use(s, a->u, "u"), *factor = u ? wane_use(s, a->factor, a->turned ? "A" : "B") : NULL;
  if (!factor) return WANE_E_STALE;
  if (u->dtype != WANE_F32 || factor->dtype != WANE_F32 || u->ndim != 2 || factor->ndim != 2 || u->shape[0] != p->M ||
      factor->shape[a->turned ? 0 : 1] != u->shape[1] || factor->shape[a->turned ? 1 : 0] != p->out)
    return wane_fail(WANE_E_SHAPE, "linear_lora: %s %s and u %s do not belong to a product of %lld rows with %lld outputs", a->turned ? "A" : "B",
                     wane_shape_text(factor), wane_shape_text(u), (long long)p->M, (long long)p->out);
  if (rows || p->compute == WANE_COMPUTE_F32 || p->group == WANE_GROUP_LLM_INT8 || u->shape[1] > WANE_LORA_TILED_RANK || p->width == 0 || !wane_is_contiguous(u) ||
      !wane_is_contiguous(factor) || !wane_cpu_backend()->ops[WANE_OP_LINEAR_ADDS]) return WANE_E_UNSUPPORTED;
  if (a->onto) {
    wane_tensor *onto = wane_use(s, a->onto, "onto");
    if (!onto) return WANE_E_STALE;
    p->onto = onto->dtype == p->x->dtype && wane_is_contiguous(onto) && wane_numel(onto) == p->M * p->out && !p->bias && (!a->turned || onto->storage != p->x->storage);
    if (p->onto && a->turned) p->y = onto;
    else if (p->onto) p->other = onto;
  }
  p->u = (const float *)(const void *)u->data; p->factor = (const float *)(const void *)factor->data; p->rank = u->shape[1];
  return WANE_OK;
}

/* The forward product; *added: 1 if what is `beside` it was added, 2 if `onto` was too (NULL: there is nothing). */
static int forward(wane_stream *s, wane_handle *y, const wane_handle *x, const wane_handle *w, const wane_handle *bias, int compute, float threshold,
                   const beside *beside, int *added) {
  product p = { .compute = compute & ~WANE_COMPUTE_INVARIANT, .threshold = threshold };
  wane_handle xhold = { 0 }, whold = { 0 }, bhold = { 0 };
  int rows, status = wane_enter(s);
  if (status == WANE_OK) status = check_compute(compute);
  if (status == WANE_OK) status = weight_view(s, w, &p.w, &p.group, &whold);
  if (status != WANE_OK) return status;
  if (p.group == WANE_GROUP_INT8 && threshold >= 0) p.group = WANE_GROUP_LLM_INT8;
  p.width = p.w.cols, p.out = p.w.rows, p.by_row = (compute & WANE_COMPUTE_INVARIANT) != 0;
  if (p.group == WANE_GROUP_LLM_INT8 && p.width > WANE_INT8_MAX_K)
    return wane_fail(WANE_E_SHAPE, "weight is [%lld, %lld]: LLM.int8() sums at most %d products in an int32; use threshold < 0 (weight-only)",
                     (long long)p.out, (long long)p.width, WANE_INT8_MAX_K);
  if (bias) {
    if (!(p.bias = wane_use(s, bias, "bias"))) status = WANE_E_STALE;
    else if (!wane_is_float(p.bias->dtype) || p.bias->ndim != 1 || p.bias->shape[0] != p.out)
      status = wane_fail(WANE_E_SHAPE, "bias is %s; expected a float tensor of [%lld]", wane_shape_text(p.bias), (long long)p.out);
    else if (!(p.bias = wane_contiguous(s, p.bias, &bhold))) status = WANE_E_MEMORY;
  }
  if (status == WANE_OK) status = operands(s, &p, x, "x", &xhold, y);
  if (status == WANE_OK) {
    rows = p.M <= WANE_LINEAR_FEW || (compute & WANE_COMPUTE_INVARIANT);
    if (beside) {
      status = take_beside(s, &p, beside, rows);
      *added = status == WANE_OK ? 1 + p.onto : 0;
      if (status == WANE_E_UNSUPPORTED) status = WANE_OK;
    }
    if (status == WANE_OK) status = product_run(s, &p, rows ? WANE_OP_LINEAR_PREPARE : WANE_OP_LINEAR_PACK, rows ? WANE_OP_LINEAR_ROWS : WANE_OP_LINEAR_MANY);
    if (status != WANE_OK) wane_tensor_free(y);
  }
  wane_tensor_free(&bhold);
  wane_tensor_free(&xhold);
  wane_tensor_free(&whold);
  return status;
}

/* The gradient of x; `beside`, `added` as above, *added 2 where the result was added to what lay there and dx stays as it was. */
static int backward(wane_stream *s, wane_handle *dx, const wane_handle *dy, const wane_handle *w, int compute, const beside *beside, int *added) {
  product p = { .compute = compute & ~WANE_COMPUTE_INVARIANT, .threshold = -1 };
  wane_handle xhold = { 0 }, whold = { 0 };
  int status = wane_enter(s);
  if (status == WANE_OK) status = check_compute(compute);
  if (status == WANE_OK) status = weight_view(s, w, &p.w, &p.group, &whold);
  if (status != WANE_OK) return status;
  p.width = p.w.rows, p.out = p.w.cols;
  status = operands(s, &p, dy, "dy", &xhold, dx);
  if (status == WANE_OK) {
    if (beside) {
      status = take_beside(s, &p, beside, 0);
      *added = status == WANE_OK ? 1 + p.onto : 0;
      if (status == WANE_E_UNSUPPORTED) status = WANE_OK;
    }
    if (status == WANE_OK) status = product_run(s, &p, WANE_OP_LINEAR_BACK_PACK, WANE_OP_LINEAR_BACK);
    if (status != WANE_OK || p.onto) wane_tensor_free(dx);
  }
  wane_tensor_free(&xhold);
  wane_tensor_free(&whold);
  return status;
}

int wane_linear(wane_stream *s, wane_handle *y, const wane_handle *x, const wane_handle *w, const wane_handle *bias, int compute, float threshold) {
  return forward(s, y, x, w, bias, compute, threshold, NULL, NULL);
}

int wane_linear_backward(wane_stream *s, wane_handle *dx, const wane_handle *dy, const wane_handle *w, int compute) {
  return backward(s, dx, dy, w, compute, NULL, NULL);
}

/* ---------------------------------------------------------------- with an adapter */

/* Has `onto` the shape and dtype of x W^T? What is wrong with x and w themselves the product will say. */
static int check_onto(wane_stream *s, const wane_handle *honto, const wane_handle *hx, const wane_handle *hw) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *onto = wane_use(s, honto, "onto"), *x = onto ? wane_use(s, hx, "x") : NULL, *w = x ? wane_use(s, hw, "weight") : NULL;
  if (!w) return WANE_E_STALE;
  if (x->ndim < 1 || w->ndim != 2) return WANE_OK;
  int last = x->ndim - 1;
  if (onto->dtype != x->dtype || onto->ndim != x->ndim || memcmp(onto->shape, x->shape, (size_t)last * sizeof *x->shape) || onto->shape[last] != w->shape[0])
    return wane_fail(WANE_E_SHAPE, "linear_lora: onto is %s; expected x's dtype and shape, %s, with %lld at the end", wane_shape_text(onto), wane_shape_text(x),
                     (long long)w->shape[0]);
  return WANE_OK;
}

int wane_linear_lora(wane_stream *s, wane_handle *y, wane_handle *u, const wane_handle *x, const wane_handle *w, const wane_handle *bias, const wane_handle *A,
                     const wane_handle *B, const wane_lora_options *o, int compute, float threshold, const wane_handle *onto) {
  wane_handle made[3] = { { NULL, 0, 0 } };                                /* y, u, y with onto */
  int added = 0, status = onto ? check_onto(s, onto, x, w) : WANE_OK;
  if (status == WANE_OK) status = wane_lora_down(s, &made[1], x, A, o->scale, o->p, o->seed, o->offset);
  if (status == WANE_OK) status = forward(s, &made[0], x, w, bias, compute, threshold, &(beside){ &made[1], B, 0, onto }, &added);
  if (status == WANE_OK && !added) status = wane_lora_up(s, &made[0], &made[1], B);
  if (status == WANE_OK && onto && added != 2) {
    status = wane_binary(s, &made[2], onto, &made[0], WANE_ADD);
    if (status == WANE_OK) wane_tensor_free(&made[0]);
    if (status == WANE_OK) made[0] = made[2];
  }
  if (status != WANE_OK) {
    for (int i = 0; i < 2; i++) if (made[i].t) wane_tensor_free(&made[i]);
    return status;
  }
  *y = made[0]; *u = made[1];
  return WANE_OK;
}

int wane_linear_lora_backward(wane_stream *s, wane_handle *dx, wane_handle *dA, wane_handle *dB, const wane_handle *dy, const wane_handle *x, const wane_handle *u,
                              const wane_handle *w, const wane_handle *A, const wane_handle *B, const wane_lora_options *o, int compute, const wane_handle *onto, int *was_added) {
  wane_handle made[4] = { { NULL, 0, 0 } };                                /* dx, dA, dB, du */
  int added = 0, status = wane_lora_up_backward(s, &made[3], &made[2], dy, u, B, o->scale);
  if (status == WANE_OK && dx) status = backward(s, &made[0], dy, w, compute, o->p == 0 ? &(beside){ &made[3], A, 1, onto } : NULL, &added);
  if (added == 2) made[0] = (wane_handle){ NULL, 0, 0 };
  if (status == WANE_OK) status = wane_lora_down_backward(s, dx && !added ? &made[0] : NULL, &made[1], &made[3], x, A, o->p, o->seed, o->offset);
  if (made[3].t) wane_tensor_free(&made[3]);
  if (status != WANE_OK) {
    for (int i = 0; i < 3; i++) if (made[i].t) wane_tensor_free(&made[i]);
    return status;
  }
  if (was_added) *was_added = added == 2;
  if (dx && added != 2) *dx = made[0];
  *dA = made[1]; *dB = made[2];
  return WANE_OK;
}
