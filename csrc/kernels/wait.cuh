// Waiting inside a kernel: bounded by time, ended by an abort.
#pragma once

#include "parameters.hpp"
#include "system_scope.cuh"

namespace spark::device {

// Poisons the rank: the first thread that gives up says why, for the host.
__device__ inline void give_up(const RankParameters& rank, FailureCode code, uint32_t sequence,
                               uint32_t expected, uint32_t seen) {
  if (atomicExch(&rank.progress->poisoned, 1u) != 0) return;
  Failure& failure = rank.report->failure;
  store_relaxed(&failure.sequence, sequence);
  store_relaxed(&failure.expected_tag, expected);
  store_relaxed(&failure.seen_tag, seen);
  store_release(&failure.code, static_cast<uint32_t>(code));  // whoever sees the code reads the rest
}

class Wait {
 public:
  __device__ Wait(const RankParameters& rank, uint32_t sequence, uint32_t tag)
      : rank_(rank), sequence_(sequence), tag_(tag) {}

  // Called once per look in vain. False: stop waiting, the rank is poisoned.
  __device__ bool go_on() {
    if (end_ != kNoFailure) {
      give_up(rank_, end_, sequence_, tag_, 0);
      return false;
    }
    if (++looks_ % kLooks != 0) return true;
    uint64_t time = now();
    if (deadline_ == 0) deadline_ = time + rank_.timeout_ns;
    if (*const_cast<volatile uint32_t*>(&rank_.progress->poisoned) != 0) return false;  // another thread did
    // What the peer sent before it aborted can be seen once the abort word has been acquired, and what came
    // while this thread did not run is there too: so one more look, then give up.
    if (load_acquire(rank_.abort) == kAborted) {
      end_ = kAbortSeen;
    } else if (time > deadline_) {
      end_ = kTimedOut;
    }
    return !other_operation_came();
  }

 private:
  // The peer may have called something of a size that travels by the other protocol.
  __device__ bool other_operation_came() const {
    const uint32_t slot = sequence_ & (rank_.slots - 1);
    const uint64_t flag =
        load_acquire(&(reinterpret_cast<const Flag*>(rank_.in.flags) + slot * kMaxPieces)->value);
    const uint64_t header =
        load_acquire(reinterpret_cast<const uint64_t*>(rank_.in.packets + slot * size_t{rank_.packet_area}));
    uint32_t seen = tag_;
    if (half_arrived(header, sequence_)) seen = half_data(header);
    if (flag_sequence(flag) == sequence_) seen = flag_tag(flag);
    if (seen == tag_) return false;
    give_up(rank_, kMismatch, sequence_, tag_, seen);
    return true;
  }

  static constexpr uint32_t kLooks = 256;  // a look takes about a microsecond: the clock is read now and then

  const RankParameters& rank_;
  uint32_t sequence_, tag_;
  uint32_t looks_ = 0;
  uint64_t deadline_ = 0;
  FailureCode end_ = kNoFailure;
};

// Waits for a packet. One look at a time: a second one at the same place would be answered after the first, a
// whole round trip to host memory later (benchmarks/NOTES.md, entry 11). False: it gave up.
__device__ inline bool receive(const Halves* from, uint32_t sequence, Wait& wait, Halves& packet) {
  for (;;) {
    packet = load_relaxed(from);
    if (half_arrived(packet.first, sequence) && half_arrived(packet.second, sequence)) return true;
    if (!wait.go_on()) return false;
  }
}

}  // namespace spark::device
