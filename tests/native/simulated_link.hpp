// Two ranks' links over modelled NICs in simulated time, driven by one thread: it posts messages to a rank's
// Link, and advances the clock to when something is due. Nothing depends on how fast this machine is.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/rank/endpoint.hpp"
#include "../../csrc/transport/modelled/nic.hpp"

namespace spark::testing {

using Time = WireModel::Time;

constexpr size_t kLargestPackets = 32 << 10;  // bytes on the wire

class SimulatedClock final : public modelled::NicClock {
 public:
  Time now() override { return now_; }
  void busy(Time end) override { now_ = end; }
  void advance_to(Time time) { now_ = std::max(now_, time); }

 private:
  Time now_{1};
};

inline Options options_of(int rank) {
  Options options;
  options.sizes = {1 << 20, kLargestPackets / 2, 8};
  options.depth = 4;
  options.rank = rank;
  return options;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

class Side {
 public:
  Side(int rank, const WireFigures& figures, SimulatedClock& clock)
      : endpoint(options_of(rank)),
        nic(figures, endpoint.memory(), endpoint.layout(), clock, false),
        link(link_options(), endpoint.memory(), endpoint.options().sizes, nic.rails(), rank),
        offer(link.offer()) {}

  void connect(Side& peer) {
    nic.set_peer(peer.endpoint.memory());
    link.connect(peer.offer, "the other side", [](const std::string& reason) { fail(reason.c_str()); });
  }
  bool open() const { return link.counters().rails_up.load() == nic.rails().size(); }

  Endpoint endpoint;
  modelled::Nic nic;
  verbs::Link link;
  std::string offer;

 private:
  verbs::LinkOptions link_options() {
    verbs::LinkOptions options;
    options.open_device = [this](const verbs::RailAddress& rail) { return nic.open(rail); };
    return options;
  }
};

class Pair {
 public:
  explicit Pair(const WireFigures& figures) : left_(0, figures, clock_), right_(1, figures, clock_) {
    left_.connect(right_);
    right_.connect(left_);
    // Announcements are made by the machine's clock; what they take on the wire, by the simulated one.
    auto end = Clock::now() + std::chrono::seconds(60);
    while (!left_.open() || !right_.open()) {
      if (Clock::now() > end) fail("the rails are not open after 60 s");
      for (Side* side : {&left_, &right_}) {
        side->link.maintain();
        side->link.progress();
      }
      clock_.advance_to(clock_.now() + Time(1000));
    }
  }

  // Half of a round trip of messages of so many bytes of data, in simulated time.
  double one_way(Protocol protocol, uint64_t bytes) {
    clock_.advance_to(clock_.now() + std::chrono::milliseconds(1));  // both rails are idle
    ++sequence_;
    Time start = clock_.now();
    send(left_, right_, protocol, bytes);
    send(right_, left_, protocol, bytes);
    return static_cast<double>((clock_.now() - start).count()) / 2;
  }

  // Simulated nanoseconds from when the first of `messages` is staged until the last has arrived at the right
  // rank. Each has `pieces` of so many bytes of payload; as many messages are staged as the window has, at
  // once, and their slots are used again as soon as they have arrived.
  double transfer(uint32_t messages, uint32_t pieces, uint64_t bytes) {
    clock_.advance_to(clock_.now() + std::chrono::milliseconds(1));  // both rails are idle
    left_.link.progress();
    Time start = clock_.now();
    uint32_t staged = sequence_, arrived = sequence_, last = sequence_ + messages;
    while (arrived != last) {
      for (; staged != last && staged - arrived < left_.endpoint.options().depth; ++staged) {
        for (uint32_t piece = 0; piece < pieces; ++piece) {
          left_.link.post(staged + 1,
                          {Protocol::kPayload, kTag, bytes, piece, static_cast<uint32_t>(piece * bytes), 1});
        }
        left_.link.flush();
      }
      for (; arrived != staged && pieces_arrived(arrived + 1, pieces); ++arrived) {
      }
      if (arrived != last && (staged == last || staged - arrived == left_.endpoint.options().depth))
        wait(left_);
    }
    sequence_ = last;
    return static_cast<double>((clock_.now() - start).count());
  }
  // Messages, or pieces, that the left rank has sent over a rail.
  uint64_t posts(size_t rail) const { return left_.link.counters().posts[rail].load(); }

 private:
  static constexpr uint32_t kTag = 7;

  // Returns when the message has arrived.
  void send(Side& from, Side& to, Protocol protocol, uint64_t bytes) {
    Region staged = from.endpoint.mine(), received = to.endpoint.mine();
    if (protocol == Protocol::kPackets) {
      std::atomic<uint64_t>* halves = staged.send_packets(sequence_);
      for (size_t half = 0; half < 2 * packet_count(bytes); ++half) {
        halves[half].store(packet_half(half == 0 ? kTag : 0, sequence_));
      }
    }
    if (protocol == Protocol::kPackets) bytes = packet_count(bytes) * sizeof(Packet);
    from.link.post(sequence_, {protocol, kTag, bytes});
    from.link.flush();
    while (!arrived(received, protocol)) wait(from);
  }
  // Until what that rank has posted and is due next has been delivered.
  void wait(Side& from) {
    std::optional<Time> due = from.nic.next_due();
    if (!due) fail("a message was posted and is not on its way");
    clock_.advance_to(*due);
    from.link.progress();
  }
  bool pieces_arrived(uint32_t sequence, uint32_t pieces) const {
    Region received = right_.endpoint.mine();
    for (uint32_t piece = 0; piece < pieces; ++piece) {
      if (flag_sequence(received.recv_flag(sequence, piece).load()) != sequence) return false;
    }
    return true;
  }
  bool arrived(const Region& region, Protocol protocol) const {
    if (protocol == Protocol::kPackets) {
      return half_arrived(region.recv_packets(sequence_)[0].load(), sequence_);
    }
    return flag_sequence(region.recv_flag(sequence_).load()) == sequence_;
  }

  SimulatedClock clock_;
  Side left_, right_;
  uint32_t sequence_ = 0;
};

// A rail from a program's arguments: RATE BYTES:NS BYTES:NS ...
inline RailFigures rail_of(char** begin, char** end) {
  if (end - begin < 2) fail("arguments are missing");
  RailFigures rail{{}, std::atof(*begin)};
  for (char** at = begin + 1; at != end; ++at) {
    unsigned long long bytes = 0;
    double ns = 0;
    if (std::sscanf(*at, "%llu:%lf", &bytes, &ns) != 2) fail("a latency is BYTES:NS");
    rail.latency.push_back({bytes, ns});
  }
  return rail;
}

}  // namespace spark::testing
