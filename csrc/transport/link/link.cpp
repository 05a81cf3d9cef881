#include "link.hpp"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "../../support/errors.hpp"
#include "../../support/text.hpp"

namespace spark::verbs {
namespace {

constexpr auto kLookInterval = std::chrono::milliseconds(1);
// A port that is down is looked at this often.
constexpr auto kPortInterval = std::chrono::milliseconds(100);
// Connecting in vain may take a second of this thread's time (the kernel looks for the peer's address), and
// another rail may be coming up meanwhile. The next attempt starts this many times as long after the end of
// the one before as that one took, at the earliest.
constexpr int kRestAfterAttempt = 4;
constexpr const char* kOtherEndFailed = "its other end failed";
// A rail that is up must be proven within this time. Longer than a NIC takes to repeat a packet in vain,
// which ends the wait earlier and says why: this one is for a device that completes nothing.
constexpr auto kProofTime = std::chrono::seconds(10);
// How long a fresh link may be without an open rail before that is reported: a proof takes milliseconds.
constexpr auto kStartTime = std::chrono::seconds(1);
// A rail may fail under the last message, and it takes a few seconds to notice.
constexpr auto kFarewellTime = std::chrono::seconds(5);

}  // namespace

Link::Link(const LinkOptions& options, std::byte* memory, const RegionSizes& sizes,
           const std::vector<RailAddress>& rails, int rank)
    : options_(options),
      layout_(sizes),
      bulletin_(memory, layout_),
      records_(rails.size(), Record{{}, HoldDown(options.hold_down)}),
      rank_name_("rank " + std::to_string(rank)),
      newest_packets_(sizes.slots),
      newest_pieces_(sizes.slots * kMaxPieces) {
  if (rails.empty() || rails.size() > kMaxRails) {
    throw UsageError(std::to_string(rails.size()) + " rails are not possible; a link has 1 to " +
                     std::to_string(kMaxRails));
  }
  for (uint32_t index = 0; index < rails.size(); ++index) {
    rails_.push_back(
        std::make_unique<Rail>(index, rails[index], memory, sizes, options.wire_class, release_));
    path_ += (index == 0 ? "verbs on " : " and ") + rails_.back()->name();
  }
  counters_.lost.store(true, std::memory_order_relaxed);  // until a rail is proven
}

std::string Link::offer() {
  for (auto& rail : rails_) rail->offer();
  LinkState state = this->state();
  return bulletin_.sign(state);
}

void Link::connect(const std::string& peer_offer, const std::string& peer_name,
                   std::function<void(const std::string&)> stop) {
  if (!bulletin_.begin(peer_offer)) {
    throw CollectiveError(peer_name +
                          " sent no valid description of its rails; use the same version on both");
  }
  if (bulletin_.theirs().rail_count != rails_.size()) {
    throw CollectiveError(peer_name + " has " + std::to_string(bulletin_.theirs().rail_count) +
                          " rails where this rank has " + std::to_string(rails_.size()) +
                          "; use the same version on both");
  }
  peer_name_ = peer_name;
  stop_ = std::move(stop);
  bool any = false;
  for (auto& rail : rails_) {
    Clock::time_point begun = Clock::now();
    try {
      rail->connect(bulletin_.theirs().rails[rail->index()]);
    } catch (const CollectiveError& error) {
      // The rails that work are enough to start with; this one is tried again once the proxy runs.
      cannot_connect(*rail, error.what(), begun);
      continue;
    }
    rail->mark_up();  // nothing is sent before both ranks have told each other that they have come this far
    any = true;
  }
  if (any) return;
  throw CollectiveError(rank_name_ + " has no link to " + peer_name_ + ": no rail can be connected (" +
                        problems() + "); see cables and addresses with vllm-spark doctor --peer");
}

void Link::post(uint32_t sequence, const SendDescriptor& descriptor) {
  if (stopped_) return;
  Write write{sequence, descriptor};
  newest(write) = last_posted_ = sequence;
  if (waiting_.empty()) {
    Rail* rail = choose();
    if (rail != nullptr && send(*rail, write, false)) return;
  }
  waiting_.push_back(write);
}

uint32_t& Link::newest(const Write& write) {
  uint32_t slot = layout_.slot(write.sequence);
  if (write.descriptor.protocol == Protocol::kPackets) return newest_packets_[slot];
  return newest_pieces_[slot * kMaxPieces + write.descriptor.piece];
}

Rail* Link::choose() {
  // Until what was sent twice has arrived, everything follows it on the same rail: on another, the next
  // message of the same slot could arrive first, and be overwritten.
  if (pinned_ != nullptr) {
    if (pinned_->completed() < pinned_until_) return pinned_;
    pinned_ = nullptr;
  }
  Rail* best = nullptr;
  for (auto& rail : rails_) {
    if (rail->open() && (best == nullptr || rail->queued() < best->queued())) best = rail.get();
  }
  return best;
}

// False if it must wait.
bool Link::send(Rail& rail, const Write& write, bool signal) {
  if (!rail.has_room()) {
    poll(rail);
    if (!rail.open() || !rail.has_room()) return false;
  }
  counters_.posts[rail.index()].fetch_add(1, std::memory_order_relaxed);
  int error = rail.post(write, signal);
  // `fail` has queued this message for retransmission.
  if (error != 0) fail(rail, std::string("it takes no message (") + std::strerror(error) + ")");
  return true;
}

void Link::send_waiting() {
  while (!waiting_.empty()) {
    // What a failed rail's NIC still has on its way must not arrive after what is sent again. Once the peer
    // has ended its end of that connection, it cannot. Asked before each message: the one before may have
    // found that another rail has failed.
    if (repeating_ && !peer_has_ended_failed_rails()) return;
    Write write = waiting_.front();
    if (newest(write) != write.sequence) {  // its slot has been used again: it had arrived
      waiting_.pop_front();
      continue;
    }
    Rail* rail = choose();
    if (rail == nullptr) return;
    waiting_.pop_front();  // first: a rail that fails puts it back
    if (repeating_) {
      pinned_ = rail;
      pinned_until_ = rail->posted() + 1;
    }
    if (!send(*rail, write, waiting_.empty())) {
      waiting_.push_front(write);
      return;
    }
  }
  repeating_ = false;
}

bool Link::peer_has_ended_failed_rails() const {
  return std::all_of(rails_.begin(), rails_.end(), [this](auto& rail) {
    return static_cast<int32_t>(bulletin_.theirs().rails[rail->index()].epoch - rail->epoch()) >= 0;
  });
}

void Link::poll(Rail& rail) {
  Phase before = rail.phase();
  if (std::optional<std::string> problem = rail.poll()) {
    fail(rail, *problem);
  } else if (rail.phase() != before) {
    bulletin_.change();  // the peer may not send data before it knows
  }
}

void Link::fail(Rail& rail, const std::string& why) {
  records_[rail.index()].problem = why;
  end_connection(rail, why, rail.epoch() + 1);
}

void Link::follow(Rail& rail, uint32_t epoch) {
  // What this rank has found itself since the rail was open says more.
  std::string& problem = records_[rail.index()].problem;
  if (problem.empty()) problem = kOtherEndFailed;
  end_connection(rail, kOtherEndFailed, epoch);
}

void Link::cannot_connect(Rail& rail, const std::string& why, Clock::time_point begun) {
  Record& record = records_[rail.index()];
  // A queue pair that got half way cannot be connected again: another one can.
  if (rail.phase() == Phase::kOffered) fail(rail, why);
  record.problem = why;
  Clock::time_point now = Clock::now();
  record.next_try = now + kRestAfterAttempt * (now - begun);
  std::chrono::nanoseconds held = record.hold_down.failed(now, alone());
  if (record.reported) return;
  record.reported = true;
  bulletin_.note(name(rail) + " cannot be connected: " + why + "; " + next_attempts(held));
}

void Link::end_connection(Rail& rail, const std::string& why, uint32_t epoch) {
  Record& record = records_[rail.index()];
  bool connected = rail.up(), was_open = rail.open(), proven = rail.phase() == Phase::kProven;
  std::vector<Write> lost = rail.fail(epoch);
  if (pinned_ == &rail) pinned_ = nullptr;
  size_t again = 0;
  for (auto write = lost.rbegin(); write != lost.rend(); ++write) {
    // What its slot was used for since says that it had arrived.
    if (newest(*write) != write->sequence) continue;
    waiting_.push_front(*write);
    ++again;
  }
  if (again > 0) repeating_ = true;
  counters_.reposts.fetch_add(again, std::memory_order_relaxed);
  bulletin_.change();
  if (!connected) return;
  if (was_open) counters_.rails_up.fetch_sub(1, std::memory_order_relaxed);
  if (stopped_) return;
  Clock::time_point now = Clock::now();
  std::chrono::nanoseconds held = record.hold_down.failed(now, alone());
  if (was_open) {
    record.failed = true;
    record.closed_since = now;
    counters_.rail_failures.fetch_add(1, std::memory_order_relaxed);
    std::string sentence = name(rail) + " failed: " + why + "; " + std::to_string(again) +
                           " messages go again, the last one posted is " + std::to_string(last_posted_);
    if (held > held.zero()) {
      sentence += "; it had worked for less than " + seconds_text(options_.hold_down.steady) +
                  ", so while another rail works it is held down for " + seconds_text(held);
    }
    bulletin_.note(sentence);
    return;
  }
  counters_.rail_proof_failures.fetch_add(1, std::memory_order_relaxed);
  if (record.reported) return;
  record.reported = true;  // the attempts after this one will mostly end alike
  bulletin_.note(name(rail) + " is connected, but carries no data: no message of " +
                 std::to_string(kProofBytes) + " bytes was acknowledged to " +
                 (proven ? peer_name_ : rank_name_) + " (" + why + "); " + next_attempts(held));
}

std::string Link::next_attempts(std::chrono::nanoseconds held) const {
  return "while another rail works, it is tried again after " + seconds_text(held) +
         ", and then less often, up to every " + seconds_text(options_.hold_down.longest);
}

bool Link::progress() {
  for (auto& rail : rails_) {
    if (rail->up() && rail->queued() > 0) poll(*rail);
  }
  if (!waiting_.empty()) send_waiting();
  if (stopped_) return false;
  // While there is no open rail, one that is up is about to be proven: a proxy that slept would find out only
  // when it wakes, and the first message of either rank waits for both.
  return !waiting_.empty() ||
         (alone() && std::any_of(rails_.begin(), rails_.end(), [](auto& rail) { return rail->up(); }));
}

void Link::attend() {
  Clock::time_point now = Clock::now();
  if (now < next_look_) return;
  next_look_ = now + kLookInterval;
  if (!begun_) {
    begun_ = true;
    lost_since_ = now;
    for (Record& record : records_) {
      record.closed_since = now;
      record.proof_due = now + kProofTime;
    }
  }
  listen();
  if (!stopped_) {
    read_events();
    for (auto& rail : rails_) {
      connect_anew(*rail, now);
      open_if_proven(*rail, now);
    }
    judge(now);
  }
  if (bulletin_.due(now, stopped_)) announce();
}

void Link::listen() {
  bulletin_.read();
  if (bulletin_.theirs().stopped == 0 || stopped_) return;
  stopped_ = true;
  stop_(bulletin_.theirs().reason);
}

void Link::read_events() {
  for (auto& rail : rails_) {
    for (DeviceEvent event; rail->device().next_event(event);) {
      // Each rail has opened its device for itself, but hears of all of its ports, and of connections that
      // are being released.
      bool concerned = event.queue_pair != nullptr ? rail->owns(event.queue_pair)
                                                   : event.port == 0 || event.port == rail->port();
      if (event.fatal && concerned && rail->phase() != Phase::kDown) {
        fail(*rail, event.text);
      }
    }
  }
  int broken = to_break_.exchange(-1, std::memory_order_relaxed);
  if (broken >= 0 && rails_[static_cast<size_t>(broken)]->up()) {
    rails_[static_cast<size_t>(broken)]->break_down();
  }
}

void Link::connect_anew(Rail& rail, Clock::time_point now) {
  Record& record = records_[rail.index()];
  const RailState& peer = bulletin_.theirs().rails[rail.index()];
  // Both ends take part in every connection: if one has failed, the other one has too, whether it knows or
  // not.
  if (static_cast<int32_t>(peer.epoch - rail.epoch()) > 0) follow(rail, peer.epoch);
  if (rail.phase() == Phase::kUp && now > record.proof_due) {
    poll(rail);  // what came while this process did not run counts
    if (rail.phase() == Phase::kUp) {
      fail(rail, "the device completed nothing within " + seconds_text(kProofTime));
    }
  }
  if (rail.up()) return;
  // Only a fresh offer is held down. What has been offered is connected when the peer is there, also if
  // another rail has opened since, and with it the hold-down has become longer.
  if (rail.phase() == Phase::kDown && (now < record.next_try || record.hold_down.holds(now, alone()))) return;
  bool same = peer.epoch == rail.epoch();
  Clock::time_point begun = Clock::now();  // not `now`: other rails may have been tried since
  try {
    if (rail.phase() == Phase::kDown) {
      if (!rail.device().port_active(rail.port())) {
        record.problem = "its port is down";
        record.next_try = now + kPortInterval;
        return;
      }
      rail.offer();
      bulletin_.change();
    }
    if (rail.phase() == Phase::kOffered && same && peer.phase >= Phase::kOffered) {
      rail.connect(peer);
      bulletin_.change();
    }
  } catch (const CollectiveError& error) {
    cannot_connect(rail, error.what(), begun);
    return;
  }
  if (rail.phase() != Phase::kReady || !same || peer.phase < Phase::kReady) return;
  rail.mark_up();
  record.proof_due = Clock::now() + kProofTime;
  bulletin_.change();  // and this announcement is what proves the connection
}

// Data may go over a rail once both ends have proven it: a path can lose what one of them sends and carry
// what the other does.
void Link::open_if_proven(Rail& rail, Clock::time_point now) {
  const RailState& peer = bulletin_.theirs().rails[rail.index()];
  if (rail.open() || rail.phase() != Phase::kProven) return;
  if (peer.epoch != rail.epoch() || peer.phase < Phase::kProven) return;
  rail.open_for_data();
  worked_ = true;
  Record& record = records_[rail.index()];
  record.hold_down.opened(now);
  counters_.rails_up.fetch_add(1, std::memory_order_relaxed);
  std::string after = ", after " + seconds_text(now - record.closed_since);
  if (record.failed) {
    counters_.rail_recoveries.fetch_add(1, std::memory_order_relaxed);
    bulletin_.note(name(rail) + " works again" + after);
  } else if (record.reported || loss_reported_) {
    bulletin_.note(name(rail) + " carries data now" + after);
  }
  record.failed = record.reported = false;
  record.problem.clear();
}

void Link::judge(Clock::time_point now) {
  bool lost = alone();
  for (auto& rail : rails_) {
    bool held = rail->phase() == Phase::kDown && records_[rail->index()].hold_down.holds(now, lost);
    counters_.conditions[rail->index()].store(rail->open() ? RailCondition::kOpen
                                              : rail->up() ? RailCondition::kUnproven
                                              : held       ? RailCondition::kHeldDown
                                                           : RailCondition::kDown,
                                              std::memory_order_relaxed);
  }
  if (lost != counters_.lost.exchange(lost, std::memory_order_relaxed)) lost_since_ = now;
  if (!lost) {
    loss_reported_ = false;
    return;
  }
  if (!loss_reported_ && (worked_ || now - lost_since_ > kStartTime)) {
    loss_reported_ = true;
    bulletin_.note("no rail to " + peer_name_ + (worked_ ? " works" : " carries data yet") +
                   "; everything waits for one, up to " + seconds_text(options_.timeout));
  }
  if (now - lost_since_ > options_.timeout) stop(loss());
}

std::string Link::loss() const {
  std::string within = " within " + seconds_text(options_.timeout) + " (";
  std::string text =
      rank_name_ + (worked_ ? " lost its link to " + peer_name_ + ": no rail came back" + within
                            : " has no link to " + peer_name_ + ": no rail has carried a message of " +
                                  std::to_string(kProofBytes) + " bytes" + within);
  text += problems();
  if (!worked_) return text + "); see cables, addresses and MTU with vllm-spark doctor --peer";
  return text + "); the last message posted is " + std::to_string(last_posted_) +
         "; see the cable and the other machine";
}

std::string Link::problems() const {
  std::string text;
  for (auto& rail : rails_) {
    const std::string& problem = records_[rail->index()].problem;
    text += (rail->index() == 0 ? "" : "; ") + rail->name() + ": " +
            (problem.empty() ? "no answer yet" : problem);
  }
  return text;
}

void Link::stop(const std::string& reason) {
  stopped_ = true;
  bulletin_.note(reason);
  stop_(reason);
}

void Link::announce() {
  LinkState state = this->state();
  uint32_t outbox = bulletin_.publish(state, alone());
  for (auto& rail : rails_) {
    if (!rail->up() || !rail->has_room()) continue;
    int error = rail->post_announcement(outbox);
    if (error != 0) fail(*rail, std::string("it takes no message (") + std::strerror(error) + ")");
  }
}

void Link::finish() {
  Clock::time_point end = Clock::now() + kFarewellTime;
  // The peer may still wait for what was posted, and must not hear of the end before.
  settle(end);
  tell(rank_name_ + " stopped: it closed its runtime");
  next_look_ = {};
  listen();
  bulletin_.change();
  settle(end);
}

// Waits until all that was posted has arrived, and an announcement after it.
void Link::settle(Clock::time_point end) {
  auto moving = [this] {
    if (!waiting_.empty()) return true;
    // A rail that is not open has announcements only, which an open one carries too.
    return std::any_of(rails_.begin(), rails_.end(), [this](auto& rail) {
      return (alone() ? rail->up() : rail->open()) && rail->queued() > 0;
    });
  };
  announce();
  while (!stopped_ && moving() && Clock::now() < end) {
    progress();
    attend();
    std::this_thread::yield();
  }
}

LinkState Link::state() const {
  LinkState state{};
  state.rail_count = static_cast<uint32_t>(rails_.size());
  for (auto& rail : rails_) state.rails[rail->index()] = rail->state();
  return state;
}

}  // namespace spark::verbs
