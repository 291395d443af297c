/* limits.c: how much of the machine this process may use: affinity mask and cgroup quotas (v2 and v1), not the machine's size. */
#include "base.h"
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* First line of a small file into `text`; 0 if it cannot be read. */
static int first_line(const char *path, char *text, size_t size) {
  FILE *f = fopen(path, "re");
  if (!f) return 0;
  int ok = fgets(text, (int)size, f) != NULL;
  fclose(f);
  if (ok) text[strcspn(text, "\n")] = 0;
  return ok;
}

/* This process's cgroup path for a v1 controller, or for v2 when controller is "". */
static int cgroup_path(const char *controller, char *out, size_t size) {
  FILE *f = fopen("/proc/self/cgroup", "re");
  if (!f) return 0;
  char line[1024];
  int found = 0;
  while (!found && fgets(line, sizeof line, f)) {
    line[strcspn(line, "\n")] = 0;
    char *names = strchr(line, ':');
    char *path = names ? strchr(names + 1, ':') : NULL;
    if (!path) continue;
    *path++ = 0;
    names++;
    int match = !*controller ? !*names : 0;
    for (char *save = NULL, *name = strtok_r(names, ",", &save); name && *controller; name = strtok_r(NULL, ",", &save)) match |= !strcmp(name, controller);
    if (match) { snprintf(out, size, "%s", strcmp(path, "/") ? path : ""); found = 1; }
  }
  fclose(f);
  return found;
}

/* Reads `name` in this process's cgroup and in each of its parents; calls for the strictest are the caller's. */
static int read_up(const char *mount, const char *controller, const char *name, double (*value)(const char *), double *least) {
  char group[512], path[1200], text[128];
  int any = 0;
  if (!cgroup_path(controller, group, sizeof group)) return 0;
  for (;;) {
    snprintf(path, sizeof path, "%s%s/%s", mount, group, name);
    if (first_line(path, text, sizeof text)) {
      double v = value(text);
      if (v > 0 && (!any || v < *least)) { *least = v; any = 1; }
    }
    char *slash = strrchr(group, '/');
    if (!slash) return any;
    *slash = 0;
  }
}

/* "200000 100000" is 2 CPUs, "max 100000" none. */
static double cpu_v2(const char *text) {
  if (!strncmp(text, "max", 3)) return 0;
  char *end;
  double quota = strtod(text, &end), period = strtod(end, NULL);
  return period > 0 ? quota / period : 0;
}
static double plain_number(const char *text) { return strtod(text, NULL); }

int wane_cpu_quota(void) {
  cpu_set_t set;
  int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
  double quota = 0, period = 0;
  if (!read_up("/sys/fs/cgroup", "", "cpu.max", cpu_v2, &quota) && read_up("/sys/fs/cgroup/cpu", "cpu", "cpu.cfs_quota_us", plain_number, &quota)) {
    if (read_up("/sys/fs/cgroup/cpu", "cpu", "cpu.cfs_period_us", plain_number, &period) && period > 0) quota /= period;
    else quota = 0;
  }
  if (quota > 0 && quota < n) n = quota < 1 ? 1 : (int)quota;
  return n < 1 ? 1 : n;
}

uint64_t wane_memory_quota(void) {
  uint64_t physical = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
  double limit = 0;
  if (!read_up("/sys/fs/cgroup", "", "memory.max", plain_number, &limit)) read_up("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", plain_number, &limit);
  return limit > 0 && limit < (double)physical ? (uint64_t)limit : physical;
}
