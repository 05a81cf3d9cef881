#include "link.hpp"

#include <algorithm>
#include <thread>
#include <utility>

#include "../../support/errors.hpp"

namespace spark::verbs {
namespace {

constexpr auto kCheckInterval = std::chrono::milliseconds(1);
// Turns of the proxy's thread between two looks for completions.
constexpr uint32_t kTurnsPerPoll = 64;
// Maximum time for the last messages and the last announcement: a rail may fail under them, and that takes a
// few seconds to detect, or longer if its NIC retransmits for longer.
constexpr auto kFinishTime = std::chrono::seconds(5);

}  // namespace

Link::Link(const LinkOptions& options, std::byte* memory, const RegionSizes& sizes,
           const std::vector<RailAddress>& rails, int rank)
    : finish_time_(options.path_options.beyond_failure(kFinishTime)),
      rank_name_("rank " + std::to_string(rank)),
      announcements_(memory, RegionLayout(sizes)),
      retransmission_(keeper_, counters_, sizes),
      keeper_(options, memory, sizes, rails, rank_name_, announcements_, counters_, retransmission_) {
  for (auto& rail : keeper_.rails()) path_ += (path_.empty() ? "verbs on " : " and ") + rail->name();
}

std::string Link::offer() {
  keeper_.offer();
  LinkState state = keeper_.state();
  return announcements_.encode(state);
}

void Link::connect(const std::string& peer_offer, const std::string& peer_name,
                   std::function<void(const std::string&)> stop) {
  if (!announcements_.accept_offer(peer_offer)) {
    throw CollectiveError(peer_name +
                          " sent no valid description of its rails; use the same version on both");
  }
  if (announcements_.peer().rail_count != rails()) {
    throw CollectiveError(peer_name + " has " + std::to_string(announcements_.peer().rail_count) +
                          " rails where this rank has " + std::to_string(rails()) +
                          "; use the same version on both");
  }
  stop_ = std::move(stop);
  keeper_.connect(peer_name);
}

void Link::post(uint32_t sequence, const SendDescriptor& descriptor) {
  if (!stopped_) retransmission_.post({sequence, descriptor});
}

bool Link::progress() {
  // Not in every turn: messages wait for turns. What waits for a completion is a rail's proof, and messages
  // that it reports as lost; `maintain` polls too, for a proxy whose turns are long, since it sleeps.
  poll(++turns_ % kTurnsPerPoll == 0);
  if (!retransmission_.empty()) retransmission_.post_queued();
  if (stopped_) return false;
  if (!retransmission_.empty()) return true;
  // While there is no open rail, one that is up is about to be proven: a proxy that slept would find out only
  // when it wakes, and the first message of either rank waits for both.
  return counters_.no_open_rail() &&
         std::any_of(keeper_.rails().begin(), keeper_.rails().end(), [](auto& rail) { return rail->up(); });
}

void Link::poll(bool all) {
  for (auto& rail : keeper_.rails()) {
    if (rail->up() && rail->queued() > 0 && (all || !rail->open())) keeper_.poll(*rail);
  }
}

void Link::maintain() {
  Clock::time_point now = Clock::now();
  if (now < next_check_) return;
  next_check_ = now + kCheckInterval;
  poll(true);
  read_announcements();
  if (!stopped_) {
    if (std::optional<std::string> loss = keeper_.maintain(now)) {
      announcements_.log(*loss);
      stop(*loss);
    }
  }
  if (announcements_.due(now, stopped_)) announce();
}

void Link::read_announcements() {
  announcements_.read();
  if (announcements_.peer().stopped != 0 && !stopped_) stop(announcements_.peer().reason);
}

void Link::stop(const std::string& reason) {
  stopped_ = true;
  keeper_.stop_reporting();
  stop_(reason);
}

void Link::announce() {
  LinkState state = keeper_.state();
  bool changed = announcements_.requested();
  uint32_t outbox = announcements_.publish(state, counters_.no_open_rail());
  for (auto& rail : keeper_.rails()) {
    if (!rail->up() || !rail->has_room()) continue;
    // A NIC may wait anew for an acknowledgement with each request, as soft-RoCE does: then it would never
    // report that a rail has failed over which announcements are repeated.
    if (!changed && rail->announcement_under_way()) continue;
    rail->post_announcement(outbox);  // its chain is empty: whoever posts also flushes
    int error = rail->flush();
    if (error != 0) keeper_.fail_to_post(*rail, error);
  }
}

void Link::finish() {
  Clock::time_point end = Clock::now() + finish_time_;
  // The peer may still wait for what was posted, and must not receive the announcement of the end before.
  drain(end);
  announce_stop(rank_name_ + " stopped: it closed its runtime");
  next_check_ = {};
  read_announcements();
  announcements_.request();
  drain(end);
}

void Link::drain(Clock::time_point end) {
  announce();
  while (!stopped_ && messages_under_way() && Clock::now() < end) {
    progress();
    maintain();
    std::this_thread::yield();
  }
}

bool Link::messages_under_way() const {
  if (!retransmission_.empty()) return true;
  // A rail that is not open has announcements only, which an open one carries too.
  return std::any_of(keeper_.rails().begin(), keeper_.rails().end(), [this](auto& rail) {
    return (counters_.no_open_rail() ? rail->up() : rail->open()) && rail->queued() > 0;
  });
}

}  // namespace spark::verbs
