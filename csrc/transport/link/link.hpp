// The verbs transport: all rails to the peer, and what keeps messages going when one of them fails.
//
// Data goes only over rails that have carried an announcement as large as the largest packet since they were
// connected, at both ends. A rail that fails is connected anew while callers and kernels go on waiting: what
// it may have lost is still in this rank's send slots, and goes again. Both ranks announce the state of their
// rails to each other, over every rail that works and out of band (docs/protocol.md, "Link recovery").
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../../support/backoff.hpp"
#include "../../support/shared_memory.hpp"
#include "../transport.hpp"
#include "announcements.hpp"
#include "hold_down.hpp"
#include "rail.hpp"

namespace spark::verbs {

struct LinkOptions {
  std::chrono::nanoseconds timeout{std::chrono::seconds(30)};  // without any rail, before both ranks stop
  WireClass wire_class;
  HoldDownTimes hold_down;  // of rails that fail soon after they came up
};

// What a rail does, for people and tests.
enum class RailCondition : uint32_t {
  kDown,      // it has no connection, and waits for its port, its peer or the next attempt
  kHeldDown,  // it has failed soon after it came up, and is left alone for a while
  kUnproven,  // it is connected, but no full-size message has been acknowledged at both ends
  kOpen,      // data goes over it
};
constexpr const char* kRailConditions[] = {"down", "held down", "unproven", "open"};

// For people and tests: relaxed words of different moments.
struct LinkCounters {
  std::atomic<uint64_t> rails_up{0};  // that are open
  std::atomic<uint64_t> rail_failures{0};
  std::atomic<uint64_t> rail_recoveries{0};
  std::atomic<uint64_t> rail_proof_failures{0};  // connections that failed before data went over them
  std::atomic<uint64_t> reposts{0};
  std::atomic<uint64_t> posts[kMaxRails] = {};
  std::atomic<RailCondition> conditions[kMaxRails] = {};
  std::atomic<bool> lost{false};  // no rail is open now
};

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
  bool progress() override;
  void attend() override;
  void finish() override;

  // From any thread:

  // Tells the peer that this rank stops. The first reason counts.
  void tell(const std::string& reason) { bulletin_.tell(reason); }
  // What the peer says and hears out of band, and sentences for people.
  Bulletin& bulletin() { return bulletin_; }
  const LinkCounters& counters() const { return counters_; }
  size_t rails() const { return rails_.size(); }
  // "verbs on rail 0 (mlx5_0) and rail 1 (mlx5_1)"
  const std::string& path() const { return path_; }
  // Test hook: the rail's queue pair fails, as after an error of the wire.
  void break_rail(uint32_t rail) { to_break_.store(static_cast<int>(rail), std::memory_order_relaxed); }

 private:
  // The proxy's thread alone uses these.
  Rail* choose();
  bool send(Rail& rail, const Write& write, bool signal);
  void send_waiting();
  uint32_t& newest(const Write& write);
  bool peer_has_ended_failed_rails() const;
  void poll(Rail& rail);
  // This rank has found that a connection is broken; the next one has the next epoch.
  void fail(Rail& rail, const std::string& why);
  // The peer has said that its end of a connection is broken, and that the next one has number `epoch`.
  void follow(Rail& rail, uint32_t epoch);
  // An attempt to offer or to connect a rail, which began at `begun`, has failed.
  void cannot_connect(Rail& rail, const std::string& why, Clock::time_point begun);
  void end_connection(Rail& rail, const std::string& why, uint32_t epoch);

  void listen();
  void read_events();
  void connect_anew(Rail& rail, Clock::time_point now);
  void open_if_proven(Rail& rail, Clock::time_point now);
  void judge(Clock::time_point now);
  void stop(const std::string& reason);
  void announce();
  void settle(Clock::time_point end);
  LinkState state() const;
  std::string loss() const;
  std::string problems() const;
  // When a rail is tried again, for a sentence in the log; `held` is its hold-down now.
  std::string next_attempts(std::chrono::nanoseconds held) const;
  // No rail is open. Relaxed: this thread is the one that writes the counter.
  bool alone() const { return counters_.rails_up.load(std::memory_order_relaxed) == 0; }
  std::string name(const Rail& rail) const { return rail.name() + " to " + peer_name_; }

  // What is known of a rail beyond its connection.
  struct Record {
    std::string problem;  // the last reason for which it was not open; empty: none since it was open last
    HoldDown hold_down;
    Clock::time_point next_try{};      // not before that, whatever the hold-down is
    Clock::time_point proof_due{};     // while it is up and not proven
    Clock::time_point closed_since{};  // while it is not open
    bool failed = false;               // it was open before, and its failure has been counted
    bool reported = false;             // it has been reported that it cannot be connected, or carries no data
  };

  LinkOptions options_;
  RegionLayout layout_;
  Bulletin bulletin_;
  BackgroundRelease release_;
  std::vector<std::unique_ptr<Rail>> rails_;
  std::vector<Record> records_;  // by rail
  std::string path_, peer_name_, rank_name_;
  std::function<void(const std::string&)> stop_;
  LinkCounters counters_;

  // Messages that no rail has taken yet; while `repeating_`, it begins with some that were sent before.
  std::deque<Write> waiting_;
  bool repeating_ = false;
  // The last sequences posted, by slot, and by slot and piece.
  std::vector<uint32_t> newest_packets_, newest_pieces_;
  Rail* pinned_ = nullptr;     // which everything takes until its message
  uint64_t pinned_until_ = 0;  // of this number has arrived
  uint32_t last_posted_ = 0;

  bool stopped_ = false;  // the peer has stopped, or is given up
  Clock::time_point next_look_{}, lost_since_{};
  bool begun_ = false;          // the peer has connected its rails too
  bool worked_ = false;         // a rail has been open
  bool loss_reported_ = false;  // it has been reported that no rail is open now
  std::atomic<int> to_break_{-1};
};

}  // namespace spark::verbs
