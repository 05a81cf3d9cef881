// Checks csrc/transport/wire_model.cpp on random figures and random traffic. Prints the first property that
// is wrong and returns 1, or prints how many writes it has checked.
#include "../../csrc/transport/wire_model.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "../../csrc/support/errors.hpp"

namespace {

using spark::LatencyPoint;
using spark::RailFigures;
using spark::WireFigures;
using spark::WireModel;
using Time = WireModel::Time;

constexpr double kRounding = 1.5;  // nanoseconds: the model's answers are whole ones

unsigned seed = 0;

void expect(bool holds, const char* property, double found, double limit) {
  if (holds) return;
  std::printf("seed %u: %s is wrong: %.3f against %.3f\n", seed, property, found, limit);
  std::exit(1);
}

struct Traffic {
  size_t rail;
  Time posted;
  uint64_t bytes;
  bool first;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  uint64_t number(uint64_t least, uint64_t most) {
    return std::uniform_int_distribution<uint64_t>(least, most)(engine_);
  }
  double real(double least, double most) {
    return std::uniform_real_distribution<double>(least, most)(engine_);
  }
  // Mostly small, as messages are, and up to 1 MiB.
  uint64_t bytes() { return number(1, uint64_t{1} << number(1, 20)); }

 private:
  std::mt19937 engine_;
};

RailFigures random_rail(Random& random) {
  RailFigures rail;
  double ns = random.real(0, 3000);
  uint64_t bytes = random.number(0, 64);
  for (uint64_t points = random.number(1, 8); points > 0; --points) {
    rail.latency.push_back({bytes, ns});
    bytes += random.bytes();
    ns += random.real(0, 5000);
  }
  rail.bytes_per_ns = random.real(0.5, 30);
  return rail;
}

WireFigures random_figures(Random& random) {
  WireFigures figures;
  double sum = 0;
  for (uint64_t rails = random.number(1, 4); rails > 0; --rails) {
    figures.rails.push_back(random_rail(random));
    sum += figures.rails.back().bytes_per_ns;
  }
  if (random.number(0, 1) != 0) figures.bytes_per_ns = random.real(0.3, 1.3) * sum;
  figures.doorbell_ns = random.real(0, 500);
  figures.work_request_ns = random.real(0, 100);
  return figures;
}

std::vector<Traffic> random_traffic(Random& random, size_t rails) {
  std::vector<Traffic> traffic;
  Time now(random.number(0, 1'000'000'000'000'000));  // a machine may have run for days
  for (uint64_t chains = random.number(1, 60); chains > 0; --chains) {
    size_t rail = random.number(0, rails - 1);
    for (uint64_t writes = random.number(1, 4), at = 0; at < writes; ++at) {
      traffic.push_back({rail, now, random.bytes(), at == 0});
    }
    now += Time(random.number(0, random.number(0, 1) != 0 ? 50 : 50'000));
  }
  return traffic;
}

void check_single_writes(const WireFigures& figures) {
  for (size_t rail = 0; rail < figures.rails.size(); ++rail) {
    for (const LatencyPoint& point : figures.rails[rail].latency) {
      WireModel model(figures);
      double took =
          static_cast<double>((model.write(rail, Time(12345), point.bytes, true) - Time(12345)).count());
      expect(std::abs(took - point.ns) <= kRounding, "a single write of a measured size", took, point.ns);
    }
    WireModel model(figures);
    double before = 0;
    for (uint64_t bytes = 0; bytes < (4u << 20); bytes += 1 + bytes / 7) {
      double ns = model.latency(rail, bytes);
      expect(ns >= before, "latency that does not descend with the size", ns, before);
      before = ns;
    }
  }
}

// Returns how many writes were checked.
size_t check_traffic(const WireFigures& figures, const std::vector<Traffic>& traffic) {
  WireModel model(figures);
  size_t rails = figures.rails.size();
  std::vector<WireModel> alone(rails, WireModel(figures));
  double sum = 0;
  for (const RailFigures& rail : figures.rails) sum += rail.bytes_per_ns;
  double share = figures.bytes_per_ns > 0 ? std::min(1.0, figures.bytes_per_ns / sum) : 1;
  struct Seen {
    Time first_posted{}, delivered{};
    double before = 0;  // bytes of the writes before the latest one
    double latest = 0;
    double chain = 0;  // nanoseconds
    double free = 0;   // when the latest write has left the rail
  };
  std::vector<Seen> seen(rails);
  for (const Traffic& write : traffic) {
    Seen& rail = seen[write.rail];
    Time delivered = model.write(write.rail, write.posted, write.bytes, write.first);
    expect(delivered == alone[write.rail].write(write.rail, write.posted, write.bytes, write.first),
           "delivery beside traffic of other rails", static_cast<double>(delivered.count()), 0);
    auto took = static_cast<double>((delivered - write.posted).count());
    double latency = model.latency(write.rail, write.bytes);
    rail.chain = write.first ? 0 : rail.chain + figures.work_request_ns;
    expect(took + kRounding >= latency + rail.chain, "latency under traffic", took, latency + rail.chain);
    expect(delivered >= rail.delivered, "order of deliveries", static_cast<double>(delivered.count()),
           static_cast<double>(rail.delivered.count()));
    double rate = share * figures.rails[write.rail].bytes_per_ns;
    if (rail.latest == 0) rail.free = static_cast<double>(traffic[0].posted.count());
    double posted = static_cast<double>(write.posted.count()) + rail.chain;
    if (write.first && write.posted >= rail.delivered && posted >= rail.free) {
      expect(std::abs(took - latency) <= kRounding, "a write over a rail that is idle again", took, latency);
    }
    rail.free = std::max(posted, rail.free) + static_cast<double>(write.bytes) / rate;
    if (rail.latest == 0) rail.first_posted = write.posted;
    rail.before += rail.latest;
    rail.latest = static_cast<double>(write.bytes);
    rail.delivered = delivered;
    // All that was posted before has left the rail when this write begins.
    double since = static_cast<double>((delivered - rail.first_posted).count());
    double least = rail.before / rate + latency;
    expect(since + kRounding >= least, "time of all bytes at the rail's rate", since, least);
  }
  return traffic.size();
}

// Writes posted all at once take the rate, no more: the model loses no bandwidth either.
void check_rate(const WireFigures& figures) {
  WireModel model(figures);
  constexpr uint64_t kBytes = 256 << 10, kWrites = 400;
  double rate = 0;
  for (size_t rail = 0; rail < figures.rails.size(); ++rail) {
    Time first(0), last(0);
    for (uint64_t at = 0; at < kWrites; ++at) {
      last = model.write(rail, Time(0), kBytes, true);
      if (at == 0) first = last;
    }
    rate += static_cast<double>(kBytes * (kWrites - 1)) / static_cast<double>((last - first).count());
  }
  double sum = 0;
  for (const RailFigures& rail : figures.rails) sum += rail.bytes_per_ns;
  double expected = figures.bytes_per_ns > 0 ? std::min(sum, figures.bytes_per_ns) : sum;
  expect(std::abs(rate / expected - 1) < 1e-4, "rate of all rails together", rate, expected);
}

// A write that is posted later, or is larger, is not delivered earlier.
void check_monotone(const WireFigures& figures, std::vector<Traffic> traffic, Random& random) {
  auto deliveries = [&] {
    WireModel model(figures);
    std::vector<Time> times;
    for (const Traffic& write : traffic)
      times.push_back(model.write(write.rail, write.posted, write.bytes, write.first));
    return times;
  };
  std::vector<Time> before = deliveries();
  size_t changed = random.number(0, traffic.size() - 1);
  if (random.number(0, 1) != 0) {
    traffic[changed].bytes += random.bytes();
  } else {
    // With everything after it: the poster is one thread.
    while (changed > 0 && !traffic[changed].first) --changed;
    for (size_t at = changed; at < traffic.size(); ++at) traffic[at].posted += Time(777);
  }
  std::vector<Time> after = deliveries();
  for (size_t at = 0; at < traffic.size(); ++at) {
    expect(after[at] + Time(1) >= before[at], "delivery after larger or later writes",
           static_cast<double>((after[at] - before[at]).count()), 0);
  }
}

template <typename Change>
void check_refused(const char* part, Change change) {
  WireFigures figures;
  figures.rails = {{{{2, 1740}, {4096, 3190}}, 11.7}, {{{0, 3000}}, 11.7}};
  change(figures);
  try {
    WireModel model(figures);
  } catch (const spark::UsageError& error) {
    if (std::string(error.what()).find(part) != std::string::npos) return;
    std::printf("the sentence has no \"%s\": %s\n", part, error.what());
    std::exit(1);
  }
  std::printf("accepted, where it should say \"%s\"\n", part);
  std::exit(1);
}

void check_refusals() {
  check_refused("no rail", [](WireFigures& figures) { figures.rails.clear(); });
  check_refused("rail 1 has no latency", [](WireFigures& figures) { figures.rails[1].latency.clear(); });
  check_refused("rail 0 are not in ascending order: 4096, 4096",
                [](WireFigures& figures) { figures.rails[0].latency[0].bytes = 4096; });
  check_refused("at 4096 bytes of 1000 is invalid: must be no less than of fewer bytes",
                [](WireFigures& figures) { figures.rails[0].latency[1].ns = 1000; });
  check_refused("rail 0: rate", [](WireFigures& figures) { figures.rails[0].bytes_per_ns = -1; });
  check_refused("rate of all rails", [](WireFigures& figures) { figures.bytes_per_ns = NAN; });
  check_refused("doorbell", [](WireFigures& figures) { figures.doorbell_ns = INFINITY; });
  check_refused("work request", [](WireFigures& figures) { figures.work_request_ns = -0.1; });
  check_refused("limited together", [](WireFigures& figures) {
    figures.bytes_per_ns = 24;
    figures.rails[0].bytes_per_ns = 0;
  });
}

}  // namespace

int main() {
  check_refusals();
  size_t checked = 0;
  for (seed = 1; seed <= 2000; ++seed) {
    Random random(seed);
    WireFigures figures = random_figures(random);
    check_single_writes(figures);
    std::vector<Traffic> traffic = random_traffic(random, figures.rails.size());
    checked += check_traffic(figures, traffic);
    check_rate(figures);
    check_monotone(figures, traffic, random);
  }
  std::printf("%zu\n", checked);
}
