#include "retransmission.hpp"

namespace spark::verbs {

Retransmission::Retransmission(RailKeeper& keeper, LinkCounters& counters, const RegionSizes& sizes)
    : keeper_(keeper),
      counters_(counters),
      layout_(sizes),
      newest_packets_(sizes.slots),
      newest_pieces_(sizes.slots * kMaxPieces),
      bytes_ahead_(kMaxRails) {}

void Retransmission::post(const Write& write) {
  newest(write) = last_posted_ = write.sequence;
  if (queue_.empty()) {
    Rail* rail = choose();
    if (rail != nullptr && post_to(*rail, write, false)) return;
  }
  queue_.push_back(write);
}

uint32_t& Retransmission::newest(const Write& write) {
  uint32_t slot = layout_.slot(write.sequence);
  if (write.descriptor.protocol == Protocol::kPackets) return newest_packets_[slot];
  return newest_pieces_[slot * kMaxPieces + write.descriptor.piece];
}

Rail* Retransmission::choose() {
  // Until a retransmitted message has arrived, all messages follow it on the same rail: on another one, the
  // next message of the same slot could arrive first, and be overwritten.
  if (pinned_ != nullptr) {
    if (pinned_->completed() < pinned_until_) return pinned_;
    pinned_ = nullptr;
  }
  Rail* best = nullptr;
  for (auto& rail : keeper_.rails()) {
    if (rail->open() && (best == nullptr || bytes_ahead(*rail) < bytes_ahead(*best))) best = rail.get();
  }
  if (best == nullptr || bytes_ahead(*best) == 0) return best;
  uint64_t least = bytes_ahead(*best);
  for (auto& rail : keeper_.rails()) {
    if (rail->open()) bytes_ahead(*rail) -= least;
  }
  return best;
}

bool Retransmission::post_to(Rail& rail, const Write& write, bool signal) {
  if (!rail.has_room()) {
    keeper_.poll(rail);
    if (!rail.open() || !rail.has_room()) return false;
  }
  counters_.posts[rail.index()].fetch_add(1, std::memory_order_relaxed);
  counters_.bytes[rail.index()].fetch_add(write.descriptor.bytes, std::memory_order_relaxed);
  bytes_ahead(rail) += write.descriptor.bytes + sizeof(Flag::value);
  int error = rail.post(write, signal);
  if (error != 0) keeper_.fail_to_post(rail, error);  // which calls `requeue` with this message
  return true;
}

void Retransmission::post_queued() {
  while (!queue_.empty()) {
    // Packets that the NIC of a failed connection still sends must not arrive after the retransmission. Once
    // the peer has ended its end of that connection, they cannot. Checked before each message: the one before
    // may have found that another rail has failed.
    if (retransmitting_ && !keeper_.peer_has_ended_failed_connections()) return flush();
    Write write = queue_.front();
    if (newest(write) != write.sequence) {  // its slot has been used again: it had arrived
      queue_.pop_front();
      continue;
    }
    Rail* rail = choose();
    if (rail == nullptr) return flush();
    queue_.pop_front();  // first: a rail that fails puts it back
    if (retransmitting_) {
      pinned_ = rail;
      pinned_until_ = rail->posted() + 1;
    }
    if (!post_to(*rail, write, queue_.empty())) {
      queue_.push_front(write);
      return flush();
    }
  }
  retransmitting_ = false;
  flush();
}

void Retransmission::flush() {
  for (auto& rail : keeper_.rails()) {
    if (!rail->chained()) continue;
    counters_.doorbells[rail->index()].fetch_add(1, std::memory_order_relaxed);
    int error = rail->flush();
    if (error != 0) keeper_.fail_to_post(*rail, error);  // which calls `requeue` with what it posted
  }
}

size_t Retransmission::requeue(const Rail& rail, const std::vector<Write>& lost) {
  if (pinned_ == &rail) pinned_ = nullptr;
  size_t again = 0;
  for (auto write = lost.rbegin(); write != lost.rend(); ++write) {
    if (newest(*write) != write->sequence) continue;  // its slot has been used again: it had arrived
    queue_.push_front(*write);
    ++again;
  }
  if (again > 0) retransmitting_ = true;
  counters_.reposts.fetch_add(again, std::memory_order_relaxed);
  return again;
}

}  // namespace spark::verbs
