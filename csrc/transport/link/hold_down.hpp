// How long a rail that fails again and again is kept out of use.
//
// Each use of such a rail may cost the messages that it takes a whole retry time. So a rail that fails before
// it has worked for a while stays disconnected for a time that doubles with each failure.
#pragma once

#include <chrono>
#include <optional>

#include "../../support/backoff.hpp"

namespace spark::verbs {

struct HoldDownTimes {
  std::chrono::nanoseconds first{std::chrono::seconds(1)};
  std::chrono::nanoseconds longest{std::chrono::seconds(60)};
  // A rail that has carried data for so long is trusted again: its next failure is followed by no hold-down.
  std::chrono::nanoseconds steady{std::chrono::seconds(60)};
};

class HoldDown {
 public:
  explicit HoldDown(const HoldDownTimes& times) : times_(times) {}

  // Data may go over the rail from `now` on.
  void opened(Clock::time_point now) { opened_ = now; }
  // The rail's connection has failed, or the attempt to make one. Returns for how long the rail is held down.
  // `alone`: no other rail works. Such failures do not lengthen the hold-down: they mostly have one cause,
  // and when that is gone the rails must not stay unused.
  std::chrono::nanoseconds failed(Clock::time_point now, bool alone);
  // True while the rail must not be connected. If it is `alone`, there is no traffic to protect, and the pair
  // stops if no rail comes back in time: a tenth of the hold-down, at most `first`, only sets the pace of the
  // attempts.
  bool holds(Clock::time_point now, bool alone) const;

 private:
  HoldDownTimes times_;
  std::optional<Clock::time_point> opened_;  // since when data may go over the present connection
  Clock::time_point failed_{};
  std::chrono::nanoseconds length_{0};
};

}  // namespace spark::verbs
