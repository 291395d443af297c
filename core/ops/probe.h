/* probe.h: loops that do nothing but what the machine is best at. Internal.
 *
 * A probe's record: p0 f32 [64]: one result a chunk, so that the loop is not thrown away; p1, n0 the buffer and its bytes (READ);
 * n1 rounds. Each group exports how many operations one round does. */
#ifndef WANE_PROBE_H
#define WANE_PROBE_H
#include "../include/wane_backend.h"

enum { WANE_PROBE_CHUNKS = 64, WANE_PROBE_KINDS = 4 };
/* Operations a round of each level's probes, [WANE_PROBE_…]; 0: none. */
extern const double wane_probe_ops_generic[WANE_PROBE_KINDS], wane_probe_ops_avx2[WANE_PROBE_KINDS];
extern const double wane_probe_ops_avx512[WANE_PROBE_KINDS], wane_probe_ops_avx512bf16[WANE_PROBE_KINDS], wane_probe_ops_amx[WANE_PROBE_KINDS];
void wane_probe_register_generic(wane_backend *b);
void wane_probe_register_avx2(wane_backend *b);
void wane_probe_register_avx512(wane_backend *b);
void wane_probe_register_avx512bf16(wane_backend *b);
void wane_probe_register_amx(wane_backend *b);
#endif
