// All-reduce of a message that goes as flagged packets, in one launch.
#pragma once

#include "../operation.hpp"
#include "numbers.cuh"
#include "wait.cuh"

namespace spark::device {

__device__ inline Halves packet(uint32_t low, uint32_t high, uint32_t sequence) {
  return {packet_half(low, sequence), packet_half(high, sequence)};
}

__device__ inline bool arrived(const Halves& value, uint32_t sequence) {
  return half_arrived(value.first, sequence) && half_arrived(value.second, sequence);
}

// The last block to come through advances the sequence: by then every block has read it.
__device__ inline void advance(const Rank& rank, uint32_t sequence) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1 && atomicAdd(&rank.progress->arrived, 1u) + 1 < gridDim.x) return;
  rank.progress->arrived = 0;
  rank.progress->sequence = sequence;
}

// Each thread keeps its own packets' data in registers: input is read once, the peer's packets once each
// look. Packet 0 is the header (tag, bytes) and is handled like any other, so that nobody waits for two in a
// row. `in` and `out` are aligned to 8 bytes and hold `packets` - 1 pieces of 8; packets <= kPackets *
// threads.
template <typename Number, int kPackets>
__global__ void __launch_bounds__(1024, 1)
    all_reduce_packets(const Rank rank, const uint2* __restrict__ in, uint2* __restrict__ out,
                       uint32_t packets, uint32_t tag, uint32_t bytes) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  // Input and progress are asked for together: neither waits for the other.
  uint2 own[kPackets];
#pragma unroll
  for (int index = 0; index < kPackets; ++index) {
    uint32_t at = thread + index * threads;
    if (at < packets) own[index] = at == 0 ? make_uint2(tag, bytes) : in[at - 1];
  }
  const uint4 progress = *reinterpret_cast<const uint4*>(rank.progress);
  if (progress.y != 0) return;
  const uint32_t sequence = progress.x + 1;
  const RegionLayout layout(rank.sizes);
  const size_t slot = layout.recv_packets() + (sequence & (rank.sizes.slots - 1)) * layout.packet_area();
  Halves* theirs = reinterpret_cast<Halves*>(rank.peer + slot);
  const Halves* ours = reinterpret_cast<const Halves*>(rank.mine + slot);
#pragma unroll
  for (int index = 0; index < kPackets; ++index) {
    uint32_t at = thread + index * threads;
    // Relaxed: data and flag travel in the same 8 bytes. That the slot may be written is known from the
    // previous kernels, which received what the peer sent after it had read this slot.
    if (at < packets) store_relaxed(theirs + at, packet(own[index].x, own[index].y, sequence));
  }
  Wait wait(rank, sequence, tag);
#pragma unroll
  for (int index = 0; index < kPackets; ++index) {
    uint32_t at = thread + index * threads;
    if (at >= packets) break;
    Halves value = load_relaxed(ours + at);
    bool good = true;
    while (good && !arrived(value, sequence)) {
      good = wait.go_on();
      value = load_relaxed(ours + at);
    }
    uint32_t x = half_data(value.first), y = half_data(value.second);
    if (!good) break;
    if (at == 0) {
      if (x != tag) give_up(rank, kMismatch, sequence, tag, x);
      continue;
    }
    // Rank 0's value first, on both ranks.
    out[at - 1] = rank.index == 0 ? make_uint2(Number::add(own[index].x, x), Number::add(own[index].y, y))
                                  : make_uint2(Number::add(x, own[index].x), Number::add(y, own[index].y));
  }
  advance(rank, sequence);
}

}  // namespace spark::device
