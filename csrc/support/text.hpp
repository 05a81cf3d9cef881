// Text for people: durations, and cutting it.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <string>

namespace spark {

// "2.5 s"
inline std::string seconds_text(std::chrono::nanoseconds duration) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", std::chrono::duration<double>(duration).count());
  return text;
}

// How many bytes of UTF-8 `text` fit into `limit` without cutting a character in two.
inline size_t whole_characters(const std::string& text, size_t limit) {
  if (text.size() <= limit) return text.size();
  while (limit > 0 && (static_cast<unsigned char>(text[limit]) & 0xc0u) == 0x80u) --limit;
  return limit;
}

}  // namespace spark
