/* convert.c: copies, casts and quantizes the chunks of a load, on the compute workers.
 *
 * A chunk is a range of values of the flat tensor that begins and ends where a quantization block, a source block and (where rows
 * are rearranged) a head do. So chunks are independent of each other and the result equals quantizing the whole tensor at once. */
#include "convert.h"
#include "../base/float16.h"
#include <string.h>

enum { SCRATCH_VALUES = 64 << 10, SCRATCH_MOST = WANE_SCRATCH / 4 };

static int64_t gcd(int64_t a, int64_t b) { while (b) { int64_t r = a % b; a = b; b = r; } return a; }

/* Least common multiple; -1 on overflow. */
static int64_t lcm(int64_t a, int64_t b) {
  int64_t r;
  return a < 1 || b < 1 || __builtin_mul_overflow(a / gcd(a, b), b, &r) ? -1 : r;
}

static int is_quantized(int dtype) { return dtype >= WANE_NF4 && dtype <= WANE_BLOCK8U; }

/* Are the values of a chunk in another order than in the result? (QKV only moves whole runs of rows: reading puts them right.) */
static int shuffled(const wane_conversion *c) { return c->arrange == WANE_ARRANGE_ROPE || c->arrange == WANE_ARRANGE_TRANSPOSE; }

int wane_conversion_is_copy(const wane_conversion *c) { return c->to.dtype == c->source && !shuffled(c); }

/* Values of a head's rows. */
static int64_t head_values(const wane_conversion *c) { return c->to.shape[0] / c->heads * (c->to.n / c->to.shape[0]); }

/* Heads that QKV's rows are made of: query heads, and a key and a value for each group of them. */
static int64_t all_heads(const wane_conversion *c) { return (int64_t)c->heads + 2 * (int64_t)c->kv_heads; }

static int check_arrange(const wane_conversion *c, const char *name) {
  int qkv = c->arrange == WANE_ARRANGE_QKV;
  if (c->arrange < 0 || c->arrange > WANE_ARRANGE_TRANSPOSE) return wane_fail(WANE_E_ARG, "tensor '%s': arrangement %d does not exist", name, c->arrange);
  if (c->arrange == WANE_ARRANGE_TRANSPOSE) {
    if (c->to.ndim == 2 && wane_is_float(c->source)) return WANE_OK;
    return wane_fail(WANE_E_SHAPE, "tensor '%s' cannot be transposed while it is loaded: a float matrix was expected, found %d dimension(s) of %s",
                     name, c->to.ndim, wane_dtype_name(c->source));
  }
  if (c->heads < 1 || (qkv && (c->kv_heads < 1 || c->heads % c->kv_heads)) || c->to.ndim < 1 || c->to.ndim > 2 ||
      c->to.shape[0] % (qkv ? all_heads(c) : 2 * (int64_t)c->heads))
    return wane_fail(WANE_E_SHAPE, "tensor '%s': %lld rows cannot be %d heads of %s", name, (long long)(c->to.ndim ? c->to.shape[0] : 0), c->heads,
                     qkv ? "q, k and v" : "pairs");
  return WANE_OK;
}

int wane_conversion_plan(wane_conversion *c, const char *name) {
  const wane_layout *to = &c->to;
  if (c->arrange) { int status = check_arrange(c, name); if (status != WANE_OK) return status; }
  int same = to->dtype == c->source;
  if (wane_is_stored(to->dtype)) return wane_fail(WANE_E_DTYPE, "tensor '%s': no tensor holds %s: load it as f32", name, wane_dtype_name(to->dtype));
  if (!same && !wane_is_float(c->source) && !wane_gguf_block(c->source) && !wane_is_stored(c->source))
    return wane_fail(WANE_E_DTYPE, "tensor '%s' holds %s: only float and GGUF values can become %s", name, wane_dtype_name(c->source), wane_dtype_name(to->dtype));
  if (!same && !wane_is_float(to->dtype) && !is_quantized(to->dtype) && !(to->dtype == WANE_I32 && c->source == WANE_I16))
    return wane_fail(WANE_E_DTYPE, "tensor '%s' cannot become %s while it is loaded", name, wane_dtype_name(to->dtype));
  int64_t block = wane_gguf_block(c->source) ? wane_gguf_block(c->source) : 1;
  c->grain = lcm(block, is_quantized(to->dtype) && to->n ? wane_quant_grain(to->dtype, to->block_size, to->cols) : 1);
  if (same && c->arrange && to->n) c->grain = to->n / to->shape[0];
  c->unit = c->grain;
  if (shuffled(c) && to->n) c->unit = lcm(c->grain, c->arrange == WANE_ARRANGE_ROPE ? head_values(c) : to->cols);
  if (c->grain < 1 || c->unit < 1) return wane_fail(WANE_E_SHAPE, "tensor '%s': block size %d does not fit its shape", name, to->block_size);
  /* plain float rows are quantized from the chunk itself, everything else passes through a worker's scratch */
  if (!same && c->grain > SCRATCH_MOST && (!wane_is_float(c->source) || shuffled(c)))
    return wane_fail(WANE_E_UNSUPPORTED, "tensor '%s': blocks of %lld values are too large to be quantized while loading", name, (long long)c->grain);
  return WANE_OK;
}

/* ---------------------------------------------------------------- rearranged rows */

/* The file's row that holds row r: GGUF's converter wrote q, k and v of all heads one after another (QKV; the model has them group by
 * group: the query heads that share a key and a value, the key, the value), and turned the two halves of each head into adjacent pairs
 * (ROPE). Source: llama.cpp conversion/gptneox.py, falcon.py, llama.py. */
static int64_t source_row(const wane_conversion *c, int64_t r) {
  if (c->arrange == WANE_ARRANGE_ROPE) {
    int64_t per_head = c->to.shape[0] / c->heads, head = r / per_head, within = r % per_head, half = per_head / 2;
    return head * per_head + within % half * 2 + within / half;
  }
  int64_t size = c->to.shape[0] / all_heads(c), shared = c->heads / c->kv_heads, head = r / size, group = head / (shared + 2), slot = head % (shared + 2);
  int64_t from = slot < shared ? group * shared + slot : c->heads + (slot - shared) * c->kv_heads + group;
  return from * size + r % size;
}

uint64_t wane_conversion_place(const wane_conversion *c, uint64_t at, uint64_t *run) {
  uint64_t bytes = (uint64_t)wane_dtype_bytes(c->source, c->to.n);
  if (c->arrange != WANE_ARRANGE_QKV) { *run = bytes - at; return at; }
  uint64_t rows = (uint64_t)c->to.shape[0], row_bytes = bytes / rows, size = rows / (uint64_t)all_heads(c), row = at / row_bytes;
  *run = (size - row % size) * row_bytes - at % row_bytes;
  return (uint64_t)source_row(c, (int64_t)row) * row_bytes + at % row_bytes;
}

/* ---------------------------------------------------------------- values of a chunk */

typedef struct span { const wane_conversion *c; const char *bytes; int64_t first, count; } span;   /* the chunk: its bytes, first value, values */

/* Values [at, at + count) of one row, read down a column of the chunk's tile [cols, rows of the chunk] (TRANSPOSE). */
static void fetch_column(const span *s, int64_t at, int64_t count, float *out) {
  const wane_conversion *c = s->c;
  int64_t cols = c->to.cols, width = s->count / cols, from = at % cols * width + at / cols - s->first / cols;
  if (c->source == WANE_F32) {
    const float *x = (const float *)(const void *)s->bytes + from;
    for (int64_t i = 0; i < count; i++) out[i] = x[i * width];
    return;
  }
  const uint16_t *x = (const uint16_t *)(const void *)s->bytes + from;
  if (c->source == WANE_F16) for (int64_t i = 0; i < count; i++) out[i] = wane_f16_to_f32(x[i * width]);
  else for (int64_t i = 0; i < count; i++) out[i] = wane_bf16_to_f32(x[i * width]);
}

/* Values [first, first + count) of the bytes as f32: f64 rounded once, i16 exactly. */
static void widen(const wane_conversion *c, const char *bytes, int64_t first, int64_t count, float *out) {
  if (c->source == WANE_F64) for (int64_t i = 0; i < count; i++) { double x; memcpy(&x, bytes + (first + i) * 8, 8); out[i] = (float)x; }
  else if (c->source == WANE_I16) for (int64_t i = 0; i < count; i++) { int16_t x; memcpy(&x, bytes + (first + i) * 2, 2); out[i] = (float)x; }
  else {
    wane_qview q = { .dtype = c->source, .rows = c->to.rows, .cols = c->to.cols, .codes = bytes };
    wane_dequantize_range(&q, first, count, out);
  }
}

/* Values [at, at + count) of the tensor, which lie in the chunk, as f32. */
static void fetch(const span *s, int64_t at, int64_t count, float *out) {
  const wane_conversion *c = s->c;
  if (!shuffled(c)) { widen(c, s->bytes, at - s->first, count, out); return; }
  int64_t width = c->to.n / c->to.shape[0];
  while (count) {
    int64_t row = at / width, within = at % width, n = width - within < count ? width - within : count;
    if (c->arrange == WANE_ARRANGE_TRANSPOSE) fetch_column(s, at, n, out);
    else widen(c, s->bytes, source_row(c, row) * width + within - s->first, n, out);
    at += n; out += n; count -= n;
  }
}

/* Rows of a head put back in place, as they are. */
static void copy_rows(const span *s, int64_t at, int64_t count) {
  const wane_conversion *c = s->c;
  int64_t width = c->to.n / c->to.shape[0], row_bytes = wane_dtype_bytes(c->source, width), first = s->first / width;
  for (int64_t r = at / width; r < (at + count) / width; r++)
    memcpy(c->base + r * row_bytes, s->bytes + (source_row(c, r) - first) * row_bytes, (size_t)row_bytes);
}

static void narrow(const float *x, int64_t count, int dtype, char *out) {
  if (dtype == WANE_F16) for (int64_t i = 0; i < count; i++) { uint16_t h = wane_f32_to_f16(x[i]); memcpy(out + i * 2, &h, 2); }
  else for (int64_t i = 0; i < count; i++) { uint16_t h = wane_f32_to_bf16(x[i]); memcpy(out + i * 2, &h, 2); }
}

/* Converts values [at, at + count): whole grains, unless the tensor ends. */
static void convert(const span *s, int64_t at, int64_t count) {
  const wane_conversion *c = s->c;
  const wane_layout *to = &c->to;
  if (to->dtype == c->source && c->arrange != WANE_ARRANGE_TRANSPOSE) { copy_rows(s, at, count); return; }
  if (to->dtype == WANE_F32) { fetch(s, at, count, (float *)(void *)c->base + at); return; }
  if (is_quantized(to->dtype) && wane_is_float(c->source) && !shuffled(c)) {
    const char *x = s->bytes + (at - s->first) * wane_size_of(c->source);
    wane_quantize_range(to->dtype, x, c->source, at, count, to->cols, to->block_size, c->base, c->scales);
    return;
  }
  float *values = wane_scratch();
  int64_t piece = c->grain < SCRATCH_VALUES ? SCRATCH_VALUES / c->grain * c->grain : c->grain;
  for (int64_t end = at + count; at < end; at += piece) {
    int64_t n = end - at < piece ? end - at : piece;
    fetch(s, at, n, values);
    if (is_quantized(to->dtype)) wane_quantize_range(to->dtype, values, WANE_F32, at, n, to->cols, to->block_size, c->base, c->scales);
    else if (to->dtype == WANE_I32) for (int64_t i = 0; i < n; i++) ((int32_t *)(void *)c->base)[at + i] = (int32_t)values[i];
    else narrow(values, n, to->dtype, c->base + at * 2);
  }
}

/* ---------------------------------------------------------------- kernels */

void wane_conversion_chunk(const wane_op *op, uint32_t chunk) {
  span s = { op->p[0], op->p[1], op->n[0], op->n[1] };
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[1], s.c->grain, &lo, &hi);
  if (hi > lo) convert(&s, op->n[0] + lo, hi - lo);
}

void wane_conversion_nest(const wane_op *op, uint32_t chunk) {
  (void)chunk;
  const wane_conversion *c = op->p[0];
  const wane_layout *to = &c->to;
  wane_quantize_nested(c->scales, to->scales, (uint8_t *)c->base + to->at[WANE_PART_ABSMAX], (float *)(void *)(c->base + to->at[WANE_PART_NESTED_ABSMAX]),
                       (float *)(void *)(c->base + to->at[WANE_PART_NESTED_CODE]), (float *)(void *)(c->base + to->at[WANE_PART_OFFSET]));
}
