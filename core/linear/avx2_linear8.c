/* avx2_linear8.c: the AVX2 level's slots of 8-bit and GGUF weights. */
#include "linear8.h"
#include "int8.h"
#include "rows8.h"

void wane_linear8_register_avx2(wane_backend *b) {
  wane_int8_register_avx2(b);
  wane_int8_rows_register_avx2(b);
  wane_block8_register_avx2(b);
  wane_gguf_register_avx2(b);
}
