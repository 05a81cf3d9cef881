#include "hold_down.hpp"

#include <algorithm>

namespace spark::verbs {

std::chrono::nanoseconds HoldDown::failed(Clock::time_point now) {
  bool steady = opened_ && now - *opened_ >= times_.steady;
  length_ = steady ? std::chrono::nanoseconds(0) : std::clamp(2 * length_, times_.first, times_.longest);
  opened_.reset();
  failed_ = now;
  return length_;
}

bool HoldDown::holds(Clock::time_point now, bool alone) const {
  return now - failed_ < (alone ? std::min(length_ / 10, times_.first) : length_);
}

}  // namespace spark::verbs
