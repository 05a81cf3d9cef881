// A mapped region as the CPU sees it: its shared words are atomics. Does not own the memory.
#pragma once

#include <atomic>

#include "region_layout.hpp"

namespace spark {

class Region {
 public:
  Region(std::byte* base, const RegionSizes& sizes) : base_(base), layout_(sizes) {}

  RegionHeader& header() const { return *at<RegionHeader>(0); }
  SendDescriptor& descriptor(uint32_t sequence) const { return control().send[layout_.slot(sequence)]; }

  std::atomic<uint32_t>& doorbell() const { return word(control().doorbell); }
  std::atomic<uint32_t>& proxy_asleep() const { return word(control().proxy_asleep); }
  std::atomic<uint32_t>& abort() const { return word(control().abort); }
  char* abort_reason() const { return control().abort_reason; }
  static constexpr size_t abort_reason_size() { return sizeof(Control::abort_reason); }

  std::atomic<uint64_t>& recv_flag(uint32_t sequence, uint32_t piece = 0) const {
    return word(at<Flag>(layout_.recv_flags())[layout_.slot(sequence) * kMaxPieces + piece].value);
  }
  Flag& send_flag(uint32_t sequence, uint32_t piece) const {
    return at<Flag>(layout_.send_flags())[layout_.slot(sequence) * kMaxPieces + piece];
  }
  std::atomic<uint64_t>& send_flag_value(uint32_t sequence, uint32_t piece) const {
    return word(send_flag(sequence, piece).value);
  }
  std::atomic<uint64_t>* recv_packets(uint32_t sequence) const {
    return at<std::atomic<uint64_t>>(layout_.recv_packets() + layout_.slot(sequence) * layout_.packet_area());
  }
  std::byte* recv_payload(uint32_t sequence) const {
    return at<std::byte>(layout_.recv_payload() + layout_.slot(sequence) * layout_.payload_area());
  }
  std::atomic<uint64_t>* send_packets(uint32_t sequence) const {
    return at<std::atomic<uint64_t>>(layout_.send_packets() + layout_.slot(sequence) * layout_.packet_area());
  }
  std::byte* send_payload(uint32_t sequence) const {
    return at<std::byte>(layout_.send_payload() + layout_.slot(sequence) * layout_.payload_area());
  }

  // Marks the receive slot of `sequence` as holding a message half the circle of sequence numbers away, so
  // that nothing left in it can be taken for a message to come. Only while the peer may not write there.
  void clear_recv(uint32_t sequence) const {
    uint32_t never = sequence + (1u << 31);
    // Relaxed: the next message that this rank sends is what lets the peer write here again, and releases
    // these stores.
    for (uint32_t piece = 0; piece < kMaxPieces; ++piece) {
      recv_flag(sequence, piece).store(payload_flag(never, 0), std::memory_order_relaxed);
    }
    for (size_t half = 0; half < layout_.packet_area() / sizeof(uint64_t); ++half) {
      recv_packets(sequence)[half].store(packet_half(0, never), std::memory_order_relaxed);
    }
  }

  // The same for the send slot, which a kernel fills and this rank's proxy scans.
  void clear_send(uint32_t sequence) const {
    uint32_t never = sequence + (1u << 31);
    for (uint32_t piece = 0; piece < kMaxPieces; ++piece) {
      send_flag_value(sequence, piece).store(payload_flag(never, 0), std::memory_order_relaxed);
    }
    for (size_t half = 0; half < layout_.packet_area() / sizeof(uint64_t); ++half) {
      send_packets(sequence)[half].store(packet_half(0, never), std::memory_order_relaxed);
    }
  }

 private:
  static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free &&
                    sizeof(std::atomic<uint32_t>) == sizeof(uint32_t) &&
                    sizeof(std::atomic<uint64_t>) == sizeof(uint64_t),
                "words shared with another process, a kernel or a NIC must be plain memory");

  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  template <typename T>
  static std::atomic<T>& word(T& plain) {
    return reinterpret_cast<std::atomic<T>&>(plain);
  }
  Control& control() const { return *at<Control>(layout_.control()); }

  std::byte* base_;
  RegionLayout layout_;
};

}  // namespace spark
