/* ops.h: registration of the general tensor ops' file groups. Internal. */
#ifndef WANE_OPS_H
#define WANE_OPS_H
#include "../tensor/tensor.h"

void wane_register_generic_reduce(wane_backend *b);
void wane_register_generic_sort(wane_backend *b);
void wane_register_generic_random(wane_backend *b);
void wane_register_generic_matmul(wane_backend *b);

/* Everything of this room that has an AVX2 twin; called from core/x86/avx2_registry.c. */
void wane_elementwise_register_avx2(wane_backend *b);
void wane_reduce_register_avx2(wane_backend *b);
void wane_random_register_avx2(wane_backend *b);
void wane_matmul_register_avx2(wane_backend *b);
#endif
