/* avx512_registry.c: puts every room's AVX-512 kernels into the op table. A room adds its line here. */
#include "../linear/linear.h"
#include "../linear/linear8.h"
#include "../linear/lora.h"
#include "../tensor/tensor.h"
#include "../ops/nn.h"
#include "../ops/probe.h"
#include "../quant/kernels.h"

void wane_register_avx512(wane_backend *b) {
  wane_probe_register_avx512(b);
  wane_nn_register_avx512(b);
  wane_quant_register_avx512(b);
  wane_linear_register_avx512(b);
  wane_linear8_register_avx512(b);
  wane_lora_register_avx512(b);
}
