// The proxy: a thread that watches the doorbell and posts what was staged.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "../support/backoff.hpp"
#include "../transport/transport.hpp"

namespace spark {

struct ProxyCounters {
  std::atomic<uint64_t> posts{0};
  std::atomic<uint64_t> coalesced{0};  // posts beyond the first of one look at the doorbell
};

class Proxy {
 public:
  // Posts sequence numbers after `last` as the doorbell of `region` rises, until stopped. `transport` must
  // outlive it.
  Proxy(Region region, Transport& transport, uint32_t last, const BackoffTimes& times);
  ~Proxy() { stop(); }
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;

  // Delivers what was rung, then ends the thread. The counters stay.
  void stop();

  // Rings the doorbell: everything up to `sequence` is staged.
  void ring(uint32_t sequence);

  // Test hook: while held, the proxy posts nothing, as if it had not been scheduled.
  void hold(bool held) { held_.store(held, std::memory_order_relaxed); }

  // Whether it is through with the message of that number, and reads neither its descriptor nor what is
  // staged any more (a NIC may).
  bool has_posted(uint32_t sequence) const {
    // Acquire: pairs with the release after posting. The caller's stores into the slot come after the proxy's
    // loads.
    return static_cast<int32_t>(last_.load(std::memory_order_acquire) - sequence) >= 0;
  }

  const ProxyCounters& counters() const { return counters_; }

 private:
  void run();
  bool post_up_to(uint32_t rung);
  // Not inlined: tests/native/test_proxy_cost.py counts its instructions by its name.
  [[gnu::noinline]] void post(uint32_t sequence);
  void sleep_on_doorbell();

  Region region_;
  Transport& transport_;
  std::atomic<uint32_t> last_;  // posted; written by the thread alone
  BackoffTimes times_;
  ProxyCounters counters_;
  std::atomic<bool> held_{false};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace spark
