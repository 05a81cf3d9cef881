// A message of wide packets, as kernels stage and receive it, by a thread of a CPU.
#pragma once

#include <atomic>
#include <cstdint>

#include "../../csrc/region/packet.hpp"

namespace spark::testing {

struct WideMessage {
  uint32_t tag;
  uint32_t words;  // of 4 bytes, its data
  uint32_t seed;   // of the data: word `at` is `seed + at`

  size_t packets() const { return wide_packet_count(words * sizeof(uint32_t)); }

  // The header first, which must not be taken for the whole message, then the last ones. Two stores in the
  // place of a kernel's one: the flag is in the second. Release, in the place of the order between kernels.
  void stage(std::atomic<uint64_t>* halves, uint32_t sequence) const {
    for (size_t count = packets(), at = 0; at < count; ++at) {
      size_t packet = at == 0 ? 0 : count - at;
      halves[2 * packet].store(first(packet), std::memory_order_release);
      halves[2 * packet + 1].store(second(packet, sequence), std::memory_order_release);
    }
  }

  // Calls `wait` until a packet is there, for each of them. False if one is not what was staged.
  template <typename Wait>
  bool arrives(const std::atomic<uint64_t>* halves, uint32_t sequence, Wait wait) const {
    for (size_t packet = 0; packet < packets(); ++packet) {
      uint64_t flag = halves[2 * packet + 1].load(std::memory_order_acquire);
      for (; packet_flag(flag) != sequence; flag = halves[2 * packet + 1].load(std::memory_order_acquire))
        wait();
      if (flag != second(packet, sequence) ||
          halves[2 * packet].load(std::memory_order_relaxed) != first(packet))
        return false;
    }
    return true;
  }

 private:
  uint32_t word(size_t at) const { return at < words ? seed + static_cast<uint32_t>(at) : 0; }
  uint64_t first(size_t packet) const {
    if (packet == 0) return static_cast<uint64_t>(words * sizeof(uint32_t)) << 32 | tag;
    size_t at = 3 * (packet - 1);
    return static_cast<uint64_t>(word(at + 1)) << 32 | word(at);
  }
  uint64_t second(size_t packet, uint32_t sequence) const {
    return static_cast<uint64_t>(sequence) << 32 | (packet == 0 ? 0 : word(3 * (packet - 1) + 2));
  }
};

}  // namespace spark::testing
