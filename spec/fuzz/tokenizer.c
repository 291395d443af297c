/* tokenizer.c: libFuzzer target of what reads vocabularies: tokenizer.json (or, from its magic, a GGUF's metadata). The input is the file. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "../../core/include/wane.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  char path[64];
  wane_job *job = NULL;
  wane_tokenizer *t = NULL;
  wane_vocab_info info;
  int fd = memfd_create("input", 0);
  if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  if (wane_tokenizer_open(&job, path, NULL) == WANE_OK) {
    if (wane_job_wait(job, -1) == WANE_OK && wane_tokenizer_take(job, &t) == WANE_OK) wane_vocab_info_read(t, &info);
    else if (!wane_error()[0]) abort();          /* refused without a word */
  }
  wane_tokenizer_free(t);
  wane_job_free(job);
  close(fd);
  return 0;
}
