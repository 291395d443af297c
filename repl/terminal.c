/* terminal.c: the terminal and ctrl-C, for the Lua side of the `wane` program.
 *
 * The line editor itself is Lua (repl/editor.lua): it pulls decoded keys from here and writes finished frames back. C does what
 * Lua cannot: raw mode, bytes to keys, display widths, waiting that a signal ends, and the signal handler.
 *
 * Interrupts. Only this program installs a handler; libwane never does. LuaJIT's compiled loops never look at hooks, so ctrl-C
 * works in three ways at once: it cancels the streams that Lua registered with on_interrupt (a generation ends at its next
 * token), it ends wait() (a load ends at its next look), and it arms a count hook, which stops interpreted code after a while:
 * long enough for the library's own bookkeeping to see the cancellation first. A second ctrl-C stops interpreted code at once. The
 * last one (limit) has the default effect, for a program that does none of this.
 *
 * SIGTERM and SIGHUP keep their default effect but while the program is patient: then they are noted like a first ctrl-C. However
 * often they come: timeout sends its signal twice, a closing terminal's shell may too; SIGKILL is for who will not wait. */
#include "terminal.h"

#include <errno.h>
#include <lauxlib.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>
#include <utf8proc.h>

/* ---------------------------------------------------------------- ctrl-C */

enum { TARGETS = 16, HOOK_PATIENCE = 2000000 /* Lua instructions, some 20 ms */ };

typedef void (*cancel_function)(void *);
static struct { cancel_function cancel; void *object; } targets[TARGETS];
static volatile sig_atomic_t target_count;
static volatile sig_atomic_t interrupts;      /* ctrl-C since the last clear */
static volatile sig_atomic_t interrupt_limit = 2;
static volatile sig_atomic_t patience;        /* ctrl-C is only noted: the program asks interrupted() and ends what it does in order */
static volatile sig_atomic_t ending;          /* SIGTERM or SIGHUP that came while patient, 0: none */
static volatile sig_atomic_t resized;
static lua_State *hooked_state;
static pthread_t main_thread;

static void restore_terminal(void);

/* Count hook: raises where the Lua code happens to be. */
static void stop_lua(lua_State *L, lua_Debug *ar) {
  (void)ar;
  lua_sethook(L, NULL, 0, 0);
  luaL_error(L, "interrupted");
}

static void on_sigint(int number) {
  int saved = errno;
  if (!pthread_equal(pthread_self(), main_thread)) {        /* lua_sethook is safe in its own thread only */
    pthread_kill(main_thread, number);
    errno = saved;
    return;
  }
  interrupts++;
  if (interrupts >= interrupt_limit) {
    restore_terminal();
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  if (patience) { errno = saved; return; }
  for (int i = 0; i < target_count; i++) targets[i].cancel(targets[i].object);
  if (interrupts == 1) lua_sethook(hooked_state, stop_lua, LUA_MASKCOUNT, HOOK_PATIENCE);
  else lua_sethook(hooked_state, stop_lua, LUA_MASKCALL | LUA_MASKRET | LUA_MASKCOUNT, 1);
  errno = saved;
}

static void on_ending(int number) { ending = number; }

/* Notes SIGTERM and SIGHUP, or gives them their default effect back. One that was ignored from the start (nohup) stays so. */
static void note_endings(bool note) {
  const int numbers[] = { SIGTERM, SIGHUP };
  for (int i = 0; i < 2; i++) {
    struct sigaction action;
    if (sigaction(numbers[i], NULL, &action) != 0 || action.sa_handler == SIG_IGN) continue;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = note ? on_ending : SIG_DFL;
    action.sa_flags = SA_RESTART;             /* nothing waits for them: what is being written must not fail */
    sigaction(numbers[i], &action, NULL);
  }
}

static void on_sigwinch(int number) {
  (void)number;
  resized = 1;
}

void terminal_catch_interrupts(lua_State *L) {
  struct sigaction action;
  hooked_state = L;
  main_thread = pthread_self();
  memset(&action, 0, sizeof action);
  sigemptyset(&action.sa_mask);
  action.sa_handler = on_sigint;              /* no SA_RESTART: a blocked read must return */
  sigaction(SIGINT, &action, NULL);
  action.sa_handler = on_sigwinch;
  sigaction(SIGWINCH, &action, NULL);
}

void terminal_release_interrupts(void) {
  restore_terminal();
  signal(SIGINT, SIG_DFL);
  note_endings(false);
}

/* on_interrupt(function, object): both addresses as numbers (47 bits fit a double); calls function(object) in the signal handler,
 * so it must be safe there (wane_stream_cancel is). The same pair twice counts once. Returns false when the table is full. */
static int l_on_interrupt(lua_State *L) {
  cancel_function cancel = (cancel_function)(uintptr_t)luaL_checknumber(L, 1);
  void *object = (void *)(uintptr_t)luaL_checknumber(L, 2);
  int count = target_count;
  for (int i = 0; i < count; i++) {
    if (targets[i].cancel == cancel && targets[i].object == object) return lua_pushboolean(L, 1), 1;
  }
  if (count < TARGETS) {
    targets[count].cancel = cancel;
    targets[count].object = object;
    target_count = count + 1;
  }
  lua_pushboolean(L, count < TARGETS);
  return 1;
}

/* interrupted(): the number of the signal that asks the program to end (ctrl-C: SIGINT; while patient SIGTERM and SIGHUP too), or false
 * if none came since the last clear_interrupt(). */
static int l_interrupted(lua_State *L) {
  if (interrupts > 0) lua_pushinteger(L, SIGINT);
  else if (ending) lua_pushinteger(L, ending);
  else lua_pushboolean(L, 0);
  return 1;
}

static int l_clear_interrupt(lua_State *L) {
  lua_sethook(L, NULL, 0, 0);
  interrupts = 0;
  ending = 0;
  return 0;
}

/* patient(flag): while set, a ctrl-C neither cancels streams nor stops Lua code, and SIGTERM and SIGHUP do not end the program; interrupted()
 * tells. The ctrl-C after it (limit) ends the program. */
static int l_patient(lua_State *L) {
  patience = lua_toboolean(L, 1);
  note_endings(patience);
  return 0;
}

/* limit(n): the n-th ctrl-C without a clear_interrupt() in between ends the program. */
static int l_limit(lua_State *L) {
  interrupt_limit = (int)luaL_checkinteger(L, 1);
  return 0;
}

/* wait(fd, timeout_ms or -1) -> "ready" | "timeout" | "interrupted". Descriptor -1 only sleeps. */
static int l_wait(lua_State *L) {
  struct pollfd p = { .fd = (int)luaL_checkinteger(L, 1), .events = POLLIN, .revents = 0 };
  int timeout = (int)luaL_optinteger(L, 2, -1);
  /* A ctrl-C just before poll() would be missed by an endless wait: wake up now and then. */
  int slice = timeout < 0 || timeout > 200 ? 200 : timeout;
  for (int waited = 0;;) {
    if (interrupts > 0) return lua_pushliteral(L, "interrupted"), 1;
    int n = poll(&p, 1, slice);
    if (n > 0) return lua_pushliteral(L, "ready"), 1;
    if (n < 0 && errno != EINTR) return luaL_error(L, "poll: %s", strerror(errno));
    if (n == 0) waited += slice;
    if (interrupts == 0 && timeout >= 0 && waited >= timeout) return lua_pushliteral(L, "timeout"), 1;
  }
}

/* ---------------------------------------------------------------- raw mode */

static struct termios cooked;
static volatile sig_atomic_t is_raw;
static const char paste_on[] = "\x1b[?2004h", paste_off[] = "\x1b[?2004l";

/* Writes all bytes to the terminal, whatever interrupts it. Returns false if the terminal is gone. */
static bool write_all(const char *data, size_t length) {
  while (length > 0) {
    ssize_t n = write(STDOUT_FILENO, data, length);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) {
      struct pollfd p = { .fd = STDOUT_FILENO, .events = POLLOUT, .revents = 0 };
      poll(&p, 1, 100);
      continue;
    }
    if (n <= 0) return false;
    data += n;
    length -= (size_t)n;
  }
  return true;
}

static void restore_terminal(void) {
  if (!is_raw) return;
  is_raw = 0;
  write_all(paste_off, sizeof paste_off - 1);
  tcsetattr(STDIN_FILENO, TCSADRAIN, &cooked);
}

/* raw(true|false) -> true, or nil where stdin is no terminal. Output processing stays on: "\n" still returns the carriage. */
static int l_raw(lua_State *L) {
  static bool registered;
  if (!lua_toboolean(L, 1)) {
    restore_terminal();
    return lua_pushboolean(L, 1), 1;
  }
  if (!is_raw) {
    struct termios raw;
    if (tcgetattr(STDIN_FILENO, &cooked) != 0) return 0;
    if (!registered) registered = atexit(restore_terminal) == 0;
    raw = cooked;
    raw.c_iflag &= ~(tcflag_t)(BRKINT | ICRNL | INPCK | ISTRIP | IXON);
    raw.c_lflag &= ~(tcflag_t)(ECHO | ICANON | IEXTEN | ISIG);
    raw.c_cflag |= CS8;
    raw.c_cc[VMIN] = 1;
    raw.c_cc[VTIME] = 0;
    if (tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) != 0) return 0;
    is_raw = 1;
    write_all(paste_on, sizeof paste_on - 1);
  }
  lua_pushboolean(L, 1);
  return 1;
}

/* suspend(): ctrl-Z. Returns when the shell continues the program. */
static int l_suspend(lua_State *L) {
  (void)L;
  restore_terminal();
  raise(SIGTSTP);
  return 0;
}

static int l_write(lua_State *L) {
  size_t length;
  const char *s = luaL_checklstring(L, 1, &length);
  lua_pushboolean(L, write_all(s, length));
  return 1;
}

static int l_isatty(lua_State *L) {
  lua_pushboolean(L, isatty((int)luaL_checkinteger(L, 1)));
  return 1;
}

/* size() -> columns, rows; 80, 24 where nobody knows. */
static int l_size(lua_State *L) {
  struct winsize w;
  bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col > 0 && w.ws_row > 0;
  lua_pushinteger(L, known ? w.ws_col : 80);
  lua_pushinteger(L, known ? w.ws_row : 24);
  return 2;
}

/* ---------------------------------------------------------------- keys */

/* Bytes read and not yet consumed. A key is decoded from its front. */
static unsigned char input[4096];
static size_t input_length;

/* Reads more input: true if some came. timeout in milliseconds, -1 for none. Sets *why otherwise. */
static bool read_more(int timeout, const char **why) {
  struct pollfd p = { .fd = STDIN_FILENO, .events = POLLIN, .revents = 0 };
  if (input_length == sizeof input) return true;
  int n = poll(&p, 1, timeout);
  if (n < 0 && errno == EINTR) return *why = resized ? "resize" : "interrupt", resized = 0, false;
  if (n == 0) return *why = "timeout", false;
  ssize_t got = read(STDIN_FILENO, input + input_length, sizeof input - input_length);
  if (got < 0 && (errno == EINTR || errno == EAGAIN)) return *why = "timeout", false;
  if (got <= 0) return *why = "eof", false;
  input_length += (size_t)got;
  return true;
}

static void consume(size_t n) {
  input_length -= n;
  memmove(input, input + n, input_length);
}

/* Makes sure that `n` bytes are there, waiting a moment: the rest of an escape sequence or character is on its way. */
static bool have(size_t n) {
  const char *why;
  while (input_length < n) {
    if (!read_more(50, &why)) return false;
  }
  return true;
}

/* Pushes a pasted text: everything up to ESC [ 201 ~. */
static int push_paste(lua_State *L) {
  static const char end[] = "\x1b[201~";
  const size_t tail = sizeof end - 1;
  const char *why;
  luaL_Buffer b;
  lua_pushliteral(L, "paste");
  luaL_buffinit(L, &b);
  for (;;) {
    unsigned char *found = memmem(input, input_length, end, tail);
    if (found) {
      luaL_addlstring(&b, (char *)input, (size_t)(found - input));
      consume((size_t)(found - input) + tail);
      break;
    }
    if (input_length >= tail) {                     /* keep what may be the beginning of the end */
      size_t n = input_length - (tail - 1);
      luaL_addlstring(&b, (char *)input, n);
      consume(n);
    }
    if (!read_more(2000, &why)) break;
  }
  luaL_pushresult(&b);
  return 2;
}

/* Escape sequences of the terminals in use: xterm, Linux console, rxvt, tmux. */
static const struct { const char *sequence, *name; } sequences[] = {
  { "[A", "up" }, { "[B", "down" }, { "[C", "right" }, { "[D", "left" }, { "OA", "up" }, { "OB", "down" }, { "OC", "right" }, { "OD", "left" },
  { "[H", "home" }, { "[F", "end" }, { "OH", "home" }, { "OF", "end" }, { "[1~", "home" }, { "[4~", "end" }, { "[7~", "home" }, { "[8~", "end" },
  { "[3~", "delete" }, { "[5~", "pageup" }, { "[6~", "pagedown" }, { "[Z", "backtab" },
  { "[1;5C", "alt-f" }, { "[1;5D", "alt-b" }, { "[1;3C", "alt-f" }, { "[1;3D", "alt-b" }, { "[1;5A", "ctrl-p" }, { "[1;5B", "ctrl-n" },
  { "Oc", "alt-f" }, { "Od", "alt-b" }, { "[5C", "alt-f" }, { "[5D", "alt-b" }, { "[3;5~", "alt-d" },
};

/* Decodes what follows an ESC. */
static int push_escape(lua_State *L) {
  size_t n = 2;                                     /* ESC and one more */
  if (!have(2)) {
    consume(1);
    return lua_pushliteral(L, "key"), lua_pushliteral(L, "escape"), 2;
  }
  if (input[1] == '[' || input[1] == 'O') {
    /* parameters 0x30-0x3f and intermediates 0x20-0x2f, then one final byte */
    do n++;
    while (n <= 32 && have(n) && input[n - 1] >= 0x20 && input[n - 1] <= 0x3f);
    if (n > input_length) n = input_length;
    char sequence[40];
    memcpy(sequence, input + 1, n - 1);
    sequence[n - 1] = 0;
    consume(n);
    if (strcmp(sequence, "[200~") == 0) return push_paste(L);
    lua_pushliteral(L, "key");
    for (size_t i = 0; i < sizeof sequences / sizeof sequences[0]; i++) {
      if (strcmp(sequence, sequences[i].sequence) == 0) return lua_pushstring(L, sequences[i].name), 2;
    }
    return lua_pushliteral(L, "unknown"), 2;
  }
  unsigned char c = input[1];
  consume(2);
  lua_pushliteral(L, "key");
  if (c == '\r' || c == '\n') lua_pushliteral(L, "alt-enter");
  else if (c == 127 || c == 8) lua_pushliteral(L, "alt-backspace");
  else if (c > 32 && c < 127) lua_pushfstring(L, "alt-%c", c);
  else lua_pushliteral(L, "unknown");
  return 2;
}

static int push_control(lua_State *L, unsigned char c) {
  consume(1);
  lua_pushliteral(L, "key");
  if (c == '\r' || c == '\n') lua_pushliteral(L, "enter");
  else if (c == '\t') lua_pushliteral(L, "tab");
  else if (c == 127 || c == 8) lua_pushliteral(L, "backspace");
  else if (c >= 1 && c <= 26) lua_pushfstring(L, "ctrl-%c", 'a' + c - 1);
  else if (c == 31) lua_pushliteral(L, "ctrl-_");
  else lua_pushliteral(L, "unknown");
  return 2;
}

/* Pushes the run of valid, printable characters at the front; an invalid byte is dropped. */
static int push_text(lua_State *L) {
  size_t n = 0;
  while (n < input_length && input[n] >= 32 && input[n] != 127) {
    utf8proc_int32_t c;
    size_t want = input[n] < 0x80 ? 1 : input[n] >= 0xf0 ? 4 : input[n] >= 0xe0 ? 3 : 2;
    if (n + want > sizeof input || (n + want > input_length && !have(n + want))) break;
    utf8proc_ssize_t got = utf8proc_iterate(input + n, (utf8proc_ssize_t)want, &c);
    if (got <= 0) break;
    n += (size_t)got;
  }
  lua_pushliteral(L, "text");
  lua_pushlstring(L, (char *)input, n);
  consume(n > 0 ? n : 1);
  return 2;
}

/* key(timeout_ms or -1) -> "text", string | "key", name | "paste", string | "resize" | "timeout" | "interrupt" | "eof" */
static int l_key(lua_State *L) {
  const char *why;
  if (input_length == 0 && !read_more((int)luaL_optinteger(L, 1, -1), &why)) return lua_pushstring(L, why), 1;
  if (input[0] == 27) return push_escape(L);
  if (input[0] < 32 || input[0] == 127) return push_control(L, input[0]);
  return push_text(L);
}

/* ---------------------------------------------------------------- widths */

/* cluster(s, i) -> index after the grapheme cluster that begins at byte i (1-based), its width in columns. An invalid byte is a
 * cluster of its own, one column wide. Source: Unicode Standard Annex 29, as utf8proc implements it. */
static int l_cluster(lua_State *L) {
  size_t length;
  const unsigned char *s = (const unsigned char *)luaL_checklstring(L, 1, &length);
  size_t i = (size_t)luaL_checkinteger(L, 2) - 1;
  utf8proc_int32_t previous, c, state = 0;
  if (i >= length) return luaL_error(L, "cluster: position %d is outside the text", (int)i + 1);
  utf8proc_ssize_t n = utf8proc_iterate(s + i, (utf8proc_ssize_t)(length - i), &previous);
  if (n <= 0) return lua_pushinteger(L, (lua_Integer)i + 2), lua_pushinteger(L, 1), 2;
  int width = utf8proc_charwidth(previous);
  for (i += (size_t)n; i < length; i += (size_t)n) {
    n = utf8proc_iterate(s + i, (utf8proc_ssize_t)(length - i), &c);
    if (n <= 0 || utf8proc_grapheme_break_stateful(previous, c, &state)) break;
    if (utf8proc_charwidth(c) > width) width = utf8proc_charwidth(c);
    previous = c;
  }
  lua_pushinteger(L, (lua_Integer)i + 1);
  lua_pushinteger(L, width);
  return 2;
}

static const luaL_Reg functions[] = {
  { "on_interrupt", l_on_interrupt }, { "interrupted", l_interrupted }, { "clear_interrupt", l_clear_interrupt }, { "limit", l_limit },
  { "patient", l_patient },
  { "wait", l_wait }, { "raw", l_raw }, { "suspend", l_suspend }, { "write", l_write }, { "isatty", l_isatty }, { "size", l_size },
  { "key", l_key }, { "cluster", l_cluster }, { NULL, NULL },
};

int luaopen_wane_terminal(lua_State *L) {
  lua_newtable(L);
  luaL_register(L, NULL, functions);
  return 1;
}
