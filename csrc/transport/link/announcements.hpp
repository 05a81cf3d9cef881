// What both ranks say to each other of their rails (link_state.hpp): over every rail that works, into the
// inbox of the peer's region, and out of band, by whoever takes it here and delivers it there.
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

class Bulletin {
 public:
  // `memory` is this rank's region. Throws CollectiveError.
  Bulletin(std::byte* memory, const RegionLayout& layout);

  // The proxy's thread alone calls these:

  // What the peer has said last.
  const LinkState& theirs() const { return theirs_; }
  // Takes the peer's first words, which came with its offer. False for what is no whole state.
  bool begin(const std::string& words);
  // Takes what the peer has said since, and whether this rank is to stop.
  void read();
  // Gives `state` the next version, and why this rank stops if it does.
  std::string sign(LinkState& state);
  // Something has changed, and is to be said without delay.
  void change() { changed_ = true; }
  // Whether it is time to say something; `quiet` waits for a change.
  bool due(Clock::time_point now, bool quiet) const { return changed_ || (!quiet && now >= next_); }
  // Signs `state` and puts it where rails send it from, and out of band if it has changed or if this rank is
  // `alone`, without any rail. Returns the outbox.
  uint32_t publish(LinkState& state, bool alone);

  // From any thread:

  // This rank stops. The first reason counts.
  void tell(const std::string& reason);
  // Takes an announcement of the peer's that came out of band.
  void deliver(const std::string& words);
  // The newest announcement, if it has not been taken yet; else empty.
  std::string take();
  // How long the peer has said nothing; it says something five times a second.
  std::chrono::nanoseconds silence() const;
  // For people: one more sentence of what has happened, and all since the last call.
  void note(const std::string& sentence);
  std::vector<std::string> take_log();
  // Readable when there is something to take.
  int ready() const { return ready_.get(); }

 private:
  void accept(const LinkState& state);

  std::byte* memory_;
  RegionLayout layout_;
  LinkState theirs_{};
  uint64_t version_ = 0;
  bool changed_ = false;
  std::string farewell_;  // why this rank stops
  uint32_t outbox_ = 0;
  Clock::time_point next_{}, next_out_of_band_{};

  // Other threads come through these.
  std::mutex shared_;  // guards the four below
  std::string told_;
  std::string announcement_;
  std::optional<LinkState> delivered_;  // the newest since `read`
  std::vector<std::string> log_;
  std::atomic<bool> news_{false};  // `told_` or `delivered_` has something new
  std::atomic<Clock::rep> heard_at_{0};
  FileDescriptor ready_;
};

}  // namespace spark::verbs
