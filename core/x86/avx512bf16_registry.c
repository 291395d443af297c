/* avx512bf16_registry.c: puts every room's AVX512-BF16 kernels into the op table. A room adds its line here. */
#include "../linear/linear.h"
#include "../linear/lora.h"
#include "../linear/nll.h"
#include "../ops/nn.h"
#include "../ops/probe.h"
#include "../tensor/tensor.h"
#include <string.h>

/* Does vdpbf16ps pay? Intel's is no faster than f32 FMA, and half as fast as the int16 products of AVX-512 (core/base/cpu.c). */
static int pays(void) {
#ifdef WANE_EMULATE
  return 1;
#else
  return !strstr(wane_cpu_notes(), "bf16-dot-slow");
#endif
}

void wane_register_avx512bf16(wane_backend *b) {
  wane_probe_register_avx512bf16(b);
  wane_lora_register_avx512bf16(b);
  wane_nn_register_avx512bf16(b);
  if (!pays()) return;
  wane_linear_register_avx512bf16(b);
  wane_linear_nll_register_avx512bf16(b);
  wane_lora_register_tiles_avx512bf16(b);
  wane_attention_register_avx512bf16(b);
}
