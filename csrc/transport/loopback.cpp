#include "loopback.hpp"

#include <cstring>

#include "packet_copy.hpp"

namespace spark {

void deliver_payload(const std::byte* from, std::byte* to, size_t bytes, std::atomic<uint64_t>& flag,
                     uint64_t flag_value) {
  std::memcpy(to, from, bytes);
  // Release: the reader acquires the flag and must then see the whole payload.
  flag.store(flag_value, std::memory_order_release);
}

void LoopbackTransport::post(uint32_t sequence, const SendDescriptor& descriptor) {
  if (descriptor.protocol == Protocol::kPayload) {
    deliver_payload(mine_.send_payload(sequence) + descriptor.offset,
                    peer_.recv_payload(sequence) + descriptor.offset, descriptor.bytes,
                    peer_.recv_flag(sequence, descriptor.piece), payload_flag(sequence, descriptor.tag));
    return;
  }
  const size_t first = descriptor.offset / sizeof(uint64_t);
  const std::atomic<uint64_t>* from = mine_.send_packets(sequence) + first;
  std::atomic<uint64_t>* to = peer_.recv_packets(sequence) + first;
  copy_all_but_first(from, to, descriptor.bytes / sizeof(uint64_t), copy_lines_);
  for (size_t word = 0; word < kFirstWords; ++word) {
    // Release: the header also tells the peer which of its slots were read (see CpuRank::send).
    to[word].store(from[word].load(std::memory_order_relaxed), std::memory_order_release);
  }
}

}  // namespace spark
