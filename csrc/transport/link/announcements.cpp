#include "announcements.hpp"

#include <sys/eventfd.h>

#include <cstring>
#include <utility>

#include "../../support/errors.hpp"
#include "../../support/text.hpp"

namespace spark::verbs {
namespace {

// The state is said this often even if nothing changes: the last announcement may have been lost with a rail,
// the peer learns that this process is alive, and a rail that fails while nothing is sent is noticed.
constexpr auto kRepeatInterval = std::chrono::milliseconds(200);
// The same out of band, while no rail works.
constexpr auto kSlowRepeatInterval = std::chrono::seconds(1);

// False for what is no whole announcement.
bool from_bytes(const std::string& bytes, LinkState& state) {
  if (bytes.size() != sizeof state) return false;
  std::memcpy(&state, bytes.data(), sizeof state);
  return state.whole();
}

}  // namespace

Bulletin::Bulletin(std::byte* memory, const RegionLayout& layout)
    : memory_(memory), layout_(layout), ready_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (ready_.get() < 0) throw CollectiveError("this process has no file descriptor left; raise ulimit -n");
}

bool Bulletin::begin(const std::string& words) {
  if (!from_bytes(words, theirs_)) return false;
  heard_at_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  return true;
}

void Bulletin::read() {
  const std::byte* inbox = memory_ + layout_.inbox();
  // Acquire: the words after it are not read earlier. The NIC may be writing them all the same: the checksum
  // tells.
  uint64_t version = reinterpret_cast<const std::atomic<uint64_t>*>(inbox)->load(std::memory_order_acquire);
  if (version > theirs_.version) {
    LinkState state;
    std::memcpy(&state, inbox, sizeof state);
    if (state.whole()) accept(state);
  }
  // Relaxed: a hint. What was put there is read under the lock under which this was set.
  if (!news_.load(std::memory_order_relaxed)) return;
  std::optional<LinkState> delivered;
  {
    std::lock_guard<std::mutex> lock(shared_);
    news_.store(false, std::memory_order_relaxed);
    delivered = std::exchange(delivered_, {});
    if (farewell_ != told_) {
      farewell_ = told_;
      changed_ = true;
    }
  }
  if (delivered) accept(*delivered);
}

void Bulletin::accept(const LinkState& state) {
  if (state.version <= theirs_.version || state.rail_count != theirs_.rail_count) return;
  theirs_ = state;
  heard_at_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
}

std::string Bulletin::sign(LinkState& state) {
  state.version = ++version_;
  state.stopped = farewell_.empty() ? 0 : 1;
  std::memcpy(state.reason, farewell_.data(), whole_characters(farewell_, kReasonBytes - 1));
  state.checksum = state.sum();
  return std::string(reinterpret_cast<const char*>(&state), sizeof state);
}

uint32_t Bulletin::publish(LinkState& state, bool alone) {
  std::string words = sign(state);
  Clock::time_point now = Clock::now();
  next_ = now + kRepeatInterval;
  if (changed_ || (alone && now >= next_out_of_band_)) {
    next_out_of_band_ = now + kSlowRepeatInterval;
    {
      std::lock_guard<std::mutex> lock(shared_);
      announcement_ = std::move(words);
    }
    eventfd_write(ready_.get(), 1);
    changed_ = false;
  }
  // Several, so that the one before is not changed on its way; if it is after all, its checksum is wrong.
  outbox_ = (outbox_ + 1) % kOutboxes;
  std::memcpy(memory_ + layout_.outbox() + outbox_ * kPage, &state, sizeof state);
  return outbox_;
}

void Bulletin::tell(const std::string& reason) {
  std::lock_guard<std::mutex> lock(shared_);
  if (told_.empty()) told_ = reason;
  news_.store(true, std::memory_order_relaxed);
}

void Bulletin::deliver(const std::string& words) {
  LinkState state;
  // A rank of the same version, which was agreed on, announces nothing else: it was damaged, and the next one
  // says everything again.
  if (!from_bytes(words, state)) return;
  std::lock_guard<std::mutex> lock(shared_);
  if (!delivered_ || state.version > delivered_->version) delivered_ = state;
  news_.store(true, std::memory_order_relaxed);
}

std::string Bulletin::take() {
  eventfd_t count;
  eventfd_read(ready_.get(), &count);
  std::lock_guard<std::mutex> lock(shared_);
  return std::exchange(announcement_, {});
}

std::chrono::nanoseconds Bulletin::silence() const {
  return Clock::now().time_since_epoch() - Clock::duration(heard_at_.load(std::memory_order_relaxed));
}

void Bulletin::note(const std::string& sentence) {
  {
    std::lock_guard<std::mutex> lock(shared_);
    log_.push_back(sentence);
  }
  eventfd_write(ready_.get(), 1);
}

std::vector<std::string> Bulletin::take_log() {
  std::lock_guard<std::mutex> lock(shared_);
  return std::exchange(log_, {});
}

}  // namespace spark::verbs
