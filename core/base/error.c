/* error.c: the calling thread's last error message. Nothing here allocates, so a failing malloc can be reported. */
#include "base.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { MESSAGE_MAX = 1024 };
static _Thread_local char message[MESSAGE_MAX];

int wane_fail(int status, const char *format, ...) {
  char text[MESSAGE_MAX];                      /* the arguments may point into the old message */
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  memcpy(message, text, sizeof text);
  return status;
}

int wane_fail_errno(int status, const char *format, ...) {
  int code = errno;
  char text[MESSAGE_MAX];
  va_list args;
  va_start(args, format);
  int n = vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (n < 0) n = 0;
  if (n > MESSAGE_MAX - 80) n = MESSAGE_MAX - 80;
  char reason[64];
  const char *r = strerror_r(code, reason, sizeof reason);   /* GNU's: returns the text */
  snprintf(text + n, sizeof text - (size_t)n, ": %s", r);
  memcpy(message, text, sizeof text);
  return status;
}

void wane_error_save(char *buffer, size_t size) { snprintf(buffer, size, "%s", message); }
void wane_error_restore(const char *text) { snprintf(message, sizeof message, "%s", text); }
const char *wane_error(void) { return message; }

const char *wane_status_name(int status) {
  switch (status) {
    case WANE_OK: return "WANE_OK";
    case WANE_PENDING: return "WANE_PENDING";
    case WANE_E_ARG: return "WANE_E_ARG";
    case WANE_E_SHAPE: return "WANE_E_SHAPE";
    case WANE_E_DTYPE: return "WANE_E_DTYPE";
    case WANE_E_STALE: return "WANE_E_STALE";
    case WANE_E_MEMORY: return "WANE_E_MEMORY";
    case WANE_E_CANCELLED: return "WANE_E_CANCELLED";
    case WANE_E_FAILED: return "WANE_E_FAILED";
    case WANE_E_FORKED: return "WANE_E_FORKED";
    case WANE_E_TIMEOUT: return "WANE_E_TIMEOUT";
    case WANE_E_IO: return "WANE_E_IO";
    case WANE_E_FORMAT: return "WANE_E_FORMAT";
    case WANE_E_UNSUPPORTED: return "WANE_E_UNSUPPORTED";
    case WANE_E_NOTFOUND: return "WANE_E_NOTFOUND";
  }
  return "WANE_E_?";
}

int wane_abi(void) { return WANE_ABI; }
const char *wane_version(void) { return "0.1.0"; }

double wane_clock(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
