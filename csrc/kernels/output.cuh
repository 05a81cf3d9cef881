// What becomes of both ranks' data: their sum, or one after the other.
#pragma once

#include "numbers.cuh"
#include "parameters.hpp"

namespace spark::device {

// `at` and `bytes` count bytes of the input. A word is 4 bytes; the last one of a message may be a part.
template <typename Number>
struct Sum {
  static constexpr bool kKeepsOwn = false;  // the result needs both at once

  // Rank 0's value first, on both ranks.
  __device__ static uint32_t combine(const RankParameters& rank, uint32_t own, uint32_t theirs) {
    return rank.index == 0 ? Number::add(own, theirs) : Number::add(theirs, own);
  }
  __device__ static uint64_t place(const RankParameters&, const Call&, uint64_t at, bool) { return at; }
};

struct Concatenation {
  static constexpr bool kKeepsOwn = true;  // this rank's own part is copied as it is

  __device__ static uint32_t combine(const RankParameters&, uint32_t, uint32_t theirs) { return theirs; }

  // Where input byte `at` of this rank, or of the peer, belongs: rows of `inner` bytes alternate.
  __device__ static uint64_t place(const RankParameters& rank, const Call& call, uint64_t at, bool own) {
    const uint32_t source = own ? rank.index : 1 - rank.index;
    if (call.inner == call.bytes) return at + source * call.bytes;
    const uint32_t row = static_cast<uint32_t>(at / call.inner);
    return at + (static_cast<uint64_t>(row) + source) * call.inner;
  }
};

}  // namespace spark::device
