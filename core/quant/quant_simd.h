/* quant_simd.h: the vector twins of quant_reference.c, written once. avx2_quant.c and avx512_quant.c define WANE_VEC and the few
 * primitives below it that vec.h lacks, include this, and get a wane_quant_kit of the same name.
 *
 * Work goes by units of 32 values (16 bytes of 4-bit codes). A short end is copied into a padded unit, whose surplus is not
 * stored: padding is zeros, and the code of 0 is what the format pads odd lengths with. Blocks that are void or tiny, and odd
 * block sizes in 4 bit, are rare and go to the scalar reference.
 *
 * Primitives (v: an array of UNIT / VW vectors; table: f32 [16], [256] or u32):
 *   vi  quant_bytes(p, k)        bytes p[k * VW ..] as integers
 *   void quant_put(p, v)         the low byte of each of 32 integers
 *   vf  quant_level(levels, i)   levels[the low four bits of i], levels a quant_levels
 *   vi  quant_nibbles(p, k)      codes k * VW .. of packed pairs at p, with other bits above the low four
 *   vf  quant_step(table, i)     table[i], i in 0..7 (a step of the search), table a vf
 *   vi  quant_mask(m)            -1 where the truth value holds
 *   vf  quant_mapped(map, i)     map[i], i in 0..255, map a quant_map
 *   vi  quant_gather_int(table, i)
 *   vi  vi_umax(a, b), uint32_t vi_hmax(v) unsigned maximum, a lane and over all lanes */
#include "kernels.h"
#include "tables.h"

enum { UNIT = 32, PARTS = UNIT / VW };

#include "gguf_simd.h"

#define EACH(k) for (int k = 0; k < PARTS; k++)

/* ---- units ---- */

/* 32 codes -> 16 bytes, the earlier of a pair in the high nibble. */
VEC void pack_nibbles(uint8_t *p, const uint8_t *code) {
  __m256i pair = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)code), _mm256_set1_epi16(0x0110)); /* first * 16 + second */
  pair = _mm256_permute4x64_epi64(_mm256_packus_epi16(pair, pair), 0x08);
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(pair));
}

/* Copies a short end into a unit of f32 followed by zeros. */
VEC void padded(float unit[UNIT], const void *x, int dtype, int64_t i, int64_t n) {
  memset(unit, 0, UNIT * sizeof(float));
  for (int64_t j = 0; j < n; j += VW) vf_store(unit + j, vf_get_n(x, dtype, i + j, vec_left(j, n)));
}

/* max|x| as a bit pattern, as in quant_reference.c. */
VEC float absmax_of(const void *x, int dtype, int64_t i, int64_t n) {
  vi most[2] = { vi_set1(0), vi_set1(0) }, mask = vi_set1(0x7fffffff);
  int64_t j = 0;
  for (; j + 2 * VW <= n; j += 2 * VW)
    for (int k = 0; k < 2; k++) most[k] = vi_umax(most[k], vi_and(vi_bits(vf_get(x, dtype, i + j + k * VW)), mask));
  for (; j < n; j += VW) most[0] = vi_umax(most[0], vi_and(vi_bits(vf_get_n(x, dtype, i + j, vec_left(j, n))), mask));
  return wane_bits_float(vi_hmax(vi_umax(most[0], most[1])));
}

/* ---- 4-bit ---- */

/* A binary search over thresholds sorted by rank: each level's are looked up by the bits found so far. */
typedef struct search { vf root, level[3]; } search;

VEC search search_nf4(void) {
  const float *t = wane_nf4_thresholds;
  float pair[16] = { t[3], t[11] }, four[16] = { t[1], t[5], t[9], t[13] }, eight[16];
  for (int k = 0; k < 8; k++) eight[k] = t[2 * k];
  search s = { vf_set1(t[7]), { vf_load(pair), vf_load(four), vf_load(eight) } };
  return s;
}
VEC search search_fp4(void) {
  const float *t = wane_fp4_thresholds;
  float pair[16] = { t[1], t[5] }, four[16] = { t[0], t[2], t[4], t[6] };
  search s = { vf_set1(t[3]), { vf_load(pair), vf_load(four), vf_zero() } };
  return s;
}
/* How many thresholds s exceeds. */
VEC vi search_rank(const search *t, vf s, int steps) {
  vi rank = vi_sub(vi_set1(0), quant_mask(vf_lt(t->root, s)));
  for (int k = 0; k < steps; k++)
    rank = vi_sub(vi_add(rank, rank), quant_mask(vf_lt(quant_step(t->level[k], rank), s)));
  return rank;
}

VEC void code_4bit(int kind, const search *t, quant_levels order, vf inverse, const void *x, int dtype, int64_t i, uint8_t *out) {
  vi code[PARTS];
  uint8_t byte[UNIT];
  EACH(k) {
    vf s = vf_mul(vf_get(x, dtype, i + k * VW), inverse);
    if (kind == WANE_NF4) {
      code[k] = search_rank(t, s, 3);
    } else {
      vi sign = vi_and(quant_mask(vf_lt(s, vf_zero())), vi_set1(8));
      code[k] = vi_or(vi_bits(quant_level(order, search_rank(t, vf_abs(s), 2))), sign);
    }
  }
  quant_put(byte, code);
  pack_nibbles(out, byte);
}

/* One dtype of one kind; both are constants in every call. */
VEC void blocks_4bit(int kind, const void *x, int dtype, int64_t first, int64_t count, int bs, uint8_t *codes, float *absmax) {
  search t = kind == WANE_NF4 ? search_nf4() : search_fp4();
  int32_t ranks[16] = { 0 };
  for (int k = 0; k < 8; k++) ranks[k] = wane_fp4_order[k];
  quant_levels order = quant_levels_of((const float *)ranks);
  for (int64_t begin = 0; begin < count; begin += bs) {
    int64_t n = count - begin < bs ? count - begin : bs, j = 0;
    float inverse, unit[UNIT], most = absmax_of(x, dtype, begin, n);
    uint8_t *out = codes + (first + begin) / 2, end[UNIT / 2];
    if (wane_block_mode(most, &inverse) != WANE_BLOCK_USUAL) {
      const char *at = (const char *)x + begin * (dtype == WANE_F32 ? 4 : 2);
      wane_quant_generic.quantize_4bit(kind, at, dtype, first + begin, n, bs, codes, absmax);
      continue;
    }
    absmax[(first + begin) / bs] = most;
    for (; j + UNIT <= n; j += UNIT) code_4bit(kind, &t, order, vf_set1(inverse), x, dtype, begin + j, out + j / 2);
    if (j < n) {
      padded(unit, x, dtype, begin + j, n - j);
      code_4bit(kind, &t, order, vf_set1(inverse), unit, WANE_F32, 0, end);
      memcpy(out + j / 2, end, (size_t)(n - j + 1) / 2);
    }
  }
}

static void quantize_4bit(int kind, const void *x, int dtype, int64_t first, int64_t count, int bs, uint8_t *codes, float *absmax) {
  if (bs % 2) wane_quant_generic.quantize_4bit(kind, x, dtype, first, count, bs, codes, absmax);
#define CASE(K, D) else if (kind == K && dtype == D) blocks_4bit(K, x, D, first, count, bs, codes, absmax);
  CASE(WANE_NF4, WANE_F32) CASE(WANE_NF4, WANE_F16) CASE(WANE_NF4, WANE_BF16)
  CASE(WANE_FP4, WANE_F32) CASE(WANE_FP4, WANE_F16) CASE(WANE_FP4, WANE_BF16)
#undef CASE
}

/* ---- blockwise 8-bit ---- */

/* Nearest codes of a unit by buckets (tables.h). */
VEC void code_8bit(const wane_buckets *b, vf inverse, const void *x, int dtype, int64_t i, uint8_t *out) {
  vi code[PARTS], below = vi_set1(WANE_BUCKET_FIRST - 1), low16 = vi_set1(0xffff);
  EACH(k) {
    vi bits = vi_bits(vf_mul(vf_get(x, dtype, i + k * VW), inverse)), outward = vi_sra(vi_xor(bits, vi_set1(-1)), 31);
    vi magnitude = vi_and(bits, vi_set1(0x7fffffff));
    vi bucket = vi_sub(vi_umax(vi_srl(magnitude, 16), below), below);
    bucket = vi_add(bucket, vi_and(vi_sra(bits, 31), vi_set1(WANE_BUCKETS)));
    vi entry = quant_gather_int(b->entry[0], bucket);
    vi beyond = vi_sra(vi_sub(vi_and(entry, low16), vi_and(magnitude, low16)), 31);   /* -1: past the boundary */
    vi step = vi_sub(vi_xor(beyond, outward), outward);                               /* +1 for s >= 0, -1 below */
    code[k] = vi_add(vi_srl(entry, 24), step);
  }
  quant_put(out, code);
}

VEC void blocks_8bit(int kind, const void *x, int dtype, int64_t first, int64_t count, int bs, uint8_t *codes, float *absmax) {
  const wane_buckets *b = &wane_quant_buckets[kind == WANE_BLOCK8];
  for (int64_t begin = 0; begin < count; begin += bs) {
    int64_t n = count - begin < bs ? count - begin : bs, j = 0;
    float inverse, unit[UNIT], most = absmax_of(x, dtype, begin, n);
    uint8_t *out = codes + first + begin, end[UNIT];
    if (wane_block_mode(most, &inverse) != WANE_BLOCK_USUAL) {
      const char *at = (const char *)x + begin * (dtype == WANE_F32 ? 4 : 2);
      wane_quant_generic.quantize_8bit(kind, at, dtype, first + begin, n, bs, codes, absmax);
      continue;
    }
    absmax[(first + begin) / bs] = most;
    for (; j + UNIT <= n; j += UNIT) code_8bit(b, vf_set1(inverse), x, dtype, begin + j, out + j);
    if (j < n) {
      padded(unit, x, dtype, begin + j, n - j);
      code_8bit(b, vf_set1(inverse), unit, WANE_F32, 0, end);
      memcpy(out + j, end, (size_t)(n - j));
    }
  }
}

static void quantize_8bit(int kind, const void *x, int dtype, int64_t first, int64_t count, int bs, uint8_t *codes, float *absmax) {
  if (dtype == WANE_F32) blocks_8bit(kind, x, WANE_F32, first, count, bs, codes, absmax);
  else if (dtype == WANE_F16) blocks_8bit(kind, x, WANE_F16, first, count, bs, codes, absmax);
  else blocks_8bit(kind, x, WANE_BF16, first, count, bs, codes, absmax);
}

/* ---- row-wise int8 ---- */

/* Rounded to f16 and back. */
VEC vf through_f16(vf v) {
  uint16_t h[VW];
  vf_to_f16(h, v);
  return vf_from_f16(h);
}

VEC void rows_of(const void *x, int dtype, int64_t rows, int64_t K, int8_t *codes, float *absmax) {
  const vi mask = vi_set1(0x7fffffff);
  for (int64_t r = 0; r < rows; r++) {
    int64_t at = r * K, j = 0;
    vi most = vi_set1(0), code[PARTS];
    for (int64_t k = 0; k < K; k += VW)
      most = vi_umax(most, vi_and(vi_bits(through_f16(vf_get_n(x, dtype, at + k, vec_left(k, K)))), mask));
    float scale = wane_bits_float(vi_hmax(most)), unit[UNIT];
    absmax[r] = scale;
    if (!(scale > 0.0f) || isinf(scale)) {
      memset(codes + at, 0, (size_t)K);
      continue;
    }
    const vf factor = vf_set1(127.0f / scale);
    for (; j + UNIT <= K; j += UNIT) {
      EACH(k) code[k] = vi_from_float(vf_mul(through_f16(vf_get(x, dtype, at + j + k * VW)), factor));
      quant_put((uint8_t *)codes + at + j, code);
    }
    if (j < K) {
      uint8_t end[UNIT];
      padded(unit, x, dtype, at + j, K - j);
      EACH(k) code[k] = vi_from_float(vf_mul(through_f16(vf_load(unit + k * VW)), factor));
      quant_put(end, code);
      memcpy(codes + at + j, end, (size_t)(K - j));
    }
  }
}

static void quantize_rows(const void *x, int dtype, int64_t rows, int64_t K, int8_t *codes, float *absmax) {
  if (dtype == WANE_F32) rows_of(x, WANE_F32, rows, K, codes, absmax);
  else if (dtype == WANE_F16) rows_of(x, WANE_F16, rows, K, codes, absmax);
  else rows_of(x, WANE_BF16, rows, K, codes, absmax);
}

/* ---- dequantize: runs of values that share a scale ---- */

VEC void values_4bit(quant_levels levels, const uint8_t *codes, vf scale, float *out) {
  EACH(k) vf_store(out + k * VW, vf_mul(quant_level(levels, quant_nibbles(codes, k)), scale));
}

/* Elements [e, e + n) of the flat tensor, all of one scale. */
VEC void run_4bit(quant_levels levels, const float *level, const uint8_t *codes, int64_t e, int64_t n, float scale, float *out) {
  int64_t j = 0;
  if (e % 2 && n) out[j++] = level[codes[e / 2] & 15] * scale;
  const uint8_t *from = codes + (e + j) / 2;
  for (; j + UNIT <= n; j += UNIT, from += UNIT / 2) values_4bit(levels, from, vf_set1(scale), out + j);
  if (j < n) {
    uint8_t code[UNIT / 2] = { 0 };
    float unit[UNIT];
    memcpy(code, from, (size_t)(n - j + 1) / 2);
    values_4bit(levels, code, vf_set1(scale), unit);
    memcpy(out + j, unit, (size_t)(n - j) * sizeof(float));
  }
}

VEC void run_8bit(quant_map map, const float *code, const uint8_t *codes, int64_t n, float scale, float *out) {
  int64_t j = 0;
  for (; j + VW <= n; j += VW) vf_store(out + j, vf_mul(quant_mapped(map, quant_bytes(codes + j, 0)), vf_set1(scale)));
  for (; j < n; j++) out[j] = wane_float_at(code, WANE_F32, codes[j]) * scale;
}

/* code * scale / 127 rounded once: the quotient's f32 and what it lacks, joined by one fused multiply-add. No such product is a
 * tie, and its distance from one (2^-33 of it at least) is far above the neglected part. */
static void run_int8(const int8_t *codes, int64_t n, float scale, float *out) {
  const vf high = vf_set1((float)(scale / 127.0)), low = vf_set1((float)(scale / 127.0 - (double)(float)(scale / 127.0)));
  int64_t j = 0;
  for (; j + VW <= n; j += VW) {
    vi byte = quant_bytes((const uint8_t *)codes + j, 0);
    vf code = vf_from_int(vi_sra(vi_sll(byte, 24), 24));
    vf_store(out + j, vf_fma(code, high, vf_mul(code, low)));
  }
  for (; j < n; j++) out[j] = (float)((double)codes[j] * (double)scale / 127.0);
}

VEC void widen(const void *x, const int dtype, int64_t first, int64_t count, float *out) {
  int64_t j = 0;
  for (; j + VW <= count; j += VW) vf_store(out + j, vf_get(x, dtype, first + j));
  if (j < count) vf_put_n(out, WANE_F32, j, vf_get_n(x, dtype, first + j, vec_left(j, count)), vec_left(j, count));
}

/* The blocks of a range, one after the other: block b's elements [e, e + n) with its scale. */
#define BLOCKS(length)                                                                                                    \
  for (int64_t block = (length), b = first / block, e = first, end = first + count, n; e < end; e += n, out += n, b++)    \
    if (n = ((b + 1) * block < end ? (b + 1) * block : end) - e, 1)

static void dequantize_4bit(const wane_qview *q, int64_t first, int64_t count, float *out) {
  const float *level = q->dtype == WANE_NF4 ? wane_nf4_levels : wane_fp4_levels;
  const quant_levels levels = quant_levels_of(level);
  BLOCKS(q->block_size) run_4bit(levels, level, q->codes, e, n, wane_scale_at(q, b), out);
}

static void dequantize_8bit(const wane_qview *q, int64_t first, int64_t count, float *out) {
  const quant_map map = quant_map_of(q->code);
  BLOCKS(q->block_size) run_8bit(map, q->code, (const uint8_t *)q->codes + e, n, wane_scale_at(q, b), out);
}

static void dequantize_rows(const wane_qview *q, int64_t first, int64_t count, float *out) {
  BLOCKS(q->cols) {
    float scale = wane_scale_at(q, b);
    if (scale >= 0x1p-90f && !isinf(scale)) run_int8((const int8_t *)q->codes + e, n, scale, out);
    else wane_quant_generic.dequantize(q, e, n, out); /* a scale that two parts cannot carry, or no row maximum */
  }
}
#undef BLOCKS

static void dequantize(const wane_qview *q, int64_t first, int64_t count, float *out) {
  if (count <= 0) return;
  switch (q->dtype) {
    case WANE_F32: memcpy(out, (const float *)q->codes + first, (size_t)count * 4); break;
    case WANE_F16: widen(q->codes, WANE_F16, first, count, out); break;
    case WANE_BF16: widen(q->codes, WANE_BF16, first, count, out); break;
    case WANE_NF4:
    case WANE_FP4: dequantize_4bit(q, first, count, out); break;
    case WANE_BLOCK8:
    case WANE_BLOCK8U: dequantize_8bit(q, first, count, out); break;
    case WANE_INT8: dequantize_rows(q, first, count, out); break;
    default: gguf_range(q->dtype, q->codes, first, count, out);
  }
}

static void narrow(const float *x, int64_t n, int dtype, void *out) {
  for (int64_t j = 0; j < n; j += VW) {
    int left = vec_left(j, n);
    vf v = vf_get_n(x, WANE_F32, j, left);
    if (dtype == WANE_F16) vf_put_n(out, WANE_F16, j, v, left);
    else vf_put_n(out, WANE_BF16, j, v, left);
  }
}

static const wane_quant_kit kit = { quantize_4bit, quantize_8bit, quantize_rows, dequantize, narrow };

#undef EACH
