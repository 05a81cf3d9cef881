// A collective whose message is sent as flagged packets: one launch; one packet for each thread, or a few if
// there are very many.
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
        count_(static_cast<uint32_t>(wide_packet_count(call.bytes))) {}

  // Loads the data of the first packet, before it is known whether the rank is poisoned.
  __device__ void load() {
    if (first_ < count_) own_ = data(first_);
  }

  __device__ void send(uint32_t sequence) {
    Halves* const out = SlotView(rank_, rank_.out).packets(sequence);
    Data own = own_;
    for (uint32_t packet = first_; packet < count_; packet += step_) {
      if (packet != first_) own = data(packet);
      // Relaxed: data and flag are one access. The slot may be written: previous kernels have received what
      // the peer sent after it had read this slot.
      store_relaxed_whole(out + packet, {static_cast<uint64_t>(own.word[1]) << 32 | own.word[0],
                                         static_cast<uint64_t>(sequence) << 32 | own.word[2]});
      if (Output::kKeepsOwn && packet != 0) store(packet, own, true);
    }
  }

  __device__ void receive(uint32_t sequence) {
    const Halves* const in = SlotView(rank_, rank_.in).packets(sequence);
    Data own = own_;
    Wait wait(rank_, sequence, call_.tag);
    for (uint32_t packet = first_; packet < count_; packet += step_) {
      Halves halves;
      if (!receive_packet(in + packet, sequence, wait, halves)) return;
      Data theirs{{static_cast<uint32_t>(halves.first), static_cast<uint32_t>(halves.first >> 32),
                   static_cast<uint32_t>(halves.second)}};
      if (packet == 0) {
        if (theirs.word[0] != call_.tag) give_up(rank_, kMismatch, sequence, call_.tag, theirs.word[0]);
        continue;
      }
      if (!Output::kKeepsOwn && packet != first_) own = data(packet);
#pragma unroll
      for (int word = 0; word < 3; ++word) {
        theirs.word[word] = Output::combine(rank_, own.word[word], theirs.word[word]);
      }
      store(packet, theirs, false);
    }
  }

  // After `receive`.
  __device__ void clear(uint32_t sequence) const {
    SlotView(rank_, rank_.out).clear_packets(sequence, count_, first_, step_);
    SlotView(rank_, rank_.in).clear_packets(sequence, 0, first_, step_);
  }

 private:
  using Data = Words<3>;
  static_assert(sizeof(Data) == kWidePacketData);

  __device__ uint64_t at(uint32_t packet) const {
    return static_cast<uint64_t>(packet - 1) * kWidePacketData;
  }
  __device__ Data data(uint32_t packet) const {
    if (packet == 0) return {call_.tag, static_cast<uint32_t>(call_.bytes), 0};
    return load_words<3>(call_.in + at(packet), call_.bytes - at(packet));
  }
  // A packet's words may belong to two rows of a gather, which are multiples of 16 bytes.
  __device__ void store(uint32_t packet, const Data& value, bool own) const {
    const uint64_t from = at(packet);
    if constexpr (!Output::kKeepsOwn) {
      store_words(call_.out + from, call_.bytes - from, value);
    } else {
#pragma unroll
      for (uint32_t word = 0; word < 3; ++word) {
        const uint64_t byte = from + 4 * word;
        if (byte >= call_.bytes) return;
        store_words(call_.out + Output::place(rank_, call_, byte, own), call_.bytes - byte,
                    Words<1>{value.word[word]});
      }
    }
  }

  const RankParameters& rank_;
  const Call& call_;
  uint32_t first_, step_, count_;
  Data own_{};
};

// `in` and `out` are aligned to 8 bytes. Each warp's packets begin on a cache line: loads of one line of host
// memory by two warps would be answered one after the other.
template <typename Output>
__device__ inline void exchange_packets(const RankParameters& rank, const Call& call) {
  const uint32_t movers = blockDim.x - kPacketsSideThreads;
  const bool mover = threadIdx.x < movers;
  Packets<Output> packets(rank, call, blockIdx.x * movers + threadIdx.x, gridDim.x * movers);
  wait_for_previous_kernel();
  // Loads of the input and of the progress are issued together: neither waits for the other.
  if (mover) packets.load();
  const FirstMessage first = first_message(rank);
  if (first.poisoned) return;
  if (mover) packets.send(first.sequence);
  let_next_kernel_start();
  if (mover) {
    packets.receive(first.sequence);
    if (SlotView::clears(rank, first.sequence)) {
      packets.clear(first.sequence);
      if (threadIdx.x == 0) {
        SlotView(rank, rank.out).clear_flags(first.sequence, 0);
        SlotView(rank, rank.in).clear_flags(first.sequence, 0);
      }
    }
  } else {
    update_progress(rank, call, first.sequence, 1, true);
  }
  advance(rank, 1);
}

}  // namespace spark::device
