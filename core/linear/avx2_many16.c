/* avx2_many16.c: many rows of x times NF4 or FP4 weights with AVX2 and sixteen-bit products, 1.5 times as fast as f32 ones.
 *
 * The frame is avx2_many.c's; what differs is the arithmetic. x has one scale per 64 values and token (its largest magnitude becomes
 * 8191), the levels are whole numbers of at most 4095, so that 64 products fit an int32; after 64 k the sum meets W's scale and x's in
 * f32. The result is off by about 3e-4 of its typical size, bf16 x bf16 by 6e-3. Rows that are no whole number of blocks of 64, block
 * size 32 and WANE_COMPUTE_F32 take the f32 kernels. */
#include "avx2_linear.h"
#include <math.h>

enum { TILE_M = 6, TILE_N = 16, TILE = TILE_M * TILE_N, BLOCK = 64, STEP = 512, BLOCK_ROWS = 48, X_MAX = 8191, LEVEL_MAX = 4095 };

static int usable(const wane_linear_args *a, const wane_qview *w) {
  return a->compute != WANE_COMPUTE_F32 && a->K > 0 && a->K % BLOCK == 0 && w->block_size % BLOCK == 0;
}

/* Bytes of a panel of 16 tokens: int16 [K / 2][16][2], pairs of k in `order` inside a block; then f32 [K / 64][16]. */
static int64_t panel_bytes(int64_t K) { return K * TILE_N * 2 + K / BLOCK * TILE_N * 4; }

/* Where pair p (values 2p, 2p + 1 of a block) stands, because that is how decode_row's registers hold them. */
static int order(int p) { return p % 16 / 4 * 8 + p / 16 * 4 + p % 4; }

/* Sixteen tokens (those past the end are zero) of block k / 64 into a panel. */
static void pack_block(const wane_linear_args *a, int64_t m, int64_t k, char *panel) {
  int16_t q[TILE_N][BLOCK] __attribute__((aligned(32)));
  float *scale = (float *)(void *)(panel + a->K * TILE_N * 2) + k / BLOCK * TILE_N;
  float *out = (float *)(void *)(panel + k * TILE_N * 2);         /* pairs as dwords */
  for (int t = 0; t < TILE_N; t++) {
    __m256i d[8];
    if (m + t >= a->M) { memset(q[t], 0, sizeof q[t]); scale[t] = 0; continue; }
    scale[t] = avx2_quantize64(a->x, a->dtype, (m + t) * a->K + k, X_MAX, d) / LEVEL_MAX;
    for (int i = 0; i < 4; i++)
      _mm256_store_si256((__m256i *)(void *)(q[t] + 16 * i), _mm256_permute4x64_epi64(_mm256_packs_epi32(d[2 * i], d[2 * i + 1]), 0xd8));
  }
  for (int half = 0; half < TILE_N; half += 8)
    for (int p = 0; p < BLOCK / 2; p += 8) {
      __m256 r[8];
      for (int t = 0; t < 8; t++) r[t] = _mm256_load_ps((const float *)(const void *)q[half + t] + p);
      avx2_transpose(r);
      for (int i = 0; i < 8; i++) _mm256_store_ps(out + order(p + i) * TILE_N + half, r[i]);
    }
}

void avx2_pack_4bit(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  if (!usable(&a, &w)) { avx2_pack(op, chunk); return; }
  wane_op_range(op, chunk, a.M, 32, &lo, &hi);
  for (int64_t m = lo; m < hi; m += TILE_N)
    for (int64_t k = 0; k < a.K; k += BLOCK) pack_block(&a, m, k, (char *)a.work + m / TILE_N * panel_bytes(a.K));
}

/* Byte planes of the levels as int16, in both halves of a register. */
typedef struct tables { __m256i low, high; } tables;

static tables tables_of(int dtype) {
  const float *levels = dtype == WANE_NF4 ? wane_nf4_levels : wane_fp4_levels;
  uint8_t low[16], high[16];
  for (int i = 0; i < 16; i++) {
    uint32_t v = (uint32_t)lrintf(levels[i] * LEVEL_MAX);
    low[i] = (uint8_t)v;
    high[i] = (uint8_t)(v >> 8);
  }
  tables t = { _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)low)),
               _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)high)) };
  return t;
}

/* Values [k, k + step) of row n as int16 [step], pairs in `order`, and their scales [step / 64]. */
static void decode_row(const wane_qview *w, const tables *t, int64_t n, int64_t k, int64_t step, int16_t *out, float *scale) {
  const __m256i mask = _mm256_set1_epi8(15);
  int64_t first = n * w->cols + k;
  const uint8_t *q = (const uint8_t *)w->codes + first / 2;
  for (int64_t i = 0; i < step; i += BLOCK, q += 32) {
    int64_t b = (first + i) / w->block_size;
    __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)q), *o = (__m256i *)(void *)(out + i);
    __m256i even = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask), odd = _mm256_and_si256(v, mask);
    __m256i lo = _mm256_unpacklo_epi8(even, odd), hi = _mm256_unpackhi_epi8(even, odd);
    __m256i a = _mm256_shuffle_epi8(t->low, lo), c = _mm256_shuffle_epi8(t->high, lo);
    __m256i d = _mm256_shuffle_epi8(t->low, hi), e = _mm256_shuffle_epi8(t->high, hi);
    _mm256_store_si256(o, _mm256_unpacklo_epi8(a, c));
    _mm256_store_si256(o + 1, _mm256_unpackhi_epi8(a, c));
    _mm256_store_si256(o + 2, _mm256_unpacklo_epi8(d, e));
    _mm256_store_si256(o + 3, _mm256_unpackhi_epi8(d, e));
    *scale++ = w->nested_absmax ? w->nested_code[((const uint8_t *)w->absmax)[b]] * w->nested_absmax[b / WANE_NESTED_BLOCK] + *w->offset
                                : ((const float *)w->absmax)[b];
  }
}

/* sum [6][16] = one block of six decoded rows (STEP apart) times a panel's block: whole numbers. In assembly because the twelve sums, two
 * registers of x, one of W and one product fill all sixteen registers, and gcc 12 keeps the sums on the stack instead (half the speed). */
static void multiply_block(const int16_t *rows, const char *x, int32_t *sum) {
#define ROW(at, s0, s1)                                                      \
  "vbroadcastss " #at "(%[w]), %%ymm14\n\t"                                  \
  "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n\t"                                   \
  "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"                                   \
  "vpaddd %%ymm15, %%ymm" #s0 ", %%ymm" #s0 "\n\t"                           \
  "vpaddd %%ymm14, %%ymm" #s1 ", %%ymm" #s1 "\n\t"
#define ZERO(s) "vpxor %%ymm" #s ", %%ymm" #s ", %%ymm" #s "\n\t"
#define STORE(at, s) "vmovdqa %%ymm" #s ", " #at "(%[sum])\n\t"
  const char *end = x + BLOCK / 2 * 64;
  __asm__ volatile(
    ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11)
    ".p2align 5\n"
    "1:\n\t"
    "vmovdqa (%[x]), %%ymm12\n\t"
    "vmovdqa 32(%[x]), %%ymm13\n\t"
    ROW(0, 0, 1) ROW(1024, 2, 3) ROW(2048, 4, 5) ROW(3072, 6, 7) ROW(4096, 8, 9) ROW(5120, 10, 11)
    "add $64, %[x]\n\t"
    "add $4, %[w]\n\t"
    "cmp %[end], %[x]\n\t"
    "jne 1b\n\t"
    STORE(0, 0) STORE(32, 1) STORE(64, 2) STORE(96, 3) STORE(128, 4) STORE(160, 5)
    STORE(192, 6) STORE(224, 7) STORE(256, 8) STORE(288, 9) STORE(320, 10) STORE(352, 11)
    : [w] "+r"(rows), [x] "+r"(x)
    : [end] "r"(end), [sum] "r"(sum)
    : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef ROW
#undef ZERO
#undef STORE
}
_Static_assert(STEP * sizeof(int16_t) == 1024, "multiply_block has the distance of two rows written out");

/* c [6][16] += six decoded rows with their scales (STEP / 64 apart) times a panel's blocks. */
static void multiply_tile(const int16_t *rows, const float *scale, const char *x, const float *xscale, int64_t blocks, float *c) {
  int32_t sum[TILE] __attribute__((aligned(32)));
  for (int64_t b = 0; b < blocks; b++, rows += BLOCK, xscale += TILE_N, x += BLOCK / 2 * 64) {
    __m256 xs0 = _mm256_load_ps(xscale), xs1 = _mm256_load_ps(xscale + 8);
    multiply_block(rows, x, sum);
    for (int i = 0; i < TILE_M; i++) {
      __m256 v = _mm256_broadcast_ss(scale + i * (STEP / BLOCK) + b);
      const __m256i *s = (const __m256i *)(const void *)(sum + i * TILE_N);
      float *to = c + i * TILE_N;
      _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[0]), _mm256_mul_ps(v, xs0), _mm256_load_ps(to)));
      _mm256_store_ps(to + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[1]), _mm256_mul_ps(v, xs1), _mm256_load_ps(to + 8)));
    }
  }
}

/* Rows [n, n + count) of W, count <= BLOCK_ROWS, against all tokens. */
static void many_block(const wane_linear_args *a, const wane_qview *w, const tables *t, int64_t n, int64_t count) {
  int64_t groups = (count + TILE_M - 1) / TILE_M, panels = (a->M + TILE_N - 1) / TILE_N;
  int16_t *rows = wane_scratch();                                 // [count][STEP]
  float *scale = (float *)(void *)(rows + BLOCK_ROWS * STEP);     // [count][STEP / 64]
  float *c = scale + BLOCK_ROWS * (STEP / BLOCK);                 // [panels][groups][6][16]
  memset(c, 0, (size_t)(panels * groups * TILE) * 4);
  for (int64_t k = 0; k < a->K; k += STEP) {
    int64_t step = a->K - k < STEP ? a->K - k : STEP;
    for (int64_t i = 0; i < count; i++) decode_row(w, t, n + i, k, step, rows + i * STEP, scale + i * (STEP / BLOCK));
    for (int64_t p = 0; p < panels; p++) {
      const char *panel = (const char *)a->work + p * panel_bytes(a->K);
      const float *xscale = (const float *)(const void *)(panel + a->K * TILE_N * 2) + k / BLOCK * TILE_N;
      for (int64_t g = 0; g < groups; g++)
        multiply_tile(rows + g * TILE_M * STEP, scale + g * TILE_M * (STEP / BLOCK), panel + k * TILE_N * 2, xscale, step / BLOCK, c + (p * groups + g) * TILE);
    }
  }
  for (int64_t p = 0; p < panels; p++) {
    int64_t m = p * TILE_N;
    avx2_write_panel(a, c + p * groups * TILE, m, a->M - m < TILE_N ? a->M - m : TILE_N, n, count);
  }
}

void avx2_many_4bit(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  if (!usable(&a, &w)) { avx2_many(op, chunk); return; }
  tables t = tables_of(w.dtype);
  wane_op_range(op, chunk, a.N, 12, &lo, &hi);
  for (int64_t n = lo; n < hi; n += BLOCK_ROWS) many_block(&a, &w, &t, n, hi - n < BLOCK_ROWS ? hi - n : BLOCK_ROWS);
}
