// A collective whose messages go as payload, then flag: one launch, many blocks, as many messages as it
// takes.
#pragma once

#include "output.cuh"
#include "progress.cuh"
#include "relay.cuh"
#include "wait.cuh"
#include "words.cuh"

namespace spark::device {

// One block's share of the exchange: the same piece of every message, each with a flag of its own, so that
// blocks wait for nobody but the block of the same index on the peer. Pieces of the last message may be
// empty; their flags travel nevertheless: what a slot may be overwritten by follows from the flags of all
// blocks.
//
// The block's threads have parts: some send, as many receive, and one looks out for flags. So both directions
// of the link are busy at the same time, and nobody who waits for the peer keeps the block from sending.
template <typename Output>
class Pieces {
 public:
  // `part` is this thread's number among the `parts` that send, or that receive.
  __device__ Pieces(const RankParameters& rank, const Call& call, Relay& relay, uint32_t first, uint32_t part,
                    uint32_t parts)
      : rank_(rank),
        call_(call),
        relay_(relay),
        first_(first),
        piece_(call.chunk / gridDim.x),
        messages_(static_cast<uint32_t>((call.bytes + call.chunk - 1) / call.chunk)),
        part_(part),
        parts_(parts) {}

  __device__ uint32_t messages() const { return messages_; }

  __device__ void send() {
    for (uint32_t index = 0; index < messages_; ++index) {
      // The rule of docs/protocol.md: before message j, the peer's j - depth has been consumed.
      if (index >= rank_.depth && !relay_.consumed.wait_for(index - rank_.depth + 1)) return;
      send(index);
      if (index == 0) let_next_kernel_start();
    }
  }

  __device__ void receive() {
    for (uint32_t index = 0; index < messages_; ++index) {
      if (!receive(index)) {
        if (part_ == 0) relay_.consumed.end();
        return;
      }
      const uint32_t sequence = first_ + index;
      if (clears(rank_, sequence)) {
        clear_packets(rank_, rank_.in, sequence, 0, blockIdx.x * parts_ + part_, gridDim.x * parts_);
        if (part_ == 0) clear_flags(rank_, rank_.in, sequence, 0);
      }
      if (index + rank_.depth < messages_) {  // somebody will wait for it
        meet(Part::kReceivers, parts_);
        if (part_ == 0) relay_.consumed.raise(index + 1);
      }
    }
  }

  // By one thread.
  __device__ void look_out() {
    for (uint32_t index = 0; index < messages_; ++index) {
      const uint32_t sequence = first_ + index;
      const uint64_t* word = &flag(rank_.in, index)->value;
      Wait wait(rank_, sequence, call_.tag);
      // Acquire: the payload was there before the flag. The relay hands that on to the threads that receive.
      uint64_t value = load_acquire(word);
      while (flag_sequence(value) != sequence) {
        if (!wait.go_on()) return relay_.arrived.end();
        value = load_acquire(word);
      }
      if (flag_tag(value) != call_.tag) {
        give_up(rank_, kMismatch, sequence, call_.tag, flag_tag(value));
        return relay_.arrived.end();
      }
      relay_.arrived.raise(index + 1);
    }
  }

 private:
  using Vector = Words<4>;
  static constexpr uint32_t kUnroll = 4;

  // Bytes of message `index` that are this block's: from `begin` in the whole input.
  __device__ uint64_t begin(uint32_t index) const {
    return static_cast<uint64_t>(index) * call_.chunk + static_cast<uint64_t>(blockIdx.x) * piece_;
  }
  __device__ uint32_t length(uint32_t index) const {
    const uint64_t from = begin(index);
    return from >= call_.bytes
               ? 0
               : static_cast<uint32_t>(min(static_cast<uint64_t>(piece_), call_.bytes - from));
  }
  __device__ uint32_t slot(uint32_t index) const { return (first_ + index) & (rank_.slots - 1); }
  __device__ Flag* flag(const Slots& lane, uint32_t index) const {
    return reinterpret_cast<Flag*>(lane.flags) + slot(index) * kMaxPieces + blockIdx.x;
  }
  __device__ unsigned char* payload(const Slots& lane, uint32_t index) const {
    return lane.payload + static_cast<size_t>(slot(index)) * rank_.payload_area + blockIdx.x * piece_;
  }
  __device__ uint32_t step() const { return parts_ * sizeof(Vector); }

  // A thread's vectors of a piece, from byte `base` of it on; those beyond its end stay as they are.
  __device__ void load_own(Vector (&own)[kUnroll], uint64_t from, uint32_t base, uint32_t bytes) const {
#pragma unroll
    for (uint32_t turn = 0; turn < kUnroll; ++turn) {
      const uint32_t at = base + turn * step();
      if (at < bytes) own[turn] = load_words<4>(call_.in + from + at, bytes - at);
    }
  }

  __device__ void send(uint32_t index) {
    const uint32_t bytes = length(index), sequence = first_ + index;
    const uint64_t from = begin(index);
    unsigned char* to = payload(rank_.out, index);
    for (uint32_t base = part_ * sizeof(Vector); base < bytes; base += kUnroll * step()) {
      Vector own[kUnroll];
      load_own(own, from, base, bytes);
#pragma unroll
      for (uint32_t turn = 0; turn < kUnroll; ++turn) {
        const uint32_t at = base + turn * step();
        if (at >= bytes) break;
        // Relaxed: the flag's release orders them. Slots end on a whole vector: the rest of the last is
        // noise.
        store_relaxed(reinterpret_cast<Halves*>(to + at), as_halves(own[turn]));
        if (Output::kKeepsOwn) {
          store_words(call_.out + Output::place(rank_, call_, from + at, true), bytes - at, own[turn]);
        }
      }
    }
    if (clears(rank_, sequence)) {
      clear_packets(rank_, rank_.out, sequence, 0, blockIdx.x * parts_ + part_, gridDim.x * parts_);
      if (part_ == 0) clear_flags(rank_, rank_.out, sequence, gridDim.x);
    }
    meet(Part::kSenders, parts_);
    if (part_ == 0) {
      relay_.sent.raise(index + 1);  // not behind the flag's release, which waits for host memory
      Flag* staged = flag(rank_.out, index);
      store_relaxed(&staged->offset, blockIdx.x * piece_);
      store_relaxed(&staged->bytes, bytes);
      store_relaxed(&staged->pieces, gridDim.x);
      // Release, and cumulative through the barrier: who sees the flag sees what all threads of the block
      // stored.
      store_release(&staged->value, payload_flag(sequence, call_.tag));
    }
  }

  // False: it will not come.
  __device__ bool receive(uint32_t index) {
    const uint32_t bytes = length(index);
    const uint64_t from = begin(index);
    unsigned char* received = payload(rank_.in, index);
    bool arrived = false;
    uint32_t base = part_ * sizeof(Vector);
    do {
      Vector theirs[kUnroll], own[kUnroll];
      if (!Output::kKeepsOwn) load_own(own, from, base, bytes);  // before the wait, not after it
      // Both: the result may be put where the input is, which must have been sent by then.
      if (!arrived && (!relay_.arrived.wait_for(index + 1) || !relay_.sent.wait_for(index + 1))) return false;
      arrived = true;
#pragma unroll
      for (uint32_t turn = 0; turn < kUnroll; ++turn) {
        const uint32_t at = base + turn * step();
        if (at < bytes) theirs[turn] = as_words(load_relaxed(reinterpret_cast<const Halves*>(received + at)));
      }
#pragma unroll
      for (uint32_t turn = 0; turn < kUnroll; ++turn) {
        const uint32_t at = base + turn * step();
        if (at >= bytes) break;
        Vector result = theirs[turn];
        if (!Output::kKeepsOwn) {
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            result.word[word] = Output::combine(rank_, own[turn].word[word], theirs[turn].word[word]);
          }
        }
        store_words(call_.out + Output::place(rank_, call_, from + at, false), bytes - at, result);
      }
      base += kUnroll * step();
    } while (base < bytes);
    return true;
  }

  __device__ static Halves as_halves(const Vector& value) {
    return {static_cast<uint64_t>(value.word[1]) << 32 | value.word[0],
            static_cast<uint64_t>(value.word[3]) << 32 | value.word[2]};
  }
  __device__ static Vector as_words(const Halves& value) {
    return {static_cast<uint32_t>(value.first), static_cast<uint32_t>(value.first >> 32),
            static_cast<uint32_t>(value.second), static_cast<uint32_t>(value.second >> 32)};
  }

  const RankParameters& rank_;
  const Call& call_;
  Relay& relay_;
  uint32_t first_, piece_, messages_, part_, parts_;
};

// `in` and `out` are aligned to 16 bytes; the grid has at most kMaxPieces blocks, all of them resident at
// once, of as many threads that send as receive, and the side warps.
template <typename Output>
__device__ inline void exchange_payload(const RankParameters& rank, const Call& call) {
  __shared__ Relay relay;
  relay.clear();  // by every thread: they all write the same
  __syncthreads();
  wait_for_kernel_before();
  const Start start = start_of(rank);
  // All of the block or none: another block may poison the rank at this moment, and parts meet at barriers.
  if (__syncthreads_or(start.poisoned)) return;
  const uint32_t parts = (blockDim.x - kPayloadSideThreads) / 2;
  const bool sends = threadIdx.x < parts;
  Pieces<Output> pieces(rank, call, relay, start.sequence, sends ? threadIdx.x : threadIdx.x - parts, parts);
  if (!sends) let_next_kernel_start();
  if (sends) {
    pieces.send();
  } else if (threadIdx.x < 2 * parts) {
    pieces.receive();
  } else if (threadIdx.x == 2 * parts) {
    pieces.look_out();
  } else if (threadIdx.x >= 2 * parts + kWarp) {
    keep_books(rank, call, start.sequence, pieces.messages(), false);
  }
  advance(rank, pieces.messages());
}

}  // namespace spark::device
