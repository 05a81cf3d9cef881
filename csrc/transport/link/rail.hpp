// One rail: a port of an RDMA device, and this rank's connection to the peer over it.
//
// Driven by the proxy's thread alone.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../../region/region_layout.hpp"
#include "../verbs/background_release.hpp"
#include "../verbs/connection.hpp"
#include "link_state.hpp"

namespace spark::verbs {

// A message, or a piece of one, staged in this rank's send slots.
struct Write {
  uint32_t sequence;
  SendDescriptor descriptor;
};

class Rail {
 public:
  // Pins the sending part of `memory`. Throws CollectiveError. `release` must outlive it.
  Rail(uint32_t index, const RailAddress& address, std::shared_ptr<const Device> device, std::byte* memory,
       const RegionSizes& sizes, const PathOptions& path_options, BackgroundRelease& release);

  ~Rail();
  Rail(const Rail&) = delete;
  Rail& operator=(const Rail&) = delete;

  uint32_t index() const { return index_; }
  const std::string& name() const { return name_; }  // "rail 0 (mlx5_0)"
  const Device& device() const { return *device_; }
  uint8_t port() const { return address_.port; }
  Phase phase() const { return phase_; }
  // Announcements are sent over it.
  bool up() const { return phase_ >= Phase::kUp; }
  // Data is sent over it: both ends have proven the connection.
  bool open() const { return open_; }
  uint32_t epoch() const { return epoch_; }
  RailState state() const;
  bool owns(const void* queue_pair) const { return connection_ && connection_->owns(queue_pair); }

  // Makes a fresh connection. From down to offered. Throws CollectiveError.
  void offer();
  // Connects to what the peer offers. From offered to ready. Throws CollectiveError.
  void connect(const RailState& peer);
  // The peer is ready too. From ready to up.
  void mark_up() { phase_ = Phase::kUp; }
  // The peer has proven its end too, in the same epoch. The rail must be proven.
  void open_for_data() { open_ = true; }
  // Ends the connection; the next one has number `epoch`. Returns the messages that were posted and not
  // acknowledged, in order.
  std::vector<Write> fail(uint32_t epoch);
  // Test hook: what an error of the wire does.
  void break_down() { connection_->end(); }

  // Messages that may not have arrived yet.
  uint64_t queued() const { return connection_ ? connection_->queued() : 0; }
  // True if another message fits the queue.
  bool has_room() const { return queued() < Connection::kMessages; }
  // Appends a message to the chain that the next `flush` posts, which must not be full; a completion is
  // requested now and then, and if `signal`. Of a rail that is up, as the next two.
  void post(const Write& write, bool signal);
  // The same for the announcement in outbox `outbox`, to the peer's inbox.
  void post_announcement(uint32_t outbox);
  // The last announcement may not have arrived yet.
  bool announcement_under_way() const { return connection_ && completed() < announced_; }
  // Whether there is something to flush, and whether another message needs a flush first.
  bool chained() const { return chained_ > 0; }
  bool chain_is_full() const { return chained_ + 2 > kChain; }
  // Posts the chain, with one doorbell. Zero, or the error's number.
  int flush() {
    if (chained_ == 0) return 0;
    chain_[chained_ - 1].request.next = nullptr;
    chained_ = 0;
    return connection_->post(chain_[0].request);
  }
  // Counts completions; the first one, which is an announcement's, proves the connection. Not empty: why the
  // connection has failed.
  std::optional<std::string> poll();

  // Numbers, within the present connection, of the last message posted, or in the chain, and of the last one
  // known to have arrived.
  uint64_t posted() const { return connection_->posted(); }
  uint64_t completed() const { return connection_->completed(); }

 private:
  struct Posted {
    Write write;
    bool announcement;
  };

  // Requests of one chain: for a turn of the proxy, in which all pieces of a message may have been staged.
  static constexpr size_t kChain = 2 * kMaxPieces;

  void end_connection();
  // Appends a request to the chain, in which there is room.
  WriteRequest& chain(size_t from, size_t to, size_t bytes);
  // Ends a message with the request `last`.
  void number(const Posted& posted, WriteRequest& last, uint32_t flags, bool signal);

  uint32_t index_;
  RailAddress address_;
  std::string name_;
  std::byte* memory_;
  RegionLayout layout_;
  // Copies of what `layout_` would compute for each message.
  size_t packet_area_, payload_area_, send_packets_, recv_packets_, send_payload_, recv_payload_, recv_flags_;
  PathOptions path_options_;
  BackgroundRelease& release_;
  std::shared_ptr<const Device> device_;
  MemoryRegion sending_;
  std::shared_ptr<Connection> connection_;
  Phase phase_ = Phase::kDown;
  bool open_ = false;
  uint32_t epoch_ = 1;
  uint64_t remote_base_ = 0;  // address of the peer's region, of which only the receiving part may be written
  uint64_t announced_ = 0;    // number of the connection's last announcement

  std::array<WriteRequest, kChain> chain_;
  std::array<uint64_t, kChain> flag_values_{};  // of the requests that send one
  size_t chained_ = 0;

  std::vector<Posted> ring_;  // by a message's number, modulo the size
};

}  // namespace spark::verbs
