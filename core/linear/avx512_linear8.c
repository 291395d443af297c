/* avx512_linear8.c: the AVX-512 level's slots of 8-bit and GGUF weights. */
#include "linear8.h"
#include "int8.h"
#include "rows8.h"

void wane_linear8_register_avx512(wane_backend *b) {
  wane_int8_register_avx512(b);
  wane_block8_register_avx512(b);
}
