/* elementwise_kernels.h: copy, fill, unary, binary, where, and selecting by index. Included once by each instruction-set group
 * (elementwise_kernels.c, avx2_elementwise.c), which gives it its vector exponentials and registers the kernels.
 *
 * Floats are computed in f32, integers in i64 with two's complement wrap, in blocks of WANE_BLOCK (convert.h). The record is
 * strided.h's; own fields:
 *   copy    -
 *   fill    n[7] the value's bits
 *   unary   i[4] operation, i[5] computed in integers
 *   binary  i[4] operation, i[5] computed in integers, i[6] the second operand is d[0], i[7] operands swapped
 *   where   i[5] computed in integers
 *   index   n[7] size of the dimension, n[8] its stride in operand 1; operand 2 holds the indices */
#include "convert.h"
#include "strided.h"
#include "unary_math.h"

typedef wane_f32u f32u;
typedef wane_i64u i64u;

/* ---------------------------------------------------------------- copy and fill */

/* The same dtype: bytes move, NaN payloads included. */
static void copy_bytes(char *y, int64_t sy, const char *x, int64_t sx, int64_t size, int64_t n) {
  if (sy == 1 && sx == 1) {
    memcpy(y, x, (size_t)(n * size));
    return;
  }
#define EACH(type)                                                                               \
  do {                                                                                           \
    type *b = (type *)(void *)y;                                                                 \
    const type *a = (const type *)(const void *)x;                                               \
    for (int64_t i = 0; i < n; i++) b[i * sy] = a[i * sx];                                       \
  } while (0)
  if (size == 4) EACH(wane_u32u);
  else if (size == 2) EACH(wane_u16u);
  else if (size == 1) EACH(uint8_t);
  else EACH(i64u);
#undef EACH
}

static void copy_run(const wane_op *op, char *const p[], const int64_t st[], int64_t n) {
  int to = op->i[0], from = op->i[1];
  if (to == from) {
    copy_bytes(p[0], st[0], p[1], st[1], wane_element_size(to), n);
    return;
  }
  int integers = !wane_is_float_dtype(to) && !wane_is_float_dtype(from);
  int64_t to_size = wane_element_size(to), from_size = wane_element_size(from);
  for (int64_t i = 0; i < n; i += WANE_BLOCK) {
    int64_t m = n - i < WANE_BLOCK ? n - i : WANE_BLOCK;
    char *y = p[0] + i * st[0] * to_size;
    const char *x = p[1] + i * st[1] * from_size;
    if (integers) {
      int64_t buffer[WANE_BLOCK];
      wane_store_i64(to, y, st[0], m, wane_load_i64(from, x, st[1], m, buffer));
    } else {
      float buffer[WANE_BLOCK];
      wane_store_f32(to, y, st[0], m, wane_load_f32(from, x, st[1], m, buffer));
    }
  }
}

static void kernel_copy(const wane_op *op, uint32_t chunk) { wane_walk(op, chunk, 2, 64, copy_run); }

static void fill_run(const wane_op *op, char *const p[], const int64_t st[], int64_t n) {
  int64_t bits = op->n[7], size = wane_element_size(op->i[0]);
#define EACH(type)                                                                               \
  do {                                                                                           \
    type *y = (type *)(void *)p[0];                                                              \
    if (st[0] == 1) for (int64_t i = 0; i < n; i++) y[i] = (type)bits;                           \
    else for (int64_t i = 0; i < n; i++) y[i * st[0]] = (type)bits;                              \
  } while (0)
  if (size == 4) EACH(wane_u32u);
  else if (size == 2) EACH(wane_u16u);
  else if (size == 1) EACH(uint8_t);
  else EACH(i64u);
#undef EACH
}

static void kernel_fill(const wane_op *op, uint32_t chunk) { wane_walk(op, chunk, 1, 64, fill_run); }

/* ---------------------------------------------------------------- unary */

/* Where a contiguous f32 output can be computed in place, or NULL. (Outputs are pool memory, hence aligned.) */
static float *direct_f32(int dtype, char *y, int64_t stride) { return dtype == WANE_F32 && stride == 1 ? (float *)(void *)y : NULL; }

static void unary_i64(int code, const i64u *x, int64_t *y, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint64_t v = (uint64_t)x[i];
    switch (code) {
      case WANE_NEG: v = 0 - v; break;
      case WANE_ABS: v = x[i] < 0 ? 0 - v : v; break;
      case WANE_SIGN: v = (uint64_t)((x[i] > 0) - (x[i] < 0)); break;
      case WANE_SQUARE: v = v * v; break;
      case WANE_RELU: v = x[i] > 0 ? v : 0; break;
      case WANE_NOT: v = v == 0; break;
      case WANE_ISNAN: v = 0; break;
      case WANE_ISFINITE: v = 1; break;
      default: break;                                        /* floor, ceil, round: already whole */
    }
    y[i] = (int64_t)v;
  }
}

static void unary_run(const wane_op *op, char *const p[], const int64_t st[], int64_t n) {
  int to = op->i[0], from = op->i[1], code = op->i[4];
  int64_t to_size = wane_element_size(to), from_size = wane_element_size(from);
  for (int64_t i = 0; i < n; i += WANE_BLOCK) {
    int64_t m = n - i < WANE_BLOCK ? n - i : WANE_BLOCK;
    char *y = p[0] + i * st[0] * to_size;
    const char *x = p[1] + i * st[1] * from_size;
    if (op->i[5]) {
      int64_t in[WANE_BLOCK], out[WANE_BLOCK];
      unary_i64(code, wane_load_i64(from, x, st[1], m, in), out, m);
      wane_store_i64(to, y, st[0], m, out);
    } else {
      float in[WANE_BLOCK], out[WANE_BLOCK];
      float *direct = direct_f32(to, y, st[0]);
      unary_f32(code, wane_load_f32(from, x, st[1], m, in), direct ? direct : out, m);
      if (!direct) wane_store_f32(to, y, st[0], m, out);
    }
  }
}

static void kernel_unary(const wane_op *op, uint32_t chunk) { wane_walk(op, chunk, 2, 64, unary_run); }

/* ---------------------------------------------------------------- binary */

/* Python's and Lua's modulo: the sign of the divisor; x mod +-inf is x or the infinity (numpy npy_math npy_divmod). */
static float mod_f32(float a, float b) {
  float r = fmodf(a, b);
  if (r != 0 && (r < 0) != (b < 0)) return r + b;
  return r != 0 ? r : copysignf(0.0f, b);
}

static float min_f32(float a, float b) { return a < b || a != a ? a : b; }
static float max_f32(float a, float b) { return a > b || a != a ? a : b; }

/* y = a op b on blocks; every operation is one loop, so that the compiler vectorises the simple ones. */
static void binary_f32(int code, const f32u *restrict a, const f32u *restrict b, float *restrict y, int64_t n) {
#define EACH(expression) for (int64_t i = 0; i < n; i++) y[i] = (expression); break
  switch (code) {
    case WANE_ADD: EACH(a[i] + b[i]);
    case WANE_SUB: EACH(a[i] - b[i]);
    case WANE_MUL: EACH(a[i] * b[i]);
    case WANE_DIV: EACH(a[i] / b[i]);
    case WANE_POW: EACH(powf(a[i], b[i]));
    case WANE_MIN: EACH(min_f32(a[i], b[i]));
    case WANE_MAX: EACH(max_f32(a[i], b[i]));
    case WANE_MOD: EACH(mod_f32(a[i], b[i]));
    case WANE_ATAN2: EACH(atan2f(a[i], b[i]));
    case WANE_EQ: EACH(a[i] == b[i] ? 1.0f : 0.0f);
    case WANE_NE: EACH(a[i] != b[i] ? 1.0f : 0.0f);
    case WANE_LT: EACH(a[i] < b[i] ? 1.0f : 0.0f);
    case WANE_LE: EACH(a[i] <= b[i] ? 1.0f : 0.0f);
    case WANE_GT: EACH(a[i] > b[i] ? 1.0f : 0.0f);
    case WANE_GE: EACH(a[i] >= b[i] ? 1.0f : 0.0f);
    case WANE_AND: EACH(a[i] != 0 && b[i] != 0 ? 1.0f : 0.0f);
    case WANE_OR: EACH(a[i] != 0 || b[i] != 0 ? 1.0f : 0.0f);
    default: EACH((a[i] != 0) != (b[i] != 0) ? 1.0f : 0.0f);
  }
#undef EACH
}

/* a to a whole power b >= 0 by squaring; negative powers of 1 and -1 are themselves or their square, of anything else 0. */
static uint64_t pow_i64(int64_t a, int64_t b) {
  uint64_t result = 1, base = (uint64_t)a;
  if (b < 0) return a == 1 ? 1 : a == -1 ? (b & 1 ? UINT64_MAX : 1) : 0;
  for (; b > 0; b >>= 1, base *= base)
    if (b & 1) result *= base;
  return result;
}

/* Sign of the divisor; modulo 0 is 0 (there is no trap to give). */
static int64_t mod_i64(int64_t a, int64_t b) {
  if (b == 0 || b == -1) return 0;
  int64_t r = a % b;
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

static void binary_i64(int code, const i64u *restrict a, const i64u *restrict b, int64_t *restrict y, int64_t n) {
#define EACH(expression) for (int64_t i = 0; i < n; i++) y[i] = (int64_t)(expression); break
  switch (code) {
    case WANE_ADD: EACH((uint64_t)a[i] + (uint64_t)b[i]);
    case WANE_SUB: EACH((uint64_t)a[i] - (uint64_t)b[i]);
    case WANE_MUL: EACH((uint64_t)a[i] * (uint64_t)b[i]);
    case WANE_POW: EACH(pow_i64(a[i], b[i]));
    case WANE_MIN: EACH(a[i] < b[i] ? a[i] : b[i]);
    case WANE_MAX: EACH(a[i] > b[i] ? a[i] : b[i]);
    case WANE_MOD: EACH(mod_i64(a[i], b[i]));
    case WANE_EQ: EACH(a[i] == b[i]);
    case WANE_NE: EACH(a[i] != b[i]);
    case WANE_LT: EACH(a[i] < b[i]);
    case WANE_LE: EACH(a[i] <= b[i]);
    case WANE_GT: EACH(a[i] > b[i]);
    case WANE_GE: EACH(a[i] >= b[i]);
    case WANE_AND: EACH(a[i] != 0 && b[i] != 0);
    case WANE_OR: EACH(a[i] != 0 || b[i] != 0);
    default: EACH((a[i] != 0) != (b[i] != 0));
  }
#undef EACH
}

static void binary_run_f32(const wane_op *op, char *const p[], const int64_t st[], int64_t n) {
  int to = op->i[0], da = op->i[1], db = op->i[2], scalar = op->i[6], swap = op->i[7];
  int64_t to_size = wane_element_size(to), a_size = wane_element_size(da), b_size = wane_element_size(db);
  float buffer_a[WANE_BLOCK], buffer_b[WANE_BLOCK], out[WANE_BLOCK];
  if (scalar) for (int64_t i = 0; i < WANE_BLOCK && i < n; i++) buffer_b[i] = (float)op->d[0];
  for (int64_t i = 0; i < n; i += WANE_BLOCK) {
    int64_t m = n - i < WANE_BLOCK ? n - i : WANE_BLOCK;
    char *y = p[0] + i * st[0] * to_size;
    const f32u *a = wane_load_f32(da, p[1] + i * st[1] * a_size, st[1], m, buffer_a);
    const f32u *b = scalar ? buffer_b : wane_load_f32(db, p[2] + i * st[2] * b_size, st[2], m, buffer_b);
    float *direct = direct_f32(to, y, st[0]);
    binary_f32(op->i[4], swap ? b : a, swap ? a : b, direct ? direct : out, m);
    if (!direct) wane_store_f32(to, y, st[0], m, out);
  }
}

static void binary_run_i64(const wane_op *op, char *const p[], const int64_t st[], int64_t n) {
  int to = op->i[0], da = op->i[1], db = op->i[2], scalar = op->i[6], swap = op->i[7];
  int64_t to_size = wane_element_size(to), a_size = wane_element_size(da), b_size = wane_element_size(db);
  int64_t buffer_a[WANE_BLOCK], buffer_b[WANE_BLOCK], out[WANE_BLOCK];
  if (scalar) for (int64_t i = 0; i < WANE_BLOCK && i < n; i++) buffer_b[i] = (int64_t)op->d[0];
  for (int64_t i = 0; i < n; i += WANE_BLOCK) {
    int64_t m = n - i < WANE_BLOCK ? n - i : WANE_BLOCK;
    char *y = p[0] + i * st[0] * to_size;
    const i64u *a = wane_load_i64(da, p[1] + i * st[1] * a_size, st[1], m, buffer_a);
    const i64u *b = scalar ? buffer_b : wane_load_i64(db, p[2] + i * st[2] * b_size, st[2], m, buffer_b);
    binary_i64(op->i[4], swap ? b : a, swap ? a : b, out, m);
    wane_store_i64(to, y, st[0], m, out);
  }
}

static void kernel_binary(const wane_op *op, uint32_t chunk) {
  wane_walk(op, chunk, op->i[6] ? 2 : 3, 64, op->i[5] ? binary_run_i64 : binary_run_f32);
}

/* ---------------------------------------------------------------- where */

static void where_run(const wane_op *op, char *const p[], const int64_t st[], int64_t n) {
  int64_t size[4];
  for (int k = 0; k < 4; k++) size[k] = wane_element_size(op->i[k]);
  for (int64_t i = 0; i < n; i += WANE_BLOCK) {
    int64_t m = n - i < WANE_BLOCK ? n - i : WANE_BLOCK;
    const char *pc = p[1] + i * st[1] * size[1], *pa = p[2] + i * st[2] * size[2], *pb = p[3] + i * st[3] * size[3];
    float truth[WANE_BLOCK];
    const f32u *c = wane_load_f32(op->i[1], pc, st[1], m, truth);
    if (op->i[5]) {
      int64_t buffer_a[WANE_BLOCK], buffer_b[WANE_BLOCK], out[WANE_BLOCK];
      const i64u *a = wane_load_i64(op->i[2], pa, st[2], m, buffer_a), *b = wane_load_i64(op->i[3], pb, st[3], m, buffer_b);
      for (int64_t j = 0; j < m; j++) out[j] = c[j] != 0 ? a[j] : b[j];
      wane_store_i64(op->i[0], p[0] + i * st[0] * size[0], st[0], m, out);
    } else {
      float buffer_a[WANE_BLOCK], buffer_b[WANE_BLOCK], out[WANE_BLOCK];
      const f32u *a = wane_load_f32(op->i[2], pa, st[2], m, buffer_a), *b = wane_load_f32(op->i[3], pb, st[3], m, buffer_b);
      for (int64_t j = 0; j < m; j++) out[j] = c[j] != 0 ? a[j] : b[j];
      wane_store_f32(op->i[0], p[0] + i * st[0] * size[0], st[0], m, out);
    }
  }
}

static void kernel_where(const wane_op *op, uint32_t chunk) { wane_walk(op, chunk, 4, 64, where_run); }

/* ---------------------------------------------------------------- selecting by index */

/* out = x[index] along one dimension: operand 1's stride is 0 there, n[8] apart are its elements. A negative index counts
 * from the end; one out of range fails the op and leaves zeros. */
static void index_run(const wane_op *op, char *const p[], const int64_t st[], int64_t n) {
  int64_t size = wane_element_size(op->i[0]), index_size = wane_element_size(op->i[2]), limit = op->n[7];
  for (int64_t i = 0; i < n;) {
    int64_t buffer[1], at, m = st[2] == 0 ? n - i : 1;           /* one index may serve the whole stretch */
    at = wane_load_i64(op->i[2], p[2] + i * st[2] * index_size, 1, 1, buffer)[0];
    char *y = p[0] + i * st[0] * size;
    const char *x = p[1] + i * st[1] * size;
    if (at < -limit || at >= limit) {
      wane_op_fail(op, "index %lld is out of range: the dimension has %lld elements (0-based; negative counts from the end)", (long long)at, (long long)limit);
      for (int64_t j = 0; j < m; j++) memset(y + j * st[0] * size, 0, (size_t)size);
    } else {
      copy_bytes(y, st[0], x + (at < 0 ? at + limit : at) * op->n[8] * size, st[1], size, m);
    }
    i += m;
  }
}

static void kernel_index(const wane_op *op, uint32_t chunk) { wane_walk(op, chunk, 3, 64, index_run); }

/* Puts this group's kernels into the table. */
static void register_elementwise(wane_backend *b, const char *origin) {
  static const struct { int code; wane_kernel fn; } kernels[] = {
    { WANE_OP_COPY, kernel_copy }, { WANE_OP_FILL, kernel_fill }, { WANE_OP_UNARY, kernel_unary },
    { WANE_OP_BINARY, kernel_binary }, { WANE_OP_WHERE, kernel_where }, { WANE_OP_INDEX, kernel_index },
  };
  for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
    b->ops[kernels[i].code] = kernels[i].fn;
    b->origin[kernels[i].code] = origin;
  }
}
