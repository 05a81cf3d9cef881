#include "link.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>
#include <utility>

#include "../../errors.hpp"

namespace spark::verbs {
namespace {

constexpr auto kLookInterval = std::chrono::milliseconds(1);
// A rail that cannot be connected is tried again this often.
constexpr auto kRetryInterval = std::chrono::milliseconds(100);
// Connecting may take a second of this thread's time (the kernel looks for the peer's address), so what fails
// again and again is tried less often.
constexpr auto kLongestRetryInterval = std::chrono::seconds(5);
// A rail that is up must be proven within this time. Longer than a NIC takes to repeat a packet in vain,
// which ends the wait earlier and says why: this one is for a device that completes nothing.
constexpr auto kProofTime = std::chrono::seconds(10);
// How long a fresh link may be without an open rail before that is reported: a proof takes milliseconds.
constexpr auto kStartTime = std::chrono::seconds(1);
// A rail may fail under the last message, and it takes a few seconds to notice.
constexpr auto kFarewellTime = std::chrono::seconds(5);

std::string seconds_text(std::chrono::nanoseconds duration) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", std::chrono::duration<double>(duration).count());
  return text;
}

}  // namespace

Link::Link(const LinkOptions& options, std::byte* memory, const RegionSizes& sizes,
           const std::vector<RailAddress>& rails, int rank)
    : options_(options),
      layout_(sizes),
      bulletin_(memory, layout_),
      records_(rails.size(), Record{"no answer yet", HoldDown(options.hold_down)}),
      rank_name_("rank " + std::to_string(rank)),
      newest_packets_(sizes.slots),
      newest_pieces_(sizes.slots * kMaxPieces) {
  if (rails.empty() || rails.size() > kMaxRails) {
    throw UsageError(std::to_string(rails.size()) + " rails are not possible; a link has 1 to " +
                     std::to_string(kMaxRails));
  }
  for (uint32_t index = 0; index < rails.size(); ++index) {
    rails_.push_back(std::make_unique<Rail>(index, rails[index], memory, sizes, options.marks, reaper_));
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
  for (auto& rail : rails_) {
    rail->connect(bulletin_.theirs().rails[rail->index()]);
    rail->rise();  // nothing is sent before both ranks have told each other that they have come this far
  }
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
  if (error != 0)
    fail(rail, std::string("it takes no message (") + std::strerror(error) + ")", rail.epoch() + 1);
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
    fail(rail, *problem, rail.epoch() + 1);
  } else if (rail.phase() != before) {
    bulletin_.change();  // the peer may not send data before it knows
  }
}

void Link::fail(Rail& rail, const std::string& why, uint32_t epoch) {
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
  record.problem = why;
  record.next_try = {};
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
                 (proven ? peer_name_ : rank_name_) + " (" + why +
                 "); while another rail works, it is tried again after " + seconds_text(held) +
                 ", and then less often, up to every " + seconds_text(options_.hold_down.longest));
}

bool Link::progress() {
  for (auto& rail : rails_) {
    if (rail->up() && rail->queued() > 0) poll(*rail);
  }
  if (!waiting_.empty()) send_waiting();
  return !stopped_ && !waiting_.empty();
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
        fail(*rail, event.text, rail->epoch() + 1);
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
  if (static_cast<int32_t>(peer.epoch - rail.epoch()) > 0) fail(rail, "its other end failed", peer.epoch);
  if (rail.phase() == Phase::kUp && now > record.proof_due) {
    poll(rail);  // what came while this process did not run counts
    if (rail.phase() == Phase::kUp) {
      fail(rail, "the device completed nothing within " + seconds_text(kProofTime), rail.epoch() + 1);
    }
  }
  if (rail.up() || now < record.next_try || record.hold_down.holds(now, alone())) return;
  bool same = peer.epoch == rail.epoch();
  try {
    if (rail.phase() == Phase::kDown) {
      if (!rail.device().port_active(rail.port())) {
        record.problem = "its port is down";
        record.next_try = now + kRetryInterval;
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
    // A queue pair that got half way cannot be connected again: another one can.
    if (rail.phase() == Phase::kOffered) fail(rail, error.what(), rail.epoch() + 1);
    record.problem = error.what();
    record.pause =
        std::clamp<std::chrono::nanoseconds>(2 * record.pause, kRetryInterval, kLongestRetryInterval);
    record.next_try = Clock::now() + record.pause;  // not `now`: trying may have taken longer than the pause
    return;
  }
  if (rail.phase() != Phase::kReady || !same || peer.phase < Phase::kReady) return;
  rail.rise();
  record.pause = {};
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
  } else if (record.reported) {
    bulletin_.note(name(rail) + " carries data now" + after);
  }
  record.failed = record.reported = false;
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
  for (auto& rail : rails_) {
    text += (rail->index() == 0 ? "" : "; ") + rail->name() + ": " + records_[rail->index()].problem;
  }
  if (!worked_) return text + "); see cables, addresses and MTU with vllm-spark doctor --peer";
  return text + "); the last message posted is " + std::to_string(last_posted_) +
         "; see the cable and the other machine";
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
    if (error != 0)
      fail(*rail, std::string("it takes no message (") + std::strerror(error) + ")", rail->epoch() + 1);
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
