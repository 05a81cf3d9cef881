// Prints what csrc/transport/link/hold_down.cpp makes of failures at given times, a line each: for how many
// milliseconds the rail is held down while another rail works, and while none does.
//
//   hold_down EVENT...    open@SECONDS, fail@SECONDS or fail-alone@SECONDS, in their order
#include "../../csrc/transport/link/hold_down.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

using namespace std::chrono_literals;
using spark::Clock;

// Milliseconds after `now` for which the rail is held down.
long long held(const spark::verbs::HoldDown& hold_down, Clock::time_point now, bool alone) {
  std::chrono::milliseconds length{0};
  while (hold_down.holds(now + length, alone)) length += 100ms;
  return length.count();
}

}  // namespace

int main(int argc, char** argv) {
  spark::verbs::HoldDown hold_down({1s, 60s, 60s});
  // Far from the clock's start, as on a machine that has run for a while.
  const Clock::time_point start = Clock::time_point{} + 24h;
  if (hold_down.holds(start, false)) return 1;
  for (int at = 1; at < argc; ++at) {
    const char* seconds = std::strchr(argv[at], '@');
    if (seconds == nullptr) return 2;
    Clock::time_point now = start + std::chrono::milliseconds(std::atoll(seconds + 1) * 1000);
    if (std::strncmp(argv[at], "open", 4) == 0) {
      hold_down.opened(now);
      continue;
    }
    bool alone = std::strncmp(argv[at], "fail-alone", 10) == 0;
    auto length = std::chrono::duration_cast<std::chrono::milliseconds>(hold_down.failed(now, alone));
    if (length.count() != held(hold_down, now, false)) return 3;
    std::printf("%lld %lld\n", static_cast<long long>(length.count()), held(hold_down, now, true));
  }
}
