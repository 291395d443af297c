/* main.c: the `wane` program. Embeds LuaJIT, finds its Lua files beside itself and runs repl/main.lua, which reads the arguments.
 *
 * The program may lie anywhere: bin/wane in a tree that also holds lua/, scripts/ and repl/ (a sanitized build lies two folders
 * deeper). Errors that reach this file go to stderr with status 1. */
#include <lauxlib.h>
#include <limits.h>
#include <lualib.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "terminal.h"

/* Cuts the last component off a path; false if there is none left. */
static bool parent(char *path) {
  char *slash = strrchr(path, '/');
  if (!slash || slash == path) return false;
  *slash = 0;
  return true;
}

static bool exists(const char *folder, const char *name) {
  char path[PATH_MAX + 64];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return access(path, R_OK) == 0;
}

/* Fills `path` with the program's own path. A chroot without /proc leaves only the name it was called by. */
static bool own_path(const char *called, char path[PATH_MAX]) {
  ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - 1);
  if (n > 0) return path[n] = 0, true;
  if (strchr(called, '/')) return realpath(called, path) != NULL;
  const char *folder = getenv("PATH");
  while (folder && *folder) {
    char candidate[PATH_MAX];
    int length = (int)strcspn(folder, ":");
    snprintf(candidate, sizeof candidate, "%.*s/%s", length, folder, called);
    if (access(candidate, X_OK) == 0) return realpath(candidate, path) != NULL;
    folder += length + (folder[length] == ':');
  }
  return false;
}

/* Fills `home` with the folder that holds lua/ and repl/: the nearest one above the program. */
static bool find_home(const char *called, char home[PATH_MAX]) {
  if (!own_path(called, home)) return false;
  parent(home);
  parent(home);
  /* A sanitized program must not load the plain library: its own lies in the lib/ beside its bin/. */
  char library[PATH_MAX + 32];
  snprintf(library, sizeof library, "%s/lib/libwane.so", home);
  if (access(library, R_OK) == 0) setenv("WANE_LIB", library, 0);
  while (!exists(home, "repl/main.lua")) {
    if (!parent(home)) return false;
  }
  return true;
}

/* Puts our folders in front of package.path, wane.terminal into package.preload and the arguments into `arg`. */
static void prepare(lua_State *L, const char *home, int argc, char **argv) {
  lua_getglobal(L, "package");
  lua_getfield(L, -1, "path");
  lua_pushfstring(L, "%s/lua/?.lua;%s/lua/?/init.lua;%s", home, home, lua_tostring(L, -1));
  lua_setfield(L, -3, "path");
  lua_pop(L, 1);
  lua_getfield(L, -1, "preload");
  lua_pushcfunction(L, luaopen_wane_terminal);
  lua_setfield(L, -2, "wane.terminal");
  lua_pop(L, 2);
  lua_createtable(L, argc, 1);
  for (int i = 0; i < argc; i++) {
    lua_pushstring(L, argv[i]);
    lua_rawseti(L, -2, i);
  }
  lua_setglobal(L, "arg");
}

int main(int argc, char **argv) {
  static char home[PATH_MAX];
  char program[PATH_MAX + 32];
  if (!find_home(argv[0], home)) {
    fprintf(stderr, "%s: repl/main.lua was not found in any folder above the program\n", argv[0]);
    return 1;
  }
  lua_State *L = luaL_newstate();
  if (!L) {
    fprintf(stderr, "%s: not enough memory\n", argv[0]);
    return 1;
  }
  luaL_openlibs(L);
  prepare(L, home, argc, argv);
  terminal_catch_interrupts(L);

  snprintf(program, sizeof program, "%s/repl/main.lua", home);
  int status = luaL_loadfile(L, program);
  if (status == 0) {
    lua_pushstring(L, home);
    status = lua_pcall(L, 1, 1, 0);
  }
  if (status != 0) fprintf(stderr, "wane: %s\n", lua_tostring(L, -1) ? lua_tostring(L, -1) : "error of an unprintable kind");
  int code = status != 0 ? 1 : (int)lua_tointeger(L, -1);
  terminal_release_interrupts();
  lua_close(L);
  return code;
}
