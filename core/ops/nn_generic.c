/* nn_generic.c: the neural network kernels in portable C: the reference that the other instruction sets are compared with. */
#include "nn_kernels.h"

void wane_register_generic_nn(wane_backend *b) {
  nn_kernels_register(b);
  b->ops[WANE_OP_EMBEDDING] = wane_nn_embedding;
}
