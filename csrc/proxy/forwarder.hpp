// The proxy of a GPU rank: a thread that looks through the send slots, and posts what a kernel has staged.
//
// Kernels ring no doorbell: for flagged packets that would cost them a release, which waits until everything
// before it has arrived in host memory (1.25 us on an H100, benchmarks/NOTES.md). The flags say it as well.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "../support/backoff.hpp"
#include "../transport/transport.hpp"
#include "proxy.hpp"

namespace spark::device {

class Forwarder {
 public:
  // Posts what is staged in `region` under the sequence numbers after `last`, in their order, until
  // stopped. `transport` must outlive it.
  Forwarder(Region region, Transport& transport, uint32_t last);
  ~Forwarder() { stop(); }
  Forwarder(const Forwarder&) = delete;
  Forwarder& operator=(const Forwarder&) = delete;

  // Delivers what is staged, then ends the thread. The counters stay.
  void stop();

  // Test hook: while held, nothing is posted, as if the thread had not been scheduled.
  void hold(bool held) { held_.store(held, std::memory_order_relaxed); }

  const ProxyCounters& counters() const { return counters_; }

 private:
  void run();
  // Posts what is there of the next message. False if that is nothing.
  bool look();
  bool look_for_packets(uint32_t sequence);
  bool look_for_pieces(uint32_t sequence);
  void finish(uint32_t sequence);

  Region region_;
  Transport& transport_;
  uint32_t last_;
  size_t arrived_halves_ = 0;   // of the next message's packets
  uint32_t pieces_ = 0;         // of the next message's payload; 0: not known yet
  uint64_t posted_pieces_ = 0;  // of the next message's payload, one bit each
  ProxyCounters counters_;
  std::atomic<bool> held_{false};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace spark::device
