/* index.c: libFuzzer target of what reads checkpoints' headers: safetensors, lists of shards, GGUF, files of torch.save. The input is a file's
 * bytes; the kind is told from the content. Everything that the index then offers is asked for. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "../../core/include/wane.h"

static void visit(wane_index *ix) {
  char data[64];
  wane_entry entry;
  for (int64_t i = 0, n = wane_index_count(ix); i < n && i < 4096; i++) {
    if (wane_index_entry(ix, i, &entry) < 0) abort();
    if (wane_index_find(ix, entry.name) < 0) abort();
    if (entry.bytes) wane_index_read(ix, i, entry.bytes > sizeof data ? entry.bytes - sizeof data : 0, data, entry.bytes < sizeof data ? entry.bytes : sizeof data);
  }
  for (int64_t i = 0, n = wane_index_meta_count(ix); i < n && i < 4096; i++) {
    const char *key = wane_index_meta_key(ix, i);
    wane_meta value, item;
    if (wane_index_meta(ix, key, &value) < 0 || value.kind != WANE_META_ARRAY) continue;
    for (int64_t j = 0; j < (int64_t)value.count && j < 64; j++) wane_index_meta_item(ix, key, j, &item);
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  char path[64];
  wane_job *job = NULL;
  wane_index *ix = NULL;
  int fd = memfd_create("input", 0);
  if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  if (wane_index_open(&job, path) == WANE_OK) {
    if (wane_job_wait(job, -1) == WANE_OK && wane_index_take(job, &ix) == WANE_OK) visit(ix);
    else if (!wane_error()[0]) abort();          /* refused without a word */
  }
  wane_index_free(ix);
  wane_job_free(job);
  close(fd);
  return 0;
}
