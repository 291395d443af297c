/* random_kernels.c: the portable arange and random numbers. */
#include "random_kernels.h"
#include "ops.h"

void wane_register_generic_random(wane_backend *b) { register_random(b, "generic"); }
