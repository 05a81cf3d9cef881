// What a kernel knows about its rank: both regions, its own progress, and how to give up.
#pragma once

#include <cstdint>

#include "../region_layout.hpp"

namespace spark::device {

// In device memory, advanced by the kernels themselves: replaying a graph needs no host.
// Aligned, so that a kernel gets all of it with one load: it is the first thing that each one waits for.
struct alignas(16) Progress {
  uint32_t sequence;  // of the last message
  uint32_t poisoned;  // nonzero: every later kernel returns at once
  uint32_t arrived;   // blocks of the running kernel that are through
  uint32_t unused;
};

// In host memory: what a kernel that gave up waited for. Written once, `code` last.
enum FailureCode : uint32_t { kNoFailure = 0, kTimedOut = 1, kMismatch = 2, kAbortSeen = 3 };
struct Failure {
  uint32_t code;
  uint32_t sequence;
  uint32_t expected_tag;
  uint32_t seen_tag;
};

struct Rank {
  unsigned char* mine;  // device addresses of the two regions
  unsigned char* peer;
  Progress* progress;
  Failure* failure;
  RegionSizes sizes;
  uint64_t timeout_ns;
  uint32_t index;  // 0 or 1
};

}  // namespace spark::device
