/* backend.c: the op tables of the CPU, one a level: the scalar reference first, then what each instruction set does better. */
#include "stream.h"
#include "../linear/lora.h"
#include "../ops/probe.h"
#include <pthread.h>

enum { LEVELS = WANE_CPU_AMX + 1 };
static wane_backend tables[LEVELS];
static pthread_once_t once = PTHREAD_ONCE_INIT;
static const char *const names[LEVELS] = { "cpu/generic", "cpu/avx2", "cpu/avx512", "cpu/avx512bf16", "cpu/amx" };

/* Marks whatever a registrar changed with its group's name. */
static void layer(wane_backend *b, void (*fill)(wane_backend *), const char *origin) {
  wane_backend before = *b;
  fill(b);
  for (int i = 0; i < WANE_OP_COUNT; i++) if (b->ops[i] != before.ops[i]) b->origin[i] = origin;
}

static void generic(wane_backend *b) {
  wane_register_generic_memory(b);
  wane_probe_register_generic(b);
  wane_register_generic_elementwise(b);
  wane_register_generic_nn(b);
  wane_register_generic_quant(b);
  wane_register_generic_linear(b);
  wane_register_generic_lora(b);
}

static void build(void) {
  for (int level = 0; level < LEVELS; level++) {
    wane_backend *b = &tables[level];
    if (level) *b = tables[level - 1];
    b->abi = WANE_ABI;
    b->name = names[level];
    if (level > wane_cpu_best()) continue;          /* even a registrar is compiled for its instruction set */
    switch (level) {
      case WANE_CPU_GENERIC: layer(b, generic, "generic"); break;
#ifdef WANE_KERNELS_AVX2              /* the build defines one of these for each group that has files */
      case WANE_CPU_AVX2: layer(b, wane_register_avx2, "avx2"); break;
#endif
#ifdef WANE_KERNELS_AVX512
      case WANE_CPU_AVX512: layer(b, wane_register_avx512, "avx512"); break;
#endif
#ifdef WANE_KERNELS_AVX512BF16
      case WANE_CPU_AVX512BF16: layer(b, wane_register_avx512bf16, "avx512bf16"); break;
#endif
#ifdef WANE_KERNELS_AMX
      case WANE_CPU_AMX: layer(b, wane_register_amx, "amx"); break;
#endif
    }
  }
}

const wane_backend *wane_cpu_backend(void) {
  pthread_once(&once, build);
  return &tables[wane_cpu_level()];
}

const char *wane_op_origin(int code, const char **op) {
  const wane_backend *b = wane_cpu_backend();
  if (code < 0 || code >= WANE_OP_COUNT || !b->ops[code]) return NULL;
  if (op) *op = wane_op_name(code);
  return b->origin[code];
}
