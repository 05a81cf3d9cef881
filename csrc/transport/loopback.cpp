#include "loopback.hpp"

#include <algorithm>
#include <cstring>

namespace spark {

void deliver_payload(const std::byte* from, std::byte* to, size_t bytes, std::atomic<uint64_t>& flag,
                     uint64_t flag_value) {
  std::memcpy(to, from, bytes);
  // Release: the reader acquires the flag and must then see the whole payload.
  flag.store(flag_value, std::memory_order_release);
}

void LoopbackTransport::post(uint32_t sequence, const SendDescriptor& descriptor) {
  Clock::time_point now = Clock::now();
  Clock::time_point start = std::max(now, wire_free_);
  if (wire_.bytes_per_ns > 0) {
    uint64_t on_wire = descriptor.protocol == Protocol::kPackets
                           ? packet_count(descriptor.bytes) * sizeof(Packet)
                           : descriptor.bytes + sizeof(uint64_t);
    start +=
        std::chrono::nanoseconds(static_cast<int64_t>(static_cast<double>(on_wire) / wire_.bytes_per_ns));
  }
  wire_free_ = start;
  copy_all_but_last(sequence, descriptor);
  under_way_.push_back({sequence, descriptor, start + wire_.latency});
}

bool LoopbackTransport::progress() {
  while (!under_way_.empty() && under_way_.front().due <= Clock::now()) {
    deliver_last(under_way_.front());
    under_way_.pop_front();
  }
  return !under_way_.empty();
}

void LoopbackTransport::copy_all_but_last(uint32_t sequence, const SendDescriptor& descriptor) {
  if (descriptor.protocol == Protocol::kPayload) {
    std::memcpy(peer_.recv_payload(sequence) + descriptor.offset,
                mine_.send_payload(sequence) + descriptor.offset, descriptor.bytes);
    return;
  }
  const std::atomic<uint64_t>* from = mine_.send_packets(sequence);
  std::atomic<uint64_t>* to = peer_.recv_packets(sequence);
  for (size_t half = 1; half < 2 * packet_count(descriptor.bytes); ++half) {
    // Relaxed: each half carries its own flag, and the reader trusts no other order.
    to[half].store(from[half].load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
}

void LoopbackTransport::deliver_last(const Write& write) {
  const SendDescriptor& descriptor = write.descriptor;
  if (descriptor.protocol == Protocol::kPackets) {
    // Release: the header half also tells the peer which of its slots were read (see Runtime::send).
    peer_.recv_packets(write.sequence)[0].store(packet_half(descriptor.tag, write.sequence),
                                                std::memory_order_release);
  } else {
    // Release: the reader acquires the flag and must then see the whole payload.
    peer_.recv_flag(write.sequence, descriptor.piece)
        .store(payload_flag(write.sequence, descriptor.tag), std::memory_order_release);
  }
}

}  // namespace spark
