#include "announcements.hpp"

#include <sys/eventfd.h>

#include <cstring>
#include <iterator>
#include <utility>

#include "../../support/device_order.hpp"
#include "../../support/errors.hpp"
#include "../../support/text.hpp"

namespace spark::verbs {
namespace {

// The state is announced this often even if nothing changes: the last announcement may have been lost with a
// rail, the peer learns that this process is alive, and a rail that fails while no data is sent is noticed.
constexpr auto kRepeatInterval = std::chrono::milliseconds(200);
// The same out of band, while no rail works.
constexpr auto kOutOfBandInterval = std::chrono::seconds(1);

// Relaxed: each word is whole, and the checksum tells whether they belong together.
LinkState copy_words(const std::byte* inbox) {
  static_assert(sizeof(LinkState) % sizeof(uint64_t) == 0);
  uint64_t words[sizeof(LinkState) / sizeof(uint64_t)];
  const auto* shared = reinterpret_cast<const std::atomic<uint64_t>*>(inbox);
  for (size_t at = 0; at < std::size(words); ++at) words[at] = shared[at].load(std::memory_order_relaxed);
  LinkState state;
  std::memcpy(&state, words, sizeof state);
  return state;
}

// False if `bytes` are not a whole announcement.
bool decode(const std::string& bytes, LinkState& state) {
  if (bytes.size() != sizeof state) return false;
  std::memcpy(&state, bytes.data(), sizeof state);
  return state.whole();
}

}  // namespace

Announcements::Announcements(std::byte* memory, const RegionLayout& layout)
    : memory_(memory), layout_(layout), ready_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (ready_.get() < 0) throw CollectiveError("this process has no file descriptor left; raise ulimit -n");
}

bool Announcements::accept_offer(const std::string& bytes) {
  if (!decode(bytes, peer_)) return false;
  heard_at_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  return true;
}

void Announcements::read() {
  const std::byte* inbox = memory_ + layout_.inbox();
  // The words after it are not read earlier. The NIC may be writing them all the same: the checksum detects
  // that.
  uint64_t version = load_from_device(*reinterpret_cast<const std::atomic<uint64_t>*>(inbox));
  if (version > peer_.version) {
    LinkState state = copy_words(inbox);
    if (state.whole()) accept(state);
  }
  // Relaxed: a hint. What it is about is read under the lock under which this was set.
  if (!received_.load(std::memory_order_relaxed)) return;
  std::optional<LinkState> delivered;
  {
    std::lock_guard<std::mutex> lock(shared_);
    received_.store(false, std::memory_order_relaxed);
    delivered = std::exchange(delivered_, {});
    if (stop_reason_ != new_stop_reason_) {
      stop_reason_ = new_stop_reason_;
      requested_ = true;
    }
  }
  if (delivered) accept(*delivered);
}

void Announcements::accept(const LinkState& state) {
  if (state.version <= peer_.version || state.rail_count != peer_.rail_count) return;
  peer_ = state;
  heard_at_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
}

std::string Announcements::encode(LinkState& state) {
  state.version = ++version_;
  state.stopped = stop_reason_.empty() ? 0 : 1;
  std::memcpy(state.reason, stop_reason_.data(), whole_characters(stop_reason_, kReasonBytes - 1));
  state.checksum = state.sum();
  return std::string(reinterpret_cast<const char*>(&state), sizeof state);
}

uint32_t Announcements::publish(LinkState& state, bool no_open_rail) {
  std::string bytes = encode(state);
  Clock::time_point now = Clock::now();
  next_ = now + kRepeatInterval;
  if (requested_ || (no_open_rail && now >= next_out_of_band_)) {
    next_out_of_band_ = now + kOutOfBandInterval;
    {
      std::lock_guard<std::mutex> lock(shared_);
      announcement_ = std::move(bytes);
    }
    eventfd_write(ready_.get(), 1);
    requested_ = false;
  }
  // Several outboxes, so that the announcement before is not changed while it is sent; if it is after all,
  // its checksum is wrong.
  outbox_ = (outbox_ + 1) % kOutboxes;
  std::memcpy(memory_ + layout_.outbox() + outbox_ * kPage, &state, sizeof state);
  return outbox_;
}

void Announcements::stop(const std::string& reason) {
  std::lock_guard<std::mutex> lock(shared_);
  if (new_stop_reason_.empty()) new_stop_reason_ = reason;
  received_.store(true, std::memory_order_relaxed);
}

void Announcements::deliver(const std::string& bytes) {
  LinkState state;
  // A peer of the same version, which was agreed on, announces nothing else: this one was damaged, and the
  // next one has the whole state again.
  if (!decode(bytes, state)) return;
  std::lock_guard<std::mutex> lock(shared_);
  if (!delivered_ || state.version > delivered_->version) delivered_ = state;
  received_.store(true, std::memory_order_relaxed);
}

std::string Announcements::take() {
  eventfd_t count;
  eventfd_read(ready_.get(), &count);
  std::lock_guard<std::mutex> lock(shared_);
  return std::exchange(announcement_, {});
}

std::chrono::nanoseconds Announcements::silence() const {
  return Clock::now().time_since_epoch() - Clock::duration(heard_at_.load(std::memory_order_relaxed));
}

void Announcements::log(const std::string& sentence) {
  {
    std::lock_guard<std::mutex> lock(shared_);
    log_.push_back(sentence);
  }
  eventfd_write(ready_.get(), 1);
}

std::vector<std::string> Announcements::take_log() {
  std::lock_guard<std::mutex> lock(shared_);
  return std::exchange(log_, {});
}

}  // namespace spark::verbs
