/* matmul_kernels.h: C = A B in f32, blocked (Goto & van de Geijn 2008). Included once by each instruction-set group, which
 * chooses the vector width (vec.h).
 *
 * A tile of C is one unit of work. For each block of K its parts of A and B are packed into this worker's scratch memory,
 * from any strides, in the order in which the inner kernel reads them; the inner kernel keeps MR x NR sums in registers.
 * A sum runs over k in order, in blocks of BLOCK_K whose sums are added: the same for every cut, tile and thread count.
 *
 * Record: strided.h's loop over batches (operands C, A, B), n[7] M, n[8] N, n[9] K, A's strides n[10] (m) and n[11] (k),
 * B's strides spare[0] (k) and spare[1] (n); C is [M, N] contiguous. i[5]: all three are i64. */
#include "../x86/vec.h"
#include "convert.h"
#include "matmul.h"
#include "strided.h"

enum { MR = 6, NR = 2 * VW, BLOCK_K = 256, PANELS_M = WANE_MATMUL_TILE_M / MR, PANELS_N = WANE_MATMUL_TILE_N / NR };
_Static_assert((WANE_MATMUL_TILE_M + WANE_MATMUL_TILE_N) * BLOCK_K * 4 <= WANE_SCRATCH, "the packed blocks fit into the scratch memory");

/* Packs rows x depth elements as panels of `width` rows: [panel][depth][width], zeros beyond the last row. */
static void pack(float *restrict to, const wane_f32u *restrict from, int64_t rows, int64_t depth, int64_t row_stride, int64_t depth_stride, int width) {
  for (int64_t r = 0; r < rows; r += width, to += width * depth) {
    int m = rows - r < width ? (int)(rows - r) : width;
    const wane_f32u *x = from + r * row_stride;
    if (m < width) memset(to, 0, (size_t)(width * depth) * sizeof *to);
    if (row_stride == 1) {
      for (int64_t k = 0; k < depth; k++) memcpy(to + k * width, x + k * depth_stride, (size_t)m * sizeof *to);
    } else {
      for (int i = 0; i < m; i++)
        for (int64_t k = 0; k < depth; k++) to[k * width + i] = x[i * row_stride + k * depth_stride];
    }
  }
}

/* MR x NR sums over `depth` of packed panels; added to C, or stored there when `first`. Rows and columns beyond m, n are not written. */
static void inner(const float *restrict a, const float *restrict b, int64_t depth, float *restrict c, int64_t ldc, int m, int n, int first) {
  vf sum[MR][2];
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = vf_zero();
  for (int64_t k = 0; k < depth; k++, a += MR, b += NR) {
    vf b0 = vf_load(b), b1 = vf_load(b + VW);
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++) {
      vf x = vf_set1(a[i]);
      sum[i][0] = vf_fma(x, b0, sum[i][0]);
      sum[i][1] = vf_fma(x, b1, sum[i][1]);
    }
  }
  for (int i = 0; i < m; i++) {
    float edge[NR], *to = c + i * ldc;
    vf_store(edge, sum[i][0]);
    vf_store(edge + VW, sum[i][1]);
    for (int j = 0; j < n; j++) to[j] = first ? edge[j] : to[j] + edge[j];
  }
}

/* One tile of C: rows m0.., columns n0.. of a batch. */
static void tile(const wane_op *op, const wane_f32u *a, const wane_f32u *b, float *c, int64_t m0, int64_t n0) {
  int64_t m = op->n[7] - m0, n = op->n[8] - n0, depth = op->n[9];
  int64_t am = op->n[10], ak = op->n[11], bk = (int64_t)op->spare[0], bn = (int64_t)op->spare[1];
  float *pa = wane_scratch(), *pb = pa + WANE_MATMUL_TILE_M * BLOCK_K;
  if (m > WANE_MATMUL_TILE_M) m = WANE_MATMUL_TILE_M;
  if (n > WANE_MATMUL_TILE_N) n = WANE_MATMUL_TILE_N;
  c += m0 * op->n[8] + n0;
  if (depth == 0)
    for (int64_t i = 0; i < m; i++) memset(c + i * op->n[8], 0, (size_t)n * sizeof *c);
  for (int64_t k0 = 0; k0 < depth; k0 += BLOCK_K) {
    int64_t kc = depth - k0 < BLOCK_K ? depth - k0 : BLOCK_K;
    pack(pa, a + m0 * am + k0 * ak, m, kc, am, ak, MR);
    pack(pb, b + k0 * bk + n0 * bn, n, kc, bn, bk, NR);
    for (int64_t j = 0; j < n; j += NR)
      for (int64_t i = 0; i < m; i += MR)
        inner(pa + i * kc, pb + j * kc, kc, c + i * op->n[8] + j, op->n[8], m - i < MR ? (int)(m - i) : MR, n - j < NR ? (int)(n - j) : NR, k0 == 0);
  }
}

/* Integers, wrapping: the plain loops. */
static void tile_i64(const wane_op *op, const wane_i64u *a, const wane_i64u *b, int64_t *c, int64_t m0, int64_t n0) {
  int64_t N = op->n[8], K = op->n[9], bk = (int64_t)op->spare[0], bn = (int64_t)op->spare[1];
  for (int64_t m = m0; m < op->n[7] && m < m0 + WANE_MATMUL_TILE_M; m++)
    for (int64_t n = n0; n < N && n < n0 + WANE_MATMUL_TILE_N; n++) {
      uint64_t sum = 0;
      for (int64_t k = 0; k < K; k++) sum += (uint64_t)a[m * op->n[10] + k * op->n[11]] * (uint64_t)b[k * bk + n * bn];
      c[m * N + n] = (int64_t)sum;
    }
}

static void kernel_matmul(const wane_op *op, uint32_t chunk) {
  int64_t across = (op->n[8] + WANE_MATMUL_TILE_N - 1) / WANE_MATMUL_TILE_N, down = (op->n[7] + WANE_MATMUL_TILE_M - 1) / WANE_MATMUL_TILE_M, lo, hi;
  wane_op_range(op, chunk, op->n[5] * down * across, 1, &lo, &hi);
  for (int64_t u = lo; u < hi; u++) {
    int64_t batch = u / (down * across), m0 = u / across % down * WANE_MATMUL_TILE_M, n0 = u % across * WANE_MATMUL_TILE_N, at[3] = { 0 };
    for (int d = (int)op->n[6] - 1; d >= 0; batch /= op->n[d], d--)
      for (int k = 0; k < 3; k++) at[k] += batch % op->n[d] * op->stride[k][d];
    if (op->i[5]) tile_i64(op, (const wane_i64u *)op->p[1] + at[1], (const wane_i64u *)op->p[2] + at[2], (int64_t *)op->p[0] + at[0], m0, n0);
    else tile(op, (const wane_f32u *)op->p[1] + at[1], (const wane_f32u *)op->p[2] + at[2], (float *)op->p[0] + at[0], m0, n0);
  }
}

static void register_matmul(wane_backend *b, const char *origin) {
  b->ops[WANE_OP_MATMUL] = kernel_matmul;
  b->origin[WANE_OP_MATMUL] = origin;
}
