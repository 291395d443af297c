/* cpu.c: what the processor offers, what it is slow at, and the level in force. */
#include "base.h"
#include <cpuid.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *const level_names[] = { "generic", "avx2", "avx512", "avx512bf16", "amx" };
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int best;
static _Atomic int level;
static char name[64];
static char notes[128];

/* The operating system must save the registers too: XCR0 bits. */
static uint64_t xcr0(void) {
  uint32_t a, d;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (uint64_t)d << 32 | a;
}

/* Linux hands out AMX tile state on request, once a process (Documentation/arch/x86/xstate.rst). */
static int amx_permitted(void) {
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static int detect(void) {
  uint32_t a, b, c, d, b7, c7, d7, a71;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return WANE_CPU_GENERIC;
  int osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx || !fma || !f16c || (xcr0() & 6) != 6) return WANE_CPU_GENERIC;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !(b7 >> 5 & 1) || !(b7 >> 8 & 1)) return WANE_CPU_GENERIC;
#ifdef WANE_EMULATE
  return WANE_CPU_AMX;                         /* every kernel is emulated */
#endif
  int f = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1, vbmi = c7 >> 1 & 1, vnni = c7 >> 11 & 1;
  if (!(f && dq && bw && vl && vbmi && vnni) || (xcr0() & 0xe6) != 0xe6) return WANE_CPU_AVX2;
  if (!__get_cpuid_count(7, 1, &a71, &b, &c, &d) || !(a71 >> 5 & 1)) return WANE_CPU_AVX512;
  int amx_bf16 = d7 >> 22 & 1, amx_tile = d7 >> 24 & 1, amx_int8 = d7 >> 25 & 1;
  if (!(amx_bf16 && amx_tile && amx_int8) || (xcr0() & 0x60000) != 0x60000 || !amx_permitted()) return WANE_CPU_AVX512BF16;
  return WANE_CPU_AMX;
}

static void brand(void) {
  uint32_t r[12], a, b, c, d;
  if (__get_cpuid(0x80000000, &a, &b, &c, &d) && a >= 0x80000004) {
    for (uint32_t i = 0; i < 3; i++) __get_cpuid(0x80000002 + i, &r[4 * i], &r[4 * i + 1], &r[4 * i + 2], &r[4 * i + 3]);
    char text[49];
    memcpy(text, r, 48);
    text[48] = 0;
    snprintf(name, sizeof name, "%s", text + strspn(text, " "));
  }
  if (!*name) snprintf(name, sizeof name, "unknown x86-64");
}

/* Intel's 512-bit vdpbf16ps runs at half the rate of f32 FMA, and its decoding loops want software prefetch; AMD's runs at
 * twice the FMA rate and plain loads are best (measured, docs/kernels.md). */
static void judge(void) {
  uint32_t a, b, c, d;
  char vendor[13] = "";
  if (__get_cpuid(0, &a, &b, &c, &d)) { memcpy(vendor, &b, 4); memcpy(vendor + 4, &d, 4); memcpy(vendor + 8, &c, 4); }
  if (!strcmp(vendor, "GenuineIntel")) snprintf(notes, sizeof notes, "%s", best >= WANE_CPU_AVX512BF16 ? "bf16-dot-slow prefetch-pays" : "prefetch-pays");
}

static void start(void) {
  best = detect();
  brand();
  judge();
  int chosen = best;
  const char *want = getenv("WANE_CPU");
  for (int i = 0; want && i <= WANE_CPU_AMX; i++) if (!strcmp(want, level_names[i]) && i < best) chosen = i;
  atomic_store(&level, chosen);
}

int wane_cpu_level(void) { pthread_once(&once, start); return atomic_load_explicit(&level, memory_order_relaxed); }
int wane_cpu_best(void) { pthread_once(&once, start); return best; }
const char *wane_cpu_name(void) { pthread_once(&once, start); return name; }
const char *wane_cpu_notes(void) { pthread_once(&once, start); return notes; }
const char *wane_cpu_level_name(int n) { return n >= 0 && n <= WANE_CPU_AMX ? level_names[n] : NULL; }

int wane_set_cpu_level(int n) {
  pthread_once(&once, start);
  if (n < 0 || n > WANE_CPU_AMX) return wane_fail(WANE_E_ARG, "no instruction-set level %d: 0 (generic) to 4 (amx)", n);
  if (n > best) return wane_fail(WANE_E_UNSUPPORTED, "this CPU (%s) has no %s; its best level is %s", name, level_names[n], level_names[best]);
  atomic_store(&level, n);
  return WANE_OK;
}
