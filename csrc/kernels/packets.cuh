// A collective whose message goes as flagged packets: one launch, one packet a thread.
#pragma once

#include "output.cuh"
#include "pieces.cuh"
#include "progress.cuh"
#include "wait.cuh"

namespace spark::device {

// Packet 0 is the header (tag, bytes) and is handled like any other, so that nobody waits for two in a row.
// `in` and `out` are aligned to 8 bytes; there are as many threads as packets, or more, and in each block one
// more warp, for what nobody should wait for.
template <typename Output>
__device__ inline void exchange_packets(const Rank& rank, const Call& call) {
  const uint32_t senders = blockDim.x - kWarp;
  const uint32_t packet = blockIdx.x * senders + threadIdx.x;
  const uint32_t packets = static_cast<uint32_t>(packet_count(call.bytes));
  const bool mine = threadIdx.x < senders && packet < packets, header = mine && packet == 0;
  const uint64_t at = static_cast<uint64_t>(packet - 1) * kPacketData, left = call.bytes - at;
  wait_for_kernel_before();
  // Input and progress are asked for together: neither waits for the other.
  Words<2> own{call.tag, static_cast<uint32_t>(call.bytes)};
  if (mine && !header) own = load_words<2>(call.in + at, left);
  const Start start = start_of(rank);
  if (start.poisoned) return;
  const uint32_t sequence = start.sequence, slot = sequence & (rank.slots - 1);
  // Relaxed: data and flag travel in the same 8 bytes. That the slot may be written is known from the
  // previous kernels, which received what the peer sent after it had read this slot.
  if (mine) {
    store_relaxed(reinterpret_cast<Halves*>(rank.out.packets + slot * size_t{rank.packet_area}) + packet,
                  Halves{packet_half(own.word[0], sequence), packet_half(own.word[1], sequence)});
  }
  let_next_kernel_start();
  if (blockIdx.x == 0 && threadIdx.x == senders) count(rank, call, sequence, 1, true);
  if (mine) {
    if (Output::kKeepsOwn && !header) {
      store_words(call.out + Output::place(rank, call, at, true), left, own);
    }
    const auto* from =
        reinterpret_cast<const Halves*>(rank.in.packets + slot * size_t{rank.packet_area}) + packet;
    Wait wait(rank, sequence, call.tag);
    Halves value = load_relaxed(from);
    bool good = true;
    while (good && !(half_arrived(value.first, sequence) && half_arrived(value.second, sequence))) {
      good = wait.go_on();
      value = load_relaxed(from);
    }
    const uint32_t low = half_data(value.first), high = half_data(value.second);
    if (good && header && low != call.tag) give_up(rank, kMismatch, sequence, call.tag, low);
    if (good && !header) {
      const Words<2> result{Output::combine(rank, own.word[0], low),
                            Output::combine(rank, own.word[1], high)};
      store_words(call.out + Output::place(rank, call, at, false), left, result);
    }
  }
  if (clears(rank, sequence) && threadIdx.x < senders) {
    clear(rank, rank.out, sequence, packets, 0, packet, gridDim.x * senders);
    clear(rank, rank.in, sequence, 0, 0, packet, gridDim.x * senders);
  }
  advance(rank, sequence);
}

}  // namespace spark::device
