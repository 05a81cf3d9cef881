// Text for people: numbers, durations, and cutting it.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <string>

namespace spark {

// "11.7", "1e+06"
inline std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

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
