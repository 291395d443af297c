/* amx_attention.c: tiles_attention.h with AMX. */
#define WANE_TILES_AMX
#include "tiles_attention.h"

void wane_attention_register_amx(wane_backend *b) { tiles_register(b); }
