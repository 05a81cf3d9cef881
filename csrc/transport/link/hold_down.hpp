// The hold-down of a rail that fails repeatedly.
//
// Messages posted to such a rail may be delayed by a whole retry time. So a rail that fails before it has
// worked for a while stays disconnected for a time that doubles with each failure.
#pragma once

#include <chrono>
#include <optional>

#include "../../support/backoff.hpp"

namespace spark::verbs {

struct HoldDownTimes {
  std::chrono::nanoseconds first{std::chrono::seconds(1)};
  std::chrono::nanoseconds longest{std::chrono::seconds(60)};
  // The first failure of a rail that has carried data for this long is followed by no hold-down.
  std::chrono::nanoseconds steady{std::chrono::seconds(60)};
};

class HoldDown {
 public:
  explicit HoldDown(const HoldDownTimes& times) : times_(times) {}

  // Data may be sent over the rail from `now` on.
  void opened(Clock::time_point now) { opened_ = now; }
  // The rail's connection has failed, or the attempt to make one. Returns the length of the hold-down.
  // `no_open_rail`: such failures do not lengthen it: most of them have one cause, and once that is gone the
  // rails must not stay unused.
  std::chrono::nanoseconds failed(Clock::time_point now, bool no_open_rail);
  // True while the rail must not be connected. If there is `no_open_rail`, there is no traffic to protect,
  // and the pair stops if no rail comes back in time: then a tenth of the hold-down, at most `first`, limits
  // the rate of the attempts.
  bool holds(Clock::time_point now, bool no_open_rail) const;

 private:
  HoldDownTimes times_;
  std::optional<Clock::time_point> opened_;  // since when data may be sent over the present connection
  Clock::time_point failed_{};
  std::chrono::nanoseconds length_{0};
};

}  // namespace spark::verbs
