// How far this rank has come: read at a kernel's start, advanced at its end.
#pragma once

#include "../operation.hpp"
#include "rank.hpp"
#include "system_scope.cuh"

namespace spark::device {

struct Start {
  uint32_t sequence;  // of this kernel's first message
  bool poisoned;
};

__device__ inline Start start_of(const Rank& rank) {
  const uint4 progress = *reinterpret_cast<const uint4*>(rank.progress);  // both words in one load
  return {progress.x + 1, progress.y != 0};
}

// Adds this call to the totals and shows them to the host. By one thread, at the start: stores to host memory
// at the end would have to arrive before the kernel counts as done.
__device__ inline void count(const Rank& rank, const Call& call, uint32_t messages, bool as_packets) {
  Totals totals = rank.progress->totals;
  if (static_cast<Kind>(call.tag >> 30) == Kind::kAllReduce) {
    totals.all_reduces += 1;
    totals.all_reduce_bytes += call.bytes;
  } else {
    totals.all_gathers += 1;
    totals.all_gather_bytes += call.bytes;
  }
  (as_packets ? totals.packet_messages : totals.payload_messages) += messages;
  totals.chunked_operations += messages > 1;
  totals.sequence += messages;
  rank.progress->totals = totals;
  const auto* from = reinterpret_cast<const Halves*>(&totals);
  auto* to = reinterpret_cast<Halves*>(&rank.report->totals);
#pragma unroll
  for (int at = 0; at < static_cast<int>(sizeof totals / sizeof(Halves)); ++at)
    store_relaxed(to + at, from[at]);
}

// The last block to come through advances the sequence: by then every block has read it.
__device__ inline void advance(const Rank& rank, uint32_t last) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1 && atomicAdd(&rank.progress->arrived, 1u) + 1 < gridDim.x) return;
  rank.progress->arrived = 0;
  rank.progress->sequence = last;
}

// Sequence numbers come round after 2^32 messages, which is days of decoding. A word that no later message
// happened to overwrite would then be taken for a new one. So each slot is cleared four times in that time,
// after its message was read: the peer writes there again only after this rank's next kernel has sent.
//
// By all threads of a block, for a block that has read packets `thread`, `thread` + `threads`, ... and the
// flag of its own index, or less: each block clears what no other one reads.
__device__ inline void clear_now_and_then(const Rank& rank, uint32_t sequence) {
  if ((sequence & (rank.clear_interval - 1)) >= rank.slots) return;
  const uint32_t slot = sequence & (rank.slots - 1), never = sequence + (1u << 31);
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  auto* packets = reinterpret_cast<Halves*>(rank.in.packets + slot * rank.packet_area);
  for (uint32_t at = thread; at < rank.packet_area / sizeof(Halves); at += threads) {
    store_relaxed(packets + at, Halves{packet_half(0, never), packet_half(0, never)});
  }
  if (threadIdx.x != 0) return;
  auto* flags = reinterpret_cast<Flag*>(rank.in.flags) + slot * kMaxPieces;
  for (uint32_t piece = blockIdx.x; piece < kMaxPieces; piece += gridDim.x) {
    store_relaxed(&flags[piece].value, payload_flag(never, 0));
  }
}

}  // namespace spark::device
