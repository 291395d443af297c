/* probe.c: the machine's limits: reading memory, and multiply-adds in plain C. */
#include "probe.h"
#include "../tensor/tensor.h"
#include <string.h>

enum { LANES = 8 };
const double wane_probe_ops_generic[WANE_PROBE_KINDS] = { [WANE_PROBE_F32] = 2.0 * LANES * 16 };

/* One linear stream a chunk, every byte once, asked for early: the kernels do so too, and without it the hardware's prefetchers
 * stop at each page (Zen 3: 25 against 33 GB/s). */
static void k_read(const wane_op *op, uint32_t chunk) {
  int64_t lo, hi;
  wane_op_range(op, chunk, op->n[0] / 64, 1, &lo, &hi);
  const char *p = op->p[1];
  uint64_t sum[8] = { 0 };
  for (int64_t line = lo; line < hi; line++) {
    uint64_t v[8];
    __builtin_prefetch(p + (line + 64 < hi ? line + 64 : line) * 64);
    memcpy(v, p + line * 64, 64);
    for (int i = 0; i < 8; i++) sum[i] |= v[i];
  }
  uint64_t all = 0;
  for (int i = 0; i < 8; i++) all |= sum[i];
  ((float *)op->p[0])[chunk] = (float)(all & 1);
}

static void k_f32(const wane_op *op, uint32_t chunk) {
  float a[LANES], x = 1.0f - 1e-7f * (float)chunk, y = 1e-9f;
  for (int i = 0; i < LANES; i++) a[i] = (float)i;
  for (int64_t r = 0; r < op->n[1]; r++)
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < LANES; i++) a[i] = a[i] * x + y;
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += a[i];
  ((float *)op->p[0])[chunk] = sum;
}

void wane_probe_register_generic(wane_backend *b) {
  b->ops[WANE_OP_PROBE_READ] = k_read;
  b->ops[WANE_OP_PROBE_F32] = k_f32;
}

/* The table of the group that the level's kernel came from. */
static double operations(int level, int what) {
  const double *tables[] = { wane_probe_ops_generic,
#ifdef WANE_KERNELS_AVX2
    wane_probe_ops_avx2,
#endif
#ifdef WANE_KERNELS_AVX512
    wane_probe_ops_avx512,
#endif
#ifdef WANE_KERNELS_AVX512BF16
    wane_probe_ops_avx512bf16,
#endif
#ifdef WANE_KERNELS_AMX
    wane_probe_ops_amx,
#endif
  };
  int count = (int)(sizeof tables / sizeof *tables);
  for (int i = level < count ? level : count - 1; i >= 0; i--) if (tables[i][what] > 0) return tables[i][what];
  return 0;
}

int wane_probe(wane_stream *s, int what, const wane_handle *buffer, int64_t rounds, double *out) {
  int status = wane_enter(s);
  if (status) return status;
  *out = 0;
  if (what < 0 || what >= WANE_PROBE_KINDS) return wane_fail(WANE_E_ARG, "no probe %d", what);
  int code = WANE_OP_PROBE_READ + what;
  if (!wane_cpu_backend()->ops[code]) return WANE_OK;
  wane_tensor *t = NULL;
  if (what == WANE_PROBE_READ && !(t = wane_use(s, buffer, "buffer"))) return WANE_E_STALE;
  if (t && (t->dtype != WANE_U8 || !wane_is_contiguous(t))) return wane_fail(WANE_E_DTYPE, "buffer: expected contiguous u8, found %s", wane_shape_text(t));
  wane_storage *results;
  float *sums = wane_workspace(s, sizeof(float) * WANE_PROBE_CHUNKS, &results);
  if (!sums) return WANE_E_MEMORY;
  wane_op *op = wane_op_new(s, code);
  op->nchunks = WANE_PROBE_CHUNKS;
  op->p[0] = sums;
  op->p[1] = t ? t->data : NULL;
  op->n[0] = t ? wane_numel(t) : 0;
  op->n[1] = rounds;
  wane_op_push(s, op, NULL, NULL);
  wane_storage_unref(results);
  *out = t ? (double)wane_numel(t) : operations(wane_cpu_level(), what) * (double)rounds * WANE_PROBE_CHUNKS;
  return WANE_OK;
}
