// Waiting inside a kernel: bounded by time, ended by an abort.
#pragma once

#include "rank.hpp"
#include "system_scope.cuh"

namespace spark::device {

// Poisons the rank: the first thread that gives up says why, for the host.
__device__ inline void give_up(const Rank& rank, FailureCode code, uint32_t sequence, uint32_t expected,
                               uint32_t seen) {
  if (atomicExch(&rank.progress->poisoned, 1u) != 0) return;
  Failure& failure = rank.report->failure;
  store_relaxed(&failure.sequence, sequence);
  store_relaxed(&failure.expected_tag, expected);
  store_relaxed(&failure.seen_tag, seen);
  store_release(&failure.code, static_cast<uint32_t>(code));  // whoever sees the code reads the rest
}

class Wait {
 public:
  __device__ Wait(const Rank& rank, uint32_t sequence, uint32_t tag)
      : rank_(rank), sequence_(sequence), tag_(tag) {}

  // Called once per look in vain. False: stop waiting, the rank is poisoned.
  __device__ bool go_on() {
    if (++looks_ % kLooks != 0) return true;
    uint64_t time = now();
    if (deadline_ == 0) deadline_ = time + rank_.timeout_ns;
    if (*const_cast<volatile uint32_t*>(&rank_.progress->poisoned) != 0) return false;  // another thread did
    if (load_acquire(rank_.abort) != kRunning) {
      give_up(rank_, kAbortSeen, sequence_, tag_, 0);
      return false;
    }
    if (time > deadline_) {
      give_up(rank_, kTimedOut, sequence_, tag_, 0);
      return false;
    }
    return true;
  }

 private:
  static constexpr uint32_t kLooks = 256;  // a look takes about a microsecond: the clock is read now and then

  const Rank& rank_;
  uint32_t sequence_, tag_;
  uint32_t looks_ = 0;
  uint64_t deadline_ = 0;
};

}  // namespace spark::device
