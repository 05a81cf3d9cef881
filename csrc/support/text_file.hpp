// Small text files of the kernel's, without the C++ library's streams.
//
// A stream looks its locale up by identities that must be unique in the process. torch's libraries can carry
// a C++ library of their own, and a native module that was linked with a static one then reads a stream with
// another one's locale: on such a machine `stream >> number` ended the process with SIGSEGV.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace spark {

// The beginning of the file, at most `limit` bytes; empty if it cannot be read.
std::string read_text(const std::string& path, size_t limit = 1 << 20);

// The parts of `text` between blanks and ends of lines.
std::vector<std::string> words_of(const std::string& text);

}  // namespace spark
