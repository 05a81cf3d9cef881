#include "slot_scanner.hpp"

#include <algorithm>
#include <thread>

namespace spark {
namespace {

// A kernel cannot wake a sleeping thread, so this one sleeps briefly between turns, and only once nothing was
// staged for kAwake: the first message after that waits for the end of a sleep.
constexpr auto kAwake = std::chrono::seconds(1);
constexpr auto kSleep = std::chrono::microseconds(50);
constexpr uint32_t kTurnsPerClock = 256;
constexpr size_t kPrefetchHalves = 16 * kHalvesPerLine;
constexpr size_t kPacketsPerLine = kHalvesPerLine / 2;
// Packets of a message that is posted in parts, 4 KiB of them: less takes one rail no longer than the second
// doorbell takes.
constexpr size_t kFewestToPart = 256;
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
  // Of a wide packet, whose flag is its last word.
  auto flag = [&](size_t packet) {
    return static_cast<uint32_t>(halves[2 * packet + 1].load(kScanOrder) >> 32);
  };
  uint32_t header = flag(0);
  // The slot holds a later message, so the peer has this one: a rail had failed, and the retransmission of an
  // earlier message from this slot carried this one too (docs/protocol.md, "Why that is safe").
  if (header - sequence - 1 < kFarthestAhead) {
    acquire_scanned();
    finish(sequence);
    return true;
  }
  if (header != sequence) return false;
  acquire_scanned();  // the header's data is loaded after its flag
  uint64_t data = halves[0].load(std::memory_order_relaxed);
  auto tag = static_cast<uint32_t>(data), bytes = static_cast<uint32_t>(data >> 32);
  size_t count = wide_packet_count(bytes);
  size_t part = count;
  if (parts_ > 1 && count >= kFewestToPart)
    part = stripe_bytes(count * sizeof(WidePacket), parts_) / sizeof(WidePacket);
  uint32_t posts = 0;
  while (posted_packets_ < count) {
    size_t end = std::min(count, posted_packets_ + part), staged = staged_packets_;
    // A cache line at a time, so that there is one branch for each and the core prefetches the next ones:
    // what the GPU wrote is in none of its caches.
    for (; staged + kPacketsPerLine <= end; staged += kPacketsPerLine) {
      __builtin_prefetch(halves + 2 * staged + kPrefetchHalves);
      uint32_t different = 0;
      for (size_t packet = staged; packet < staged + kPacketsPerLine; ++packet)
        different |= flag(packet) ^ sequence;
      if (different != 0) break;
    }
    if (staged + kPacketsPerLine > end) {
      while (staged < end && flag(staged) == sequence) ++staged;
    }
    staged_packets_ = staged;
    if (staged < end) break;
    // Acquire: what the previous kernels read from receive slots was read before these packets were stored,
    // and the transport's writes that follow tell the peer so.
    acquire_scanned();
    transport.post(sequence, {Protocol::kPackets, tag, (end - posted_packets_) * sizeof(WidePacket), 0,
                              static_cast<uint32_t>(posted_packets_ * sizeof(WidePacket))});
    transport.flush();
    posted_packets_ = end;
    ++posts;
  }
  if (posts == 0) return false;
  MessageSource::count(posts);
  if (posted_packets_ == count) finish(sequence);
  return true;
}

bool SlotScanner::post_pieces(Transport& transport, uint32_t sequence) {
  auto staged = [&](uint32_t piece) {
    return flag_sequence(region_.send_flag_value(sequence, piece).load(kScanOrder)) == sequence;
  };
  if (pieces_ == 0) {
    if (!staged(0)) return false;
    acquire_scanned();  // the rest of a flag is loaded after its value
    pieces_ = region_.send_flag(sequence, 0).pieces;
  }
  // From here on the flag of piece 0 may hold any sequence number: once a piece is posted, its block goes on
  // by itself, and with few slots it uses this one again while another block's piece is still missing.
  uint64_t found = 0;
  for (uint32_t piece = 0; piece < pieces_; ++piece) {
    if ((posted_pieces_ >> piece & 1) == 0 && staged(piece)) found |= uint64_t{1} << piece;
  }
  if (found == 0) return false;
  // Acquire: pairs with the kernel's release of each flag after the payload and the rest of the flag.
  acquire_scanned();
  for (uint64_t left = found; left != 0; left &= left - 1) {
    auto piece = static_cast<uint32_t>(__builtin_ctzll(left));
    const Flag& flag = region_.send_flag(sequence, piece);
    transport.post(sequence, {Protocol::kPayload, flag_tag(flag.value), flag.bytes, piece, flag.offset});
  }
  transport.flush();
  posted_pieces_ |= found;
  count(static_cast<uint32_t>(__builtin_popcountll(found)));
  if (static_cast<uint32_t>(__builtin_popcountll(posted_pieces_)) == pieces_) finish(sequence);
  return true;
}

void SlotScanner::finish(uint32_t sequence) {
  last_ = sequence;
  staged_packets_ = 0;
  posted_packets_ = 0;
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
