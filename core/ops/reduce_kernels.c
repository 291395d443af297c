/* reduce_kernels.c: the portable reductions. */
#include "reduce_kernels.h"
#include "ops.h"

void wane_register_generic_reduce(wane_backend *b) { register_reduce(b, "generic"); }
