/* terminal.h: what the `wane` program gives its Lua side: raw keys, widths, waiting and ctrl-C. See terminal.c. */
#ifndef WANE_REPL_TERMINAL_H
#define WANE_REPL_TERMINAL_H
#include <lua.h>

/* The Lua module "wane.terminal" (package.preload). */
int luaopen_wane_terminal(lua_State *L);

/* Installs the program's SIGINT handler for this Lua state. */
void terminal_catch_interrupts(lua_State *L);

/* Gives ctrl-C, SIGTERM and SIGHUP their default effect back: call it before the state, and the streams to cancel, go away. */
void terminal_release_interrupts(void);

#endif
