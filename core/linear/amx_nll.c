/* amx_nll.c: tiles_nll.h with AMX. */
#define WANE_TILES_AMX
#include "tiles_nll.h"

void wane_linear_nll_register_amx(wane_backend *b) { tiles_register(b); }
