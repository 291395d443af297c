/* absent.c: rooms that have not landed yet; each weak definition goes when its room's registrar arrives. */
#include "tensor.h"
#define ABSENT(name) __attribute__((weak)) void name(wane_backend *b) { (void)b; }
ABSENT(wane_register_generic_elementwise)
ABSENT(wane_register_generic_nn)
ABSENT(wane_register_generic_linear)
__attribute__((weak)) int wane_cast(wane_stream *s, wane_handle *o, const wane_handle *t, int d) { (void)s, (void)o, (void)t, (void)d; return wane_fail(WANE_E_UNSUPPORTED, "not built"); }
