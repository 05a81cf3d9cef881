// A collective whose messages go as payload, then flag: one launch, many blocks, as many messages as it
// takes.
#pragma once

#include "output.cuh"
#include "pieces.cuh"
#include "progress.cuh"
#include "wait.cuh"

namespace spark::device {

// One block's share of the exchange: the same piece of every message, each with a flag of its own, so that
// blocks wait for nobody but the block of the same index on the peer. Pieces of the last message may be
// empty; their flags travel nevertheless: what a slot may be overwritten by follows from the flags of all
// blocks.
template <typename Output>
class Pieces {
 public:
  __device__ Pieces(const Rank& rank, const Call& call, uint32_t first)
      : rank_(rank),
        call_(call),
        first_(first),
        piece_(call.chunk / gridDim.x),
        messages_(static_cast<uint32_t>((call.bytes + call.chunk - 1) / call.chunk)) {}

  __device__ uint32_t messages() const { return messages_; }

  // By all threads of the block. False: it gave up.
  __device__ bool exchange() {
    for (uint32_t turn = 0; turn < messages_ + rank_.ahead; ++turn) {
      if (turn < messages_) send(turn);
      if (turn == 0) {
        let_next_kernel_start();
        // While the first thread waits for the peer.
        if (blockIdx.x == 0 && threadIdx.x == blockDim.x - 1) count(rank_, call_, first_, messages_, false);
      }
      if (turn >= rank_.ahead && !receive(turn - rank_.ahead)) return false;
    }
    return true;
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
  __device__ Flag* flag(const Lane& lane, uint32_t index) const {
    return reinterpret_cast<Flag*>(lane.flags) + slot(index) * kMaxPieces + blockIdx.x;
  }
  __device__ unsigned char* payload(const Lane& lane, uint32_t index) const {
    return lane.payload + static_cast<size_t>(slot(index)) * rank_.payload_area + blockIdx.x * piece_;
  }

  __device__ void send(uint32_t index) {
    const uint32_t bytes = length(index);
    const uint64_t from = begin(index);
    unsigned char* to = payload(rank_.out, index);
    const uint32_t step = blockDim.x * sizeof(Vector);
    for (uint32_t base = threadIdx.x * sizeof(Vector); base < bytes; base += kUnroll * step) {
      Vector value[kUnroll];
#pragma unroll
      for (uint32_t part = 0; part < kUnroll; ++part) {
        const uint32_t at = base + part * step;
        if (at < bytes) value[part] = load_words<4>(call_.in + from + at, bytes - at);
      }
#pragma unroll
      for (uint32_t part = 0; part < kUnroll; ++part) {
        const uint32_t at = base + part * step;
        if (at >= bytes) break;
        // Relaxed: the flag's release orders them. Slots end on a whole vector: the rest of the last is
        // noise.
        store_relaxed(reinterpret_cast<Halves*>(to + at), as_halves(value[part]));
        if (Output::kKeepsOwn) {
          store_words(call_.out + Output::place(rank_, call_, from + at, true), bytes - at, value[part]);
        }
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Flag* staged = flag(rank_.out, index);
      store_relaxed(&staged->offset, blockIdx.x * piece_);
      store_relaxed(&staged->bytes, bytes);
      store_relaxed(&staged->pieces, gridDim.x);
      // Release, and cumulative through the barrier: who sees the flag sees what all threads of the block
      // stored.
      store_release(&staged->value, payload_flag(first_ + index, call_.tag));
    }
  }

  __device__ bool receive(uint32_t index) {
    const uint32_t bytes = length(index);
    const uint32_t sequence = first_ + index;
    bool good = true;
    if (threadIdx.x == 0) {
      Wait wait(rank_, sequence, call_.tag);
      const uint64_t* word = &flag(rank_.in, index)->value;
      // Acquire: the payload was there before the flag. The barrier hands that on to the other threads.
      uint64_t value = load_acquire(word);
      while (good && flag_sequence(value) != sequence) {
        good = wait.go_on();
        value = load_acquire(word);
      }
      if (good && flag_tag(value) != call_.tag) {
        give_up(rank_, kMismatch, sequence, call_.tag, flag_tag(value));
        good = false;
      }
    }
    if (!__syncthreads_and(good)) return false;
    const uint64_t from = begin(index);
    unsigned char* received = payload(rank_.in, index);
    const uint32_t step = blockDim.x * sizeof(Vector);
    for (uint32_t base = threadIdx.x * sizeof(Vector); base < bytes; base += kUnroll * step) {
      Vector theirs[kUnroll], own[kUnroll];
#pragma unroll
      for (uint32_t part = 0; part < kUnroll; ++part) {
        const uint32_t at = base + part * step;
        if (at >= bytes) break;
        theirs[part] = as_words(load_relaxed(reinterpret_cast<const Halves*>(received + at)));
        if (!Output::kKeepsOwn) own[part] = load_words<4>(call_.in + from + at, bytes - at);
      }
#pragma unroll
      for (uint32_t part = 0; part < kUnroll; ++part) {
        const uint32_t at = base + part * step;
        if (at >= bytes) break;
        Vector result = theirs[part];
        if (!Output::kKeepsOwn) {
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            result.word[word] = Output::combine(rank_, own[part].word[word], theirs[part].word[word]);
          }
        }
        store_words(call_.out + Output::place(rank_, call_, from + at, false), bytes - at, result);
      }
    }
    if (clears(rank_, sequence)) {
      const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
      clear(rank_, rank_.out, sequence, 0, gridDim.x, thread, threads);
      clear(rank_, rank_.in, sequence, 0, 0, thread, threads);
    }
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

  const Rank& rank_;
  const Call& call_;
  uint32_t first_, piece_, messages_;
};

// `in` and `out` are aligned to 16 bytes; the grid has at most kMaxPieces blocks, all of them resident at
// once.
template <typename Output>
__device__ inline void exchange_payload(const Rank& rank, const Call& call) {
  wait_for_kernel_before();
  const Start start = start_of(rank);
  if (start.poisoned) return;
  Pieces<Output> pieces(rank, call, start.sequence);
  pieces.exchange();
  advance(rank, start.sequence + pieces.messages() - 1);
}

}  // namespace spark::device
