// What the libraries of tests write down of their calls, in their order, when the variable TRACE names a
// file.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

// Appends a line at once: two libraries of one process write to the same file.
inline void trace(const char* call, const void* memory, size_t bytes) {
  const char* path = std::getenv("TRACE");
  if (path == nullptr) return;
  char line[160];
  int length = std::snprintf(line, sizeof line, "%s %llu %zu\n", call,
                             static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(memory)), bytes);
  int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (file < 0 || write(file, line, static_cast<size_t>(length)) != length) std::abort();
  close(file);
}

}  // namespace
