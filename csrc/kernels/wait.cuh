// Waiting inside a kernel: bounded by time, ended by an abort.
#pragma once

#include "parameters.hpp"
#include "slots.cuh"
#include "system_scope.cuh"

namespace spark::device {

// Poisons the rank: the first thread that gives up reports the reason to the host.
__device__ inline void give_up(const RankParameters& rank, FailureCode code, uint32_t sequence,
                               uint32_t expected, uint32_t seen) {
  if (atomicExch(&rank.progress->poisoned, 1u) != 0) return;
  Failure& failure = rank.report->failure;
  store_relaxed(&failure.sequence, sequence);
  store_relaxed(&failure.expected_tag, expected);
  store_relaxed(&failure.seen_tag, seen);
  // Release: the host acquires the code, then reads the rest.
  store_release(&failure.code, static_cast<uint32_t>(code));
}

class Wait {
 public:
  __device__ Wait(const RankParameters& rank, uint32_t sequence, uint32_t tag)
      : rank_(rank), sequence_(sequence), tag_(tag) {}

  // Called after each load that has not found the message. False: stop waiting, the rank is poisoned.
  __device__ bool step() {
    if (end_ != kNoFailure) {
      give_up(rank_, end_, sequence_, tag_, 0);
      return false;
    }
    if (++steps_ % kSteps != 0) return true;
    uint64_t time = now();
    if (deadline_ == 0) deadline_ = time + rank_.timeout_ns;
    if (*const_cast<volatile uint32_t*>(&rank_.progress->poisoned) != 0) return false;  // another thread did
    // What the peer sent before it aborted is visible once the abort word has been acquired, and so is what
    // came while this thread did not run: so the message is loaded once more before this thread gives up.
    if (load_acquire(rank_.abort) == kAborted) {
      end_ = kAbortSeen;
    } else if (time > deadline_) {
      end_ = kTimedOut;
    }
    return !other_operation_arrived();
  }

 private:
  // The peer may have called an operation whose size takes the other protocol.
  __device__ bool other_operation_arrived() const {
    const SlotView slots(rank_, rank_.in);
    const uint64_t flag = load_acquire(&slots.flag(sequence_, 0)->value);
    // In one access, as it was written. Of two, the second has been seen to find the tag of before on an H200
    // although the first had found the flag: many threads look at this line of host memory at once.
    const Halves header = load_relaxed_whole(slots.packets(sequence_));
    uint32_t seen = tag_;
    if (packet_flag(header.second) == sequence_) seen = static_cast<uint32_t>(header.first);
    if (flag_sequence(flag) == sequence_) seen = flag_tag(flag);
    if (seen == tag_) return false;
    give_up(rank_, kMismatch, sequence_, tag_, seen);
    return true;
  }

  static constexpr uint32_t kSteps = 256;  // of about a microsecond each, between two reads of the clock

  const RankParameters& rank_;
  uint32_t sequence_, tag_;
  uint32_t steps_ = 0;
  uint64_t deadline_ = 0;
  FailureCode end_ = kNoFailure;
};

// Waits for a packet. One load at a time: a second one of the same address is answered a whole round trip to
// host memory after the first (benchmarks/NOTES.md, entry 11). False: it gave up.
__device__ inline bool receive_packet(const Halves* from, uint32_t sequence, Wait& wait, Halves& packet) {
  for (;;) {
    packet = load_relaxed_whole(from);
    if (packet_flag(packet.second) == sequence) return true;
    if (!wait.step()) return false;
  }
}

}  // namespace spark::device
