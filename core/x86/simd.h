/* simd.h: the intrinsics. Normally <immintrin.h>; under WANE_EMULATE (tests on a CPU without AVX-512 or AMX) SIMDe's portable
 * versions, so that the same kernel sources can be compiled and checked there. Kernels of the avx512, avx512bf16 and amx
 * groups include this and nothing else. */
#ifndef WANE_SIMD_H
#define WANE_SIMD_H
#ifdef WANE_EMULATE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#else
#include <immintrin.h>
#endif
#endif
