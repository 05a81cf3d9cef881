// Posts messages to the rails, and sends those again that a failed rail may have lost: they are still in this
// rank's send slots (docs/protocol.md, "Link recovery").
//
// Driven by the proxy's thread alone.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "rail_keeper.hpp"

namespace spark::verbs {

class Retransmission final : public LostMessages {
 public:
  // `keeper` and `counters` must outlive it.
  Retransmission(RailKeeper& keeper, LinkCounters& counters, const RegionSizes& sizes);

  // Posts a staged message, or queues it if it must wait.
  void post(const Write& write);
  // Posts queued messages, as far as rails take them.
  void post_queued();
  bool empty() const { return queue_.empty(); }

  size_t requeue(const Rail& rail, const std::vector<Write>& lost) override;
  uint32_t last_posted() const override { return last_posted_; }

 private:
  // The rail for the next message; null if there is none.
  Rail* choose();
  // False if the rail has no room, and the message must wait.
  bool post_to(Rail& rail, const Write& write, bool signal);
  // The last sequence number posted with the slot, and piece, of `write`.
  uint32_t& newest(const Write& write);

  RailKeeper& keeper_;
  LinkCounters& counters_;
  RegionLayout layout_;

  // Messages that no rail has taken yet; while `retransmitting_`, it begins with some that were posted
  // before.
  std::deque<Write> queue_;
  bool retransmitting_ = false;
  std::vector<uint32_t> newest_packets_, newest_pieces_;  // by slot, and by slot and piece
  // All messages are posted to this rail until its message of number `pinned_until_` has arrived.
  Rail* pinned_ = nullptr;
  uint64_t pinned_until_ = 0;
  uint32_t last_posted_ = 0;
};

}  // namespace spark::verbs
