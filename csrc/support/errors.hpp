// Failures of the runtime, one class per remedy. Each message is one sentence.
#pragma once

#include <stdexcept>

namespace spark {

struct CollectiveError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The caller did something that no state of the link could make right.
struct UsageError : CollectiveError {
  using CollectiveError::CollectiveError;
};

// The ranks called different collectives.
struct MismatchError : CollectiveError {
  using CollectiveError::CollectiveError;
};

// The peer did not come within the time-out, or is gone.
struct TimeoutError : CollectiveError {
  using CollectiveError::CollectiveError;
};

// `abort` was called, on this rank or on the peer.
struct AbortedError : CollectiveError {
  using CollectiveError::CollectiveError;
};

// An earlier failure left the ranks out of step; carries its message.
struct PoisonedError : CollectiveError {
  using CollectiveError::CollectiveError;
};

}  // namespace spark
