/* avx512_block8.c: few rows of x times blockwise 8-bit weights with AVX-512 VBMI, for every compute mode but f32.
 *
 * The stored map, rounded to bf16, is two byte planes of 256 entries, and 256 bytes are four registers: vpermb looks 64 codes up at
 * once in one of them, the top two bits of each code pick the register (a mask each), so any map costs the same and none is assumed.
 * The planes interleaved are bf16 pairs; shifted or masked they are f32 and meet f32 x, which is therefore stored in that order:
 * products are exact in f32's 24 bits, the one rounding is the level's, half of what bf16 x bf16 does.
 * 64 weights: 8 vpermb, 2 unpacks on port 5; 2 shifts, 2 ands, 4 FMA and the masks elsewhere: 11 cycles.
 * Rows that are no whole number of 64 values, blocks that are none, and f32 compute stay with avx2_block8.c. */
#include "avx512_linear.h"
#include "rows8.h"
#include "../x86/simd.h"

enum { CHUNK = 64, AHEAD = 4096 };

static int taken(const wane_linear_args *a, const wane_qview *w) {
  return a->compute != WANE_COMPUTE_F32 && w->cols % CHUNK == 0 && w->cols > 0 && w->block_size % CHUNK == 0;
}

/* Workspace: x f32 [M][K], then the planes u8 [2][256]: low bytes, high bytes. */
static uint8_t *planes_of(const wane_linear_args *a) { return (uint8_t *)a->work + a->M * a->K * 4; }

/* 64 values of x to the order in which the codes fall out: of each 16 the even ones of the first 8, the odd ones, then the others'. */
static void order_chunk(const void *x, int dtype, int64_t at, float *out) {
  float in[CHUNK];
  for (int i = 0; i < CHUNK; i += 8) _mm256_storeu_ps(in + i, avx2_load(x, dtype, at + i));
  for (int lane = 0; lane < 4; lane++)
    for (int i = 0; i < 4; i++)
      for (int part = 0; part < 4; part++) out[16 * part + 4 * lane + i] = in[16 * lane + 8 * (part / 2) + 2 * i + part % 2];
}

static void prepare(const wane_op *op, uint32_t chunk) {
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  if (!taken(&a, &w)) { wane_block8_prepare_avx2(op, chunk); return; }
  uint8_t *planes = planes_of(&a);
  for (int c = 0; chunk == 0 && c < 256; c++) {
    uint16_t level = wane_f32_to_bf16(w.code[c]);
    planes[c] = (uint8_t)level;
    planes[256 + c] = (uint8_t)(level >> 8);
  }
  wane_op_range(op, chunk, a.M, 1, &lo, &hi);
  for (int64_t k = lo * a.K; k < hi * a.K; k += CHUNK) order_chunk(a.x, a.dtype, k, (float *)a.work + k);
}

/* ---------------------------------------------------------------- products */

typedef struct planes { __m512i low[4], high[4]; } planes;

/* The bytes of one plane for 64 codes. `second`, `third`: codes whose bit 6, bit 7 is set. */
WANE_INLINE __m512i look_up(const __m512i *plane, __m512i codes, __mmask64 second, __mmask64 third) {
  __m512i v = _mm512_permutexvar_epi8(codes, plane[0]);
  v = _mm512_mask_permutexvar_epi8(v, second, codes, plane[1]);
  v = _mm512_mask_permutexvar_epi8(v, third, codes, plane[2]);
  return _mm512_mask_permutexvar_epi8(v, second & third, codes, plane[3]);
}

/* 64 weights as f32, in order_chunk's order. */
WANE_INLINE void decode(const uint8_t *q, const planes *p, __m512 *w) {
  const __m512i top = _mm512_set1_epi32((int)0xffff0000);
  __m512i codes = _mm512_loadu_si512(q);
  __mmask64 second = _mm512_movepi8_mask(_mm512_add_epi8(codes, codes)), third = _mm512_movepi8_mask(codes);
  __m512i low = look_up(p->low, codes, second, third), high = look_up(p->high, codes, second, third);
  __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
  w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
  w[1] = _mm512_castsi512_ps(_mm512_and_si512(a, top));
  w[2] = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
  w[3] = _mm512_castsi512_ps(_mm512_and_si512(b, top));
}

/* Rows [lo, hi) of W against R rows of x from m on. R is a constant. */
WANE_INLINE void block(const wane_linear_args *a, const wane_qview *w, int64_t lo, int64_t hi, int64_t m, const int R) {
  const uint8_t *bytes = planes_of(a);
  const float *absmax = w->absmax;
  int64_t chunks = a->K / CHUNK, per = w->block_size / CHUNK;
  planes p;
  for (int i = 0; i < 4; i++) p.low[i] = _mm512_loadu_si512(bytes + 64 * i), p.high[i] = _mm512_loadu_si512(bytes + 256 + 64 * i);
  for (int64_t n = lo; n < hi; n++) {
    const uint8_t *q = (const uint8_t *)w->codes + n * a->K;
    __m512 sum[4];
    for (int i = 0; i < R; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t j = 0; j < chunks;) {
      int64_t at = n * chunks + j, end = j + (per - at % per < chunks - j ? per - at % per : chunks - j);
      __m512 scale = _mm512_set1_ps(absmax[at / per]), even[4], odd[4];
      for (int i = 0; i < R; i++) even[i] = odd[i] = _mm512_setzero_ps();
      for (; j < end; j++, q += CHUNK) {
        __m512 v[4];
        _mm_prefetch((const char *)q + AHEAD, _MM_HINT_T0);
        decode(q, &p, v);
        for (int i = 0; i < R; i++) {
          const float *x = (const float *)a->work + (m + i) * a->K + CHUNK * j;
          even[i] = _mm512_fmadd_ps(v[0], _mm512_loadu_ps(x), even[i]);
          odd[i] = _mm512_fmadd_ps(v[1], _mm512_loadu_ps(x + 16), odd[i]);
          even[i] = _mm512_fmadd_ps(v[2], _mm512_loadu_ps(x + 32), even[i]);
          odd[i] = _mm512_fmadd_ps(v[3], _mm512_loadu_ps(x + 48), odd[i]);
        }
      }
      for (int i = 0; i < R; i++) sum[i] = _mm512_fmadd_ps(_mm512_add_ps(even[i], odd[i]), scale, sum[i]);
    }
    for (int i = 0; i < R; i++) wane_float_put(a->y, a->dtype, (m + i) * a->N + n, avx512_sum(sum[i]) + wane_linear_bias(a, n));
  }
}

/* All rows of x, four at a time, against a block of W's rows that stays in the cache meanwhile. */
static void product(const wane_op *op, uint32_t chunk) {
  enum { CACHED = 32 << 10 };
  wane_linear_args a = wane_linear_load(op);
  wane_qview w = wane_qview_load(op);
  int64_t lo, hi;
  if (!taken(&a, &w)) { wane_block8_product_avx2(op, chunk); return; }
  wane_op_range(op, chunk, a.N, 1, &lo, &hi);
  int64_t step = a.M <= 4 ? hi - lo : CACHED / a.K + 1;
  for (int64_t n = lo; n < hi; n += step) {
    int64_t end = hi - n < step ? hi : n + step, m = 0;
    for (; m + 4 <= a.M; m += 4) block(&a, &w, n, end, m, 4);
    switch (a.M - m) {
      case 3: block(&a, &w, n, end, m, 3); break;
      case 2: block(&a, &w, n, end, m, 2); break;
      case 1: block(&a, &w, n, end, m, 1); break;
      default: break;
    }
  }
}

void wane_block8_register_avx512(wane_backend *b) {
  b->ops[WANE_OP_LINEAR_PREPARE + WANE_GROUP_BLOCK8] = prepare;
  b->ops[WANE_OP_LINEAR_ROWS + WANE_GROUP_BLOCK8] = product;
}
