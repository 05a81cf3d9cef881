// The memory that two ranks share: one region per rank, laid out alike, written by the peer (or the NIC for
// it).
//
//   header   what this is, and its sizes
//   control  doorbell, abort word, send descriptors: between a rank's own threads, kernels and proxy
//   recv     flags, packets and payloads that the peer writes
//   send     packets and payloads staged for the proxy
//
// Packets and payloads never share memory: payload bytes must not be taken for a packet's flags.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "packet.hpp"

namespace spark {

constexpr uint32_t kRegionMagic = 0x4b505356;  // "VSPK"
constexpr uint32_t kRegionVersion = 1;
constexpr uint32_t kMaxSlots = 128;
// Two cache lines: adjacent-line prefetchers would otherwise move a neighbour's flag along.
constexpr size_t kLine = 128;
constexpr size_t kPage = 4096;

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free,
              "words shared with another process, a kernel or a NIC must be plain memory");

struct RegionSizes {
  uint64_t slot_bytes;    // payload bytes of one slot
  uint64_t packet_bytes;  // largest message, in data bytes, that goes as packets
  uint32_t slots;

  bool operator==(const RegionSizes& other) const {
    return slot_bytes == other.slot_bytes && packet_bytes == other.packet_bytes && slots == other.slots;
  }
};

struct RegionHeader {
  uint32_t magic;
  uint32_t version;
  uint64_t nonce[2];
  RegionSizes sizes;
};

enum class Protocol : uint32_t { kPackets = 1, kPayload = 2 };

// What the proxy must post for one sequence number; written before the doorbell is rung.
struct SendDescriptor {
  Protocol protocol;
  uint32_t tag;
  uint64_t bytes;
};

enum AbortState : uint32_t { kRunning = 0, kAbortClaimed = 1, kAborted = 2 };

struct Control {
  // Level, not queue: the last sequence number staged. The proxy posts everything up to it.
  alignas(kLine) std::atomic<uint32_t> doorbell;
  // Nonzero while the proxy sleeps on the doorbell, so that ringing it costs a system call only then.
  alignas(kLine) std::atomic<uint32_t> proxy_asleep;
  // An AbortState; kAborted ends every wait, and `abort_reason` is valid once it is seen.
  alignas(kLine) std::atomic<uint32_t> abort;
  char abort_reason[512];
  alignas(kLine) SendDescriptor send[kMaxSlots];
};

struct Flag {
  alignas(kLine) std::atomic<uint64_t> value;
};

constexpr size_t round_up(size_t value, size_t step) {
  return (value + step - 1) / step * step;
}

// Where everything lies, in bytes from the region's start. One description for C++, CUDA and Python.
class RegionLayout {
 public:
  explicit constexpr RegionLayout(const RegionSizes& sizes) : sizes_(sizes) {}

  constexpr size_t control() const { return kPage; }
  constexpr size_t recv_flags() const { return control() + round_up(sizeof(Control), kPage); }
  constexpr size_t recv_packets() const {
    return recv_flags() + round_up(sizes_.slots * sizeof(Flag), kPage);
  }
  constexpr size_t recv_payload() const {
    return recv_packets() + round_up(sizes_.slots * packet_area(), kPage);
  }
  constexpr size_t send_packets() const { return recv_payload() + sizes_.slots * payload_area(); }
  constexpr size_t send_payload() const {
    return send_packets() + round_up(sizes_.slots * packet_area(), kPage);
  }
  constexpr size_t total() const { return send_payload() + sizes_.slots * payload_area(); }

  constexpr size_t packet_area() const {
    return round_up(packet_count(sizes_.packet_bytes) * sizeof(Packet), kLine);
  }
  constexpr size_t payload_area() const { return round_up(sizes_.slot_bytes, kPage); }

 private:
  RegionSizes sizes_;
};

// A mapped region, seen through its layout. Does not own the memory.
class Region {
 public:
  Region(std::byte* base, const RegionSizes& sizes) : base_(base), layout_(sizes), slots_(sizes.slots) {}

  RegionHeader& header() const { return *at<RegionHeader>(0); }
  Control& control() const { return *at<Control>(layout_.control()); }
  std::atomic<uint64_t>& recv_flag(uint32_t sequence) const {
    return at<Flag>(layout_.recv_flags())[slot(sequence)].value;
  }
  std::atomic<uint64_t>* recv_packets(uint32_t sequence) const {
    return at<std::atomic<uint64_t>>(layout_.recv_packets() + slot(sequence) * layout_.packet_area());
  }
  std::byte* recv_payload(uint32_t sequence) const {
    return at<std::byte>(layout_.recv_payload() + slot(sequence) * layout_.payload_area());
  }
  std::atomic<uint64_t>* send_packets(uint32_t sequence) const {
    return at<std::atomic<uint64_t>>(layout_.send_packets() + slot(sequence) * layout_.packet_area());
  }
  std::byte* send_payload(uint32_t sequence) const {
    return at<std::byte>(layout_.send_payload() + slot(sequence) * layout_.payload_area());
  }
  SendDescriptor& descriptor(uint32_t sequence) const { return control().send[slot(sequence)]; }

 private:
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  uint32_t slot(uint32_t sequence) const { return sequence % slots_; }

  std::byte* base_;
  RegionLayout layout_;
  uint32_t slots_;
};

}  // namespace spark
