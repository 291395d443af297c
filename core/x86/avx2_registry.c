/* avx2_registry.c: puts every room's AVX2 kernels into the op table. A room adds its line here. */
#include "../linear/linear.h"
#include "../linear/linear8.h"
#include "../linear/lora.h"
#include "../ops/ops.h"
#include "../ops/nn.h"
#include "../ops/probe.h"
#include "../quant/kernels.h"
#include "../tensor/tensor.h"

void wane_register_avx2(wane_backend *b) {
  wane_probe_register_avx2(b);
  wane_nn_register_avx2(b);
  wane_elementwise_register_avx2(b);
  wane_reduce_register_avx2(b);
  wane_random_register_avx2(b);
  wane_matmul_register_avx2(b);
  wane_quant_register_avx2(b);
  wane_linear_register_avx2(b);
  wane_linear8_register_avx2(b);
  wane_lora_register_avx2(b);
}
