/* experts.c: mixtures of experts: rows sorted by the expert that a router chose for them, and their products.
 *
 * The choice is known on the device only, so an op cannot be enqueued an expert: one op covers all of them, and its chunks find out
 * when they run which experts have rows. A unit is the rows of one expert (of a long one, at most WANE_LINEAR_SLICE of them); unit u is
 * the u-th in the order of experts. How many units there can be, and how many chunks each is cut into, follows from the shapes; chunks
 * of units that turn out not to be there return at once. A unit's product is exactly wane_linear's: its kernels are called on a record
 * made for the unit, few rows by ROWS, many by MANY. */
#include "int8.h"
#include "../tensor/tensor.h"

enum { EXPERTS_MAX = 4096, CHUNKS_WANTED = 128 };            /* of a product, over all units */

/* ---------------------------------------------------------------- sorting */

/* p 0 source, 1 place, 2 bounds, 3 ids; n 0 rows M, 1 choices a row, 2 experts; i 0 dtype of ids. One chunk. */
static void route(const wane_op *op, uint32_t chunk) {
  int32_t *source = op->p[0], *place = op->p[1], *bounds = op->p[2];
  int64_t k = op->n[1], pairs = op->n[0] * k, E = op->n[2];
  (void)chunk;
  memset(bounds, 0, (size_t)(E + 1) * sizeof *bounds);
  for (int64_t i = 0; i < pairs; i++) {
    int64_t id = op->i[0] == WANE_I64 ? ((const int64_t *)op->p[3])[i] : ((const int32_t *)op->p[3])[i];
    if (id < 0 || id >= E) {
      wane_op_fail(op, "route: choice %lld of row %lld is expert %lld, there are %lld", (long long)(i % k), (long long)(i / k), (long long)id, (long long)E);
      return;
    }
    place[i] = (int32_t)id;
    bounds[id + 1]++;
  }
  for (int64_t e = 0; e < E; e++) bounds[e + 1] += bounds[e];
  for (int64_t i = 0; i < pairs; i++) {                /* bounds[e] runs from the expert's first place to its last + 1 … */
    int32_t at = bounds[place[i]]++;
    source[at] = (int32_t)(i / k);
    place[i] = at;
  }
  for (int64_t e = E; e > 0; e--) bounds[e] = bounds[e - 1];   /* … and is moved back by one expert */
  bounds[0] = 0;
}

int wane_route(wane_stream *s, wane_handle *source, wane_handle *place, wane_handle *bounds, const wane_handle *hids, int64_t experts) {
  int status = wane_enter(s);
  if (status) return status;
  wane_tensor *ids = wane_use(s, hids, "ids");
  if (!ids) return WANE_E_STALE;
  if (ids->dtype != WANE_I32 && ids->dtype != WANE_I64) return wane_fail(WANE_E_DTYPE, "route: ids must be i32 or i64, found %s", wane_shape_text(ids));
  if (ids->ndim != 2 || ids->shape[1] < 1) return wane_fail(WANE_E_SHAPE, "route: expected ids [rows, choices], found %s", wane_shape_text(ids));
  if (experts < 1 || experts > EXPERTS_MAX) return wane_fail(WANE_E_ARG, "route: %lld experts; expected 1 to %d", (long long)experts, EXPERTS_MAX);
  int64_t shape[2] = { ids->shape[0], ids->shape[1] }, pairs = wane_numel(ids), bound = experts + 1;
  if (pairs > INT32_MAX) return wane_fail(WANE_E_SHAPE, "route: ids %s are too many", wane_shape_text(ids));
  wane_handle tmp = { NULL, 0, 0 };
  wane_tensor *b = NULL, *p = NULL, *o = NULL;
  ids = wane_contiguous(s, ids, &tmp);
  if (ids && (o = wane_make(s, source, WANE_I32, 1, &pairs)) && (p = wane_make(s, place, WANE_I32, 2, shape))) b = wane_make(s, bounds, WANE_I32, 1, &bound);
  if (!b) {
    if (p) wane_tensor_free(place);
    if (o) wane_tensor_free(source);
    status = WANE_E_MEMORY;
  } else {
    wane_op *op = wane_op_new(s, WANE_OP_ROUTE);
    op->p[0] = o->data; op->p[1] = p->data; op->p[2] = b->data; op->p[3] = ids->data;
    op->n[0] = shape[0]; op->n[1] = shape[1]; op->n[2] = experts;
    op->i[0] = ids->dtype;
    wane_op_push(s, op, o, p);
    b->storage->ticket = o->storage->ticket;           /* the third that it writes */
  }
  wane_tensor_free(&tmp);
  return status;
}

/* ---------------------------------------------------------------- products */

/* An expert's weight and the group whose kernels multiply with it. */
typedef struct expert { wane_qview w; int32_t group; } expert;

/* The record of both ops: p 0 y [P, N], 1 x [P, K], 2 bounds, 3 workspace, 4 experts, 5 the backend; n 0 experts, 1 N, 2 K, 3 chunks a unit;
 * i and f: those of linear.h, i 7: the gradient of the input (x is dy, y is dx: N and K are the weights' K and N). */
enum { EXPERTS_BOUNDS = 2, EXPERTS_WORK = 3, EXPERTS_TABLE = 4, EXPERTS_BACKEND = 5, EXPERTS_COUNT = 0, EXPERTS_N = 1, EXPERTS_K = 2, EXPERTS_PER = 3,
       EXPERTS_BACK = 7 };

static int64_t unit_rows(int group, int64_t rows) { return group != WANE_GROUP_LLM_INT8 && rows > WANE_LINEAR_SLICE ? WANE_LINEAR_SLICE : rows; }

/* Bytes of workspace of a unit, a multiple of 64. */
static int64_t unit_bytes(int group, int64_t rows, int64_t K) {
  return group == WANE_GROUP_LLM_INT8 ? (wane_int8_plan(rows, K).bytes + 63) / 64 * 64 : wane_linear_work_bytes(rows, K);
}

/* A bound of the workspace of all units: P rows in at most `units` of them, whoever gets which. Both functions above grow by at most
 * `row` a row once `unit`, what a unit of 64 rows takes, is paid. */
static int64_t all_bytes(int group, int64_t P, int64_t units, int64_t K) {
  int64_t unit = unit_bytes(group, 64, K), row = (unit_bytes(group, 128, K) - unit + 63) / 64, a, b, sum;
  if (unit < 0 || __builtin_mul_overflow(unit, units, &a) || __builtin_mul_overflow(row, P, &b) || __builtin_add_overflow(a, b, &sum)) return -1;
  return sum;
}

/* The record for linear.h's kernels of unit u; the group's number, or -1 if there is no such unit. */
static int unit_op(const wane_op *op, int64_t u, wane_op *unit) {
  const int32_t *bounds = op->p[EXPERTS_BOUNDS];
  const expert *table = op->p[EXPERTS_TABLE];
  int64_t N = op->n[EXPERTS_N], K = op->n[EXPERTS_K], size = op->i[WANE_LINEAR_DTYPE] == WANE_F32 ? 4 : 2, work = 0;
  for (int64_t e = 0; e < op->n[EXPERTS_COUNT]; e++)
    for (int64_t at = bounds[e], rows; at < bounds[e + 1]; at += rows, u--) {
      int group = table[e].group;
      rows = unit_rows(group, bounds[e + 1] - at);
      if (u > 0) { work += unit_bytes(group, rows, K); continue; }
      memset(unit, 0, sizeof *unit);
      unit->stream = op->stream;
      wane_qview_store(unit, &table[e].w);
      unit->p[WANE_LINEAR_Y] = (char *)op->p[WANE_LINEAR_Y] + at * N * size;
      unit->p[WANE_LINEAR_X] = (char *)op->p[WANE_LINEAR_X] + at * K * size;
      unit->p[WANE_LINEAR_WORK] = (char *)op->p[EXPERTS_WORK] + work;
      unit->n[WANE_LINEAR_M] = rows;
      memcpy(unit->i, op->i, 8 * sizeof *op->i);
      unit->f[WANE_LINEAR_THRESHOLD] = op->f[WANE_LINEAR_THRESHOLD];
      return group;
    }
  return -1;
}

static int takes_rows(const wane_op *unit) {
  return !unit->i[EXPERTS_BACK] && (unit->n[WANE_LINEAR_M] <= WANE_LINEAR_FEW || unit->i[WANE_LINEAR_BY_ROW]);
}

/* Cuts the unit into at most `per` chunks and runs one of them. */
static void run(const wane_op *op, wane_op *unit, int slot, uint32_t chunk, int64_t chunks) {
  const wane_backend *b = op->p[EXPERTS_BACKEND];
  int64_t per = op->n[EXPERTS_PER];
  unit->nchunks = (uint32_t)(chunks < 1 ? 1 : chunks < per ? chunks : per);
  unit->code = (uint16_t)slot;
  if (chunk < unit->nchunks) b->ops[slot](unit, chunk);
}

static void prepare(const wane_op *op, uint32_t chunk) {
  wane_op unit;
  int64_t per = op->n[EXPERTS_PER];
  int group = unit_op(op, chunk / per, &unit);
  if (group < 0) return;
  int64_t rows = unit.n[WANE_LINEAR_M], few = takes_rows(&unit), limit = few ? rows : (rows + 31) / 32;
  unit.i[WANE_LINEAR_ALONE] = group == WANE_GROUP_LLM_INT8 && unit.f[WANE_LINEAR_THRESHOLD] > 0;   /* its outlier columns are this unit's */
  if (unit.i[WANE_LINEAR_ALONE]) limit = 1;
  int64_t chunks = rows * op->n[EXPERTS_K] >> 14;
  int slot = unit.i[EXPERTS_BACK] ? WANE_OP_LINEAR_BACK_PACK : few ? WANE_OP_LINEAR_PREPARE : WANE_OP_LINEAR_PACK;
  run(op, &unit, slot + group, chunk % (uint32_t)per, chunks < limit ? chunks : limit);
}

static void multiply(const wane_op *op, uint32_t chunk) {
  wane_op unit;
  int64_t per = op->n[EXPERTS_PER], N = op->n[EXPERTS_N];
  int group = unit_op(op, chunk / per, &unit);
  if (group < 0) return;
  int back = unit.i[EXPERTS_BACK], few = takes_rows(&unit);
  int64_t limit = few ? N : back ? (N + 63) / 64 : (N + 23) / 24;
  run(op, &unit, (back ? WANE_OP_LINEAR_BACK : few ? WANE_OP_LINEAR_ROWS : WANE_OP_LINEAR_MANY) + group, chunk % (uint32_t)per, limit);
}

/* Checks every weight against the first and notes what the kernels need. `width`: values that a row of x has: the weights' K, or N for the
 * gradient. */
static int fill_table(wane_stream *s, expert *table, const wane_handle *const *weights, int64_t count, int64_t width, float threshold, int back) {
  const wane_backend *b = wane_cpu_backend();
  for (int64_t e = 0; e < count; e++) {
    const wane_tensor *w = weights[e] ? wane_use(s, weights[e], "weight") : NULL;
    if (!w) return weights[e] ? WANE_E_STALE : wane_fail(WANE_E_ARG, "linear_experts: weight %lld is NULL", (long long)e);
    int group = wane_linear_group(w->dtype);
    int fits = group >= 0 && w->ndim == 2 && w->shape[!back] == width && (e == 0 || w->shape[back] == (back ? table[0].w.cols : table[0].w.rows));
    if (!fits || (group == WANE_GROUP_FLOAT && !wane_is_contiguous(w)))
      return wane_fail(WANE_E_SHAPE, "linear_experts: the weight of expert %lld is %s; expected [%lld, %lld], contiguous, in a dtype that products take", (long long)e,
                       wane_shape_text(w), (long long)(back ? width : e ? table[0].w.rows : w->shape[0]), (long long)(!back ? width : e ? table[0].w.cols : w->shape[w->ndim - 1]));
    if (group == WANE_GROUP_INT8 && threshold >= 0 && !back) group = WANE_GROUP_LLM_INT8;
    if (group == WANE_GROUP_LLM_INT8 && width > WANE_INT8_MAX_K)
      return wane_fail(WANE_E_SHAPE, "linear_experts: LLM.int8() sums at most %d products in an int32, found %lld", WANE_INT8_MAX_K, (long long)width);
    if (back ? !b->ops[WANE_OP_LINEAR_BACK + group] : !b->ops[WANE_OP_LINEAR_ROWS + group] || !b->ops[WANE_OP_LINEAR_MANY + group])
      return wane_fail(WANE_E_UNSUPPORTED, "no kernel multiplies with a %s weight", wane_dtype_name(w->dtype));
    wane_qview_of(w, &table[e].w);
    table[e].group = group;
  }
  return WANE_OK;
}

/* Enqueues both ops of P > 0 rows. The table is memory of its own, not the pool's: ops in flight may still be writing to what is free there. */
static int product(wane_stream *s, const wane_tensor *x, wane_tensor *y, const wane_tensor *bounds, wane_storage *held, int64_t count, int compute, float threshold,
                   int back) {
  const expert *table = held->data;
  int64_t P = x->shape[0], K = x->shape[1], N = y->shape[1], units = (P < count ? P : count) + P / WANE_LINEAR_SLICE, bytes = 0;
  for (int64_t e = 0; e < count && bytes >= 0; e++) {
    int64_t need = e > 0 && table[e].group == table[e - 1].group ? bytes : all_bytes(table[e].group, P, units, K);
    bytes = need < 0 || need > bytes ? need : bytes;
  }
  if (bytes < 0) return wane_fail(WANE_E_SHAPE, "a product of %lld rows of %lld values is too large", (long long)P, (long long)K);
  wane_storage *hold = NULL;
  void *work = wane_workspace(s, (size_t)bytes, &hold);
  if (!work) return WANE_E_MEMORY;
  for (int step = 0; step < 2; step++) {
    wane_op *op = wane_op_new(s, step ? WANE_OP_LINEAR_EXPERTS : WANE_OP_LINEAR_EXPERTS_PREPARE);
    int64_t mean = (P + units - 1) / units, most = CHUNKS_WANTED / units;
    int64_t per = step ? (int64_t)wane_chunks(N * K * ((mean + 3) / 4), 1 << 16) : (int64_t)wane_chunks(mean * K, 1 << 14);
    op->p[WANE_LINEAR_Y] = y->data; op->p[WANE_LINEAR_X] = x->data; op->p[EXPERTS_BOUNDS] = bounds->data; op->p[EXPERTS_WORK] = work;
    op->p[EXPERTS_TABLE] = held->data; op->p[EXPERTS_BACKEND] = (void *)(uintptr_t)wane_cpu_backend();
    op->n[EXPERTS_COUNT] = count; op->n[EXPERTS_N] = N; op->n[EXPERTS_K] = K; op->n[EXPERTS_PER] = per > most ? (most > 1 ? most : 1) : per;
    op->i[WANE_LINEAR_DTYPE] = x->dtype;
    op->i[WANE_LINEAR_COMPUTE] = compute & ~WANE_COMPUTE_INVARIANT;
    op->i[WANE_LINEAR_BY_ROW] = (compute & WANE_COMPUTE_INVARIANT) != 0;
    op->i[EXPERTS_BACK] = back;
    op->f[WANE_LINEAR_THRESHOLD] = threshold;
    op->nchunks = (uint32_t)(units * op->n[EXPERTS_PER]);
    wane_op_push(s, op, step ? y : NULL, NULL);
  }
  wane_storage_unref(hold);
  return WANE_OK;
}

/* Both directions. */
static int experts(wane_stream *s, wane_handle *out, const wane_handle *hx, const wane_handle *hbounds, const wane_handle *const *weights, int64_t count,
                   int compute, float threshold, int back) {
  int status = wane_enter(s), mode = compute & ~WANE_COMPUTE_INVARIANT;
  if (status) return status;
  wane_tensor *x = wane_use(s, hx, "x"), *bounds = x ? wane_use(s, hbounds, "bounds") : NULL;
  if (!bounds) return WANE_E_STALE;
  if (mode < WANE_COMPUTE_F32 || mode > WANE_COMPUTE_FAST) return wane_fail(WANE_E_ARG, "compute is %d; expected a WANE_COMPUTE_ mode", compute);
  if (!wane_is_float(x->dtype) || x->ndim != 2) return wane_fail(WANE_E_SHAPE, "linear_experts: expected x [rows, K] f32, f16 or bf16, found %s", wane_shape_text(x));
  if (count < 1 || count > EXPERTS_MAX) return wane_fail(WANE_E_ARG, "linear_experts: %lld experts; expected 1 to %d", (long long)count, EXPERTS_MAX);
  if (bounds->dtype != WANE_I32 || bounds->ndim != 1 || bounds->shape[0] != count + 1 || !wane_is_contiguous(bounds))
    return wane_fail(WANE_E_SHAPE, "linear_experts: expected bounds [%lld] i32 of wane_route, found %s", (long long)count + 1, wane_shape_text(bounds));
  wane_storage *held = wane_storage_new(s, WANE_STORAGE_HEAP, (size_t)count * sizeof(expert));
  if (!held) return WANE_E_MEMORY;
  wane_handle tmp = { NULL, 0, 0 };
  status = fill_table(s, held->data, weights, count, x->shape[1], threshold, back);
  if (status == WANE_OK) {
    const wane_qview *first = &((const expert *)held->data)->w;
    int64_t shape[2] = { x->shape[0], back ? first->cols : first->rows };
    wane_tensor *y = NULL;
    x = wane_contiguous(s, x, &tmp);
    if (x) y = wane_make(s, out, x->dtype, 2, shape);
    if (!y) status = WANE_E_MEMORY;
    else if (shape[0] > 0 && shape[1] > 0 && (status = product(s, x, y, bounds, held, count, compute, threshold, back)) != WANE_OK) wane_tensor_free(out);
  }
  wane_tensor_free(&tmp);
  wane_storage_unref(held);
  return status;
}

int wane_linear_experts(wane_stream *s, wane_handle *out, const wane_handle *x, const wane_handle *bounds, const wane_handle *const *weights, int64_t count,
                        int compute, float threshold) {
  return experts(s, out, x, bounds, weights, count, compute, threshold, 0);
}

int wane_linear_experts_backward(wane_stream *s, wane_handle *dx, const wane_handle *dy, const wane_handle *bounds, const wane_handle *const *weights, int64_t count,
                                 int compute) {
  return experts(s, dx, dy, bounds, weights, count, compute & ~WANE_COMPUTE_INVARIANT, -1, 1);
}

void wane_register_experts(wane_backend *b) {
  b->ops[WANE_OP_ROUTE] = route;
  b->ops[WANE_OP_LINEAR_EXPERTS_PREPARE] = prepare;
  b->ops[WANE_OP_LINEAR_EXPERTS] = multiply;
}
