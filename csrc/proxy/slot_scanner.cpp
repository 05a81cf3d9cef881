#include "slot_scanner.hpp"

#include <thread>

namespace spark {
namespace {

// A kernel cannot wake a sleeping thread, so this one sleeps briefly between turns, and only once nothing was
// staged for kAwake: the first message after that waits for the end of a sleep.
constexpr auto kAwake = std::chrono::seconds(1);
constexpr auto kSleep = std::chrono::microseconds(50);
constexpr uint32_t kTurnsPerClock = 256;
constexpr size_t kPrefetchHalves = 16 * kHalvesPerLine;
// No slot holds a message further ahead than this: a cleared slot holds the number half the circle ahead of
// its message, and is cleared again before a quarter of the circle has passed.
constexpr uint32_t kFarthestAhead = 1u << 29;

// Relaxed loads of many words, then one acquire fence that orders them all before what follows: on aarch64,
// acquire loads would wait for each other. ThreadSanitizer does not support fences, so under it every load
// acquires.
#if defined(__SANITIZE_THREAD__)
constexpr auto kScanOrder = std::memory_order_acquire;
void acquire_scanned() {}
#else
constexpr auto kScanOrder = std::memory_order_relaxed;
void acquire_scanned() {
  std::atomic_thread_fence(std::memory_order_acquire);
}
#endif

}  // namespace

bool SlotScanner::post_staged(Transport& transport) {
  uint32_t next = last_ + 1;
  return post_packets(transport, next) || post_pieces(transport, next);
}

bool SlotScanner::post_packets(Transport& transport, uint32_t sequence) {
  const std::atomic<uint64_t>* halves = region_.send_packets(sequence);
  auto sequence_of = [&](size_t half) { return static_cast<uint32_t>(halves[half].load(kScanOrder) >> 32); };
  auto missing = [&](size_t half) { return sequence_of(half) ^ sequence; };
  // The slot holds a later message, so the peer has this one: a rail had failed, and the retransmission of an
  // earlier message from this slot carried this one too (docs/protocol.md, "Why that is safe").
  if (sequence_of(0) - sequence - 1 < kFarthestAhead) {
    acquire_scanned();
    finish(sequence);
    return true;
  }
  if ((missing(0) | missing(1)) != 0) return false;
  uint32_t tag = half_data(halves[0].load(std::memory_order_relaxed));
  uint32_t bytes = half_data(halves[1].load(std::memory_order_relaxed));
  size_t count = 2 * packet_count(bytes), staged = staged_halves_;
  // A cache line at a time, so that there is one branch for each and the core prefetches the next ones: what
  // the GPU wrote is in none of its caches.
  for (; staged + kHalvesPerLine <= count; staged += kHalvesPerLine) {
    __builtin_prefetch(halves + staged + kPrefetchHalves);
    uint32_t different = 0;
    for (size_t half = staged; half < staged + kHalvesPerLine; ++half) different |= missing(half);
    if (different != 0) break;
  }
  if (staged + kHalvesPerLine > count) {
    while (staged < count && missing(staged) == 0) ++staged;
  }
  staged_halves_ = staged;
  if (staged < count) return false;
  // Acquire: what the previous kernels read from receive slots was read before these packets were stored, and
  // the transport's writes that follow tell the peer so.
  acquire_scanned();
  transport.post(sequence, {Protocol::kPackets, tag, bytes});
  MessageSource::count(1);
  finish(sequence);
  return true;
}

bool SlotScanner::post_pieces(Transport& transport, uint32_t sequence) {
  auto staged = [&](uint32_t piece) {
    // Acquire: pairs with the kernel's release after the payload and the rest of the flag.
    return flag_sequence(region_.send_flag_value(sequence, piece).load(std::memory_order_acquire)) ==
           sequence;
  };
  if (pieces_ == 0) {
    if (!staged(0)) return false;
    pieces_ = region_.send_flag(sequence, 0).pieces;
  }
  // From here on the flag of piece 0 may hold any sequence number: once a piece is posted, its block goes on
  // by itself, and with few slots it uses this one again while another block's piece is still missing.
  uint32_t posts = 0;
  for (uint32_t piece = 0; piece < pieces_; ++piece) {
    if ((posted_pieces_ >> piece & 1) != 0 || !staged(piece)) continue;
    const Flag& flag = region_.send_flag(sequence, piece);
    transport.post(sequence, {Protocol::kPayload, flag_tag(flag.value), flag.bytes, piece, flag.offset});
    posted_pieces_ |= uint64_t{1} << piece;
    ++posts;
  }
  if (posts == 0) return false;
  count(posts);
  if (static_cast<uint32_t>(__builtin_popcountll(posted_pieces_)) == pieces_) finish(sequence);
  return true;
}

void SlotScanner::finish(uint32_t sequence) {
  last_ = sequence;
  staged_halves_ = 0;
  pieces_ = 0;
  posted_pieces_ = 0;
}

bool SlotScanner::end_turn(bool busy, bool under_way) {
  if (busy || under_way) {
    idle_turns_ = 0;
    sleeps_ = false;
    return false;
  }
  if (sleeps_) return true;
  // Not in every turn: reading the clock takes a third as long as a turn, and messages wait for turns.
  if (idle_turns_ == 0) idle_since_ = Clock::now();
  if (++idle_turns_ % kTurnsPerClock == 0) sleeps_ = Clock::now() - idle_since_ > kAwake;
  cpu_relax();
  return false;
}

void SlotScanner::rest() {
  std::this_thread::sleep_for(kSleep);
}

}  // namespace spark
