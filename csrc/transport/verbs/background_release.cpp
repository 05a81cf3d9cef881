#include "background_release.hpp"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>

#include "../../support/errors.hpp"
#include "../../support/thread.hpp"

namespace spark::verbs {
namespace {

constexpr auto kReleaseTime = std::chrono::seconds(5);

}  // namespace

// Shared with the thread, which may outlive the object.
struct BackgroundRelease::State {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::shared_ptr<void>> objects;
  bool running = false;

  void run() {
    std::unique_lock<std::mutex> held(mutex);
    while (!objects.empty()) {
      std::shared_ptr<void> next = std::move(objects.front());
      objects.pop_front();
      held.unlock();
      next.reset();
      held.lock();
    }
    running = false;
    changed.notify_all();
  }
};

BackgroundRelease::BackgroundRelease() : state_(std::make_shared<State>()) {
  CPU_ZERO(&processors_);
  sched_getaffinity(0, sizeof processors_, &processors_);
}

void BackgroundRelease::release(std::shared_ptr<void> object) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->running) {
    try {
      // From the proxy's thread, whose processors and name it would have.
      start_thread("spark-release", [state = state_, processors = processors_] {
        sched_setaffinity(0, sizeof processors, &processors);
        state->run();
      }).detach();
    } catch (const CollectiveError&) {
      return;  // no thread can be started: released here, by the end of `object`, however long that takes
    }
    state_->running = true;
  }
  state_->objects.push_back(std::move(object));
}

BackgroundRelease::~BackgroundRelease() {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->changed.wait_for(lock, kReleaseTime, [this] { return !state_->running; });
}

}  // namespace spark::verbs
