// How far this rank has come: read at a kernel's start, advanced at its end.
#pragma once

#include "../region/operation.hpp"
#include "parameters.hpp"
#include "wait.cuh"

namespace spark::device {

// Programmatic dependent launch (compute capability 9.0 and later): this kernel was started while the one
// before it still ran, and reads nothing until that is through and its stores can be seen.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be started, up to its own wait. Takes effect once every warp of every block has said so
// or is through: none of this kernel's blocks can be kept from running by it.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Start {
  uint32_t sequence;  // of this block's first message
  bool poisoned;
};

__device__ inline Start start_of(const RankParameters& rank) {
  const Progress& progress = *rank.progress;
  // Two loads of which neither waits for the other.
  return {progress.sequences[blockIdx.x] + 1, progress.poisoned != 0};
}

// Two kernels at once, on two streams, would mix up their sequence numbers: one that finds blocks of another
// still running, or that they ended since it began, gives up. By one thread of a kernel's first block, beside
// what others wait for.
__device__ inline void begin(const RankParameters& rank, const Call& call, uint32_t sequence) {
  const uint32_t before = atomicAdd(&rank.progress->begun, gridDim.x);
  // Kernels that were ordered behind one another have ended whole, and can be seen to have. This one's own
  // blocks may have ended too, which only adds.
  const uint32_t ended = *const_cast<volatile uint32_t*>(&rank.progress->ended);
  // This block advances its sequence number only once this thread is through, so whoever did it was another
  // kernel's. Looked at second: `advance` adds to both, this one first, in one line.
  const uint32_t last = *const_cast<volatile uint32_t*>(&rank.progress->sequences[0]);
  if (static_cast<int32_t>(ended - before) < 0 || last + 1 != sequence) {
    give_up(rank, kConcurrent, sequence, call.tag, 0);
  }
}

// Adds this call to the totals and shows them to the host. By one thread, at the start: stores to host memory
// at the end would have to arrive before the kernel counts as done.
__device__ inline void count(const RankParameters& rank, const Call& call, uint32_t messages,
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

// What no thread that moves data should wait for. By a whole warp of the first block.
__device__ inline void keep_books(const RankParameters& rank, const Call& call, uint32_t sequence,
                                  uint32_t messages, bool as_packets) {
  if (blockIdx.x != 0) return;
  const uint32_t lane = threadIdx.x % kWarp;
  if (lane == 0) {
    begin(rank, call, sequence);
    count(rank, call, messages, as_packets);
  }
  // Blocks that this kernel does not have come along all the same. No kernel reads them before the next one.
  for (uint32_t block = gridDim.x + lane; block < kMaxPieces; block += kWarp) {
    atomicAdd(&rank.progress->sequences[block], messages);
  }
}

// Ends a block, by all of its threads. Added and not stored: see `keep_books`, which another kernel might be
// at.
__device__ inline void advance(const RankParameters& rank, uint32_t messages) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  atomicAdd(&rank.progress->sequences[blockIdx.x], messages);
  atomicAdd(&rank.progress->ended, 1u);
}

// Sequence numbers come round after 2^32 messages, which is days of decoding. A word that no later message
// happened to overwrite would then be taken for a new one. So each slot is cleared four times in that time:
// by its sender, where the message does not reach; by its receiver, once the message is read. The peer writes
// there again only after this rank's next kernel has sent.
__device__ inline bool clears(const RankParameters& rank, uint32_t sequence) {
  return (sequence & (rank.clear_interval - 1)) < rank.slots;
}

// Clears the packets from `first_packet` on of a slot, of which this thread has those of number `thread` and
// every `threads`-th after it: of packets that are waited for, only its own.
__device__ inline void clear_packets(const RankParameters& rank, const Slots& lane, uint32_t sequence,
                                     uint32_t first_packet, uint32_t thread, uint32_t threads) {
  const uint32_t slot = sequence & (rank.slots - 1), never = sequence + (1u << 31);
  auto* packets = reinterpret_cast<Halves*>(lane.packets + static_cast<size_t>(slot) * rank.packet_area);
  for (uint32_t at = thread; at < rank.packet_area / sizeof(Halves); at += threads) {
    if (at >= first_packet) store_relaxed(packets + at, Halves{packet_half(0, never), packet_half(0, never)});
  }
}

// The same for flags, by one thread of each block: its own, and those that no block waits for.
__device__ inline void clear_flags(const RankParameters& rank, const Slots& lane, uint32_t sequence,
                                   uint32_t first_flag) {
  const uint32_t slot = sequence & (rank.slots - 1), never = sequence + (1u << 31);
  auto* flags = reinterpret_cast<Flag*>(lane.flags) + slot * kMaxPieces;
  for (uint32_t piece = blockIdx.x; piece < kMaxPieces; piece += gridDim.x) {
    if (piece >= first_flag) store_relaxed(&flags[piece].value, payload_flag(never, 0));
  }
}

}  // namespace spark::device
