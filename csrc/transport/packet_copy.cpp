#include "packet_copy.hpp"

#include "../region/region_layout.hpp"
#include "../support/device_order.hpp"

// ThreadSanitizer is to see every access as the atomic that it is.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#include <emmintrin.h>
#define SPARK_STREAMS_LINES 1
#endif

namespace spark {
namespace {

void copy_words(const std::atomic<uint64_t>* from, std::atomic<uint64_t>* to, size_t begin, size_t end) {
  for (size_t word = begin; word < end; word += 2) {
    // Acquire and release: of a wide packet, the flag in the second half is loaded before the data of the
    // first half and stored after it.
    uint64_t second = load_from_device(from[word + 1]);
    to[word].store(from[word].load(std::memory_order_relaxed), std::memory_order_relaxed);
    to[word + 1].store(second, std::memory_order_release);
  }
}

// Copies `lines` whole lines. Stored a word at a time, a line that a GPU polls is taken from this core and
// fetched back between its words (benchmarks/NOTES.md, entry 12). Each packet is whole:
// x86-64 with AVX promises it of loads of aligned 16 bytes; of streamed stores it is assumed, as of PCIe.
void copy_lines(const std::atomic<uint64_t>* from, std::atomic<uint64_t>* to, size_t lines) {
#if defined(SPARK_STREAMS_LINES)
  auto* source = reinterpret_cast<const __m128i*>(from);
  auto* target = reinterpret_cast<__m128i*>(to);
  for (; lines > 0; --lines, source += 4, target += 4) {
    __m128i line[] = {_mm_load_si128(source), _mm_load_si128(source + 1), _mm_load_si128(source + 2),
                      _mm_load_si128(source + 3)};
    for (int part = 0; part < 4; ++part) _mm_stream_si128(target + part, line[part]);
  }
  _mm_sfence();  // streamed stores are not ordered before later stores, not even before a release
#else
  copy_words(from, to, 0, lines * kHalvesPerLine);
#endif
}

}  // namespace

void copy_all_but_first(const std::atomic<uint64_t>* from, std::atomic<uint64_t>* to, size_t words,
                        bool whole_lines) {
  size_t lines = words / kHalvesPerLine;
  if (!whole_lines || lines < 2) return copy_words(from, to, kFirstWords, words);
  copy_words(from, to, kFirstWords, kHalvesPerLine);
  copy_lines(from + kHalvesPerLine, to + kHalvesPerLine, lines - 1);
  copy_words(from, to, lines * kHalvesPerLine, words);
}

}  // namespace spark
