// When a GPU rank's proxy rests between turns, and that `wake` ends it. Prints a line for each statement that
// holds; a statement that does not ends the program.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "../../csrc/proxy/slot_scanner.hpp"
#include "../../csrc/rank/endpoint.hpp"

namespace {

constexpr uint32_t kCalls = 200;

void require(bool holds, const char* statement) {
  std::printf("%s\n", statement);
  if (!holds) std::exit(1);
}

void idle_until_it_rests(spark::SlotScanner& scanner) {
  while (!scanner.end_turn(false, false)) {
  }
}

}  // namespace

int main() {
  using Clock = std::chrono::steady_clock;
  spark::Options options;
  options.proxied = true;
  spark::Endpoint endpoint(options);
  spark::SlotScanner scanner(endpoint.mine(), 0, 1);

  Clock::time_point begun = Clock::now();
  idle_until_it_rests(scanner);
  require(Clock::now() - begun >= std::chrono::seconds(1), "it rests after an idle second");
  begun = Clock::now();
  scanner.rest();
  require(Clock::now() - begun >= std::chrono::milliseconds(1), "a rest takes a millisecond");
  require(scanner.end_turn(false, false), "it goes on resting");

  scanner.wake();
  scanner.rest();
  begun = Clock::now();
  require(!scanner.end_turn(false, false), "a call before a rest ends resting");
  idle_until_it_rests(scanner);
  require(Clock::now() - begun >= std::chrono::seconds(1), "it is awake for a second after that");

  scanner.rest();
  require(scanner.end_turn(false, false), "a call counts once");
  scanner.end_turn(true, false);
  require(!scanner.end_turn(false, false), "a message ends resting");

  // The caller's stores are seen after the rest that its call ends.
  spark::SlotScanner eager(endpoint.mine(), 0, 1, std::chrono::nanoseconds(0));
  uint32_t told = 0;
  std::atomic<uint32_t> taken{0};
  std::thread caller([&] {
    for (uint32_t number = 1; number <= kCalls; ++number) {
      told = number;
      eager.wake();
      while (taken.load(std::memory_order_acquire) != number) std::this_thread::yield();
    }
  });
  bool seen = true;
  for (uint32_t number = 1; number <= kCalls; ++number) {
    idle_until_it_rests(eager);
    while (eager.end_turn(false, false)) eager.rest();
    seen = seen && told == number;
    taken.store(number, std::memory_order_release);
  }
  caller.join();
  require(seen, "what was stored before a call is seen after it");
}
