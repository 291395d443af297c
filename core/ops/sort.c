/* sort.c: stable sort and the k largest or smallest along a dimension.
 *
 * Every value becomes an unsigned 64-bit key whose order is the one asked for: a descending sort flips the key's bits, NaN
 * gets the largest key either way, -0 and 0 share one. A row is sorted by its keys with a radix sort from the low byte up,
 * which is stable, linear and skips bytes that all keys share; the k best of many are kept in a heap instead. */
#include "convert.h"
#include "ops.h"
#include "strided.h"
#include <string.h>

typedef struct entry { uint64_t key; int64_t at; } entry;

/* The k best are found with a heap up to this k; above it (or when k is a large part of the row) the row is sorted. */
enum { HEAP_MOST = 1024 };

/* ---------------------------------------------------------------- kernels */

/* Key of an f32: its bits as an unsigned number in the order of the values. */
static uint64_t float_key(float x, int descending) {
  if (x != x) return UINT64_MAX;
  uint32_t u = wane_float_bits(x == 0 ? 0.0f : x);
  u = u >> 31 ? ~u : u | 0x80000000u;
  return descending ? (uint32_t)~u : u;
}

static uint64_t integer_key(int64_t x, int descending) {
  uint64_t u = (uint64_t)x ^ (uint64_t)1 << 63;
  return descending ? ~u : u;
}

/* Keys of a row of n elements `stride` apart, in order. */
static void load_keys(int dtype, const char *x, int64_t stride, int64_t n, int descending, entry *out) {
  int64_t size = wane_element_size(dtype);
  for (int64_t i = 0; i < n; i += WANE_BLOCK) {
    int64_t m = n - i < WANE_BLOCK ? n - i : WANE_BLOCK;
    if (wane_is_float_dtype(dtype)) {
      float buffer[WANE_BLOCK];
      const wane_f32u *v = wane_load_f32(dtype, x + i * stride * size, stride, m, buffer);
      for (int64_t j = 0; j < m; j++) out[i + j] = (entry){ float_key(v[j], descending), i + j };
    } else {
      int64_t buffer[WANE_BLOCK];
      const wane_i64u *v = wane_load_i64(dtype, x + i * stride * size, stride, m, buffer);
      for (int64_t j = 0; j < m; j++) out[i + j] = (entry){ integer_key(v[j], descending), i + j };
    }
  }
}

/* Sorts a[0..n) by key, stably; b is as large. Returns the one of the two that holds the result. */
static entry *radix_sort(entry *a, entry *b, int64_t n) {
  int64_t count[8][256];
  memset(count, 0, sizeof count);
  for (int64_t i = 0; i < n; i++)
    for (int byte = 0; byte < 8; byte++) count[byte][a[i].key >> (8 * byte) & 255]++;
  for (int byte = 0; byte < 8; byte++) {
    int64_t *c = count[byte], at = 0;
    if (n == 0 || c[a[0].key >> (8 * byte) & 255] == n) continue;
    for (int v = 0; v < 256; v++) {
      int64_t here = c[v];
      c[v] = at;
      at += here;
    }
    for (int64_t i = 0; i < n; i++) b[c[a[i].key >> (8 * byte) & 255]++] = a[i];
    entry *t = a;
    a = b;
    b = t;
  }
  return a;
}

static int worse(const entry *x, const entry *y) { return x->key > y->key || (x->key == y->key && x->at > y->at); }

/* Restores the heap (worst on top) below i. */
static void sift(entry *heap, int64_t n, int64_t i) {
  for (;;) {
    int64_t top = i, left = 2 * i + 1;
    for (int64_t c = left; c < left + 2 && c < n; c++)
      if (worse(&heap[c], &heap[top])) top = c;
    if (top == i) return;
    entry t = heap[i];
    heap[i] = heap[top];
    heap[top] = t;
    i = top;
  }
}

/* The k best of a[0..n), in order, at its front. The order is total (key, then place), so the result is unique. */
static void select_best(entry *a, int64_t n, int64_t k) {
  for (int64_t i = k / 2 - 1; i >= 0; i--) sift(a, k, i);
  for (int64_t i = k; i < n; i++)
    if (worse(&a[0], &a[i])) {
      a[0] = a[i];
      sift(a, k, 0);
    }
  for (int64_t left = k - 1; left > 0; left--) {
    entry t = a[0];
    a[0] = a[left];
    a[left] = t;
    sift(a, left, 0);
  }
}

/* Writes values and indices of the first k entries of the row x, from element `out` of the outputs on. */
static void store_row(const wane_op *op, const entry *e, const char *x, int64_t out) {
  int64_t size = wane_element_size(op->i[0]), inner = op->n[2], k = op->n[3];
  for (int64_t i = 0; i < k; i++, out += inner) {
    if (op->p[0]) memcpy((char *)op->p[0] + out * size, x + e[i].at * inner * size, (size_t)size);
    if (op->p[1]) memcpy((char *)op->p[1] + out * 8, &e[i].at, 8);
  }
}

/* WANE_OP_SORT. p[0] values, p[1] indices (either may be NULL), p[2] x, p[3] entries [chunks][2][n].
 * x is [outer, n, inner] contiguous: n[0] outer, n[1] n, n[2] inner; the outputs are [outer, k, inner], n[3] k.
 * i[0] dtype, i[4] descending. */
static void kernel_sort(const wane_op *op, uint32_t chunk) {
  int64_t n = op->n[1], inner = op->n[2], k = op->n[3], size = wane_element_size(op->i[0]), lo, hi;
  entry *a = (entry *)op->p[3] + (int64_t)chunk * 2 * n;
  wane_op_range(op, chunk, op->n[0] * inner, 1, &lo, &hi);
  for (int64_t row = lo; row < hi; row++) {
    int64_t outer = row / inner, at = row % inner;
    const char *x = (const char *)op->p[2] + (outer * n * inner + at) * size;
    entry *sorted = a;
    load_keys(op->i[0], x, inner, n, op->i[4], a);
    if (k <= HEAP_MOST && k * 8 <= n) select_best(a, n, k);
    else sorted = radix_sort(a, a + n, n);
    store_row(op, sorted, x, outer * k * inner + at);
  }
}

void wane_register_generic_sort(wane_backend *b) {
  b->ops[WANE_OP_SORT] = kernel_sort;
  b->origin[WANE_OP_SORT] = "generic";
}

/* ---------------------------------------------------------------- front */

/* Enqueues the first k of each row of x in order. */
static int push_sort(wane_stream *s, wane_tensor *values, wane_tensor *indices, const wane_tensor *x, int64_t k, int dim, int descending) {
  int64_t outer = 1, inner = 1, n = x->shape[dim];
  for (int d = 0; d < dim; d++) outer *= x->shape[d];
  for (int d = dim + 1; d < x->ndim; d++) inner *= x->shape[d];
  if (outer * inner == 0 || k == 0) return WANE_OK;
  /* Each chunk has its own two rows of entries; few chunks for long rows keep that memory small. */
  uint32_t chunks = wane_chunks(outer * inner * n, 4096);
  if (chunks > 16) chunks = 16;
  if ((int64_t)chunks > outer * inner) chunks = (uint32_t)(outer * inner);
  wane_storage *hold = NULL;
  void *entries = wane_workspace(s, (size_t)chunks * 2 * (size_t)n * sizeof(entry), &hold);
  if (!entries) return WANE_E_MEMORY;
  wane_op *op = wane_op_new(s, WANE_OP_SORT);
  op->p[0] = values ? values->data : NULL;
  op->p[1] = indices ? indices->data : NULL;
  op->p[2] = x->data;
  op->p[3] = entries;
  op->n[0] = outer;
  op->n[1] = n;
  op->n[2] = inner;
  op->n[3] = k;
  op->i[0] = x->dtype;
  op->i[4] = descending;
  op->nchunks = chunks;
  wane_op_push(s, op, values, indices);
  wane_storage_unref(hold);
  return WANE_OK;
}

/* Both public functions: k < 0 for all of the row. */
static int sort_or_topk(wane_stream *s, wane_handle *values, wane_handle *indices, const wane_handle *x, int64_t k, int dim, int descending, const char *name) {
  int rc = wane_enter(s);
  wane_tensor *t = rc ? NULL : wane_use(s, x, "x"), *v = NULL, *i = NULL;
  wane_handle tmp = { 0 };
  if (!t) return rc ? rc : WANE_E_STALE;
  if ((rc = wane_need_plain(t, name, "x"))) return rc;
  if (dim < 0 || dim >= t->ndim) return wane_fail(WANE_E_ARG, "%s: %s has no dimension %d", name, wane_shape_text(t), dim + 1);
  if (k > t->shape[dim])
    return wane_fail(WANE_E_ARG, "%s: k = %lld, but dimension %d of %s has only %lld elements",
                     name, (long long)k, dim + 1, wane_shape_text(t), (long long)t->shape[dim]);
  int64_t shape[WANE_MAX_DIMS];
  memcpy(shape, t->shape, sizeof shape);
  shape[dim] = k = k < 0 ? t->shape[dim] : k;
  if (!(t = wane_contiguous(s, t, &tmp))) return WANE_E_MEMORY;
  int ok = (!values || (v = wane_make(s, values, t->dtype, t->ndim, shape))) && (!indices || (i = wane_make(s, indices, WANE_I64, t->ndim, shape)));
  rc = ok ? push_sort(s, v, i, t, k, dim, descending) : WANE_E_MEMORY;
  if (rc && v) wane_tensor_free(values);
  if (rc && i) wane_tensor_free(indices);
  wane_tensor_free(&tmp);
  return rc;
}

int wane_sort(wane_stream *s, wane_handle *values, wane_handle *indices, const wane_handle *x, int dim, int descending) {
  return sort_or_topk(s, values, indices, x, -1, dim, descending != 0, "sort");
}

int wane_topk(wane_stream *s, wane_handle *values, wane_handle *indices, const wane_handle *x, int64_t k, int dim, int largest) {
  if (k < 0) return wane_fail(WANE_E_ARG, "topk: k = %lld is negative", (long long)k);
  return sort_or_topk(s, values, indices, x, k, dim, largest != 0, "topk");
}
