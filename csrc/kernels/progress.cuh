// The rank's progress in device memory: read at a kernel's start, advanced at its end.
#pragma once

#include "../region/operation.hpp"
#include "parameters.hpp"
#include "wait.cuh"

namespace spark::device {

// Programmatic dependent launch (compute capability 9.0 and later): this kernel was started while the
// previous one still ran, and reads nothing until that one has ended and its stores are visible.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel to start, up to its own wait. Takes effect once every warp of every block has called
// it or has ended, so the next kernel takes no multiprocessor from this kernel's blocks.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct FirstMessage {
  uint32_t sequence;  // of this block's first message
  bool poisoned;
};

__device__ inline FirstMessage first_message(const RankParameters& rank) {
  const Progress& progress = *rank.progress;
  // Two independent loads.
  return {progress.sequences[blockIdx.x] + 1, progress.poisoned != 0};
}

// Two kernels at once, on two streams, would use the same sequence numbers: a kernel that finds blocks of
// another one still running, or ended since this one began, gives up. By one thread of a kernel's first
// block, off the critical path.
__device__ inline void check_alone(const RankParameters& rank, const Call& call, uint32_t sequence) {
  const uint32_t before = atomicAdd(&rank.progress->begun, gridDim.x);
  // Kernels before this one in the order have ended with all their blocks, visibly. Blocks of this kernel may
  // have ended too, which only adds.
  const uint32_t ended = *const_cast<volatile uint32_t*>(&rank.progress->ended);
  // This block advances its sequence number only after this thread has ended, so if it has advanced, another
  // kernel did it. Loaded second: `advance` adds to both, to this one first, and they are in one line.
  const uint32_t last = *const_cast<volatile uint32_t*>(&rank.progress->sequences[0]);
  if (static_cast<int32_t>(ended - before) < 0 || last + 1 != sequence) {
    give_up(rank, kConcurrent, sequence, call.tag, 0);
  }
}

// Adds this call to the totals and copies them to the host. By one thread, at the start: a kernel ends only
// after its stores to host memory have arrived.
__device__ inline void publish_counters(const RankParameters& rank, const Call& call, uint32_t messages,
                                        bool as_packets) {
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

// Bookkeeping off the critical path: no thread that moves data waits for it. By a whole warp of the first
// block.
__device__ inline void update_progress(const RankParameters& rank, const Call& call, uint32_t sequence,
                                       uint32_t messages, bool as_packets) {
  if (blockIdx.x != 0) return;
  const uint32_t thread = threadIdx.x % kWarp;
  if (thread == 0) {
    check_alone(rank, call, sequence);
    publish_counters(rank, call, messages, as_packets);
  }
  // The sequence numbers of blocks that this kernel does not have advance too. The next kernel is the first
  // to read them.
  for (uint32_t block = gridDim.x + thread; block < kMaxPieces; block += kWarp) {
    atomicAdd(&rank.progress->sequences[block], messages);
  }
}

// Ends a block, by all of its threads. Adds, and does not store: another kernel might be in
// `update_progress`.
__device__ inline void advance(const RankParameters& rank, uint32_t messages) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  atomicAdd(&rank.progress->sequences[blockIdx.x], messages);
  atomicAdd(&rank.progress->ended, 1u);
}

}  // namespace spark::device
