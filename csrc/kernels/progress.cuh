// How far this rank has come: read at a kernel's start, advanced at its end.
#pragma once

#include "../operation.hpp"
#include "rank.hpp"
#include "wait.cuh"

namespace spark::device {

constexpr uint32_t kWarp = 32;

// Programmatic dependent launch (compute capability 9.0 and later): this kernel was started while the one
// before it still ran, and reads nothing until that is through and its stores can be seen.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be started, up to its own wait. Takes effect once every block has said so: none of this
// kernel's blocks can be kept from running by it.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Start {
  uint32_t sequence;  // of this kernel's first message
  bool poisoned;
};

__device__ inline Start start_of(const Rank& rank) {
  const uint4 progress = *reinterpret_cast<const uint4*>(rank.progress);  // both words in one load
  return {progress.x + 1, progress.y != 0};
}

// Adds this call to the totals and shows them to the host. By one thread, at the start: stores to host memory
// at the end would have to arrive before the kernel counts as done. Two kernels at once, on two streams,
// would take the same sequence numbers: the second one to come gives up.
__device__ inline void count(const Rank& rank, const Call& call, uint32_t sequence, uint32_t messages,
                             bool as_packets) {
  if (atomicExch(&rank.progress->running, 1u) != 0) give_up(rank, kConcurrent, sequence, call.tag, 0);
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
  rank.progress->running = 0;
  rank.progress->sequence = last;
}

// Sequence numbers come round after 2^32 messages, which is days of decoding. A word that no later message
// happened to overwrite would then be taken for a new one. So each slot is cleared four times in that time:
// by its sender, where the message does not reach; by its receiver, once the message is read. The peer writes
// there again only after this rank's next kernel has sent.
__device__ inline bool clears(const Rank& rank, uint32_t sequence) {
  return (sequence & (rank.clear_interval - 1)) < rank.slots;
}

// Clears the packets from `first_packet` on and the flags from `first_flag` on of a slot. By `threads`
// threads in all blocks, of which this one is number `thread` and clears every packet of that number: of
// those that are waited for, only its own. Of the flags, each block clears its own and those that no block
// waits for.
__device__ inline void clear(const Rank& rank, const Lane& lane, uint32_t sequence, uint32_t first_packet,
                             uint32_t first_flag, uint32_t thread, uint32_t threads) {
  const uint32_t slot = sequence & (rank.slots - 1), never = sequence + (1u << 31);
  auto* packets = reinterpret_cast<Halves*>(lane.packets + static_cast<size_t>(slot) * rank.packet_area);
  for (uint32_t at = thread; at < rank.packet_area / sizeof(Halves); at += threads) {
    if (at >= first_packet) store_relaxed(packets + at, Halves{packet_half(0, never), packet_half(0, never)});
  }
  if (threadIdx.x != 0) return;
  auto* flags = reinterpret_cast<Flag*>(lane.flags) + slot * kMaxPieces;
  for (uint32_t piece = blockIdx.x; piece < kMaxPieces; piece += gridDim.x) {
    if (piece >= first_flag) store_relaxed(&flags[piece].value, payload_flag(never, 0));
  }
}

}  // namespace spark::device
