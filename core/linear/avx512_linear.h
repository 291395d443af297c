/* avx512_linear.h: what the AVX-512 and AMX product kernels share. Internal to those files of core/linear. */
#ifndef WANE_AVX512_LINEAR_H
#define WANE_AVX512_LINEAR_H
#include "avx2_linear.h"

/* The scales of W's row n, one per 64 values (per 32 when `halves`): where they lie, or expanded into `buffer`. avx512_4bit.c. */
const float *avx512_row_scales(const wane_qview *w, int64_t n, int halves, float *buffer);

/* Fill slots of the op table. */
void avx512_register_4bit(wane_backend *b);
void avx512_register_many16(wane_backend *b);
#endif
