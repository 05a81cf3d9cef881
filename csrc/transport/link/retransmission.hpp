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

  // Posts a staged message, or queues it if it must wait. `flush` hands it to its rail's device.
  void post(const Write& write);
  void flush();
  // Posts queued messages, as far as rails take them, and flushes them.
  void post_queued();
  bool empty() const { return queue_.empty(); }

  size_t requeue(const Rail& rail, const std::vector<Write>& lost) override;
  uint32_t last_posted() const override { return last_posted_; }

 private:
  // The rail for the next message; null if there is none. The open rail that was given the fewest bytes, so
  // that none is ahead of another by more than the largest message. Not the one that has the fewest messages
  // unacknowledged: acknowledgements are requested for some messages only, and the rail that has just had one
  // would take all messages until its next one.
  Rail* choose();
  // False if the rail has no room, and the message must wait.
  bool post_to(Rail& rail, const Write& write, bool signal);
  // The last sequence number posted with the slot of `write`, and for payload with its piece too. The parts
  // of a message's packets have one: that its slot is used again means that all of them have arrived.
  uint32_t& newest(const Write& write);
  uint64_t& bytes_ahead(const Rail& rail) { return bytes_ahead_[rail.index()]; }

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
  std::vector<uint64_t> bytes_ahead_;  // by rail: given to it, beyond the one that was given the fewest
  uint32_t last_posted_ = 0;
};

}  // namespace spark::verbs
