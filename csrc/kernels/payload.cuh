// A collective whose messages are sent as payload, then flag: one launch, many blocks, as many messages as
// needed.
#pragma once

#include "output.cuh"
#include "progress.cuh"
#include "relay.cuh"
#include "wait.cuh"
#include "words.cuh"

namespace spark::device {

// One block's share of the exchange: the same piece of every message, each with a flag of its own, so that a
// block waits only for the block of the same index on the peer. Pieces of the last message may be empty;
// their flags are sent nevertheless: a slot may be overwritten once the flags of all blocks have arrived.
//
// The block's threads have roles: some send, as many receive, and one polls flags. So both directions of the
// link are busy at the same time, and a wait for the peer does not stop the block from sending.
template <typename Output>
class Pieces {
 public:
  // `thread` is this thread's number among the `threads` that send, or that receive.
  __device__ Pieces(const RankParameters& rank, const Call& call, Relay& relay, uint32_t first,
                    uint32_t thread, uint32_t threads)
      : rank_(rank),
        call_(call),
        relay_(relay),
        first_(first),
        piece_(call.chunk / gridDim.x),
        messages_(static_cast<uint32_t>((call.bytes + call.chunk - 1) / call.chunk)),
        thread_(thread),
        threads_(threads) {}

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
        if (thread_ == 0) relay_.consumed.end();
        return;
      }
      const uint32_t sequence = first_ + index;
      if (SlotView::clears(rank_, sequence)) {
        SlotView(rank_, rank_.in)
            .clear_packets(sequence, 0, blockIdx.x * threads_ + thread_, gridDim.x * threads_);
        if (thread_ == 0) SlotView(rank_, rank_.in).clear_flags(sequence, 0);
      }
      if (index + rank_.depth < messages_) {  // the senders will wait for it
        barrier(Role::kReceivers, threads_);
        if (thread_ == 0) relay_.consumed.raise(index + 1);
      }
    }
  }

  // By one thread.
  __device__ void poll_flags() {
    for (uint32_t index = 0; index < messages_; ++index) {
      const uint32_t sequence = first_ + index;
      const uint64_t* word = &flag(rank_.in, index)->value;
      Wait wait(rank_, sequence, call_.tag);
      // Acquire: the payload was there before the flag. The relay hands that on to the threads that receive.
      uint64_t value = load_acquire(word);
      while (flag_sequence(value) != sequence) {
        if (!wait.step()) return relay_.arrived.end();
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

  // This block's bytes of message `index`: from `offset` in the whole input.
  __device__ uint64_t offset(uint32_t index) const {
    return static_cast<uint64_t>(index) * call_.chunk + static_cast<uint64_t>(blockIdx.x) * piece_;
  }
  __device__ uint32_t length(uint32_t index) const {
    const uint64_t from = offset(index);
    return from >= call_.bytes
               ? 0
               : static_cast<uint32_t>(min(static_cast<uint64_t>(piece_), call_.bytes - from));
  }
  // This block's flag and piece of message `index`.
  __device__ Flag* flag(const Slots& slots, uint32_t index) const {
    return SlotView(rank_, slots).flag(first_ + index, blockIdx.x);
  }
  __device__ unsigned char* payload(const Slots& slots, uint32_t index) const {
    return SlotView(rank_, slots).payload(first_ + index) + blockIdx.x * piece_;
  }
  __device__ uint32_t step() const { return threads_ * sizeof(Vector); }

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
    const uint64_t from = offset(index);
    unsigned char* to = payload(rank_.out, index);
    for (uint32_t base = thread_ * sizeof(Vector); base < bytes; base += kUnroll * step()) {
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
    if (SlotView::clears(rank_, sequence)) {
      SlotView(rank_, rank_.out)
          .clear_packets(sequence, 0, blockIdx.x * threads_ + thread_, gridDim.x * threads_);
      if (thread_ == 0) SlotView(rank_, rank_.out).clear_flags(sequence, gridDim.x);
    }
    barrier(Role::kSenders, threads_);
    if (thread_ == 0) {
      relay_.sent.raise(index + 1);  // before the flag's release, which waits for host memory
      Flag* staged = flag(rank_.out, index);
      store_relaxed(&staged->offset, blockIdx.x * piece_);
      store_relaxed(&staged->bytes, bytes);
      store_relaxed(&staged->pieces, gridDim.x);
      // Release, and cumulative through the barrier: who sees the flag sees what all threads of the block
      // stored.
      store_release(&staged->value, payload_flag(sequence, call_.tag));
    }
  }

  // False: it will not arrive.
  __device__ bool receive(uint32_t index) {
    const uint32_t bytes = length(index);
    const uint64_t from = offset(index);
    unsigned char* received = payload(rank_.in, index);
    bool arrived = false;
    uint32_t base = thread_ * sizeof(Vector);
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
  uint32_t first_, piece_, messages_, thread_, threads_;
};

// `in` and `out` are aligned to 16 bytes; the grid has at most kMaxPieces blocks, all of them resident at
// once, of as many threads that send as receive, and the side warps.
template <typename Output>
__device__ inline void exchange_payload(const RankParameters& rank, const Call& call) {
  __shared__ Relay relay;
  relay.clear();  // by every thread: they all write the same
  __syncthreads();
  wait_for_previous_kernel();
  const FirstMessage first = first_message(rank);
  // All threads of the block or none: another block may poison the rank at this moment, and the roles have
  // barriers.
  if (__syncthreads_or(first.poisoned)) return;
  const uint32_t threads = (blockDim.x - kPayloadSideThreads) / 2;
  const bool sends = threadIdx.x < threads;
  Pieces<Output> pieces(rank, call, relay, first.sequence, sends ? threadIdx.x : threadIdx.x - threads,
                        threads);
  if (!sends) let_next_kernel_start();
  if (sends) {
    pieces.send();
  } else if (threadIdx.x < 2 * threads) {
    pieces.receive();
  } else if (threadIdx.x == 2 * threads) {
    pieces.poll_flags();
  } else if (threadIdx.x >= 2 * threads + kWarp) {
    update_progress(rank, call, first.sequence, pieces.messages(), false);
  }
  advance(rank, pieces.messages());
}

}  // namespace spark::device
