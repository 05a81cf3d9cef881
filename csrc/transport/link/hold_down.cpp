#include "hold_down.hpp"

#include <algorithm>

namespace spark::verbs {

std::chrono::nanoseconds HoldDown::failed(Clock::time_point now, bool no_open_rail) {
  bool steady = opened_ && now - *opened_ >= times_.steady;
  if (steady) {
    length_ = {};
  } else {
    length_ = std::clamp(no_open_rail ? length_ : 2 * length_, times_.first, times_.longest);
  }
  opened_.reset();
  failed_ = now;
  return length_;
}

bool HoldDown::holds(Clock::time_point now, bool no_open_rail) const {
  return length_ > length_.zero() &&
         now - failed_ < (no_open_rail ? std::min(length_ / 10, times_.first) : length_);
}

}  // namespace spark::verbs
