// Two ranks of one process over a libibverbs of tests (verbs_unreliable.cpp): what programs that join such
// ranks have in common.
#pragma once

#include <poll.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/cpu_rank.hpp"
#include "../../csrc/transport/link/link.hpp"

namespace spark::testing {

constexpr auto kBound = std::chrono::seconds(60);  // for a message, and for a rail

[[noreturn]] inline void fail(const std::string& what, int operation) {
  std::fprintf(stderr, "operation %d: %s\n", operation, what.c_str());
  std::_Exit(1);
}

// Random all-reduces, each checked. Calls `before(operation)` before each, which says whether to go on.
template <typename Before>
void run_rank(spark::CpuRank& runtime, int rank, Before before) {
  std::mt19937 chance(5);  // the same on both ranks
  std::mt19937 own_chance(static_cast<unsigned>(rank));
  for (int operation = 0; before(operation); ++operation) {
    size_t count = 1 + chance() % (operation % 20 == 0 ? 40'000 : 1200);
    auto first = static_cast<float>(chance() % 1000), second = static_cast<float>(chance() % 1000);
    std::vector<float> in(count, rank == 0 ? first : second), out(count, -1);
    // In place of the last few, so that an old message is not taken for the new one.
    for (size_t at = 0; at < count; at += 7) in[at] += static_cast<float>(at % 100);
    // Now and then a rank comes late, and what the other one sent lies in its slot unread.
    if (own_chance() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own_chance() % 1500));
    runtime.all_reduce(in.data(), out.data(), count, spark::DType::kFloat32);
    for (size_t at = 0; at < count; ++at) {
      float expected = first + second + (at % 7 == 0 ? 2 * static_cast<float>(at % 100) : 0);
      if (out[at] != expected) fail("wrong sum at " + std::to_string(at), operation);
    }
  }
}

// Passes on what a rank says of its rails, as the channel between two machines does.
class Keeper {
 public:
  Keeper(spark::verbs::Announcements& from, spark::verbs::Announcements& to)
      : thread_([this, &from, &to] {
          while (!stopping_.load(std::memory_order_relaxed)) {
            pollfd ready{from.ready(), POLLIN, 0};
            poll(&ready, 1, 20);
            std::string announcement = from.take();
            for (const std::string& sentence : from.take_log())
              std::fprintf(stderr, "%s\n", sentence.c_str());
            if (!announcement.empty()) to.deliver(announcement);
          }
        }) {}
  ~Keeper() {
    stopping_.store(true, std::memory_order_relaxed);
    thread_.join();
  }

 private:
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

// The same both ways.
struct Keepers {
  Keepers(spark::verbs::Link& left, spark::verbs::Link& right)
      : one(left.announcements(), right.announcements()), two(right.announcements(), left.announcements()) {}
  Keeper one, two;
};

// Does both at once.
template <typename One, typename Other>
void together(One one, Other other) {
  std::thread beside(other);
  one();
  beside.join();
}

// Joins two ranks, each a Runtime or an Endpoint, over so many rails: by turns over memory0 and memory1.
template <typename Rank>
void join(Rank& left, Rank& right, const spark::verbs::LinkOptions& left_link,
          const spark::verbs::LinkOptions& right_link, size_t count = 2) {
  std::vector<spark::verbs::RailAddress> rails;
  for (size_t rail = 0; rail < count; ++rail)
    rails.push_back({rail % 2 == 0 ? "memory0" : "memory1", 1, {}, 4096});
  std::string left_offer = left.open_link(left_link, rails), right_offer = right.open_link(right_link, rails);
  left.connect_link(right_offer, "right");
  right.connect_link(left_offer, "left");
}

template <typename Rank>
void join(Rank& left, Rank& right, const spark::verbs::LinkOptions& link) {
  join(left, right, link, link);
}

}  // namespace spark::testing
