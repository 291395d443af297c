/* lora_generic.c: the low-rank products in portable C: what the other instruction sets are compared with. */
#include "lora_kernels.h"

void wane_register_generic_lora(wane_backend *b) { lora_register(b); }
