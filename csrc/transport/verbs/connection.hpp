// A connection to the peer through one port of an RDMA device: writes from this machine's memory into the
// peer's, and their completions. A rail makes one after the other; a wire probe makes one for each rail.
//
// For one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "queue_pair.hpp"

namespace spark::verbs {

constexpr uint32_t kMaxRails = 4;

// Which port and address a rail uses on this machine.
struct RailAddress {
  std::string device;
  uint8_t port;
  abi::ibv_gid gid;
  uint32_t mtu;  // bytes
};

// What the other end must know of this one. Sent to the peer as it is in memory.
struct ConnectionInfo {
  uint32_t queue_pair;
  uint32_t packet_number;  // of the first packet
  uint32_t remote_key;     // of the memory that the peer may write
  uint32_t mtu;            // bytes
  uint64_t address;        // of the memory that the peer may write
  abi::ibv_gid gid;
};

// An RDMA write that can be posted again and again; each time only what differs is set.
struct WriteRequest {
  WriteRequest() = default;
  WriteRequest(const WriteRequest&) = delete;  // it points into itself
  WriteRequest& operator=(const WriteRequest&) = delete;

  // For memory registered under `local_key` here, and under `remote_key` on the peer.
  void prepare(uint32_t local_key, uint32_t remote_key) {
    entry.lkey = local_key;
    request.sg_list = &entry;
    request.num_sge = 1;
    request.opcode = abi::IBV_WR_RDMA_WRITE;
    request.wr.rdma.rkey = remote_key;
  }
  // From `memory` to the peer's address `remote`.
  void set(const void* memory, size_t bytes, uint64_t remote) {
    entry.addr = reinterpret_cast<uintptr_t>(memory);
    entry.length = static_cast<uint32_t>(bytes);
    request.wr.rdma.remote_addr = remote;
  }

  abi::ibv_sge entry{};
  abi::ibv_send_wr request{};
};

class Connection {
 public:
  // A fresh queue pair, and a fresh key for the `bytes` at `received`, which the peer may write: what the
  // peer knows of earlier connections gives it no access any more. Throws CollectiveError.
  Connection(std::shared_ptr<const Device> device, const RailAddress& address, std::byte* received,
             size_t bytes);

  ConnectionInfo info() const;
  // Connects to the peer's end, after which writes may be posted. Throws CollectiveError.
  void connect(const ConnectionInfo& peer, const PathOptions& path_options);
  // Ends all traffic both ways: nothing of it reaches this machine's memory any more.
  void end() noexcept { pair_.end(); }
  bool owns(const void* queue_pair) const { return pair_.is(queue_pair); }

  // Makes `last` the last request of the next message, with these flags. A completion is requested for every
  // 16th message, and if `signal`.
  void number(abi::ibv_send_wr& last, uint32_t flags, bool signal) {
    ++posted_;
    last.wr_id = posted_;
    last.send_flags = signal || posted_ % kSignalEvery == 0 ? flags | abi::IBV_SEND_SIGNALED : flags;
  }
  // Posts the chain of requests that begins with `first`, whose messages have their numbers. Zero, or the
  // error's number.
  int post(abi::ibv_send_wr& first) { return pair_.post(&first); }
  // Counts completions. Not empty: why the connection has failed.
  std::optional<std::string> poll();

  // Numbers, from 1, of the last message posted, or about to be, and of the last one known to have arrived.
  uint64_t posted() const { return posted_; }
  uint64_t completed() const { return completed_; }
  // Messages that may not have arrived yet.
  uint64_t queued() const { return posted_ - completed_; }
  // Messages that may be queued at once: each has up to two requests.
  static constexpr uint64_t kMessages = QueuePair::kSendRequests / 2;

 private:
  static constexpr uint64_t kSignalEvery = 16;

  std::shared_ptr<const Device> device_;  // first: outlives the rest, which may be released late
  RailAddress address_;
  MemoryRegion receiving_;
  CompletionQueue completions_;
  QueuePair pair_;
  uint32_t packet_number_;
  uint64_t posted_ = 0, completed_ = 0;
};

}  // namespace spark::verbs
