// A collective whose message goes as flagged packets: one launch; a packet a thread, or a few of very many.
#pragma once

#include "output.cuh"
#include "progress.cuh"
#include "wait.cuh"
#include "words.cuh"

namespace spark::device {

// One thread's share of the exchange: packets `first`, `first + step` and so on. Packet 0 is the header (tag,
// bytes).
template <typename Output>
class Packets {
 public:
  __device__ Packets(const RankParameters& rank, const Call& call, uint32_t first, uint32_t step)
      : rank_(rank),
        call_(call),
        first_(first),
        step_(step),
        count_(static_cast<uint32_t>(packet_count(call.bytes))) {}

  // What the first packet carries; asked for before it is known whether the rank is poisoned.
  __device__ void load() {
    if (first_ < count_) own_ = data(first_);
  }

  __device__ void send(uint32_t sequence) {
    Words<2> own = own_;
    for (uint32_t packet = first_; packet < count_; packet += step_) {
      if (packet != first_) own = data(packet);
      // Relaxed: data and flag travel in the same 8 bytes. That the slot may be written is known from the
      // previous kernels, which received what the peer sent after it had read this slot.
      store_relaxed(place(rank_.out, sequence) + packet,
                    Halves{packet_half(own.word[0], sequence), packet_half(own.word[1], sequence)});
      if (Output::kKeepsOwn && packet != 0) {
        store_words(call_.out + Output::place(rank_, call_, at(packet), true), left(packet), own);
      }
    }
  }

  __device__ void receive(uint32_t sequence) {
    Words<2> own = own_;
    Wait wait(rank_, sequence, call_.tag);
    for (uint32_t packet = first_; packet < count_; packet += step_) {
      Halves theirs;
      if (!device::receive(place(rank_.in, sequence) + packet, sequence, wait, theirs)) return;
      const uint32_t low = half_data(theirs.first), high = half_data(theirs.second);
      if (packet == 0) {
        if (low != call_.tag) give_up(rank_, kMismatch, sequence, call_.tag, low);
        continue;
      }
      if (!Output::kKeepsOwn && packet != first_) own = data(packet);
      const Words<2> result{Output::combine(rank_, own.word[0], low),
                            Output::combine(rank_, own.word[1], high)};
      store_words(call_.out + Output::place(rank_, call_, at(packet), false), left(packet), result);
    }
  }

  // After `receive`.
  __device__ void clear(uint32_t sequence) const {
    clear_packets(rank_, rank_.out, sequence, count_, first_, step_);
    clear_packets(rank_, rank_.in, sequence, 0, first_, step_);
  }

 private:
  __device__ uint64_t at(uint32_t packet) const { return static_cast<uint64_t>(packet - 1) * kPacketData; }
  __device__ uint64_t left(uint32_t packet) const { return call_.bytes - at(packet); }
  __device__ Words<2> data(uint32_t packet) const {
    if (packet == 0) return {call_.tag, static_cast<uint32_t>(call_.bytes)};
    return load_words<2>(call_.in + at(packet), left(packet));
  }
  __device__ Halves* place(const Slots& lane, uint32_t sequence) const {
    const uint32_t slot = sequence & (rank_.slots - 1);
    return reinterpret_cast<Halves*>(lane.packets + slot * size_t{rank_.packet_area});
  }

  const RankParameters& rank_;
  const Call& call_;
  uint32_t first_, step_, count_;
  Words<2> own_{};
};

// `in` and `out` are aligned to 8 bytes. Each warp's packets begin on a cache line: two warps that want the
// same one from host memory would be answered one after the other.
template <typename Output>
__device__ inline void exchange_packets(const RankParameters& rank, const Call& call) {
  const uint32_t movers = blockDim.x - kPacketsSideThreads;
  const bool mover = threadIdx.x < movers;
  Packets<Output> packets(rank, call, blockIdx.x * movers + threadIdx.x, gridDim.x * movers);
  wait_for_kernel_before();
  // Input and progress are asked for together: neither waits for the other.
  if (mover) packets.load();
  const Start start = start_of(rank);
  if (start.poisoned) return;
  if (mover) packets.send(start.sequence);
  let_next_kernel_start();
  if (mover) {
    packets.receive(start.sequence);
    if (clears(rank, start.sequence)) {
      packets.clear(start.sequence);
      if (threadIdx.x == 0) {
        clear_flags(rank, rank.out, start.sequence, 0);
        clear_flags(rank, rank.in, start.sequence, 0);
      }
    }
  } else {
    keep_books(rank, call, start.sequence, 1, true);
  }
  advance(rank, 1);
}

}  // namespace spark::device
