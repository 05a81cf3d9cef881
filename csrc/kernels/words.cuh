// Loading and storing a few bytes of a tensor, whose end need not be aligned.
#pragma once

#include <cstdint>

namespace spark::device {

// `kWords` words of a tensor; those beyond its end are zero and are not stored.
template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t word[kWords];
};

template <int kWords>
__device__ inline Words<kWords> load_words(const unsigned char* from, uint64_t left) {
  if (left >= sizeof(Words<kWords>)) return *reinterpret_cast<const Words<kWords>*>(from);
  Words<kWords> value{};
  for (uint32_t at = 0; at < left; ++at) {
    value.word[at / 4] |= static_cast<uint32_t>(from[at]) << 8 * (at % 4);
  }
  return value;
}

template <int kWords>
__device__ inline void store_words(unsigned char* to, uint64_t left, const Words<kWords>& value) {
  if (left >= sizeof(Words<kWords>)) {
    *reinterpret_cast<Words<kWords>*>(to) = value;
    return;
  }
  for (uint32_t at = 0; at < left; ++at)
    to[at] = static_cast<unsigned char>(value.word[at / 4] >> 8 * (at % 4));
}

}  // namespace spark::device
