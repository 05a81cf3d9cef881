#include "doorbell.hpp"

#include <algorithm>

#include "../support/futex.hpp"

namespace spark {
namespace {

// Maximum of a sleep without a wake: a bound, not a mechanism.
constexpr timespec kLongestSleep{0, 100'000'000};

}  // namespace

void Doorbell::ring(uint32_t sequence) {
  // Sequentially consistent, as the announcement of a sleep in `sleep_until_rung`: both sides store, then
  // load the other's word. So either the proxy, which loads the doorbell after its announcement, sees this
  // store, or the load below sees the announcement; in any weaker order both could miss. The store is also
  // the release that the proxy acquires before it reads the staged message.
  region_.doorbell().store(sequence, std::memory_order_seq_cst);
  if (region_.proxy_asleep().load(std::memory_order_seq_cst) != 0) futex_wake(region_.doorbell());
}

bool Doorbell::post_staged(Transport& transport) {
  // Acquire: pairs with the release in `ring`, after the message was staged.
  uint32_t staged = region_.doorbell().load(std::memory_order_acquire);
  // A level, not a queue: a rank may ring k+1 before this thread woke for k. Signed distance, since it wraps.
  uint32_t posts = 0, last = posted_.load(std::memory_order_relaxed);
  while (static_cast<int32_t>(staged - last) > 0) {
    post(transport, ++last);
    ++posts;
  }
  if (posts == 0) return false;
  transport.flush();
  posted_.store(last, std::memory_order_release);  // see has_posted
  count(posts);
  return true;
}

void Doorbell::post(Transport& transport, uint32_t sequence) {
  const SendDescriptor& whole = region_.descriptor(sequence);
  if (whole.stripes == 1) {
    post_part(transport, sequence, whole);
    return;
  }
  uint64_t step = stripe_bytes(whole.bytes, whole.stripes);
  for (uint32_t stripe = 0; stripe < whole.stripes; ++stripe) {
    uint64_t from = std::min(whole.bytes, stripe * step), to = std::min(whole.bytes, from + step);
    SendDescriptor part = whole;
    part.piece = stripe;
    part.offset = static_cast<uint32_t>(from);
    part.bytes = to - from;
    post_part(transport, sequence, part);
  }
}

bool Doorbell::end_turn(bool busy, bool under_way) {
  if (busy) {
    backoff_ = Backoff(times_);
    idle_since_ = Clock::now();
    return false;
  }
  if (!backoff_.step()) return false;
  may_sleep_ = !under_way && Clock::now() - idle_since_ > times_.spin + times_.yield;
  return true;
}

void Doorbell::rest() {
  if (may_sleep_) sleep_until_rung();
}

void Doorbell::wake() {
  // Release: with the acquire in `sleep_until_rung` what the caller stored before is seen after the sleep
  // that this call ends or prevents.
  woken_.store(true, std::memory_order_release);
  futex_wake(region_.doorbell());
}

void Doorbell::sleep_until_rung() {
  // Sequentially consistent: see `ring`. The announcement comes before the last load of the doorbell.
  region_.proxy_asleep().store(1, std::memory_order_seq_cst);
  uint32_t last = posted_.load(std::memory_order_relaxed);
  bool rung = region_.doorbell().load(std::memory_order_seq_cst) != last;
  // If this load misses a call of `wake` that comes before the wait, the caller waits for kLongestSleep.
  if (!woken_.exchange(false, std::memory_order_acquire) && !rung) {
    // The kernel compares the word once more: if the doorbell was rung since then, the wait ends at once.
    futex_wait(region_.doorbell(), last, kLongestSleep);
  }
  region_.proxy_asleep().store(0, std::memory_order_relaxed);
}

}  // namespace spark
