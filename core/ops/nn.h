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

/* Floats between rows of the workspace of attention's gradient: whole vectors of every instruction set. */
static inline int64_t wane_attention_wide(int64_t D) { return (D + 15) / 16 * 16; }
#endif
