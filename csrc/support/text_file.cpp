#include "text_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "shared_memory.hpp"

namespace spark {

std::string read_text(const std::string& path, size_t limit) {
  FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  std::string text;
  if (file.get() < 0) return text;
  char part[4096];
  while (text.size() < limit) {
    ssize_t bytes = read(file.get(), part, std::min(sizeof part, limit - text.size()));
    if (bytes <= 0) break;
    text.append(part, static_cast<size_t>(bytes));
  }
  return text;
}

std::vector<std::string> words_of(const std::string& text) {
  constexpr const char* kBlanks = " \t\r\n";
  std::vector<std::string> words;
  for (size_t from = text.find_first_not_of(kBlanks); from != std::string::npos;) {
    size_t end = std::min(text.find_first_of(kBlanks, from), text.size());
    words.push_back(text.substr(from, end - from));
    from = text.find_first_not_of(kBlanks, end);
  }
  return words;
}

}  // namespace spark
