/* amx_many.c: tiles_many.h with AMX. */
#define WANE_TILES_AMX
#include "tiles_many.h"

void wane_linear_register_amx(wane_backend *b) { tiles_register(b); }
