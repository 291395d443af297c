/* elementwise_kernels.c: the portable kernels of general tensor ops: the scalar reference of every other set. */
#include "elementwise_kernels.h"
#include "ops.h"

void wane_register_generic_elementwise(wane_backend *b) {
  register_elementwise(b, "generic");
  wane_register_generic_reduce(b);
  wane_register_generic_sort(b);
  wane_register_generic_random(b);
  wane_register_generic_matmul(b);
}
