// The loopback transport: two processes of one machine, the peer's region mapped, and a model of the wire
// between.
#pragma once

#include <chrono>
#include <deque>

#include "../support/backoff.hpp"
#include "transport.hpp"

namespace spark {

struct FlatWire {
  std::chrono::nanoseconds latency{0};
  double bytes_per_ns = 0;  // 0: unlimited
};

// Stores payload straight into the peer's receive slot, then its flag. What a NIC's RDMA write does, done by
// a CPU.
void deliver_payload(const std::byte* from, std::byte* to, size_t bytes, std::atomic<uint64_t>& flag,
                     uint64_t flag_value);

class LoopbackTransport final : public Transport {
 public:
  // `copy_lines`: packets go a whole cache line at a time and past the caches, as a NIC writes them, for a
  // GPU that polls them; a core that polls them finds them sooner in a cache.
  LoopbackTransport(Region mine, Region peer, const FlatWire& wire, bool copy_lines)
      : mine_(mine), peer_(peer), wire_(wire), copy_lines_(copy_lines) {}

  void post(uint32_t sequence, const SendDescriptor& descriptor) override;
  bool progress() override;

 private:
  struct Write {
    uint32_t sequence;
    SendDescriptor descriptor;
    Clock::time_point due;
  };

  // A message arrives when the last word does that its receiver waits for. All others are copied while it is
  // on the modelled wire: a NIC's copying is part of what the model's latency was measured with.
  void copy_all_but_last(uint32_t sequence, const SendDescriptor& descriptor);
  void deliver_last(const Write& write);

  Region mine_;
  Region peer_;
  FlatWire wire_;
  bool copy_lines_;
  Clock::time_point wire_free_{};
  std::deque<Write> under_way_;
};

}  // namespace spark
