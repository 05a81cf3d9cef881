// Two ranks of one process over tests/native/verbs_unreliable.cpp, which has a rail whose connections come up
// and then lose what is sent, or which cannot be connected: random messages, each checked, for a while.
// Prints what was counted, as JSON.
//
//   faulty_rail SECONDS [HEAL_AFTER_SECONDS [LINK_TIMEOUT_SECONDS [RAILS]]]
//
// Exit code 3 and the error's sentence alone if the ranks cannot be joined.
#include <dlfcn.h>

#include <algorithm>
#include <limits>

#include "link_ranks.hpp"

namespace {

using namespace spark::testing;
using Seconds = std::chrono::duration<double>;

// For what a rank does until both end after the same operation.
class Course {
 public:
  Course(double seconds, double heal_after) : seconds_(seconds), heal_after_(heal_after) {}

  // Before each operation of rank 0: after the first `seconds` it ends the course.
  bool lead(int operation) {
    Seconds passed = spark::Clock::now() - start_;
    if (passed.count() > heal_after_) {
      heal_after_ = std::numeric_limits<double>::infinity();
      reinterpret_cast<void (*)()>(symbol("unreliable_heal"))();
    }
    // Rank 1 is in `operation` at most: no rank ends one before the other has begun it.
    if (passed.count() > seconds_ && last_.load() == kNone) last_.store(operation + 1);
    return follow(operation);
  }
  bool follow(int operation) const { return operation <= last_.load(); }
  int operations() const { return last_.load() + 1; }
  double seconds() const { return Seconds(spark::Clock::now() - start_).count(); }

  static void* symbol(const char* name) {
    void* library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_NOLOAD);
    return dlsym(library, name);
  }

 private:
  static constexpr int kNone = std::numeric_limits<int>::max() - 1;

  double seconds_, heal_after_;
  spark::Clock::time_point start_ = spark::Clock::now();
  std::atomic<int> last_{kNone};
};

// How long each operation of a rank took, as far as it matters: how often a rail's retry time or longer.
class Stalls {
 public:
  explicit Stalls(Seconds retry) : retry_(retry) {}
  void begin() {
    spark::Clock::time_point now = spark::Clock::now();
    if (begun_ != spark::Clock::time_point{} && now - begun_ >= retry_) ++count_;
    begun_ = now;
  }
  int count() const { return count_; }

 private:
  Seconds retry_;
  spark::Clock::time_point begun_{};
  int count_ = 0;
};

void print_rank(const char* name, const spark::verbs::Link& link, int stalls) {
  const spark::verbs::LinkCounters& counters = link.counters();
  auto number = [](const std::atomic<uint64_t>& counter) {
    return static_cast<unsigned long long>(counter.load());
  };
  auto state = [&counters](size_t rail) {
    return spark::verbs::kRailConditions[static_cast<uint32_t>(counters.conditions[rail].load())];
  };
  std::printf(
      "\"%s\": {\"stalls\": %d, \"posts\": [%llu, %llu], \"failures\": %llu, \"recoveries\": %llu, "
      "\"reposts\": %llu, \"rails_up\": %llu, \"states\": [\"%s\", \"%s\"]}, ",
      name, stalls, number(counters.posts[0]), number(counters.posts[1]), number(counters.rail_failures),
      number(counters.rail_recoveries), number(counters.reposts), number(counters.rails_up), state(0),
      state(1));
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = argc > 1 ? std::atof(argv[1]) : 8;
  double heal_after = argc > 2 ? std::atof(argv[2]) : std::numeric_limits<double>::infinity();
  double link_timeout = argc > 3 ? std::atof(argv[3]) : 60;
  size_t rails = argc > 4 ? std::strtoul(argv[4], nullptr, 10) : 2;
  const char* retry = std::getenv("RETRY_MS");
  Seconds retry_time(retry == nullptr ? 0.5 : std::atof(retry) / 1e3);  // as in the library
  spark::Options options;
  options.sizes = {64 << 10, 512, 4};
  options.depth = 2;
  options.proxied = true;
  options.stripes = 2;
  options.timeout = kBound;
  spark::Options other = options;
  other.rank = 1;
  spark::CpuRank left(options), right(other);
  spark::verbs::LinkOptions link;
  link.timeout = std::chrono::nanoseconds(static_cast<int64_t>(link_timeout * 1e9));
  try {
    join(left, right, link, link, rails);
  } catch (const spark::CollectiveError& error) {
    std::puts(error.what());
    return 3;
  }
  left.start();
  right.start();
  Stalls left_stalls(retry_time), right_stalls = left_stalls;
  Course course(seconds, heal_after);
  std::string errors[2];
  auto run = [&](spark::CpuRank& runtime, int rank, Stalls& stalls) {
    try {
      run_rank(runtime, rank, [&](int operation) {
        stalls.begin();
        return rank == 0 ? course.lead(operation) : course.follow(operation);
      });
    } catch (const spark::CollectiveError& error) {
      errors[rank] = error.what();
    }
  };
  double run_seconds;
  {
    Keepers keepers(*left.link(), *right.link());
    together([&] { run(left, 0, left_stalls); }, [&] { run(right, 1, right_stalls); });
    run_seconds = course.seconds();
    std::printf("{");
    print_rank("left", *left.link(), left_stalls.count());
    print_rank("right", *right.link(), right_stalls.count());
    together([&] { left.close(); }, [&] { right.close(); });
  }
  auto connections = reinterpret_cast<uint64_t (*)(const char*)>(Course::symbol("unreliable_connections"));
  std::printf("\"seconds\": %.3f, \"operations\": %d, \"errors\": [\"%s\", \"%s\"], ", run_seconds,
              errors[0].empty() ? course.operations() : 0, errors[0].c_str(), errors[1].c_str());
  std::printf("\"connections\": {\"memory0\": %llu, \"memory1\": %llu}}\n",
              static_cast<unsigned long long>(connections("memory0")),
              static_cast<unsigned long long>(connections("memory1")));
}
