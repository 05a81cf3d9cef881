// What one rank announces of its rails: the same bytes over a rail and out of band.
//
// A level, not a queue: each announcement has the whole state, and only the newest counts.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../region/region_layout.hpp"
#include "../verbs/connection.hpp"

namespace spark::verbs {

// The phase of a rail's connection. Both ranks go through these in step: nothing is sent before the peer
// is known to receive, and no data before a message of kProofBytes was acknowledged at both ends.
enum class Phase : uint32_t {
  kDown = 0,     // no queue pair
  kOffered = 1,  // a queue pair, which is announced to the peer
  kReady = 2,    // connected to the peer's: it may send
  kUp = 3,       // the peer is ready too: announcements are sent
  kProven =
      4,  // the peer's NIC has acknowledged an announcement; data is sent once the peer announces the same
};

// Bytes of an announcement on a rail: its page, of which the rest is ignored. As large as the payload of
// the largest packet that RDMA has, so a path that loses large packets does not carry it.
constexpr size_t kProofBytes = kPage;

struct RailState {
  uint32_t epoch;  // number of the connection: each failure begins the next one
  Phase phase;
  ConnectionInfo connection;  // from kOffered on; the key is valid for this epoch
};

struct LinkState {
  uint64_t version;  // rises with every change
  uint32_t rail_count;
  uint32_t stopped;  // nonzero: this rank stops, for `reason`
  RailState rails[kMaxRails];
  char reason[kReasonBytes];
  uint64_t checksum;  // last: it may be read while it is being written

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

static_assert(sizeof(RailState) == 48, "there is no padding");
static_assert(sizeof(LinkState) <= kPage, "an announcement fits the page it is written to");

}  // namespace spark::verbs
