// The ranks' announcements of the state of their rails (link_state.hpp): over every rail that works, into the
// inbox of the peer's region, and out of band, by calls of `take` on one rank and `deliver` on the other.
// Also the log of the link.
#pragma once

#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../../region/region_layout.hpp"
#include "../../support/backoff.hpp"
#include "../../support/shared_memory.hpp"
#include "link_state.hpp"

namespace spark::verbs {

class Announcements {
 public:
  // `memory` is this rank's region. Throws CollectiveError.
  Announcements(std::byte* memory, const RegionLayout& layout);

  // The proxy's thread alone calls these:

  // The peer's last announcement.
  const LinkState& peer() const { return peer_; }
  // Takes the peer's first announcement, which is its offer. False if it is not a whole state.
  bool accept_offer(const std::string& bytes);
  // Takes the peer's announcements since, and whether this rank is to stop.
  void read();
  // Gives `state` the next version and, if this rank stops, the reason. Returns its bytes.
  std::string encode(LinkState& state);
  // The state has changed: the next announcement is due at once.
  void request() { requested_ = true; }
  bool requested() const { return requested_; }
  // Whether an announcement is due; `changes_only`: only after `request`.
  bool due(Clock::time_point now, bool changes_only) const {
    return requested_ || (!changes_only && now >= next_);
  }
  // Encodes `state` into an outbox, from which rails send it, and for `take` if it has changed, or now and
  // then if there is `no_open_rail`. Returns the outbox.
  uint32_t publish(LinkState& state, bool no_open_rail);

  // From any thread:

  // This rank stops. The first reason counts.
  void stop(const std::string& reason);
  // Takes an announcement of the peer's that came out of band.
  void deliver(const std::string& bytes);
  // The newest announcement, if it has not been taken yet; else empty.
  std::string take();
  // Time since the peer's last announcement; it sends five a second.
  std::chrono::nanoseconds silence() const;
  // Adds a sentence to the log; returns the log and empties it.
  void log(const std::string& sentence);
  std::vector<std::string> take_log();
  // A descriptor that is readable when there is something to take.
  int ready() const { return ready_.get(); }

 private:
  void accept(const LinkState& state);

  std::byte* memory_;
  RegionLayout layout_;
  LinkState peer_{};
  uint64_t version_ = 0;
  bool requested_ = false;
  std::string stop_reason_;  // empty: this rank does not stop
  uint32_t outbox_ = 0;
  Clock::time_point next_{}, next_out_of_band_{};

  // Shared between threads.
  std::mutex shared_;  // guards the four below
  std::string new_stop_reason_;
  std::string announcement_;
  std::optional<LinkState> delivered_;  // the newest since `read`
  std::vector<std::string> log_;
  std::atomic<bool> received_{false};  // `new_stop_reason_` or `delivered_` has changed
  std::atomic<Clock::rep> heard_at_{0};
  FileDescriptor ready_;
};

}  // namespace spark::verbs
