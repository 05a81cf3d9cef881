// Flagged packets: small messages in which each 8 bytes have a flag of their own arrival.
//
// A packet is 16 bytes: data, flag, data, flag, each 4 bytes. Each half is written and read as one aligned
// 8-byte word, and its flag is the message's sequence number. So nothing is assumed about the order in which
// words arrive, only that aligned 8 bytes are atomic, as they are in RDMA writes, on PCIe and in the CPU's
// and GPU's accesses. The idea is NCCL's LL protocol and mscclpp's LL16 packets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.hpp"

namespace spark {

struct alignas(16) Packet {
  uint64_t halves[2];
};

constexpr size_t kPacketData = 8;

SPARK_HOST_DEVICE constexpr uint64_t packet_half(uint32_t data, uint32_t sequence) {
  return static_cast<uint64_t>(sequence) << 32 | data;
}

SPARK_HOST_DEVICE constexpr bool half_arrived(uint64_t half, uint32_t sequence) {
  return static_cast<uint32_t>(half >> 32) == sequence;
}

SPARK_HOST_DEVICE constexpr uint32_t half_data(uint64_t half) {
  return static_cast<uint32_t>(half);
}

// Packets that a message of `bytes` takes: one header packet (operation tag, bytes), then the data.
SPARK_HOST_DEVICE constexpr size_t packet_count(size_t bytes) {
  return 1 + (bytes + kPacketData - 1) / kPacketData;
}

// The flag of a message that goes as payload, then flag.
SPARK_HOST_DEVICE constexpr uint64_t payload_flag(uint32_t sequence, uint32_t tag) {
  return static_cast<uint64_t>(sequence) << 32 | tag;
}

SPARK_HOST_DEVICE constexpr uint32_t flag_sequence(uint64_t flag) {
  return static_cast<uint32_t>(flag >> 32);
}

SPARK_HOST_DEVICE constexpr uint32_t flag_tag(uint64_t flag) {
  return static_cast<uint32_t>(flag);
}

}  // namespace spark
