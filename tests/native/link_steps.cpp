// Two ranks' links over tests/native/verbs_unreliable.cpp, driven by one thread that decides which rank looks
// after its rails when: for what depends on an order that the ranks' own threads take by chance only. Each
// scenario ends with "ok", or names the first thing that was wrong.
//
//   link_steps SCENARIO
#include <dlfcn.h>

#include <functional>
#include <map>

#include "../../csrc/rank/endpoint.hpp"
#include "../../csrc/support/errors.hpp"
#include "link_ranks.hpp"

namespace {

using namespace spark::testing;
using namespace std::chrono_literals;
using spark::verbs::RailCondition;

template <typename Function>
Function* library(const char* name) {
  void* handle = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_NOLOAD);
  return reinterpret_cast<Function*>(dlsym(handle, name));
}

void refuse_to_connect(const char* device, int from_domain) {
  library<void(const char*, int)>("unreliable_refuse")(device, from_domain);
}

void set_port(const char* device, bool active) {
  library<void(const char*, bool)>("unreliable_port")(device, active);
}

constexpr size_t kRails = 2;
// Of ranks that are joined first: the domains of the second one's rails begin here.
constexpr int kSecondRank = kRails;

spark::Options options_of(int rank) {
  spark::Options options;
  options.sizes = {64 << 10, 512, 4};
  options.depth = 2;
  options.proxied = true;
  options.rank = rank;
  return options;
}

class Pair {
 public:
  Pair(const spark::verbs::LinkOptions& left_link, const spark::verbs::LinkOptions& right_link)
      : left(options_of(0)), right(options_of(1)) {
    join(left, right, left_link, right_link, kRails);
  }

  // One look of a rank after its rails. Returns what `progress` does: whether its proxy must not sleep.
  bool step(spark::Endpoint& rank) {
    spark::Endpoint& other = &rank == &left ? right : left;
    bool awake = rank.link()->progress();
    rank.link()->maintain();
    std::string announcement = rank.link()->announcements().take();
    if (!announcement.empty()) other.link()->announcements().deliver(announcement);
    for (const std::string& sentence : rank.link()->announcements().take_log()) log[&rank] += sentence + "\n";
    return awake;
  }

  // Lets `rank`, or both, look after their rails until `condition` holds.
  void step_until(spark::Endpoint* rank, const char* what, const std::function<bool()>& condition,
                  std::chrono::nanoseconds bound = kBound) {
    auto end = spark::Clock::now() + bound;
    while (!condition()) {
      if (spark::Clock::now() > end) fail(std::string("it did not come to this: ") + what, 0);
      if (rank != &right) step(left);
      if (rank != &left) step(right);
      std::this_thread::sleep_for(1ms);  // a link looks around once in a millisecond
    }
  }

  RailCondition condition(const spark::Endpoint& rank, size_t rail) const {
    return rank.link()->counters().conditions[rail].load();
  }
  bool open(size_t rail) const {
    return condition(left, rail) == RailCondition::kOpen && condition(right, rail) == RailCondition::kOpen;
  }
  bool all_open() const { return open(0) && open(1); }

  // A rank's queue pairs fail, one after the other.
  void break_all_rails(spark::Endpoint& rank) {
    for (uint32_t rail = 0; rail < kRails; ++rail) {
      rank.link()->break_rail(rail);
      step_until(&rank, "a broken rail fails",
                 [&] { return rank.link()->counters().rail_failures == rail + 1; });
    }
  }

  spark::Endpoint left, right;
  std::map<spark::Endpoint*, std::string> log;
};

void check(bool condition, const std::string& what) {
  if (!condition) fail(what, 0);
}

spark::verbs::LinkOptions link_options() {
  spark::verbs::LinkOptions link;
  link.timeout = kBound;
  return link;
}

// A rail that is up and not yet open is looked after without a sleep of the proxy in between.
void proof() {
  Pair pair(link_options(), link_options());
  auto& left = pair.left;
  pair.step(left);  // both of its rails are up from the start
  check(pair.condition(left, 0) == RailCondition::kUnproven, "rail 0 is up");
  check(left.link()->progress(), "a rail is about to be proven, and the proxy may sleep");
  pair.step_until(nullptr, "both rails open", [&] { return pair.all_open(); });
  check(!left.link()->progress(), "both rails are open and idle, and the proxy may not sleep");
}

// A rail that opens after the log has said that none carries data yet.
void late() {
  Pair pair(link_options(), link_options());
  auto& left = pair.left;
  auto says = [&](const char* words) { return pair.log[&left].find(words) != std::string::npos; };
  pair.step_until(&left, "the log says that no rail carries data", [&] { return says("no rail to rank 1"); });
  pair.step_until(nullptr, "both rails open", [&] { return pair.all_open(); });
  pair.step(left);
  check(says("rail 0 (memory0) to rank 1 on right carries data now, after "), pair.log[&left]);
}

// A rail that was offered while no rail worked is connected once its other end is there, though another rail
// has opened meanwhile, and its hold-down is ten times as long by that.
void offered() {
  spark::verbs::LinkOptions patient = link_options(), hasty = link_options();
  patient.hold_down = {40s, 60s, 60s};
  hasty.hold_down = {1ms, 1ms, 60s};
  Pair pair(patient, hasty);
  auto& left = pair.left;
  pair.step_until(nullptr, "both rails open", [&] { return pair.all_open(); });
  pair.break_all_rails(left);
  // The left rank alone offers both of its rails. Then the right one cannot offer one of them.
  auto condition = [&] { return pair.condition(left, 1); };
  pair.step_until(&left, "rail 1 is held down", [&] { return condition() == RailCondition::kHeldDown; });
  pair.step_until(&left, "rail 1 is offered", [&] { return condition() == RailCondition::kDown; });
  set_port("memory1", false);
  pair.step_until(nullptr, "rail 0 is open again", [&] { return pair.open(0); });
  check(condition() == RailCondition::kDown, "rail 1 waits for its other end");
  set_port("memory1", true);
  pair.step_until(nullptr, "rail 1 is open again, before 40 s are over", [&] { return pair.open(1); }, 20s);
}

// What a rank has found itself of a rail is not replaced by what the peer says of its end.
void reasons() {
  spark::verbs::LinkOptions link = link_options();
  link.timeout = 3s;
  Pair pair(link, link);
  auto& left = pair.left;
  auto& right = pair.right;
  pair.step_until(nullptr, "both rails open", [&] { return pair.all_open(); });
  pair.break_all_rails(left);
  refuse_to_connect("both", kSecondRank);
  pair.step_until(nullptr, "both ranks stop", [&] { return left.aborted() && right.aborted(); });
  for (const char* rail : {"rail 0 (memory0): ", "rail 1 (memory1): "}) {
    auto finds = [&](const spark::Endpoint& rank, const char* problem) {
      std::string reason = rank.mine().abort_reason();
      check(reason.find(rail + std::string(problem)) != std::string::npos, reason);
    };
    finds(left, "an error (status 5, ");
    finds(right, "the RDMA device memory");
  }
}

// Why a rank stops reaches the peer whole, also where it is long.
void reason() {
  Pair pair(link_options(), link_options());
  const std::string text = std::string(1500, 'x') + "; see the cable";
  pair.step_until(nullptr, "both rails open", [&] { return pair.all_open(); });
  pair.left.abort(text);
  pair.step_until(nullptr, "the peer stops", [&] { return pair.right.aborted(); });
  check(pair.right.mine().abort_reason() == "rank 0 stopped: " + text, pair.right.mine().abort_reason());
}

// More pieces are posted than a rail's chain holds, and the device refuses the chain: each of them arrives.
void chain() {
  constexpr uint32_t kMessages = 2, kPieces = 60;  // 240 requests, of which a chain holds 128
  Pair pair(link_options(), link_options());
  auto& left = pair.left;
  pair.step_until(nullptr, "both rails open", [&] { return pair.all_open(); });
  left.link()->break_rail(1);
  pair.step_until(&left, "rail 1 fails", [&] { return left.link()->counters().rail_failures == 1; });
  library<void(uint64_t)>("unreliable_refuse_chain")(100);
  for (uint32_t sequence = 1; sequence <= kMessages; ++sequence) {
    for (uint32_t piece = 0; piece < kPieces; ++piece)
      left.link()->post(sequence, {spark::Protocol::kPayload, 7, 64, piece, 64 * piece});
  }
  left.link()->flush();
  check(left.link()->counters().rail_failures == 2, "rail 0 fails with the refused chain");
  auto arrived = [&] {
    for (uint32_t sequence = 1; sequence <= kMessages; ++sequence) {
      for (uint32_t piece = 0; piece < kPieces; ++piece) {
        uint64_t flag = pair.right.mine().recv_flag(sequence, piece).load();
        if (spark::flag_sequence(flag) != sequence) return false;
      }
    }
    return true;
  };
  pair.step_until(nullptr, "all pieces arrive", arrived, 20s);
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> scenarios{{"proof", proof},     {"late", late},
                                                    {"offered", offered}, {"reasons", reasons},
                                                    {"reason", reason},   {"chain", chain}};
  auto scenario = scenarios.find(argc > 1 ? argv[1] : "");
  if (scenario == scenarios.end()) return 2;
  scenario->second();
  std::puts("ok");
}
