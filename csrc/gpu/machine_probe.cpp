#include "machine_probe.hpp"

#include <atomic>
#include <cstddef>
#include <utility>

#include "../support/backoff.hpp"
#include "../support/device_order.hpp"
#include "../support/errors.hpp"

namespace spark::device {
namespace {

// Both words, each in a cache line of its own.
struct Words {
  alignas(128) std::atomic<uint64_t> ping;
  alignas(128) std::atomic<uint64_t> pong;
};

}  // namespace

MachineProbe::MachineProbe(const std::string& image) {
  const Driver& driver = Driver::get();
  driver.check(driver.load_library(&library_, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
               "load this project's kernels; they are built for compute capability 8.0 and later");
  try {
    for (auto [name, function] :
         {std::pair{"probe_round_trip", &round_trip_}, {"probe_nothing", &nothing_}}) {
      Kernel kernel = nullptr;
      driver.check(driver.find_kernel(&kernel, library_, name), std::string("find the kernel ") + name);
      driver.check(driver.load_kernel(function, kernel), std::string("load the kernel ") + name);
    }
  } catch (...) {
    driver.unload_library(library_);
    throw;
  }
}

MachineProbe::~MachineProbe() {
  Driver::get().unload_library(library_);
}

double MachineProbe::round_trip(uint32_t count, std::chrono::nanoseconds timeout, Stream stream) const {
  if (count < 2) throw UsageError(std::to_string(count) + " round trips are too few to time; give 2 or more");
  const Driver& driver = Driver::get();
  MappedMemory memory(sizeof(Words));
  auto& words = *static_cast<Words*>(memory.on_host());
  unsigned char* ping = memory.on_device() + offsetof(Words, ping);
  unsigned char* pong = memory.on_device() + offsetof(Words, pong);
  auto timeout_ns = static_cast<uint64_t>(timeout.count());
  void* parameters[] = {&ping, &pong, &count, &timeout_ns};
  LaunchConfig config{1, 1, 1, 32, 1, 1, 0, stream, nullptr, 0};
  driver.check(driver.launch(&config, round_trip_, parameters, nullptr), "launch a probe");
  // Later than the kernel's own limit, which counts from its start.
  Clock::time_point begun{}, latest = Clock::now() + timeout + timeout;
  uint64_t turn = 1;
  while (turn <= count) {
    // Acquire and release as of a collective's flags, whose time this is; no other data depends on the words.
    uint64_t seen = load_from_device(words.ping);
    if (seen == turn) {
      if (turn == 1) begun = Clock::now();
      words.pong.store(turn++, std::memory_order_release);
    } else if (seen > count || Clock::now() > latest) {
      break;
    }
  }
  Clock::time_point ended = Clock::now();
  // The memory is freed after the kernel's last access. An error of the kernel is why nothing was exchanged.
  driver.check(driver.context_synchronize(), "run a probe");
  if (turn <= count) {
    throw CollectiveError("the GPU and this thread have exchanged " + std::to_string(turn - 1) + " of " +
                          std::to_string(count) + " messages; see that nothing else uses the GPU");
  }
  return std::chrono::duration<double, std::nano>(ended - begun).count() / (count - 1);
}

void MachineProbe::launch_nothing(Stream stream) const {
  LaunchAttribute dependent{kProgrammaticStreamSerialization, 0, {}};
  dependent.value.allowed = 1;
  unsigned attributes = compute_capability() >= kFirstWithDependentLaunch ? 1 : 0;
  LaunchConfig config{1, 1, 1, 32, 1, 1, 0, stream, &dependent, attributes};
  const Driver& driver = Driver::get();
  driver.check(driver.launch(&config, nothing_, nullptr, nullptr), "launch a probe");
}

}  // namespace spark::device
