// The memory that two ranks share, as plain structs and offsets: for the CPU, kernels and the NIC alike.
// region.hpp is the CPU's view of it, with atomics.
//
//   header   what this is, and its sizes
//   control  doorbell and send descriptors, from a rank on a CPU to its proxy; abort word, for all waits
//   recv     flags, packets and payloads that the peer writes, and the state of its links
//   send     flags, packets and payloads staged for the proxy, and the state of this rank's links
//
// Of a region that a NIC serves, the peer's NIC may write the receiving part and nothing else.
// Packets and payloads never share memory: payload bytes must not be taken for a packet's flags.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.hpp"
#include "packet.hpp"

namespace spark {

constexpr uint32_t kRegionMagic = 0x4b505356;  // "VSPK"
constexpr uint32_t kRegionVersion = 7;
constexpr uint32_t kMaxSlots = 128;
// Pieces that one slot's payload may be sent in, each with a flag of its own: a kernel's blocks do not wait
// for each other, and a CPU's proxy cuts a large payload over its rails.
constexpr uint32_t kMaxPieces = 64;
// Two cache lines: adjacent-line prefetchers would otherwise move a neighbour's flag along.
constexpr size_t kLine = 128;
constexpr size_t kHalvesPerLine = 8;  // halves of packets in a line of x86-64, 64 bytes; slots begin on one
constexpr size_t kPage = 4096;
// Bytes of the sentence with the reason why a rank stops, with its terminating zero: enough for that of a
// lost link, which has a problem for each of four rails, and then the remedy.
constexpr size_t kReasonBytes = 2048;
// Announcements of the links' state that may be on their way at once, a page each.
constexpr uint32_t kOutboxes = 8;

struct RegionSizes {
  uint64_t slot_bytes;    // payload bytes of one slot
  uint64_t packet_bytes;  // largest message, in data bytes, that goes as packets
  uint32_t slots;

  SPARK_HOST_DEVICE constexpr bool operator==(const RegionSizes& other) const {
    return slot_bytes == other.slot_bytes && packet_bytes == other.packet_bytes && slots == other.slots;
  }
};

struct RegionHeader {
  uint32_t magic;
  uint32_t version;
  uint64_t nonce[2];
  RegionSizes sizes;
  // With a modelled link: what the peer must know to connect to its rails (link/link_state.hpp).
  uint32_t offer_bytes;
  char offer[3072];
};

enum class Protocol : uint32_t { kPackets = 1, kPayload = 2 };

// What a proxy must post for one sequence number. A rank on a CPU writes it before it rings the doorbell; the
// proxy of a GPU makes it of what it finds in the send slot.
struct SendDescriptor {
  Protocol protocol;
  uint32_t tag;
  uint64_t bytes;  // of the payload, or of the packets with their flags
  // Payload only: which piece of the slot this is. A CPU stages a slot in one piece.
  uint32_t piece = 0;
  uint32_t offset = 0;  // bytes from the start of the slot's payload or packets
  // Payload only: into how many pieces a CPU's proxy cuts that one, so that they can go over several rails.
  uint32_t stripes = 1;
};

// Bytes of each of `stripes` parts of a message but the last, which has the rest: whole cache lines.
SPARK_HOST_DEVICE constexpr uint64_t stripe_bytes(uint64_t bytes, uint32_t stripes) {
  return (bytes + stripes * kLine - 1) / (stripes * kLine) * kLine;
}

enum AbortState : uint32_t { kRunning = 0, kAbortClaimed = 1, kAborted = 2 };

// The words here are atomics: Region gives the CPU's view of them, a kernel uses system-scope accesses.
struct Control {
  // A level, not a queue: the last sequence number that the CPU has staged. GPU kernels do not use it. The
  // proxy posts everything up to it.
  alignas(kLine) uint32_t doorbell;
  // Nonzero while the proxy sleeps on the doorbell, so that ringing it costs a system call only then.
  alignas(kLine) uint32_t proxy_asleep;
  // An AbortState; kAborted ends every wait, and `abort_reason` is valid once it is seen.
  alignas(kLine) uint32_t abort;
  char abort_reason[kReasonBytes];
  alignas(kLine) SendDescriptor send[kMaxSlots];
};

// The sequence and tag of a message that goes as payload, then flag. The rest is for the sender's proxy:
// which part of the slot is staged, and in how many such parts.
struct alignas(kLine) Flag {
  uint64_t value;
  uint32_t offset;  // bytes from the slot's start
  uint32_t bytes;
  uint32_t pieces;
};

SPARK_HOST_DEVICE constexpr size_t round_up(size_t value, size_t step) {
  return (value + step - 1) / step * step;
}

// Whether the slot of `sequence` must be cleared. Sequence numbers wrap after 2^32 messages, which is days of
// decoding. A word that no later message has overwritten would then be taken for a new one. So each slot is
// cleared once in every `interval` messages, four times in all or more: after its message was read, and
// before the peer learns of that. Not by the first messages of a runtime, whose region is fresh, but half an
// interval later: what is new and rare is not part of every first run.
SPARK_HOST_DEVICE constexpr bool clears(uint32_t sequence, uint32_t interval, uint32_t slots) {
  return ((sequence + interval / 2) & (interval - 1)) < slots;
}

// Where everything lies, in bytes from the region's start.
class RegionLayout {
 public:
  SPARK_HOST_DEVICE explicit constexpr RegionLayout(const RegionSizes& sizes) : sizes_(sizes) {}

  SPARK_HOST_DEVICE constexpr size_t control() const {
    static_assert(sizeof(RegionHeader) <= kPage, "the header has a page");
    return kPage;
  }
  // From here to `outbox` the peer writes.
  SPARK_HOST_DEVICE constexpr size_t inbox() const { return control() + round_up(sizeof(Control), kPage); }
  SPARK_HOST_DEVICE constexpr size_t recv_flags() const { return inbox() + kPage; }
  SPARK_HOST_DEVICE constexpr size_t recv_packets() const {
    return recv_flags() + flag_area() * sizes_.slots;
  }
  SPARK_HOST_DEVICE constexpr size_t recv_payload() const {
    return recv_packets() + round_up(sizes_.slots * packet_area(), kPage);
  }
  // From here to the end this rank's NIC reads.
  SPARK_HOST_DEVICE constexpr size_t outbox() const { return recv_payload() + sizes_.slots * payload_area(); }
  SPARK_HOST_DEVICE constexpr size_t send_flags() const { return outbox() + kOutboxes * kPage; }
  SPARK_HOST_DEVICE constexpr size_t send_packets() const {
    return send_flags() + flag_area() * sizes_.slots;
  }
  SPARK_HOST_DEVICE constexpr size_t send_payload() const {
    return send_packets() + round_up(sizes_.slots * packet_area(), kPage);
  }
  SPARK_HOST_DEVICE constexpr size_t total() const { return send_payload() + sizes_.slots * payload_area(); }

  // Bytes from one slot to the next, and which slot a sequence number uses.
  SPARK_HOST_DEVICE static constexpr size_t flag_area() { return kMaxPieces * sizeof(Flag); }
  SPARK_HOST_DEVICE constexpr size_t packet_area() const {
    return round_up(packet_count(sizes_.packet_bytes) * sizeof(Packet), kLine);
  }
  SPARK_HOST_DEVICE constexpr size_t payload_area() const { return round_up(sizes_.slot_bytes, kPage); }
  SPARK_HOST_DEVICE constexpr uint32_t slots() const { return sizes_.slots; }
  // Their number is a power of two, so that their order is kept when sequence numbers wrap.
  SPARK_HOST_DEVICE constexpr uint32_t slot(uint32_t sequence) const { return sequence & (sizes_.slots - 1); }

 private:
  RegionSizes sizes_;
};

}  // namespace spark
