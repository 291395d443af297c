/* nn.h: what the front functions (nn_*.c) and the kernels (nn_*_kernels.h) of the neural network ops agree on. Internal.
 *
 * A kernel is written once over core/x86/vec.h in an nn_*_kernels.h file; nn_generic.c, avx2_nn.c and avx512_nn.c compile all of
 * them, each for its own vectors. The layout of an op record is stated above the kernel that reads it. */
#ifndef WANE_NN_H
#define WANE_NN_H
#include "../tensor/tensor.h"

/* Registers one instruction set's kernels (the generic ones: wane_register_generic_nn). */
void wane_nn_register_avx2(wane_backend *b);
void wane_nn_register_avx512(wane_backend *b);
void wane_nn_register_avx512bf16(wane_backend *b);
/* After those with vectors, to which they leave what tiles do not. */
void wane_attention_register_avx512bf16(wane_backend *b);
void wane_attention_register_amx(wane_backend *b);

/* The one kernel without vectors of its own: the quantizers' twins do its work (nn_embedding.c). */
void wane_nn_embedding(const wane_op *op, uint32_t chunk);

/* ---- for the front functions ---- */
/* wane_use for an optional argument: NULL handle gives NULL in *t. WANE_E_STALE if it cannot be used. */
int wane_nn_optional(wane_stream *s, const wane_handle *h, const char *what, wane_tensor **t);
/* Checks that a vector such as a weight has C elements and a float dtype. */
int wane_nn_check_vector(const char *op, const char *what, const wane_tensor *t, int64_t C);
/* A tensor whose last dimension is dense: itself, or a copy in tmp. */
wane_tensor *wane_nn_dense_rows(wane_stream *s, wane_tensor *t, wane_handle *tmp);

/* Attention works on blocks of KEYS keys; PIECE keys are summed up on their own and then merged in order, so that a row's result
 * is the same whether its pieces were computed in one chunk (many rows) or in many (few rows, long context). */
enum { WANE_ATTENTION_KEYS = 64, WANE_ATTENTION_PIECE = 256, WANE_ATTENTION_TILE = 6, WANE_ATTENTION_MAX_DIM = 1024 };

/* Floats of one row's partial sum: the weighted sum of values, padded, then its maximum and its weight. */
static inline int64_t wane_attention_partial(int64_t D) { return (D + 15) / 16 * 16 + 16; }

/* The workspace of attention's gradient, in floats: where its parts begin. Rows are `wide` apart (whole vectors, and whole pairs of tiles, of every
 * instruction set); each head's dk and dv have `keys` rows, whole blocks. */
typedef struct wane_attention_places { int64_t wide, keys, delta, dq, dk, dv, floats; } wane_attention_places;
static inline wane_attention_places wane_attention_place(int64_t heads, int64_t T, int64_t keys, int64_t D) {
  wane_attention_places l = { (D + 31) / 32 * 32, (keys + WANE_ATTENTION_KEYS - 1) / WANE_ATTENTION_KEYS * WANE_ATTENTION_KEYS, 0, (heads * T + 15) / 16 * 16, 0, 0, 0 };
  l.dk = l.dq + heads * T * l.wide;
  l.dv = l.dk + heads * l.keys * l.wide;
  l.floats = l.dv + heads * l.keys * l.wide;
  return l;
}
#endif
