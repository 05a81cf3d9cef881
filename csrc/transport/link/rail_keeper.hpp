// Keeps the rails of a link connected: detects that one has failed, holds it down, reconnects it, and opens
// it for data once both ends have proven it (docs/protocol.md, "Link recovery").
//
// Driven by the proxy's thread alone.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "announcements.hpp"
#include "hold_down.hpp"
#include "link_status.hpp"
#include "rail.hpp"

namespace spark::verbs {

struct LinkOptions {
  // Opens the device of a rail. Throws CollectiveError.
  std::function<std::shared_ptr<const Device>(const RailAddress&)> open_device = [](const RailAddress& rail) {
    return std::make_shared<const Device>(rail.device);
  };
  std::chrono::nanoseconds timeout{std::chrono::seconds(30)};  // without an open rail, before both ranks stop
  PathOptions path_options;
  HoldDownTimes hold_down;  // of rails that fail soon after they came up
};

// Receives the messages that a failed rail may have lost.
class LostMessages {
 public:
  virtual ~LostMessages() = default;
  // `lost`: in order, posted to `rail` and not acknowledged. Returns how many of them will be sent again.
  virtual size_t requeue(const Rail& rail, const std::vector<Write>& lost) = 0;
  // Sequence number of the last message posted, for reports.
  virtual uint32_t last_posted() const = 0;
};

class RailKeeper {
 public:
  // Opens every rail of the rank named `rank_name`. Throws UsageError or CollectiveError. The references must
  // outlive it.
  RailKeeper(const LinkOptions& options, std::byte* memory, const RegionSizes& sizes,
             const std::vector<RailAddress>& rails, const std::string& rank_name,
             Announcements& announcements, LinkCounters& counters, LostMessages& lost_messages);

  const std::vector<std::unique_ptr<Rail>>& rails() const { return rails_; }
  // What this rank announces of its rails.
  LinkState state() const;

  // Offers every rail. Throws CollectiveError.
  void offer();
  // Connects every rail to what the peer has offered. A rail that cannot be connected is tried again later.
  // Throws CollectiveError if not one rail can be connected.
  void connect(const std::string& peer_name);

  // Takes the completions of a rail that is up.
  void poll(Rail& rail);
  // This rank has found that a rail's connection has failed; the next one has the next epoch.
  void fail(Rail& rail, const std::string& why);
  // The same for a rail whose device refuses a message with this error number.
  void fail_to_post(Rail& rail, int error);
  // True if no packet of a failed connection can arrive at the peer any more.
  bool peer_has_ended_failed_connections() const;

  // Checks for failures, connects and opens rails. Not empty: no rail was open within the time-out, in a
  // sentence.
  std::optional<std::string> maintain(Clock::time_point now);
  // From here on failures of rails are expected, and not reported.
  void stop_reporting() { reporting_ = false; }
  // Test hook: the rail's queue pair fails, as after an error of the wire. From any thread.
  void break_rail(uint32_t rail) { to_break_.store(static_cast<int>(rail), std::memory_order_relaxed); }

 private:
  // What is known of a rail beyond its connection.
  struct Record {
    std::string problem;  // the last reason for which it was not open; empty: none since it was open last
    HoldDown hold_down;
    Clock::time_point next_try{};      // not before that, whatever the hold-down is
    Clock::time_point proof_due{};     // while it is up and not proven
    Clock::time_point progress{};      // when a write was completed last, or none was under way
    uint64_t completed = 0;            // writes, then
    Clock::time_point closed_since{};  // while it is not open
    bool failed = false;               // it was open before, and its failure has been counted
    bool reported = false;             // it has been reported that it cannot be connected, or carries no data
  };

  Record& record(const Rail& rail) { return records_[rail.index()]; }
  const RailState& peer_state(const Rail& rail) const { return announcements_.peer().rails[rail.index()]; }
  // The peer has announced that its end of a connection has failed, and that the next one has number `epoch`.
  void fail_after_peer(Rail& rail, uint32_t epoch);
  void end_connection(Rail& rail, const std::string& why, uint32_t epoch);
  // An attempt to offer or to connect a rail, which began at `begun`, has failed.
  void connecting_failed(Rail& rail, const std::string& why, Clock::time_point begun);

  void read_events();
  void check_proof_time(Rail& rail, Clock::time_point now);
  void check_completions(Rail& rail, Clock::time_point now);
  void reconnect(Rail& rail, Clock::time_point now);
  void offer_or_connect(Rail& rail, Clock::time_point now);
  void open_if_proven(Rail& rail, Clock::time_point now);
  void update_conditions(Clock::time_point now);
  // Maximum time in which a device must complete something.
  std::chrono::nanoseconds device_time() const;
  std::optional<std::string> check_loss(Clock::time_point now);
  std::string loss_text() const;
  std::string problems() const;
  // When a rail is tried again, for a report; `held` is its hold-down now.
  std::string next_attempts(std::chrono::nanoseconds held) const;
  std::string name(const Rail& rail) const { return rail.name() + " to " + peer_name_; }

  LinkOptions options_;
  Announcements& announcements_;
  LinkCounters& counters_;
  LostMessages& lost_messages_;
  BackgroundRelease release_;
  std::vector<std::unique_ptr<Rail>> rails_;
  std::vector<Record> records_;  // by rail
  std::string rank_name_, peer_name_;

  Clock::time_point lost_since_{};
  bool begun_ = false;          // the peer has connected its rails too
  bool opened_ = false;         // a rail has been open
  bool loss_reported_ = false;  // it has been reported that no rail is open now
  bool reporting_ = true;
  std::atomic<int> to_break_{-1};
};

}  // namespace spark::verbs
