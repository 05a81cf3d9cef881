#include "loopback.hpp"

#include <algorithm>
#include <cstring>

// ThreadSanitizer is to see every access as the atomic that it is.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#include <emmintrin.h>
#define SPARK_STREAMS_LINES 1
#endif

namespace spark {
namespace {

// Copies the halves [begin, end) of a slot of packets. Relaxed: each half carries its own flag, and the
// reader trusts no other order.
void copy_packets(const std::atomic<uint64_t>* from, std::atomic<uint64_t>* to, size_t begin, size_t end) {
  for (size_t half = begin; half < end; ++half) {
    to[half].store(from[half].load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
}

// The same for `lines` whole lines. Stored a word at a time, a line that a GPU polls is taken from this core
// and fetched back between its words (benchmarks/NOTES.md, entry 12). Each half is whole all the same, as
// aligned 8 bytes of a vector are on every x86-64.
void copy_packet_lines(const std::atomic<uint64_t>* from, std::atomic<uint64_t>* to, size_t lines) {
#if defined(SPARK_STREAMS_LINES)
  auto* source = reinterpret_cast<const __m128i*>(from);
  auto* target = reinterpret_cast<__m128i*>(to);
  for (; lines > 0; --lines, source += 4, target += 4) {
    __m128i line[] = {_mm_load_si128(source), _mm_load_si128(source + 1), _mm_load_si128(source + 2),
                      _mm_load_si128(source + 3)};
    for (int part = 0; part < 4; ++part) _mm_stream_si128(target + part, line[part]);
  }
  _mm_sfence();  // streamed stores are not ordered before later stores, not even before a release
#else
  copy_packets(from, to, 0, lines * kHalvesPerLine);
#endif
}

}  // namespace

void deliver_payload(const std::byte* from, std::byte* to, size_t bytes, std::atomic<uint64_t>& flag,
                     uint64_t flag_value) {
  std::memcpy(to, from, bytes);
  // Release: the reader acquires the flag and must then see the whole payload.
  flag.store(flag_value, std::memory_order_release);
}

void LoopbackTransport::post(uint32_t sequence, const SendDescriptor& descriptor) {
  Clock::time_point now = Clock::now();
  Clock::time_point start = std::max(now, wire_free_);
  if (wire_.bytes_per_ns > 0) {
    uint64_t on_wire = descriptor.protocol == Protocol::kPackets
                           ? packet_count(descriptor.bytes) * sizeof(Packet)
                           : descriptor.bytes + sizeof(uint64_t);
    start +=
        std::chrono::nanoseconds(static_cast<int64_t>(static_cast<double>(on_wire) / wire_.bytes_per_ns));
  }
  wire_free_ = start;
  copy_all_but_last(sequence, descriptor);
  under_way_.push_back({sequence, descriptor, start + wire_.latency});
}

bool LoopbackTransport::progress() {
  while (!under_way_.empty() && under_way_.front().due <= Clock::now()) {
    deliver_last(under_way_.front());
    under_way_.pop_front();
  }
  return !under_way_.empty();
}

void LoopbackTransport::copy_all_but_last(uint32_t sequence, const SendDescriptor& descriptor) {
  if (descriptor.protocol == Protocol::kPayload) {
    std::memcpy(peer_.recv_payload(sequence) + descriptor.offset,
                mine_.send_payload(sequence) + descriptor.offset, descriptor.bytes);
    return;
  }
  const std::atomic<uint64_t>* from = mine_.send_packets(sequence);
  std::atomic<uint64_t>* to = peer_.recv_packets(sequence);
  size_t halves = 2 * packet_count(descriptor.bytes), lines = halves / kHalvesPerLine;
  if (!copy_lines_ || lines < 2) return copy_packets(from, to, 1, halves);
  copy_packets(from, to, 1, kHalvesPerLine);
  copy_packet_lines(from + kHalvesPerLine, to + kHalvesPerLine, lines - 1);
  copy_packets(from, to, lines * kHalvesPerLine, halves);
}

void LoopbackTransport::deliver_last(const Write& write) {
  const SendDescriptor& descriptor = write.descriptor;
  if (descriptor.protocol == Protocol::kPackets) {
    // Release: the header half also tells the peer which of its slots were read (see CpuRank::send).
    peer_.recv_packets(write.sequence)[0].store(packet_half(descriptor.tag, write.sequence),
                                                std::memory_order_release);
  } else {
    // Release: the reader acquires the flag and must then see the whole payload.
    peer_.recv_flag(write.sequence, descriptor.piece)
        .store(payload_flag(write.sequence, descriptor.tag), std::memory_order_release);
  }
}

}  // namespace spark
