/* wane.h: the whole public C API of libwane, and its manual.
 *
 * This very file is read three ways: by C compilers, by C++ compilers, and by LuaJIT's ffi.cdef (lua/wane/core.lua drops the
 * lines that begin with '#' and the export macro). So: constants are enums, handles are opaque, nothing is passed by value.
 *
 * Conventions
 *   status    Functions that can fail return int: WANE_OK (0), WANE_PENDING (1) where said, or a negative WANE_E_*. The message
 *             of the last failure on the calling thread is wane_error(): what was expected, what was found, what to do.
 *   stream    Ops are enqueued on a stream and run in order on the library's workers; the calling thread does not compute.
 *             Shapes, dtypes and all memory are settled at the call. A stream and its tensors belong to one thread at a time.
 *   handle    A tensor is held through a 16-byte wane_handle that the caller owns. Functions that make a tensor fill `out`.
 *             A handle used after its tensor was freed is WANE_E_STALE, never a crash. `out` may not alias an input.
 *   shapes    Row-major, sizes in elements, at most WANE_MAX_DIMS dimensions. [B, T, C] in comments: batch, time, channels.
 *   optional  A wane_handle pointer marked optional may be NULL.
 * libwane never prints, exits, aborts, installs signal handlers or starts a thread before there is work for it. */
#ifndef WANE_H
#define WANE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifndef WANE_API
#define WANE_API __attribute__((visibility("default")))
#endif
#ifdef __cplusplus
extern "C" { /* c++ */
#endif

/* ================================================================ 1. Library */

enum { WANE_ABI = 1, WANE_MAX_DIMS = 8, WANE_NAME_MAX = 128 };

enum {
  WANE_OK = 0,
  WANE_PENDING = 1,          /* not finished yet; poll, arm or wait */
  WANE_E_ARG = -1,           /* an argument is wrong (a caller's mistake) */
  WANE_E_SHAPE = -2,         /* shapes do not fit together */
  WANE_E_DTYPE = -3,         /* this op does not take that dtype */
  WANE_E_STALE = -4,         /* the tensor was freed, or belongs to another stream */
  WANE_E_MEMORY = -5,        /* malloc or mmap failed */
  WANE_E_CANCELLED = -6,     /* cancelled by the caller */
  WANE_E_FAILED = -7,        /* an op failed while running */
  WANE_E_FORKED = -8,        /* the op was in flight when the process forked; it is lost in the child */
  WANE_E_TIMEOUT = -9,
  WANE_E_IO = -10,           /* the operating system refused; errno's text is in the message */
  WANE_E_FORMAT = -11,       /* a file does not hold what its format demands */
  WANE_E_UNSUPPORTED = -12,  /* valid, but not something this build does */
  WANE_E_NOTFOUND = -13
};

/* ABI number of the library: must equal WANE_ABI of the header in use. */
WANE_API int wane_abi(void);
/* "0.1.0" */
WANE_API const char *wane_version(void);
/* Message of the last failure on this thread; "" if there was none. Owned by the library, valid until the next failure. */
WANE_API const char *wane_error(void);
/* "WANE_E_SHAPE" for a status; never NULL. */
WANE_API const char *wane_status_name(int status);
/* Monotonic seconds. */
WANE_API double wane_clock(void);

/* ================================================================ 2. Processor, threads, memory */

/* Instruction-set levels of the CPU backend, each containing the ones before it. */
enum {
  WANE_CPU_GENERIC = 0,      /* portable C, the scalar reference */
  WANE_CPU_AVX2 = 1,         /* AVX2, FMA, F16C */
  WANE_CPU_AVX512 = 2,       /* F BW VL DQ VNNI VBMI */
  WANE_CPU_AVX512BF16 = 3,
  WANE_CPU_AMX = 4           /* tile, int8, bf16; permission asked of the kernel */
};
/* Level in use: what the CPU has, lowered (never raised) by the environment variable WANE_CPU = generic | avx2 | avx512 |
 * avx512bf16 | amx, read once at first use, or by wane_set_cpu_level. */
WANE_API int wane_cpu_level(void);
/* Level that the CPU offers, whatever WANE_CPU says. */
WANE_API int wane_cpu_best(void);
/* Chooses a level for ops enqueued from now on. WANE_E_UNSUPPORTED above wane_cpu_best(). */
WANE_API int wane_set_cpu_level(int level);
/* "avx2" for WANE_CPU_AVX2; NULL for an unknown number. */
WANE_API const char *wane_cpu_level_name(int level);
/* Which file group gives op `code` at the level in force ("generic", "avx2" …), and its name in *op; NULL: no such op. */
WANE_API const char *wane_op_origin(int code, const char **op);
/* The CPU's brand string, for reports. */
WANE_API const char *wane_cpu_name(void);
/* Space-separated notes on what this CPU is slow or fast at ("bf16-dot-slow", "prefetch-pays"), for `wane doctor`. */
WANE_API const char *wane_cpu_notes(void);

/* Number of workers: the smaller of the affinity mask and the cgroup's CPU quota, unless wane_set_threads said otherwise. */
WANE_API int wane_threads(void);
/* n >= 1; 0 restores the default. Results never depend on it. */
WANE_API int wane_set_threads(int n);
/* Workers alive right now (0 before the first op and after some idle seconds). */
WANE_API int wane_live_threads(void);

typedef struct wane_memory {
  uint64_t heap;             /* bytes held through wane's allocator now */
  uint64_t heap_peak;
  uint64_t mapped;           /* bytes of files mapped now */
  uint64_t limit;            /* bytes this process may use: cgroup limit or physical memory */
  uint64_t rss;              /* resident set of the process now */
  uint64_t rss_peak;         /* VmHWM */
  int64_t tensors;           /* live tensor descriptors */
  int64_t allocations;       /* allocations ever made */
} wane_memory;
/* Fills `out` with the figures of this moment. */
WANE_API void wane_memory_read(wane_memory *out);
/* Tests: the n-th allocation from now (1 = the next) fails once; 0 turns it off. */
WANE_API void wane_fail_allocation(int64_t n);

/* ================================================================ 3. Jobs: long work on a thread of its own
 *
 * Opening an index, reading a vocabulary, loading weights. A job has a file descriptor that becomes readable when it is done. */
typedef struct wane_job wane_job;
/* WANE_OK: done. WANE_PENDING. Negative: failed, wane_error() says why. Never blocks. */
WANE_API int wane_job_poll(wane_job *job);
/* Readable once the job is done; owned by the job. -1 if none could be made. */
WANE_API int wane_job_fd(wane_job *job);
/* Blocks; timeout in nanoseconds, < 0 for none. */
WANE_API int wane_job_wait(wane_job *job, int64_t timeout_ns);
/* Asks the job to stop; it ends with WANE_E_CANCELLED soon after. Any thread. */
WANE_API void wane_job_cancel(wane_job *job);
/* Bytes or items done and in all (0 while unknown). */
WANE_API void wane_job_progress(wane_job *job, uint64_t *done, uint64_t *total);
/* Cancels if running; memory goes when the thread has left. NULL is a no-op. Never blocks. */
WANE_API void wane_job_free(wane_job *job);

/* ================================================================ 4. Streams */

typedef struct wane_stream wane_stream;
/* Opens a stream on a device ("cpu"). */
WANE_API int wane_stream_open(wane_stream **out, const char *device);
/* Never waits; tensors left over become stale-safe and memory goes with the last of them. NULL is a no-op. */
WANE_API void wane_stream_close(wane_stream *s);
/* Ticket of the newest op: done when the stream has run everything enqueued so far. */
WANE_API uint64_t wane_stream_tail(wane_stream *s);
/* WANE_OK: the op of this ticket ran; WANE_PENDING; or why it did not (WANE_E_CANCELLED, _FAILED, _FORKED). Never blocks. */
WANE_API int wane_stream_poll(wane_stream *s, uint64_t ticket);
/* Like poll; on WANE_PENDING the stream's fd becomes readable when the ticket retires. One armed ticket a stream. */
WANE_API int wane_stream_arm(wane_stream *s, uint64_t ticket);
WANE_API int wane_stream_fd(wane_stream *s);
/* Blocks the calling thread; timeout in nanoseconds, < 0 for none (WANE_E_TIMEOUT). */
WANE_API int wane_stream_wait(wane_stream *s, uint64_t ticket, int64_t timeout_ns);
/* Skips everything enqueued; chunks already claimed finish. Any thread, signal handlers too. The next call reports it once. */
WANE_API void wane_stream_cancel(wane_stream *s);
/* Gives pooled blocks of at least `bytes` back to the system. */
WANE_API void wane_stream_trim(wane_stream *s, size_t bytes);
/* Bytes in the stream's pool (used and free). */
WANE_API size_t wane_stream_pool_bytes(wane_stream *s);

/* A scope owns the tensors made while it is current and frees them at once when it is closed. Several may be open (one a
 * coroutine); exactly one, or none, is current. */
typedef struct wane_scope wane_scope;
WANE_API int wane_scope_open(wane_stream *s, wane_scope **out);       /* becomes current; its parent is the one before */
WANE_API wane_scope *wane_scope_swap(wane_stream *s, wane_scope *scope);  /* makes scope (or none: NULL) current, returns the old one */
WANE_API void wane_scope_close(wane_stream *s, wane_scope *scope);    /* frees its tensors; its parent becomes current if it was current */

/* ================================================================ 5. Tensors */

enum {
  WANE_F32 = 0, WANE_F16, WANE_BF16, WANE_I8, WANE_U8, WANE_I32, WANE_I64, WANE_BOOL, WANE_DTYPE_PLAIN,
  /* stored kinds: files hold them, no tensor does. A load turns f64 and i16 into floats and quantized kinds, i16 into i32 as well */
  WANE_F64 = 10, WANE_I16 = 11,
  /* quantized kinds: one logical [N, K] matrix in several parts, see section 6 */
  WANE_NF4 = 16, WANE_FP4, WANE_INT8, WANE_BLOCK8, WANE_BLOCK8U,
  /* GGUF block kinds: bytes as the file holds them, values of a row contiguous */
  WANE_Q4_0 = 32, WANE_Q4_1, WANE_Q5_0, WANE_Q5_1, WANE_Q8_0, WANE_Q2_K, WANE_Q3_K, WANE_Q4_K, WANE_Q5_K, WANE_Q6_K,
  WANE_IQ4_NL, WANE_IQ4_XS, WANE_MXFP4, WANE_NVFP4, WANE_TQ1_0, WANE_TQ2_0,
  WANE_IQ1_S, WANE_IQ1_M, WANE_IQ2_XXS, WANE_IQ2_XS, WANE_IQ2_S, WANE_IQ3_XXS, WANE_IQ3_S,
  WANE_DTYPE_END
};
/* "f32", "nf4", "q4_k"; NULL for an unknown number. */
WANE_API const char *wane_dtype_name(int dtype);
/* -1 if there is no such name. */
WANE_API int wane_dtype_from_name(const char *name);
/* Bytes of `n` consecutive values; -1 if n is no multiple of the dtype's block (GGUF kinds) or the kind has several parts. */
WANE_API int64_t wane_dtype_bytes(int dtype, int64_t n);

typedef struct wane_tensor wane_tensor;
/* flags: 1 if a scope owned the tensor when the handle was made (nobody else need free it). */
typedef struct wane_handle { wane_tensor *t; uint32_t gen; uint32_t flags; } wane_handle;

typedef struct wane_info {
  int32_t dtype, ndim;
  int64_t shape[8];
  int64_t stride[8];         /* elements; 0 in quantized kinds */
  int64_t numel;
  int64_t nbytes;            /* of the values (all parts of a quantized kind) */
  uint64_t ticket;           /* of the op that wrote it last */
  int32_t contiguous;
  int32_t block_size;        /* quantized kinds: values a scale; 0 elsewhere */
} wane_info;
/* Fills `out`. Never waits: shape and dtype are known when an op is enqueued. */
WANE_API int wane_tensor_info(const wane_handle *h, wane_info *out);
/* Uninitialised tensor. Plain dtypes only. */
WANE_API int wane_tensor_new(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape);
/* Uninitialised tensor outside the stream's pool, for weights and caches: pages are reserved, and touched on first use. */
WANE_API int wane_tensor_new_paged(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape);
/* Zeros in shared memory over a nameless file in directory `dir`: pages that the system may write out when memory is short, and reads back on
 * use. WANE_E_IO where the disk has no room for all of it. Plain dtypes only. */
WANE_API int wane_tensor_new_file(wane_stream *s, wane_handle *out, const char *dir, int dtype, int ndim, const int64_t *shape);
/* Copies host data (row-major, contiguous, bytes = numel * size) in, through a staging copy; `data` may go at return. */
WANE_API int wane_tensor_upload(wane_stream *s, const wane_handle *t, const void *data, size_t bytes);
/* Copies a contiguous tensor's bytes out. WANE_PENDING while ops are still writing it: wait for info.ticket, call again. */
WANE_API int wane_tensor_read(wane_stream *s, const wane_handle *t, void *data, size_t bytes);
/* 1 if nothing else holds this tensor or shares its values (another handle, a view), so that writing it in place is nobody else's business; else 0. */
WANE_API int wane_tensor_sole(const wane_handle *t);
/* Another handle on the same tensor (same scope rules as a new tensor). */
WANE_API int wane_tensor_retain(wane_stream *s, wane_handle *out, const wane_handle *t);
/* Drops the handle; empties it. Safe on an empty, stale or already freed handle, and after its stream was closed. */
WANE_API void wane_tensor_free(wane_handle *t);
/* Takes the tensor out of its scope: into `scope`, or into none (NULL: the caller frees it). */
WANE_API int wane_tensor_move(wane_stream *s, const wane_handle *t, wane_scope *scope);
/* Address of element 0 in host memory; only valid when idle. For tests, debuggers and zero-copy hosts. NULL with an error. */
WANE_API void *wane_tensor_data(wane_stream *s, const wane_handle *t);

/* Views share memory; nothing is enqueued. dim counts from 0. */
WANE_API int wane_view_narrow(wane_stream *s, wane_handle *out, const wane_handle *t, int dim, int64_t start, int64_t length, int64_t step);
WANE_API int wane_view_select(wane_stream *s, wane_handle *out, const wane_handle *t, int dim, int64_t index);
WANE_API int wane_view_permute(wane_stream *s, wane_handle *out, const wane_handle *t, const int32_t *order);
/* One size may be -1. WANE_E_SHAPE when the strides do not allow it without a copy. */
WANE_API int wane_view_reshape(wane_stream *s, wane_handle *out, const wane_handle *t, int ndim, const int64_t *shape);
/* numpy's broadcasting: sizes of 1 repeat, dimensions may be added in front. */
WANE_API int wane_view_expand(wane_stream *s, wane_handle *out, const wane_handle *t, int ndim, const int64_t *shape);
/* Any shape and strides (>= 0, in elements; 0 repeats) over a contiguous tensor's values, from its first: torch's as_strided. WANE_E_SHAPE
 * where that would reach past the last value. */
WANE_API int wane_view_strided(wane_stream *s, wane_handle *out, const wane_handle *t, int ndim, const int64_t *shape, const int64_t *stride);

/* ================================================================ 6. Quantized tensors
 *
 * A quantized tensor is a logical [N, K] (or [n]) matrix whose dtype is a quantized kind; its parts are plain tensors in
 * bitsandbytes' own bytes, in files and in memory:
 *   WANE_NF4, WANE_FP4   codes u8 [ceil(n/2)] (element 2k in the high nibble), absmax f32 [ceil(n/bs)] over the FLAT tensor; or
 *                        nested: absmax u8 [nb = ceil(n/bs)], nested_absmax f32 [ceil(nb/256)], nested_code f32 [256], offset f32 [1]
 *   WANE_BLOCK8(U)       codes u8 [N, K], absmax f32 [ceil(n/bs)], code f32 [256] (the stored map is obeyed)
 *   WANE_INT8            codes i8 [N, K], absmax f32 [N] (SCB: the row's absolute maximum)
 *   GGUF kinds           codes u8 [N, bytes of a row]
 * Sources: bitsandbytes functional.py, csrc/kernels.cu; ggml-common.h. */
enum { WANE_PART_CODES = 0, WANE_PART_ABSMAX = 1, WANE_PART_NESTED_ABSMAX = 2, WANE_PART_NESTED_CODE = 3, WANE_PART_CODE = 4,
       WANE_PART_OFFSET = 5, WANE_PARTS = 6 };
/* Makes a quantized tensor from parts (retained, contiguous). `parts` has WANE_PARTS pointers, NULL where the kind has none.
 * Where parts[WANE_PART_OFFSET] is NULL and the scales are nested, the offset part is made from nested_offset. */
WANE_API int wane_quantized_new(wane_stream *s, wane_handle *out, int dtype, int ndim, const int64_t *shape, int block_size,
                                float nested_offset, const wane_handle *const *parts);
/* One part as a tensor of its own (shares memory). WANE_E_NOTFOUND if the kind has no such part. */
WANE_API int wane_quantized_part(wane_stream *s, wane_handle *out, const wane_handle *q, int part);
/* The nested offset as a number. WANE_PENDING while it is being computed (wait for the stream, call again). */
WANE_API int wane_quantized_offset(const wane_handle *q, float *offset);
/* Quantizes a float tensor (f32, f16, bf16). block_size: 32..4096 for 4-bit (64 usual), any > 0 for BLOCK8, ignored for INT8.
 * nested: double quantization of the 4-bit scales (blocks of 256). */
WANE_API int wane_quantize(wane_stream *s, wane_handle *out, const wane_handle *x, int dtype, int block_size, int nested);
/* Exact values in f32; f16 and bf16 are that f32 value rounded. Plain float inputs are cast. */
WANE_API int wane_dequantize(wane_stream *s, wane_handle *out, const wane_handle *q, int dtype);

/* ================================================================ 7. Linear products */

enum { WANE_COMPUTE_F32 = 0, WANE_COMPUTE_BF16 = 1, WANE_COMPUTE_F16 = 2, WANE_COMPUTE_FAST = 3, WANE_COMPUTE_INVARIANT = 16 };
/* y[..., n] = sum_k x[..., k] W[n, k] + bias[n].   x [..., K] f32/bf16/f16, W [N, K] any dtype, bias [N] float (optional).
 * y has x's dtype. compute: WANE_COMPUTE_F32 exact f32 products of the dequantized weight; _BF16 any kernel at least as accurate
 * as bf16 x bf16 with f32 sums; _F16; _FAST may be less accurate; | WANE_COMPUTE_INVARIANT one order whatever the row count.
 * threshold: WANE_INT8 only: > 0 LLM.int8() with outlier columns, 0 without, < 0 weight-only (exact dequantized product).
 * Source: bitsandbytes autograd/_functions.py (MatMul8bitLt, MatMul4Bit). */
WANE_API int wane_linear(wane_stream *s, wane_handle *y, const wane_handle *x, const wane_handle *w, const wane_handle *bias,
                         int compute, float threshold);
/* Gradient of the input of wane_linear: dx[..., k] = sum_n dy[..., n] W[n, k] with the dequantized weight. */
WANE_API int wane_linear_backward(wane_stream *s, wane_handle *dx, const wane_handle *dy, const wane_handle *w, int compute);

/* ---- low-rank adapters in training: y += scale * (drop(x) A^T) B^T and its gradients, each a pass over what is large. x, y, dx, dy: f32, f16 or
 * bf16 [..., K] or [..., N], M rows in all; A [r, K], B [N, r], u, du [M, r]: f32, 1 <= r <= 256; f32 sums. drop(x): element i of x, counted from
 * 0 over the whole tensor, is 0 where the uniform f32 number of element i of wane_random(seed, offset) is below p, else x[i] / (1 - p); 0 <= p < 1,
 * p = 0 draws nothing. The backward of a product takes the p, seed and offset of its forward. In-place arguments must be contiguous.
 * Source: Hu et al. 2021 (LoRA); peft lora/layer.py. ---- */
/* u[m][j] = scale * sum_k drop(x)[m][k] A[j][k]. */
WANE_API int wane_lora_down(wane_stream *s, wane_handle *u, const wane_handle *x, const wane_handle *A, double scale, double p, uint64_t seed,
                            uint64_t offset);
/* y[m][n] += sum_j u[m][j] B[n][j], in place. */
WANE_API int wane_lora_up(wane_stream *s, const wane_handle *y, const wane_handle *u, const wane_handle *B);
/* Of both, for u with its scale: du[m][j] = scale * sum_n dy[m][n] B[n][j], the gradient of drop(x) A^T; dB[n][j] = sum_m dy[m][n] u[m][j] (NULL where it
 * is not wanted). */
WANE_API int wane_lora_up_backward(wane_stream *s, wane_handle *du, wane_handle *dB, const wane_handle *dy, const wane_handle *u, const wane_handle *B,
                                   double scale);
/* dA[j][k] = sum_m du[m][j] drop(x)[m][k]; and dx[m][k] += sum_j du[m][j] A[j][k] where x[m][k] was kept, times 1 / (1 - p), in place (NULL where it is not
 * wanted). dx has x's shape and dtype. */
WANE_API int wane_lora_down_backward(wane_stream *s, const wane_handle *dx, wane_handle *dA, const wane_handle *du, const wane_handle *x,
                                     const wane_handle *A, double p, uint64_t seed, uint64_t offset);
typedef struct wane_lora_options {
  double scale, p;           /* of B (A drop(x)); the probability of dropping an element of x */
  uint64_t seed, offset;     /* of the mask; see above */
} wane_lora_options;
/* wane_linear, wane_lora_down and wane_lora_up at once: y = x W^T + bias + u B^T, u = scale * drop(x) A^T (to be kept for backward). Where tiles multiply
 * (AMX and AMD's AVX512-BF16, not with WANE_COMPUTE_F32 or LLM.int8()), the adapter is a few more values of the product's own sums: y is rounded once and
 * never read. onto (or NULL): a tensor of y's shape and dtype that is added too; where tiles multiply and there is no bias, before that one rounding. Another adapter
 * that wane_lora_up adds to such a y is rounded at onto's scale: add onto last where there are several. */
WANE_API int wane_linear_lora(wane_stream *s, wane_handle *y, wane_handle *u, const wane_handle *x, const wane_handle *w, const wane_handle *bias, const wane_handle *A,
                              const wane_handle *B, const wane_lora_options *options, int compute, float threshold, const wane_handle *onto);
/* Its gradients: dx (NULL: not wanted) in dy's dtype; dA, dB f32. onto (or NULL): a gradient of x that came another way, in dy's dtype and contiguous; where the
 * kernels can, dx is added to it with one rounding, *added is 1 and dx is left alone, else *added is 0 (added may be NULL without onto). If the call fails
 * after the addition was enqueued, onto holds it: drop both. */
WANE_API int wane_linear_lora_backward(wane_stream *s, wane_handle *dx, wane_handle *dA, wane_handle *dB, const wane_handle *dy, const wane_handle *x, const wane_handle *u,
                                       const wane_handle *w, const wane_handle *A, const wane_handle *B, const wane_lora_options *options, int compute,
                                       const wane_handle *onto, int *added);

/* ---- mixtures of experts: each row of x times one of several weights. Which one is known on the device only: nothing waits for it. ---- */
/* Sorts the choices ids [M, k] (i32 or i64, each in [0, experts)) by expert, in the order of rows within one. source i32 [M*k]: sorted row p
 * is row source[p] of x. place i32 [M, k]: the sorted row of choice (m, j). bounds i32 [experts + 1]: expert e has the sorted rows bounds[e] to
 * bounds[e + 1] - 1. A choice out of range fails the op. At most 4096 experts. */
WANE_API int wane_route(wane_stream *s, wane_handle *source, wane_handle *place, wane_handle *bounds, const wane_handle *ids, int64_t experts);
/* y[p][n] = sum_k x[p][k] W_e[n][k] for the rows p of expert e by `bounds` of wane_route. x [P, K] f32, f16 or bf16; weights: one [N, K] an
 * expert, contiguous, dtypes may differ; y [P, N] in x's dtype. The work is that of the chosen products, each computed as wane_linear does for
 * the rows of that expert alone (few rows and many rows, LLM.int8()'s outlier columns). compute, threshold: as for wane_linear. The rows of
 * bounds must lie within x: pass what wane_route gave for the choices that x was gathered by. */
WANE_API int wane_linear_experts(wane_stream *s, wane_handle *y, const wane_handle *x, const wane_handle *bounds, const wane_handle *const *weights,
                                 int64_t experts, int compute, float threshold);

/* ================================================================ 8. General tensor ops (any strides, broadcasting like numpy's) */

/* dtype conversion and/or layout: a contiguous copy of t as `dtype`. f32 -> i8… truncates toward zero, saturating; bool is != 0. */
WANE_API int wane_cast(wane_stream *s, wane_handle *out, const wane_handle *t, int dtype);
/* dst[...] = src, broadcast and converted; dst may be any view but an expanded one (WANE_E_ARG). The two may overlap. */
WANE_API int wane_copy(wane_stream *s, const wane_handle *dst, const wane_handle *src);
WANE_API int wane_fill(wane_stream *s, const wane_handle *t, double value);

enum { WANE_NEG, WANE_ABS, WANE_SQRT, WANE_RSQRT, WANE_EXP, WANE_LOG, WANE_SIN, WANE_COS, WANE_TANH, WANE_SIGMOID, WANE_FLOOR, WANE_CEIL,
       WANE_ROUND /* half to even */, WANE_SIGN, WANE_NOT, WANE_ISNAN, WANE_ISFINITE, WANE_RECIPROCAL, WANE_SQUARE,
       WANE_RELU, WANE_SILU, WANE_GELU /* erf */, WANE_GELU_TANH, WANE_QUICK_GELU, WANE_ERF, WANE_UNARY_END };
/* Floats keep their dtype; integers too for neg, abs, sign, square, relu and become f32 elsewhere; not/isnan/isfinite give bool. */
WANE_API int wane_unary(wane_stream *s, wane_handle *out, const wane_handle *x, int op);

enum { WANE_ADD, WANE_SUB, WANE_MUL, WANE_DIV, WANE_POW, WANE_MIN, WANE_MAX, WANE_MOD /* sign of the divisor, as Lua's */, WANE_ATAN2,
       WANE_EQ, WANE_NE, WANE_LT, WANE_LE, WANE_GT, WANE_GE, WANE_AND, WANE_OR, WANE_XOR, WANE_BINARY_END };
/* Result dtype: comparisons and logic bool; else the wider of the two (bool < u8, i8 < i32 < i64 < f16, bf16 < f32; u8 with i8
 * gives i32, f16 with bf16 f32; integer / integer gives f32). Computed in f32 (integers: i64, two's complement wrap; modulo 0 is 0, a
 * negative power of anything but 1 and -1 is 0). */
WANE_API int wane_binary(wane_stream *s, wane_handle *out, const wane_handle *a, const wane_handle *b, int op);
/* a op value (or value op a when `reversed`): the scalar does not widen a float a; with an integer a and a fractional value, or a
 * negative power, f32; bool with a whole value gives i64 (true + 1 is 2). */
WANE_API int wane_binary_scalar(wane_stream *s, wane_handle *out, const wane_handle *a, double value, int op, int reversed);
/* out = cond ? a : b, broadcast. */
WANE_API int wane_where(wane_stream *s, wane_handle *out, const wane_handle *cond, const wane_handle *a, const wane_handle *b);

enum { WANE_SUM, WANE_MEAN, WANE_AMAX, WANE_AMIN, WANE_PROD, WANE_ARGMAX, WANE_ARGMIN, WANE_ANY, WANE_ALL, WANE_NORM2, WANE_VAR /* biased */, WANE_REDUCE_END };
/* Over `dim`, or over everything when dim == -1. argmax/argmin: i64, lowest index on ties. Sums in f32 pairwise / fixed chunks (f64
 * inside a chunk allowed), integers in i64. NaN propagates in amax/amin. */
WANE_API int wane_reduce(wane_stream *s, wane_handle *out, const wane_handle *x, int op, int dim, int keepdim);
WANE_API int wane_cumsum(wane_stream *s, wane_handle *out, const wane_handle *x, int dim);
WANE_API int wane_arange(wane_stream *s, wane_handle *out, double start, double stop, double step, int dtype);
enum { WANE_UNIFORM, WANE_NORMAL };
/* Philox 4x32-10 counter generator: element i depends on (seed, offset + i) only. uniform: [a, b), for integers floor(a + (b - a) u);
 * normal: mean a, std b (Box & Muller 1958). The same bits at every CPU level; see random_kernels.h. */
WANE_API int wane_random(wane_stream *s, wane_handle *out, int kind, double a, double b, uint64_t seed, uint64_t offset, int dtype, int ndim, const int64_t *shape);
/* Batched product of the last two dimensions, numpy.matmul's rules (1-D operands too). f32 sums. */
WANE_API int wane_matmul(wane_stream *s, wane_handle *out, const wane_handle *a, const wane_handle *b);
WANE_API int wane_cat(wane_stream *s, wane_handle *out, const wane_handle *const *tensors, int count, int dim);
/* Stable; values and indices (i64) are optional outs. NaN sorts last either way; -0 equals 0. topk: in order, equals by lowest index. */
WANE_API int wane_sort(wane_stream *s, wane_handle *values, wane_handle *indices, const wane_handle *x, int dim, int descending);
WANE_API int wane_topk(wane_stream *s, wane_handle *values, wane_handle *indices, const wane_handle *x, int64_t k, int dim, int largest);
/* out[i...] = x with `dim` replaced by index's shape (i32 or i64, 0-based, negative counts from the end). Out of range fails the op. */
WANE_API int wane_index_select(wane_stream *s, wane_handle *out, const wane_handle *x, int dim, const wane_handle *index);
/* numpy.take_along_axis. */
WANE_API int wane_gather(wane_stream *s, wane_handle *out, const wane_handle *x, int dim, const wane_handle *index);

/* ================================================================ 9. Neural network ops */

/* rows of table [V, C] (any float dtype or a quantized kind) for ids [...] (i32 or i64) -> [..., C] as `dtype`. An id outside [0, V) fails the op. */
WANE_API int wane_embedding(wane_stream *s, wane_handle *out, const wane_handle *table, const wane_handle *ids, int dtype);
/* x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over the last dimension; f32 inside. weight [C] optional. (modeling_llama.py LlamaRMSNorm; offset 1: Gemma) */
WANE_API int wane_rms_norm(wane_stream *s, wane_handle *out, const wane_handle *x, const wane_handle *weight, double eps, double weight_offset);
/* (x - mean) / sqrt(var + eps) * weight + bias, biased variance. weight, bias optional. */
WANE_API int wane_layer_norm(wane_stream *s, wane_handle *out, const wane_handle *x, const wane_handle *weight, const wane_handle *bias, double eps);
/* Rotary embedding of x [B, T, H, D] (last dimension contiguous) on the first 2*R dims, R = length of inv_freq f32 [R]. position of (b, t): positions [B, T] or [1, T] i32
 * (optional) else start + t. interleaved: pairs (2j, 2j+1), else (j, j+R). cos and sin are f32 and multiplied by `scale`. */
WANE_API int wane_rope(wane_stream *s, wane_handle *out, const wane_handle *x, const wane_handle *inv_freq, const wane_handle *positions,
                       int64_t start, double scale, int interleaved);
/* Writes k or v [B, T, H, D] into cache [B, H, capacity, D] at time `start`; converts to the cache's dtype. */
WANE_API int wane_kv_append(wane_stream *s, const wane_handle *cache, const wane_handle *x, int64_t start);
typedef struct wane_attention_options {
  double scale;                 /* of q.k; 0 means 1/sqrt(D) */
  double softcap;               /* c * tanh(score / c); 0: none */
  int64_t q_start;              /* absolute time of q's first row; keys run from 0 to kv_length - 1 */
  int64_t kv_length;            /* valid keys in the cache */
  int64_t window;               /* sliding window: key j visible iff i - window < j; 0: none */
  int32_t causal;               /* key j visible iff j <= i */
  int32_t reserved;
} wane_attention_options;
/* q [B, T, H, D]; k, v [B, KV, capacity, D] (a cache, any float dtype); key_mask [B, >= kv_length] u8 or bool (optional, 0 = hidden); bias f32,
 * broadcastable to [B, H, T, kv_length] (optional: ALiBi, T5). H a multiple of KV: head h reads kv head h / (H/KV). Output [B, T, H, D] in q's
 * dtype. A row that sees no key gives 0. Blockwise (Milakov & Gimelshein 2018; Dao 2022): memory linear in time. Long contexts are cut in
 * fixed-size pieces combined in fixed order. */
WANE_API int wane_attention(wane_stream *s, wane_handle *out, const wane_handle *q, const wane_handle *k, const wane_handle *v,
                            const wane_handle *key_mask, const wane_handle *bias, const wane_attention_options *options);
/* act(gate) * up, one pass. act: a unary op code (WANE_SILU, WANE_GELU_TANH, …). Same shapes. */
WANE_API int wane_glu(wane_stream *s, wane_handle *out, const wane_handle *gate, const wane_handle *up, int act);
/* softmax (or log-softmax) of x over `dim`, f32 inside, x's dtype out. A slice of nothing but -inf gives NaN, as upstream's. */
WANE_API int wane_softmax(wane_stream *s, wane_handle *out, const wane_handle *x, int dim, int log);
/* -log softmax(logits)[label] a row: logits [M, V] float, labels [M] i32/i64 (ignore_index rows give 0) -> f32 [M]. Any other label
 * outside [0, V) fails the op. */
WANE_API int wane_nll(wane_stream *s, wane_handle *out, const wane_handle *logits, const wane_handle *labels, int64_t ignore_index);

/* ---- choosing the next token. logits [B, V] f32 in place; ids [B, capacity] i32: the running sequences (prompt and pads included) ---- */
/* CTRL penalty of every id in ids[b, 0..length): s < 0 ? s * p : s / p, once an id. (RepetitionPenaltyLogitsProcessor) */
WANE_API int wane_repetition_penalty(wane_stream *s, const wane_handle *logits, const wane_handle *ids, int64_t length, double penalty);
/* Bans every id that followed an earlier occurrence of the last n-1 ids. (NoRepeatNGramLogitsProcessor) */
WANE_API int wane_no_repeat_ngram(wane_stream *s, const wane_handle *logits, const wane_handle *ids, int64_t length, int64_t n);
/* logits[b, id] = -inf (or value) for each of the given ids [n] i32. */
WANE_API int wane_logits_set(wane_stream *s, const wane_handle *logits, const wane_handle *which, double value);
/* temperature (> 0, 1 = off), top_k (0 = off, ties kept), top_p (1 = off), min_p (0 = off), in transformers' order; removed = -inf. At
 * least one logit a row stays. A row that holds NaN or +inf is left alone: wane_sample reports it. */
WANE_API int wane_logits_filter(wane_stream *s, const wane_handle *logits, double temperature, int64_t top_k, double top_p, double min_p);
/* One draw a row from softmax(logits): id [B] i32, by the inverse of the cumulated probabilities in index order. The u of row b is
 * Philox(seed, offset + b). A row with NaN or +inf, or with nothing left, fails the op. */
WANE_API int wane_sample(wane_stream *s, wane_handle *out, const wane_handle *logits, uint64_t seed, uint64_t offset);

/* ================================================================ 10. Training: gradients, dropout
 *
 * A gradient takes what its op took and the gradient dy of what it gave. */

/* wane_attention with what its gradient needs: lse f32 [B, H, T], the logarithm (of base 2) of the sum of a row's weights, +inf for a row that sees
 * no key. k, v: views [B, KV, keys, D] of any strides with a dense last dimension; training passes [B, keys, KV, D] with the middle swapped.
 * first i32 [B, T] (optional): row t of b sees no key before first[b][t]: several samples packed into a row. */
WANE_API int wane_attention_train(wane_stream *s, wane_handle *out, wane_handle *lse, const wane_handle *q, const wane_handle *k, const wane_handle *v,
                                  const wane_handle *key_mask, const wane_handle *bias, const wane_handle *first, const wane_attention_options *options);
/* Its gradient, from out and lse as it gave them: dq [B, T, H, D] in q's dtype; dk, dv [B, kv_length, KV, D], contiguous, in those of k and v; dbias
 * (NULL where it is not wanted) f32 in bias's own shape, summed over what the bias was repeated over. Blockwise, the weights are computed again
 * (Dao 2022): nothing of size [T, keys] is kept but dbias itself. */
WANE_API int wane_attention_backward(wane_stream *s, wane_handle *dq, wane_handle *dk, wane_handle *dv, wane_handle *dbias, const wane_handle *dout,
                                     const wane_handle *out, const wane_handle *lse, const wane_handle *q, const wane_handle *k, const wane_handle *v,
                                     const wane_handle *key_mask, const wane_handle *bias, const wane_handle *first, const wane_attention_options *options);
/* dx = dy * f'(x) of wane_unary, in x's dtype; 0 where f has steps (sign, floor, ceil, round). WANE_E_ARG for not, isnan, isfinite. */
WANE_API int wane_unary_backward(wane_stream *s, wane_handle *dx, const wane_handle *dy, const wane_handle *x, int op);
/* Of wane_glu, both in gate's dtype: dgate = dy * up * act'(gate), dup = dy * act(gate). */
WANE_API int wane_glu_backward(wane_stream *s, wane_handle *dgate, wane_handle *dup, const wane_handle *dy, const wane_handle *gate, const wane_handle *up, int act);
/* Of softmax over `dim`, from its result y: dx = y * (dy - sum(dy * y)). */
WANE_API int wane_softmax_backward(wane_stream *s, wane_handle *dx, const wane_handle *dy, const wane_handle *y, int dim);
/* Of wane_embedding and of wane_index_select along the first dimension: out f32 [n, C] is 0 but for out[index[i]] += src[i], src [.., C],
 * index [..] i32 or i64; rows are added in their order. An index outside [0, n) fails the op. */
WANE_API int wane_scatter_add(wane_stream *s, wane_handle *out, const wane_handle *src, const wane_handle *index, int64_t n);
/* Of wane_topk over rows of n: dx [M, n] is dvalues [M, k] at indices [M, k] (i64, as wane_topk gives them) and 0 elsewhere. */
WANE_API int wane_topk_backward(wane_stream *s, wane_handle *dx, const wane_handle *dvalues, const wane_handle *indices, int64_t n);
/* y = x / (1 - p) where element i is kept, else 0. It is kept where the uniform number that wane_random gives element offset + i under
 * `seed` is at least p: the same call on dy is the gradient. 0 <= p < 1. */
WANE_API int wane_dropout(wane_stream *s, wane_handle *y, const wane_handle *x, double p, uint64_t seed, uint64_t offset);
/* dst += factor * src, in place. dst f32, contiguous; src any float dtype, of the same shape. */
WANE_API int wane_add_into(wane_stream *s, const wane_handle *dst, const wane_handle *src, double factor);
/* Of wane_linear_experts: dx[p] = dy[p] W_e for the rows p of expert e, in dy's dtype; dy [P, N], weights and bounds as there. */
WANE_API int wane_linear_experts_backward(wane_stream *s, wane_handle *dx, const wane_handle *dy, const wane_handle *bounds, const wane_handle *const *weights,
                                          int64_t experts, int compute);
/* The weights' part: dw f32 [experts, N, K], dw[e] = the sum over the rows p of expert e, in their order, of dy[p] (outer) x[p]. */
WANE_API int wane_experts_weight_backward(wane_stream *s, wane_handle *dw, const wane_handle *dy, const wane_handle *x, const wane_handle *bounds, int64_t experts);

/* dx in x's dtype; dweight, dbias f32 [C] (each NULL where it is not wanted; dbias only together with dweight). onto (or NULL): a gradient of x that came
 * another way; where it is contiguous, has x's shape and dtype and shares no memory with x and dy, dx is added to it in place, rounded once, and *dx stays as it was. */
WANE_API int wane_rms_norm_backward(wane_stream *s, wane_handle *dx, wane_handle *dweight, const wane_handle *dy, const wane_handle *x,
                                    const wane_handle *weight, double eps, double weight_offset, const wane_handle *onto);
WANE_API int wane_layer_norm_backward(wane_stream *s, wane_handle *dx, wane_handle *dweight, wane_handle *dbias, const wane_handle *dy,
                                      const wane_handle *x, const wane_handle *weight, double eps, const wane_handle *onto);
/* dlogits of sum_m scale[m] * nll[m]. */
WANE_API int wane_nll_backward(wane_stream *s, wane_handle *dlogits, const wane_handle *logits, const wane_handle *labels, const wane_handle *scale, int64_t ignore_index);
/* The same of a head, without the scores ever being in memory: nll f32 [M] of x W^T and dx of factor * its sum, in x's dtype; x [M, K], W [V, K] any
 * dtype that wane_linear takes, labels [M] i32 or i64. Scores f32, their gradient bf16 on its way into dx. Source of the idea: Wijmans et al. 2024 (Cut Your
 * Losses). Only where wane_linear_nll_fits says 1 (AMX and AMD's AVX512-BF16, not with WANE_COMPUTE_F32, rows of W not too long): a head is else wane_linear,
 * wane_nll_with_gradient, wane_linear_backward. */
WANE_API int wane_linear_nll(wane_stream *s, wane_handle *nll, wane_handle *dx, const wane_handle *x, const wane_handle *w, const wane_handle *labels, double factor,
                             int64_t ignore_index, int compute);
/* 1 if wane_linear_nll takes this weight at the instruction-set level in force, else 0. */
WANE_API int wane_linear_nll_fits(const wane_handle *w, int compute);
/* wane_nll and the gradient of factor * its sum at once, while a row is in the cache: nll f32 [M]; dlogits [M, V] in `dtype`, a float one, rounded once. */
WANE_API int wane_nll_with_gradient(wane_stream *s, wane_handle *nll, wane_handle *dlogits, const wane_handle *logits, const wane_handle *labels, double factor,
                                    int64_t ignore_index, int dtype);

/* ---- optimizers. Sources: torch.optim, bitsandbytes optim/ and csrc/kernels.cu; decay comes before the step, as torch has it. ---- */
enum {
  WANE_OPTIMIZER_ADAM,       /* p *= 1 - lr wd; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps).
                              * Adam and AdamW differ in their default wd alone. (Loshchilov & Hutter 2019) */
  WANE_OPTIMIZER_SGD,        /* g += wd p; m = g at step 1, else beta1 m + g; p -= lr m */
  WANE_OPTIMIZER_LION,       /* p *= 1 - lr wd; p -= lr sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g (Chen et al. 2023) */
  WANE_OPTIMIZER_RMSPROP,    /* g += wd p; v = b1 v + (1 - b1) g^2; p -= lr g / (sqrt(v) + eps) */
  WANE_OPTIMIZER_ADAGRAD,    /* g += wd p; v += g^2; p -= lr g / (sqrt(v) + eps) */
  WANE_OPTIMIZER_END
};
typedef struct wane_optimizer_options {
  int32_t kind;              /* WANE_OPTIMIZER_… */
  int32_t upstream;          /* 8-bit second moments are rounded as bitsandbytes does: a small positive one may become 0. Default: it becomes the
                              * smallest code, because an element that then gets no gradient would move by lr m / eps */
  int64_t step;              /* of this parameter, from 1 */
  double lr, beta1, beta2, eps, weight_decay;
} wane_optimizer_options;
/* One step, in place. param: contiguous floats; grad: floats of as many values; m, v: the moments that the kind keeps (NULL otherwise), f32 without
 * scales, or u8 codes (signed dynamic map for m and for a sole v, unsigned for Adam's v) with absmax f32, one for every 256 values; all zeros at
 * first. The step is taken with the moments before they are rounded. factor f32 [1] (optional) multiplies the gradient (clipping, without a wait).
 * An element whose gradient, or second moment, would not be finite keeps its value and moments. */
WANE_API int wane_optimizer_step(wane_stream *s, const wane_handle *param, const wane_handle *grad, const wane_handle *m, const wane_handle *v,
                                 const wane_handle *m_absmax, const wane_handle *v_absmax, const wane_handle *factor, const wane_optimizer_options *options);

/* ---- what the machine can do at most, measured by the workers that run every other op ---- */
enum { WANE_PROBE_READ, WANE_PROBE_F32, WANE_PROBE_BF16, WANE_PROBE_I8 };
/* Enqueues one probe; the caller times it. READ: reads `buffer` (u8, contiguous) once; `rounds` is ignored. F32, BF16, I8: multiply-adds
 * in registers, the fastest instruction of the level in force, `rounds` rounds in each of 64 chunks; *operations gets the number of
 * multiplications and additions in all (0: the level has no such instruction, nothing is enqueued). */
WANE_API int wane_probe(wane_stream *s, int what, const wane_handle *buffer, int64_t rounds, double *operations);

/* ================================================================ 11. Files: indexes, mappings, loading, writing (core/reader)
 *
 * An index is the table of contents of a checkpoint: names, dtypes, shapes and places of its tensors, and its metadata. It is read
 * on a job's thread, may be asked from any one thread at a time, and keeps its files open. Every size in a file is checked before use. */
typedef struct wane_index wane_index;
/* Starts reading the headers at `path`: a .safetensors file, an *.index.json file with every shard it names (which must lie beside it),
 * or a .gguf file (version 2 or 3; the first part of several, …-00001-of-00003.gguf, brings the others). The kind is told from the
 * content. A file of torch.save (or a list of them) is only opened: its description is a pickle, which the caller reads and makes entries
 * of (wane_index_file_read, wane_index_describe); for a list, the metadata says which file each tensor should be in. */
WANE_API int wane_index_open(wane_job **out, const char *path);
/* The index that a finished job made, once; the caller owns it. WANE_PENDING while the job runs, the job's status if it failed. */
WANE_API int wane_index_take(wane_job *job, wane_index **out);
/* Drops the caller's reference. Loads in flight and mapped tensors keep what they need. NULL is a no-op. */
WANE_API void wane_index_free(wane_index *ix);

enum { WANE_FORMAT_SAFETENSORS = 1, WANE_FORMAT_GGUF = 2, WANE_FORMAT_TORCH = 3 };
typedef struct wane_entry {
  const char *name;          /* as the file spells it; owned by the index */
  const char *dtype_name;    /* as the file spells it: "F32", "F8_E4M3", "Q4_K" */
  int32_t dtype;             /* WANE_…, or -1 where wane does not read it */
  int32_t ndim;
  int64_t shape[8];          /* row-major, slowest first (GGUF's order is turned round) */
  uint64_t offset, bytes;    /* in the file */
  int32_t file;              /* which of the index's files */
  int32_t strided;           /* 1: the values do not lie in the shape's order; bytes then cover all of them and what lies between */
  int64_t stride[8];         /* strided: elements, >= 0 (0 repeats) */
} wane_entry;
/* WANE_FORMAT_… of the file that was opened. */
WANE_API int wane_index_format(const wane_index *ix);
/* Tensors. Entries are numbered from 0 in the order of the files. */
WANE_API int64_t wane_index_count(const wane_index *ix);
/* -1 if there is none of that name; no error is set. */
WANE_API int64_t wane_index_find(const wane_index *ix, const char *name);
WANE_API int wane_index_entry(const wane_index *ix, int64_t i, wane_entry *out);
WANE_API int wane_index_files(const wane_index *ix);
/* NULL outside 0 .. files - 1. */
WANE_API const char *wane_index_path(const wane_index *ix, int file);
/* Copies `bytes` bytes of an entry, from its byte `from` on. Blocks on the disk: for small things (a quantization state). */
WANE_API int wane_index_read(const wane_index *ix, int64_t i, uint64_t from, void *data, size_t bytes);

/* Bytes of a file when it was opened; 0 for a number that is none. */
WANE_API uint64_t wane_index_file_size(const wane_index *ix, int file);
/* Copies bytes of a file as they are. WANE_E_FORMAT past its end. Blocks on the disk. */
WANE_API int wane_index_file_read(const wane_index *ix, int file, uint64_t offset, void *data, size_t bytes);
/* Adds an entry to an index of format WANE_FORMAT_TORCH. Texts are copied; dtype is set from dtype_name, which is spelled as safetensors
 * does (-1, and the size is believed, for others). WANE_E_FORMAT where name, file, place, shape, strides and bytes do not fit together. */
WANE_API int wane_index_describe(wane_index *ix, const wane_entry *entry);

/* Metadata: safetensors' __metadata__ (strings), GGUF's key-value pairs, the files (as int) of the tensors of a list of torch files. */
enum { WANE_META_INT = 1, WANE_META_FLOAT, WANE_META_BOOL, WANE_META_STRING, WANE_META_ARRAY };
typedef struct wane_meta {
  int32_t kind;              /* WANE_META_… */
  int32_t item_kind;         /* arrays: of their items */
  int64_t count;             /* arrays: number of items; 1 elsewhere */
  int64_t integer;           /* int, bool (unsigned 64-bit values keep their bits) */
  double number;             /* int, float, bool */
  const char *text;          /* string: NUL-terminated, may hold NULs before its end; owned by the index */
  uint64_t length;           /* string: bytes */
} wane_meta;
WANE_API int64_t wane_index_meta_count(const wane_index *ix);
WANE_API const char *wane_index_meta_key(const wane_index *ix, int64_t i);
/* WANE_E_NOTFOUND if there is no such key. */
WANE_API int wane_index_meta(const wane_index *ix, const char *key, wane_meta *out);
/* Item i of an array (a vocabulary of 256k strings is asked item by item, never copied whole). */
WANE_API int wane_index_meta_item(const wane_index *ix, const char *key, int64_t i, wane_meta *out);

/* A tensor over the file's own bytes: a private copy-on-write mapping of the whole file, counted, which outlives the index. dtype,
 * ndim and shape say how the bytes are to be read and must fill exactly piece number `piece` (from 0) of `pieces` equal ones: the
 * entry itself (0, 1), or one of the experts that lie in it. What lies unaligned for its dtype is copied instead. The file must not be
 * truncated while it is mapped (SIGBUS): hosts that cannot rule this out load copies. */
WANE_API int wane_index_map(wane_stream *s, wane_handle *out, wane_index *ix, int64_t i, int piece, int pieces, int dtype, int ndim, const int64_t *shape);

/* A load: tensors read in chunks, converted or quantized on the compute workers while the next chunks are read (libuv's pool does
 * the reading). Holds the results and about 16 MiB of chunks. Results equal quantizing the whole tensor at once, bit for bit. */
typedef struct wane_load wane_load;
enum {
  WANE_ARRANGE_NONE = 0,
  WANE_ARRANGE_ROPE = 1,     /* rows of each head go from adjacent pairs back to half-split (GGUF's llama q and k) */
  WANE_ARRANGE_QKV = 2,      /* rows q | k | v of all heads go back to groups: some q, a k, a v (GGUF's gptneox, bloom, falcon) */
  WANE_ARRANGE_TRANSPOSE = 3 /* the entry is a float matrix [cols, rows] (GPT-2's Conv1D); shape is the result's [rows, cols] */
};
typedef struct wane_load_item {
  int64_t entry;             /* of the index */
  int32_t source;            /* dtype of the file's values (usually the entry's own): a plain dtype, a stored or a GGUF kind */
  int32_t target;            /* the same dtype (a copy), f32 f16 bf16 (values, rounded once), or NF4 FP4 INT8 BLOCK8 BLOCK8U */
  int32_t block_size;        /* target NF4, FP4: 32..4096, BLOCK8: > 0 */
  int32_t nested;            /* target NF4, FP4: double quantization */
  int32_t arrange;           /* WANE_ARRANGE_… */
  int32_t heads;             /* for ROPE and QKV */
  int32_t ndim;
  int32_t kv_heads;          /* for QKV: groups; heads / kv_heads q of each. 0: as many as heads */
  int64_t shape[8];
  int32_t piece, pieces;     /* number (from 0) of equal pieces of the entry, one of which shape fills; pieces 0 or 1: the whole */
} wane_load_item;
WANE_API int wane_load_new(wane_load **out);
/* Adds an item (numbered from 0) and checks it. The load keeps the index alive. */
WANE_API int wane_load_add(wane_load *load, wane_index *ix, const wane_load_item *item);
/* Starts it. The load belongs to the job from here on, whether this succeeds or not. wane_job_progress counts the files' bytes. */
WANE_API int wane_load_start(wane_load *load, wane_job **out);
/* Drops a load that was not started. NULL is a no-op. */
WANE_API void wane_load_free(wane_load *load);
/* Items finished so far. */
WANE_API int64_t wane_load_done(wane_job *job);
/* The tensor of an item of a finished load, once; its memory passes from the job to the tensor. */
WANE_API int wane_load_take(wane_job *job, int64_t item, wane_stream *s, wane_handle *out);

/* The lines of a text file: an index of 8 bytes a line, made in one pass on a job's thread; the file itself is never held. */
typedef struct wane_lines wane_lines;
WANE_API int wane_lines_open(wane_job **out, const char *path);
/* The lines that a finished job found, once; the caller owns them. WANE_PENDING while the job runs, the job's status if it failed. */
WANE_API int wane_lines_take(wane_job *job, wane_lines **out);
/* Lines, empty ones too; what follows the last newline is one if it is not empty. */
WANE_API int64_t wane_lines_count(const wane_lines *l);
/* XXH64 (wane_hash) of the file without a byte order mark in front, which the same pass found. */
WANE_API uint64_t wane_lines_hash(const wane_lines *l);
/* How many lines are blank: empty, or nothing but white space (C's isspace). *numbers, owned by l: which, from 0, rising; NULL where none is. */
WANE_API int64_t wane_lines_blank(const wane_lines *l, const uint64_t **numbers);
/* Bytes of line i (from 0) without its end ("\n", "\r\n") and without a byte order mark in front of the file; they are in `text` if that is at most
 * `room`. Negative: an error (WANE_E_IO where the file became shorter). Blocks on the disk. */
WANE_API int64_t wane_lines_read(const wane_lines *l, int64_t i, char *text, int64_t room);
/* NULL is a no-op. */
WANE_API void wane_lines_free(wane_lines *l);

/* A file written beside its destination and renamed over it when complete: whatever fails, the old file stays. */
typedef struct wane_writer wane_writer;
WANE_API int wane_writer_open(wane_writer **out, const char *path);
/* Writes at a place of the file; places may come in any order. */
WANE_API int wane_writer_write(wane_writer *w, uint64_t offset, const void *data, size_t bytes);
/* Flushes to the disk and renames, on a job. The writer belongs to the job from here on, whether this succeeds or not. */
WANE_API int wane_writer_finish(wane_writer *w, wane_job **out);
/* Gives the writing up and removes the unfinished file. NULL is a no-op. */
WANE_API void wane_writer_free(wane_writer *w);
enum { WANE_PATH_NONE = 0, WANE_PATH_FILE = 1, WANE_PATH_FOLDER = 2, WANE_PATH_OTHER = 3 };
WANE_API int wane_path_kind(const char *path);
/* Makes a directory and its parents; no error if it is there. */
WANE_API int wane_path_make(const char *path);
/* Flushes a directory to the disk, on a job, so that names that were given or taken in it last. What cannot be flushed (some file systems refuse
 * directories) is no error. */
WANE_API int wane_path_flush(wane_job **out, const char *path);
/* Size in bytes and time of the last change (nanoseconds since 1970) of a file; either may be NULL. */
WANE_API int wane_path_stat(const char *path, uint64_t *bytes, int64_t *changed);
/* Names in a directory but for "." and "..", in no order, each ended by a NUL. Returns the bytes that all of them take; they are in
 * `names` if that is at most `room` (names may be NULL for room 0). */
WANE_API int64_t wane_path_list(const char *path, char *names, int64_t room);

/* XXH64 (seed 0) of some bytes, as xxhsum prints it: tells damage, not malice. */
WANE_API uint64_t wane_hash(const void *data, size_t bytes);
/* The same of a whole file, on a job; a file that is empty, or no file, makes it fail. */
WANE_API int wane_hash_file(wane_job **out, const char *path);
/* What a finished job found. WANE_PENDING while the job runs, the job's status if it failed. */
WANE_API int wane_hash_take(wane_job *job, uint64_t *hash);

/* A file that one holder at a time has: made at `path` where it is not there, removed when it is let go. The lock is the kernel's (flock): that of
 * a process that was killed is free at once. On a file system that knows no locks everybody gets it. */
typedef struct wane_lock wane_lock;
/* Takes it, on a job. Where another has it for `patience` nanoseconds more, the job fails: WANE_E_TIMEOUT, and the message names the holder. */
WANE_API int wane_lock_open(wane_job **out, const char *path, int64_t patience);
/* The lock that a finished job took, once; the caller owns it. WANE_PENDING while the job runs, the job's status if it failed. */
WANE_API int wane_lock_take(wane_job *job, wane_lock **out);
/* Lets go, and removes the file (not in a child of fork). NULL is a no-op. */
WANE_API void wane_lock_free(wane_lock *l);

/* ================================================================ 12. Text (core/text)
 *
 * A tokenizer is opened by a job, which reads the large tables (tokens, merges, added tokens) of a tokenizer.json or of a GGUF file's
 * metadata. The small settings that are left are given to Lua as JSON text; Lua validates them and describes what they say: the
 * model's flags and the steps of three stages. wane_tokenizer_ready ends this; from then on the tokenizer is read-only and any
 * number of threads may use it at once. Semantics: Hugging Face's tokenizers. Texts are UTF-8; invalid parts count as U+FFFD. */
typedef struct wane_tokenizer wane_tokenizer;
typedef struct wane_encoding wane_encoding;

/* Starts reading the tokenizer at `path` (the kind is told from the content) and, if `config_path` is not NULL, the
 * tokenizer_config.json there, whose added_tokens_decoder counts as well. */
WANE_API int wane_tokenizer_open(wane_job **out, const char *path, const char *config_path);
/* The tokenizer that a finished job made, once; the caller owns it. WANE_PENDING while the job runs, the job's status if it failed. */
WANE_API int wane_tokenizer_take(wane_job *job, wane_tokenizer **out);
/* Drops the caller's reference; encodings in flight keep what they need. NULL is a no-op. */
WANE_API void wane_tokenizer_free(wane_tokenizer *t);
/* The small settings as JSON, NUL-terminated, owned by t; "" where there are none. which 0: tokenizer.json with its large members
 * (model.vocab, model.merges, added_tokens) replaced by null, or the keys "tokenizer.…" of a GGUF file as one object; 1:
 * tokenizer_config.json without added_tokens_decoder. */
WANE_API const char *wane_tokenizer_config(const wane_tokenizer *t, int which);
enum { WANE_VOCAB_JSON = 1, WANE_VOCAB_GGUF = 2 };
typedef struct wane_vocab_info {
  int32_t source;            /* WANE_VOCAB_… */
  int32_t ready;
  int64_t size;              /* highest id + 1, added tokens included */
  int64_t tokens;            /* number of tokens */
  int64_t added;             /* of these, added tokens */
  int64_t merges;
  int32_t has_scores;        /* merged in the order of scores (SentencePiece), not of a list of merges */
  int32_t reserved;
} wane_vocab_info;
WANE_API void wane_vocab_info_read(const wane_tokenizer *t, wane_vocab_info *out);

/* ---- describing (before wane_tokenizer_ready, one thread) ---- */
enum {
  WANE_MODEL_BYTE_FALLBACK = 1,   /* characters without a token become tokens <0xHH> */
  WANE_MODEL_FUSE_UNK = 2,        /* a run of unknown characters is one unknown token */
  WANE_MODEL_IGNORE_MERGES = 4,   /* a piece that is a token is that token, whatever the merges say */
  WANE_MODEL_USE_SCORES = 8       /* merge in the order of scores; WANE_E_NOTFOUND without scores */
};
/* unk_id: -1 for none (unknown characters vanish). */
WANE_API int wane_tokenizer_model(wane_tokenizer *t, int flags, int32_t unk_id);
enum {
  WANE_TOKEN_SINGLE_WORD = 1, WANE_TOKEN_LSTRIP = 2, WANE_TOKEN_RSTRIP = 4, WANE_TOKEN_NORMALIZED = 8, WANE_TOKEN_SPECIAL = 16,
  WANE_TOKEN_ADDED = 32
};
/* Adds a token, or changes the flags of one that is there. Its id: the one it has, else the next free one. */
WANE_API int wane_tokenizer_add(wane_tokenizer *t, const char *text, size_t bytes, int flags);
enum { WANE_STAGE_NORMALIZE = 0, WANE_STAGE_SPLIT = 1, WANE_STAGE_DECODE = 2 };
enum {
  WANE_STEP_NFC = 0, WANE_STEP_NFD, WANE_STEP_NFKC, WANE_STEP_NFKD, WANE_STEP_LOWERCASE,
  WANE_STEP_STRIP,            /* White_Space at the ends: WANE_STRIP_LEFT | WANE_STRIP_RIGHT */
  WANE_STEP_STRIP_ACCENTS,    /* removes category M */
  WANE_STEP_REPLACE,          /* every match of `pattern` by `content`; every stage */
  WANE_STEP_PREFIX,           /* `content` in front of every piece: WANE_PREFIX_… */
  WANE_STEP_BYTES,            /* bytes to GPT-2's printable characters; decoding: back */
  WANE_STEP_SPLIT,            /* cuts at the matches of `pattern`: WANE_SPLIT_… */
  WANE_STEP_METASPACE,        /* decoding: `content` (a character) becomes a space; in the first token nothing, unless WANE_METASPACE_KEEP_FIRST */
  WANE_STEP_BYTE_FALLBACK,    /* decoding: runs of <0xHH> become their bytes, or a U+FFFD each when these are no UTF-8 */
  WANE_STEP_FUSE,             /* decoding: all tokens become one */
  WANE_STEP_TRIM,             /* decoding: up to `flags & 0xffff` characters `content` off the start, `flags >> 16` off the end of each token */
  WANE_STEP_END
};
enum {
  WANE_STRIP_LEFT = 1, WANE_STRIP_RIGHT = 2,
  WANE_PREFIX_UNLESS_THERE = 1, WANE_PREFIX_AT_START = 2 /* only where the piece begins the input */,
  WANE_SPLIT_ISOLATED = 0, WANE_SPLIT_REMOVED, WANE_SPLIT_MERGED_WITH_PREVIOUS, WANE_SPLIT_MERGED_WITH_NEXT, WANE_SPLIT_CONTIGUOUS,
  WANE_SPLIT_INVERT = 256, WANE_METASPACE_KEEP_FIRST = 1,
  WANE_STEP_REGEX = 65536     /* SPLIT, REPLACE: the pattern is a PCRE2 pattern (UTF, UCP, MULTILINE), not a plain string */
};
/* Appends a step to a stage. WANE_E_FORMAT for a pattern that does not compile, WANE_E_ARG for a step that the stage does not have. */
WANE_API int wane_tokenizer_step(wane_tokenizer *t, int stage, int kind, const char *pattern, size_t pattern_bytes,
                                 const char *content, size_t content_bytes, int64_t flags);
/* Ends the description. */
WANE_API int wane_tokenizer_ready(wane_tokenizer *t);

/* ---- using (any number of threads) ---- */
/* Id of a token by its exact text, added tokens included; -1 if there is none (no error is set). */
WANE_API int32_t wane_tokenizer_find(const wane_tokenizer *t, const char *text, size_t bytes);
/* Text and flags (WANE_TOKEN_…) of a token; `text` is owned by t and not NUL-terminated. WANE_E_NOTFOUND if the id has no token. */
WANE_API int wane_tokenizer_token(const wane_tokenizer *t, int64_t id, const char **text, size_t *bytes, int *flags);
/* The token ids of a text, without what a template puts around it. About 10 MB/s; blocks. */
WANE_API int wane_tokenizer_encode(const wane_tokenizer *t, wane_encoding **out, const char *text, size_t bytes);
/* The same on a job's thread, for long texts. The text is copied. */
WANE_API int wane_tokenizer_encode_start(wane_tokenizer *t, wane_job **out, const char *text, size_t bytes);
/* The result of a finished encode job, once; the caller owns it. */
WANE_API int wane_encoding_take(wane_job *job, wane_encoding **out);
WANE_API int64_t wane_encoding_count(const wane_encoding *e);
/* Owned by the encoding. */
WANE_API const int32_t *wane_encoding_ids(const wane_encoding *e);
/* The text that token i matched, as upstream's `tokens` shows it: the token's own, and for an added token with the space that it
 * swallowed. Not NUL-terminated, owned by e or t. WANE_E_ARG outside 0 .. count - 1. */
WANE_API int wane_encoding_token(const wane_encoding *e, const wane_tokenizer *t, int64_t i, const char **text, size_t *bytes);
WANE_API void wane_encoding_free(wane_encoding *e);
/* The text of ids. Ids without a token are left out, as upstream does; skip_special: special ones too. Writes at most `size` bytes
 * to `out` (no NUL) and sets *bytes to the length of the whole text: when it is larger than size, call again with more room. */
WANE_API int wane_tokenizer_decode(const wane_tokenizer *t, const int32_t *ids, int64_t count, int skip_special, char *out, size_t size, size_t *bytes);

/* Bytes of the longest part of a text, from its beginning, that is valid UTF-8: all of them where the text is (Unicode 15, table 3-7). */
WANE_API size_t wane_utf8_valid(const char *text, size_t bytes);

/* ---- patterns for names ---- */
/* A PCRE2 pattern (UTF, UCP) that must match the whole of a text. One thread at a time. */
typedef struct wane_pattern wane_pattern;
/* The caller owns it. WANE_E_FORMAT, with place and reason, for what does not compile. */
WANE_API int wane_pattern_new(wane_pattern **out, const char *pattern, size_t bytes);
/* NULL is a no-op. */
WANE_API void wane_pattern_free(wane_pattern *p);
/* 1 if all of `text` (ASCII, at most 1 MiB) matches, 0 if not; WANE_E_FORMAT for a pattern that would take too long on it. */
WANE_API int wane_pattern_match(wane_pattern *p, const char *text, size_t bytes);

#ifdef __cplusplus
} /* c++ */
#endif
#endif
