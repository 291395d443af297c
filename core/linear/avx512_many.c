/* avx512_many.c: many rows of x times a weight of any kind, and the backward, with AVX-512 and f32 products (many.h). */
#include "avx512_linear.h"
#define WANE_VEC 512
#define MANY(name) avx512_##name
#include "many.h"
