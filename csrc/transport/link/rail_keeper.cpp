#include "rail_keeper.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../../support/errors.hpp"
#include "../../support/text.hpp"

namespace spark::verbs {
namespace {

// A port that is down is checked this often.
constexpr auto kPortInterval = std::chrono::milliseconds(100);
// A failing attempt to connect may take a second of this thread's time (the kernel resolves the peer's
// address), and another rail may be coming up meanwhile. The next attempt starts this many times as long
// after the end of the one before as that one took, at the earliest.
constexpr int kRestAfterAttempt = 4;
constexpr const char* kOtherEndFailed = "its other end failed";
// A rail that is up must be proven within this time, and one that is open must complete a write in this time.
// Longer if a NIC's retransmissions of a packet may take longer, whose failure ends the wait earlier and with
// the reason: the limit is for a device, or a driver, that hangs and completes nothing.
constexpr auto kDeviceTime = std::chrono::seconds(10);
// How long a new link may be without an open rail before that is reported: a proof takes milliseconds.
constexpr auto kStartTime = std::chrono::seconds(1);

}  // namespace

RailKeeper::RailKeeper(const LinkOptions& options, std::byte* memory, const RegionSizes& sizes,
                       const std::vector<RailAddress>& rails, const std::string& rank_name,
                       Announcements& announcements, LinkCounters& counters, LostMessages& lost_messages)
    : options_(options),
      announcements_(announcements),
      counters_(counters),
      lost_messages_(lost_messages),
      records_(rails.size(), Record{{}, HoldDown(options.hold_down)}),
      rank_name_(rank_name) {
  if (rails.empty() || rails.size() > kMaxRails) {
    throw UsageError(std::to_string(rails.size()) + " rails are not possible; a link has 1 to " +
                     std::to_string(kMaxRails));
  }
  for (uint32_t index = 0; index < rails.size(); ++index) {
    rails_.push_back(std::make_unique<Rail>(index, rails[index], options.open_device(rails[index]), memory,
                                            sizes, options.path_options, release_));
  }
  counters_.lost.store(true, std::memory_order_relaxed);  // until a rail is proven
}

std::chrono::nanoseconds RailKeeper::device_time() const {
  return options_.path_options.beyond_failure(kDeviceTime);
}

LinkState RailKeeper::state() const {
  LinkState state{};
  state.rail_count = static_cast<uint32_t>(rails_.size());
  for (auto& rail : rails_) state.rails[rail->index()] = rail->state();
  return state;
}

void RailKeeper::offer() {
  for (auto& rail : rails_) rail->offer();
}

void RailKeeper::connect(const std::string& peer_name) {
  peer_name_ = peer_name;
  bool any = false;
  for (auto& rail : rails_) {
    Clock::time_point begun = Clock::now();
    try {
      rail->connect(peer_state(*rail));
    } catch (const CollectiveError& error) {
      // The rails that work are enough to start with; this one is tried again once the proxy runs.
      connecting_failed(*rail, error.what(), begun);
      continue;
    }
    rail->mark_up();  // nothing is sent before both ranks have exchanged that they are connected
    any = true;
  }
  if (any) return;
  throw CollectiveError(rank_name_ + " has no link to " + peer_name_ + ": no rail can be connected (" +
                        problems() + "); see cables and addresses with vllm-spark doctor --peer");
}

void RailKeeper::poll(Rail& rail) {
  Phase before = rail.phase();
  if (std::optional<std::string> problem = rail.poll()) {
    fail(rail, *problem);
  } else if (rail.phase() != before) {
    announcements_.request();  // the peer may send data only after it has read that
  }
}

void RailKeeper::fail(Rail& rail, const std::string& why) {
  record(rail).problem = why;
  end_connection(rail, why, rail.epoch() + 1);
}

void RailKeeper::fail_to_post(Rail& rail, int error) {
  fail(rail, std::string("it takes no message (") + std::strerror(error) + ")");
}

void RailKeeper::fail_after_peer(Rail& rail, uint32_t epoch) {
  // A problem that this rank has found itself since the rail was open is more specific.
  std::string& problem = record(rail).problem;
  if (problem.empty()) problem = kOtherEndFailed;
  end_connection(rail, kOtherEndFailed, epoch);
}

bool RailKeeper::peer_has_ended_failed_connections() const {
  return std::all_of(rails_.begin(), rails_.end(), [this](auto& rail) {
    return static_cast<int32_t>(peer_state(*rail).epoch - rail->epoch()) >= 0;
  });
}

void RailKeeper::connecting_failed(Rail& rail, const std::string& why, Clock::time_point begun) {
  Record& record = this->record(rail);
  // A queue pair that was connected in part cannot be connected again: another one can.
  if (rail.phase() == Phase::kOffered) fail(rail, why);
  record.problem = why;
  Clock::time_point now = Clock::now();
  record.next_try = now + kRestAfterAttempt * (now - begun);
  std::chrono::nanoseconds held = record.hold_down.failed(now, counters_.no_open_rail());
  if (record.reported) return;
  record.reported = true;
  announcements_.log(name(rail) + " cannot be connected: " + why + "; " + next_attempts(held));
}

void RailKeeper::end_connection(Rail& rail, const std::string& why, uint32_t epoch) {
  Record& record = this->record(rail);
  bool connected = rail.up(), was_open = rail.open(), proven = rail.phase() == Phase::kProven;
  size_t again = lost_messages_.requeue(rail, rail.fail(epoch));
  announcements_.request();
  if (!connected) return;
  if (was_open) counters_.rails_up.fetch_sub(1, std::memory_order_relaxed);
  if (!reporting_) return;
  Clock::time_point now = Clock::now();
  std::chrono::nanoseconds held = record.hold_down.failed(now, counters_.no_open_rail());
  if (was_open) {
    record.failed = true;
    record.closed_since = now;
    counters_.rail_failures.fetch_add(1, std::memory_order_relaxed);
    std::string sentence = name(rail) + " failed: " + why + "; " + std::to_string(again) +
                           " messages go again, the last one posted is " +
                           std::to_string(lost_messages_.last_posted());
    if (held > held.zero()) {
      sentence += "; it had worked for less than " + seconds_text(options_.hold_down.steady) +
                  ", so while another rail works it is held down for " + seconds_text(held);
    }
    announcements_.log(sentence);
    return;
  }
  counters_.rail_proof_failures.fetch_add(1, std::memory_order_relaxed);
  if (record.reported) return;
  record.reported = true;  // most attempts after this one will end in the same way
  announcements_.log(name(rail) + " is connected, but carries no data: no message of " +
                     std::to_string(kProofBytes) + " bytes was acknowledged to " +
                     (proven ? peer_name_ : rank_name_) + " (" + why + "); " + next_attempts(held));
}

std::string RailKeeper::next_attempts(std::chrono::nanoseconds held) const {
  return "while another rail works, it is tried again after " + seconds_text(held) +
         ", and then less often, up to every " + seconds_text(options_.hold_down.longest);
}

std::optional<std::string> RailKeeper::maintain(Clock::time_point now) {
  if (!begun_) {
    begun_ = true;
    lost_since_ = now;
    for (Record& record : records_) {
      record.closed_since = now;
      record.proof_due = now + device_time();
      record.progress = now;
    }
  }
  read_events();
  for (auto& rail : rails_) {
    reconnect(*rail, now);
    open_if_proven(*rail, now);
  }
  update_conditions(now);
  return check_loss(now);
}

void RailKeeper::read_events() {
  for (auto& rail : rails_) {
    for (DeviceEvent event; rail->device().next_event(event);) {
      // Each rail has opened its device for itself, but receives the events of all of its ports, and of
      // connections that are being released.
      bool concerned = event.queue_pair != nullptr ? rail->owns(event.queue_pair)
                                                   : event.port == 0 || event.port == rail->port();
      if (event.fatal && concerned && rail->phase() != Phase::kDown) fail(*rail, event.text);
    }
  }
  int broken = to_break_.exchange(-1, std::memory_order_relaxed);
  if (broken >= 0 && rails_[static_cast<size_t>(broken)]->up()) {
    rails_[static_cast<size_t>(broken)]->break_down();
  }
}

void RailKeeper::check_proof_time(Rail& rail, Clock::time_point now) {
  if (rail.phase() != Phase::kUp || now <= record(rail).proof_due) return;
  poll(rail);  // what arrived while this process did not run counts
  if (rail.phase() != Phase::kUp) return;
  fail(rail, "the device completed nothing within " + seconds_text(device_time()));
}

void RailKeeper::check_completions(Rail& rail, Clock::time_point now) {
  if (rail.phase() != Phase::kProven) return;
  Record& record = this->record(rail);
  if (rail.queued() == 0 || rail.completed() != record.completed) {
    record.completed = rail.completed();
    record.progress = now;
    return;
  }
  std::chrono::nanoseconds silence = now - record.progress;
  if (silence <= device_time()) return;
  poll(rail);  // what arrived while this process did not run counts
  if (rail.phase() != Phase::kProven || rail.completed() != record.completed) return;
  fail(rail, "the device completed nothing within " + seconds_text(silence));
}

void RailKeeper::reconnect(Rail& rail, Clock::time_point now) {
  // Both ends take part in every connection: if one has failed, the other one has too, even if it has
  // not detected that.
  uint32_t peer_epoch = peer_state(rail).epoch;
  if (static_cast<int32_t>(peer_epoch - rail.epoch()) > 0) fail_after_peer(rail, peer_epoch);
  check_proof_time(rail, now);
  check_completions(rail, now);
  if (rail.up()) return;
  Record& record = this->record(rail);
  // Only a new offer is held down. A rail that has been offered is connected when the peer has offered it
  // too, even if another rail has opened since, which makes the hold-down longer.
  if (rail.phase() == Phase::kDown &&
      (now < record.next_try || record.hold_down.holds(now, counters_.no_open_rail()))) {
    return;
  }
  Clock::time_point begun = Clock::now();  // not `now`: other rails may have been tried since
  try {
    offer_or_connect(rail, now);
  } catch (const CollectiveError& error) {
    connecting_failed(rail, error.what(), begun);
    return;
  }
  const RailState& peer = peer_state(rail);
  if (rail.phase() != Phase::kReady || peer.epoch != rail.epoch() || peer.phase < Phase::kReady) return;
  rail.mark_up();
  record.progress = Clock::now();
  record.completed = 0;
  record.proof_due = record.progress + device_time();
  announcements_.request();  // and this announcement is what proves the connection
}

void RailKeeper::offer_or_connect(Rail& rail, Clock::time_point now) {
  if (rail.phase() == Phase::kDown) {
    if (!rail.device().port_active(rail.port())) {
      record(rail).problem = "its port is down";
      record(rail).next_try = now + kPortInterval;
      return;
    }
    rail.offer();
    announcements_.request();
  }
  const RailState& peer = peer_state(rail);
  if (rail.phase() == Phase::kOffered && peer.epoch == rail.epoch() && peer.phase >= Phase::kOffered) {
    rail.connect(peer);
    announcements_.request();
  }
}

// Data may be sent over a rail once both ends have proven it: a path can lose what one end sends and carry
// what the other one does.
void RailKeeper::open_if_proven(Rail& rail, Clock::time_point now) {
  const RailState& peer = peer_state(rail);
  if (rail.open() || rail.phase() != Phase::kProven) return;
  if (peer.epoch != rail.epoch() || peer.phase < Phase::kProven) return;
  rail.open_for_data();
  opened_ = true;
  Record& record = this->record(rail);
  record.hold_down.opened(now);
  counters_.rails_up.fetch_add(1, std::memory_order_relaxed);
  std::string after = ", after " + seconds_text(now - record.closed_since);
  if (record.failed) {
    counters_.rail_recoveries.fetch_add(1, std::memory_order_relaxed);
    announcements_.log(name(rail) + " works again" + after);
  } else if (record.reported || loss_reported_) {
    announcements_.log(name(rail) + " carries data now" + after);
  }
  record.failed = record.reported = false;
  record.problem.clear();
}

void RailKeeper::update_conditions(Clock::time_point now) {
  for (auto& rail : rails_) {
    bool held = rail->phase() == Phase::kDown && record(*rail).hold_down.holds(now, counters_.no_open_rail());
    counters_.conditions[rail->index()].store(rail->open() ? RailCondition::kOpen
                                              : rail->up() ? RailCondition::kUnproven
                                              : held       ? RailCondition::kHeldDown
                                                           : RailCondition::kDown,
                                              std::memory_order_relaxed);
  }
}

std::optional<std::string> RailKeeper::check_loss(Clock::time_point now) {
  bool lost = counters_.no_open_rail();
  if (lost != counters_.lost.exchange(lost, std::memory_order_relaxed)) lost_since_ = now;
  if (!lost) {
    loss_reported_ = false;
    return std::nullopt;
  }
  if (!loss_reported_ && (opened_ || now - lost_since_ > kStartTime)) {
    loss_reported_ = true;
    announcements_.log("no rail to " + peer_name_ + (opened_ ? " works" : " carries data yet") +
                       "; everything waits for one, up to " + seconds_text(options_.timeout));
  }
  if (now - lost_since_ <= options_.timeout) return std::nullopt;
  return loss_text();
}

std::string RailKeeper::loss_text() const {
  std::string within = " within " + seconds_text(options_.timeout) + " (";
  std::string text =
      rank_name_ + (opened_ ? " lost its link to " + peer_name_ + ": no rail came back" + within
                            : " has no link to " + peer_name_ + ": no rail has carried a message of " +
                                  std::to_string(kProofBytes) + " bytes" + within);
  text += problems();
  if (!opened_) return text + "); see cables, addresses and MTU with vllm-spark doctor --peer";
  return text + "); the last message posted is " + std::to_string(lost_messages_.last_posted()) +
         "; see the cable and the other machine";
}

std::string RailKeeper::problems() const {
  std::string text;
  for (auto& rail : rails_) {
    const std::string& problem = records_[rail->index()].problem;
    text += (rail->index() == 0 ? "" : "; ") + rail->name() + ": " +
            (problem.empty() ? "no answer yet" : problem);
  }
  return text;
}

}  // namespace spark::verbs
