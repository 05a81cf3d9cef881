// A model of the link between two machines: when an RDMA write that is posted now has been delivered.
//
// Pure: it computes with the times that it is given, and reads no clock. For one direction of the link, and
// one thread at a time.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace spark {

// One-way latency of a write of `bytes` over an idle rail, from the start of its posting until the receiver
// can see its last byte: what `ib_write_lat` reports.
struct LatencyPoint {
  uint64_t bytes;
  double ns;
};

struct RailFigures {
  // Ascending in bytes and not descending in time; linear in between. Smaller writes take the first point's
  // time, larger ones the last point's and the rest of their bytes over the rate. One point at 0 bytes is the
  // alpha-beta model.
  std::vector<LatencyPoint> latency;
  double bytes_per_ns = 0;  // of writes posted back to back; 0: unlimited
};

struct WireFigures {
  std::vector<RailFigures> rails;
  double bytes_per_ns = 0;     // of all rails together; 0: the sum of the rails' rates
  double doorbell_ns = 0;      // time of the posting thread for each chain of writes
  double work_request_ns = 0;  // and for each write of it
};

class WireModel {
 public:
  using Time = std::chrono::nanoseconds;  // since any moment, the same one in all calls

  // Throws UsageError for figures that describe no link: no rail, a curve without points or that descends,
  // negative or infinite numbers.
  explicit WireModel(const WireFigures& figures);

  size_t rails() const { return rails_.size(); }
  // When the write is delivered. `now`: when the posting of its chain began, not before that of an earlier
  // call for any rail. `first`: of a chain, whose doorbell is rung once; the writes after it are passed with
  // the same `now`.
  //
  // - A single write over an idle rail takes `latency(rail, bytes)`.
  // - Writes of one rail are delivered in the order of their posting, and share its rate one after the other.
  // - Rails do not delay each other. If together they are slower than the sum of their rates, each one's
  // share
  //   of that is proportional to its rate, also while the others are idle.
  Time write(size_t rail, Time now, uint64_t bytes, bool first);
  // How long posting a chain of so many writes keeps the posting thread.
  Time posting_time(size_t writes) const;
  // Nanoseconds of a single write over an idle rail.
  double latency(size_t rail, uint64_t bytes) const;

 private:
  struct Rail {
    RailFigures figures;
    double ns_per_byte;       // while all rails are busy
    double chain_ns = 0;      // from the start of the chain's posting to that of the latest write
    double free_ns = 0;       // when the last write posted has left it
    double delivered_ns = 0;  // when the last write posted is delivered
  };

  std::vector<Rail> rails_;
  double doorbell_ns_, work_request_ns_;
  bool begun_ = false;
  // Times are kept as fractions of nanoseconds since the first write: a flag of 8 bytes takes less than one,
  // and a double holds no fraction of the time since a machine's start.
  Time origin_{};
};

}  // namespace spark
