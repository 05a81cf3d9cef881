// Two ranks of one process over tests/native/verbs_unreliable.cpp, for the sanitizers: random messages, each
// checked, while rails break under them and are connected anew. First two ranks on CPUs, with few slots and
// with as few as can be, then the proxies of two GPU ranks.
//
//   link_stress OPERATIONS
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/cpu_rank.hpp"
#include "../../csrc/proxy/proxy_thread.hpp"
#include "../../csrc/proxy/slot_scanner.hpp"
#include "../../csrc/rank/endpoint.hpp"
#include "../../csrc/support/errors.hpp"
#include "link_ranks.hpp"
#include "wide_message.hpp"

namespace {

using namespace spark::testing;

struct Totals {
  uint64_t failures = 0, recoveries = 0, reposts = 0;

  void add(const spark::verbs::Link& link) {
    failures += link.counters().rail_failures;
    recoveries += link.counters().rail_recoveries;
    reposts += link.counters().reposts;
  }
};

spark::Options options_of(uint32_t depth) {
  spark::Options options;
  options.sizes = {64 << 10, 4096, 2 * depth};
  options.depth = depth;
  options.proxied = true;
  options.timeout = kBound;
  options.first_sequence = 0xffffff00u;  // wraps soon
  options.clear_interval = 16;           // clears often
  return options;
}

// Rails break every few messages: a hold-down of seconds would leave them unused.
spark::verbs::LinkOptions link_options() {
  spark::verbs::LinkOptions link;
  link.timeout = kBound;
  link.hold_down = {std::chrono::milliseconds(1), std::chrono::milliseconds(5), std::chrono::seconds(60)};
  return link;
}

void run_cpu_pair(uint32_t depth, int operations, Totals& totals) {
  spark::Options options = options_of(depth), other = options;
  options.stripes = other.stripes = 2;
  other.rank = 1;
  spark::CpuRank left(options), right(other);
  join(left, right, link_options());
  left.start();
  right.start();
  {
    Keepers keepers(*left.link(), *right.link());
    auto more = [operations](int operation) { return operation < operations; };
    together([&] { run_rank(left, 0, more); }, [&] { run_rank(right, 1, more); });
    together([&] { left.close(); }, [&] { right.close(); });
  }
  totals.add(*left.link());
  totals.add(*right.link());
}

// What the kernels of packets do, by this thread: one message after another, each staged once the peer's one
// before has come. It knows nothing of the proxy.
void run_kernels(spark::Endpoint& endpoint, int operations) {
  std::mt19937 chance(5);  // the same on both ranks
  std::mt19937 own_chance(static_cast<unsigned>(endpoint.options().rank));
  spark::Region region = endpoint.mine();
  for (int operation = 0; operation < operations; ++operation) {
    uint32_t sequence = endpoint.options().first_sequence + static_cast<uint32_t>(operation);
    uint32_t words = 3 * (chance() % 2 == 0 ? chance() % 5 : 300 + chance() % 5);  // in one part, or in two
    if (own_chance() % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own_chance() % 300));
    WideMessage message{7, words, 31 * sequence};
    message.stage(region.send_packets(sequence), sequence);
    auto start = spark::Clock::now();
    auto waits = [&] {
      if (spark::Clock::now() - start > kBound) fail("a message did not come", operation);
      std::this_thread::yield();
    };
    if (!message.arrives(region.recv_packets(sequence), sequence, waits)) fail("wrong packet", operation);
  }
}

// A link whose thread loses its core whenever messages went again: what their slots carried along is out, and
// the proxy has not looked for it yet.
class Preempted : public spark::Transport {
 public:
  explicit Preempted(spark::verbs::Link& link) : link_(link) {}
  void post(uint32_t sequence, const spark::SendDescriptor& descriptor) override {
    link_.post(sequence, descriptor);
  }
  void flush() override { link_.flush(); }
  bool progress() override {
    uint64_t before = posts();
    bool under_way = link_.progress();
    if (posts() != before) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return under_way;
  }
  void maintain() override { link_.maintain(); }
  void finish() override { link_.finish(); }

 private:
  uint64_t posts() const { return link_.counters().posts[0] + link_.counters().posts[1]; }

  spark::verbs::Link& link_;
};

void run_gpu_pair(uint32_t depth, int operations, Totals& totals) {
  spark::Options options = options_of(depth), other = options;
  other.rank = 1;
  spark::Endpoint left(options), right(other);
  join(left, right, link_options());
  Preempted left_link(*left.link()), right_link(*right.link());
  spark::SlotScanner left_scanner(left.mine(), options.first_sequence - 1, 2);
  spark::SlotScanner right_scanner(right.mine(), options.first_sequence - 1, 2);
  spark::ProxyThread left_proxy(left_scanner, left_link), right_proxy(right_scanner, right_link);
  {
    Keepers keepers(*left.link(), *right.link());
    together([&] { run_kernels(left, operations); }, [&] { run_kernels(right, operations); });
    together([&] { left_proxy.stop(); }, [&] { right_proxy.stop(); });
  }
  totals.add(*left.link());
  totals.add(*right.link());
}

}  // namespace

int main(int argc, char** argv) {
  int operations = argc > 1 ? std::atoi(argv[1]) : 1000;
  Totals totals;
  run_cpu_pair(2, operations, totals);
  run_cpu_pair(1, operations / 2, totals);
  run_gpu_pair(1, operations / 4, totals);
  uint64_t broken = 0, not_posted = 0, late = 0, refused = 0, early = 0;
  void* library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_NOLOAD);
  using Report = void (*)(uint64_t*, uint64_t*, uint64_t*, uint64_t*, uint64_t*);
  reinterpret_cast<Report>(dlsym(library, "unreliable_report"))(&broken, &not_posted, &late, &refused,
                                                                &early);
  std::printf(
      "%llu connections broken, %llu posts refused, %llu failures, %llu recoveries, %llu messages again, "
      "%llu writes late, %llu refused, %llu posts too early\n",
      static_cast<unsigned long long>(broken), static_cast<unsigned long long>(not_posted),
      static_cast<unsigned long long>(totals.failures), static_cast<unsigned long long>(totals.recoveries),
      static_cast<unsigned long long>(totals.reposts), static_cast<unsigned long long>(late),
      static_cast<unsigned long long>(refused), static_cast<unsigned long long>(early));
  if (broken < 3 || totals.recoveries < 3 || totals.reposts == 0 || late == 0)
    fail("hardly anything has failed", operations);
  if (early > 0) fail("messages went again while their first copies could still arrive", operations);
  std::puts("ok");
}
