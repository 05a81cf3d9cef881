#include "slot_scanner.hpp"

#include <algorithm>

#include "../support/device_order.hpp"
#include "../support/futex.hpp"

namespace spark {
namespace {

// A kernel cannot wake a sleeping thread: a message that comes without a call of `wake` waits for so long.
constexpr timespec kLongestSleep{0, 1'000'000};
constexpr uint32_t kTurnsPerClock = 256;
constexpr size_t kPrefetchHalves = 16 * kHalvesPerLine;
constexpr size_t kPacketsPerLine = kHalvesPerLine / 2;
// Packets of a message that is posted in parts, 4 KiB of them: less takes one rail no longer than the second
// doorbell takes.
constexpr size_t kFewestToPart = 256;
// No slot holds a message further ahead than this: a cleared slot holds the number half the circle ahead of
// its message, and is cleared again before a quarter of the circle has passed.
constexpr uint32_t kFarthestAhead = 1u << 29;

// The first packet from `from` on, up to `end`, that does not have the flag `sequence`; if it is not in the
// last line, the first one of its line.
size_t scan_packets(const std::atomic<uint64_t>* halves, size_t from, size_t end, uint32_t sequence) {
  const uint64_t expected = uint64_t{sequence} << 32;
  // The flag is the upper part of a packet's second half.
  auto differs = [&](const std::atomic<uint64_t>* packet) {
    return packet[1].load(std::memory_order_relaxed) ^ expected;
  };
  // A cache line at a time, so that there is one branch for each and the core prefetches the next ones: what
  // the GPU wrote is in none of its caches.
  for (; from + kPacketsPerLine <= end; from += kPacketsPerLine) {
    const std::atomic<uint64_t>* line = halves + 2 * from;
    __builtin_prefetch(line + kPrefetchHalves);
    uint64_t different = 0;
#pragma GCC unroll 8
    for (size_t packet = 0; packet < kPacketsPerLine; ++packet) different |= differs(line + 2 * packet);
    if (different >> 32 != 0) return from;
  }
  while (from < end && differs(halves + 2 * from) >> 32 == 0) ++from;
  return from;
}

}  // namespace

// Flags are loaded relaxed, many of them, and then one fence orders them all before what follows: on aarch64,
// acquire loads would wait for each other.

bool SlotScanner::post_staged(Transport& transport) {
  uint32_t next = last_ + 1;
  return post_packets(transport, next) || post_pieces(transport, next);
}

bool SlotScanner::post_packets(Transport& transport, uint32_t sequence) {
  const std::atomic<uint64_t>* halves = region_.send_packets(sequence);
  auto acquire_packets = [&](size_t from, size_t to) {
    acquire_from_device();
    for (size_t packet = from; packet < to; ++packet) acquired(halves[2 * packet + 1]);
  };
  uint32_t header = packet_flag(halves[1].load(std::memory_order_relaxed));  // of the first wide packet
  // The slot holds a later message, so the peer has this one: a rail had failed, and the retransmission of an
  // earlier message from this slot carried this one too (docs/protocol.md, "Why that is safe").
  if (header - sequence - 1 < kFarthestAhead) {
    acquire_packets(0, 1);
    finish(sequence);
    return true;
  }
  if (header != sequence) return false;
  acquire_packets(0, 1);  // the header's data is loaded after its flag
  uint64_t data = halves[0].load(std::memory_order_relaxed);
  auto tag = static_cast<uint32_t>(data), bytes = static_cast<uint32_t>(data >> 32);
  size_t count = wide_packet_count(bytes);
  size_t part = count;
  if (parts_ > 1 && count >= kFewestToPart)
    part = stripe_bytes(count * sizeof(WidePacket), parts_) / sizeof(WidePacket);
  uint32_t posts = 0;
  while (posted_packets_ < count) {
    size_t end = std::min(count, posted_packets_ + part);
    staged_packets_ = scan_packets(halves, staged_packets_, end, sequence);
    if (staged_packets_ < end) break;
    // Acquire: what the previous kernels read from receive slots was read before these packets were stored,
    // and the transport's writes that follow tell the peer so.
    acquire_packets(posted_packets_, end);
    post_part(transport, sequence,
              {Protocol::kPackets, tag, (end - posted_packets_) * sizeof(WidePacket), 0,
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
    return flag_sequence(region_.send_flag_value(sequence, piece).load(std::memory_order_relaxed)) ==
           sequence;
  };
  if (pieces_ == 0) {
    if (!staged(0)) return false;
    acquire_from_device();  // the rest of a flag is loaded after its value
    acquired(region_.send_flag_value(sequence, 0));
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
  acquire_from_device();
  for (uint64_t left = found; left != 0; left &= left - 1) {
    auto piece = static_cast<uint32_t>(__builtin_ctzll(left));
    acquired(region_.send_flag_value(sequence, piece));
    const Flag& flag = region_.send_flag(sequence, piece);
    post_part(transport, sequence,
              {Protocol::kPayload, flag_tag(flag.value), flag.bytes, piece, flag.offset});
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
  if (++idle_turns_ % kTurnsPerClock == 0) sleeps_ = Clock::now() - idle_since_ > awake_;
  cpu_relax();
  return false;
}

void SlotScanner::rest() {
  // Sequentially consistent, as in `wake`: both sides store, then load the other's word, so that one of them
  // sees what the other one has stored.
  asleep_.store(1, std::memory_order_seq_cst);
  uint32_t calls = calls_.load(std::memory_order_seq_cst);
  // The kernel compares the word once more: after a call since then the wait ends at once.
  if (calls == seen_calls_) futex_wait(calls_, calls, kLongestSleep);
  asleep_.store(0, std::memory_order_relaxed);
  // Acquire: what the caller of `wake` stored before it is seen after this rest.
  calls = calls_.load(std::memory_order_acquire);
  if (calls == seen_calls_) return;
  seen_calls_ = calls;
  idle_turns_ = 0;
  sleeps_ = false;
}

void SlotScanner::wake() {
  calls_.fetch_add(1, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) != 0) futex_wake(calls_);
}

}  // namespace spark
