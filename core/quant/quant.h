/* quant.h: quantizers as plain functions over raw pointers, for kernels, loaders and products. Internal.
 *
 * Formats and rounding are those of section 6 of wane.h, in bitsandbytes' own bytes (functional.py, csrc/kernels.cu):
 *   4-bit    block b holds elements [b*bs, (b+1)*bs) of the FLAT tensor; absmax = max|x|; s = x * (1/absmax) in f32; a level by
 *            strict > against the thresholds; element 2k in the high nibble; odd n is padded with the code of 0.
 *   BLOCK8   the same blocks and scaling; nearest code of the dynamic map, an exact tie takes the EVEN index.
 *   INT8     rows: x is rounded to f16, absmax = max|x| of the row, code = rint(x * (127/absmax)), half to even.
 * Special blocks: all zero gives the code of 0 and absmax 0. 1/absmax beyond f32 (absmax < 2.94e-39): scaled in double. A block that
 * holds NaN or infinity gives the code of 0 and an absmax that is not finite, so that it dequantizes to NaN instead of hiding it.
 *
 * Every function exists as a scalar reference (quant_reference.c) and per instruction set with identical results; a wane_quant_kit is
 * one such set. Nothing here allocates, fails or keeps state. */
#ifndef WANE_QUANT_H
#define WANE_QUANT_H
#include "../include/wane_backend.h"

enum { WANE_NESTED_BLOCK = 256 };          /* scales a nested absmax */

/* A weight of any dtype as raw pointers: quantized kinds, GGUF kinds, and plain f32, f16, bf16 (codes = the values). */
typedef struct wane_qview {
  int32_t dtype;
  int32_t block_size;                      /* 4-bit and BLOCK8: values a scale */
  int64_t rows, cols;                      /* [N, K]; a vector is [1, n] */
  const void *codes;
  const void *absmax;                      /* f32, or u8 when nested_absmax is set */
  const float *nested_absmax, *nested_code, *offset;
  const float *code;                       /* BLOCK8: the stored map */
} wane_qview;

/* ---- a view inside an op record: pointers 4..9, sizes 10 and 11, integers 14 and 15; the rest is the op's own ---- */
static inline void wane_qview_store(wane_op *op, const wane_qview *q) {
  const void *p[6] = { q->codes, q->absmax, q->nested_absmax, q->nested_code, q->offset, q->code };
  for (int k = 0; k < 6; k++) op->p[4 + k] = (void *)(uintptr_t)p[k];
  op->n[10] = q->rows; op->n[11] = q->cols;
  op->i[14] = q->dtype; op->i[15] = q->block_size;
}
static inline wane_qview wane_qview_load(const wane_op *op) {
  wane_qview q = { op->i[14], op->i[15], op->n[10], op->n[11], op->p[4], op->p[5], op->p[6], op->p[7], op->p[8], op->p[9] };
  return q;
}
/* A view of a tensor (tensor.h) of any float or quantized dtype; plain tensors must be contiguous. */
struct wane_tensor;
void wane_qview_of(const struct wane_tensor *t, wane_qview *q);

/* ---- one instruction set's functions ---- */
typedef struct wane_quant_kit {
  /* Elements [first, first + count) of the flat tensor; x points at element `first`, codes and absmax at the start of the whole
   * tensor's. first is a multiple of wane_quant_grain; count too, unless the range ends the tensor. */
  void (*quantize_4bit)(int kind, const void *x, int dtype, int64_t first, int64_t count, int block_size, uint8_t *codes, float *absmax);
  void (*quantize_8bit)(int kind, const void *x, int dtype, int64_t first, int64_t count, int block_size, uint8_t *codes, float *absmax);
  /* x [rows, K] -> codes i8 [rows, K], absmax f32 [rows]. */
  void (*quantize_rows)(const void *x, int dtype, int64_t rows, int64_t K, int8_t *codes, float *absmax);
  /* Values [first, first + count) of the flat tensor as f32. Any range of any kind (GGUF blocks are entered at any element). */
  void (*dequantize)(const wane_qview *q, int64_t first, int64_t count, float *out);
  /* f32 -> f16 or bf16, rounded to nearest even. */
  void (*narrow)(const float *x, int64_t n, int dtype, void *out);
} wane_quant_kit;
extern const wane_quant_kit wane_quant_generic;
/* Offers a level's kit (called while backends are registered); the kit of the level in force. */
void wane_quant_set_kit(int level, const wane_quant_kit *kit);
const wane_quant_kit *wane_quant_kit_in_force(void);

/* ---- what other rooms call: the best twin for the level in force ---- */
/* Values [first, first + count) of the flat tensor as f32; row r of a table is (r * cols, cols). Source kinds: all of wane_qview. */
void wane_dequantize_range(const wane_qview *q, int64_t first, int64_t count, float *out);
/* Quantizes a range of a tensor [.., cols] while it is being read. kind: NF4, FP4, BLOCK8(U), INT8. dtype: f32, f16, bf16.
 * first and count are elements, multiples of wane_quant_grain(kind, block_size, cols) except where the range ends the tensor;
 * x points at element `first`, codes and absmax at the start of the whole tensor's. Ranges may be done in any order, on any thread. */
void wane_quantize_range(int kind, const void *x, int dtype, int64_t first, int64_t count, int64_t cols, int block_size, void *codes, float *absmax);
int64_t wane_quant_grain(int kind, int block_size, int64_t cols);
/* Lengths: bytes of codes and number of absmax values for n elements of rows of cols. -1 on overflow. */
int64_t wane_quant_code_bytes(int kind, int64_t n);
int64_t wane_quant_absmax_count(int kind, int64_t n, int64_t cols, int block_size);
/* Double quantization of the nb scales, once all are there. offset = their mean (summed in double); codes u8 [nb],
 * nested_absmax f32 [ceil(nb/256)], nested_code f32 [256] (the signed map; optional). */
void wane_quantize_nested(const float *absmax, int64_t nb, uint8_t *codes, float *nested_absmax, float *nested_code, float *offset);
/* The inverse, for scales [first, first + count): nested_code[code] * nested_absmax + offset. */
void wane_dequantize_nested(const wane_qview *q, int64_t first, int64_t count, float *absmax);
/* The dynamic map f32 [256]: nonzero is_signed for "dynamic", else "udynamic". Equal to upstream's bit for bit. */
const float *wane_dynamic_map(int is_signed);
extern const float wane_nf4_levels[16], wane_fp4_levels[16];

/* ---- GGUF blocks (ggml-common.h, ggml-quants.c): any number of whole blocks -> f32, equal to the gguf package's ---- */
int wane_gguf_block(int dtype);            /* values a block: 32 or 256; 0 for other kinds */
int wane_gguf_block_bytes(int dtype);
#endif
