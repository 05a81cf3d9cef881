// Releases objects on a thread of its own: destroying a queue pair waits for what the device still has under
// way, and nothing else may wait for that.
#pragma once

#include <sched.h>

#include <memory>

namespace spark::verbs {

class BackgroundRelease {
 public:
  BackgroundRelease();
  // Waits a few seconds for objects that are being released; the rest is released after this object is gone.
  ~BackgroundRelease();
  BackgroundRelease(const BackgroundRelease&) = delete;
  BackgroundRelease& operator=(const BackgroundRelease&) = delete;

  // Drops this reference to `object` on the thread.
  void release(std::shared_ptr<void> object);

 private:
  struct State;
  std::shared_ptr<State> state_;
  cpu_set_t processors_;  // of the thread that made this object
};

}  // namespace spark::verbs
