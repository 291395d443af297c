/* quant_gguf.c: sizes of GGUF blocks, the tables of the IQ kinds, and the portable decoder. */
#include "gguf_blocks.h"
#include "kernels.h"

static const struct { int16_t values, bytes; } block[] = {
  { 32, 18 }, { 32, 20 }, { 32, 22 }, { 32, 24 }, { 32, 34 },                              /* Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 */
  { 256, 84 }, { 256, 110 }, { 256, 144 }, { 256, 176 }, { 256, 210 },                     /* Q2_K … Q6_K */
  { 32, 18 }, { 256, 136 }, { 32, 17 }, { 64, 36 }, { 256, 54 }, { 256, 66 },              /* IQ4_NL IQ4_XS MXFP4 NVFP4 TQ1_0 TQ2_0 */
  { 256, 50 }, { 256, 56 }, { 256, 66 }, { 256, 74 }, { 256, 82 }, { 256, 98 }, { 256, 110 }, /* IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S */
};
_Static_assert(sizeof block / sizeof *block == WANE_DTYPE_END - WANE_Q4_0, "a size for every GGUF kind");

int wane_gguf_block(int dtype) { return dtype >= WANE_Q4_0 && dtype < WANE_DTYPE_END ? block[dtype - WANE_Q4_0].values : 0; }
int wane_gguf_block_bytes(int dtype) { return dtype >= WANE_Q4_0 && dtype < WANE_DTYPE_END ? block[dtype - WANE_Q4_0].bytes : 0; }

wane_gguf_grids wane_gguf_grid;

/* n points of `values` coordinates, `bits` each in a packed point, through a map of the coordinates. */
static void unpack(const uint16_t *packed, int n, int values, int bits, const int8_t *map, int8_t *out) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < values; j++) *out++ = map[packed[i] >> (bits * j) & ((1 << bits) - 1)];
}

void wane_gguf_fill_grids(void) {
  static const int8_t one[4] = { -1, 0, 1, 0 }, two[4] = { 8, 25, 43, 0 };
  static const int8_t three_xxs[16] = { 4, 12, 20, 28, 36, 44, 52, 62 }, three_s[16] = { 1, 3, 5, 7, 9, 11, 13, 15 };
  wane_gguf_grids *g = &wane_gguf_grid;
  unpack(wane_gguf_packed_iq1, 2048, 8, 2, one, g->iq1[0]);
  unpack(wane_gguf_packed_iq2_xxs, 256, 8, 2, two, g->iq2_xxs[0]);
  unpack(wane_gguf_packed_iq2_xs, 512, 8, 2, two, g->iq2_xs[0]);
  unpack(wane_gguf_packed_iq2_s, 1024, 8, 2, two, g->iq2_s[0]);
  unpack(wane_gguf_packed_iq3_xxs, 256, 4, 4, three_xxs, g->iq3_xxs[0]);
  unpack(wane_gguf_packed_iq3_s, 512, 4, 4, three_s, g->iq3_s[0]);
}

void wane_gguf_range_generic(int dtype, const uint8_t *blocks, int64_t first, int64_t count, float *out) {
  gguf_decode_range(dtype, blocks, first, count, out, gguf_decode);
}
