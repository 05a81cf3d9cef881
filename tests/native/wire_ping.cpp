// What the verbs transport makes of a modelled link of one rail, in simulated time.
//
//   wire_ping DOORBELL WORK_REQUEST RATE BYTES:NS BYTES:NS ...
//
// The rail has these costs of posting in nanoseconds, that rate in bytes per nanosecond, and the latencies.
// Prints a line for each of them: bytes on the wire, and half of a round trip in nanoseconds of a payload
// with its flag, and of packets (0 where there are none of that size).
#include "simulated_link.hpp"

int main(int argc, char** argv) {
  using namespace spark::testing;
  if (argc < 4) fail("arguments are missing");
  spark::RailFigures rail = rail_of(argv + 3, argv + argc);
  Pair pair({{rail}, 0, std::atof(argv[1]), std::atof(argv[2])});
  for (const spark::LatencyPoint& point : rail.latency) {
    double payload = pair.one_way(spark::Protocol::kPayload, point.bytes), packets = 0;
    if (point.bytes % sizeof(spark::Packet) == 0 && point.bytes <= kLargestPackets) {
      uint64_t data = (point.bytes / sizeof(spark::Packet) - 1) * spark::kPacketData;  // one is the header
      packets = pair.one_way(spark::Protocol::kPackets, data);
    }
    std::printf("%llu %.0f %.0f\n", static_cast<unsigned long long>(point.bytes), payload, packets);
  }
}
