/* amx_lora.c: tiles_lora.h with AMX. */
#define WANE_TILES_AMX
#include "tiles_lora.h"

void wane_lora_register_amx(wane_backend *b) { tiles_register(b); }
