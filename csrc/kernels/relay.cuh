// Counters in shared memory by which the roles of a block wait for each other: messages sent, arrived, and
// read.
#pragma once

#include "parameters.hpp"

namespace spark::device {

// A number that one thread of the block raises and whole warps wait for, in shared memory. Every access is
// atomic: there is little traffic, and compute-sanitizer's racecheck supports no other order between threads
// than barriers'.
class Counter {
 public:
  __device__ void clear() { value_ = ended_ = 0; }  // before a barrier of all

  // Release: cumulative with the acquire of those that wait: what this thread was to see, they see.
  __device__ void raise(uint32_t value) { exchange_release(&value_, value); }

  // It will not be raised any more.
  __device__ void end() { exchange_release(&ended_, 1); }

  // By a whole warp. False: it ended before it came to `value`. All that wait for the same value get the same
  // answer, however late they load it: they have barriers in common.
  __device__ bool wait_for(uint32_t value) {
    bool there = false;
    if (threadIdx.x % kWarp == 0) {
      for (;;) {
        there = load_acquire(&value_) >= value;
        if (there) break;
        if (load_acquire(&ended_) == 0) continue;
        // What was raised before the end can be seen once the end has been acquired.
        there = load_acquire(&value_) >= value;
        break;
      }
    }
    there = __shfl_sync(~0u, there, 0);
    __syncwarp();  // orders memory among the warp's threads, as the shuffle does not: all have acquired it
    return there;
  }

 private:
  __device__ static uint32_t load_acquire(uint32_t* from) {
    uint32_t value;
    asm volatile("atom.acquire.cta.shared.or.b32 %0, [%1], 0;" : "=r"(value) : "r"(address(from)) : "memory");
    return value;
  }
  __device__ static void exchange_release(uint32_t* to, uint32_t value) {
    [[maybe_unused]] uint32_t before;
    asm volatile("atom.release.cta.shared.exch.b32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(address(to)), "r"(value)
                 : "memory");
  }
  __device__ static uint32_t address(const uint32_t* word) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(word));
  }

  uint32_t value_;
  uint32_t ended_;
};

// Waits here end when the thread that polls flags has given up, which it does in bounded time. `sent`
// needs no end: a sender stops early only once the receivers have, and before message j it only waits until
// they have read j - depth.
struct Relay {
  Counter sent;      // messages, by one that sends, after a barrier of all that do: their input is read
  Counter arrived;   // messages, by the thread that acquired their flags
  Counter consumed;  // messages, by one that receives, after a barrier of all that do

  __device__ void clear() {
    sent.clear();
    arrived.clear();
    consumed.clear();
  }
};

// Barriers of whole warps; 0 is the whole block's.
enum class Role : uint32_t { kSenders = 1, kReceivers = 2 };

__device__ inline void barrier(Role role, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<uint32_t>(role)), "r"(threads) : "memory");
}

}  // namespace spark::device
