// Releases what may take long to release: ending a queue pair waits for what a device still has in hand, and
// nothing else may wait for that.
#pragma once

#include <memory>

namespace spark::verbs {

class Reaper {
 public:
  Reaper();
  // Waits a few seconds for what is under way; the rest goes on without this object.
  ~Reaper();
  Reaper(const Reaper&) = delete;
  Reaper& operator=(const Reaper&) = delete;

  // Lets go of `object` on a thread of its own.
  void release(std::shared_ptr<void> object);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace spark::verbs
