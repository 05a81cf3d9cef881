#include "reaper.hpp"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
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
};

Reaper::Reaper() : state_(std::make_shared<State>()) {}

void Reaper::release(std::shared_ptr<void> object) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->objects.push_back(std::move(object));
  if (state_->running) return;
  state_->running = true;
  std::thread([state = state_] {
    std::unique_lock<std::mutex> held(state->mutex);
    while (!state->objects.empty()) {
      std::shared_ptr<void> next = std::move(state->objects.front());
      state->objects.pop_front();
      held.unlock();
      next.reset();
      held.lock();
    }
    state->running = false;
    state->changed.notify_all();
  }).detach();
}

Reaper::~Reaper() {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->changed.wait_for(lock, kPatience, [this] { return !state_->running; });
}

}  // namespace spark::verbs
