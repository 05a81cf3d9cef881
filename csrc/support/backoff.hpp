// Waiting in steps: spins for some microseconds, then yields the core, then sleeps.
#pragma once

#include <sched.h>
#include <time.h>

#include <chrono>
#include <cstdint>

namespace spark {

using Clock = std::chrono::steady_clock;

inline int64_t nanoseconds_of(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

struct BackoffTimes {
  std::chrono::nanoseconds spin{20'000};
  std::chrono::nanoseconds yield{2'000'000};
  std::chrono::nanoseconds sleep{50'000};
};

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // longer than `yield`, which is a no-op on Neoverse and Cortex-X cores
#endif
}

// One wait. `step` is called between two loads of the awaited word; it returns true once the wait has become
// slow, when the caller has time to check clocks, abort words and the peer's process.
class Backoff {
 public:
  explicit Backoff(const BackoffTimes& times) : times_(times) {}

  bool step() {
    // A clock read costs about as much as twenty pauses: it is read now and then while spinning.
    if (++spins_ % kSpinsPerClock != 0) {
      cpu_relax();
      return false;
    }
    Clock::time_point now = Clock::now();
    if (start_ == Clock::time_point{}) start_ = now;
    std::chrono::nanoseconds waited = now - start_;
    if (waited < times_.spin) return false;
    --spins_;  // every further step reads the clock
    if (waited < times_.spin + times_.yield) {
      sched_yield();
      return true;
    }
    timespec pause{0, static_cast<long>(times_.sleep.count())};
    nanosleep(&pause, nullptr);
    return true;
  }

 private:
  static constexpr uint32_t kSpinsPerClock = 32;

  BackoffTimes times_;
  uint32_t spins_ = 0;
  Clock::time_point start_{};
};

}  // namespace spark
