// The state of a link's rails and its counters, for people and tests.
#pragma once

#include <atomic>
#include <cstdint>

#include "link_state.hpp"

namespace spark::verbs {

enum class RailCondition : uint32_t {
  kDown,      // it has no connection, and waits for its port, its peer or the next attempt
  kHeldDown,  // it has failed soon after it came up, and is in hold-down
  kUnproven,  // it is connected, but no full-size message has been acknowledged at both ends
  kOpen,      // data is sent over it
};
constexpr const char* kRailConditions[] = {"down", "held down", "unproven", "open"};

// Relaxed words of different moments.
struct LinkCounters {
  std::atomic<uint64_t> rails_up{0};  // that are open
  std::atomic<uint64_t> rail_failures{0};
  std::atomic<uint64_t> rail_recoveries{0};
  std::atomic<uint64_t> rail_proof_failures{0};  // connections that failed before data was sent over them
  std::atomic<uint64_t> reposts{0};
  // By rail: messages or parts of one, their bytes, and chains of them that were posted with one doorbell.
  std::atomic<uint64_t> posts[kMaxRails] = {};
  std::atomic<uint64_t> bytes[kMaxRails] = {};
  std::atomic<uint64_t> doorbells[kMaxRails] = {};
  std::atomic<RailCondition> conditions[kMaxRails] = {};
  std::atomic<bool> lost{false};  // no rail is open now

  // Relaxed: the thread that calls this is the one that writes the counter.
  bool no_open_rail() const { return rails_up.load(std::memory_order_relaxed) == 0; }
};

}  // namespace spark::verbs
