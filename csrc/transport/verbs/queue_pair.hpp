// What a rail is made of, each released with its object: registered memory, completions, a connected queue
// pair.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>

#include "device.hpp"

namespace spark::verbs {

// Memory that the NIC may read, and the peer's NIC write if `remote`.
class MemoryRegion {
 public:
  // Throws CollectiveError, with the remedy if memory may not be pinned.
  MemoryRegion(const Device& device, std::byte* memory, size_t bytes, bool remote);
  ~MemoryRegion();
  MemoryRegion(const MemoryRegion&) = delete;
  MemoryRegion& operator=(const MemoryRegion&) = delete;

  uint32_t local_key() const { return region_->lkey; }
  uint32_t remote_key() const { return region_->rkey; }
  // Where it begins for the peer.
  uint64_t remote_address() const { return reinterpret_cast<uintptr_t>(region_->addr); }

 private:
  const Library& library_;
  abi::ibv_mr* region_;
};

class CompletionQueue {
 public:
  CompletionQueue(const Device& device, int entries);
  ~CompletionQueue();
  CompletionQueue(const CompletionQueue&) = delete;
  CompletionQueue& operator=(const CompletionQueue&) = delete;

  abi::ibv_cq* get() const { return queue_; }
  // Up to `entries` completions that have come; never waits. Negative if the queue is broken.
  int poll(abi::ibv_wc* completions, int entries) const { return poll_(queue_, entries, completions); }

 private:
  const Library& library_;
  abi::ibv_cq* queue_;
  abi::PollCq poll_;
};

// Where the other end of a queue pair is.
struct Destination {
  uint32_t queue_pair;
  uint32_t packet_number;
  uint32_t mtu;  // bytes
  abi::ibv_gid gid;
};

// How packets travel.
struct PathOptions {
  // Class of the packets on the wire; the network's administrator defines both numbers.
  uint8_t traffic_class = 0;
  uint8_t service_level = 0;
  // A queue pair fails when one of its packets was retransmitted for so long and was not acknowledged. NICs
  // support powers of two, of which the next lower one is used, and may take up to four times as long.
  std::chrono::nanoseconds rail_timeout{std::chrono::milliseconds(500)};

  // `least`, or longer than a NIC takes to report that a queue pair has failed.
  std::chrono::nanoseconds beyond_failure(std::chrono::nanoseconds least) const {
    constexpr int kMostTimeouts = 4;
    constexpr auto kMargin = std::chrono::seconds(1);
    // As long as a clock can count is long enough.
    if (rail_timeout > std::chrono::hours(1)) return std::max(least, rail_timeout);
    return std::max<std::chrono::nanoseconds>(least, kMostTimeouts * rail_timeout + kMargin);
  }
};

class QueuePair {
 public:
  static constexpr uint32_t kSendRequests = 1024;
  static constexpr uint32_t kInlineBytes = 64;

  // Ready to be connected. Throws CollectiveError.
  QueuePair(const Device& device, const CompletionQueue& completions, uint8_t port);
  ~QueuePair();
  QueuePair(const QueuePair&) = delete;
  QueuePair& operator=(const QueuePair&) = delete;

  uint32_t number() const { return pair_->qp_num; }
  bool is(const void* object) const { return object == pair_; }

  // Connects to the peer's, sending from GID `source_index` with numbers from `packet_number`. Throws
  // CollectiveError.
  void connect(const Destination& peer, uint32_t source_index, uint32_t packet_number,
               const PathOptions& path_options);
  // Ends all traffic both ways, as an error of the wire does. What was posted completes with an error.
  void end() noexcept;

  // Why a request has failed, with what tells a NIC's vendor or a network's administrator more.
  std::string failure_text(const abi::ibv_wc& completion) const;

  // Zero, or the error's number.
  int post(abi::ibv_send_wr* first) const {
    abi::ibv_send_wr* failed = nullptr;
    return post_(pair_, first, &failed);
  }

 private:
  void modify(abi::ibv_qp_attr& attributes, int mask, const char* what);

  std::string device_;
  const Library& library_;
  uint8_t port_;
  abi::ibv_qp* pair_;
  abi::PostSend post_;
  uint32_t peer_number_ = 0, source_index_ = 0;  // once connected
};

}  // namespace spark::verbs
