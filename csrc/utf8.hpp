// Cutting text that people will read.
#pragma once

#include <cstddef>
#include <string>

namespace spark {

// How many bytes of UTF-8 `text` fit into `limit` without cutting a character in two.
inline size_t whole_characters(const std::string& text, size_t limit) {
  if (text.size() <= limit) return text.size();
  while (limit > 0 && (static_cast<unsigned char>(text[limit]) & 0xc0u) == 0x80u) --limit;
  return limit;
}

}  // namespace spark
