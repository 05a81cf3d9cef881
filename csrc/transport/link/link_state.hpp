// What one rank says of its rails: the same words whether they travel over a rail that works, or out of band.
//
// A level, not a queue: each announcement says everything, and only the newest counts.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../region/region_layout.hpp"
#include "../verbs/abi.hpp"

namespace spark::verbs {

constexpr uint32_t kMaxRails = 4;

// How far a rail's connection has come. Both ranks go through these in step: nothing is sent before the peer
// is known to receive, and no data before a message of kProofBytes was acknowledged at both ends.
enum class Phase : uint32_t {
  kDown = 0,     // no queue pair
  kOffered = 1,  // a queue pair, and the peer is told of it
  kReady = 2,    // connected to the peer's: it may send
  kUp = 3,       // the peer is ready too: announcements are sent
  kProven = 4,   // the peer's NIC has acknowledged an announcement; data is sent once the peer says the same
};

// Bytes of an announcement on a rail: its page, padded with what does not count. As large as the payload of
// the largest packet that RDMA has, so a path that loses large packets does not carry it.
constexpr size_t kProofBytes = kPage;

struct RailState {
  uint32_t epoch;  // which connection this is: every failure begins another
  Phase phase;
  uint32_t queue_pair;
  uint32_t packet_number;  // of the first packet
  uint32_t remote_key;     // of the receiving part of the region, for this epoch
  uint32_t mtu;            // bytes
  uint64_t address;        // of the receiving part of the region
  abi::ibv_gid gid;
};

struct LinkState {
  uint64_t version;  // rises with every change
  uint32_t rail_count;
  uint32_t stopped;  // nonzero: this rank stops, for `reason`
  RailState rails[kMaxRails];
  char reason[kReasonBytes];
  uint64_t checksum;  // last: a reader may come while the words are being written

  // FNV-1a over all words before it. Against torn writes, not against malice.
  uint64_t sum() const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(this);
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t at = 0; at < offsetof(LinkState, checksum); ++at) hash = (hash ^ bytes[at]) * 0x100000001b3u;
    return hash;
  }
  bool whole() const {
    return checksum == sum() && rail_count <= kMaxRails && reason[kReasonBytes - 1] == '\0';
  }
};

static_assert(sizeof(LinkState) <= kPage, "an announcement fits the page it is written to");

}  // namespace spark::verbs
