/* kernels.h: what the instruction-set files of core/quant share. Internal to core/quant. */
#ifndef WANE_QUANT_KERNELS_H
#define WANE_QUANT_KERNELS_H
#include "quant.h"

/* One chunk of an op, with a given kit (quant_ops.c). Op records:
 *   QUANTIZE_4BIT, _8BIT  p x, codes, absmax; n numel; i kind, dtype of x, block size
 *   QUANTIZE_ROWS         p x, codes, absmax; n rows, K; i kind, dtype of x
 *   QUANTIZE_NESTED       p absmax, codes, nested_absmax, -, offset; n scales; one chunk
 *   DEQUANTIZE            p out; i dtype of out; the source as wane_qview_store leaves it */
void wane_quant_run_4bit(const wane_op *op, uint32_t chunk, const wane_quant_kit *kit);
void wane_quant_run_8bit(const wane_op *op, uint32_t chunk, const wane_quant_kit *kit);
void wane_quant_run_rows(const wane_op *op, uint32_t chunk, const wane_quant_kit *kit);
void wane_quant_run_nested(const wane_op *op, const wane_quant_kit *kit);
void wane_quant_run_dequantize(const wane_op *op, uint32_t chunk, const wane_quant_kit *kit);

/* Defines the kernels of one instruction set over its kit, and the function that puts them into a table. */
#define WANE_QUANT_KERNELS(set, kit)                                                                                      \
  static void set##_4bit(const wane_op *op, uint32_t chunk) { wane_quant_run_4bit(op, chunk, kit); }                      \
  static void set##_8bit(const wane_op *op, uint32_t chunk) { wane_quant_run_8bit(op, chunk, kit); }                      \
  static void set##_rows(const wane_op *op, uint32_t chunk) { wane_quant_run_rows(op, chunk, kit); }                      \
  static void set##_nested(const wane_op *op, uint32_t chunk) { (void)chunk; wane_quant_run_nested(op, kit); }            \
  static void set##_dequantize(const wane_op *op, uint32_t chunk) { wane_quant_run_dequantize(op, chunk, kit); }          \
  static void set##_register(wane_backend *b) {                                                                           \
    const wane_kernel kernels[] = { set##_4bit, set##_8bit, set##_rows, set##_nested, set##_dequantize };                 \
    const int codes[] = { WANE_OP_QUANTIZE_4BIT, WANE_OP_QUANTIZE_8BIT, WANE_OP_QUANTIZE_ROWS, WANE_OP_QUANTIZE_NESTED,   \
                          WANE_OP_DEQUANTIZE };                                                                           \
    for (int k = 0; k < 5; k++) b->ops[codes[k]] = kernels[k];                                                                \
  }

void wane_gguf_range_generic(int dtype, const uint8_t *blocks, int64_t first, int64_t count, float *out);

/* wane_quantize_nested with a given kit. */
void wane_quantize_nested_with(const wane_quant_kit *kit, const float *absmax, int64_t nb, uint8_t *codes, float *nested_absmax,
                               float *nested_code, float *offset);

/* Register functions of the instruction sets, called from core/x86. */
void wane_quant_register_avx2(wane_backend *b);
void wane_quant_register_avx512(wane_backend *b);
#endif
