/* avx512_many16.c: many rows of x times NF4 or FP4 weights with AVX-512 VNNI and sixteen-bit products (vpdpwssd: twice the rate of f32
 * FMA on Intel and on Zen 4, where vdpbf16ps on Intel is half of it). The arithmetic is avx2_many16.c's, the register tile 12 rows of W by 32 tokens. */
#include "avx512_linear.h"
#include "../x86/simd.h"
#include "../x86/transpose16.h"
#include <math.h>

enum { TILE_M = 12, TILE_N = 32, TILE = TILE_M * TILE_N, BLOCK = 64, STEP = 512, BLOCK_ROWS = 48, X_MAX = 8191, LEVEL_MAX = 4095 };

static int usable(const wane_linear_args *a, const wane_qview *w) {
  return a->compute != WANE_COMPUTE_F32 && a->K > 0 && a->K % BLOCK == 0 && w->block_size % BLOCK == 0;
}

/* Bytes of a panel of 32 tokens: int16 [K / 2][32][2], then f32 [K / 64][32]. */
static int64_t panel_bytes(int64_t K) { return K * TILE_N * 2 + K / BLOCK * TILE_N * 4; }

/* The element of a block at word i of its decoded order: word i of the packed bytes has elements 4i + (1, 0, 3, 2), vector q of the
 * decoded block is nibble q of its sixteen words. */
static int element(int i) {
  static const int nibble[4] = { 1, 0, 3, 2 };
  return i % 16 * 4 + nibble[i / 16];
}

/* Sixteen tokens (those past the end are zero) of a block into a panel: a token's 32 pairs in decoded order, then turned. */
static void pack_block(const wane_linear_args *a, int64_t m, int64_t k, const __m512i *order, char *panel, float *scale) {
  _Alignas(64) int16_t q[16][BLOCK];
  for (int t = 0; t < 16; t++) {
    __m256i d[8];
    _Alignas(64) int16_t plain[BLOCK];
    if (m + t >= a->M) { memset(q[t], 0, sizeof q[t]); scale[t] = 0; continue; }
    scale[t] = avx2_quantize64(a->x, a->dtype, (m + t) * a->K + k, X_MAX, d) / LEVEL_MAX;
    for (int i = 0; i < 4; i++)
      _mm256_store_si256((__m256i *)(void *)(plain + 16 * i), _mm256_permute4x64_epi64(_mm256_packs_epi32(d[2 * i], d[2 * i + 1]), 0xd8));
    __m512i lo = _mm512_loadu_si512(plain), hi = _mm512_loadu_si512(plain + 32);
    _mm512_storeu_si512(q[t], _mm512_permutex2var_epi16(lo, order[0], hi));
    _mm512_storeu_si512(q[t] + 32, _mm512_permutex2var_epi16(lo, order[1], hi));
  }
  wane_transpose16(q[0], sizeof q[0], panel, TILE_N * 4);
  wane_transpose16(q[0] + 32, sizeof q[0], panel + 16 * TILE_N * 4, TILE_N * 4);
}

static void pack(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int16_t index[BLOCK];
  int64_t lo, hi;
  if (!usable(&a, &w)) { avx512_pack(op, chunk); return; }
  for (int i = 0; i < BLOCK; i++) index[i] = (int16_t)element(i);
  const __m512i order[2] = { _mm512_loadu_si512(index), _mm512_loadu_si512(index + 32) };
  wane_op_range(op, chunk, a.M, TILE_N, &lo, &hi);
  for (int64_t m = lo; m < hi; m += TILE_N) {
    char *panel = (char *)a.work + m / TILE_N * panel_bytes(a.K);
    float *scale = (float *)(void *)(panel + a.K * TILE_N * 2);
    for (int64_t k = 0; k < a.K; k += BLOCK, scale += TILE_N)
      for (int half = 0; half < TILE_N; half += 16) pack_block(&a, m + half, k, order, panel + k * TILE_N * 2 + half * 4, scale + half);
  }
}

/* Values [k, k + step) of row n as int16 in decoded order. */
static void decode_row(const wane_qview *w, __m512i levels, int64_t n, int64_t k, int64_t step, int16_t *out) {
  const uint8_t *q = (const uint8_t *)w->codes + (n * w->cols + k) / 2;
  for (int64_t i = 0; i < step; i += 2 * BLOCK, q += 64, out += 2 * BLOCK) {
    int whole = step - i >= 2 * BLOCK;
    __m256i first = _mm256_loadu_si256((const __m256i *)(const void *)q);
    __m512i v = whole ? _mm512_loadu_si512(q) : _mm512_inserti64x4(_mm512_setzero_si512(), first, 0);
    _mm_prefetch((const char *)q + w->cols * 8, _MM_HINT_T1);               /* this place, 16 rows on */
#pragma GCC unroll 4
    for (int n4 = 0; n4 < 4; n4++) {
      __m512i l = _mm512_permutexvar_epi16(n4 ? _mm512_srli_epi16(v, (unsigned)(4 * n4)) : v, levels);
      _mm256_store_si256((__m256i *)(void *)(out + 16 * n4), _mm512_castsi512_si256(l));
      if (whole) _mm256_store_si256((__m256i *)(void *)(out + BLOCK + 16 * n4), _mm512_extracti64x4_epi64(l, 1));
    }
  }
}

/* acc + products of pairs of words. gcc 12 keeps none of many accumulators in registers through the intrinsic. */
WANE_INLINE __m512i dot2(__m512i acc, __m512i a, __m512i b) {
#ifdef WANE_EMULATE
  return _mm512_dpwssd_epi32(acc, a, b);
#else
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
#endif
}

/* c [12][32] += twelve decoded rows (STEP apart) with their scales (STEP / 64 apart) times a panel's blocks. */
static void multiply_tile(const int16_t *rows, const float *scale, const char *x, const float *xscale, int64_t blocks, float *c) {
  for (int64_t b = 0; b < blocks; b++, rows += BLOCK, xscale += TILE_N) {
    __m512i s[TILE_M][2];
#pragma GCC unroll 12
    for (int i = 0; i < TILE_M; i++) s[i][0] = s[i][1] = _mm512_setzero_si512();
    for (int p = 0; p < BLOCK / 2; p++, x += 128) {
      __m512i x0 = _mm512_loadu_si512(x), x1 = _mm512_loadu_si512(x + 64);
#pragma GCC unroll 12
      for (int i = 0; i < TILE_M; i++) {
        int32_t pair;
        memcpy(&pair, rows + i * STEP + 2 * p, 4);
        __m512i v = _mm512_set1_epi32(pair);
        s[i][0] = dot2(s[i][0], v, x0);
        s[i][1] = dot2(s[i][1], v, x1);
      }
    }
    __m512 xs0 = _mm512_loadu_ps(xscale), xs1 = _mm512_loadu_ps(xscale + 16);
#pragma GCC unroll 12
    for (int i = 0; i < TILE_M; i++) {
      __m512 v = _mm512_set1_ps(scale[i * (STEP / BLOCK) + b]);
      float *to = c + i * TILE_N;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[i][0]), _mm512_mul_ps(v, xs0), _mm512_loadu_ps(to)));
      _mm512_storeu_ps(to + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[i][1]), _mm512_mul_ps(v, xs1), _mm512_loadu_ps(to + 16)));
    }
  }
}

/* Rows [n, n + count) of W, count <= BLOCK_ROWS, against all tokens. */
static void many_block(const wane_linear_args *a, const wane_qview *w, __m512i levels, int64_t n, int64_t count) {
  enum { STEPS = STEP / BLOCK };
  int64_t groups = (count + TILE_M - 1) / TILE_M, panels = (a->M + TILE_N - 1) / TILE_N;
  int16_t *rows = wane_scratch();                                 // [count][STEP]
  float *scale = (float *)(void *)(rows + BLOCK_ROWS * STEP);     // [count][STEP / 64]
  float *c = scale + BLOCK_ROWS * STEPS;                          // [panels][groups][12][32]
  float *expanded = c + WANE_LINEAR_SLICE * BLOCK_ROWS;
  memset(c, 0, (size_t)(panels * groups * TILE) * 4);
  for (int64_t k = 0; k < a->K; k += STEP) {
    int64_t step = a->K - k < STEP ? a->K - k : STEP;
    for (int64_t i = 0; i < count; i++) {
      decode_row(w, levels, n + i, k, step, rows + i * STEP);
      memcpy(scale + i * STEPS, avx512_row_scales(w, n + i, 0, expanded) + k / BLOCK, (size_t)(step / BLOCK) * 4);
    }
    for (int64_t p = 0; p < panels; p++) {
      const char *panel = (const char *)a->work + p * panel_bytes(a->K);
      const float *xscale = (const float *)(const void *)(panel + a->K * TILE_N * 2) + k / BLOCK * TILE_N;
      for (int64_t g = 0; g < groups; g++)
        multiply_tile(rows + g * TILE_M * STEP, scale + g * TILE_M * STEPS, panel + k * TILE_N * 2, xscale, step / BLOCK, c + (p * groups + g) * TILE);
    }
  }
  for (int64_t p = 0; p < panels; p++) {
    int64_t m = p * TILE_N;
    avx512_write_panel(a, c + p * groups * TILE, m, a->M - m < TILE_N ? a->M - m : TILE_N, n, count);
  }
}

static void many(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int16_t levels[32];
  int64_t lo, hi;
  if (!usable(&a, &w)) { avx512_many(op, chunk); return; }
  for (int i = 0; i < 32; i++) levels[i] = (int16_t)lrintf((w.dtype == WANE_NF4 ? wane_nf4_levels : wane_fp4_levels)[i % 16] * LEVEL_MAX);
  wane_op_range(op, chunk, a.N, TILE_M, &lo, &hi);
  for (int64_t n = lo; n < hi; n += BLOCK_ROWS) many_block(&a, &w, _mm512_loadu_si512(levels), n, hi - n < BLOCK_ROWS ? hi - n : BLOCK_ROWS);
}

void avx512_register_many16(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PACK + WANE_GROUP_4BIT] = pack;
  b->ops[WANE_OP_LINEAR_MANY + WANE_GROUP_4BIT] = many;
}
