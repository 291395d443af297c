/* quant_gguf.c: sizes of GGUF blocks and their portable decoder. */
#include "gguf_blocks.h"
#include "kernels.h"

static const struct { int16_t values, bytes; } block[] = {
  { 32, 18 }, { 32, 20 }, { 32, 22 }, { 32, 24 }, { 32, 34 },               /* Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 */
  { 256, 84 }, { 256, 110 }, { 256, 144 }, { 256, 176 }, { 256, 210 },      /* Q2_K … Q6_K */
};

int wane_gguf_block(int dtype) { return dtype >= WANE_Q4_0 && dtype <= WANE_Q6_K ? block[dtype - WANE_Q4_0].values : 0; }
int wane_gguf_block_bytes(int dtype) { return dtype >= WANE_Q4_0 && dtype <= WANE_Q6_K ? block[dtype - WANE_Q4_0].bytes : 0; }

void wane_gguf_range_generic(int dtype, const uint8_t *blocks, int64_t first, int64_t count, float *out) {
  gguf_decode_range(dtype, blocks, first, count, out);
}
