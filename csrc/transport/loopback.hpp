// The loopback transport without a modelled link: two processes of one machine, the peer's region mapped.
// With one, see modelled/modelled_link.hpp.
#pragma once

#include "transport.hpp"

namespace spark {

// Stores payload straight into the peer's receive slot, then its flag. What a NIC's RDMA write does, done by
// a CPU.
void deliver_payload(const std::byte* from, std::byte* to, size_t bytes, std::atomic<uint64_t>& flag,
                     uint64_t flag_value);

class LoopbackTransport final : public Transport {
 public:
  // `copy_lines`: for a peer that polls from a GPU (packet_copy.hpp).
  LoopbackTransport(Region mine, Region peer, bool copy_lines)
      : mine_(mine), peer_(peer), copy_lines_(copy_lines) {}

  // The message has arrived when this returns.
  void post(uint32_t sequence, const SendDescriptor& descriptor) override;
  bool progress() override { return false; }

 private:
  Region mine_;
  Region peer_;
  bool copy_lines_;
};

}  // namespace spark
