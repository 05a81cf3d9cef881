// Loading and storing a few bytes of a tensor, whose end need not be aligned.
#pragma once

#include <cstdint>

namespace spark::device {

// `kWords` words of a tensor; those beyond its end are zero and are not stored.
template <int kWords>
struct alignas(kWords % 2 == 0 ? 4 * kWords : 4) Words {
  uint32_t word[kWords];
};

// A tensor's last, incomplete words. Not inlined: it happens once in a message at most, and its code would
// lie between the instructions of all others.
template <int kWords>
__device__ __noinline__ Words<kWords> load_last_words(const unsigned char* from, uint32_t left) {
  Words<kWords> value{};
#pragma unroll
  for (uint32_t at = 0; at < sizeof(Words<kWords>); ++at) {
    if (at < left) value.word[at / 4] |= static_cast<uint32_t>(from[at]) << 8 * (at % 4);
  }
  return value;
}

template <int kWords>
__device__ __noinline__ void store_last_words(unsigned char* to, uint32_t left, Words<kWords> value) {
#pragma unroll
  for (uint32_t at = 0; at < sizeof(Words<kWords>); ++at) {
    if (at < left) to[at] = static_cast<unsigned char>(value.word[at / 4] >> 8 * (at % 4));
  }
}

template <int kWords>
__device__ inline Words<kWords> load_words(const unsigned char* from, uint64_t left) {
  if (left >= sizeof(Words<kWords>)) return *reinterpret_cast<const Words<kWords>*>(from);
  return load_last_words<kWords>(from, static_cast<uint32_t>(left));
}

template <int kWords>
__device__ inline void store_words(unsigned char* to, uint64_t left, const Words<kWords>& value) {
  if (left >= sizeof(Words<kWords>)) {
    *reinterpret_cast<Words<kWords>*>(to) = value;
    return;
  }
  store_last_words<kWords>(to, static_cast<uint32_t>(left), value);
}

}  // namespace spark::device
