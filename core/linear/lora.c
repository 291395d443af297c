/* lora.c: the low-rank adapter's products of a training pass: checks, memory, and the two ops that do the work (lora.h). */
#include "lora.h"
#include "../ops/philox.h"
#include "../tensor/tensor.h"
#include <math.h>

enum { PART_ROWS = 128, PARTS = 16, SHARES_BYTES = 64 << 20 };
enum { LORA_WORK = 1 << 20 };              /* multiplications a chunk: about 30 us of AVX-512, 8 of AMX */

/* One call's operands: borrowed tensors, and the copies that made inputs contiguous. */
typedef struct lora {
  const char *name;                        /* of the function, for messages */
  wane_tensor *x, *y, *u, *w;              /* x: [.., C], an input; y: [.., C], in place */
  int64_t M, C, r;
  double scale, p;
  uint64_t seed, offset;
  wane_handle tmp[3];
} lora;

/* Takes x (or dy) [.., C]: a float tensor, made contiguous. Sets M and C. */
static int take_x(wane_stream *s, lora *a, const wane_handle *h, const char *what) {
  wane_tensor *x = wane_use(s, h, what);
  if (!x) return WANE_E_STALE;
  if (!wane_is_float(x->dtype)) return wane_fail(WANE_E_DTYPE, "%s: %s must be f32, f16 or bf16, found %s", a->name, what, wane_shape_text(x));
  if (x->ndim < 1) return wane_fail(WANE_E_SHAPE, "%s: %s needs a last dimension to multiply, found %s", a->name, what, wane_shape_text(x));
  a->M = 1;
  for (int d = 0; d + 1 < x->ndim; d++) a->M *= x->shape[d];
  a->C = x->shape[x->ndim - 1];
  a->x = wane_contiguous(s, x, &a->tmp[0]);
  return a->x ? WANE_OK : WANE_E_MEMORY;
}

/* Takes y (or dx) [.., C], which is written in place. Sets M and C. */
static int take_y(wane_stream *s, lora *a, const wane_handle *h, const char *what) {
  wane_tensor *y = wane_use(s, h, what);
  if (!y) return WANE_E_STALE;
  if (!wane_is_float(y->dtype)) return wane_fail(WANE_E_DTYPE, "%s: %s must be f32, f16 or bf16, found %s", a->name, what, wane_shape_text(y));
  if (y->ndim < 1) return wane_fail(WANE_E_SHAPE, "%s: %s needs a last dimension to add to, found %s", a->name, what, wane_shape_text(y));
  if (!wane_is_contiguous(y)) return wane_fail(WANE_E_SHAPE, "%s: %s is written in place and must be contiguous; %s is not", a->name, what, wane_shape_text(y));
  a->y = y;
  a->M = 1;
  for (int d = 0; d + 1 < y->ndim; d++) a->M *= y->shape[d];
  a->C = y->shape[y->ndim - 1];
  return WANE_OK;
}

/* Takes A [r, C] or B [C, r] (`turned`). Sets r. */
static int take_w(wane_stream *s, lora *a, const wane_handle *h, const char *what, int turned) {
  wane_tensor *w = wane_use(s, h, what);
  if (!w) return WANE_E_STALE;
  if (w->dtype != WANE_F32 || w->ndim != 2 || w->shape[turned ? 0 : 1] != a->C)
    return wane_fail(w->dtype != WANE_F32 ? WANE_E_DTYPE : WANE_E_SHAPE,
                     turned ? "%s: expected %s [%lld, r] f32, found %s" : "%s: expected %s [r, %lld] f32, found %s", a->name, what,
                     (long long)a->C, wane_shape_text(w));
  a->r = w->shape[turned ? 1 : 0];
  if (a->r < 1 || a->r > WANE_LORA_MAX_RANK)
    return wane_fail(WANE_E_SHAPE, "%s: the rank of %s %s must be 1 to %d", a->name, what, wane_shape_text(w), WANE_LORA_MAX_RANK);
  a->w = wane_contiguous(s, w, &a->tmp[1]);
  return a->w ? WANE_OK : WANE_E_MEMORY;
}

/* Takes u (or du) [M, r]. */
static int take_u(wane_stream *s, lora *a, const wane_handle *h, const char *what) {
  wane_tensor *u = wane_use(s, h, what);
  if (!u) return WANE_E_STALE;
  if (u->dtype != WANE_F32 || u->ndim != 2 || u->shape[0] != a->M || u->shape[1] != a->r)
    return wane_fail(u->dtype != WANE_F32 ? WANE_E_DTYPE : WANE_E_SHAPE, "%s: expected %s [%lld, %lld] f32, found %s", a->name, what,
                     (long long)a->M, (long long)a->r, wane_shape_text(u));
  a->u = wane_contiguous(s, u, &a->tmp[2]);
  return a->u ? WANE_OK : WANE_E_MEMORY;
}

static int check_numbers(const lora *a) {
  if (!isfinite(a->scale)) return wane_fail(WANE_E_ARG, "%s: the scale %g must be finite", a->name, a->scale);
  if (!(a->p >= 0 && a->p < 1)) return wane_fail(WANE_E_ARG, "%s: the probability of dropping an element must be in [0, 1), found %g", a->name, a->p);
  return WANE_OK;
}

/* A fresh record with what both ops share. Chunks: `units` of rows or columns, at most one for each `least` of them. */
static wane_op *lora_op(wane_stream *s, const lora *a, int code, int64_t units, int64_t least) {
  wane_op *op = wane_op_new(s, code);
  int64_t most = (units + least - 1) / least;
  op->p[WANE_LORA_W] = a->w->data;
  op->n[WANE_LORA_M] = a->M; op->n[WANE_LORA_C] = a->C; op->n[WANE_LORA_R] = a->r;
  op->n[WANE_LORA_SEED] = (int64_t)a->seed; op->n[WANE_LORA_OFFSET] = (int64_t)a->offset;
  op->f[WANE_LORA_SCALE] = (float)a->scale;
  op->f[WANE_LORA_KEPT] = (float)(1.0 / (1.0 - a->p));
  op->f[WANE_LORA_THRESHOLD] = wane_dropout_threshold(a->p);
  op->nchunks = wane_chunks(a->M * a->C * ((a->r + 7) / 8 * 8), LORA_WORK);
  if (op->nchunks > most) op->nchunks = most > 0 ? (uint32_t)most : 1;
  return op;
}

/* u = scale * drop(x) W^T, W [r, C] at `w`. */
static void push_rows(wane_stream *s, const lora *a, const void *w, wane_tensor *u) {
  if (a->M == 0) return;
  wane_op *op = lora_op(s, a, WANE_OP_LORA_ROWS, a->M, 12);
  op->p[WANE_LORA_X] = a->x->data;
  op->p[WANE_LORA_W] = (void *)w;
  op->p[WANE_LORA_U] = u->data;
  op->i[WANE_LORA_DTYPE] = a->x->dtype;
  wane_op_push(s, op, u, NULL);
}

/* y += factor (u W), dw = u^T drop(x), copy = W as [r, C]: what is not NULL. */
static void push_columns(wane_stream *s, const lora *a, int turned, wane_tensor *dw, float *copy) {
  if (a->C == 0) return;
  wane_op *op = lora_op(s, a, WANE_OP_LORA_COLUMNS, a->C, 64);
  op->p[WANE_LORA_X] = a->x ? a->x->data : NULL;
  op->p[WANE_LORA_U] = a->u ? a->u->data : NULL;
  op->p[WANE_LORA_Y] = a->y ? a->y->data : NULL;
  op->p[WANE_LORA_DW] = dw ? dw->data : NULL;
  op->p[WANE_LORA_COPY] = copy;
  op->i[WANE_LORA_DTYPE] = a->x ? a->x->dtype : a->y ? a->y->dtype : WANE_F32;
  op->i[WANE_LORA_TURNED] = turned;
  wane_op_push(s, op, a->y, dw);
}

/* Can tiles make dW (GRADIENT and SUM)? */
static int has_tiles(const lora *a) {
  return wane_cpu_backend()->ops[WANE_OP_LORA_GRADIENT] && a->x->dtype == WANE_BF16 && a->p == 0 && a->r <= WANE_LORA_TILED_RANK && a->M > 0 && a->C > 0;
}

/* u = scale x W^T where it is not NULL, dw = a->u^T x where it is not NULL: in parts of the rows, few enough that their shares stay small. */
static int push_gradient(wane_stream *s, const lora *a, int turned, wane_tensor *u, wane_tensor *dw) {
  int64_t share = (a->C + 31) / 32 * ((2 * a->r + 15) / 16) * 2048, parts = (a->M + PART_ROWS - 1) / PART_ROWS, rows;
  wane_storage *hold = NULL;
  float *shares = NULL;
  if (parts > PARTS) parts = PARTS;
  if (parts > SHARES_BYTES / share) parts = SHARES_BYTES / share > 1 ? SHARES_BYTES / share : 1;
  rows = ((a->M + parts - 1) / parts + 31) / 32 * 32;
  parts = (a->M + rows - 1) / rows;
  if (dw && !(shares = wane_workspace(s, (size_t)(parts * share), &hold))) return WANE_E_MEMORY;
  for (int step = 0; step < (dw ? 2 : 1); step++) {
    wane_op *op = lora_op(s, a, step ? WANE_OP_LORA_SUM : WANE_OP_LORA_GRADIENT, (a->C + 31) / 32, 2);
    op->p[WANE_LORA_X] = a->x->data;
    op->p[WANE_LORA_U] = a->u->data;
    op->p[WANE_LORA_Y] = u ? u->data : NULL;
    op->p[WANE_LORA_COPY] = shares;
    op->p[WANE_LORA_DW] = dw ? dw->data : NULL;
    op->n[WANE_LORA_PART] = rows;
    op->i[WANE_LORA_DTYPE] = a->x->dtype;
    op->i[WANE_LORA_TURNED] = turned;
    if (!step) op->nchunks = (uint32_t)parts;
    wane_op_push(s, op, step ? dw : u, NULL);
  }
  if (hold) wane_storage_unref(hold);
  return WANE_OK;
}

/* Lets the copies go and hands the status on. */
static int done(lora *a, int status) {
  for (int i = 0; i < 3; i++) wane_tensor_free(&a->tmp[i]);
  return status;
}

int wane_lora_down(wane_stream *s, wane_handle *out, const wane_handle *x, const wane_handle *A, double scale, double p, uint64_t seed, uint64_t offset) {
  lora a = { .name = "lora_down", .scale = scale, .p = p, .seed = seed, .offset = offset };
  int status = wane_enter(s);
  if (status || (status = check_numbers(&a))) return status;
  if ((status = take_x(s, &a, x, "x")) || (status = take_w(s, &a, A, "A", 0))) return done(&a, status);
  wane_tensor *u = wane_make(s, out, WANE_F32, 2, (int64_t[]){ a.M, a.r });
  if (!u) return done(&a, WANE_E_MEMORY);
  push_rows(s, &a, a.w->data, u);
  return done(&a, WANE_OK);
}

int wane_lora_up(wane_stream *s, const wane_handle *y, const wane_handle *u, const wane_handle *B) {
  lora a = { .name = "lora_up" };
  int status = wane_enter(s);
  if (status) return status;
  if ((status = take_y(s, &a, y, "y")) || (status = take_w(s, &a, B, "B", 1)) || (status = take_u(s, &a, u, "u"))) return done(&a, status);
  if (a.M > 0) push_columns(s, &a, 1, NULL, NULL);
  return done(&a, WANE_OK);
}

/* The gradient of B walks down the columns of dy and turns B on its way; du then reads rows of both. */
int wane_lora_up_backward(wane_stream *s, wane_handle *hdu, wane_handle *hdB, const wane_handle *dy, const wane_handle *u, const wane_handle *B, double scale) {
  lora a = { .name = "lora_up_backward", .scale = scale };
  wane_handle made[2] = { { NULL, 0, 0 } };
  wane_storage *hold = NULL;
  int status = wane_enter(s);
  if (status || (status = check_numbers(&a))) return status;
  if ((status = take_x(s, &a, dy, "dy")) || (status = take_w(s, &a, B, "B", 1)) || (status = take_u(s, &a, u, "u"))) return done(&a, status);
  wane_tensor *du = wane_make(s, &made[0], WANE_F32, 2, (int64_t[]){ a.M, a.r });
  wane_tensor *dB = du && hdB ? wane_make(s, &made[1], WANE_F32, 2, (int64_t[]){ a.C, a.r }) : NULL;
  int tiles = has_tiles(&a);
  status = du && (!hdB || dB) ? WANE_OK : WANE_E_MEMORY;
  if (!status && tiles) status = push_gradient(s, &a, 1, du, dB);
  float *copy = !status && !tiles ? wane_workspace(s, (size_t)(a.C * a.r) * sizeof(float), &hold) : NULL;
  if (status || (!tiles && !copy)) {
    wane_tensor_free(&made[0]);
    wane_tensor_free(&made[1]);
    return done(&a, WANE_E_MEMORY);
  }
  if (!tiles) {
    push_columns(s, &a, 1, dB, copy);
    push_rows(s, &a, copy, du);
    wane_storage_unref(hold);
  }
  *hdu = made[0];
  if (hdB) *hdB = made[1];
  return done(&a, WANE_OK);
}

int wane_lora_down_backward(wane_stream *s, const wane_handle *dx, wane_handle *hdA, const wane_handle *du, const wane_handle *x,
                            const wane_handle *A, double p, uint64_t seed, uint64_t offset) {
  lora a = { .name = "lora_down_backward", .p = p, .seed = seed, .offset = offset };
  int status = wane_enter(s);
  if (status || (status = check_numbers(&a))) return status;
  if (dx && (status = take_y(s, &a, dx, "dx"))) return status;
  int64_t rows = a.M, columns = a.C;
  if ((status = take_x(s, &a, x, "x"))) return done(&a, status);
  if (a.y && (a.y->dtype != a.x->dtype || rows != a.M || columns != a.C))
    return done(&a, wane_fail(WANE_E_SHAPE, "lora_down_backward: dx %s must have the shape and dtype of x %s", wane_shape_text(a.y), wane_shape_text(a.x)));
  if ((status = take_w(s, &a, A, "A", 0)) || (status = take_u(s, &a, du, "du"))) return done(&a, status);
  wane_tensor *dA = wane_make(s, hdA, WANE_F32, 2, (int64_t[]){ a.r, a.C });
  if (!dA) return done(&a, WANE_E_MEMORY);
  if (!has_tiles(&a)) {
    push_columns(s, &a, 0, dA, NULL);
    return done(&a, WANE_OK);
  }
  if ((status = push_gradient(s, &a, 0, NULL, dA))) wane_tensor_free(hdA);
  else if (a.y) push_columns(s, &a, 0, NULL, NULL);
  return done(&a, status);
}
