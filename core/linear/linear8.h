/* linear8.h: where the kernels of 8-bit and GGUF weights enter the op table. Internal. Call after wane_linear_register_*: these
 * replace what that offers for the same groups. */
#ifndef WANE_LINEAR8_H
#define WANE_LINEAR8_H
#include "linear.h"

void wane_linear8_register_avx2(wane_backend *b);
void wane_linear8_register_avx512(wane_backend *b);
void wane_linear8_register_amx(wane_backend *b);
#endif
