/* amx_registry.c: puts every room's AMX kernels into the op table. A room adds its line here. */
#include "../linear/linear.h"
#include "../linear/linear8.h"
#include "../linear/lora.h"
#include "../linear/nll.h"
#include "../ops/nn.h"
#include "../ops/probe.h"
#include "../tensor/tensor.h"

void wane_register_amx(wane_backend *b) {
  wane_probe_register_amx(b);
  wane_attention_register_amx(b);
  wane_linear_register_amx(b);
  wane_linear8_register_amx(b);
  wane_lora_register_amx(b);
  wane_linear_nll_register_amx(b);
}
