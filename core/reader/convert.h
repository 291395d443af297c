/* convert.h: what happens to a chunk between the file and its tensor. Internal to the loader. */
#ifndef WANE_CONVERT_H
#define WANE_CONVERT_H
#include "reader.h"

/* How a load turns one entry into one tensor. Set up on the caller's thread, constant afterwards. */
typedef struct wane_conversion {
  wane_layout to;            /* the result's parts */
  int32_t source;            /* dtype of the file's values */
  int32_t arrange, heads, kv_heads;
  int64_t grain;             /* values that are converted together: whole quantization blocks, source blocks and rows */
  int64_t unit;              /* values that are read together: the grain, and whole heads when rows are rearranged */
  char *base;                /* the result's block */
  float *scales;             /* nested: the scales in f32 until all are there; else the absmax part */
} wane_conversion;

/* Settles grain and unit; refuses what cannot be done. `name` is for messages. */
int wane_conversion_plan(wane_conversion *c, const char *name);
/* True if the file's bytes are the result's: they are read straight into it. */
int wane_conversion_is_copy(const wane_conversion *c);
/* Where byte `at` of the rearranged bytes lies in the entry's bytes, and how many follow it there. */
uint64_t wane_conversion_place(const wane_conversion *c, uint64_t at, uint64_t *run);
/* Kernel. p0 the conversion, p1 the chunk's bytes; n0 its first value, n1 their number. */
void wane_conversion_chunk(const wane_op *op, uint32_t chunk);
/* Kernel. p0 the conversion: double quantization of all scales. */
void wane_conversion_nest(const wane_op *op, uint32_t chunk);
#endif
