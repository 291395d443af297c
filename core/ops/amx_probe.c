/* amx_probe.c: tile products at full rate, four accumulators as the kernels have them, operands in registers. */
#include "../x86/amx.h"
#include "probe.h"

enum { STEPS = 16 };
const double wane_probe_ops_amx[WANE_PROBE_KINDS] = { [WANE_PROBE_BF16] = 4.0 * STEPS * 2 * 16 * 16 * 32, [WANE_PROBE_I8] = 4.0 * STEPS * 2 * 16 * 16 * 64 };

/* Tiles 4 to 7 from a page of small numbers; 0 to 3 are the sums. */
static void begin(uint16_t pattern) {
  uint16_t page[16 * 32];
  for (int i = 0; i < 16 * 32; i++) page[i] = pattern;
  wane_tiles_on();
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_loadd(4, page, 64); _tile_loadd(5, page, 64); _tile_loadd(6, page, 64); _tile_loadd(7, page, 64);
}

static void end(const wane_op *op, uint32_t chunk) {
  float out[16 * 16];
  _tile_stored(0, out, 64);
  ((float *)op->p[0])[chunk] = out[0];
  wane_tiles_off();
}

static void k_bf16(const wane_op *op, uint32_t chunk) {
  begin(0x3000);
  for (int64_t r = 0; r < op->n[1]; r++)
    for (int k = 0; k < STEPS; k++) {
      _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
  end(op, chunk);
}

static void k_i8(const wane_op *op, uint32_t chunk) {
  begin(0x0101);
  for (int64_t r = 0; r < op->n[1]; r++)
    for (int k = 0; k < STEPS; k++) {
      _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
    }
  end(op, chunk);
}

void wane_probe_register_amx(wane_backend *b) {
  b->ops[WANE_OP_PROBE_BF16] = k_bf16;
  b->ops[WANE_OP_PROBE_I8] = k_i8;
}
