/* linear.h: the frame that every matrix product with a weight [N, K] lives in. Internal.
 *
 * y[m][n] = sum_k x[m][k] W[n][k] + bias[n], W of any dtype in its own bytes (a wane_qview), never repacked. A product is two ops:
 * the first turns x into what the kernel wants to read (a workspace), the second cuts W by rows and multiplies. There are two regimes:
 *
 *   rows   few rows of x (decode). One pass over W as ONE linear stream a thread; a dot product per (m, n). Row m's result does not
 *          depend on the other rows, so this is also the regime of WANE_COMPUTE_INVARIANT.
 *   many   many rows (prefill, training). W's rows are decoded a panel at a time into the worker's scratch and are the broadcast
 *          operand; x was packed once, tokens side by side, and is the vector operand. A kind needs only a row decoder to take part.
 *   back   dx[m][k] = sum_n dy[m][n] W[n][k] from the same bytes by the same decoders.
 *
 * Every sum runs over k in an order fixed by K, the kind and the regime alone: work is cut over n and m, never over k, so results do
 * not depend on the number of threads. Kinds are grouped, because the op table has a slot for a group and a regime. */
#ifndef WANE_LINEAR_H
#define WANE_LINEAR_H
#include "../base/float16.h"
#include "../include/wane_backend.h"
#include "../quant/quant.h"

enum {
  WANE_GROUP_FLOAT,          /* f32, f16, bf16 */
  WANE_GROUP_4BIT,           /* nf4, fp4 */
  WANE_GROUP_INT8,           /* rows of int8, weight-only (threshold < 0) */
  WANE_GROUP_BLOCK8,         /* blockwise 8-bit, both maps */
  WANE_GROUP_GGUF,           /* blocks of 32: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 */
  WANE_GROUP_GGUF_K,         /* blocks of 256: Q2_K … Q6_K */
  WANE_GROUP_LLM_INT8,       /* rows of int8 times int8 activations, outlier columns (threshold >= 0) */
  WANE_GROUP_GGUF_TABLE,     /* GGUF's kinds with tables: IQ1 … IQ4, TQ, MXFP4, NVFP4 */
  WANE_GROUPS
};
/* The group of a weight dtype; -1 if it is no weight. INT8 gives WANE_GROUP_INT8. */
int wane_linear_group(int dtype);

/* Op codes: slot + group. An instruction set fills the slots of a regime together, because its two ops share a layout. */
enum {
  WANE_OP_LINEAR_PREPARE = WANE_OP_LINEAR,        /* x -> workspace of ROWS;   chunks over m */
  WANE_OP_LINEAR_ROWS = WANE_OP_LINEAR + 8,       /* workspace, W -> y;        chunks over n */
  WANE_OP_LINEAR_PACK = WANE_OP_LINEAR + 16,      /* x -> workspace of MANY;   chunks over m */
  WANE_OP_LINEAR_MANY = WANE_OP_LINEAR + 24,      /* workspace, x, W -> y;     chunks over n (tiles: and m). Tiles read bf16 x in place, and BACK dy */
  WANE_OP_LINEAR_BACK_PACK = WANE_OP_LINEAR + 32, /* dy -> workspace of BACK;  chunks over m */
  WANE_OP_LINEAR_BACK = WANE_OP_LINEAR + 40,      /* workspace, dy, W -> dx;   chunks over k */
  WANE_OP_LINEAR_SCAN = WANE_OP_LINEAR + 48,      /* x -> workspace, before PREPARE and PACK; chunks over k. LLM_INT8 only: outlier columns of all rows */
  WANE_OP_LINEAR_EXPERTS_PREPARE = WANE_OP_LINEAR + 56, /* PREPARE or PACK of each expert's rows: experts.c */
  WANE_OP_LINEAR_EXPERTS = WANE_OP_LINEAR + 57,   /* ROWS or MANY of each expert's rows */
  WANE_OP_LINEAR_ADDS = WANE_OP_LINEAR + 58       /* never enqueued: there where MANY and BACK can add a low-rank product */
};

/* The record of all of them. The weight is wane_qview_load(op) (pointers 4..9, sizes 10 and 11, integers 14 and 15). */
enum {
  WANE_LINEAR_Y = 0,         /* p: y [M, N] (BACK: dx [M, K]), contiguous */
  WANE_LINEAR_X = 1,         /* p: x [M, K] (BACK_PACK and BACK: dy [M, N]), contiguous */
  WANE_LINEAR_BIAS = 2,      /* p: bias [N] or NULL */
  WANE_LINEAR_WORK = 3,      /* p: workspace, 64-byte aligned, wane_linear_work_bytes() */
  WANE_LINEAR_FACTOR = 10,   /* p: with a rank, MANY: B [N, r], BACK: A [r, K] */
  WANE_LINEAR_M = 0,         /* n */
  WANE_LINEAR_ID = 1,        /* n: no other op of this process has it; 0: none given */
  WANE_LINEAR_DTYPE = 0,     /* i: of x and y */
  WANE_LINEAR_BIAS_DTYPE = 1,
  WANE_LINEAR_COMPUTE = 2,   /* WANE_COMPUTE_F32 … _FAST, without the invariant bit */
  WANE_LINEAR_BY_ROW = 3,    /* LLM_INT8: 1 takes outlier columns a row at a time (WANE_COMPUTE_INVARIANT) */
  WANE_LINEAR_ALONE = 4,     /* LLM_INT8, preparing ops: 1 if no SCAN ran before */
  WANE_LINEAR_RANK = 5,      /* r > 0: y += u Bᵀ too (BACK: dx += du A). Preparing ops have u f32 [M, r] where the bias is. Only where WANE_OP_LINEAR_ADDS
                              * is, not for LLM_INT8, not with WANE_COMPUTE_F32 */
  WANE_LINEAR_ONTO = 6,      /* i, with a rank, 1: BACK adds to what dx holds, MANY adds the tensor [M, N] of y's dtype that is where a bias would be */
  WANE_LINEAR_THRESHOLD = 0  /* f */
};

typedef struct wane_linear_args {
  int64_t M, N, K;
  void *y;
  const void *x, *bias;
  void *work;
  int dtype, bias_dtype, compute;
  float threshold;
} wane_linear_args;

/* What a kernel reads out of its record (the weight apart: wane_qview_load). */
static inline wane_linear_args wane_linear_load(const wane_op *op) {
  wane_linear_args a = { op->n[WANE_LINEAR_M], op->n[10], op->n[11], op->p[WANE_LINEAR_Y], op->p[WANE_LINEAR_X], op->p[WANE_LINEAR_BIAS],
                         op->p[WANE_LINEAR_WORK], op->i[WANE_LINEAR_DTYPE], op->i[WANE_LINEAR_BIAS_DTYPE], op->i[WANE_LINEAR_COMPUTE],
                         op->f[WANE_LINEAR_THRESHOLD] };
  return a;
}

/* bias[n], or 0 without one. */
static inline float wane_linear_bias(const wane_linear_args *a, int64_t n) { return a->bias ? wane_float_at(a->bias, a->bias_dtype, n) : 0.0f; }

/* Rows of x that take the ROWS regime (more are taken with WANE_COMPUTE_INVARIANT), and rows of x that MANY and BACK see at once: a
 * longer x is cut by wane_linear into slices that share one workspace (LLM_INT8 is not: its outlier columns are the whole batch's). */
enum { WANE_LINEAR_FEW = 8, WANE_LINEAR_SLICE = 1024 };

/* Workspace for `rows` rows of `width` values (K; N for BACK), without a low-rank product. A layout may use, for rows rounded up to 64 (and to 12) and width rounded
 * up to 256: 4 bytes a value, 8 bytes a 32 values, 64 bytes a row; and over all 8 bytes a column and 4 KiB. -1 on overflow. */
int64_t wane_linear_work_bytes(int64_t rows, int64_t width);

/* Generic kernels: any kind, plain loops, sums in f32 in rising k (n for BACK). Slots of a group that no instruction set fills stay
 * with these. */
void wane_register_generic_linear(wane_backend *b);
/* The ops of mixtures of experts, at every level: they call the level's own kernels (experts.c). */
void wane_register_experts(wane_backend *b);

/* ---- each file group's entry, called from core/x86 ---- */
void wane_linear_register_avx2(wane_backend *b);
void wane_linear_register_avx512(wane_backend *b);
void wane_linear_register_avx512bf16(wane_backend *b);
void wane_linear_register_amx(wane_backend *b);
#endif
