/* hash.c: XXH64, a checksum that costs less than reading what it is of. It tells damage, not malice.
 * Source: xxHash/doc/xxhash_spec.md (seed 0). */
#include "base.h"
#include <string.h>

static const uint64_t P1 = 0x9E3779B185EBCA87u, P2 = 0xC2B2AE3D27D4EB4Fu, P3 = 0x165667B19E3779F9u, P4 = 0x85EBCA77C2B2AE63u, P5 = 0x27D4EB2F165667C5u;

static uint64_t turn(uint64_t x, int n) { return x << n | x >> (64 - n); }
static uint64_t stir(uint64_t sum, uint64_t x) { return turn(sum + x * P2, 31) * P1; }

static uint64_t load8(const char *p) { uint64_t x; memcpy(&x, p, 8); return x; }
static uint64_t load4(const char *p) { uint32_t x; memcpy(&x, p, 4); return x; }

void wane_hash_begin(wane_hash_state *s) { *s = (wane_hash_state){ .lane = { P1 + P2, P2, 0, 0 - P1 } }; }

void wane_hash_feed(wane_hash_state *s, const void *data, size_t bytes) {
  uint64_t lane[4];
  memcpy(lane, s->lane, sizeof lane);
  for (const char *p = data, *end = p + bytes; p < end; p += 32)
    for (int i = 0; i < 4; i++) lane[i] = stir(lane[i], load8(p + 8 * i));
  memcpy(s->lane, lane, sizeof lane);
  s->bytes += bytes;
}

uint64_t wane_hash_end(const wane_hash_state *s, const void *tail, size_t bytes) {
  static const int turns[] = { 1, 7, 12, 18 };
  const char *p = tail;
  uint64_t h = s->bytes ? 0 : P5;
  for (int i = 0; i < 4 && s->bytes; i++) h += turn(s->lane[i], turns[i]);
  for (int i = 0; i < 4 && s->bytes; i++) h = (h ^ stir(0, s->lane[i])) * P1 + P4;
  h += s->bytes + bytes;
  for (; bytes >= 8; bytes -= 8, p += 8) h = turn(h ^ stir(0, load8(p)), 27) * P1 + P4;
  for (; bytes >= 4; bytes -= 4, p += 4) h = turn(h ^ load4(p) * P1, 23) * P2 + P3;
  for (; bytes; bytes--, p++) h = turn(h ^ (unsigned char)*p * P5, 11) * P1;
  h = (h ^ h >> 33) * P2;
  h = (h ^ h >> 29) * P3;
  return h ^ h >> 32;
}

uint64_t wane_hash(const void *data, size_t bytes) {
  wane_hash_state s;
  size_t whole = bytes & ~(size_t)31;
  wane_hash_begin(&s);
  wane_hash_feed(&s, data, whole);
  return wane_hash_end(&s, (const char *)data + whole, bytes - whole);
}
