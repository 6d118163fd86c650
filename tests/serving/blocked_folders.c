// For tests, with LD_PRELOAD: opening a folder whose path holds the text in $BLOCKED_FOLDER waits as long as the file
// $BLOCK_FILE exists, as a file system does that hangs.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

DIR* opendir(const char* path) {
  static DIR* (*original)(const char*);
  if (!original) original = (DIR * (*)(const char*)) dlsym(RTLD_NEXT, "opendir");
  const char* folder = getenv("BLOCKED_FOLDER");
  const char* file = getenv("BLOCK_FILE");
  if (folder && file && strstr(path, folder)) {
    int told = 0;
    while (access(file, F_OK) == 0) {
      if (!told) {
        char mark[4096];
        snprintf(mark, sizeof(mark), "%s.hit", file);
        close(open(mark, O_CREAT | O_WRONLY, 0600));
        told = 1;
      }
      usleep(5000);
    }
  }
  return original(path);
}
