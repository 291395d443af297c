/* avx512bf16_registry.c: puts every room's AVX512-BF16 kernels into the op table. A room adds its line here. */
#include "../linear/lora.h"
#include "../ops/nn.h"
#include "../ops/probe.h"
#include "../tensor/tensor.h"

void wane_register_avx512bf16(wane_backend *b) {
  wane_probe_register_avx512bf16(b);
  wane_lora_register_avx512bf16(b);
  wane_nn_register_avx512bf16(b);
}
