// What the verbs transport makes of a modelled link, in simulated time: one thread posts messages to one
// rank's Link and the answers to the other's, and advances the clock to when something is due. Nothing
// depends on how fast this machine is.
//
//   wire_ping RATE DOORBELL WORK_REQUEST BYTES:NS BYTES:NS ...
//
// A rail has that rate in bytes per nanosecond, costs of posting in nanoseconds, and the latencies. Prints a
// line for each of them: bytes on the wire, and half of a round trip in nanoseconds of a payload with its
// flag, and of packets (0 where there are none of that size).
#include <cstdio>
#include <cstdlib>

#include "../../csrc/rank/endpoint.hpp"
#include "../../csrc/transport/modelled/nic.hpp"

namespace {

using Time = spark::WireModel::Time;

constexpr size_t kLargestPackets = 32 << 10;  // bytes on the wire

class SimulatedClock final : public spark::modelled::NicClock {
 public:
  Time now() override { return now_; }
  void busy(Time end) override { now_ = end; }
  void advance_to(Time time) { now_ = std::max(now_, time); }

 private:
  Time now_{1};
};

spark::Options options_of(int rank) {
  spark::Options options;
  options.sizes = {1 << 20, kLargestPackets / 2, 8};
  options.depth = 4;
  options.rank = rank;
  return options;
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

class Side {
 public:
  Side(int rank, const spark::WireFigures& figures, SimulatedClock& clock)
      : endpoint(options_of(rank)),
        nic(figures, endpoint.memory(), endpoint.layout(), clock, false),
        link(link_options(), endpoint.memory(), endpoint.options().sizes, nic.rails(), rank),
        offer(link.offer()) {}

  void connect(Side& peer) {
    nic.set_peer(peer.endpoint.memory());
    link.connect(peer.offer, "the other side", [](const std::string& reason) { fail(reason.c_str()); });
  }
  bool open() const { return link.counters().rails_up.load() == nic.rails().size(); }

  spark::Endpoint endpoint;
  spark::modelled::Nic nic;
  spark::verbs::Link link;
  std::string offer;

 private:
  spark::verbs::LinkOptions link_options() {
    spark::verbs::LinkOptions options;
    options.open_device = [this](const spark::verbs::RailAddress& rail) { return nic.open(rail); };
    return options;
  }
};

class Pair {
 public:
  explicit Pair(const spark::WireFigures& figures) : left_(0, figures, clock_), right_(1, figures, clock_) {
    left_.connect(right_);
    right_.connect(left_);
    // Announcements are made by the machine's clock; what they take on the wire, by the simulated one.
    auto end = spark::Clock::now() + std::chrono::seconds(60);
    while (!left_.open() || !right_.open()) {
      if (spark::Clock::now() > end) fail("the rails are not open after 60 s");
      for (Side* side : {&left_, &right_}) {
        side->link.maintain();
        side->link.progress();
      }
      clock_.advance_to(clock_.now() + Time(1000));
    }
  }

  // Half of a round trip of messages of so many bytes of data, in simulated time.
  double one_way(spark::Protocol protocol, uint64_t bytes) {
    clock_.advance_to(clock_.now() + std::chrono::milliseconds(1));  // both rails are idle
    ++sequence_;
    Time start = clock_.now();
    send(left_, right_, protocol, bytes);
    send(right_, left_, protocol, bytes);
    return static_cast<double>((clock_.now() - start).count()) / 2;
  }

 private:
  // Returns when the message has arrived.
  void send(Side& from, Side& to, spark::Protocol protocol, uint64_t bytes) {
    constexpr uint32_t kTag = 7;
    spark::Region staged = from.endpoint.mine(), received = to.endpoint.mine();
    if (protocol == spark::Protocol::kPackets) {
      std::atomic<uint64_t>* halves = staged.send_packets(sequence_);
      for (size_t half = 0; half < 2 * spark::packet_count(bytes); ++half) {
        halves[half].store(spark::packet_half(half == 0 ? kTag : 0, sequence_));
      }
    }
    from.link.post(sequence_, {protocol, kTag, bytes});
    while (!arrived(received, protocol)) {
      std::optional<Time> due = from.nic.next_due();
      if (!due) fail("a message was posted and is not on its way");
      clock_.advance_to(*due);
      from.link.progress();
    }
  }
  bool arrived(const spark::Region& region, spark::Protocol protocol) const {
    if (protocol == spark::Protocol::kPackets) {
      return spark::half_arrived(region.recv_packets(sequence_)[0].load(), sequence_);
    }
    return spark::flag_sequence(region.recv_flag(sequence_).load()) == sequence_;
  }

  SimulatedClock clock_;
  Side left_, right_;
  uint32_t sequence_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) fail("arguments are missing");
  spark::RailFigures rail{{}, std::atof(argv[1])};
  for (int at = 4; at < argc; ++at) {
    unsigned long long bytes = 0;
    double ns = 0;
    if (std::sscanf(argv[at], "%llu:%lf", &bytes, &ns) != 2) fail("a latency is BYTES:NS");
    rail.latency.push_back({bytes, ns});
  }
  Pair pair({{rail}, 0, std::atof(argv[2]), std::atof(argv[3])});
  for (const spark::LatencyPoint& point : rail.latency) {
    double payload = pair.one_way(spark::Protocol::kPayload, point.bytes), packets = 0;
    if (point.bytes % sizeof(spark::Packet) == 0 && point.bytes <= kLargestPackets) {
      uint64_t data = (point.bytes / sizeof(spark::Packet) - 1) * spark::kPacketData;  // one is the header
      packets = pair.one_way(spark::Protocol::kPackets, data);
    }
    std::printf("%llu %.0f %.0f\n", static_cast<unsigned long long>(point.bytes), payload, packets);
  }
}
