#include "proxy.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "../support/thread.hpp"

namespace spark {
namespace {

// How long what was rung before the end may take to be delivered.
constexpr auto kDrainTime = std::chrono::seconds(1);

// However busy it is, it looks after the connection after as many turns.
constexpr uint32_t kTurnsPerLook = 4096;

// A sleeping proxy looks around this often even if nobody wakes it: a bound, not a mechanism.
constexpr timespec kLongestSleep{0, 100'000'000};

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, expected, &kLongestSleep, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

}  // namespace

Proxy::Proxy(Region region, Transport& transport, uint32_t last, const BackoffTimes& times)
    : region_(region), transport_(transport), last_(last), times_(times) {
  thread_ = start_thread([this] { run(); });
}

void Proxy::stop() {
  if (!thread_.joinable()) return;
  stopping_.store(true, std::memory_order_release);  // what was rung before is delivered: see `run`
  futex_wake(region_.doorbell());
  thread_.join();  // bounded: by kLongestSleep, kDrainTime and the transport's farewell
}

void Proxy::ring(uint32_t sequence) {
  // Either the proxy's last look, after it announced its sleep, sees this doorbell, or this load sees the
  // announcement: both sides store, then load the other's word, and only sequential consistency forbids that
  // both miss. The store is also the release that the proxy acquires before it reads the staged message.
  region_.doorbell().store(sequence, std::memory_order_seq_cst);
  if (region_.proxy_asleep().load(std::memory_order_seq_cst) != 0) futex_wake(region_.doorbell());
}

void Proxy::run() {
  Backoff backoff(times_);
  Clock::time_point idle_since = Clock::now();
  uint32_t turns = 0;
  // Acquire: what was rung before the end is seen by the last look below.
  while (!stopping_.load(std::memory_order_acquire)) {
    // Acquire: pairs with the release in `ring`, after what was staged.
    uint32_t rung = region_.doorbell().load(std::memory_order_acquire);
    bool busy = !held_.load(std::memory_order_relaxed) && post_up_to(rung);
    bool under_way = transport_.progress();
    if (++turns % kTurnsPerLook == 0) transport_.attend();
    if (busy) {
      backoff = Backoff(times_);
      idle_since = Clock::now();
    } else if (backoff.step()) {
      transport_.attend();
      if (!under_way && Clock::now() - idle_since > times_.spin + times_.yield) sleep_on_doorbell();
    }
  }
  // The peer may still wait for what was staged before the end.
  post_up_to(region_.doorbell().load(std::memory_order_acquire));
  for (Clock::time_point end = Clock::now() + kDrainTime; transport_.progress() && Clock::now() < end;) {
    transport_.attend();
    std::this_thread::yield();
  }
  transport_.finish();
}

bool Proxy::post_up_to(uint32_t rung) {
  // The doorbell is a level: a rank may ring k+1 before this thread woke for k. Signed distance, since it
  // wraps.
  uint32_t posted = 0, last = last_.load(std::memory_order_relaxed);
  while (static_cast<int32_t>(rung - last) > 0) {
    post(++last);
    last_.store(last, std::memory_order_release);  // see has_posted
    ++posted;
  }
  if (posted == 0) return false;
  counters_.posts.fetch_add(posted, std::memory_order_relaxed);
  counters_.coalesced.fetch_add(posted - 1, std::memory_order_relaxed);
  return true;
}

void Proxy::post(uint32_t sequence) {
  const SendDescriptor& whole = region_.descriptor(sequence);
  if (whole.stripes == 1) {
    transport_.post(sequence, whole);
    return;
  }
  uint64_t step = stripe_bytes(whole.bytes, whole.stripes);
  for (uint32_t stripe = 0; stripe < whole.stripes; ++stripe) {
    uint64_t from = std::min(whole.bytes, stripe * step), to = std::min(whole.bytes, from + step);
    SendDescriptor part = whole;
    part.piece = stripe;
    part.offset = static_cast<uint32_t>(from);
    part.bytes = to - from;
    transport_.post(sequence, part);
  }
}

void Proxy::sleep_on_doorbell() {
  // See `ring`: the announcement comes before the last look at the doorbell, in the single order of all four.
  region_.proxy_asleep().store(1, std::memory_order_seq_cst);
  uint32_t last = last_.load(std::memory_order_relaxed);
  bool quiet = region_.doorbell().load(std::memory_order_seq_cst) == last;
  // Relaxed: a stop that this look misses is no doorbell, and waits until the sleep is over.
  if (quiet && !stopping_.load(std::memory_order_relaxed)) {
    // The kernel compares the word once more: a doorbell rung since then ends the wait at once.
    futex_wait(region_.doorbell(), last);
  }
  region_.proxy_asleep().store(0, std::memory_order_relaxed);
}

}  // namespace spark
