#include "background_release.hpp"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace spark::verbs {
namespace {

constexpr auto kPatience = std::chrono::seconds(5);

}  // namespace

// Shared with the thread, which may outlive the reaper.
struct Reaper::State {
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

Reaper::Reaper() : state_(std::make_shared<State>()) {}

void Reaper::release(std::shared_ptr<void> object) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->running) {
    try {
      std::thread([state = state_] { state->run(); }).detach();
    } catch (const std::system_error&) {
      return;  // no thread to be had: the caller lets go of it, however long that takes
    }
    state_->running = true;
  }
  state_->objects.push_back(std::move(object));
}

Reaper::~Reaper() {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->changed.wait_for(lock, kPatience, [this] { return !state_->running; });
}

}  // namespace spark::verbs
