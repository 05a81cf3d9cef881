// The source of a CPU rank's proxy: a word in the region that holds the last staged sequence number.
#pragma once

#include <atomic>
#include <cstdint>

#include "../region/region.hpp"
#include "../support/backoff.hpp"
#include "message_source.hpp"

namespace spark {

class Doorbell final : public MessageSource {
 public:
  // For the sequence numbers after `last`, in the slots of `region`. `times`: of the proxy thread's waits.
  Doorbell(Region region, uint32_t last, const BackoffTimes& times)
      : region_(region), posted_(last), times_(times), backoff_(times) {}

  // The rank calls these:

  // Everything up to `sequence` is staged.
  void ring(uint32_t sequence);

  // True once the proxy has posted message `sequence` and reads neither its descriptor nor its slot any more
  // (a NIC may).
  bool has_posted(uint32_t sequence) const {
    // Acquire: pairs with the release after posting. The caller's stores into the slot come after the proxy's
    // loads.
    return static_cast<int32_t>(posted_.load(std::memory_order_acquire) - sequence) >= 0;
  }

  // The proxy's thread calls these, and any thread `wake`:

  bool post_staged(Transport& transport) override;
  bool end_turn(bool busy, bool under_way) override;
  void rest() override;
  void wake() override;

 private:
  // Not inlined: tests/native/test_proxy_cost.py counts its instructions by its name.
  [[gnu::noinline]] void post(Transport& transport, uint32_t sequence);
  void sleep_until_rung();

  Region region_;
  std::atomic<uint32_t>
      posted_;  // sequence number of the last message posted; the proxy's thread alone writes it
  BackoffTimes times_;
  Backoff backoff_;
  Clock::time_point idle_since_ = Clock::now();
  bool may_sleep_ = false;
  std::atomic<bool> woken_{false};
};

}  // namespace spark
