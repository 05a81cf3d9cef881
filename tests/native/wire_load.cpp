// How long the verbs transport takes for messages in pieces over a modelled link of two rails, in simulated
// time: what posting so many pieces costs, and how the rails share them.
//
//   wire_load DOORBELL WORK_REQUEST TOGETHER RATE BYTES:NS BYTES:NS ...
//
// Both rails have the rate and the latencies, as in wire_ping.cpp. Reads lines of three numbers from its
// input: messages, pieces of each, and bytes of a piece. Answers each with the nanoseconds until all have
// arrived, and the pieces that went over either rail.
#include <cinttypes>

#include "simulated_link.hpp"

int main(int argc, char** argv) {
  using namespace spark::testing;
  if (argc < 5) fail("arguments are missing");
  spark::RailFigures rail = rail_of(argv + 4, argv + argc);
  Pair pair({{rail, rail}, std::atof(argv[3]), std::atof(argv[1]), std::atof(argv[2])});
  uint32_t messages = 0, pieces = 0;
  uint64_t bytes = 0;
  while (std::scanf("%" SCNu32 " %" SCNu32 " %" SCNu64, &messages, &pieces, &bytes) == 3) {
    uint64_t before[] = {pair.posts(0), pair.posts(1)};
    double ns = pair.transfer(messages, pieces, bytes);
    std::printf("%.0f %" PRIu64 " %" PRIu64 "\n", ns, pair.posts(0) - before[0], pair.posts(1) - before[1]);
  }
}
