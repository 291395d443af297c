/* amx_linear8.c: the AMX level's slots of 8-bit weights. */
#include "linear8.h"
#include "int8.h"

void wane_linear8_register_amx(wane_backend *b) {
  wane_int8_register_amx(b);
}
