// A kernel's view of the slots of one direction, as region.hpp is the CPU's: where the words of a message
// lie.
#pragma once

#include "parameters.hpp"
#include "system_scope.cuh"

namespace spark::device {

class SlotView {
 public:
  // `slots` is `rank.in` or `rank.out`.
  __device__ SlotView(const RankParameters& rank, const Slots& slots) : rank_(rank), slots_(slots) {}

  // The packets of message `sequence`; the first one is the header.
  __device__ Halves* packets(uint32_t sequence) const {
    return reinterpret_cast<Halves*>(slots_.packets + slot(sequence) * size_t{rank_.packet_area});
  }
  // The flag of a piece of its payload.
  __device__ Flag* flag(uint32_t sequence, uint32_t piece) const {
    return reinterpret_cast<Flag*>(slots_.flags) + slot(sequence) * kMaxPieces + piece;
  }
  __device__ unsigned char* payload(uint32_t sequence) const {
    return slots_.payload + static_cast<size_t>(slot(sequence)) * rank_.payload_area;
  }

  // Whether the slot of `sequence` must be cleared: by its sender, where the message does not reach; by its
  // receiver, once the message is read. The peer writes there again only after this rank's next kernel has
  // sent.
  __device__ static bool clears(const RankParameters& rank, uint32_t sequence) {
    return spark::clears(sequence, rank.clear_interval, rank.slots);
  }

  // Clears the packets of a slot from `first_packet` on, of which this thread has number `thread` and every
  // `threads`-th after it: of packets that are awaited, only its own.
  __device__ void clear_packets(uint32_t sequence, uint32_t first_packet, uint32_t thread,
                                uint32_t threads) const {
    Halves* cleared = packets(sequence);
    const uint64_t half = packet_half(0, never(sequence));
    for (uint32_t at = thread; at < rank_.packet_area / sizeof(Halves); at += threads) {
      if (at >= first_packet) store_relaxed(cleared + at, Halves{half, half});
    }
  }

  // The same for flags, by one thread of each block: the block's own, and those that no block awaits.
  __device__ void clear_flags(uint32_t sequence, uint32_t first_flag) const {
    Flag* cleared = flag(sequence, 0);
    for (uint32_t piece = blockIdx.x; piece < kMaxPieces; piece += gridDim.x) {
      if (piece >= first_flag) store_relaxed(&cleared[piece].value, payload_flag(never(sequence), 0));
    }
  }

 private:
  __device__ uint32_t slot(uint32_t sequence) const { return sequence & (rank_.slots - 1); }
  // The sequence number half the circle away, which no message in this slot has for a long time.
  __device__ static uint32_t never(uint32_t sequence) { return sequence + (1u << 31); }

  const RankParameters& rank_;
  const Slots& slots_;
};

}  // namespace spark::device
