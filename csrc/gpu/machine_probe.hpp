// What a machine's GPU and CPU take for what every collective does: figures with which one machine's
// measurements are compared with another's.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "driver.hpp"

namespace spark::device {

class MachineProbe {
 public:
  // For the current context. `image` holds the kernels. Throws CollectiveError for what the driver refuses.
  explicit MachineProbe(const std::string& image);
  ~MachineProbe();
  MachineProbe(const MachineProbe&) = delete;
  MachineProbe& operator=(const MachineProbe&) = delete;

  // Nanoseconds from a store of the GPU into host memory until it sees a CPU thread's answer there, the mean
  // of `count` in a row, 2 or more. Throws UsageError for fewer, and CollectiveError if they take longer than
  // `timeout` or the driver reports an error.
  double round_trip(uint32_t count, std::chrono::nanoseconds timeout, Stream stream) const;
  // Launches a kernel that does nothing but wait for the one before it, which it may start before the end of.
  void launch_nothing(Stream stream) const;

 private:
  Library library_ = nullptr;
  Function round_trip_ = nullptr, nothing_ = nullptr;
};

}  // namespace spark::device
