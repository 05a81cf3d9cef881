// One rail: a port of an RDMA device, and this rank's connection to the peer over it.
//
// Driven by the proxy's thread alone.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../../region/region_layout.hpp"
#include "../verbs/background_release.hpp"
#include "../verbs/queue_pair.hpp"
#include "link_state.hpp"

namespace spark::verbs {

// Which port and address a rail uses on this machine.
struct RailAddress {
  std::string device;
  uint8_t port;
  abi::ibv_gid gid;
  uint32_t mtu;  // bytes
};

// A message, or a piece of one, staged in this rank's send slots.
struct Write {
  uint32_t sequence;
  SendDescriptor descriptor;
};

class Rail {
 public:
  // Opens the device and pins the sending part of `memory`. Throws CollectiveError.
  // `reaper` must outlive it.
  Rail(uint32_t index, const RailAddress& address, std::byte* memory, const RegionSizes& sizes,
       const WireClass& marks, Reaper& reaper);

  ~Rail();
  Rail(const Rail&) = delete;
  Rail& operator=(const Rail&) = delete;

  uint32_t index() const { return index_; }
  const std::string& name() const { return name_; }  // "rail 0 (mlx5_0)"
  const Device& device() const { return *device_; }
  uint8_t port() const { return address_.port; }
  Phase phase() const { return phase_; }
  // Announcements go over it.
  bool up() const { return phase_ >= Phase::kUp; }
  // Data goes over it: both ends have proven the connection.
  bool open() const { return open_; }
  uint32_t epoch() const { return epoch_; }
  RailState state() const;
  bool owns(const void* queue_pair) const { return connection_ && connection_->pair.is(queue_pair); }

  // Makes a fresh queue pair, and a fresh key to the receiving part: what the peer knows of earlier ones
  // opens nothing any more. From down to offered. Throws CollectiveError.
  void offer();
  // Connects to what the peer offers. From offered to ready. Throws CollectiveError.
  void connect(const RailState& peer);
  // The peer is ready too. From ready to up.
  void rise() {
    phase_ = Phase::kUp;
    risen_at_ = posted_;
  }
  // The peer has proven its end too, in the same epoch. The rail must be proven.
  void open_for_data() { open_ = true; }
  // Ends the connection; the next one has number `epoch`. Returns what was posted and not acknowledged, in
  // order.
  std::vector<Write> fail(uint32_t epoch);
  // Test hook: what an error of the wire does.
  void break_down() { connection_->pair.end(); }

  // Messages that may not have arrived yet.
  uint64_t queued() const { return posted_ - completed_; }
  // True if another message fits the queue.
  bool has_room() const { return queued() < kWrites; }
  // Starts moving a message; a completion is asked for now and then, and if `signal`. Zero, or the error's
  // number.
  int post(const Write& write, bool signal);
  // Starts moving the announcement in outbox `outbox` to the peer's inbox.
  int post_announcement(uint32_t outbox);
  // Takes note of what has completed; the first completion since the rail came up, which is an
  // announcement's, proves the connection. Not empty: why the connection is broken.
  std::optional<std::string> poll();

  // Numbers of the last message posted and of the last one known to have arrived.
  uint64_t posted() const { return posted_; }
  uint64_t completed() const { return completed_; }

 private:
  // Each takes up to two requests.
  static constexpr uint64_t kWrites = QueuePair::kSendRequests / 2;
  static constexpr uint64_t kSignalEvery = 16;

  struct Connection {
    Connection(std::shared_ptr<const Device> opened, uint8_t port, std::byte* memory, size_t bytes)
        : device(std::move(opened)),
          receiving(*device, memory, bytes, true),
          completions(*device, static_cast<int>(QueuePair::kSendRequests)),
          pair(*device, completions, port) {}

    std::shared_ptr<const Device> device;  // outlives the rest, which may be released late
    MemoryRegion receiving;
    CompletionQueue completions;
    QueuePair pair;
  };
  struct Posted {
    Write write;
    bool announcement;
  };

  void end_connection();
  void prepare_requests();
  void aim(size_t from, size_t to, size_t bytes);
  int submit(const Posted& posted, abi::ibv_send_wr* first, abi::ibv_send_wr& last, uint32_t flags,
             bool signal);

  uint32_t index_;
  RailAddress address_;
  std::string name_;
  std::byte* memory_;
  RegionLayout layout_;
  // What `layout_` would work out anew for each message.
  size_t packet_area_, payload_area_, send_packets_, recv_packets_, send_payload_, recv_payload_, recv_flags_;
  WireClass marks_;
  Reaper& reaper_;
  std::shared_ptr<const Device> device_;
  MemoryRegion sending_;
  std::shared_ptr<Connection> connection_;
  Phase phase_ = Phase::kDown;
  uint32_t epoch_ = 1;
  uint32_t packet_number_ = 0;
  uint64_t remote_base_ = 0;  // where the peer's region begins, of which only the receiving part is open

  // Built once, and only patched for each message.
  abi::ibv_sge data_sge_{}, flag_sge_{};
  abi::ibv_send_wr data_{}, flag_{};
  uint64_t flag_value_ = 0;

  std::vector<Posted> ring_;  // by number modulo its size
  uint64_t posted_ = 0, completed_ = 0;
  uint64_t risen_at_ = 0;  // number of the last message before it came up
  bool open_ = false;
};

}  // namespace spark::verbs
