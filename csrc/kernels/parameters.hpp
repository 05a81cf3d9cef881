// The parameters of every kernel: its rank's slots, its progress and its limits, and one collective. The host
// fills them in.
#pragma once

#include <cstdint>

#include "../region/region_layout.hpp"

namespace spark::device {

constexpr uint32_t kWarp = 32;    // threads
constexpr uint64_t kVector = 16;  // bytes that one access of a kernel moves; slots are multiples of it

// Threads of a block beside those that move data: a warp for the rank's progress and counters, and with
// payload one that polls flags.
constexpr uint32_t kPacketsSideThreads = kWarp;
constexpr uint32_t kPayloadSideThreads = 2 * kWarp;

// Counters of the kernels that have begun, for the host.
struct Totals {
  uint64_t all_reduces;
  uint64_t all_reduce_bytes;
  uint64_t all_gathers;
  uint64_t all_gather_bytes;
  uint64_t packet_messages;
  uint64_t payload_messages;
  uint64_t chunked_operations;
  uint64_t sequence;
};

// In device memory, advanced by the kernels themselves: replaying a graph needs no host.
struct alignas(128) Progress {
  uint32_t begun;  // blocks of all kernels that have begun
  uint32_t ended;  // blocks that are through
  // Of the last message, for blocks of each index, whatever kernel they belonged to. A block reads and
  // advances its own, so that none has to learn whether the others are through. The first one lies in one
  // line with `ended`.
  uint32_t sequences[kMaxPieces];
  alignas(128) uint32_t poisoned;  // nonzero: every later kernel returns at once
  alignas(128) Totals totals;
};

// In host memory: the wait that failed, of a kernel that gave up. Written once, `code` last.
enum FailureCode : uint32_t { kNoFailure = 0, kTimedOut = 1, kMismatch = 2, kAbortSeen = 3, kConcurrent = 4 };
struct Failure {
  uint32_t code;
  uint32_t sequence;
  uint32_t expected_tag;
  uint32_t seen_tag;
};

// In host memory, written by kernels.
struct Report {
  alignas(kLine) Failure failure;
  alignas(kLine) Totals totals;  // each word whole, no two of the same moment
};

// The slots of one direction: address of the first slot of each kind (slots.cuh finds the others).
struct Slots {
  unsigned char* flags;
  unsigned char* packets;
  unsigned char* payload;
};

struct RankParameters {
  Slots out;  // the peer's receive slots, or this rank's send slots if a proxy forwards them
  Slots in;   // this rank's receive slots
  const uint32_t* abort;
  Progress* progress;
  Report* report;
  uint64_t timeout_ns;
  uint32_t slots;         // a power of two
  uint32_t depth;         // messages that may be sent before the first of them is answered: half of the slots
  uint32_t packet_area;   // bytes from one slot to the next
  uint32_t payload_area;  // the same
  uint32_t clear_interval;  // messages between two clearings of the slots; a power of two
  uint32_t index;           // 0 or 1
};

// One collective, the same for all of its blocks.
struct Call {
  const unsigned char* in;
  unsigned char* out;
  uint64_t bytes;  // of the input
  uint32_t inner;  // all-gather: bytes of a row, as long as the rows of both ranks alternate in `out`
  uint32_t tag;
  uint32_t chunk;  // payload only: bytes of one message, a multiple of the blocks' pieces
};

}  // namespace spark::device
