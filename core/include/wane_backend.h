/* wane_backend.h: what a device must provide. The CPU backend fills this table per instruction-set level; the CUDA plug-in
 * fills the same one. An op record holds raw pointers and scalars only: it keeps nothing alive, stream order does. */
#ifndef WANE_BACKEND_H
#define WANE_BACKEND_H
#include "wane.h"

/* One enqueued op. 512 bytes, fixed size, so that a ring slot is found by its ticket. */
typedef struct wane_op wane_op;
typedef void (*wane_kernel)(const wane_op *op, uint32_t chunk);

enum { WANE_OP_POINTERS = 11, WANE_OP_SIZES = 12, WANE_OP_OPERANDS = 4 };
struct wane_op {
  wane_kernel fn;                          /* set from the table when enqueued */
  uint32_t nchunks;                        /* how the work is cut: a function of the shapes alone, never of the thread count */
  uint16_t code;                           /* WANE_OP_… */
  uint8_t always;                          /* run even while the stream is stopped (releases, uploads) */
  uint8_t pad;
  struct wane_stream *stream;              /* for wane_op_fail */
  void *p[WANE_OP_POINTERS];               /* operands; meaning per op code, documented at its kernel */
  int64_t n[WANE_OP_SIZES];                /* sizes */
  int64_t stride[WANE_OP_OPERANDS][5];     /* element strides of strided operands, after coalescing to <= 5 dimensions */
  float f[8];
  int32_t i[16];                           /* dtypes, flags, positions */
  double d[2];
  uint64_t spare[2];
};

/* Op codes. Add at the end of a group; the table below is indexed by them. */
enum {
  WANE_OP_NONE = 0,
  /* memory */
  WANE_OP_RELEASE, WANE_OP_UPLOAD, WANE_OP_COPY, WANE_OP_FILL,
  /* elementwise and friends */
  WANE_OP_UNARY = 16, WANE_OP_BINARY, WANE_OP_WHERE, WANE_OP_REDUCE, WANE_OP_ARANGE, WANE_OP_RANDOM, WANE_OP_SORT, WANE_OP_TOPK,
  WANE_OP_INDEX, WANE_OP_MATMUL, WANE_OP_CUMSUM,
  /* limits of the machine, for `wane bench` */
  WANE_OP_PROBE_READ = 48, WANE_OP_PROBE_F32, WANE_OP_PROBE_BF16, WANE_OP_PROBE_I8,
  /* neural network */
  WANE_OP_EMBEDDING = 64, WANE_OP_RMS_NORM, WANE_OP_LAYER_NORM, WANE_OP_ROPE, WANE_OP_KV_APPEND, WANE_OP_ATTENTION,
  WANE_OP_GLU, WANE_OP_SOFTMAX, WANE_OP_ARGMAX, WANE_OP_SAMPLE_FILTER, WANE_OP_SAMPLE, WANE_OP_NLL, WANE_OP_PENALTY,
  WANE_OP_RMS_NORM_BACKWARD, WANE_OP_LAYER_NORM_BACKWARD, WANE_OP_NLL_BACKWARD, WANE_OP_ATTENTION_MERGE, WANE_OP_ROUTE,
  WANE_OP_LORA_ROWS, WANE_OP_LORA_COLUMNS,
  WANE_OP_UNARY_BACKWARD, WANE_OP_GLU_BACKWARD, WANE_OP_SOFTMAX_BACKWARD, WANE_OP_SCATTER_ADD, WANE_OP_TOPK_BACKWARD, WANE_OP_DROPOUT, WANE_OP_ADD_INTO,
  WANE_OP_EXPERTS_WEIGHT, WANE_OP_ATTENTION_BACKWARD, WANE_OP_OPTIMIZER, WANE_OP_LORA_GRADIENT, WANE_OP_LORA_SUM,
  /* quantizers */
  WANE_OP_QUANTIZE_4BIT = 112, WANE_OP_QUANTIZE_8BIT, WANE_OP_QUANTIZE_ROWS, WANE_OP_QUANTIZE_NESTED, WANE_OP_DEQUANTIZE,
  /* linear: few rows (decode) and many rows (prefill, training) of each weight kind, preparation of x, backward */
  WANE_OP_LINEAR = 128,
  WANE_OP_LINEAR_END = 191,
  WANE_OP_COUNT = 192
};

/* The op table of one device (at one instruction-set level). NULL: not offered; the dispatcher falls back to the scalar
 * reference, counts it and says so in `wane doctor`. */
typedef struct wane_backend {
  int abi;                                 /* WANE_ABI */
  const char *name;                        /* "cpu/avx2" */
  wane_kernel ops[WANE_OP_COUNT];
  const char *origin[WANE_OP_COUNT];       /* "generic", "avx2" …: which file group the kernel came from */
} wane_backend;

/* The unit range [lo, hi) of a chunk when `units` are cut into op->nchunks in multiples of `grain`. */
static inline void wane_op_range(const wane_op *op, uint32_t chunk, int64_t units, int64_t grain, int64_t *lo, int64_t *hi) {
  int64_t grains = (units + grain - 1) / grain;
  int64_t a = grains * chunk / op->nchunks * grain, b = grains * (chunk + 1) / op->nchunks * grain;
  *lo = a < units ? a : units;
  *hi = b < units ? b : units;
}

/* From inside a kernel: the op could not be done (an id out of range). Stops the stream; the message is copied. */
void wane_op_fail(const wane_op *op, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* From inside a kernel: this worker's scratch memory, 64-byte aligned, WANE_SCRATCH bytes. Contents do not survive the op,
 * and from one of its chunks to the next only if it is the same worker and the same memory. */
enum { WANE_SCRATCH = 1600 << 10 };
void *wane_scratch(void);
#endif
