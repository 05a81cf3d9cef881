#include "forwarder.hpp"

#include <sched.h>

#include "../support/thread.hpp"

namespace spark::device {
namespace {

// How long what was staged before the end may take to be delivered.
constexpr auto kDrainTime = std::chrono::seconds(1);
// A kernel cannot wake a sleeping thread. So this one only dozes, and only once the model is idle: the first
// message after that waits for it.
constexpr auto kAwake = std::chrono::seconds(1);
constexpr auto kDoze = std::chrono::microseconds(50);
// Turns between two looks after the connection: some ten microseconds.
constexpr uint32_t kTurnsPerLook = 256;
constexpr size_t kPrefetchHalves = 16 * kHalvesPerLine;
// A slot never holds what is further ahead than this: what was cleared stands for half of all numbers ahead,
// and is cleared anew before a quarter of them has passed.
constexpr uint32_t kFarthestAhead = 1u << 29;

// Many words are looked at, and what was seen is ordered by one fence after them: on aarch64 loads that
// acquire would wait for each other. ThreadSanitizer knows no fences, so for it every load acquires.
#if defined(__SANITIZE_THREAD__)
constexpr auto kLookOrder = std::memory_order_acquire;
void acquire_what_was_seen() {}
#else
constexpr auto kLookOrder = std::memory_order_relaxed;
void acquire_what_was_seen() {
  std::atomic_thread_fence(std::memory_order_acquire);
}
#endif

}  // namespace

Forwarder::Forwarder(Region region, Transport& transport, uint32_t last)
    : region_(region), transport_(transport), last_(last) {
  thread_ = start_thread([this] { run(); });
}

void Forwarder::stop() {
  if (!thread_.joinable()) return;
  // Release: the last look sees whatever the caller knows to be staged.
  stopping_.store(true, std::memory_order_release);
  thread_.join();  // bounded: by kDoze, kDrainTime and the transport's farewell
}

void Forwarder::run() {
  Clock::time_point idle_since{};
  uint32_t turns = 0, idle_turns = 0;
  bool dozing = false;
  while (!stopping_.load(std::memory_order_acquire)) {
    bool busy = !held_.load(std::memory_order_relaxed) && look();
    if (transport_.progress() || busy) {
      idle_turns = 0;
      dozing = false;
    } else if (dozing) {
      std::this_thread::sleep_for(kDoze);
      transport_.attend();
    } else {
      // The clock takes a third as long as a turn without it, and messages wait for turns.
      if (idle_turns == 0) idle_since = Clock::now();
      if (++idle_turns % kTurnsPerLook == 0) dozing = Clock::now() - idle_since > kAwake;
      cpu_relax();
    }
    if (++turns % kTurnsPerLook == 0) transport_.attend();
  }
  // The peer may still wait for what was staged before the end.
  while (look()) {
  }
  for (Clock::time_point end = Clock::now() + kDrainTime; transport_.progress() && Clock::now() < end;) {
    transport_.attend();
    sched_yield();
  }
  transport_.finish();
}

bool Forwarder::look() {
  uint32_t next = last_ + 1;
  return look_for_packets(next) || look_for_pieces(next);
}

bool Forwarder::look_for_packets(uint32_t sequence) {
  const std::atomic<uint64_t>* halves = region_.send_packets(sequence);
  auto sequence_of = [&](size_t half) { return static_cast<uint32_t>(halves[half].load(kLookOrder) >> 32); };
  auto missing = [&](size_t half) { return sequence_of(half) ^ sequence; };
  // The slot is used again: the peer has this message. A rail had failed, and what went again from this slot
  // carried this message with it (docs/protocol.md, "Why that is safe").
  if (sequence_of(0) - sequence - 1 < kFarthestAhead) {
    acquire_what_was_seen();
    finish(sequence);
    return true;
  }
  if ((missing(0) | missing(1)) != 0) return false;
  uint32_t tag = half_data(halves[0].load(std::memory_order_relaxed));
  uint32_t bytes = half_data(halves[1].load(std::memory_order_relaxed));
  size_t count = 2 * packet_count(bytes), arrived = arrived_halves_;
  // A cache line at a time, so that there is one branch for each and the core asks for the next ones
  // meanwhile: what the GPU wrote is in none of its caches.
  for (; arrived + kHalvesPerLine <= count; arrived += kHalvesPerLine) {
    __builtin_prefetch(halves + arrived + kPrefetchHalves);
    uint32_t different = 0;
    for (size_t half = arrived; half < arrived + kHalvesPerLine; ++half) different |= missing(half);
    if (different != 0) break;
  }
  if (arrived + kHalvesPerLine > count) {
    while (arrived < count && missing(arrived) == 0) ++arrived;
  }
  arrived_halves_ = arrived;
  if (arrived < count) return false;
  // Acquire: what the previous kernels read from receive slots was read before these packets were stored, and
  // the transport's writes that follow tell the peer so.
  acquire_what_was_seen();
  transport_.post(sequence, {Protocol::kPackets, tag, bytes});
  counters_.posts.fetch_add(1, std::memory_order_relaxed);
  finish(sequence);
  return true;
}

bool Forwarder::look_for_pieces(uint32_t sequence) {
  auto staged = [&](uint32_t piece) {
    // Acquire: pairs with the kernel's release after the payload and the rest of the flag.
    return flag_sequence(region_.send_flag_value(sequence, piece).load(std::memory_order_acquire)) ==
           sequence;
  };
  if (pieces_ == 0) {
    if (!staged(0)) return false;
    pieces_ = region_.send_flag(sequence, 0).pieces;
  }
  // From here on piece 0 may be anything: once a piece is posted, its block goes on by itself, and with few
  // slots it is back in this one while another block's piece is still missing.
  uint32_t posted = 0;
  for (uint32_t piece = 0; piece < pieces_; ++piece) {
    if ((posted_pieces_ >> piece & 1) != 0 || !staged(piece)) continue;
    const Flag& flag = region_.send_flag(sequence, piece);
    transport_.post(sequence, {Protocol::kPayload, flag_tag(flag.value), flag.bytes, piece, flag.offset});
    posted_pieces_ |= uint64_t{1} << piece;
    ++posted;
  }
  if (posted == 0) return false;
  counters_.posts.fetch_add(posted, std::memory_order_relaxed);
  counters_.coalesced.fetch_add(posted - 1, std::memory_order_relaxed);
  if (static_cast<uint32_t>(__builtin_popcountll(posted_pieces_)) == pieces_) finish(sequence);
  return true;
}

void Forwarder::finish(uint32_t sequence) {
  last_ = sequence;
  arrived_halves_ = 0;
  pieces_ = 0;
  posted_pieces_ = 0;
}

}  // namespace spark::device
