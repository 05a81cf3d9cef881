// Two ranks of one process over tests/native/verbs_unreliable.cpp, for the sanitizers: random collectives,
// each checked, while rails break under them and are connected anew.
//
//   link_stress OPERATIONS
#include <dlfcn.h>
#include <poll.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/errors.hpp"
#include "../../csrc/runtime.hpp"

namespace {

[[noreturn]] void fail(const std::string& what, int operation) {
  std::fprintf(stderr, "operation %d: %s\n", operation, what.c_str());
  std::_Exit(1);
}

void run_rank(spark::Runtime& runtime, int rank, int operations) {
  std::mt19937 chance(5);  // the same on both ranks
  std::mt19937 own_chance(static_cast<unsigned>(rank));
  for (int operation = 0; operation < operations; ++operation) {
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
  Keeper(spark::verbs::Bulletin& from, spark::verbs::Bulletin& to)
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

}  // namespace

int main(int argc, char** argv) {
  int operations = argc > 1 ? std::atoi(argv[1]) : 1000;
  spark::Options options;
  options.sizes = {64 << 10, 512, 4};
  options.depth = 2;
  options.proxied = true;
  options.stripes = 2;
  options.timeout = std::chrono::seconds(60);
  options.first_sequence = 0xffffff00u;  // wraps soon
  options.clear_interval = 16;           // clears often
  spark::Options other = options;
  other.rank = 1;
  spark::Runtime left(options), right(other);
  std::vector<spark::verbs::RailAddress> rails{{"memory0", 1, {}, 4096}, {"memory1", 1, {}, 4096}};
  spark::verbs::LinkOptions link;
  link.timeout = std::chrono::seconds(60);
  std::string left_offer = left.open_link(link, rails), right_offer = right.open_link(link, rails);
  left.connect_link(right_offer, "right");
  right.connect_link(left_offer, "left");
  left.begin();
  right.begin();
  {
    spark::verbs::Bulletin &mine = left.link()->bulletin(), &theirs = right.link()->bulletin();
    Keeper one(mine, theirs), two(theirs, mine);
    std::thread peer([&] { run_rank(right, 1, operations); });
    run_rank(left, 0, operations);
    peer.join();
    std::thread closing([&] { left.close(); });
    right.close();
    closing.join();
  }
  uint64_t failures = left.link()->counters().rail_failures + right.link()->counters().rail_failures;
  uint64_t recoveries = left.link()->counters().rail_recoveries + right.link()->counters().rail_recoveries;
  uint64_t reposts = left.link()->counters().reposts + right.link()->counters().reposts;
  uint64_t broken = 0, not_posted = 0, late = 0, refused = 0, early = 0;
  void* library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_NOLOAD);
  using Report = void (*)(uint64_t*, uint64_t*, uint64_t*, uint64_t*, uint64_t*);
  reinterpret_cast<Report>(dlsym(library, "unreliable_report"))(&broken, &not_posted, &late, &refused,
                                                                &early);
  std::printf(
      "%llu connections broken, %llu posts refused, %llu failures, %llu recoveries, %llu messages again, "
      "%llu writes late, %llu refused, %llu posts too early\n",
      static_cast<unsigned long long>(broken), static_cast<unsigned long long>(not_posted),
      static_cast<unsigned long long>(failures), static_cast<unsigned long long>(recoveries),
      static_cast<unsigned long long>(reposts), static_cast<unsigned long long>(late),
      static_cast<unsigned long long>(refused), static_cast<unsigned long long>(early));
  if (broken < 3 || recoveries < 3 || reposts == 0 || late == 0)
    fail("hardly anything has failed", operations);
  if (early > 0) fail("messages went again while their first copies could still arrive", operations);
  std::puts("ok");
}
