// The verbs transport: all rails to the peer.
//
// Data is sent only over rails that have carried an announcement as large as the largest packet since they
// were connected, at both ends. A rail that fails is reconnected (rail_keeper.hpp) while callers and kernels
// go on waiting: what it may have lost is sent again (retransmission.hpp). Both ranks announce the state of
// their rails to each other, over every rail that works and out of band (announcements.hpp).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../transport.hpp"
#include "announcements.hpp"
#include "link_status.hpp"
#include "rail_keeper.hpp"
#include "retransmission.hpp"

namespace spark::verbs {

class Link final : public Transport {
 public:
  // Opens every rail. Throws CollectiveError.
  Link(const LinkOptions& options, std::byte* memory, const RegionSizes& sizes,
       const std::vector<RailAddress>& rails, int rank);

  // What the peer must know to connect: a LinkState.
  std::string offer();
  // Connects every rail to what the peer offered; once both ranks have, the proxy may start. A rail that
  // cannot be connected is tried again later. `stop` is called, from the proxy's thread, when the peer stops
  // or cannot be reached any more. Throws CollectiveError if not one rail can be connected.
  void connect(const std::string& peer_offer, const std::string& peer_name,
               std::function<void(const std::string&)> stop);

  void post(uint32_t sequence, const SendDescriptor& descriptor) override;
  void flush() override { retransmission_.flush(); }
  bool progress() override;
  void maintain() override;
  void finish() override;

  // From any thread:

  // Tells the peer that this rank stops. The first reason counts.
  void announce_stop(const std::string& reason) { announcements_.stop(reason); }
  // Both ranks' announcements, and the log.
  Announcements& announcements() { return announcements_; }
  const LinkCounters& counters() const { return counters_; }
  size_t rails() const { return keeper_.rails().size(); }
  // "verbs on rail 0 (mlx5_0) and rail 1 (mlx5_1)"
  const std::string& path() const { return path_; }
  // Test hook: the rail's queue pair fails, as after an error of the wire.
  void break_rail(uint32_t rail) { keeper_.break_rail(rail); }

 private:
  // The proxy's thread alone calls these.
  // Takes completions, of all rails or of those that are not open yet.
  void poll(bool all);
  void read_announcements();
  void announce();
  void stop(const std::string& reason);
  // Waits, at most until `end`, until every message posted has arrived, and an announcement after it.
  void drain(Clock::time_point end);
  bool messages_under_way() const;

  std::chrono::nanoseconds finish_time_;
  std::string rank_name_, path_;
  Announcements announcements_;
  LinkCounters counters_;
  Retransmission retransmission_;  // before the keeper, which uses it as a LostMessages
  RailKeeper keeper_;
  std::function<void(const std::string&)> stop_;

  bool stopped_ = false;  // the peer has stopped, or is given up
  Clock::time_point next_check_{};
  uint32_t turns_ = 0;
};

}  // namespace spark::verbs
