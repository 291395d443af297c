/* quant.c: choosing a twin, quantizing by ranges, double quantization: what lies over the kits and under the ops. */
#include "kernels.h"
#include "tables.h"
#include "../tensor/tensor.h"

/* ================================================================ the kit in force */

static const wane_quant_kit *kits[WANE_CPU_AMX + 1] = { &wane_quant_generic };

/* Called while backends are registered, before any op runs. */
void wane_quant_set_kit(int level, const wane_quant_kit *kit) { kits[level] = kit; }

const wane_quant_kit *wane_quant_kit_in_force(void) {
  int level;
  wane_cpu_backend(); /* the kits are offered when the tables are filled */
  for (level = wane_cpu_level(); level > 0 && !kits[level]; level--) {}
  return kits[level];
}

/* ================================================================ ranges */

int64_t wane_quant_grain(int kind, int block_size, int64_t cols) {
  if (kind == WANE_INT8) return cols > 0 ? cols : 1;
  return wane_is_4bit(kind) && block_size % 2 ? 2 * (int64_t)block_size : block_size; /* a byte belongs to one range */
}

int64_t wane_quant_code_bytes(int kind, int64_t n) {
  if (n < 0) return -1;
  return wane_is_4bit(kind) ? n / 2 + n % 2 : n;
}

int64_t wane_quant_absmax_count(int kind, int64_t n, int64_t cols, int block_size) {
  int64_t unit = kind == WANE_INT8 ? cols : block_size;
  if (n < 0 || unit < 0) return -1;
  return unit == 0 ? 0 : n / unit + (n % unit != 0);
}

void wane_quantize_range(int kind, const void *x, int dtype, int64_t first, int64_t count, int64_t cols, int block_size, void *codes, float *absmax) {
  const wane_quant_kit *kit = wane_quant_kit_in_force();
  if (count <= 0) return;
  if (wane_is_4bit(kind)) kit->quantize_4bit(kind, x, dtype, first, count, block_size, codes, absmax);
  else if (kind == WANE_INT8) kit->quantize_rows(x, dtype, count / cols, cols, (int8_t *)codes + first, absmax + first / cols);
  else kit->quantize_8bit(kind, x, dtype, first, count, block_size, codes, absmax);
}

void wane_dequantize_range(const wane_qview *q, int64_t first, int64_t count, float *out) {
  wane_quant_kit_in_force()->dequantize(q, first, count, out);
}

/* ================================================================ double quantization */

/* QLoRA section 3. The mean is taken in double, with four sums so that the additions overlap. */
void wane_quantize_nested_with(const wane_quant_kit *kit, const float *absmax, int64_t nb, uint8_t *codes, float *nested_absmax,
                               float *nested_code, float *offset) {
  float centred[16 * WANE_NESTED_BLOCK];
  double sum[4] = { 0, 0, 0, 0 };
  for (int64_t b = 0; b < nb; b++) sum[b % 4] += (double)absmax[b];
  *offset = nb ? (float)(((sum[0] + sum[1]) + (sum[2] + sum[3])) / (double)nb) : 0.0f;
  for (int64_t first = 0; first < nb; first += 16 * WANE_NESTED_BLOCK) {
    int64_t n = nb - first < 16 * WANE_NESTED_BLOCK ? nb - first : 16 * WANE_NESTED_BLOCK;
    for (int64_t b = 0; b < n; b++) centred[b] = absmax[first + b] - *offset;
    kit->quantize_8bit(WANE_BLOCK8, centred, WANE_F32, first, n, WANE_NESTED_BLOCK, codes, nested_absmax);
  }
  if (nested_code) memcpy(nested_code, wane_dynamic_map(1), 256 * sizeof(float));
}

void wane_quantize_nested(const float *absmax, int64_t nb, uint8_t *codes, float *nested_absmax, float *nested_code, float *offset) {
  wane_quantize_nested_with(wane_quant_kit_in_force(), absmax, nb, codes, nested_absmax, nested_code, offset);
}

void wane_dequantize_nested(const wane_qview *q, int64_t first, int64_t count, float *absmax) {
  for (int64_t b = 0; b < count; b++) absmax[b] = wane_scale_at(q, first + b);
}
