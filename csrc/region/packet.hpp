// Flagged packets: small messages in which every few bytes have a flag of their own arrival, the message's
// sequence number. Nothing is assumed about the order in which packets arrive. A packet is 16 bytes, of one
// of two kinds:
//
// - Packet, between CPUs: data, flag, data, flag, each 4 bytes. Each half is written and read as one aligned
//   8-byte word. The idea is NCCL's LL protocol and mscclpp's LL16 packets.
// - WidePacket, between GPUs: 12 bytes of data, then the flag, written and read in one 16-byte access, which
//   kernels have. RDMA writes and PCIe move aligned 16 bytes at once: a cache line is never torn there. For
//   CPUs that is not certain on every processor, so theirs are the first kind.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.hpp"

namespace spark {

struct alignas(16) Packet {
  uint64_t halves[2];
};

constexpr size_t kPacketData = 8;

struct alignas(16) WidePacket {
  uint32_t data[3];
  uint32_t flag;
};

constexpr size_t kWidePacketData = 12;

// The flag of a wide packet, from its second half.
SPARK_HOST_DEVICE constexpr uint32_t packet_flag(uint64_t second_half) {
  return static_cast<uint32_t>(second_half >> 32);
}

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

// The same for wide packets, whose header is tag, bytes and a word that is not used.
SPARK_HOST_DEVICE constexpr size_t wide_packet_count(size_t bytes) {
  return 1 + (bytes + kWidePacketData - 1) / kWidePacketData;
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
