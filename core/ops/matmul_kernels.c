/* matmul_kernels.c: the portable matrix product. */
#include "matmul_kernels.h"
#include "ops.h"

void wane_register_generic_matmul(wane_backend *b) { register_matmul(b, "generic"); }
